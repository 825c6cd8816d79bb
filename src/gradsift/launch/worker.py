"""A process that only measures: it joins the run, claims units, stages them, and goes home when rank 0 says so."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.errors import LaunchError, SpecError
from gradsift.launch.bench import Bench, Released, Unit
from gradsift.launch.board import Board, read_state
from gradsift.launch.life import Heart, Watch
from gradsift.launch.seat import Seat
from gradsift.store.staging import stage
from gradsift.store.writer import SignalWriter

if TYPE_CHECKING:
    from gradsift.launch.lockstep import Lockstep

POLL_SECONDS = 0.2
_DO = "run the same command again; what was committed or staged is kept"


class Worker:
    """A launcher that serves rank 0; made by :func:`joined`.

    Args:
        board: the run's meeting place.
        heart: this process's sign of life, beating.
        lead: watch over rank 0.
        seat: this process among the others.
    """

    commits = False

    def __init__(self, board: Board, heart: Heart, lead: Watch, seat: Seat) -> None:
        self.board, self.seat = board, seat
        self.num_units = self.num_rows = 0
        self.lockstep: Lockstep | None = None
        self._heart, self._lead = heart, lead

    def wait_open(self, name: str, tick: Callable[[int, int], None]) -> None:
        """Wait until rank 0 has made everything that a pass needs.

        Args:
            name: the pass; empty for the first one, whatever its name.
            tick: called while waiting; raises to stop.

        Raises:
            Released: rank 0 has all signals.
            LaunchError: rank 0 is gone or has failed.
        """
        while True:
            passes = self._look()["passes"]
            if name in passes or (not name and passes):
                return
            tick(0, 0)
            self._pause()

    def collect(self, bench: Bench, writer: SignalWriter, after: Callable[[], None]) -> None:
        """Never called: another process commits.

        Args:
            bench: the pass.
            writer: of a store.
            after: of a commit.
        """
        raise AssertionError("a worker commits nothing")

    def serve(self, bench: Bench) -> None:
        """Measure units until the pass is over and the next one is open.

        Args:
            bench: the pass.

        Raises:
            Released: rank 0 has all signals.
            LaunchError: rank 0 is gone or has failed; the unit in flight was finished and staged first.
            SpecError: this process measures something else than rank 0.
        """
        edition = self._look()["edition"]  # before the plan, which may only be newer
        units = self._units(bench, {})
        fresh = deque(units.values())
        if bench.flight is not None:
            bench.flight.rename(self._heart.note.name)
        made_by = {**bench.made_by, "launcher": self.seat.launcher, "rank": str(self.seat.rank)}
        while True:
            state = self._look()
            place = state["passes"].index(bench.name)
            if state["edition"] != edition:  # rank 0 has set a row aside and made a new unit of the others
                edition, units = state["edition"], self._units(bench, units)
                fresh = deque(units.values())
            unit = None if state["closed"] > place else self._next(bench, fresh)
            if unit is not None:
                stage(bench.folder, bench.spec, bench.attempt(unit), made_by)
                self.num_units += 1
                self.num_rows += len(unit.rows)
                continue
            if len(state["passes"]) > place + 1:
                return
            bench.tick(0, 0)
            self._pause()
            if state["closed"] <= place:  # rank 0 may have freed a unit of a process that is gone
                taken = self.board.claimed(bench.name)
                fresh.extend(unit for unit in units.values() if unit.key not in taken)

    def _pause(self) -> None:
        """Wait a little, or take part in what the others measure where all hold one model together."""
        try:
            followed = self.lockstep is not None and self.lockstep.follow()
        except LaunchError:
            self._look()  # rank 0 may have said why it went
            raise
        if not followed:
            time.sleep(POLL_SECONDS)

    def _next(self, bench: Bench, fresh: deque[Unit]) -> Unit | None:
        while fresh:
            unit = fresh.popleft()
            if self.board.claim(bench.name, unit.key, self._heart.note.name):
                return unit
        return None

    def _units(self, bench: Bench, known: Mapping[str, Unit]) -> dict[str, Unit]:
        """Read the plan, and rebuild from this process's own rows the units that are not known yet."""
        spec_key, lines = self.board.read_plan(bench.name)
        new = [line for line in lines if line[2] not in known]
        units = bench.planned([(shard, skipped) for shard, skipped, _ in new]) if new else []
        strange = [unit for unit, line in zip(units, new, strict=True) if unit.key != line[2]]
        if spec_key != bench.spec.key or strange:
            what = f"spec {bench.spec.key}" if spec_key != bench.spec.key else f"{len(strange)} units of other rows"
            raise SpecError(
                "this process does not measure what rank 0 measures",
                where=f"rank {self.seat.rank}, {bench.folder}",
                got=what,
                expected=f"spec {spec_key} and the rows that rank 0 read",
                do="give all processes the same command, files, model and versions of gradsift",
            )
        made = {unit.key: unit for unit in units}
        return {key: known[key] if key in known else made[key] for _, _, key in lines}

    def _look(self) -> dict[str, Any]:
        """Read the state; raises when the run is over for this process."""
        state = read_state(self.board.folder)
        if state is not None and state["run"] == self.board.run:
            _refuse_ended(state, self.seat)
        if self._lead.gone():
            raise LaunchError(
                "rank 0 is gone", where=f"rank {self.seat.rank}", got=f"no sign of life of {self._lead.note}",
                expected=f"one within {self.seat.gone_seconds:.0f} s", do=_DO,
            )  # fmt: skip
        if state is None or state["run"] != self.board.run:
            raise LaunchError(
                "another run has begun in this folder", where=str(self.board.folder), got=str(state and state["run"]),
                expected=self.board.run, do="start all processes of a run by one command",
            )  # fmt: skip
        return state


def _refuse_ended(state: dict[str, Any], seat: Seat) -> None:
    """Go home when the run is over, and say why when it failed."""
    if state["end"] == "done":
        raise Released
    if state["end"] is not None:
        first = str(state["end"]).splitlines()[0]
        raise LaunchError("rank 0 has failed", where=f"rank {seat.rank}", got=first, do=_DO)


def ended_run(folder: Path) -> str | None:
    """Name the run that had ended before this process began, so that it is not taken for its own.

    Args:
        folder: ``launch`` in the run folder; need not exist.

    Returns:
        Its name, or None.
    """
    state = read_state(folder)
    return state["run"] if state is not None and state["end"] is not None else None


@contextmanager
def joined(
    folder: Path, seat: Seat, tick: Callable[[int, int], None], *, run: str | None = None, ended: str | None = None
) -> Iterator[Worker]:
    """Be a worker of a run.

    Args:
        folder: ``launch`` in the run folder; need not exist yet.
        seat: this process among the others.
        tick: called while waiting; raises to stop.
        run: name of the run where it is known; else the run of this folder whose rank 0 is seen alive.
        ended: a run that had ended before this process began.

    Yields:
        The launcher.

    Raises:
        Released: the run is over already.
        LaunchError: rank 0 did not begin in time, or has failed.
    """
    name, lead = _find(folder, seat, tick, run, ended)
    board = Board(folder, name)
    with Heart(board.beats, seat.rank) as heart:
        yield Worker(board, heart, lead, seat)


def _find(
    folder: Path, seat: Seat, tick: Callable[[int, int], None], run: str | None, ended: str | None
) -> tuple[str, Watch]:
    begun, watches = time.monotonic(), dict[str, Watch]()
    while True:
        state = read_state(folder)
        if state is not None and state["run"] != ended and run in (None, state["run"]):
            name = str(state["run"])
            watch = watches.setdefault(name, Watch(folder / name / "beats" / state["lead"], seat.gone_seconds))
            # A killed run looks like a living one until its counter is seen to stand still.
            if not watch.gone() and (watch.moved or run is not None):
                return name, watch
            _refuse_ended(state, seat)
        if time.monotonic() - begun > seat.join_seconds:
            raise LaunchError(
                "rank 0 has not begun", where=f"rank {seat.rank} of {seat.world}, {folder}",
                got=f"no living run for {seat.join_seconds:.0f} s", expected="rank 0 with the same --out",
                do="start all ranks by one command, give --wait SECONDS, or use --launcher inline for one process",
            )  # fmt: skip
        tick(0, 0)
        time.sleep(POLL_SECONDS)
