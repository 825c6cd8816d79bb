"""The same pass by Ray actors, one of them killed on the way."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tests.launched import check_equal, check_redone, finish, measured, script, start, wait_for, words
from tests.rows import world

pytest.importorskip("ray", reason="ray is not installed (extra [ray])")

NUM_UNITS = 60


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_actors_and_one_killed_and_replaced(navigator: Path, tmp_path: Path):
    files = tmp_path / "files"
    files.mkdir()
    world(files, 300)
    whole, out, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    finish(start(script(*words(files, navigator, whole)), tmp_path / "log-whole"))
    process = start(script(*words(files, navigator, out, "--launcher", "ray", "--workers", "2")), log, slow=0.15)
    victim = wait_for(lambda: next((pid for pid, _ in measured(log)), None), process=process)
    wait_for(lambda: len(measured(log)) >= 4, process=process)
    os.kill(victim, signal.SIGKILL)
    finish(process, seconds=200)
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 1)
    state = json.loads((out / "launch" / "run.json").read_text())
    assert state["end"] == "done"
    assert state["tally"]["num_adopted"] == NUM_UNITS
    assert state["tally"]["num_here"] == 0, "the driver measures nothing"
    ranks = {json.loads(path.read_text())["rank"] for path in out.glob("launch/*/beats/*.json")}
    assert {0, 1, 2} < ranks, "the dead actor was replaced by one with a number of its own"
