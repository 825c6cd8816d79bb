"""Ranks of torchrun that hold one navigator together: store and choice are those of one process, also after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tests.launched import check_equal, check_redone, finish, measured, script, start, torchrun, wait_for, words
from tests.rows import world

NUM_UNITS = 12

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    world(folder, 60)
    return folder


@pytest.fixture(scope="module")
def whole(files: Path, navigator: Path) -> Path:
    """What one process makes of it."""
    out = files / "whole"
    finish(start(script(*words(files, navigator, out)), files / "log-whole"), seconds=300)
    return out


def facts(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())["launch"]


def test_two_ranks_with_one_navigator_between_them(files, whole, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    text = finish(start(torchrun(2, *words(files, navigator, out, "--fsdp")), log), seconds=300)
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 0)
    assert len({pid for pid, _ in measured(log)}) == 2, "both ranks must have measured, or the test shows nothing"
    found = facts(out)
    assert found["num_here"] + found["num_adopted"] == found["num_units"] == NUM_UNITS
    assert f"rank 1 of 2: measured {found['num_adopted']} units" in text
    shared = found["fsdp"]
    adapter = 59_392  # of rank 16 in float32, whole in both ranks
    base = shared["whole_bytes"] - adapter
    assert all(0.5 * base <= held - adapter < 0.51 * base for held in shared["local_bytes"])
    first, second = (mine + padded for mine, padded in zip(shared["num_steps"], shared["num_padded"], strict=True))
    assert first == second, "both ranks have called the model equally often"


def test_a_rank_killed_and_the_same_command_again(files, whole, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = words(files, navigator, out, "--fsdp")
    process = start(torchrun(2, *command), log, slow=0.3)

    def victim() -> int | None:
        notes = [json.loads(path.read_text()) for path in out.glob("launch/*/beats/1-*.json")]
        return next((n["pid"] for n in notes if sum(pid == n["pid"] for pid, _ in measured(log)) >= 2), None)

    os.kill(wait_for(victim, 300, process=process), signal.SIGKILL)
    finish(process, None, seconds=120)
    assert 0 < len({key for _, key in measured(log)}) < NUM_UNITS
    finish(start(torchrun(2, *command), log), seconds=300)
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 2)


def test_a_rank_killed_and_one_process_goes_on_with_the_whole_navigator(files, whole, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = words(files, navigator, out)
    process = start(torchrun(2, *command, "--fsdp"), log, slow=0.3)
    wait_for(lambda: len(measured(log)) >= 4, 300, process=process)
    process.terminate()
    finish(process, None, seconds=120)
    finish(start(script(*command), log), seconds=300)
    check_equal(out, whole)
    check_redone(log, NUM_UNITS, 2)


def test_upper_layers_and_all_signals(files, navigator, tmp_path):
    """The last layer alone, with embeddings, hidden states and the forwards of answers alone."""
    out, alone, log = tmp_path / "run", tmp_path / "alone", tmp_path / "log"
    more = ("--layers", "1", "--set", "collect.signals=all", "--set", "navigator.parameters=all")
    finish(start(script(*words(files, navigator, alone, *more)), tmp_path / "log-alone"), seconds=300)
    finish(start(torchrun(2, *words(files, navigator, out, *more, "--fsdp")), log), seconds=300)
    check_equal(out, alone)


def test_a_row_that_kills_is_set_aside_and_costs_no_other(files, navigator, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = words(files, navigator, out, "--set", "collect.abort_share=0.2")
    finish(start(script(*command), tmp_path / "log-ids"), seconds=300)
    bad = measured(tmp_path / "log-ids")[5][1]
    together = words(files, navigator, tmp_path / "poisoned", "--set", "collect.abort_share=0.2", "--fsdp")
    for _ in range(3):
        finish(start(torchrun(2, *together), log, POISON=bad), None, seconds=300)
    finish(start(torchrun(2, *together), log, POISON=bad), seconds=300)
    manifest = json.loads((tmp_path / "poisoned" / "manifest.json").read_text())
    assert manifest["rows"]["status"] == {"OK": 59, "WORKER_CRASH": 1}
