"""R2: a collector is killed at each of its system calls in turn; every state that leaves resumes to the same store.

The failpoints are in the process (``os.open`` and the like are wrapped), so that no ptrace is needed; half of a write's
bytes on the disk is a kill of its own kind. The second run of each case is killed too, the third one may finish.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.mutants import EARLY_ACK, RECORD_FIRST, record_first
from tests.integration import store_crasher

WAYS = {"before the call": False, "half of a write": True}


def run(full: bool, defect: str) -> dict[str, Any]:
    """Sweep the kill over all calls of a run, once before the call and once with half of a write done."""
    rows, per_shard = (30, 6) if full else (3, 3)
    change = record_first() if defect == RECORD_FIRST else nullcontext()
    if defect == EARLY_ACK:
        change = patch.object(store_crasher, "fill", acknowledging_early)
    figures: dict[str, Any] = {"rows_per_shard": per_shard, "ways": {}}
    with change:
        for way, half in WAYS.items():
            outcomes = list(store_crasher.sweep(rows, per_shard, half))
            bad = [f"{o['point']}: {fault}" for o in outcomes for fault in o["faults"]]
            figures["ways"][way] = {
                "points": len(outcomes),
                "passed": sum(not o["faults"] for o in outcomes),
                "faults": bad[:5],
                "most_rows_again": max(o["again"] for o in outcomes),
            }
    return figures


def acknowledging_early(folder, ids, rows_per_shard, *, measured, committed, **options):
    """Planted: rows count as committed once they are measured."""

    def both(result) -> None:
        measured(result)
        committed(result)

    store_crasher_fill(folder, ids, rows_per_shard, measured=both, committed=lambda _: None, **options)


store_crasher_fill = store_crasher.fill


def judge(figures: Mapping[str, Any]) -> Outcome:
    """All points pass; two kills cost at most two shards."""
    ways, most = figures["ways"], 2 * figures["rows_per_shard"]
    checks = [
        Check(
            f"killed {way}:", f"{f['passed']}/{f['points']} points{''.join(f' ({x})' for x in f['faults'][:1])}", "all",
            f["passed"] == f["points"] > 0,
        )
        for way, f in ways.items()
    ]  # fmt: skip
    again = max(f["most_rows_again"] for f in ways.values())
    checks.append(Check("rows measured again after two kills, at most", str(again), f"<= {most}", again <= most))
    return Outcome("R2", tuple(checks))


TRIAL = Trial(
    "R2", "SIGKILL at the N-th write, fsync, rename, open, unlink, for every N of a run of 5 shards", "N/N crash points",
    run, judge, (RECORD_FIRST, EARLY_ACK), {"rows": 30, "rows_per_shard": 6},
    slow_defects=(EARLY_ACK,),
)  # fmt: skip
