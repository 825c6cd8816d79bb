"""The road of large pools through a whole selection: equal bytes, appended rows alone measured, pools behind URLs."""

from __future__ import annotations

import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.rows import some_rows, world, write_jsonl

from gradsift import select
from gradsift.data import spool, token_cache

SMALL = {"collect.rows_per_shard": 5, "collect.sketch_dim": 251}


def run(pool, out, navigator, method="norm", **options):
    return select(
        pool, method=method, budget="25%", out=out, navigator=navigator, settings=SMALL, report=False, **options
    )


def store_files(out) -> dict[str, bytes]:
    """Shards and noise; commit records hold the versions of what made them and are compared by their names."""
    places = [path for path in (out / "signals").rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): b"" if path.parent.name == "ledger" else path.read_bytes() for path in places
            if path.suffix not in (".lock",) and "flights" not in path.parts}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_store_and_selection_do_not_depend_on_the_road(tmp_path, navigator, cache, monkeypatch):
    files = world(tmp_path)
    pq.write_table(pa.Table.from_pylist(some_rows(9, seed=77)), tmp_path / "more.parquet", row_group_size=4)
    pool = {"pool": files["pool"], "more": tmp_path / "more.parquet"}
    options = {"anchors": {"math": files["math"], "chat": files["chat"]}, "target": files["target"]}
    run(pool, tmp_path / "small", navigator, "ogs_dual", **options)
    assert not (cache / "tokens").exists()
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    for name in ("made", "found"):
        run(pool, tmp_path / name, navigator, "ogs_dual", **options)
        assert (
            len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 5
        )  # two of the pool, three others
        assert store_files(tmp_path / name) == store_files(tmp_path / "small")
        for file in ("selected.jsonl", "audit.parquet", "examples.json"):
            other = (tmp_path / "small" / "selection" / file).read_bytes()
            assert (tmp_path / name / "selection" / file).read_bytes() == other, file


@pytest.mark.parametrize("how", ["a file", "the end of the file"])
def test_appended_rows_alone_are_measured(tmp_path, navigator, cache, monkeypatch, how):
    monkeypatch.setattr(spool, "IN_MEMORY", 0)
    first, more = some_rows(12, seed=1), some_rows(5, seed=2)
    pool = {"pool": write_jsonl(tmp_path / "a.jsonl", first)}
    run(pool, tmp_path / "run", navigator)
    before = store_files(tmp_path / "run")
    made = []
    real = token_cache.tokenize_rows
    monkeypatch.setattr(token_cache, "tokenize_rows", lambda rows, *a, **k: made.extend(rows) or real(rows, *a, **k))
    if how == "a file":
        pool["more"] = write_jsonl(tmp_path / "b.jsonl", more)
    else:
        write_jsonl(tmp_path / "a.jsonl", first + more)
    run(pool, tmp_path / "run", navigator)
    assert len(made) == (5 if how == "a file" else 17)
    after = store_files(tmp_path / "run")
    kept = {name: body for name, body in before.items() if "noise" not in name}
    assert {name: after[name] for name in kept} == kept
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    audit = pq.read_table(tmp_path / "run" / "selection" / "audit.parquet").to_pydict()
    assert manifest["cost"]["tokens"]["collect"] == sum(audit["num_tokens"][12:])
    whole = run(pool, tmp_path / "whole", navigator)
    assert set(whole.ids) == {i for i, chosen in zip(audit["id"], audit["selected"], strict=True) if chosen}


def test_a_pool_behind_a_url(tmp_path, navigator, cache):
    write_jsonl(tmp_path / "a.jsonl", some_rows(12, seed=1))
    with fsspec.open("memory://bucket/a.jsonl", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    near = run({"pool": tmp_path / "a.jsonl"}, tmp_path / "near", navigator)
    far = run({"pool": "memory://bucket/a.jsonl"}, tmp_path / "far", navigator)
    assert near.ids == far.ids
    assert store_files(tmp_path / "near") == store_files(tmp_path / "far")
    chosen = [(tmp_path / name / "selection" / "selected.jsonl").read_bytes() for name in ("near", "far")]
    assert chosen[0] == chosen[1]
    assert (
        json.loads((tmp_path / "far" / "manifest.json").read_text())["inputs"][0]["path"] == "memory://bucket/a.jsonl"
    )
