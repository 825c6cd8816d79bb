"""Comparison cells on a GPU give the figures of the same cells on the CPU (runs where there is a GPU)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.fabricated import config
from tests.real import SMALL, made_up

from gradsift.compare import real_data as rd
from gradsift.compare.arms import ArmSpec, Desk
from gradsift.compare.cell import Grid, run_cell
from gradsift.compare.real_world import real_world
from gradsift.compare.worlds import build_world
from gradsift.models.load import load_navigator, resolve_navigator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

GRID = Grid(lrs=(1e-3,), num_steps=4, batch_size=4, budget=12, tokens_per_batch=512)
ARMS = (
    ArmSpec("random", "random"),
    ArmSpec("full", "full"),
    ArmSpec("rds", "rds"),
    ArmSpec("domain_looking+replay25", "domain_looking", replay=0.25),
    ArmSpec("ogs_dual", "ogs_dual", {"kappa": 0.75}),
    ArmSpec("ogs_rounds", "ogs_rounds", {"num_rounds": 2}),
    ArmSpec("less", "less"),
    ArmSpec("kl", "random", train={"kl": 0.5}),
    ArmSpec("ewc", "random", train={"ewc": 0.5}),
    ArmSpec("l2sp", "random", train={"l2sp": 0.5}),
    ArmSpec("stm", "random", train={"stm": {"drop_share": 0.2}}),
    ArmSpec("wise_ft", "random", train={"wise_ft": 0.5}),
    *(ArmSpec(name, "random", train={"hook": name}) for name in ("agem", "gem", "pcgrad", "ogd", "safegrad", "gpm")),
)


@pytest.fixture(scope="module")
def desks(navigator):
    items = rd.Items({source: made_up(source) for source in rd.SOURCES}, dict.fromkeys(rd.SOURCES, 0))
    made = {}
    for device in ("cpu", "cuda:0"):
        loaded = load_navigator(resolve_navigator(str(navigator)), device=device)
        made[device] = Desk(real_world(5, SMALL, loaded, items), GRID.budget)
    return made


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_a_cell_on_the_gpu_has_the_figures_of_the_cpu(desks, arm):
    assert {p.device.type for p in desks["cuda:0"].world.make_model().parameters()} == {"cuda"}
    there, here = (run_cell(desks[device], arm, GRID) for device in ("cuda:0", "cpu"))
    assert there.notes == here.notes
    for one, other in zip(there.points, here.points, strict=True):
        for name, figures in one.metrics.items():
            for figure in ("loss_before", "loss_after", "kl"):
                assert figures[figure] == pytest.approx(other.metrics[name][figure], rel=2e-3, abs=2e-4), (name, figure)


def test_a_lesson_on_the_gpu_is_not_taken_for_one_of_the_cpu(navigator, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path))
    items = rd.Items({source: made_up(source) for source in rd.SOURCES}, dict.fromkeys(rd.SOURCES, 0))
    for device in ("cpu", "cuda:0"):
        loaded = load_navigator(resolve_navigator(str(navigator)), device=device)
        world = real_world(5, replace(SMALL, lesson=4), loaded, items)
        assert {p.device for p in world.make_model().parameters()} == {torch.device(device)}
        assert len(world.base) == 12
    assert len(list((tmp_path / "worlds").glob("real-*.safetensors"))) == 2


def test_a_planted_world_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path))
    found = config()
    world = build_world(found.world, 0, "cuda:0")
    cell = run_cell(Desk(world, 40), ArmSpec("ogs_dual", "ogs_dual"), Grid(lrs=(1e-3,), num_steps=2, batch_size=8))
    assert {p.device.type for p in world.make_model().parameters()} == {"cuda"}
    assert len(cell.points) == 1
