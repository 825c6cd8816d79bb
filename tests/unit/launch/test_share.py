"""Sharing units out by files: whatever dies, the store is that of one process; workers are threads with stub numbers."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.launched import stub_bench, stub_rows
from tests.unit.store.store_world import SPEC, make_spec, memory_folder, read

from gradsift.errors import LaunchError, SpecError, StoreError
from gradsift.launch.bench import Inline, Released
from gradsift.launch.board import LAUNCH, Board, read_state
from gradsift.launch.flight import Flight
from gradsift.launch.lead import Lead, leading
from gradsift.launch.life import Watch
from gradsift.launch.seat import Seat
from gradsift.launch.worker import Worker, ended_run, joined
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer
from gradsift.types import RowStatus

ROWS = stub_rows(30)
NUM_UNITS = 8  # of four rows, the last of two


class Killed(BaseException):
    """Stands for kill -9: nothing of the worker's code may handle it."""


class Work:
    """One run: a lead, workers that die after so many units, and a count of what was begun."""

    def __init__(self, folder: Path, rows=ROWS, *, seconds: float = 20.0, gone: float = 5.0) -> None:
        self.out, self.rows, self.begun = folder, rows, Counter()
        self.end = time.monotonic() + seconds
        self.gone, self.threads, self.lock = gone, [], threading.Lock()
        self.errors: list[BaseException] = []
        self.ranks: set[int] = set()
        self.fallen: set[str] = set()
        self.deadly: list[int] = []  # rows of the micro-batches that killed

    def seat(self, rank: int) -> Seat:
        return Seat("torchrun", rank, 4, rank, join_seconds=10, gone_seconds=self.gone)

    def tick(self, rows: int, tokens: int) -> None:
        assert time.monotonic() < self.end, "the run hangs"

    def bench(
        self, dies_after: int | None = None, poison: str = "", rows=None, spec=SPEC, rank: int = 0, waits: int = 0
    ):
        """``waits``: the lead's first unit waits until so many workers have begun one, so that they do take part."""
        seen = [0]

        def before(first: str) -> None:
            with self.lock:
                self.begun[first] += 1
                self.ranks.add(rank)
            while len(self.ranks - {0}) < waits:
                self.tick(0, 0)
                time.sleep(0.01)
            # Several deaths at one unit are what a row that kills looks like, which is test_flight's matter.
            with self.lock:
                dies = dies_after is not None and seen[0] >= dies_after and first not in self.fallen
                if dies:
                    self.fallen.add(first)
            if dies:
                raise Killed
            seen[0] += 1
            time.sleep(0.01)

        def kills(ids) -> None:
            if poison in ids:
                with self.lock:
                    self.deadly.append(len(ids))
                raise Killed

        plain = stub_bench(self.out / "store", self.rows if rows is None else rows, before=before, kills=kills)
        return dataclasses.replace(plain, tick=self.tick, spec=spec)

    def worker(self, rank: int, bench, *, silent: bool = False) -> None:
        try:
            with joined(self.out / LAUNCH, self.seat(rank), self.tick) as worker:
                try:
                    worker.wait_open(bench.name, self.tick)
                    worker.serve(bench)
                except Killed:
                    if silent:  # no goodbye: only the standing counter tells
                        worker._heart._write = lambda *_: None
        except Released:
            pass
        except BaseException as error:
            self.errors.append(error)

    def start(self, rank: int, *arguments, **options) -> None:
        thread = threading.Thread(target=self.worker, args=(rank, *arguments), kwargs=options, daemon=True)
        self.threads.append(thread)
        thread.start()

    def lead(self, bench=None, crew=None, during=lambda lead: None) -> Lead:
        with leading(self.out, self.seat(0), crew) as lead, open_writer(self.out / "store", SPEC) as writer:
            during(lead)
            lead.collect(bench or self.bench(), writer, lambda: None)
        for thread in self.threads:
            thread.join()
        return lead

    def check(self, deaths: int) -> None:
        assert not self.errors, self.errors
        assert read(self.out / "store") == inline(self.rows)
        assert verify_store(self.out / "store").ok
        assert len(self.begun) == NUM_UNITS
        assert sum(self.begun.values()) - NUM_UNITS <= deaths, "at most one unit per dead worker is measured again"


def inline(rows) -> dict:
    """The slow twin: one process, one unit after the other."""
    with memory_folder() as folder:
        with open_writer(folder / "store", SPEC) as writer:
            Inline().collect(stub_bench(folder / "store", rows), writer, lambda: None)
        return read(folder / "store")


class Threads:
    """A crew of threads; a dead one is replaced."""

    def __init__(self, work: Work, count: int, dies_after: list[int | None], poison: str = "") -> None:
        self.work, self.count, self.plan, self.poison, self.started = work, count, list(dies_after), poison, 0

    def begin(self, board: Board) -> None:
        for _ in range(self.count):
            self.add()

    def add(self) -> None:
        self.started += 1
        dies = self.plan.pop(0) if self.plan else None
        self.work.start(self.started, self.work.bench(dies, self.poison))

    def tend(self, progress: int) -> None:
        alive = sum(thread.is_alive() for thread in self.work.threads)
        for _ in range(self.count - alive):
            self.add()

    def end(self) -> None:
        pass


def check_deaths(dies_after: list[int | None], silent: bool = False) -> Work:
    with memory_folder() as folder:
        work = Work(folder, **({"gone": 0.4} if silent else {}))  # a busy machine lets a heart miss a beat
        for rank, dies in enumerate(dies_after, 1):
            work.start(rank, work.bench(dies, rank=rank), silent=silent)
        lead = work.lead(work.bench(waits=len(dies_after)))
        assert work.ranks == set(range(len(dies_after) + 1))
        work.check(sum(dies is not None for dies in dies_after))
        assert lead.tally.num_here + lead.tally.num_adopted == lead.tally.num_units == NUM_UNITS
        assert read_state(folder / LAUNCH)["end"] == "done"
        return work


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=3))
@settings(max_examples=6, deadline=None)
def test_whoever_dies_the_store_is_that_of_one_process(dies_after):
    check_deaths(dies_after)


def test_a_worker_that_falls_silent_is_gone_in_time_and_its_unit_is_taken_over():
    check_deaths([1], silent=True)


@pytest.mark.parametrize("defect", ["everyone has every unit", "nobody is ever gone"])
def test_a_planted_defect_is_seen(monkeypatch, defect):
    if defect == "everyone has every unit":
        monkeypatch.setattr(Board, "claim", lambda *_: True)
        dies = [None, None]
    else:
        plain = Watch.gone
        monkeypatch.setattr(Watch, "gone", lambda self: plain(self) and False)
        monkeypatch.setattr(Work.__init__, "__kwdefaults__", {"seconds": 4.0, "gone": 0.4})
        dies = [0]
    with pytest.raises((AssertionError, LaunchError, StoreError)):
        check_deaths(dies)


def test_a_crew_whose_members_die_is_replaced():
    with memory_folder() as folder:
        work = Work(folder, seconds=30)
        crew = Threads(work, 2, [2, 0, 1])
        lead = work.lead(crew=crew)
        work.check(3)
        assert crew.started == 5
        assert lead.tally.num_here == 0
        assert lead.tally.num_adopted == NUM_UNITS
        assert 1 <= lead.tally.num_freed <= 3
        (note,) = lead.notes()
        assert note.count == lead.tally.num_rows_freed == 4 * lead.tally.num_freed  # the short unit is the last
        assert "was gone: rank" in note.text


def poisoned(place: int = 4) -> tuple[str, list[str]]:
    """A row of the second unit, and the ids of all rows of that unit."""
    rows = sorted(ROWS, key=lambda row: (row.num_tokens, row.id))
    return rows[place].id, [row.id for row in rows[4:8]]


def check_poison(folder: Path, poison: str) -> None:
    """The row that kills has its status and a reason, every other one what one process gives it."""
    got, want = read(folder / "store"), inline(ROWS)
    assert {name: row for name, row in got.items() if name != poison} == {
        name: row for name, row in want.items() if name != poison
    }
    _, status, reason, *_ = got[poison]
    assert status is RowStatus.WORKER_CRASH
    assert reason.startswith("3 processes died while they measured it, 1 of them with this row alone: rank 1 (process")
    assert verify_store(folder / "store").ok
    assert not (folder / "store" / "flights").exists(), "the notes were cleared"


@pytest.mark.parametrize("place", [4, 6, 7])
def test_a_row_that_kills_costs_three_processes_and_itself(place):
    poison, _ = poisoned(place)
    with memory_folder() as folder:
        work = Work(folder, seconds=30)
        lead = work.lead(crew=Threads(work, 1, [], poison=poison))
        check_poison(folder, poison)
        assert work.deadly == [4, 4, 1]
        assert lead.tally.num_set_aside == 1
        assert lead.tally.num_freed == 3
        assert read_state(folder / LAUNCH)["end"] == "done"


def test_a_row_that_kills_among_several_workers():
    poison, _ = poisoned(5)
    with memory_folder() as folder:
        work = Work(folder, seconds=30)
        lead = work.lead(crew=Threads(work, 3, [], poison=poison))
        got = read(folder / "store")
        assert got[poison][1] is RowStatus.WORKER_CRASH
        assert {k: v for k, v in got.items() if k != poison} == {k: v for k, v in inline(ROWS).items() if k != poison}
        assert lead.tally.num_set_aside == 1


def test_rank_0_leaves_what_may_kill_it_to_the_others():
    """Three workers that come of their own die over the row; rank 0 measures the rest of its unit, and lives."""
    poison, _ = poisoned(5)
    with memory_folder() as folder:
        work = Work(folder, seconds=30)
        for rank in (1, 2, 3):
            work.start(rank, work.bench(poison=poison, rank=rank))
        mine = work.bench(waits=0)
        seen: list[str] = []

        def measure(rows):
            seen.extend(row.id for row in rows)
            while not work.deadly:  # until a worker has begun the unit, rank 0 stays with its first one
                work.tick(0, 0)
                time.sleep(0.01)
            return mine.measure(rows)

        work.lead(dataclasses.replace(mine, measure=measure))
        assert read(folder / "store")[poison][1] is RowStatus.WORKER_CRASH
        assert poison not in seen
        assert len(work.deadly) == 3


def test_a_row_that_cannot_be_set_aside_stops_the_run_by_name():
    poison, _ = poisoned()
    with memory_folder() as folder:
        work = Work(folder, seconds=30)
        bench = dataclasses.replace(work.bench(), lost=None)
        with pytest.raises(LaunchError, match="a row kills the process") as raised:
            work.lead(bench, crew=Threads(work, 1, [], poison=poison))
        assert poison in str(raised.value)
        assert "a row kills" in read_state(folder / LAUNCH)["end"]


def test_a_unit_whose_processes_leave_no_note_stops_the_run_by_name(monkeypatch):
    monkeypatch.setattr(Flight, "write", lambda *_: None)
    poison, unit = poisoned()
    with memory_folder() as folder:
        work = Work(folder, seconds=30)
        with pytest.raises(LaunchError, match="failed 3 times") as raised:
            work.lead(crew=Threads(work, 1, [], poison=poison))
        assert f"rows {unit[0]} to {unit[-1]}" in str(raised.value)
        assert work.begun[unit[0]] == 3


def test_two_passes_and_a_worker_that_missed_the_first():
    with memory_folder() as folder:
        work = Work(folder)
        first = dataclasses.replace(work.bench(), name="signals-epoch-1", folder=folder / "one")
        there, late = threading.Event(), threading.Event()
        done = []

        def follow() -> None:
            with joined(folder / LAUNCH, work.seat(1), work.tick) as worker:
                there.set()
                late.wait()
                worker.wait_open("", work.tick)
                worker.wait_open("signals-epoch-1", work.tick)
                worker.serve(first)
                done.append(worker.num_units)
                worker.wait_open("signals", work.tick)
                with pytest.raises(Released):
                    worker.serve(work.bench(rank=1))
                done.append(worker.num_units)

        thread = threading.Thread(target=follow, daemon=True)
        with leading(folder, work.seat(0)) as lead:
            thread.start()
            assert there.wait(10)
            with open_writer(folder / "one", SPEC) as writer:
                lead.collect(first, writer, lambda: None)
            late.set()
            with open_writer(folder / "store", SPEC) as writer:
                lead.collect(work.bench(waits=1), writer, lambda: None)
        thread.join(10)
        assert done[0] == 0
        assert done[1] >= 1
        assert read(folder / "one") == read(folder / "store") == inline(ROWS)


def test_appended_rows_are_new_units_and_nothing_else(tmp_path):
    with open_writer(tmp_path / "store", SPEC) as writer:
        Inline().collect(stub_bench(tmp_path / "store", ROWS[:13]), writer, lambda: None)
    work = Work(tmp_path)
    work.start(1, work.bench(rank=1))
    work.lead(work.bench(waits=1))
    assert not work.errors
    assert work.ranks == {0, 1}
    assert read(tmp_path / "store") == inline(ROWS)


@pytest.mark.parametrize("what", ["rows", "spec"])
def test_a_worker_that_would_measure_something_else_is_refused(tmp_path, what):
    work = Work(tmp_path)
    other = {"rows": stub_rows(30, edition=1)} if what == "rows" else {"spec": make_spec(max_length=7)}
    work.start(1, work.bench(**other))

    def refused(lead: Lead) -> None:
        """Open the pass and wait for the refusal before measuring anything."""
        lead.board.open_pass("signals", SPEC.key, list(bench_units(work)))
        lead._passes.append("signals")
        lead.publish()
        work.threads[0].join()

    with leading(tmp_path, work.seat(0)) as lead:
        refused(lead)
    work.lead()
    (error,) = work.errors
    assert isinstance(error, SpecError)
    assert "does not measure what rank 0 measures" in str(error)
    assert read(tmp_path / "store") == inline(ROWS)


def test_workers_of_a_lead_that_fails_say_why(tmp_path):
    work = Work(tmp_path)
    work.start(1, work.bench())

    def fail(lead: Lead) -> None:
        time.sleep(0.8)
        raise StoreError("the disk is on fire")

    with pytest.raises(StoreError):
        work.lead(during=fail)
    for thread in work.threads:
        thread.join()
    (error,) = work.errors
    assert isinstance(error, LaunchError)
    assert "StoreError: the disk is on fire" in str(error)


def test_a_lead_that_falls_silent_is_gone_and_what_was_finished_stays_staged(tmp_path):
    work = Work(tmp_path, gone=0.4)
    with leading(tmp_path, work.seat(0)) as lead:
        lead.board.open_pass("signals", SPEC.key, list(bench_units(work)))
        lead._passes.append("signals")
        lead.publish()
        work.start(1, work.bench())
        time.sleep(0.8)
        lead._heart._write = lambda *_: None
        for thread in work.threads:
            thread.join()
    (error,) = work.errors
    assert isinstance(error, LaunchError)
    assert "rank 0 is gone" in str(error)
    assert len(list((tmp_path / "store" / "staging" / "ledger").glob("*.json"))) == sum(work.begun.values())


def bench_units(work: Work):
    with open_writer(work.out / "store", SPEC) as writer:
        yield from stub_bench(work.out / "store", work.rows).plan(writer)


def test_a_killed_runs_board_is_not_joined_and_the_wait_has_an_end(tmp_path):
    work = Work(tmp_path)
    with leading(tmp_path, work.seat(0)) as lead:
        lead.publish()
    state = read_state(tmp_path / LAUNCH)
    Board(tmp_path / LAUNCH, state["run"]).publish({**{k: v for k, v in state.items() if k != "run"}, "end": None})
    seat = dataclasses.replace(work.seat(1), join_seconds=0.7, gone_seconds=60)
    with pytest.raises(LaunchError, match="rank 0 has not begun"), joined(tmp_path / LAUNCH, seat, work.tick):
        pass


def test_a_run_that_had_ended_before_is_not_joined_and_one_that_ends_meanwhile_is(tmp_path):
    work = Work(tmp_path)
    assert ended_run(tmp_path / LAUNCH) is None
    with leading(tmp_path, work.seat(0)):
        assert ended_run(tmp_path / LAUNCH) is None
    old = ended_run(tmp_path / LAUNCH)
    assert old is not None
    seat = dataclasses.replace(work.seat(1), join_seconds=0.5)
    with pytest.raises(LaunchError, match="has not begun"), joined(tmp_path / LAUNCH, seat, work.tick, ended=old):
        pass
    with pytest.raises(Released), joined(tmp_path / LAUNCH, seat, work.tick, ended=None):
        pass


def test_a_run_that_fails_before_a_worker_has_joined_is_told_at_once(tmp_path):
    work = Work(tmp_path)
    with pytest.raises(StoreError), leading(tmp_path, work.seat(0)):
        raise StoreError("the disk is on fire")
    with pytest.raises(LaunchError, match="the disk is on fire"), joined(tmp_path / LAUNCH, work.seat(1), work.tick):
        pass


def test_two_leads_in_one_folder_are_refused(tmp_path):
    work = Work(tmp_path)
    with leading(tmp_path, work.seat(0)) as lead:
        with pytest.raises(StoreError, match="another writer"), leading(tmp_path, work.seat(0)):
            pass
        assert lead.board.place.is_dir(), "the refused one must not clear the other's board"


def test_a_worker_sees_that_another_run_has_begun(tmp_path):
    work = Work(tmp_path)
    with leading(tmp_path, work.seat(0)) as lead:
        watch = Watch(lead._heart.path, 60)
        worker = Worker(Board(tmp_path / LAUNCH, "0" * 16), lead._heart, watch, work.seat(1))
        with pytest.raises(LaunchError, match="another run has begun"):
            worker.wait_open("signals", work.tick)


def test_a_damaged_plan_is_refused(tmp_path):
    board = Board(tmp_path / LAUNCH, "1" * 16)
    board.open_pass("signals", SPEC.key, [])
    path = board.place / "plan-signals.json"
    path.write_bytes(path.read_bytes().replace(b"spec_key", b"spec_kez"))
    with pytest.raises(LaunchError, match="plan of the pass is damaged"):
        board.read_plan("signals")


def test_a_unit_is_claimed_once_and_freed_by_count(tmp_path):
    board = Board(tmp_path / LAUNCH, "1" * 16)
    assert not board.claim("signals", "u", "me"), "the pass is not open"
    board.open_pass("signals", SPEC.key, [])
    assert board.claim("signals", "u", "me")
    assert not board.claim("signals", "u", "you")
    assert board.owner("signals", "u") == "me"
    assert board.free("signals", "u") == 1
    assert board.claimed("signals") == set()
    assert board.claim("signals", "u", "you")
    assert board.free("signals", "u") == 2
    assert board.owner("signals", "u") is None
