"""The GPU benchmark runs from end to end at toy size, and says what it left out."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("gpu")
    patch.undo()


def test_every_arm_is_timed_against_plain_and_written(gpu, tmp_path, capsys):
    assert (
        gpu.main(["--toy", "--rounds", "3", "--seconds", "30", "--json", str(tmp_path / "g.json"), "--commit", "abc"])
        == 0
    )
    facts = json.loads((tmp_path / "g.json").read_text())
    assert facts["commit"] == "abc"
    assert [(c["model"], c["length"]) for c in facts["cells"]] == list(gpu.TOY_CELLS)
    assert facts["not_measured"] == []
    for cell in facts["cells"]:
        arms = {arm["key"]: arm for arm in cell["arms"]}
        assert all(arm["not_run"] is None for arm in arms.values())
        assert arms["plain"]["ratio"] == 1
        assert {
            "forward",
            "floor",
            "sketch, body",
            "exact, body",
            "exact+sketch, body",
            "exact+sketch, torch road",
        } < set(arms)
        assert {"sketch, every weight", "exact, every weight", "exact+sketch, every weight"} < set(arms)
        assert all(
            len(arm["milliseconds"]) == 3 and arm["ratio_min"] <= arm["ratio"] <= arm["ratio_max"]
            for arm in arms.values()
        )
        assert cell["trained"] == cell["tokens"] // 2
    for figure, gap in facts["agreement"].items():
        assert gap <= 1e-5, figure
    printed = capsys.readouterr().out
    assert "not measured: nothing" in printed
    assert printed.count("exact+sketch, torch road") == 2


def test_a_run_without_time_left_names_its_missing_cells(gpu, capsys):
    assert gpu.main(["--toy", "--rounds", "3", "--seconds", "0"]) == 0
    assert "not measured: toy at 16" in capsys.readouterr().out


def test_an_arm_that_fails_costs_the_others_nothing(gpu):
    import torch

    def fail(batch):
        raise RuntimeError("planted")

    calls = []
    arms = [gpu.Arm("bad", fail), gpu.Arm("good", calls.append)]
    clock = gpu.Clock(torch.device("cpu"))
    gpu.warm_up(arms, "batch", clock)
    assert "planted" in arms[0].not_run
    assert gpu.time_rounds(arms, "batch", clock, until=0.0, most=9) == 3
    assert len(arms[1].milliseconds) == 3
    assert not arms[0].milliseconds
