"""Sketches that stay on the disk: the numbers of gather, in any order, from bytes that were checked and never mapped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_world import DIM, fill, make_ids, make_spec, memory_folder

from gradsift.errors import StoreError
from gradsift.geometry.rows import part_of, row_sum
from gradsift.store.signals import open_store
from gradsift.store.sketches import stored_sketches
from gradsift.types import StoredRows

IDS = make_ids(60)


@pytest.fixture(scope="module")
def store():
    """An open store of 60 rows in shards of 16, some of them not usable."""
    with memory_folder() as folder:
        fill(folder / "store", IDS, 16)
        yield open_store(folder / "store")


def usable(store):
    return np.array([i for i, status in enumerate(store.status) if status.usable])


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_rows_are_those_of_gather_bit_for_bit_whatever_is_asked(store, data):
    at = usable(store)
    picked = data.draw(st.lists(st.sampled_from(at.tolist()), min_size=0, max_size=80))
    found = stored_sketches(store, np.array(picked, dtype=np.int64))
    whole = store.gather([store.ids[i] for i in picked])
    assert (found.shape, len(found), found.dtype) == ((len(picked), DIM), len(picked), np.float32)
    asked = data.draw(
        st.one_of(
            st.builds(slice, st.integers(0, 80), st.integers(0, 80)),
            st.lists(st.integers(0, max(0, len(picked) - 1)), max_size=20 if picked else 0).map(
                lambda rows: np.array(rows, dtype=np.int64)
            ),
            st.lists(st.booleans(), min_size=len(picked), max_size=len(picked)).map(
                lambda mask: np.array(mask, dtype=bool)
            ),
        )
    )
    assert np.array_equal(found[asked], whole[asked])


def test_the_first_look_and_later_ones_give_the_same_and_one_row_is_read_alone():
    with memory_folder() as folder:
        fill(folder / "store", IDS, 16)
        fresh = open_store(folder / "store")
        at = usable(fresh)
        found = stored_sketches(fresh, at)
        whole = fresh.gather([fresh.ids[i] for i in at])
        for _ in range(2):
            for k in (0, 5, len(at) - 1):
                assert np.array_equal(found[np.array([k])], whole[[k]])
            assert np.array_equal(found[::-1], whole[::-1])


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_blocks_give_every_row_once_and_sums_agree_with_an_array(store, size):
    at = usable(store)[::-1]
    found, whole = stored_sketches(store, at), store.gather([store.ids[i] for i in at])
    seen = []
    for rows, block in found.blocks(size):
        assert len(rows) <= size
        assert np.array_equal(block, whole[rows])
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(at)))
    weights = np.linspace(0.5, 2, len(at))
    np.testing.assert_allclose(row_sum(found), whole.sum(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(row_sum(found, weights), row_sum(whole, weights), rtol=1e-10, atol=1e-9)
    some = np.array([3, 1, 2, 3])
    assert isinstance(part_of(found, some), StoredRows)
    assert np.array_equal(part_of(found, some)[:], part_of(whole, some))
    assert not isinstance(whole, StoredRows)


def test_a_row_without_a_gradient_and_a_store_without_sketches_are_refused(store):
    bad = next(i for i, status in enumerate(store.status) if not status.usable)
    with pytest.raises(StoreError, match=f"row {store.ids[bad]}"):
        stored_sketches(store, np.array([0, bad]))
    with memory_folder() as folder:
        spec = make_spec(signals=("loss",), projection=None, anchors={})
        plain = folder / "plain"
        fill_plain(plain, spec)
        with pytest.raises(StoreError, match="no sketches"):
            stored_sketches(open_store(plain), np.zeros(0, dtype=np.int64))
    with pytest.raises(TypeError, match="slice or an array"):
        stored_sketches(store, usable(store))[3]


def fill_plain(folder, spec):
    from gradsift.store.writer import open_writer

    with open_writer(folder, spec):
        pass


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_changed_bytes_are_refused_before_a_number_is_used(damage):
    with memory_folder() as folder:
        fill(folder / "store", IDS, 16)
        fresh = open_store(folder / "store")
        path = sorted((folder / "store" / "shards").glob("*-sketch.npy"))[0]
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-5])
        with pytest.raises(StoreError, match=path.name):
            stored_sketches(fresh, usable(fresh))[:]
