"""Signs of life: what moves is alive, what stands still or whose process is over is gone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.launched import wait_for

from gradsift.launch.life import Heart, Note, Watch, read_note


def write(path: Path, **changes: object) -> None:
    note = Note("3-1-a", 3, "elsewhere", "another kernel", 1, 5)
    path.write_text(json.dumps({**dataclasses.asdict(note), **changes}))


def test_a_heart_beats_and_says_goodbye(tmp_path):
    with Heart(tmp_path / "beats", 2) as heart:
        first = read_note(heart.path)
        assert first is not None
        assert (first.rank, first.pid, first.ended) == (2, os.getpid(), False)
        watch = Watch(heart.path, 60)
        assert not watch.moved
        wait_for(lambda: not watch.gone() and watch.moved)
    assert read_note(heart.path).ended
    assert watch.gone()


def test_gone_after_standing_still_on_the_watchers_own_clock(tmp_path):
    now = [0.0]
    path = tmp_path / "beat.json"
    write(path, count=1)
    watch = Watch(path, 10, clock=lambda: now[0])
    now[0] = 9.9
    assert not watch.gone()
    write(path, count=2)
    assert not watch.gone()
    assert watch.moved
    now[0] = 19.8
    assert not watch.gone()
    now[0] = 20.0
    assert watch.gone()
    write(path, count=3)
    assert not watch.gone(), "it was only stopped for a while"


def test_a_long_unit_between_two_looks_is_no_death(tmp_path):
    now = [0.0]
    path = tmp_path / "beat.json"
    write(path, count=1)
    watch = Watch(path, 10, clock=lambda: now[0])
    write(path, count=900)
    now[0] = 500.0
    assert not watch.gone()


def test_no_file_is_gone_in_time_and_a_torn_one_changes_nothing(tmp_path):
    now = [0.0]
    path = tmp_path / "beat.json"
    watch = Watch(path, 10, clock=lambda: now[0])
    assert not watch.gone()
    write(path)
    assert not watch.gone()
    path.write_text("{")
    now[0] = 9.0
    assert not watch.gone()
    now[0] = 11.0
    assert watch.gone()


def test_a_killed_process_of_this_machine_is_gone_at_once(tmp_path):
    code = f"from pathlib import Path\nfrom gradsift.launch.life import Heart\nwith Heart(Path({str(tmp_path)!r}), 1): input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        path = wait_for(lambda: next(tmp_path.glob("1-*.json"), None))
        watch = Watch(path, 3600)
        assert not watch.gone()
        process.kill()
        process.wait()
        assert watch.gone()
    assert not read_note(path).ended


def test_a_process_number_of_another_process_table_proves_nothing(tmp_path):
    """Process 2**22 + 1 cannot exist here, but the note comes from another kernel or container."""
    path = tmp_path / "beat.json"
    write(path, pid=2**22 + 1)
    assert not Watch(path, 10).gone()
