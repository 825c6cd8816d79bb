"""The same rows through inline, torchrun and Ray, one rank and one actor killed on the way: equal stores, one selection.

``python benchmarks/launchers.py [--stub-rows 20000] [--model-rows 300] [--out docs/results/launchers.json]``. The stub puts
made-up numbers in place of the model's; reading, tokenizing, launching, staging, committing and selecting are real.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.reliability.runs import room, world_in
from benchmarks.trials.outcome import machine
from tests.launched import finish, measured, script, start, store_rows, torchrun, wait_for, words

from gradsift.manifest import git_sha, versions, write_json_atomic

LIMIT = 3600.0


def victim(out: Path, log: Path, rank: int) -> int | None:
    """Process number of a rank that has begun a unit."""
    notes = [json.loads(path.read_text()) for path in out.glob(f"launch/*/beats/{rank}-*.json")]
    begun = [pid for pid, _ in measured(log)]
    return next((note["pid"] for note in notes if begun.count(note["pid"]) >= 1), None)


def through(launcher: str, command: list[str], out: Path, log: Path, kill: bool, **extra: str) -> dict[str, Any]:
    """One launcher; with ``kill`` a worker dies by kill -9, and the same command follows where the job ended with it."""
    starts, begun = 1, time.monotonic()
    process = start(
        command, log, slow=0.3, **extra
    )  # time for every worker to join and for the kill to find one at its work
    if kill:
        os.kill(wait_for(lambda: victim(out, log, 1), LIMIT, process=process), signal.SIGKILL)
        process.communicate(timeout=LIMIT)
        while process.returncode and starts < 4:  # torchrun ends all ranks with one
            starts += 1
            process = start(command, log, **extra)
            process.communicate(timeout=LIMIT)
        code = process.returncode
    else:
        finish(process, seconds=LIMIT)
        code = 0
    return {"launcher": launcher, "killed": kill, "starts": starts, "code": code,
            "processes": len({pid for pid, _ in measured(log)}), "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip


def compare(out: Path, whole: Path, want: Mapping[str, tuple]) -> dict[str, Any]:
    """Rows lost, added or changed, and whether the chosen file is the same."""
    got, chosen = store_rows(out), Path("selection") / "selected.jsonl"
    return {
        "rows": len(got), "lost": len(want.keys() - got.keys()), "added": len(got.keys() - want.keys()),
        "changed": sum(got[name] != want[name] for name in got.keys() & want.keys()),
        "same_choice": (out / chosen).read_bytes() == (whole / chosen).read_bytes(),
    }  # fmt: skip


def sweep(count: int, stub: bool, launchers: list[str]) -> dict[str, Any]:
    """All launchers over one pool."""
    python_path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    extra = {"PYTHONPATH": python_path, **({"STUB": "1"} if stub else {})}
    with room() as folder:
        world_in(folder, count)
        more = ("--set", "collect.rows_per_shard=64") if stub else ()
        whole = folder / "whole"
        first = through(
            "inline", script(*words(folder, folder / "navigator", whole, *more)), whole, folder / "log", False, **extra
        )
        want = store_rows(whole)
        runs = [{**first, **compare(whole, whole, want)}]
        for launcher in launchers:
            for kill in (False, True):
                name = f"{launcher}-{kill}"
                asked = words(folder, folder / "navigator", folder / name, *more)
                command = (
                    torchrun(2, *asked)
                    if launcher == "torchrun"
                    else script(*asked, "--launcher", "ray", "--workers", "2")
                )
                run = through(launcher, command, folder / name, folder / f"log-{name}", kill, **extra)
                runs.append({**run, **compare(folder / name, whole, want)})
                print(runs[-1], flush=True)
    return {"rows": count, "stub": stub, "runs": runs}


def equal(found: Mapping[str, Any]) -> bool:
    """Whether every run ended, had more than one process where it should, and left the store and choice of inline."""
    return all(
        r["code"] == 0 and r["lost"] == r["added"] == r["changed"] == 0 and r["same_choice"] and r["rows"] == found["rows"]
        and (r["launcher"] == "inline" or r["processes"] >= 2)
        for r in found["runs"]
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stub-rows", type=int, default=20_000)
    parser.add_argument("--model-rows", type=int, default=300)
    parser.add_argument("--launchers", default="torchrun,ray")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    begun, sweeps = time.monotonic(), []
    for count, stub in ((given.model_rows, False), (given.stub_rows, True)):
        if count:
            sweeps.append(sweep(count, stub, given.launchers.split(",")))
            print(
                f"{count} rows{' (stub)' if stub else ''}: {'equal' if equal(sweeps[-1]) else 'NOT EQUAL'}", flush=True
            )
    record = {
        "command": shlex.join(["python", "benchmarks/launchers.py", *sys.argv[1:]]), "date": date.today().isoformat(),
        "commit": git_sha(ROOT), "hardware": f"{machine()}, load {os.getloadavg()[0]:.1f}, no GPU used",
        "versions": versions(), "seconds": round(time.monotonic() - begun), "equal": all(map(equal, sweeps)), "sweeps": sweeps,
    }  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(given.out, record)
    return 0 if record["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
