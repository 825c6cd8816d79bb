"""A collector killed at any moment loses nothing that it acknowledged and measures at most one shard again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from store_crasher import judge, lines, make_ids, memory_folder, read, truth

CRASHER = Path(__file__).parent / "store_crasher.py"
SPAN = 32


def start(folder: Path, rows: int, per_shard: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, CRASHER, folder, str(rows), str(per_shard)], stderr=subprocess.PIPE)


def kill_at_random(folder: Path, rows: int, kills: int, random: np.random.Generator) -> dict[str, int]:
    """Kill the collector again and again, each time somewhere in the next few shards; let the last one finish."""
    done = again = 0
    for _ in range(kills):
        before = len(lines(folder / "measured"))
        if len(lines(folder / "acknowledged")) >= rows - 6 * SPAN:
            break
        process = start(folder, rows, SPAN)
        wait_for = before + SPAN * int(random.integers(1, 5))
        while len(lines(folder / "measured")) < wait_for and process.poll() is None:
            time.sleep(0.002)
        time.sleep(float(random.uniform(0, 0.02)))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert process.returncode == -signal.SIGKILL, "the collector was to be killed, not to finish or fail"
        assert judge(folder, rows) == []
        done += 1
    process = start(folder, rows, SPAN)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors.decode()
    again = len(lines(folder / "measured")) - rows
    return {"kills": done, "again": again}


def check_kills(rows: int, kills: int, seed: int) -> dict[str, int]:
    with memory_folder() as folder:
        outcome = kill_at_random(folder, rows, kills, np.random.default_rng(seed))
        assert read(folder / "store") == truth(make_ids(rows))
        acknowledged = lines(folder / "acknowledged")
        assert len(acknowledged) == len(set(acknowledged)), "no row is acknowledged twice"
        assert set(acknowledged) <= set(make_ids(rows))
        assert outcome["again"] <= outcome["kills"] * SPAN
    return outcome


def test_kills_at_random_moments():
    outcome = check_kills(rows=1700, kills=8, seed=1)
    assert outcome["kills"] == 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_at_random_moments():
    assert check_kills(rows=20_000, kills=50, seed=2)["kills"] == 50


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
