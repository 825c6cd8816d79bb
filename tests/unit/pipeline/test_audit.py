"""The audit table, written a part at a time, against dictionaries over all rows at once."""

from __future__ import annotations

import errno
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rows import some_rows, write_jsonl
from tests.toy import toy_tokenizer

from gradsift.data.pool import read_pool
from gradsift.data.token_cache import tokenize_pool
from gradsift.data.tokenize import mask_rule
from gradsift.errors import DiskFullError
from gradsift.pipeline.audit import AuditRows, write_audit
from gradsift.recipe import SourceConfig
from gradsift.types import RowStatus

TOKENIZER = toy_tokenizer()
RULE = mask_rule(TOKENIZER, None, {"messages"})


def a_run(folder: Any, seed: int, dedup: str, part: int) -> tuple[AuditRows, list[dict[str, Any]], dict[str, Any]]:
    """A run with made-up signals: its audit, and what a dictionary per row says it must be."""
    draw = np.random.default_rng(seed)
    pools = []
    for k in range(2):
        rows: list[Any] = some_rows(int(draw.integers(3, 9)), seed + k)
        rows += [rows[int(i)] for i in draw.integers(len(rows), size=2)]  # copies
        rows += [{"messages": []}, {"messages": [{"role": "user", "content": "?"}]}]  # broken, and nothing to train
        rows += [{**row, "id": f"own-{k}-{n}"} for n, row in enumerate(some_rows(2, seed + 9 + k))]
        path = write_jsonl(folder / f"{seed}-{dedup}-{k}.jsonl", [rows[int(i)] for i in draw.permutation(len(rows))])
        pools.append(SourceConfig(label=("law", "law", "medical")[int(draw.integers(3))], path=str(path)))
    pool = read_pool(pools, dedup=dedup)  # type: ignore[arg-type]
    tokens = tokenize_pool(pool, TOKENIZER, RULE, max_length=60, tokenizer_key=lambda: "toy")
    ids = list(pool.index)
    first = [ids[i] for i in pool.first.tolist()]
    measured_ids = sorted({name for row, name in zip(tokens, first, strict=True) if row.status.usable})
    good = draw.random(len(measured_ids)) < 0.7
    n = len(measured_ids)
    dots = draw.standard_normal((n, 2))
    store = SimpleNamespace(
        ids=(*measured_ids[:-1], "of-another-pool") if seed % 4 == 0 else tuple(measured_ids),
        status=tuple(RowStatus.OK if ok else RowStatus.NONFINITE_LOSS for ok in good),
        reason=tuple("" if ok else f"loss of {name} is not finite" for ok, name in zip(good, measured_ids, strict=True)),
        loss=np.where(good, draw.random(n), np.nan), grad_norm=np.where(good, draw.random(n) + 0.1, np.nan),
        emb_grad_norm=draw.random(n), head_grad_norm=draw.random(n),
        spec=SimpleNamespace(signals=("emb_grad_norm",) if seed % 2 else ()),
        dots=lambda names: dots[:, [["keep", "target"].index(names[0])]],
    )  # fmt: skip
    directions = (SimpleNamespace(name="keep", role="protect"), SimpleNamespace(name="target", role="target"))
    measured: Any = None if seed % 5 == 0 else SimpleNamespace(store=store, directions=directions)
    fine = {name: measured is None or bool(ok) for name, ok in zip(measured_ids, good, strict=True)}
    eligible = sorted(row.id for row, name in zip(tokens, first, strict=True) if row.status.usable and fine[name])
    chosen = [eligible[int(i)] for i in draw.permutation(len(eligible))[: len(eligible) // 2]]
    size = len(eligible)
    selection: Any = SimpleNamespace(
        cut=SimpleNamespace(undecided=tuple(eligible[1::3]), known=seed % 7 > 0),
        ids=tuple(chosen), weights=draw.random(len(chosen)).astype(np.float32), problem_ids=tuple(eligible),
        score=np.where(draw.random(size) < 0.8, draw.random(size), np.nan),
        rank=np.where(draw.random(size) < 0.8, np.arange(1, size + 1), -1).astype(np.int32),
        cluster=draw.integers(-1, 3, size).astype(np.int32),
        reason_code=tuple(f"code {name}" for name in eligible), reason=tuple(f"because {name}" for name in eligible),
    )  # fmt: skip
    probed = draw.random(size) if seed % 3 == 0 else None
    problem: Any = SimpleNamespace(likeness=probed, held_out_loss=probed)
    prepared: Any = SimpleNamespace(pool=SimpleNamespace(pool=pool, tokens=tokens))
    want = slow_rows(pool, tokens, measured, problem, selection)
    return AuditRows(prepared, measured, problem, selection, part), want, slow_counts(want)


def slow_rows(pool: Any, tokens: Any, measured: Any, problem: Any, selection: Any) -> list[dict[str, Any]]:
    """A dictionary per row, looked up by id."""
    place = {name: i for i, name in enumerate(selection.problem_ids)}
    order = {name: i for i, name in enumerate(selection.ids)}
    found = {} if measured is None else {name: i for i, name in enumerate(measured.store.ids)}
    out = []
    for row, token in zip(pool.rows, tokens, strict=True):
        i, m = place.get(row.id), found.get(row.copy_of or row.id) if token.status.usable else None
        status, reason = token.status, token.reason
        if m is not None and measured is not None and not measured.store.status[m].usable:
            status, reason = measured.store.status[m], measured.store.reason[m]
        one: dict[str, Any] = {
            "id": row.id, "source": row.source, "file": row.file, "row": row.row, "status": status.value,
            "num_tokens": token.num_tokens, "num_trained": token.num_trained,
        }  # fmt: skip
        signals: dict[str, Any] = {"loss": None, "grad_norm": None}
        if measured is not None:
            store = measured.store
            signals = {"loss": store.loss, "grad_norm": store.grad_norm}
            signals |= {f"cos_{name}": store.dots([name])[:, 0] / store.grad_norm for name in ("keep", "target")}
            if store.spec.signals:
                signals |= {"emb_grad_norm": store.emb_grad_norm, "head_grad_norm": store.head_grad_norm}
        for name, values in signals.items():
            known = values is not None and m is not None and status.usable
            value = values[m] if known else np.nan  # type: ignore[index]
            one[name] = float(np.float32(value)) if np.isfinite(value) else None
        score = None if i is None or np.isnan(selection.score[i]) else float(selection.score[i])
        one["score"] = score
        for name in ("rank", "cluster"):
            value = -1 if i is None else int(getattr(selection, name)[i])
            one[name] = None if value < 0 else value
        k = order.get(row.id)
        one |= {"selected": k is not None, "order": k, "weight": None if k is None else float(selection.weights[k])}
        one["undecided"] = row.id in selection.cut.undecided if selection.cut.known else None
        one["reason_code"] = f"unusable:{status.value.lower()}" if i is None else selection.reason_code[i]
        one["reason"] = reason if i is None else selection.reason[i]
        if problem.likeness is not None:
            value = None if i is None else float(np.float32(problem.likeness[i]))
            one |= {"likeness": value, "held_out_loss": value}
        out.append(one)
    return out


def slow_counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts as a loop makes them."""
    usable = [row for row in rows if row["status"] in ("OK", "TRUNCATED")]
    sources: dict[str, dict[str, int]] = {}
    for row in rows:
        entry = sources.setdefault(row["source"], {"read": 0, "usable": 0, "trained_tokens": 0})
        entry["read"] += 1
        entry["usable"] += row in usable
        entry["trained_tokens"] += row["num_trained"] if row in usable else 0
    return {
        "read": len(rows), "status": dict(Counter(row["status"] for row in rows)), "usable": len(usable),
        "tokens": sum(row["num_tokens"] for row in usable),
        "trained_tokens": sum(row["num_trained"] for row in usable), "sources": sources,
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["drop", "keep"]), st.sampled_from([1, 3, 7, 1 << 16]))
def test_the_table_is_that_of_a_dictionary_per_row(tmp_path_factory, seed, dedup, part):
    folder = tmp_path_factory.mktemp("audit")
    rows, want, counts = a_run(folder, seed, dedup, part)
    write_audit(rows, folder / "audit.parquet")
    table = pq.read_table(folder / "audit.parquet")
    assert table.to_pylist() == want
    assert table.column_names == list(want[0])
    assert rows.counts() == counts
    assert list(rows.counts()["status"]) == list(counts["status"])
    assert pq.ParquetFile(folder / "audit.parquet").num_row_groups == -(-len(want) // part)


def test_the_made_up_runs_hold_every_case(tmp_path):
    rows = [row for seed in range(1, 5) for row in a_run(tmp_path, seed, "keep", 7)[1]]
    assert {"OK", "TRUNCATED", "NONFINITE_LOSS", "NO_TRAINED_TOKEN"} <= {row["status"] for row in rows}
    assert {row["selected"] for row in rows} == {True, False}
    assert any(row["loss"] for row in rows)
    assert any(row["id"].endswith("-2") and row["loss"] for row in rows), "a copy shares the measurement of the first"


def test_a_full_disk_leaves_the_table_of_before(tmp_path, monkeypatch):
    rows, _, _ = a_run(tmp_path, 1, "drop", 3)
    path = tmp_path / "audit.parquet"
    write_audit(rows, path)
    before = path.read_bytes()
    plain, told = AuditRows.parts, []

    def fails(self: AuditRows) -> Any:
        for k, table in enumerate(plain(self)):
            if k == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            told.append(table.num_rows)
            yield table

    monkeypatch.setattr(AuditRows, "parts", fails)
    with pytest.raises(DiskFullError, match=r"audit\.parquet"):
        write_audit(rows, path)
    assert told == [3, 3]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.glob("audit*")] == ["audit.parquet"]
