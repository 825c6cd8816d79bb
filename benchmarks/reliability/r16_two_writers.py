"""R16: of twenty writers that start at once one wins and the others are told who; dead, stale and reused holders hinder nobody."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.reliability.frame import Check, Outcome, Trial
from tests.unit.store.store_world import memory_folder

from gradsift.errors import StoreError
from gradsift.store.lock import LOCK, STALE_SECONDS, me, take_lock

NO_EXCLUSION = "the lock does not exclude"
NOTE_ONLY = "the lock is a file that must not exist, and a dead holder keeps it"

# Run by a process without threads: each child waits at the gate, then asks for the lock and says how it went.
RACE = """
import fcntl, os, sys, time
from pathlib import Path
from gradsift.errors import StoreError
from gradsift.store.lock import take_lock
folder, gate, defect = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if defect == "the lock does not exclude":
    fcntl.flock = lambda *_: None
children = []
for i in range(20):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        while not gate.exists():
            time.sleep(0.001)
        start = time.monotonic()
        try:
            lock = take_lock(folder)
            os.write(writer, b"won 0 -")
            time.sleep(20)
        except StoreError as error:
            os.write(writer, f"lost {time.monotonic() - start:.4f} {error.got}".encode())
        os._exit(0)
    os.close(writer)
    children.append((pid, reader))
gate.touch()
for pid, reader in children:
    print(pid, os.read(reader, 4096).decode(), flush=True)
for pid, _ in children:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""
HOLD = """
import sys, time
from pathlib import Path
from gradsift.store.lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def race(folder: Path, defect: str) -> dict[str, Any]:
    """Let twenty start at once."""
    command = [sys.executable, "-c", RACE, str(folder), str(folder / "gate"), defect]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.split(" ", 3) for line in lines]
    winners = [pid for pid, how, *_ in found if how == "won"]
    lost = [(float(seconds), got) for _, how, seconds, got in found if how == "lost"]
    named = sum(any(f"process {pid} " in got for pid in winners) or "not yet written" in got for _, got in lost)
    return {
        "started": len(found),
        "winners": len(winners),
        "told": named,
        "slowest": max((s for s, _ in lost), default=0.0),
    }


def recovered(folder: Path, defect: str) -> float:
    """Seconds until a lock is ours again; a minute where it is refused."""
    begun = time.perf_counter()
    try:
        if defect == NOTE_ONLY and (folder / LOCK).stat().st_size:
            return STALE_SECONDS
        take_lock(folder).release()
    except StoreError:
        return STALE_SECONDS
    return time.perf_counter() - begun


def leave_note(folder: Path, **changes: Any) -> None:
    """What a holder that is no more has left."""
    (folder / LOCK).write_text(json.dumps({**dataclasses.asdict(me()), **changes}))


def dead_holders(folder: Path, defect: str) -> dict[str, float]:
    """Seconds to recover from each kind of dead holder."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    times = {"killed": recovered(folder, defect)}
    leave_note(folder, process_start=me().process_start + 1)
    times["process number reused"] = recovered(folder, defect)
    leave_note(folder, boot="of another kernel", host="elsewhere")
    old = time.time() - STALE_SECONDS - 1
    os.utime(folder / LOCK, (old, old))
    times["stale heartbeat of another machine"] = recovered(folder, defect)
    return times


def run(full: bool, defect: str) -> dict[str, Any]:
    """Race and recover; at full size five times."""
    rounds = 5 if full else 1
    races, times = [], []
    with memory_folder() as room:
        for n in range(rounds):
            folder = room / str(n)
            folder.mkdir()
            races.append(race(folder, defect))
            times.append(dead_holders(folder, defect))
    return {"races": races, "recovery_seconds": {kind: max(t[kind] for t in times) for kind in times[0]}}


def judge(figures: Mapping[str, Any]) -> Outcome:
    """One winner of twenty, losers told in 2 s, each dead holder replaced at once."""
    races, times = figures["races"], figures["recovery_seconds"]
    right = sum(r["winners"] == 1 and r["told"] == 19 for r in races)
    slowest = max(r["slowest"] for r in races)
    fewest = min(r["winners"] + r["told"] for r in races)
    worst = max(times.values())
    said = ", ".join(f"{kind} {seconds:.3f} s" for kind, seconds in times.items())
    return Outcome(
        "R16",
        (
            Check("one winner and the others told", f"{fewest}/20 in each of {len(races)} races ({right} right)", "20/20",
                  right == len(races) > 0),
            Check("slowest answer", f"{slowest:.2f} s", "<= 2 s", slowest <= 2),
            Check("recovery", said, "< 1 s", worst < 1),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R16", "20 writers at once; locks of killed, stale and reused holders", "20/20; told in 2 s; recovered", run, judge,
    (NO_EXCLUSION, NOTE_ONLY), {"races": 5, "writers": 20}, shares_process=True,
)  # fmt: skip
