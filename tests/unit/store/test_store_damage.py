from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from store_world import SPEC, files_of, fill, make_ids, read, truth

from gradsift.errors import StoreError
from gradsift.store.ledger import encode_record, read_ledger
from gradsift.store.signals import open_store
from gradsift.store.verify import repair_store, verify_store
from gradsift.store.writer import open_writer

IDS = make_ids(20)


def read_everything(folder: Path) -> dict:
    store = open_store(folder, SPEC)
    store.positions(IDS)  # a shard whose record is damaged does not exist: its rows are missed by name
    return read(folder)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(bytes(data))


def test_every_flipped_bit_is_found_and_never_read(filled):
    good = truth(IDS)
    assert read_everything(filled) == good
    report = verify_store(filled)
    assert report.ok
    assert (report.num_shards, report.num_rows, sum(report.status.values())) == (3, 20, 20)
    random = np.random.default_rng(7)
    files = files_of(filled)
    for trial in range(60):
        path = files[trial % len(files)]  # every file gets its share, however small it is
        at = int(random.integers(path.stat().st_size * 8))
        flip(path, at)
        found = verify_store(filled) if path.name != "spec.json" or b'"format": 1,' in path.read_bytes() else None
        assert found is None or not found.ok, f"{path.name} bit {at}"
        if found is not None:
            assert path.relative_to(filled).as_posix() in {d.path for d in found.damage}
        with pytest.raises(StoreError):
            read_everything(filled)
        flip(path, at)
    assert read_everything(filled) == good


@pytest.mark.parametrize("what", ["rows", "sketch", "record"])
def test_repair_requeues_only_the_damaged_shard(filled, what):
    victim = sorted((filled / "ledger").iterdir())[1].stem
    path = {
        "rows": filled / "shards" / f"{victim}-rows.parquet",
        "sketch": filled / "shards" / f"{victim}-sketch.npy",
        "record": filled / "ledger" / f"{victim}.json",
    }[what]
    num_rows = next(r.num_rows for r in read_ledger(filled, SPEC.key).records if r.unit == victim)
    flip(path, 801)
    report = repair_store(filled)
    assert report.units == (victim,)
    assert len(report.moved) == 3
    assert report.num_rows == (num_rows if what != "record" else 0), "a broken record tells nothing"
    assert len(list((filled / "quarantine").iterdir())) == 3
    assert verify_store(filled).ok
    measured = []
    fill(filled, IDS, 100, measured=lambda result: measured.extend(result.ids))
    assert len(measured) == num_rows
    assert read_everything(filled) == truth(IDS)
    assert repair_store(filled).moved == ()


def test_the_remedy_in_the_message_works(filled):
    victim = sorted((filled / "shards").glob("*-sketch.npy"))[0]
    flip(victim, 2000)
    with pytest.raises(StoreError) as caught:
        read_everything(filled)
    message = str(caught.value)
    assert victim.name in message
    assert "sha256" in message
    named = [
        word.strip("(),") for word in caught.value.do.split() if word.strip("(),").startswith(("shards", "ledger"))
    ]
    assert len(named) == 3
    for name in named:
        (filled / name).unlink()
    fill(filled, IDS, 100)
    assert read_everything(filled) == truth(IDS)


@pytest.mark.parametrize("kind", ["truncated", "zero", "missing", "swapped", "renamed"])
@pytest.mark.parametrize("which", ["rows", "sketch", "record"])
def test_wrong_files(filled, room, kind, which):
    a, b, _ = (p.stem for p in sorted((filled / "ledger").iterdir()))
    name = {"rows": "shards/{}-rows.parquet", "sketch": "shards/{}-sketch.npy", "record": "ledger/{}.json"}[which]
    path, other = filled / name.format(a), filled / name.format(b)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "zero":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    elif kind == "swapped":
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    else:
        path.rename(path.with_name("something-else" + path.suffix))
    report = verify_store(filled)
    # A missing record is no damage: its shard was never committed; its files are extras.
    assert report.ok == (which == "record" and kind == "missing")
    extras = 2 if which == "record" and kind != "swapped" else 0  # the files of a shard that has no record
    if kind == "renamed" and which != "record":
        extras = 1
    if which == "record" and kind == "swapped":
        extras = 4
    assert len(report.extras) == extras
    with pytest.raises(StoreError):
        read_everything(filled)
    repair_store(filled)
    fill(filled, IDS, 100)
    assert read_everything(filled) == truth(IDS)


def test_a_shard_of_another_store_is_not_read(filled, room):
    fill(room / "other", make_ids(30)[20:], 10, spec=SPEC.__class__(**{**SPEC.__dict__, "max_length": 9}))
    for path in files_of(room / "other")[:-1]:
        shutil.copy(path, filled / path.parent.name / path.name)
    assert read_everything(filled) == truth(IDS)
    assert {d.kind for d in verify_store(filled).damage} == {"record"}


def test_a_record_cut_at_any_byte_is_no_record(filled):
    last = sorted((filled / "ledger").iterdir())[-1]
    whole = last.read_bytes()
    rest = {r.unit for r in read_ledger(filled, SPEC.key).records} - {last.stem}
    good = truth(IDS)
    for cut in range(len(whole)):
        last.write_bytes(whole[:cut])
        ledger = read_ledger(filled, SPEC.key)
        assert {r.unit for r in ledger.records} == rest
        assert ledger.damaged == (last.name,)
        if cut % 40 == 0:
            rows = read(filled)
            assert 0 < len(rows) < len(good)
            assert rows.items() <= good.items()
    with open_writer(filled, SPEC) as writer:
        assert writer.cleaned.damaged_records == 1
        assert writer.cleaned.unrecorded == 2
    fill(filled, IDS, 8)
    assert read_everything(filled) == good


def test_shards_without_a_record_are_invisible_and_removed(filled):
    gone = sorted((filled / "ledger").iterdir())[0]
    gone.unlink()
    (filled / "shards" / "x.npy.ab12.tmp").write_bytes(b"half")
    (filled / "ledger" / "y.json.ab12.tmp").write_bytes(b"half")
    (filled / "noise.json.cd.tmp").write_bytes(b"of another stage")
    store = open_store(filled, SPEC)
    missing = [name for name in IDS if name not in store.ids]
    assert missing
    for ask in (store.unit_sketch, store.gather, store.take, store.positions):
        with pytest.raises(StoreError, match=missing[0]):
            ask([missing[0]])
    assert len(verify_store(filled).extras) == 4
    with open_writer(filled, SPEC) as writer:
        assert (writer.cleaned.temporary, writer.cleaned.unrecorded) == (2, 2)
        assert set(writer.committed_ids()) == set(store.ids)
    assert (filled / "noise.json.cd.tmp").exists()
    assert verify_store(filled).extras == ()


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("kind", ["rows.parquet", "sketch.npy"])
def test_a_writer_does_not_build_on_a_damaged_shard(filled, how, kind):
    victim = sorted((filled / "shards").glob(f"*-{kind}"))[0]
    size = victim.stat().st_size
    victim.unlink() if how == "missing" else os.truncate(victim, size - 1)
    for opening in (lambda: open_writer(filled, SPEC), lambda: read_everything(filled)):
        with pytest.raises(StoreError, match=victim.name) as caught:
            opening()
        assert caught.value.expected == f"{size} bytes"
        assert caught.value.got == ("no such file" if how == "missing" else f"{size - 1} bytes")


def test_a_record_that_names_other_rows_is_refused(filled):
    """Sealed and hashed correctly, as only a defect of ours could write it."""
    a, b, _ = read_ledger(filled, SPEC.key).records
    for kind in ("rows.parquet", "sketch.npy"):
        shutil.copy(filled / "shards" / f"{b.unit}-{kind}", filled / "shards" / f"{a.unit}-{kind}")
    files = {name.replace(b.unit, a.unit): mark for name, mark in b.files.items()}
    lie = dataclasses.replace(b, unit=a.unit, files=files)
    (filled / "ledger" / f"{a.unit}.json").write_bytes(encode_record(lie))
    with pytest.raises(StoreError, match="other rows"):
        open_store(filled)
    assert [d.unit for d in verify_store(filled).damage] == [a.unit]
    counted = dataclasses.replace(b, status={"OK": b.num_rows})
    (filled / "ledger" / f"{a.unit}.json").unlink()
    (filled / "ledger" / f"{b.unit}.json").write_bytes(encode_record(counted))
    assert [d.kind for d in verify_store(filled).damage] == ["rows"]


def test_verify_without_a_store(room):
    with pytest.raises(StoreError, match="no signal store"):
        verify_store(room)


def test_two_shards_with_the_same_row_are_refused(filled, room):
    fill(room / "other", IDS[:3], 3)
    for path in files_of(room / "other")[:-1]:
        shutil.copy(path, filled / path.parent.name / path.name)
    for opening in (lambda: open_store(filled), lambda: open_writer(filled, SPEC)):
        with pytest.raises(StoreError, match="committed twice"):
            opening()
    assert [d.kind for d in verify_store(filled).damage] == ["rows"]
