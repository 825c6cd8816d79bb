"""The index of committed rows against a dictionary, also where every hash collides."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_world import SPEC, content, fill, make_ids, measure

from gradsift.errors import StoreError
from gradsift.store import index
from gradsift.store.index import RowIndex
from gradsift.store.writer import open_writer


def split(names: list[str], cuts: list[int]) -> list[dict[str, str]]:
    """Rows with their contents, in shards."""
    at = [0, *sorted({cut % (len(names) + 1) for cut in cuts}), len(names)]
    return [{name: f"content of {name}" for name in names[a:b]} for a, b in pairwise(at) if a < b]


@given(
    st.lists(st.text(max_size=4), unique=True, max_size=40), st.lists(st.integers(0, 99), max_size=12),
    st.integers(0, 12), st.sampled_from(["hash", "few", "one"]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_it_is_a_dictionary_whatever_the_hash(names, cuts, opened, kind):
    """Slow twin: the union of the tables. With few hashes, or one, every look-up must be settled by the tables."""
    plain = index._keys
    mask = {"hash": ~np.uint64(0), "few": np.uint64(3 << 24), "one": np.uint64(0)}[kind]
    shards = split(names, cuts)
    want = {name: text for shard in shards for name, text in shard.items()}
    with patch.object(index, "_keys", lambda ids: plain(ids) & mask):
        rows = RowIndex(shards.__getitem__)
        assert rows.fill(list(shard) for shard in shards[:opened]) is None
        for shard in shards[opened:]:
            rows.add(list(shard))
        assert dict(rows) == want
        assert len(rows) == len(want)
        asked = [*names[::-1], "\x00 no such row", *names[:3]]
        assert rows.find(asked) == [want.get(name) for name in asked]
        assert rows.find([]) == []
        assert "\x00 no such row" not in rows
        with pytest.raises(KeyError):
            rows["\x00 no such row"]


@pytest.mark.parametrize("mask", [~np.uint64(0), np.uint64(0)])
def test_a_row_of_two_shards_is_found(mask):
    shards = [{"a": "1", "b": "1"}, {"c": "1"}, {"d": "1", "b": "1"}]
    plain = index._keys
    with patch.object(index, "_keys", lambda ids: plain(ids) & mask):
        assert RowIndex(shards.__getitem__).fill(list(shard) for shard in shards) == ("b", 0, 2)


def test_it_takes_eight_bytes_a_row_and_few_runs():
    rows = RowIndex(lambda shard: {})
    for shard in range(500):
        rows.add([f"row-{shard}-{i}" for i in range(100)])
    assert sum(run.nbytes for run in rows._runs) == 8 * 50_000
    assert len(rows._runs) <= 10
    for run in rows._runs:
        assert (run[1:] >= run[:-1]).all()


def test_a_shard_that_is_committed_whole_is_known_by_its_name(filled):
    """A plan over what is committed reads no row table; a plan cut otherwise does."""
    ids = make_ids(20)
    with open_writer(filled, SPEC) as writer, patch.object(RowIndex, "find", side_effect=AssertionError("looked")):
        for start in (0, 8, 16):
            some = ids[start : start + 8]
            assert writer.missing(some, [content(name) for name in some]).size == 0
        with pytest.raises(AssertionError, match="looked"):
            writer.missing(ids[:7], [content(name) for name in ids[:7]])


def test_a_row_table_that_changes_under_the_writer_is_not_believed(filled):
    with open_writer(filled, SPEC) as writer:
        for path in [*(filled / "shards").glob("*-rows.parquet"), *(filled / "ledger").iterdir()]:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
            with pytest.raises(StoreError, match="changed since" if path.suffix == ".json" else "damaged"):
                writer.contents(make_ids(20))
    fill(filled.parent / "other", make_ids(3), 3)
    with open_writer(filled.parent / "other", SPEC) as writer:
        assert writer.contents(["row-00001", "row-00009"]) == [content("row-00001"), None]
        writer.commit(measure(make_ids(5)[3:]))
        assert writer.contents(make_ids(5)) == [content(name) for name in make_ids(5)]
