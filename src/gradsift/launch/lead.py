"""The process that commits: it lays out the units, adopts what others staged, and takes over from those that are gone.

Rank 0 of a torchrun or Slurm job also measures; the driver of Ray actors does not. Both hold the store's lock and are
alone in writing the commit log.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.errors import LaunchError, StoreError
from gradsift.launch.bench import Bench, Unit, is_suspect
from gradsift.launch.board import LAUNCH, Board
from gradsift.launch.crew import Crew, Nobody, Tally
from gradsift.launch.flight import Fall, fallen, fell, forget, gather
from gradsift.launch.life import Heart, Watch
from gradsift.launch.seat import Seat
from gradsift.manifest import make_folder
from gradsift.store.lock import LOCK, take_lock
from gradsift.store.shards import ShardResult
from gradsift.store.staging import adopt_staged, is_staged
from gradsift.store.writer import SignalWriter
from gradsift.types import Note

if TYPE_CHECKING:
    from gradsift.launch.lockstep import Lockstep

POLL_SECONDS = 0.1
LOOK_SECONDS = 0.5  # between two looks for processes that are gone
MAX_TRIES = 3  # of a unit that comes back damaged, or whose processes leave no note of what they measured
SUSPECT_SECONDS = 600.0  # so long rank 0 leaves a unit that may kill it to others


@dataclass
class _Work:
    """One pass on its way: the units that are not committed yet, by name, and the deaths so far."""

    bench: Bench
    writer: SignalWriter
    falls: tuple[Fall, ...]
    pending: dict[str, Unit] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    fresh: deque[Unit] = field(default_factory=deque)

    @cached_property
    def contents(self) -> Mapping[str, str]:
        """Content hash of every row, by its id."""
        return self.bench.contents()


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
        self.lockstep: Lockstep | None = None
        self._heart, self._crew, self._measures = heart, crew, isinstance(crew, Nobody)
        self._passes: list[str] = []
        self._closed = self._edition = 0
        self._begun = False
        self._watches: dict[str, Watch] = {}
        self._since: dict[str, float] = {}
        self._failures: Counter[str] = Counter()

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
        state = {"lead": self._heart.path.name, "passes": self._passes, "closed": self._closed}
        self.board.publish({**state, "edition": self._edition, "end": end, "tally": tally})

    def collect(self, bench: Bench, writer: SignalWriter, after: Callable[[], None]) -> None:
        """Share out the units of a pass and commit them as they come back.

        Args:
            bench: the pass.
            writer: the open writer of the store.
            after: called after commits; raises to stop the run.

        Raises:
            LaunchError: a unit came back damaged three times, or Ray's actors fail for good.
        """
        if bench.flight is not None:
            bench.flight.rename(self._heart.note.name)
        work = _Work(bench, writer, gather(bench.folder, writer.committed_ids().keys()))
        for unit in sorted(bench.plan(writer), key=lambda unit: is_suspect(unit, work.falls)):
            lost, rest = bench.set_aside(unit, work.falls)
            self._part(work, lost, rest)
        self.tally.num_units += len(work.pending)
        self.board.open_pass(bench.name, bench.spec.key, list(work.pending.values()))
        self._passes.append(bench.name)
        self.publish()
        if work.pending and not self._begun:
            self._begun = True
            self._crew.begin(self.board)
        looked = time.monotonic()
        while work.pending:
            took = self._adopt(work)
            unit = self._next(work) if self._measures else None
            if unit is not None:
                writer.beat()
                writer.commit(bench.attempt(unit))
                del work.pending[unit.key]
                self.tally.num_here += 1
            if time.monotonic() - looked >= LOOK_SECONDS:
                self._free_gone(work)
                after()  # rows may have been set aside
                self._crew.tend(self.tally.num_adopted + self.tally.num_set_aside)
                looked = time.monotonic()
            if took or unit is not None:
                after()
                continue
            writer.beat()
            bench.tick(0, 0)
            if self.lockstep is None or not self.lockstep.follow():
                time.sleep(POLL_SECONDS)
        self._closed += 1
        self.publish()
        forget(bench.folder)

    def summary(self) -> dict[str, Any]:
        """Tell the manifest who measured: launcher, number of processes and what became of the units."""
        fsdp = {} if self.lockstep is None else {"fsdp": self.lockstep.summary()}
        return {"launcher": self.seat.launcher, "world": self.seat.world, **asdict(self.tally), **fsdp}

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

    def _adopt(self, work: _Work) -> bool:
        got = adopt_staged(work.writer, work.contents, work.order)
        for key in (*got.units, *got.repeated):
            unit = work.pending.pop(key, None)
            if unit is not None:
                work.bench.tick(len(unit.rows), unit.num_tokens)
                self.tally.num_adopted += 1
        self.tally.num_repeated += len(got.repeated)
        self.tally.refused.update(got.refused)
        for key in got.refused:
            if key in work.pending:
                self._give_again(work, work.pending[key], self.tally.refused[key])
        return bool(got.units)

    def _next(self, work: _Work) -> Unit | None:
        for _ in range(len(work.fresh)):
            unit = work.fresh.popleft()
            if unit.key not in work.pending:
                continue
            if is_suspect(unit, work.falls) and self._left_to_others(unit):
                work.fresh.append(unit)
            elif self.board.claim(work.bench.name, unit.key, self._heart.note.name):
                return unit
        return None

    def _left_to_others(self, unit: Unit) -> bool:
        """A unit that may kill is left to others for a while: the end of rank 0 is the end of the run."""
        since = self._since.setdefault(f"suspect {unit.key}", time.monotonic())
        others = [path for path in self.board.beats.glob("*.json") if path != self._heart.path]
        return time.monotonic() - since < SUSPECT_SECONDS and any(not self._watch(path.stem).gone() for path in others)

    def _watch(self, owner: str) -> Watch:
        if owner not in self._watches:
            self._watches[owner] = Watch(self.board.beats / f"{owner}.json", self.seat.gone_seconds)
        return self._watches[owner]

    def _free_gone(self, work: _Work) -> None:
        """Take units back from processes that are gone, and learn from their notes which rows are to blame."""
        name, folder = work.bench.name, work.bench.folder
        for key in sorted(self.board.claimed(name) & work.pending.keys()):
            owner = self.board.owner(name, key)
            if owner is None or is_staged(folder, key):
                continue
            if owner:
                watch = self._watch(owner)
                if not watch.gone():
                    continue
                who = str(watch.note) if watch.note else owner
            elif time.monotonic() - self._since.setdefault(key, time.monotonic()) < self.seat.gone_seconds:
                continue  # the claim has no name in it yet
            else:
                who = "a process without a name"
            if is_staged(folder, key):  # it was finished between the two looks
                continue
            unit = work.pending[key]
            self.tally.gone.append(who)
            self.tally.num_freed += 1
            self.tally.num_rows_freed += len(unit.rows)
            if not fell(folder, owner):
                self._give_again(work, unit, f"{who} is gone")
                continue
            work.falls = fallen(folder)
            lost, rest = work.bench.set_aside(unit, work.falls)
            if lost is None:
                self._free(work, unit)
                continue
            del work.pending[key]  # its claim stays, so nobody begins it again
            self._part(work, lost, rest)
            self._edition += 1
            self.board.write_plan(name, work.bench.spec.key, list(work.pending.values()))
            self.publish()

    def _part(self, work: _Work, lost: ShardResult | None, rest: Unit | None) -> None:
        """Commit the rows of a unit that kill, without signals, and make the others a unit to be measured."""
        if lost is not None:
            work.writer.commit(lost)
            self.tally.num_set_aside += len(lost.ids)
        if rest is not None:
            work.pending[rest.key] = rest
            work.order.setdefault(rest.key, len(work.order))
            work.fresh.append(rest)

    def _give_again(self, work: _Work, unit: Unit, why: str) -> None:
        """Give a unit to another process, unless that has failed too often for no reason that a row has."""
        self._failures[unit.key] += 1
        if self._failures[unit.key] >= MAX_TRIES:
            raise LaunchError(
                f"a unit of {len(unit.rows)} rows has failed {MAX_TRIES} times in other processes",
                where=f"rows {unit.rows[0].id} to {unit.rows[-1].id}",
                got=why,
                expected="a process that measures it",
                do="run the same command with --launcher inline to see what happens; what was committed is kept",
            )
        self._free(work, unit)

    def _free(self, work: _Work, unit: Unit) -> None:
        self.board.free(work.bench.name, unit.key)
        work.fresh.append(unit)


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
