"""The work of one pass: units of rows, how one is measured, and the one-process launcher (ours).

A unit is a range of the plan with the content hashes of its rows. The plan depends on the rows, the shard size and what
the store holds, never on the number of workers, so a unit gives the same numbers whoever measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gradsift.data.batches import plan_order
from gradsift.data.token_rows import content_of
from gradsift.errors import LaunchError
from gradsift.launch.flight import (
    Fall,
    Flight,
    Watchdog,
    fallen,
    flying,
    forget,
    gather,
    is_condemned,
    measure_unit,
    why_condemned,
)
from gradsift.store.shards import ShardResult, unit_name
from gradsift.store.spec import GradientSpec
from gradsift.store.writer import SignalWriter
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from gradsift.launch.lockstep import Lockstep


class Released(Exception):
    """No error: rank 0 has all signals, and a worker that waits may go home."""


@dataclass(frozen=True)
class Unit:
    """Rows that are measured and committed together.

    Args:
        key: name of the shard they will be, a hash of their ids and contents.
        shard: number of the shard in the plan of all rows.
        rows: the rows, sorted by length; those of the shard that are not committed yet.
        skipped: positions in the planned shard that are committed already.
    """

    key: str
    shard: int
    rows: tuple[TokenRow, ...] = field(repr=False)
    skipped: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of its rows."""
        return sum(row.num_tokens for row in self.rows)

    def take(self, keep: Sequence[int]) -> Unit:
        """Make a unit of some of the rows, of the same planned shard.

        Args:
            keep: positions in ``rows``, increasing.

        Returns:
            The unit, with a name of its own.
        """
        gone = set(self.skipped)
        places = [p for p in range(len(self.rows) + len(gone)) if p not in gone]
        left = set(places) - {places[k] for k in keep}
        rows = tuple(self.rows[k] for k in keep)
        hashes = tuple(content_of(row) for row in rows)
        return Unit(unit_name(tuple(row.id for row in rows), hashes), self.shard, rows, tuple(sorted(gone | left)))


@dataclass(frozen=True)
class Bench:
    """One pass as a process sees it.

    Args:
        name: of the pass: the folder of its stores in the run folder.
        folder: the store's folder.
        spec: what is measured.
        rows: all rows of the pool that are measured.
        rows_per_shard: rows of a planned shard.
        measure: rows -> their signals; calls ``tick``.
        tick: called with rows and tokens done; raises to stop the run.
        made_by: recorded with every shard.
        lost: rows and reasons -> their result without signals, status WORKER_CRASH; None where rows cannot be set aside,
            so that a row that kills stops the run.
        flight: this process's note of what it measures; ``measure`` writes it.
        dog: ends this process when a micro-batch takes far too long; ``measure`` shows it signs of work.
    """

    name: str
    folder: Path
    spec: GradientSpec
    rows: Sequence[TokenRow]
    rows_per_shard: int
    measure: Callable[[Sequence[TokenRow]], ShardResult]
    tick: Callable[[int, int], None]
    made_by: Mapping[str, str]
    lost: Callable[[Sequence[TokenRow], Sequence[str]], ShardResult] | None = None
    flight: Flight | None = None
    dog: Watchdog = field(default_factory=Watchdog)

    def contents(self) -> dict[str, str]:
        """Give every row's content hash by its id."""
        return {row.id: content_of(row) for row in self.rows}

    def plan(self, writer: SignalWriter) -> Iterator[Unit]:
        """Cut what is not committed into units, in the order of the plan.

        Args:
            writer: the open writer of the store.

        Yields:
            Units; a shard that is committed in full gives none.
        """
        order = plan_order(self.rows)
        for number, start in enumerate(range(0, len(order), self.rows_per_shard)):
            some = [self.rows[int(i)] for i in order[start : start + self.rows_per_shard]]
            hashes = [content_of(row) for row in some]
            left = writer.missing([row.id for row in some], hashes)
            if left.size:
                keep = set(left.tolist())
                yield self._unit(number, some, hashes, tuple(i for i in range(len(some)) if i not in keep))

    def planned(self, given: Sequence[tuple[int, Sequence[int]]]) -> list[Unit]:
        """Rebuild the units that rank 0 planned, from this process's own rows.

        Args:
            given: number of the shard and skipped positions, per unit.

        Returns:
            The units; their keys differ from rank 0's where the rows differ.
        """
        order, units, num = plan_order(self.rows), [], self.rows_per_shard
        for number, skipped in given:
            some = [self.rows[int(i)] for i in order[number * num : (number + 1) * num]]
            hashes = [content_of(row) for row in some]
            units.append(self._unit(number, some, hashes, tuple(skipped)))
        return units

    def attempt(self, unit: Unit) -> ShardResult:
        """Measure a unit, carefully where processes have died over its rows.

        Args:
            unit: of this pass.

        Returns:
            The signals of its rows, in order.
        """
        if self.flight is None:
            return self.measure(unit.rows)
        with flying(self.flight), self.dog:
            return measure_unit(self.measure, unit.rows, fallen(self.folder))

    def set_aside(self, unit: Unit, falls: Sequence[Fall]) -> tuple[ShardResult | None, Unit | None]:
        """Part a unit into rows that are not tried again and the others.

        Args:
            unit: of this pass.
            falls: deaths so far.

        Returns:
            The result of the rows that killed, or None; the unit of the others, or None.

        Raises:
            LaunchError: a row kills and cannot be set aside.
        """
        bad = [k for k, row in enumerate(unit.rows) if is_condemned(row.id, falls)]
        if not bad:
            return None, unit
        rows = [unit.rows[k] for k in bad]
        why = [why_condemned(row.id, falls) for row in rows]
        if self.lost is None:
            raise LaunchError(
                "a row kills the process that measures it", where=f"row {rows[0].id}", got=why[0],
                expected="a process that measures it", do="leave this row out; what was committed is kept",
            )  # fmt: skip
        rest = [k for k in range(len(unit.rows)) if k not in set(bad)]
        return self.lost(rows, why), unit.take(rest) if rest else None

    @staticmethod
    def _unit(number: int, some: Sequence[TokenRow], hashes: Sequence[str], skipped: tuple[int, ...]) -> Unit:
        left = [i for i in range(len(some)) if i not in set(skipped)]
        key = unit_name(tuple(some[i].id for i in left), tuple(hashes[i] for i in left))
        return Unit(key, number, tuple(some[i] for i in left), skipped)


def is_suspect(unit: Unit, falls: Sequence[Fall]) -> bool:
    """Tell whether a process has died over a row of a unit.

    Args:
        unit: the unit.
        falls: deaths so far.

    Returns:
        True where one has.
    """
    ids = {row.id for row in unit.rows} if falls else set()
    return any(not fall.rows.isdisjoint(ids) for fall in falls)


class Launch(Protocol):
    """How the units of a pass are given to processes; ``lockstep`` where they hold one model together."""

    commits: bool
    lockstep: Lockstep | None

    def wait_open(self, name: str, tick: Callable[[int, int], None]) -> None:
        """Wait until everything that a pass needs is on the disk; returns at once in the process that makes it."""
        ...

    def collect(self, bench: Bench, writer: SignalWriter, after: Callable[[], None]) -> None:
        """Bring all units into the store; only where ``commits``."""
        ...

    def serve(self, bench: Bench) -> None:
        """Measure units for the process that commits; only where not ``commits``."""
        ...


class Inline:
    """One process measures and commits one unit after the other."""

    commits = True
    lockstep: Lockstep | None = None

    def wait_open(self, name: str, tick: Callable[[int, int], None]) -> None:
        """Do nothing: this process makes what it needs."""

    def collect(self, bench: Bench, writer: SignalWriter, after: Callable[[], None]) -> None:
        """Measure and commit every unit.

        Args:
            bench: the pass.
            writer: the open writer of the store.
            after: called after every commit; raises to stop the run.
        """
        falls = gather(bench.folder, writer.committed_ids().keys())
        later: list[Unit] = []
        for planned in bench.plan(writer):
            lost, unit = bench.set_aside(planned, falls)
            if lost is not None:
                writer.commit(lost)
            if unit is not None and is_suspect(unit, falls):
                later.append(unit)  # what may end this process comes last
            elif unit is not None:
                self._measure(bench, writer, unit, after)
        for unit in later:
            self._measure(bench, writer, unit, after)
        forget(bench.folder)

    @staticmethod
    def _measure(bench: Bench, writer: SignalWriter, unit: Unit, after: Callable[[], None]) -> None:
        writer.beat()
        writer.commit(bench.attempt(unit))
        after()

    def serve(self, bench: Bench) -> None:
        """Never called: there is nobody else.

        Args:
            bench: the pass.
        """
        raise AssertionError("inline has nobody to serve")


INLINE = Inline()
