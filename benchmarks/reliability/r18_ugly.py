"""R18: whatever stands in a data file, every row has one status, nothing is lost and nothing raises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import quiet, recipe_of, room, run, world_in
from tests.unit.data import test_ugly_rows as ugly

from gradsift.data.pool import Pool, read_pool
from gradsift.errors import DataError
from gradsift.types import RowStatus

DROPPED = "rows that cannot be read are left out without a word"


def dropping(*arguments: Any, **options: Any) -> Pool:
    """The planted defect: what cannot be read is gone."""
    pool = read_pool(*arguments, **options)
    kept = tuple(row for row in pool.rows if row.status is not RowStatus.MALFORMED)
    object.__setattr__(pool, "rows", kept)
    return pool


def whole_run() -> dict[str, Any]:
    """The ugly rows among sound ones through ``select``; also that a pool of mostly ugly rows is stopped."""
    with room() as folder:
        place = world_in(folder / "world", 30)
        pool = place / "pool.jsonl"
        raws = [raw for _, raw, _, _ in ugly.UGLY if b"\xe9" not in raw and b"\xe4" not in raw]
        pool.write_bytes(pool.read_bytes() + b"".join(raw + b"\n" for raw in raws))
        changes = {"data__loss_on": None, "data__max_length": 64, "method__name": "random", "collect__signals": "all"}
        try:
            run(recipe_of(place, collect__unreadable_share=0.3, **changes), folder / "stopped")
            stopped = ""
        except DataError as error:
            stopped = error.what
        done = run(recipe_of(place, collect__unreadable_share=1.0, **changes), folder / "run")
        rows = done.manifest["rows"]
        return {"in": 30 + len(raws), "read": rows["read"], "status": dict(rows["status"]), "stopped": stopped}


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Read and tokenize all kinds from one file; at full size also run ``select`` over them."""
    kinds: list[dict[str, Any]] = []
    raised = ""
    with room() as folder, patch.object(ugly, "read_pool", dropping if defect else read_pool), quiet():
        path = folder / "ugly.jsonl"
        path.write_bytes(b"".join(raw + b"\n" for _, raw, _, _ in ugly.UGLY))
        tokens: tuple[Any, ...] = ()
        try:
            _, tokens = ugly.judged(path)
        except Exception as error:  # the trial counts what must not happen
            raised = f"{type(error).__name__}: {error}"
    got = dict(enumerate(tokens))
    for k, (name, _, status, reason) in enumerate(ugly.UGLY):
        row = got.get(k)
        well = row is not None and row.status is status and reason in row.reason
        kinds.append(
            {"kind": name, "want": str(status), "got": "nothing" if row is None else str(row.status), "well": well}
        )
    cut = [[row.num_untruncated, row.num_tokens] for row in tokens if row.status is RowStatus.TRUNCATED]
    figures = {"kinds": kinds, "raised": raised, "in": len(ugly.UGLY), "cut": cut,
               "status": dict(Counter(str(row.status) for row in tokens))}  # fmt: skip
    return figures | ({"run": whole_run()} if full and not defect else {})


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Each kind its status; the counts add up; no exception; cuts recorded."""
    kinds = figures["kinds"]
    well = sum(k["well"] for k in kinds)
    wrong = [k["kind"] for k in kinds if not k["well"]]
    total = sum(figures["status"].values())
    checks = [
        Check("kinds with the status and reason asked", f"{well}/{len(kinds)}" + (f", not: {wrong[0]}" if wrong else ""),
              "30/30", well == len(kinds) >= 30),
        Check("rows in and sum of statuses", f"{figures['in']} and {total}", "equal", figures["in"] == total),
        Check("exceptions", figures["raised"] or "0", "0", not figures["raised"]),
        Check("cuts recorded as (tokens, kept)", str(figures["cut"]), "two", len(figures["cut"]) == 2),
    ]  # fmt: skip
    if "run" in figures:
        got = figures["run"]
        total = sum(got["status"].values())
        checks.append(Check("rows of a whole run, read, and sum of statuses", f"{got['in']}, {got['read']}, {total}",
                            "equal", got["in"] == got["read"] == total))  # fmt: skip
        checks.append(Check("a pool with more unreadable rows than the set share (30%)", got["stopped"] or "ran", "stopped before it is measured",
                            bool(got["stopped"])))  # fmt: skip
    return Outcome("R18", tuple(checks))


TRIAL = Trial(
    "R18", "60 kinds of ugly rows", "one status each, 0 tracebacks, in == sum(status), 30/30", measure, judge, (DROPPED,),
    {"kinds": len(ugly.UGLY), "max_length": ugly.MAX_LENGTH}, slow=True,
)  # fmt: skip
