"""Embeddings in the store: kept bit for bit, checked like every other byte, absent where they were not measured."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from store_world import EMBEDDING_SPEC, SPEC, WIDTH, embeddings, files_of, fill, make_ids, measure, read, truth

from gradsift.errors import NumericsError, SpecError, StoreError
from gradsift.store.shards import encode_shard
from gradsift.store.signals import open_store
from gradsift.store.spec import compare
from gradsift.store.verify import repair_store, verify_store
from gradsift.store.writer import open_writer

IDS = make_ids(20)


@pytest.fixture
def pooled(room):
    """A store of 20 rows in three shards, with embeddings."""
    fill(room / "store", IDS, 8, spec=EMBEDDING_SPEC)
    return room / "store"


def test_embeddings_read_back_bit_for_bit_in_any_order(pooled):
    assert read(pooled, EMBEDDING_SPEC) == truth(IDS, embedding=True)
    store = open_store(pooled)
    usable = [name for name, status in zip(store.ids, store.status, strict=True) if status.usable]
    turned = usable[::-1]
    assert store.embedding(turned).dtype == np.float32
    assert np.array_equal(store.embedding(turned), embeddings(turned))
    assert np.array_equal(store.take(turned[:5]).embedding(turned[3:5]), embeddings(turned[3:5]))
    assert store.embedding([]).shape == (0, 0)


def test_a_row_that_is_not_usable_has_no_embedding(pooled):
    store = open_store(pooled)
    bad = next(name for name, status in zip(store.ids, store.status, strict=True) if not status.usable)
    with pytest.raises(StoreError, match="no embedding") as caught:
        store.embedding([bad])
    assert bad in str(caught.value)
    arrays = [np.load(path) for path in (pooled / "shards").glob("*-embedding.npy")]
    assert sum(int(np.isnan(a).all(axis=1).sum()) for a in arrays) == sum(not s.usable for s in store.status)


def test_a_store_without_them_says_so_and_cannot_be_mixed(filled):
    with pytest.raises(StoreError, match="no embeddings were measured"):
        open_store(filled).embedding(IDS[:1])
    for opening in (lambda: open_writer(filled, EMBEDDING_SPEC), lambda: compare(SPEC, EMBEDDING_SPEC)):
        with pytest.raises(SpecError, match="signals") as caught:
            opening()
        assert "embedding" in caught.value.got
        assert "embedding" not in caught.value.expected


def test_a_result_holds_embeddings_exactly_when_the_spec_names_them():
    for spec, given in ((SPEC, True), (EMBEDDING_SPEC, False)):
        with pytest.raises(ValueError, match="embeddings"):
            encode_shard(measure(IDS, embedding=given), spec)


def test_a_usable_row_with_an_embedding_that_is_not_finite_is_refused_by_name():
    good = measure(IDS, embedding=True)
    row = int(np.flatnonzero(good.usable)[2])
    broken = good.embedding.copy()
    broken[row, 1] = np.inf
    with pytest.raises(NumericsError, match="embedding") as caught:
        encode_shard(dataclasses.replace(good, embedding=broken), EMBEDDING_SPEC)
    assert IDS[row] in str(caught.value)


def test_every_flipped_bit_is_found_and_never_read(pooled):
    good, random = read(pooled, EMBEDDING_SPEC), np.random.default_rng(3)
    files = [path for path in files_of(pooled) if path.name.endswith("-embedding.npy")]
    assert len(files) == 3
    for trial in range(24):
        path = files[trial % 3]
        data = path.read_bytes()
        at = int(random.integers(8 * len(data)))
        path.write_bytes(data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :])
        assert {d.path for d in verify_store(pooled).damage} == {f"shards/{path.name}"}
        with pytest.raises(StoreError):
            read(pooled, EMBEDDING_SPEC)
        path.write_bytes(data)
    assert read(pooled, EMBEDDING_SPEC) == good


@pytest.mark.parametrize("harm", ["gone", "cut", "swapped"])
def test_repair_sets_the_shard_aside_and_the_next_run_measures_it_again(pooled, harm):
    path, other = sorted((pooled / "shards").glob("*-embedding.npy"))[:2]
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        shutil.copy(other, path)
    report = repair_store(pooled)
    assert report.units == (path.name.removesuffix("-embedding.npy"),)
    assert verify_store(pooled).ok
    assert verify_store(pooled).extras == ()
    fill(pooled, IDS, 8, spec=EMBEDDING_SPEC)
    assert read(pooled, EMBEDDING_SPEC) == truth(IDS, embedding=True)


def test_the_width_is_the_model_s():
    assert measure(IDS, embedding=True).take(np.array([3, 1])).embedding.shape == (2, WIDTH)
