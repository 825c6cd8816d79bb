"""R17: rows whose loss or gradient is not finite are set aside with a reason, and no other number moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import quiet, recipe_of, room, run, world_in
from tests.rows import chat, some_rows, write_jsonl
from tests.toy import VOCABULARY, toy_llama

from gradsift.errors import NumericsError
from gradsift.gradients import collect
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.store.shards import ShardResult, encode_shard
from gradsift.types import RowStatus, TokenRow

LEAKS = "a row's trouble spreads over its micro-batch"
BELIEVED = "a number that is not finite is believed"
NAN, INF, HUGE, PLAIN = 200, 201, 202, 150  # tokens: their embeddings are broken, or huge
REL = 1e-6


def broken_model() -> Any:
    """A toy whose embeddings of three tokens are NaN, infinite and so large that the gradient overflows."""
    model = toy_llama(seed=5)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[NAN], table[INF], table[HUGE] = float("nan"), float("inf"), 3e38
    return model


def rows_of(count: int, share: float, seed: int) -> tuple[list[TokenRow], dict[str, int]]:
    """Rows sorted by length; a share of them holds a broken token."""
    random = np.random.default_rng(seed)
    lengths = np.sort(random.integers(6, 24, count))
    bad = random.choice(count, max(3, round(share * count)), replace=False)
    rows, planted = [], {}
    for n, length in enumerate(lengths):
        ids = random.integers(4, 150, length).astype(np.int32)
        name = f"row-{n:05}"
        if n in set(bad.tolist()):
            planted[name] = (NAN, INF, HUGE)[len(planted) % 3]
            ids[int(random.integers(0, length // 2))] = planted[name]
        rows.append(TokenRow(name, ids, np.arange(length) >= 2, length, RowStatus.OK))
    return rows, planted


def pass_of(model: Any) -> Pass:
    """A pass over all weights, with a sketch."""
    names = [name for name, _ in model.named_parameters()]
    return Pass(GradientEngine(model, names, projector=Projector(7, 61)), (), 256, 3)


def spread(run_: Pass, rows: Sequence[TokenRow]) -> Any:
    """The planted defect: a mean over the micro-batch gets into every row."""
    got = PLAIN_MEASURE(run_, rows)
    got.norm[:] += 0 * got.norm.mean()
    return got


PLAIN_MEASURE = collect._measure


@contextmanager
def planted_defect(defect: str) -> Any:
    """Plant a defect for a while."""
    if defect == LEAKS:
        with patch.object(collect, "_measure", spread):
            yield
    elif defect == BELIEVED:
        with patch.object(collect, "_status", lambda values, k, row, gradients: (row.status, row.reason)):
            yield
    else:
        yield


def numbers(result: ShardResult) -> dict[str, np.ndarray]:
    """Every signal of every row by id."""
    assert result.sketch is not None
    columns = np.column_stack(
        [result.loss, result.grad_norm, result.emb_grad_norm, result.head_grad_norm, result.sketch]
    )
    return dict(zip(result.ids, columns, strict=True))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Difference of two rows' signals: each norm by itself, the sketch by its length."""
    parts = np.abs(a[:4] - b[:4]) / np.abs(b[:4])
    return float(max(np.nanmax(parts), np.linalg.norm(a[4:] - b[4:]) / np.linalg.norm(b[4:])))


def rows_trial(full: bool) -> dict[str, Any]:
    """Broken rows among sound ones, against a run without them and against one of equal shapes."""
    rows, planted = rows_of(2000 if full else 300, 0.01, 17)
    run_ = pass_of(broken_model())
    sound = [row for row in rows if row.id not in planted]
    same_shape = []
    for row in rows:
        ids = np.where(row.input_ids >= NAN, PLAIN, row.input_ids).astype(np.int32)
        same_shape.append(TokenRow(row.id, ids, row.trained, row.num_untruncated, row.status))
    with run_.engine, np.errstate(all="ignore"):
        got, without, equal = (measure_shard(run_, some) for some in (rows, sound, same_shape))
    status = dict(zip(got.ids, got.status, strict=True))
    reason = dict(zip(got.ids, got.reason, strict=True))
    found = [name for name in planted if status[name] in collect.BAD and reason[name]]
    false = [row.id for row in sound if not status[row.id].usable]
    a, b, c = numbers(got), numbers(without), numbers(equal)
    names = [row.id for row in sound if row.id not in false]
    bits = sum(a[n].tobytes() != c[n].tobytes() for n in names)
    return {
        "rows": len(rows), "planted": len(planted), "found": len(found), "false": len(false),
        "worst_rel_without_them": max((relative(a[n], b[n]) for n in names), default=float("inf")),
        "rows_not_bitwise_at_equal_shapes": bits,
        "statuses": {str(s): sum(status[n] is s for n in planted) for s in collect.BAD},
    }  # fmt: skip


def overflow_trial() -> dict[str, Any]:
    """One row whose gradient is beyond float16: it is a sound row and stays one, also in the store."""
    model = toy_llama(seed=5)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)
    rows, _ = rows_of(8, 0.0, 3)
    rows = [row for row in rows if (row.input_ids < 150).all()]
    run_ = pass_of(model)
    with run_.engine:
        got = measure_shard(run_, rows[:4])
    norm = float(np.nanmax(got.grad_norm))
    from tests.unit.store.store_world import make_spec

    from gradsift.store.spec import Projection

    spec = make_spec(
        signals=("loss", "grad_norm", "emb_grad_norm", "head_grad_norm", "sketch"), anchors={},
        projection=Projection(61, 7, "stub"),
    )  # fmt: skip
    files = encode_shard(got, spec)
    return {"norm": norm, "usable": int(got.usable.sum()), "of": len(got.ids), "stored": len(files) == 2}


def abort_trial(full: bool) -> dict[str, Any]:
    """Whole runs: 4% of broken rows is accepted, 8% stops the run, and the share can be set."""
    from transformers import AutoModelForCausalLM

    out: dict[str, Any] = {}
    count = 100 if full else 50
    with room() as folder:
        place = world_in(folder / "world", 10)
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(place / "navigator")
            from transformers import AutoTokenizer

            token = AutoTokenizer.from_pretrained(place / "navigator").encode("~", add_special_tokens=False)[0]
            assert token < VOCABULARY
            with torch.no_grad():
                model.get_input_embeddings().weight[token] = float("nan")
            model.save_pretrained(place / "navigator")
        for name, share, limit in (("4%", 0.04, 0.05), ("8%", 0.08, 0.05), ("8%, 10% allowed", 0.08, 0.10)):
            rows = some_rows(count, 4)
            for k in range(round(share * count)):
                rows[7 * k % count] = chat(f"broken ~ {k}?", "yes")
            write_jsonl(place / "pool.jsonl", rows)
            try:
                done = run(recipe_of(place, collect__abort_share=limit), folder / f"run {name}")
                out[name] = {"stopped": False, "status": dict(done.manifest["rows"]["status"])}
            except NumericsError as error:
                out[name] = {"stopped": True, "said": f"{error.got}; {error.expected}"}
    return out


def measure(full: bool, defect: str) -> dict[str, Any]:
    """All three."""
    with planted_defect(defect), quiet() if full else nullcontext():
        figures = {"rows": rows_trial(full), "overflow": overflow_trial()}
    if not defect:
        figures["abort"] = abort_trial(full)
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """All planted rows found, none besides; neighbors unmoved; the run stops above the share and not below."""
    rows, huge = figures["rows"], figures["overflow"]
    rel = rows["worst_rel_without_them"]
    rel = float("inf") if rel is None else rel
    checks = [
        Check("planted rows found, with a reason", f"{rows['found']}/{rows['planted']} of {rows['rows']} rows", "100%",
              rows["found"] == rows["planted"] > 0),
        Check("sound rows set aside", str(rows["false"]), "0", rows["false"] == 0),
        Check("neighbors against a run without them", f"rel {rel:.1e}", f"<= {REL:g}", rel <= REL),
        Check("neighbors that differ in a bit at equal shapes", str(rows["rows_not_bitwise_at_equal_shapes"]), "0",
              rows["rows_not_bitwise_at_equal_shapes"] == 0),
        Check("rows with a gradient beyond float16 kept",
              f"{huge['usable']}/{huge['of']}, longest {huge['norm'] or float('nan'):.0f}", "all",
              huge["usable"] == huge["of"] and (huge["norm"] or 0) > 65504 and huge["stored"]),
    ]  # fmt: skip
    if "abort" in figures:
        got = {name: found["stopped"] for name, found in figures["abort"].items()}
        want = {"4%": False, "8%": True, "8%, 10% allowed": False}
        said = ", ".join(f"{name} {'stopped' if stop else 'ran'}" for name, stop in got.items())
        checks.append(Check("share above which the run stops (5%, settable)", said, "4% runs, 8% stops", got == want))
    return Outcome("R17", tuple(checks))


TRIAL = Trial(
    "R17", "1% of rows hit a broken embedding; gradients beyond float16; 4% and 8% of a pool broken",
    "planted found 100%, false 0, neighbors within 1e-6, bitwise at equal shapes; stops above 5%", measure, judge,
    (LEAKS, BELIEVED), {"rows": 2000, "share": 0.01, "pool_of_the_whole_runs": 100}, slow=True,
)  # fmt: skip
