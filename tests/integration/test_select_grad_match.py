"""Gradient matching from files to a training run: one pass, weights in the audit table, and a trainer that uses them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.mini import BUDGET, desk
from tests.rows import world

from gradsift import select
from gradsift.compare import cell
from gradsift.compare.arms import ArmSpec, choose_own
from gradsift.methods import make_method
from gradsift.pipeline.checks import batch_checks
from gradsift.seeds import stream
from gradsift.train.config import TrainConfig
from gradsift.train.loop import Loop
from gradsift.train.material import read_material
from gradsift.types import Budget
from planted import planted_world


@pytest.mark.parametrize("name", ["grad_match", "grad_match_partitioned"])
def test_weights_reach_the_trainer(tmp_path, navigator, name):
    files = world(tmp_path)
    selection = select(
        {"pool": files["pool"]}, method=name, budget="50%", out=tmp_path / "run", target=files["target"],
        navigator=navigator, settings={"collect.sketch_dim": 251, "navigator.parameters": "all"}, report=False,
    )  # fmt: skip
    assert 0 < len(selection.ids) <= 12
    assert len(set(selection.weights.tolist())) > 1
    audit = {row["id"]: row for row in pq.read_table(tmp_path / "run/selection/audit.parquet").to_pylist()}
    wanted = dict(zip(selection.ids, selection.weights.tolist(), strict=True))
    assert {i: row["weight"] for i, row in audit.items() if row["selected"]} == pytest.approx(wanted)
    (note,) = (n for n in selection.notes if n.code == "weighted")
    assert f"from {selection.weights.min():.3g} to {selection.weights.max():.3g}" in note.text
    assert note.text in (tmp_path / "run/selection/README.md").read_text()
    found = json.loads((tmp_path / "run/selection/details.json").read_text())
    assert found["steer"] == "target"
    assert found["residual"] <= found["sum_of_residuals"] + 1e-12
    material = read_material(TrainConfig(model=str(navigator)), tmp_path / "run")
    assert material.weights == pytest.approx(wanted)
    assert [row.id for row in material.selected] == list(selection.ids)


def test_the_summed_gradient_of_weighted_rows_is_their_weighted_sum():
    problem = planted_world("gradient").problem()
    selection = make_method("grad_match", {}).select(problem, Budget(rows=24), stream(1, "select/grad_match"))
    shown = {one["anchor"]: one for one in batch_checks(problem, selection, 1)["set_conflict"]}
    place = [problem.ids.index(i) for i in selection.ids]
    total = sum(float(w) * problem.sketch[k].astype(np.float64) for k, w in zip(place, selection.weights, strict=True))
    dot = sum(float(w) * problem.target_dot[k] for k, w in zip(place, selection.weights, strict=True))
    assert shown["target"]["selected"] == pytest.approx(dot / np.linalg.norm(total), rel=1e-9)
    plain = batch_checks(problem, replace(selection, weights=np.ones_like(selection.weights)), 1)["set_conflict"]
    assert plain[-1]["selected"] == pytest.approx(
        problem.target_dot[place].sum() / np.linalg.norm(problem.sketch[place].sum(axis=0)), rel=1e-5
    )
    assert plain[-1]["selected"] != pytest.approx(shown["target"]["selected"], rel=1e-3)
    assert plain[-1]["pool"] == shown["target"]["pool"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield desk()


def test_an_arm_is_charged_the_pass_and_trains_with_its_weights(shared, monkeypatch):
    arm = ArmSpec("matched", "grad_match", family="gradient")
    choice = choose_own(shared, arm, BUDGET)
    assert set(choice.cost) == {"collect"}
    assert choice.cost["collect"].flops == shared.start[1].flops
    assert len(set(choice.weights.values())) > 1
    assert sum(choice.weights.values()) == pytest.approx(len(choice.ids), rel=1e-4)
    seen = []
    step = Loop.step

    def spy(self, rows, weights=None):
        seen.append(dict(zip([row.id for row in rows], weights, strict=True)))
        return step(self, rows, weights)

    monkeypatch.setattr(Loop, "step", spy)
    grid = cell.Grid(budget=BUDGET, lrs=(1e-3,), num_steps=2, batch_size=8)
    cell.run_cell(shared, arm, grid)
    assert len(seen) == 2
    for weights in seen:
        assert {i: choice.weights[i] for i in weights} == weights
