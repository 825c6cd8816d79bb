"""A disk that fails: full, over quota, broken; by injected errors everywhere and by a real small disk where allowed."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from store_world import SPEC, fill, make_ids, make_spec, measure, read, snapshot, truth

from gradsift.errors import DiskFullError, StoreError
from gradsift.store.signals import open_store
from gradsift.store.spec import Projection
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer

IDS = make_ids(12)
CALLS = ("open", "write", "fsync", "replace")


class Failing:
    """Let the n-th call of one system function fail, and count what is asked afterwards."""

    def __init__(self, patch: pytest.MonkeyPatch, call: str, at: int, code: int) -> None:
        self.real, self.at, self.code, self.count, self.synced_after = getattr(os, call), at, code, 0, []
        patch.setattr(os, call, self)

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))
        if self.count - 1 > self.at:
            self.synced_after.append(args)
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_failing_call_is_a_typed_error_and_the_same_command_finishes(room, monkeypatch, call, code):
    at = failures = 0
    while True:
        folder = room / f"{call}-{at}"
        with monkeypatch.context() as patch:
            failing = Failing(patch, call, at, code)
            acknowledged = []
            try:
                fill(folder, IDS, 5, committed=lambda result, a=acknowledged: a.extend(result.ids))
            except StoreError as error:
                failures += 1
                assert isinstance(error, DiskFullError) == (code == errno.ENOSPC), error
                assert str(room) in error.where
                if call == "fsync":
                    assert not failing.synced_after, "nothing may be flushed after a failed flush"
            else:
                break
        if (folder / "spec.json").exists():
            store = open_store(folder)
            assert set(acknowledged) <= set(store.ids)
            assert snapshot(store).items() <= truth(IDS).items()
            assert verify_store(folder).ok
        fill(folder, IDS, 5)
        assert read(folder) == truth(IDS)
        assert not list(folder.rglob("*.tmp"))
        at += 1
    assert failures == at >= 8


def test_a_writer_whose_commit_failed_commits_no_more(room, monkeypatch):
    with open_writer(room / "s", SPEC) as writer:
        writer.commit(measure(IDS[:3]))
        with monkeypatch.context() as patch:
            Failing(patch, "fsync", 1, errno.EIO)
            with pytest.raises(StoreError, match="refused a write"):
                writer.commit(measure(IDS[3:6]))
        with pytest.raises(StoreError, match="did not finish"):
            writer.commit(measure(IDS[6:9]))
    assert set(open_store(room / "s").ids) == set(IDS[:3])


def test_an_interrupt_in_the_middle_of_a_commit_is_no_commit(room, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with open_writer(room / "s", SPEC) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                writer.commit(measure(IDS[:3]))
        with pytest.raises(StoreError, match="did not finish"):
            writer.commit(measure(IDS[:3]))
    assert open_store(room / "s").size == 0
    fill(room / "s", IDS, 5)
    assert read(room / "s") == truth(IDS)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real disk of 2 MiB, or a skip that says why not."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small disk is barred here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("left_kib", [0, 4, 24, 150, 400, 900])
def test_a_disk_that_fills_up(small_disk, left_kib):
    spec, ids = make_spec(projection=Projection(4093, 42, "signfold-1")), make_ids(200)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (2048 - left_kib) * 1024)
    folder, acknowledged = small_disk / "store", []
    with pytest.raises(DiskFullError) as caught:
        fill(folder, ids, 20, spec=spec, committed=lambda result: acknowledged.extend(result.ids))
    assert caught.value.exit_code == 28
    assert str(folder) in caught.value.where
    assert "bytes" in caught.value.expected
    assert (len(acknowledged) > 0) == (left_kib > 200)
    if (folder / "spec.json").exists():
        assert verify_store(folder).ok
        assert set(acknowledged) <= set(open_store(folder, spec).ids)
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    measured = []
    fill(folder, ids, 20, spec=spec, measured=lambda result: measured.extend(result.ids))
    assert not set(measured) & set(acknowledged)
    assert read(folder, spec) == truth(ids, dim=4093)


def test_a_read_only_folder_can_be_read(small_disk):
    fill(small_disk / "s", IDS, 5)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert read(small_disk / "s") == truth(IDS)
    assert verify_store(small_disk / "s").ok
    with pytest.raises(StoreError, match="Read-only"):
        open_writer(small_disk / "s", SPEC)


class Durability:
    """Watch the order of system calls and judge, at any moment, what a power loss could leave.

    A file's bytes are safe once it was fsynced; its name is safe once its folder was fsynced after the rename. A name
    that is not yet safe may or may not survive, so a commit record may only appear under its name when everything it
    vouches for is already safe.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: dict[int, str] = {}
        self.synced: set[str] = set()
        self.pending: set[str] = set()
        self.safe: set[str] = set()
        self.faults: list[str] = []
        real_open, real_sync, real_replace = os.open, os.fsync, os.replace

        def watch_open(path, *args, **kwargs):
            handle = real_open(path, *args, **kwargs)
            self.names[handle] = str(path)
            return handle

        def watch_sync(handle):
            name = self.names[handle]
            self.synced.add(name)
            self.safe |= {path for path in self.pending if str(Path(path).parent) == name}
            return real_sync(handle)

        def watch_replace(source, target):
            if str(source) not in self.synced:
                self.faults.append(f"{Path(target).suffix} renamed before its bytes were flushed")
            if Path(target).parent.name == "ledger":
                unit = Path(target).stem
                for kind in ("rows.parquet", "sketch.npy"):
                    if str(Path(target).parents[1] / "shards" / f"{unit}-{kind}") not in self.safe:
                        self.faults.append(f"the record appeared before {kind} was safe")
            self.pending.add(str(target))
            return real_replace(source, target)

        patch.setattr(os, "open", watch_open)
        patch.setattr(os, "fsync", watch_sync)
        patch.setattr(os, "replace", watch_replace)

    def committed(self, folder: Path, unit: str) -> None:
        if str(folder / "ledger" / f"{unit}.json") not in self.safe:
            self.faults.append("commit returned before the record was safe")


def watched_commits(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    watch = Durability(patch)
    with open_writer(folder, SPEC) as writer:
        for start in (0, 5):
            watch.committed(folder, writer.commit(measure(IDS[start : start + 5])).unit)
    return watch.faults


def test_what_a_power_loss_could_leave_is_always_whole(room, monkeypatch):
    assert watched_commits(room / "s", monkeypatch) == []


@pytest.mark.parametrize(
    ("mutant", "fault"),
    [
        ("no fsync of files", "bytes were flushed"),
        ("no fsync of the shard folder", "the record appeared before"),
        ("no fsync of the ledger folder", "commit returned before"),
        ("record before shard", "the record appeared before"),
    ],
)
def test_the_watch_sees_each_missing_step(room, monkeypatch, mutant, fault):
    from gradsift import manifest
    from gradsift.store import writer

    if mutant == "no fsync of files":
        sync = os.fsync
        real_write = manifest.write_file

        def unsynced(path, data):
            with monkeypatch.context() as inner:
                inner.setattr(os, "fsync", lambda handle: sync(handle))
                real_write(path, data)

        monkeypatch.setattr(writer, "write_file", unsynced)
    elif mutant == "no fsync of the shard folder":
        monkeypatch.setattr(writer, "fsync_folder", lambda folder: None)
    elif mutant == "no fsync of the ledger folder":
        monkeypatch.setattr(manifest, "fsync_folder", lambda folder: None)
    else:
        late = []
        monkeypatch.setattr(writer, "write_file", lambda path, data: late.append((path, data)))
    assert any(fault in found for found in watched_commits(room / "s", monkeypatch))
