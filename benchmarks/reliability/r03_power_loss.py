"""R3: whatever a power loss leaves of the disk, no acknowledged row is missing or torn and the store opens and goes on.

The disks are those of :mod:`benchmarks.reliability.power`; Hypothesis draws the moment and what survives. The run has
commits, a second writer, and shards that another process staged and the writer adopts.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.mutants import (
    NO_FLUSH,
    NO_FSYNC_FILE,
    NO_FSYNC_FOLDER,
    RECORD_FIRST,
    RENAME_FIRST,
    planted,
)
from benchmarks.reliability.power import Op, Trace, rebuild
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.unit.store.store_world import SPEC, content, fill, make_ids, measure, memory_folder, read, truth

from gradsift.errors import GradsiftError
from gradsift.store.staging import adopt_staged, stage
from gradsift.store.writer import open_writer

IDS = make_ids(21)
CONTENTS = {name: content(name) for name in IDS}
GOOD = truth(IDS)
RESUME_EVERY = 4  # of the states, also run to the end


class Seen(Exception):
    """A planted defect was seen: enough."""


def record(room: Path) -> list[Op]:
    """Run once: three commits, a second writer, two staged shards adopted, one more commit."""
    trace = Trace(room)
    store = room / "store"
    with trace.recording():
        with open_writer(store, SPEC) as writer:
            for start in (0, 4, 8):
                _commit(trace, writer, start, 3 if start == 8 else 4)
        for start in (11, 14):
            stage(store, SPEC, measure(IDS[start : start + 3]), {})
            _told(trace, IDS[start : start + 3], "staged")
        with open_writer(store, SPEC) as writer:
            adopted = adopt_staged(writer, CONTENTS, opening=True)
            assert adopted.num_rows == 6
            _told(trace, IDS[11:17], "committed")
            _commit(trace, writer, 17, 4)
    return trace.ops


def _commit(trace: Trace, writer: Any, start: int, count: int) -> None:
    writer.commit(measure(IDS[start : start + count]))
    _told(trace, IDS[start : start + count], "committed")


def _told(trace: Trace, ids: tuple[str, ...], how: str) -> None:
    trace.note(f"{how} {' '.join(ids)}")


def told(ops: list[Op], how: str) -> set[str]:
    """What the client was told before the loss."""
    found = [op.name.split() for op in ops if op.kind == "note"]
    return {name for words in found if words[0] == how for name in words[1:]}


def judge_disk(store: Path, ops: list[Op], finish: bool) -> str:
    """Say what is wrong with a disk after the loss; empty when nothing is."""
    committed, staged = told(ops, "committed"), told(ops, "staged")
    try:
        if not (store / "spec.json").exists():
            # before anything was acknowledged a store may not be there yet
            if committed:
                return "lost: no store"
        else:
            found = read(store)
            if not committed <= set(found):
                return f"lost: {sorted(committed - set(found))[:2]}"
            changed = [name for name in found if found[name] != GOOD[name]]
            if changed:
                return f"torn: {changed[:2]}"
        with open_writer(store, SPEC) as writer:
            adopt_staged(writer, CONTENTS, opening=True)
            if not staged | committed <= set(writer.committed_ids()):
                return "lost: a staged shard"
        if finish:
            fill(store, IDS, 4)
            if read(store) != GOOD:
                return "not the same store after resuming"
    except GradsiftError as error:
        return f"refused: {error.what}"
    return ""


def run(full: bool, defect: str) -> dict[str, Any]:
    """Explore; with a planted defect until it is seen, at most as many states as a full run has."""
    num_states = 2000 if full or defect else 60
    figures: dict[str, Any] = {"states": 0, "asked": num_states, "violations": 0, "resumed": 0, "first": ""}
    with memory_folder() as room:
        run_folder = room / "run"
        run_folder.mkdir()
        with planted(defect):
            ops = record(run_folder)
        figures["calls"] = sum(op.kind != "note" for op in ops)
        # every moment, and again those right after a rename, where most has been promised and least is safe
        points = list(range(len(ops) + 1))
        renames = [at + 1 for at, op in enumerate(ops) if op.kind == "rename"]

        @seed(3)
        @settings(
            max_examples=num_states, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.data())
        def explore(data: st.DataObject) -> None:
            if figures["states"] >= num_states:
                return
            at = data.draw(st.sampled_from(points) | st.sampled_from(renames))
            place = room / "after"
            place.mkdir()
            try:
                rebuild(ops[:at], place, lambda n: data.draw(st.integers(0, n - 1)))
                figures["states"] += 1
                finish = figures["states"] % RESUME_EVERY == 0
                fault = judge_disk(place / "store", ops[:at], finish)
                figures["resumed"] += finish
            finally:
                shutil.rmtree(place)
            if fault:
                figures["violations"] += 1
                figures["first"] = figures["first"] or f"after call {at} of {len(ops)}: {fault}"
                if defect:
                    raise Seen

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                explore()
        except Seen:
            pass
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """No violation in any state, and enough states."""
    f = figures
    what = f"{f['violations']} in {f['states']} states of {f['calls']} calls, {f['resumed']} of them run to the end"
    return Outcome(
        "R3",
        (
            Check("states explored", str(f["states"]), str(f["asked"]), f["states"] >= f["asked"]),
            Check("violations", what + (f" ({f['first']})" if f["first"] else ""), "0", f["violations"] == 0),
        ),
    )


TRIAL = Trial(
    "R3", "power loss: what was fsynced, and any subset of the rest", "2,000 states, 0 violations, 5/5 mutants seen",
    run, judge, (NO_FSYNC_FILE, NO_FSYNC_FOLDER, NO_FLUSH, RENAME_FIRST, RECORD_FIRST), {"states": 2000, "rows": len(IDS)},
    slow_defects=(RENAME_FIRST, NO_FLUSH, NO_FSYNC_FILE), shares_process=True,
)  # fmt: skip
