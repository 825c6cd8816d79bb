"""A process made to be killed: it collects into a store and tells what it did through two plain files.

``python store_crasher.py FOLDER ROWS ROWS_PER_SHARD [SHARDS SECONDS]`` collects once, in a process of its own; with the
last two it is killed that many seconds of its own processor time after its first SHARDS shards, so that a busy machine
changes nothing. As a module it forks
collectors that die at an exact system call, which needs a process without threads: run ``sweep`` from a fresh one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "store"))

from store_world import SPEC, fill, make_ids, memory_folder, read, truth

from gradsift.errors import StoreError

_write, _open = os.write, os.open
CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "ftruncate", "pwrite")


def log(path: Path) -> int:
    return _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def collect(folder: Path, rows: int, rows_per_shard: int, die: tuple[int, float] | None = None) -> None:
    """Collect; note measured rows before they are committed and acknowledged rows after; ``die``: after (rows, seconds)."""
    measured, acknowledged = log(folder / "measured"), log(folder / "acknowledged")
    seen = 0

    def note(handle: int, ids: tuple[str, ...]) -> None:
        _write(handle, "".join(f"{name}\n" for name in ids).encode())

    def note_measured(ids: tuple[str, ...]) -> None:
        nonlocal seen
        note(measured, ids)
        before, seen = seen, seen + len(ids)
        if die is not None and before < die[0] <= seen:
            # Nothing handles SIGPROF, so the kernel ends the process wherever it is, as SIGKILL would.
            signal.setitimer(signal.ITIMER_PROF, die[1])

    fill(
        folder / "store",
        make_ids(rows),
        rows_per_shard,
        measured=lambda result: note_measured(result.ids),
        committed=lambda result: note(acknowledged, result.ids),
    )


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def judge(folder: Path, rows: int) -> list[str]:
    """What is wrong with a store after a kill; rows may be missing, nothing else."""
    if not (folder / "store" / "spec.json").exists():
        return ["acknowledged rows without a store"] if lines(folder / "acknowledged") else []
    good = truth(make_ids(rows))
    try:
        found = read(folder / "store", SPEC)
    except StoreError as error:
        return [f"refused: {error.what}"]
    lost = set(lines(folder / "acknowledged")) - set(found)
    changed = [name for name in found if found[name] != good[name]]
    return [f"lost {sorted(lost)[:3]}"] * bool(lost) + [f"changed {changed[:3]}"] * bool(changed)


def die_at(point: int, half: bool) -> None:
    """Count system calls from now on and kill this process instead of making the ``point``-th one.

    With ``half`` only writes count, and the one that is killed puts half of its bytes on the disk first.
    """
    state = {"count": 0}

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args, **kwargs):
            state["count"] += 1
            if state["count"] - 1 == point:
                if half:
                    _write(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in ("write",) if half else CALLS:
        wrap(name)


def crash_once(folder: Path, rows: int, rows_per_shard: int, point: int, half: bool) -> bool:
    """Collect in a fork that dies at one system call; whether it died."""
    pid = os.fork()
    if pid == 0:
        try:
            die_at(point, half)
            collect(folder, rows, rows_per_shard)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"the collector failed at point {point}")
    return False


def sweep(rows: int, rows_per_shard: int, half: bool) -> Iterator[dict]:
    """Die at every system call of a run, one after the other, and resume from each of the remains."""
    with memory_folder() as room:
        point = 0
        while True:
            folder = room / f"{point}"
            folder.mkdir()
            died = crash_once(folder, rows, rows_per_shard, point, half)
            if not died:
                return
            faults = judge(folder, rows)
            try:
                # The second run dies too, at a point of its own, and only the third one may finish.
                crash_once(folder, rows, rows_per_shard, (point * 7) % 23, half)
                faults += judge(folder, rows)
                collect(folder, rows, rows_per_shard)
                faults += judge(folder, rows)
                if read(folder / "store", SPEC) != truth(make_ids(rows)):
                    faults.append("not the store of an uninterrupted run")
            except (RuntimeError, StoreError) as error:
                faults.append(f"the next run fails: {str(error).splitlines()[0]}")
            leftovers = [p.name for p in folder.rglob("*.tmp")]
            faults += [f"leftovers {leftovers}"] * bool(leftovers)
            again = len(lines(folder / "measured")) - rows
            if again > 2 * rows_per_shard:
                faults.append(f"{again} rows measured again")
            yield {"point": point, "again": again, "faults": faults}
            shutil.rmtree(folder)
            point += 1


if __name__ == "__main__":
    if sys.argv[1] == "sweep":
        for outcome in sweep(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "half"):
            print(json.dumps(outcome), flush=True)
    else:
        folder, rows, per_shard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
        collect(folder, rows, per_shard, (int(sys.argv[4]) * per_shard, float(sys.argv[5])) if sys.argv[4:] else None)
