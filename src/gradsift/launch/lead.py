"""The process that commits: it lays out the units, adopts what others staged, and takes over from those that are gone.

Rank 0 of a torchrun or Slurm job also measures; the driver of Ray actors does not. Both hold the store's lock and are
alone in writing the commit log.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gradsift.errors import LaunchError, StoreError
from gradsift.launch.bench import Bench, Unit
from gradsift.launch.board import LAUNCH, Board
from gradsift.launch.life import Heart, Watch
from gradsift.launch.seat import Seat
from gradsift.manifest import make_folder
from gradsift.store.lock import LOCK, take_lock
from gradsift.store.staging import adopt_staged, is_staged
from gradsift.store.writer import SignalWriter
from gradsift.types import Note

POLL_SECONDS = 0.1
MAX_TRIES = 3


class Crew(Protocol):
    """Workers that rank 0 starts itself."""

    def begin(self, board: Board) -> None:
        """Start them; called once, when there is work."""
        ...

    def tend(self) -> None:
        """Replace those that died; raises when that has no end."""
        ...

    def end(self) -> None:
        """Stop them."""
        ...


class Nobody:
    """The workers were started by someone else."""

    def begin(self, board: Board) -> None:
        """Do nothing.

        Args:
            board: the run's meeting place.
        """

    def tend(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


@dataclass
class Tally:
    """What became of the units of a run.

    Args:
        num_units: units that were to be measured.
        num_here: measured by rank 0 itself.
        num_adopted: measured by others and adopted.
        num_freed: taken from a process that was gone, and given out again.
        num_rows_freed: their rows.
        num_repeated: staged although their rows were committed by then; removed.
        refused: staged units that were not adopted -> why; measured again.
        gone: processes that were gone while they had a unit.
    """

    num_units: int = 0
    num_here: int = 0
    num_adopted: int = 0
    num_freed: int = 0
    num_rows_freed: int = 0
    num_repeated: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


class Lead:
    """A launcher that shares the units out; made by :func:`leading`.

    Args:
        board: the run's meeting place.
        heart: this process's sign of life, beating.
        seat: this process among the others.
        crew: workers to be started; nobody where they start themselves.
    """

    commits = True

    def __init__(self, board: Board, heart: Heart, seat: Seat, crew: Crew) -> None:
        self.board, self.seat, self.tally = board, seat, Tally()
        self._heart, self._crew, self._measures = heart, crew, isinstance(crew, Nobody)
        self._passes: list[str] = []
        self._closed = 0
        self._begun = False
        self._watches: dict[str, Watch] = {}
        self._unwritten: dict[str, float] = {}

    def wait_open(self, name: str, tick: Callable[[int, int], None]) -> None:
        """Do nothing: this process makes what the others wait for."""

    def serve(self, bench: Bench) -> None:
        """Never called: this process commits.

        Args:
            bench: the pass.
        """
        raise AssertionError("the committing process serves nobody")

    def publish(self, end: str | None = None) -> None:
        """Say how the run stands.

        Args:
            end: None while it goes on, ``done``, or why it failed.
        """
        tally = asdict(self.tally)
        self.board.publish(
            {"lead": self._heart.path.name, "passes": self._passes, "closed": self._closed, "end": end, "tally": tally}
        )

    def collect(self, bench: Bench, writer: SignalWriter, after: Callable[[], None]) -> None:
        """Share out the units of a pass and commit them as they come back.

        Args:
            bench: the pass.
            writer: the open writer of the store.
            after: called after commits; raises to stop the run.

        Raises:
            LaunchError: a unit has cost three processes, or Ray's actors fail for good.
        """
        units = list(bench.plan(writer))
        self.tally.num_units += len(units)
        order = {unit.key: place for place, unit in enumerate(units)}
        pending = {unit.key: unit for unit in units}
        fresh = deque(units)
        contents = bench.contents() if units else {}
        self.board.open_pass(bench.name, bench.spec.key, units)
        self._passes.append(bench.name)
        self.publish()
        if units and not self._begun:
            self._begun = True
            self._crew.begin(self.board)
        while pending:
            took = self._adopt(bench, writer, contents, order, pending, fresh)
            unit = self._next(bench, pending, fresh) if self._measures else None
            if unit is not None:
                writer.beat()
                writer.commit(bench.measure(unit.rows))
                del pending[unit.key]
                self.tally.num_here += 1
            if took or unit is not None:
                after()
                continue
            self._free_gone(bench, pending, fresh)
            self._crew.tend()
            writer.beat()
            bench.tick(0, 0)
            time.sleep(POLL_SECONDS)
        self._closed += 1
        self.publish()

    def summary(self) -> dict[str, Any]:
        """Tell the manifest who measured: launcher, number of processes and what became of the units."""
        return {"launcher": self.seat.launcher, "world": self.seat.world, **asdict(self.tally)}

    def notes(self) -> tuple[Note, ...]:
        """Give the remarks for the report: what went wrong on the way and was made good."""
        found = []
        if self.tally.num_freed:
            who = ", ".join(self.tally.gone[:3])
            count = self.tally.num_rows_freed
            text = f"{count} rows were measured again, since the process that had them was gone: {who}"
            found.append(Note("worker_gone", text, self.tally.num_rows_freed))
        if self.tally.refused:
            unit, why = next(iter(self.tally.refused.items()))
            text = f"{len(self.tally.refused)} staged shards were refused and measured again, first {unit}: {why}"
            found.append(Note("staged_refused", text))
        return tuple(found)

    def _adopt(
        self, bench: Bench, writer: SignalWriter, contents: Mapping[str, str], order: Mapping[str, int],
        pending: dict[str, Unit], fresh: deque[Unit],
    ) -> bool:  # fmt: skip
        got = adopt_staged(writer, contents, order)
        for key in got.units:
            unit = pending.pop(key, None)
            if unit is not None:
                bench.tick(len(unit.rows), unit.num_tokens)
                self.tally.num_adopted += 1
        self.tally.num_repeated += len(got.repeated)
        self.tally.refused.update(got.refused)
        for key in got.refused:
            if key in pending:
                self._free(bench, pending[key], fresh)
        return bool(got.units)

    def _next(self, bench: Bench, pending: Mapping[str, Unit], fresh: deque[Unit]) -> Unit | None:
        while fresh:
            unit = fresh.popleft()
            if unit.key in pending and self.board.claim(bench.name, unit.key, self._heart.note.name):
                return unit
        return None

    def _free_gone(self, bench: Bench, pending: Mapping[str, Unit], fresh: deque[Unit]) -> None:
        for key in sorted(self.board.claimed(bench.name) & pending.keys()):
            owner = self.board.owner(bench.name, key)
            if owner is None or is_staged(bench.folder, key):
                continue
            if owner:
                path = self.board.beats / f"{owner}.json"
                watch = self._watches.setdefault(owner, Watch(path, self.seat.gone_seconds))
                if not watch.gone():
                    continue
                self.tally.gone.append(str(watch.note) if watch.note else owner)
            elif time.monotonic() - self._unwritten.setdefault(key, time.monotonic()) < self.seat.gone_seconds:
                continue  # the claim has no name in it yet
            if not is_staged(bench.folder, key):  # it may have been finished between the two looks
                self.tally.num_freed += 1
                self.tally.num_rows_freed += len(pending[key].rows)
                self._free(bench, pending[key], fresh)

    def _free(self, bench: Bench, unit: Unit, fresh: deque[Unit]) -> None:
        times = self.board.free(bench.name, unit.key)
        if times >= MAX_TRIES:
            raise LaunchError(
                f"a unit of {len(unit.rows)} rows has failed {times} times in other processes",
                where=f"rows {unit.rows[0].id} to {unit.rows[-1].id}",
                got=", ".join(self.tally.gone[-times:]) or self.tally.refused.get(unit.key, ""),
                expected="a process that measures it",
                do="run the same command with --launcher inline to see what happens; what was committed is kept",
            )
        fresh.append(unit)


@contextmanager
def leading(out: Path, seat: Seat, crew: Crew | None = None) -> Iterator[Lead]:
    """Be rank 0 of a run: open its meeting place, beat, and say at the end how it went.

    Args:
        out: the run folder; exists.
        seat: this process among the others.
        crew: workers to be started by rank 0.

    Yields:
        The launcher.

    Raises:
        StoreError: another process commits in this run folder.
    """
    folder = out / LAUNCH
    make_folder(folder)
    with take_lock(folder):
        for path in folder.iterdir():  # of earlier starts, whose rank 0 is gone since we have the lock
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
        board = Board(folder, secrets.token_hex(8))
        make_folder(board.place)
        with Heart(board.beats, seat.rank) as heart:
            lead = Lead(board, heart, seat, crew or Nobody())
            lead.publish()
            try:
                yield lead
            except BaseException as error:
                with suppress(StoreError):  # a full disk may be why it failed; the others then see no sign of life
                    lead.publish(f"{type(error).__name__}: {error}")
                raise
            else:
                lead.publish("done")
            finally:
                lead._crew.end()
