from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_world import SPEC

from gradsift.errors import StoreError
from gradsift.store.lock import LOCK, STALE_SECONDS, me, process_start, take_lock
from gradsift.store.verify import repair_store
from gradsift.store.writer import open_writer

HOLD = """
import sys, time
from pathlib import Path
from gradsift.store.lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
RACE = """
import os, sys, time
from pathlib import Path
from gradsift.errors import StoreError
from gradsift.store.lock import take_lock
folder, gate = Path(sys.argv[1]), Path(sys.argv[2])
children = []
for i in range(20):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        while not gate.exists():
            time.sleep(0.001)
        start = time.monotonic()
        try:
            lock = take_lock(folder)
            os.write(writer, b"won")
            time.sleep(3)
        except StoreError as error:
            os.write(writer, f"lost {time.monotonic() - start:.3f} {error.got}".encode())
        os._exit(0)
    os.close(writer)
    children.append((pid, reader))
gate.touch()
for pid, reader in children:
    print(pid, os.read(reader, 4096).decode(), flush=True)
for pid, _ in children:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
take_lock(folder).release()
print("recovered")
"""


def note(folder: Path, **changes) -> None:
    (folder / LOCK).write_text(json.dumps({**dataclasses.asdict(me()), **changes}))


def test_a_second_writer_is_told_who_the_first_is(room):
    with open_writer(room / "s", SPEC):
        for opening in (lambda: open_writer(room / "s", SPEC), lambda: repair_store(room / "s")):
            with pytest.raises(StoreError, match="another writer") as caught:
                opening()
            assert f"process {os.getpid()} on {os.uname().nodename}" in caught.value.got
    open_writer(room / "s", SPEC).close()


def test_a_failed_opening_gives_the_lock_back(room):
    (room / "spec.json").write_text("{")
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            open_writer(room, SPEC)


def test_a_killed_holder_is_replaced_at_once(room):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(room)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match=f"process {holder.pid} "):
        take_lock(room)
    os.kill(holder.pid, signal.SIGSTOP)  # stopped is not dead, however old its heartbeat
    os.utime(room / LOCK, (0, 0))
    with pytest.raises(StoreError, match=f"process {holder.pid} "):
        take_lock(room)
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with take_lock(room) as lock:
        assert time.monotonic() - start < 0.5
        assert lock.recovered.pid == holder.pid
    holder.stdout.close()


def test_twenty_at_once_have_one_winner(room):
    run = subprocess.run([sys.executable, "-c", RACE, str(room), str(room / "gate")], capture_output=True, text=True)
    *lines, last = run.stdout.splitlines()
    assert last == "recovered", run.stderr
    assert len(lines) == 20
    winners = [line.split()[0] for line in lines if line.endswith(" won")]
    assert len(winners) == 1
    for line in lines:
        if not line.endswith(" won"):
            assert float(line.split()[2]) <= 2
            assert f"process {winners[0]} " in line or "not yet written" in line


def test_a_reused_process_number_fools_nobody(room):
    note(room, process_start=me().process_start + 1)
    with take_lock(room) as lock:
        assert not lock.recovered.alive
        assert lock.recovered.here
    assert me().alive


def test_another_machine_is_trusted_until_its_heart_stops(room):
    note(room, boot="of another kernel", host="elsewhere")
    with pytest.raises(StoreError, match="elsewhere") as caught:
        take_lock(room)
    assert f"{STALE_SECONDS:.0f} s" in caught.value.do
    age = (room / LOCK).stat().st_mtime
    with pytest.raises(StoreError):
        take_lock(room)
    assert (room / LOCK).stat().st_mtime == age, "asking must not keep the dead alive"
    old = time.time() - STALE_SECONDS - 1
    os.utime(room / LOCK, (old, old))
    with take_lock(room) as lock:
        assert lock.recovered.host == "elsewhere"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\x00\xff" * 100])
def test_a_broken_note_hinders_nobody(room, text):
    (room / LOCK).write_text(text)
    take_lock(room).release()
    assert (room / LOCK).read_text() == ""


def test_heartbeat(room):
    with take_lock(room) as lock:
        os.utime(room / LOCK, (0, 0))
        lock.beat()
        assert time.time() - (room / LOCK).stat().st_mtime < 5
    lock.beat()
    lock.release()


def test_a_forked_child_does_not_keep_the_lock(room):
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom gradsift.store.lock import take_lock\n"
        "lock = take_lock(Path(sys.argv[1]))\npid = os.fork()\n"
        "if pid == 0: os.close(1); time.sleep(30); os._exit(0)\n"
        "print(pid, flush=True); os.kill(os.getpid(), 9)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(room)], stdout=subprocess.PIPE, text=True)
    child = int(run.stdout)
    try:
        assert process_start(child)
        take_lock(room).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_process_start_survives_odd_names():
    assert process_start(os.getpid()) > 0
    assert process_start(2**22 + 1) == 0
