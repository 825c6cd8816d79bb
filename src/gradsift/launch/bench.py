"""The work of one pass: units of rows, how one is measured, and the one-process launcher (ours).

A unit is a range of the plan with the content hashes of its rows. The plan depends on the rows, the shard size and what
the store holds, never on the number of workers, so a unit gives the same numbers whoever measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gradsift.data.batches import plan_shards
from gradsift.store.shards import ShardResult, unit_name
from gradsift.store.spec import GradientSpec, content_hash
from gradsift.store.writer import SignalWriter
from gradsift.types import TokenRow


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
    """

    name: str
    folder: Path
    spec: GradientSpec
    rows: Sequence[TokenRow]
    rows_per_shard: int
    measure: Callable[[Sequence[TokenRow]], ShardResult]
    tick: Callable[[int, int], None]
    made_by: Mapping[str, str]

    def contents(self) -> dict[str, str]:
        """Give every row's content hash by its id."""
        return {row.id: content_hash(row.input_ids, row.trained) for row in self.rows}

    def plan(self, writer: SignalWriter) -> Iterator[Unit]:
        """Cut what is not committed into units, in the order of the plan.

        Args:
            writer: the open writer of the store.

        Yields:
            Units; a shard that is committed in full gives none.
        """
        for number, shard in enumerate(self._shards()):
            some = [self.rows[i] for i in shard]
            hashes = [content_hash(row.input_ids, row.trained) for row in some]
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
        shards, units = self._shards(), []
        for number, skipped in given:
            some = [self.rows[i] for i in shards[number]] if number < len(shards) else []
            hashes = [content_hash(row.input_ids, row.trained) for row in some]
            units.append(self._unit(number, some, hashes, tuple(skipped)))
        return units

    def _shards(self) -> tuple[tuple[int, ...], ...]:
        return plan_shards(self.rows, range(len(self.rows)), self.rows_per_shard)

    @staticmethod
    def _unit(number: int, some: Sequence[TokenRow], hashes: Sequence[str], skipped: tuple[int, ...]) -> Unit:
        left = [i for i in range(len(some)) if i not in set(skipped)]
        key = unit_name(tuple(some[i].id for i in left), tuple(hashes[i] for i in left))
        return Unit(key, number, tuple(some[i] for i in left), skipped)


class Launch(Protocol):
    """How the units of a pass are given to processes."""

    commits: bool

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

    def wait_open(self, name: str, tick: Callable[[int, int], None]) -> None:
        """Do nothing: this process makes what it needs."""

    def collect(self, bench: Bench, writer: SignalWriter, after: Callable[[], None]) -> None:
        """Measure and commit every unit.

        Args:
            bench: the pass.
            writer: the open writer of the store.
            after: called after every commit; raises to stop the run.
        """
        for unit in bench.plan(writer):
            writer.beat()
            writer.commit(bench.measure(unit.rows))
            after()

    def serve(self, bench: Bench) -> None:
        """Never called: there is nobody else.

        Args:
            bench: the pass.
        """
        raise AssertionError("inline has nobody to serve")


INLINE = Inline()
