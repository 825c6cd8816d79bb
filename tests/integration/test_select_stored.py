"""A run whose sketches stay on the disk leaves what a run leaves that has them in memory."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from tests.rows import world

from gradsift import select
from gradsift.pipeline import problem as problem_module
from gradsift.types import StoredRows


@pytest.mark.parametrize("method", ["ogs_dual", "grad_match", "hybrid"])
def test_the_choice_does_not_depend_on_where_sketches_lie(tmp_path, navigator, monkeypatch, method):
    files = world(tmp_path)
    settings = {"collect.rows_per_shard": 5, "collect.sketch_dim": 251, "allow_weak_anchor": True}

    def run(out):
        return select(
            {"pool": files["pool"]}, method=method, budget="50%", out=out, anchors={"math": files["math"]},
            target=files["target"], navigator=navigator, settings=settings, report=False,
        )  # fmt: skip

    before = run(tmp_path / "memory")
    seen = []
    monkeypatch.setattr(problem_module, "IN_MEMORY", 0)
    real = problem_module.stored_sketches
    monkeypatch.setattr(problem_module, "stored_sketches", lambda *a: seen.append(real(*a)) or seen[-1])
    after = run(tmp_path / "disk")
    assert len(seen) == 1
    assert isinstance(seen[0], StoredRows)
    assert after.ids == before.ids
    assert after.weights.tolist() == before.weights.tolist()
    tables = [pq.read_table(tmp_path / name / "selection/audit.parquet") for name in ("memory", "disk")]
    assert tables[0].equals(tables[1])
    checks = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("memory", "disk")]
    for key in ("batch_check", "set_conflict"):
        for one, other in zip(checks[0][key] or (), checks[1][key] or (), strict=True):
            assert one.pop("anchor") == other.pop("anchor")
            assert one == pytest.approx(other, rel=1e-6)  # sums over blocks in another order
