"""A collector killed at any moment loses nothing that it acknowledged and measures at most one shard again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from store_crasher import judge, lines, make_ids, memory_folder, read, truth

CRASHER = Path(__file__).parent / "store_crasher.py"
SPAN = 32


def run(folder: Path, rows: int, *die: object) -> subprocess.CompletedProcess:
    command = [sys.executable, CRASHER, folder, rows, SPAN, *die]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=100)


def kill_at_random(folder: Path, rows: int, kills: int, random: np.random.Generator) -> int:
    """Kill the collector again and again, each time in one of its next shards; let the last one finish.

    Returns how many rows were measured more than once.
    """
    for _ in range(kills):
        killed = run(folder, rows, random.integers(1, 5), random.uniform(0.0001, 0.006))
        assert killed.returncode == -signal.SIGPROF, f"was to be killed, not to finish or fail: {killed.stderr}"
        assert judge(folder, rows) == []
    last = run(folder, rows)
    assert last.returncode == 0, last.stderr
    return len(lines(folder / "measured")) - rows


def check_kills(rows: int, kills: int, seed: int) -> None:
    with memory_folder() as folder:
        again = kill_at_random(folder, rows, kills, np.random.default_rng(seed))
        assert read(folder / "store") == truth(make_ids(rows))
        acknowledged = lines(folder / "acknowledged")
        assert len(acknowledged) == len(set(acknowledged)), "no row is acknowledged twice"
        assert set(acknowledged) <= set(make_ids(rows))
        assert again <= kills * SPAN


def test_kills_at_random_moments():
    check_kills(rows=4000, kills=8, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_at_random_moments():
    check_kills(rows=20_000, kills=50, seed=2)


@pytest.mark.parametrize(("how", "at_least"), [("before the call", 60), ("half", 10)])
def test_a_kill_at_every_system_call(how, at_least):
    """Three shards; die before each call, or with half of a write's bytes on the disk."""
    command = [sys.executable, CRASHER, "sweep", "18", "6", how]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    outcomes = [json.loads(line) for line in run.stdout.splitlines()]
    assert [o for o in outcomes if o["faults"]] == []
    assert [o["point"] for o in outcomes] == list(range(len(outcomes)))
    assert len(outcomes) >= at_least, "a shard alone is sixteen calls that can be interrupted, three of them writes"
    assert max(o["again"] for o in outcomes) > 0, "some kills must have cost a shard"
