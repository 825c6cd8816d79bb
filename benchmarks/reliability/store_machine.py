"""The store against a dictionary: a Hypothesis machine over its public interface (R25), shared with the unit tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.unit.store.store_world import SPEC, make_ids, measure, memory_folder, read, truth

from gradsift.errors import SpecError, StoreError
from gradsift.store.shards import ShardResult
from gradsift.store.signals import SignalStore, open_store
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer

UNIVERSE = make_ids(24)


def refuses(kind: type[Exception], words: str, act) -> None:
    """Check that an act is refused, in words that hold some."""
    said = ""
    try:
        act()
    except kind as error:
        said = str(error)
    assert words in said, f"not refused with {words}: {said}"


class StoreAgainstDict(RuleBasedStateMachine):
    """Deliver, repeat, reorder, change, crash, reopen: after every step the store equals a dictionary."""

    @initialize()
    def start(self):
        self.exit = memory_folder()
        self.folder = self.exit.__enter__() / "store"
        self.model: dict[str, tuple] = {}
        self.writer = open_writer(self.folder, SPEC)
        self.late: list[ShardResult] = []

    @rule(ids=st.lists(st.sampled_from(UNIVERSE), min_size=1, max_size=6, unique=True))
    def deliver(self, ids):
        result = measure(ids)
        done = self.writer.commit(result)
        new = [name for name in ids if name not in self.model]
        assert (done.num_rows, done.num_repeated) == (len(new), len(ids) - len(new))
        self.model.update(truth(new) if new else {})
        self.late.append(result)

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def deliver_again(self, data):
        result = data.draw(st.sampled_from(self.late))
        done = self.writer.commit(result.take(np.arange(len(result.ids))[::-1]))
        assert done.num_rows == 0

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def deliver_changed(self, data):
        name = data.draw(st.sampled_from(sorted(self.model)))
        fresh = [n for n in UNIVERSE if n not in self.model][:1]
        refuses(SpecError, name, lambda: self.writer.commit(measure([*fresh, name], edition=1)))

    @rule(torn=st.booleans())
    def crash(self, torn):
        """A writer dies with half a shard on disk: only the kernel lets go of its lock."""
        self.writer._lock.forget()
        (self.folder / "shards" / "dead-rows.parquet").write_bytes(b"PAR1")
        (self.folder / "ledger" / "dead.json.00.tmp").write_bytes(b"{")
        if torn:
            (self.folder / "ledger" / "dead.json").write_bytes(b'{\n "content_hash"')
        self.writer = open_writer(self.folder, SPEC)
        assert self.writer.cleaned == dataclasses.replace(
            self.writer.cleaned, temporary=1, unrecorded=1, damaged_records=int(torn)
        )

    @rule()
    def reopen(self):
        self.writer.close()
        refuses(StoreError, "closed", lambda: self.writer.commit(measure(UNIVERSE[:1])))
        self.writer = open_writer(self.folder, SPEC)

    @invariant()
    def equal(self):
        if not hasattr(self, "model"):
            return
        store: SignalStore = open_store(self.folder, SPEC)
        assert list(store.ids) == sorted(self.model)
        assert read(self.folder) == self.model
        assert dict(self.writer.committed_ids()) == {name: row[0] for name, row in self.model.items()}
        assert self.writer.status_counts() == store.status_counts
        absent = [name for name in UNIVERSE if name not in self.model]
        if absent:
            refuses(StoreError, absent[0], lambda: store.positions(absent[:1]))

    def teardown(self):
        if hasattr(self, "exit"):
            self.writer.close()
            try:
                assert verify_store(self.folder).ok
            finally:
                self.exit.__exit__(None, None, None)


def explore(machine: type[RuleBasedStateMachine], sequences: int, steps: int, number: int) -> dict[str, Any]:
    """Run a machine over many sequences; the first broken promise ends it.

    Args:
        machine: has an invariant, which is checked after every step.
        sequences: how many.
        steps: rules of a sequence, at most.
        number: seed of the draws.

    Returns:
        Sequences and steps that were run, and what was broken, empty where nothing was.
    """
    counts = {"sequences": 0, "steps": 0}

    class Counting(machine):  # type: ignore[misc, valid-type]
        """The machine, counted."""

        def __init__(self) -> None:
            super().__init__()
            counts["sequences"] += 1

        @invariant()
        def count(self) -> None:
            counts["steps"] += 1

    chosen = settings(
        max_examples=sequences, stateful_step_count=steps, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip
    broken = ""
    try:
        run_state_machine_as_test(seed(number)(Counting), settings=chosen)
    except Exception as error:
        broken = f"{type(error).__name__}: {error}"[:300]
    return {**counts, "asked": sequences, "broken": broken}
