"""R15: results delivered late, twice, in any order, by several processes, with crashes between: each row once, as first seen.

Workers stage shards, the writer commits its own and adopts theirs; deliveries are repeated, dropped and reordered, units
overlap, contents change, the writer dies. After every step the visible rows are those of a dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.store_machine import explore, refuses
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.store.store_world import SPEC, content, make_ids, measure, memory_folder, read, truth

from gradsift.errors import SpecError
from gradsift.store import staging
from gradsift.store.index import RowIndex
from gradsift.store.staging import STAGING, adopt_staged, stage
from gradsift.store.verify import verify_store
from gradsift.store.writer import SignalWriter, open_writer

IDS = make_ids(32)
CONTENTS = {name: content(name) for name in IDS}
UNITS = [IDS[start : start + 4] for start in range(0, 32, 4)]
OTHER_CUTS = [IDS[start : start + 4] for start in range(2, 30, 4)]  # another plan: each overlaps two units
TWICE = "what was committed is committed again"
ANY_CONTENT = "a staged row is taken whatever its content"


class Deliveries(RuleBasedStateMachine):
    """Deliver, repeat, drop, reorder, crash."""

    @initialize()
    def start(self) -> None:
        """A new store with a writer."""
        self.exit = memory_folder()
        self.folder = self.exit.__enter__() / "store"
        self.model: dict[str, tuple] = {}
        self.writer = open_writer(self.folder, SPEC)
        self.staged: list[tuple[str, ...]] = []

    @rule(unit=st.sampled_from(UNITS))
    def commit(self, unit: tuple[str, ...]) -> None:
        """The writer measures a unit itself; what is there already is left as it is."""
        done = self.writer.commit(measure(unit))
        new = [name for name in unit if name not in self.model]
        assert (done.num_rows, done.num_repeated) == (len(new), len(unit) - len(new))
        self.model.update(truth(unit) if new else {})

    @rule(unit=st.sampled_from(UNITS) | st.sampled_from(OTHER_CUTS))
    def deliver(self, unit: tuple[str, ...]) -> None:
        """A worker stages a unit, maybe one that is committed or staged already."""
        stage(self.folder, SPEC, measure(unit), {})
        if unit not in self.staged:
            self.staged.append(unit)

    @rule(unit=st.sampled_from(UNITS))
    def deliver_changed(self, unit: tuple[str, ...]) -> None:
        """A worker with another file stages rows of the same names; then the writer looks and refuses them."""
        strange = stage(self.folder, SPEC, measure(unit, edition=1), {})
        got = self.adopt(reorder=False)
        assert strange in got.refused

    @rule(reorder=st.booleans())
    def adopt_all(self, reorder: bool) -> None:
        """The writer takes what lies staged, in the plan's order or against it."""
        self.adopt(reorder)

    def adopt(self, reorder: bool, *, opening: bool = False) -> staging.Adopted:
        """Adopt and tell the model which deliveries were first."""
        units = {measure(unit).unit: unit for unit in self.staged}
        places = sorted(units, reverse=reorder)
        got = adopt_staged(self.writer, CONTENTS, {name: n for n, name in enumerate(places)}, opening=opening)
        for name in places:
            unit = units[name]
            new = [row for row in unit if row not in self.model]
            assert (name in got.units) == (len(new) == len(unit)), "whole units of rows that nobody had"
            assert (name in got.repeated) == (not new)
            assert (name in got.refused) == (0 < len(new) < len(unit))
            if name in got.units:
                self.model.update(truth(unit))
        self.staged = []
        return got

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def other_bytes(self, data: st.DataObject) -> None:
        """The same id with other tokens is refused by name."""
        name = data.draw(st.sampled_from(sorted(self.model)))
        refuses(SpecError, name, lambda: self.writer.commit(measure([name], edition=1)))

    @precondition(lambda self: self.staged)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """A delivery is lost: its record never reached the disk."""
        unit = data.draw(st.sampled_from(self.staged))
        (self.folder / STAGING / "ledger" / f"{measure(unit).unit}.json").unlink()
        self.staged.remove(unit)

    @rule(half=st.booleans())
    def crash(self, half: bool) -> None:
        """The writer is killed, maybe while a worker writes; the next one adopts what lies staged."""
        self.writer._lock.forget()
        (self.folder / "shards" / "dead-rows.parquet").write_bytes(b"PAR1")
        if half and (self.folder / STAGING / "shards").is_dir():
            (self.folder / STAGING / "shards" / "0-rows.parquet.1.tmp").write_bytes(b"half")
        self.writer = open_writer(self.folder, SPEC)
        self.adopt(reorder=half, opening=True)

    @invariant()
    def exactly_once(self) -> None:
        """What can be read is the dictionary."""
        if hasattr(self, "model"):
            assert read(self.folder) == self.model
            assert len(self.writer.committed_ids()) == len(self.model)

    def teardown(self) -> None:
        """All bytes are sound at the end."""
        if hasattr(self, "exit"):
            self.writer.close()
            try:
                assert verify_store(self.folder).ok
            finally:
                self.exit.__exit__(None, None, None)


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a defect."""
    if defect == TWICE:
        with (
            patch.object(RowIndex, "find", lambda self, ids: [None] * len(ids)),
            patch.object(SignalWriter, "_refuse_twice", lambda *_: None),
        ):
            yield
    elif defect == ANY_CONTENT:
        plain = staging._misfit

        def misfit(rows, contents, writer):
            why = plain(rows, contents, writer)
            return "" if "other content" in why else why

        with patch.object(staging, "_misfit", misfit):
            yield
    else:
        yield


def run(full: bool, defect: str) -> dict[str, Any]:
    """Explore: at full size 500 sequences."""
    sequences, steps = (500, 40) if full else (100, 20) if defect else (6, 12)
    with planted(defect):
        return explore(Deliveries, sequences, steps, 15)


def judge(figures: Mapping[str, Any]) -> Outcome:
    """No violation, and enough sequences."""
    f = figures
    said = f"{int(bool(f['broken']))}{' ' * bool(f['broken'])}{f['broken']} in {f['sequences']} sequences of {f['steps']} steps in all"
    return Outcome(
        "R15",
        (
            Check("sequences", str(f["sequences"]), f">= {f['asked']}", f["sequences"] >= f["asked"]),
            Check("violations", said, "0", not f["broken"]),
        ),
    )


TRIAL = Trial(
    "R15", "deliveries repeated, late, dropped, out of order, with crashes between", "500 sequences, 0 violations", run,
    judge, (TWICE, ANY_CONTENT), {"sequences": 500, "steps": 40}, shares_process=True,
)  # fmt: skip
