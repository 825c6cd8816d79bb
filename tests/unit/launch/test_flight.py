"""Rows that kill, one process after the other: what a death leaves, who is to blame, and that nothing else is changed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.launched import stub_bench, stub_rows
from tests.unit.store.store_world import SPEC, memory_folder, read

from gradsift.errors import LaunchError
from gradsift.launch import flight as module
from gradsift.launch.bench import Inline
from gradsift.launch.flight import (
    FALLEN,
    FLIGHTS,
    Fall,
    Flight,
    fallen,
    fell,
    gather,
    is_condemned,
    measure_unit,
)
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer
from gradsift.types import RowStatus

ROWS = stub_rows(30)
NAMES = sorted((row.id for row in ROWS), key=lambda name: next((r.num_tokens, r.id) for r in ROWS if r.id == name))


class Killed(BaseException):
    """Stands for the end of the process: no code of ours may tidy up."""


def inline(folder: Path, rows=ROWS, *, poison=(), cap: int | None = None, deaths: list | None = None) -> None:
    """One process; it dies when it measures a row of ``poison``, or more than ``cap`` rows at once with one of these."""

    def kills(ids) -> None:
        if set(poison) & set(ids) and (cap is None or len(ids) > cap):
            if deaths is not None:
                deaths.append(list(ids))
            raise Killed

    bench = stub_bench(folder, rows, kills=kills)
    with open_writer(folder, SPEC) as writer:
        Inline().collect(bench, writer, lambda: None)


def until_done(folder: Path, limit: int = 40, **options) -> int:
    """The same command again and again; how many times the process died."""
    for count in range(limit):
        try:
            inline(folder, **options)
            return count
        except Killed:
            continue
    raise AssertionError("it never ends")


def plain(rows=ROWS) -> dict:
    with memory_folder() as folder:
        inline(folder / "store", rows)
        return read(folder / "store")


def check(folder: Path, poison) -> None:
    got, want = read(folder), plain()
    assert {k: v for k, v in got.items() if k not in poison} == {k: v for k, v in want.items() if k not in poison}
    assert {k for k, v in got.items() if v[1] is RowStatus.WORKER_CRASH} == set(poison)
    report = verify_store(folder)
    assert report.ok
    assert sum(report.status.values()) == len(ROWS)
    assert not (folder / FLIGHTS).exists()


@given(st.sets(st.sampled_from(NAMES), max_size=4))
@settings(max_examples=12, deadline=None)
def test_whichever_rows_kill_they_cost_themselves_alone(poison):
    with memory_folder() as folder:
        deaths = until_done(folder / "store", poison=poison)
        check(folder / "store", poison)
        assert deaths <= 3 * len(poison)
        assert (deaths > 0) == bool(poison)


def test_one_row_that_kills_costs_three_processes_the_last_with_it_alone():
    deaths = []
    with memory_folder() as folder:
        assert until_done(folder / "store", poison={NAMES[9]}, deaths=deaths) == 3
        assert [len(ids) for ids in deaths] == [4, 4, 1]
        assert read(folder / "store")[NAMES[9]][2].startswith("3 processes died while they measured it, 1 of them")


def test_rows_that_kill_only_together_keep_what_they_give_alone():
    """Such as a memory that a micro-batch exhausts: nobody is to blame, and nothing is lost."""
    with memory_folder() as folder:
        assert until_done(folder / "store", poison={NAMES[9]}, cap=1) == 3
        check(folder / "store", ())


def test_a_kill_from_outside_changes_nothing_and_repeats_nothing():
    with memory_folder() as folder:
        begun = []

        def once(ids) -> None:
            begun.append(ids)
            if len(begun) == 3:
                raise Killed

        for _ in range(2):
            try:
                with open_writer(folder / "store", SPEC) as writer:
                    Inline().collect(stub_bench(folder / "store", ROWS, kills=once), writer, lambda: None)
            except Killed:
                assert len(fallen(folder / "store")) == 0
                assert len(list((folder / "store" / FLIGHTS).glob("*.json"))) == 1
        assert read(folder / "store") == plain()
        assert len(begun) == 8 + 1, "the unit in flight is measured again, whole, and nothing else"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_end_in_good_order_is_no_death(tmp_path, error):
    def stop(ids) -> None:
        raise error

    with open_writer(tmp_path, SPEC) as writer, pytest.raises(error):
        Inline().collect(stub_bench(tmp_path, ROWS, kills=stop), writer, lambda: None)
    assert gather(tmp_path, set()) == ()
    assert not (tmp_path / FLIGHTS).exists()


def test_a_planted_defect_is_seen(monkeypatch):
    """Without notes the run dies for ever; with a rule that blames a whole micro-batch innocent rows are lost."""
    with memory_folder() as folder, monkeypatch.context() as patch:
        patch.setattr(Flight, "write", lambda *_: None)
        with pytest.raises(AssertionError, match="never ends"):
            until_done(folder / "store", poison={NAMES[9]}, limit=6)
    with memory_folder() as folder, monkeypatch.context() as patch:
        patch.setattr("gradsift.launch.bench.is_condemned", lambda row, falls: module.num_deaths(row, falls) >= 2)
        until_done(folder / "store", poison={NAMES[9]})
        with pytest.raises(AssertionError):
            check(folder / "store", {NAMES[9]})


def test_rows_that_cannot_be_set_aside_are_named(tmp_path):
    for _ in range(3):
        with pytest.raises(Killed):
            inline(tmp_path, poison={NAMES[9]})
    bench = dataclasses.replace(stub_bench(tmp_path, ROWS), lost=None)
    with open_writer(tmp_path, SPEC) as writer, pytest.raises(LaunchError, match="a row kills") as raised:
        Inline().collect(bench, writer, lambda: None)
    assert NAMES[9] in str(raised.value)


@given(
    st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=7), max_size=6),
    st.integers(1, 7),
)
def test_measuring_carefully_gives_every_row_its_numbers_in_order(flights, count):
    """The slow twin: each row measured alone."""
    from tests.unit.store.store_world import measure

    rows = stub_rows(7)[:count]
    falls = [Fall("p", frozenset(f"row-{k:04}" for k in some)) for some in flights]
    calls = []

    def measured(some):
        calls.append([row.id for row in some])
        return measure([row.id for row in some])

    got = measure_unit(measured, rows, falls)
    assert got.ids == tuple(row.id for row in rows)
    for k, row in enumerate(rows):
        want = measure([row.id])
        assert got.status[k] == want.status[0]
        np.testing.assert_array_equal(got.dots[k], want.dots[0])
        np.testing.assert_array_equal(got.sketch[k], want.sketch[0])
    deaths = [sum(row.id in fall.rows for fall in falls) for row in rows]
    assert {call[0] for call in calls if len(call) == 1} >= {row.id for row, n in zip(rows, deaths) if n >= 2}
    assert all(n < 3 for call in calls if len(call) > 1 for n in (sum(r in f.rows for f in falls) for r in call))


def test_who_is_condemned():
    def falls(*flights):
        return [Fall("p", frozenset(some)) for some in flights]

    assert not is_condemned("a", falls("ab", "ab"))
    assert not is_condemned("a", falls("ab", "ab", "ab")), "never alone"
    assert is_condemned("a", falls("ab", "ab", "a"))
    assert not is_condemned("b", falls("ab", "ab", "a"))
    assert is_condemned("a", falls("a", "a", "a"))
    assert not is_condemned("a", falls("a", "a"))


def test_a_process_that_lives_is_not_dead_and_a_killed_one_is(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from tests.launched import stub_rows;"
        "from gradsift.launch.flight import Flight; Flight(Path(sys.argv[1])).write(stub_rows(2)); print('up', flush=True);"
        "time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
        assert gather(tmp_path, set()) == (), "it lives"
        process.kill()
        found = ()
        end = time.monotonic() + 5
        while (
            not found and time.monotonic() < end
        ):  # not waited for: a dead process whose parent has not noticed is dead
            found = gather(tmp_path, set())
        process.wait()
    (fall,) = found
    assert fall.rows == {"row-0000", "row-0001"}
    assert fall.process.startswith(f"rank 0 (process {process.pid} on ")
    assert gather(tmp_path, {"row-0000"}) == (fall,), "a row of it is still to be measured"
    assert gather(tmp_path, {"row-0000", "row-0001"}) == ()
    assert not (tmp_path / FLIGHTS).exists()


def test_a_shorter_note_over_a_longer_one_and_a_torn_one(tmp_path):
    one, rows = Flight(tmp_path, "3-7-ab"), stub_rows(9)
    one.write(rows)
    one.write(rows[:1])
    path = tmp_path / FLIGHTS / "3-7-ab.json"
    assert json.loads(path.read_text().split("\n")[0])["rows"] == ["row-0000"]
    path.write_text(path.read_text()[:40])
    assert fell(tmp_path, "3-7-ab")
    assert not fell(tmp_path, "3-7-ab")
    assert (tmp_path / FLIGHTS / FALLEN / "3-7-ab.json").exists()
    assert fallen(tmp_path) == ()


def test_a_disk_that_takes_no_note_stops_nothing(tmp_path):
    (tmp_path / FLIGHTS).write_text("a file is in the way")
    inline(tmp_path)
    assert read(tmp_path) == plain()


@pytest.mark.parametrize("hang", ["__import__('time').sleep(60)", "__import__('re').match('(a+)+b', 'a' * 40)"])
def test_the_watchdog_ends_a_process_that_hangs_also_in_native_code(hang):
    """The second one holds the interpreter's lock for ages."""
    script = (
        f"from gradsift.launch.flight import Watchdog\ndog = Watchdog(0.5)\nwith dog:\n  dog.pet()\n  {hang}\n"
        "print('not reached')"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "not reached" not in done.stdout
    assert time.monotonic() - begun < 30


def test_the_watchdog_lets_work_that_moves_and_lone_work_alone():
    script = (
        "import time\nfrom gradsift.launch.flight import Watchdog\nwith Watchdog(0.5) as dog:\n"
        "  for _ in range(6): time.sleep(0.2); dog.pet()\ntime.sleep(0.8)\nwith Watchdog(0):\n  time.sleep(0.6)\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr
