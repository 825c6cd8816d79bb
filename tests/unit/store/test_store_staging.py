"""Staged shards: adopted only whole, only once, only where their rows are wanted; and a test that would see it otherwise."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.store.store_world import SPEC, content, make_ids, make_spec, measure, memory_folder, read, truth

import gradsift.store.staging as staging
from gradsift.errors import StoreError
from gradsift.manifest import seal, unseal
from gradsift.store.staging import STAGING, Adopted, adopt_staged, is_staged, stage
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer

IDS = make_ids(24)
WANTED = {name: content(name) for name in IDS}
UNITS = [IDS[s : s + 4] for s in range(0, 24, 4)]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(bytes(data))


def staged_files(folder: Path) -> list[Path]:
    return sorted(path for part in ("shards", "ledger") for path in (folder / STAGING / part).iterdir())


def adopt(folder: Path, wanted: dict[str, str] = WANTED, **options) -> Adopted:
    with open_writer(folder, SPEC) as writer:
        return adopt_staged(writer, wanted, **options)


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=4))
@settings(max_examples=20, deadline=None)
def test_whoever_measures_in_whatever_order_the_store_is_the_same(order, twice):
    """Slow twin: the store as one process commits it. Some units are staged twice, some after they were committed."""
    with memory_folder() as folder:
        names = [stage(folder, SPEC, measure(UNITS[i]), {"rank": str(i)}) for i in order[:4]]
        with open_writer(folder, SPEC) as writer:
            got = adopt_staged(writer, WANTED, {name: place for place, name in enumerate(names)})
            assert got == Adopted(tuple(names), 16)
            for i in order[4:]:
                writer.commit(measure(UNITS[i]))
            for i in set(twice):
                stage(folder, SPEC, measure(UNITS[i]), {})
            again = adopt_staged(writer, WANTED)
            assert (again.units, len(again.repeated), dict(again.refused)) == ((), len(set(twice)), {})
        assert read(folder) == truth(IDS)
        assert verify_store(folder).ok
        assert staged_files(folder) == []


def check_damage_is_refused(file: int, at: int) -> None:
    with memory_folder() as folder:
        good = stage(folder, SPEC, measure(UNITS[0]), {})
        bad = stage(folder, SPEC, measure(UNITS[1]), {})
        mine = [path for path in staged_files(folder) if path.name.startswith(bad)]
        assert len(mine) == 3
        flip(mine[file], at)
        got = adopt(folder)
        assert got.units == (good,)
        assert set(got.refused) == {bad}
        assert read(folder) == truth(UNITS[0])
        assert staged_files(folder) == []
        assert len(list((folder / "quarantine").iterdir())) == 3
        stage(folder, SPEC, measure(UNITS[1]), {})  # measured again
        assert adopt(folder).units == (bad,)
        assert read(folder) == truth(IDS[:8])


@given(st.integers(0, 2), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_is_refused_and_the_unit_can_be_measured_again(file, at):
    check_damage_is_refused(file, at)


def test_adopting_without_verification_would_be_seen(monkeypatch):
    """The planted defect: bytes of the sketch are believed."""
    monkeypatch.setattr(staging, "check_shard", lambda *_: ())
    with pytest.raises((AssertionError, StoreError)):
        check_damage_is_refused(2, 999)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file_is_refused(tmp_path, missing):
    unit = stage(tmp_path, SPEC, measure(UNITS[0]), {})
    sorted((tmp_path / STAGING / "shards").iterdir())[missing].unlink()
    got = adopt(tmp_path)
    assert (got.units, set(got.refused)) == ((), {unit})


def test_rows_that_are_not_wanted_now_are_refused(tmp_path):
    changed = stage(tmp_path, SPEC, measure(UNITS[0], edition=1), {})
    gone = stage(tmp_path, SPEC, measure(make_ids(30)[26:28]), {})
    got = adopt(tmp_path)
    assert got.units == ()
    assert got.refused == {
        changed: f"row {UNITS[0][0]} is not in the pool or has other content",
        gone: "row row-00026 is not in the pool or has other content",
    }


def test_a_shard_cut_otherwise_does_not_double_rows(tmp_path):
    with open_writer(tmp_path, SPEC) as writer:
        writer.commit(measure(IDS[:6]))
        unit = stage(tmp_path, SPEC, measure(UNITS[1]), {})
        got = adopt_staged(writer, WANTED)
    assert dict(got.refused) == {unit: "2 of its 4 rows are committed in another shard"}
    assert read(tmp_path) == truth(IDS[:6])


def test_a_shard_of_another_spec_is_refused(tmp_path):
    unit = stage(tmp_path, make_spec(model_sha256="x" * 64), measure(UNITS[0]), {})
    assert set(adopt(tmp_path).refused) == {unit}


def test_a_record_that_lies_about_its_statuses_is_refused(tmp_path):
    unit = stage(tmp_path, SPEC, measure(UNITS[0]), {})
    path = tmp_path / STAGING / "ledger" / f"{unit}.json"
    value = unseal(path.read_bytes())
    path.write_bytes(seal({**value, "status": {"OK": 4}}))
    assert set(adopt(tmp_path).refused) == {unit}


def test_leftovers_of_a_kill_are_removed_at_opening_only(tmp_path):
    unit = stage(tmp_path, SPEC, measure(UNITS[0]), {})
    (tmp_path / STAGING / "ledger" / f"{unit}.json").unlink()
    half = tmp_path / STAGING / "shards" / "abc-rows.parquet.123.tmp"
    half.write_bytes(b"half")
    assert adopt(tmp_path) == Adopted()
    assert len(staged_files(tmp_path)) == 3, "a worker may be at it"
    assert adopt(tmp_path, opening=True) == Adopted()
    assert staged_files(tmp_path) == []


@pytest.mark.parametrize("call", ["link", "fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2])
def test_an_adoption_that_breaks_off_keeps_the_staged_shard(tmp_path, monkeypatch, call, nth):
    """The disk fails in the middle; the next writer finds the shard staged, or committed, and never lost."""
    stage(tmp_path, SPEC, measure(UNITS[0]), {})
    real, count = getattr(os, call), [0]

    def failing(*arguments, **options):
        count[0] += 1
        if count[0] == nth:
            raise OSError(errno.EIO, "planted")
        return real(*arguments, **options)

    with open_writer(tmp_path, SPEC) as writer, monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        if call == "replace" and nth == 2:
            adopt_staged(writer, WANTED)  # one record, one rename
        else:
            with pytest.raises(StoreError):
                adopt_staged(writer, WANTED)
            with pytest.raises(StoreError, match="did not finish"):
                writer.commit(measure(UNITS[1]))
    adopt(tmp_path, opening=True)
    assert read(tmp_path) == truth(UNITS[0])


def test_where_there_are_no_hard_links_the_bytes_are_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    unit = stage(tmp_path, SPEC, measure(UNITS[0]), {})
    assert adopt(tmp_path).units == (unit,)
    assert read(tmp_path) == truth(UNITS[0])


def test_the_staged_name_is_the_shards_and_its_record_comes_last(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(staging, "write_bytes_atomic", lambda path, data: seen.extend(staged_files(tmp_path)))
    result = measure(UNITS[0])
    assert stage(tmp_path, SPEC, result, {}) == result.unit
    assert {path.name for path in seen} == {f"{result.unit}-rows.parquet", f"{result.unit}-sketch.npy"}
    assert not is_staged(tmp_path, result.unit)


def test_numbers_that_are_not_finite_are_refused_by_the_worker(tmp_path):
    result = measure(UNITS[0])
    loss = np.where(result.usable, np.inf, result.loss)
    with pytest.raises(Exception, match="not a finite number"):
        stage(tmp_path, SPEC, dataclasses.replace(result, loss=loss), {})
    assert not (tmp_path / STAGING).exists()


class Dead(BaseException):
    """The process was killed: this call and every later one does nothing."""


CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "link")


def dying(patch: pytest.MonkeyPatch, point: int) -> list[int]:
    """Let the ``point``-th system call and all after it be the end; returns the count of calls."""
    count = [0]

    def wrap(real):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] > point:
                raise Dead
            return real(*arguments, **options)

        return call

    for name in CALLS:
        patch.setattr(os, name, wrap(getattr(os, name)))
    return count


def sweep(act, folder_before):
    """Kill ``act`` at every system call that it makes, one after the other, each time in a new folder; gives the folders."""
    point = 0
    while True:
        with memory_folder() as folder:
            folder_before(folder)
            with pytest.MonkeyPatch.context() as patch:
                dying(patch, point)
                try:
                    act(folder)
                    finished = True
                except Dead:
                    finished = False
            yield folder
        if finished:
            return
        point += 1


def test_a_kill_at_every_call_of_an_adoption_costs_nothing():
    """Three staged units, one of them damaged; whatever the moment, the next run has both sound ones without measuring."""

    def before(folder: Path) -> None:
        for rows in UNITS[:3]:
            bad = stage(folder, SPEC, measure(rows), {})
        flip(folder / STAGING / "shards" / f"{bad}-sketch.npy", 999)

    points = 0
    for folder in sweep(lambda folder: adopt(folder, opening=True), before):
        adopt(folder, opening=True)
        assert read(folder) == truth(IDS[:8])
        assert verify_store(folder).ok
        assert staged_files(folder) == []
        points += 1
    assert points > 40, "an adoption is many calls that can be interrupted"


def test_a_kill_at_every_call_of_a_staging_costs_that_unit_at_most():
    points = kept = 0
    first, second = UNITS[:2]
    for folder in sweep(
        lambda folder: stage(folder, SPEC, measure(second), {}), lambda folder: stage(folder, SPEC, measure(first), {})
    ):
        got = adopt(folder, opening=True)
        assert read(folder) in (truth(first), truth(IDS[:8]))
        assert not got.refused
        assert staged_files(folder) == []
        kept += len(got.units) - 1
        points += 1
    assert points > 10
    assert 1 <= kept < points
