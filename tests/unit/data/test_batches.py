"""Shards do not depend on input order; batches keep the budget and lose nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.data.batches import collate, plan_batches, plan_shards
from gradsift.types import RowStatus, TokenRow


def row(name, length):
    ids = np.arange(1, length + 1, dtype=np.int32)
    return TokenRow(name, ids, ids > 2, length, RowStatus.OK)


ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(
    lambda lengths: [row(f"r{i:02d}", n) for i, n in enumerate(lengths)]
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_shards_hold_the_same_rows_whatever_the_order(rows, size, random):
    shuffled = rows[:]
    random.shuffle(shuffled)
    named = [
        tuple(some[i].id for i in shard)
        for some in (rows, shuffled)
        for shard in plan_shards(some, range(len(some)), size)
    ]
    half = len(named) // 2
    assert named[:half] == named[half:]
    assert sorted(i for shard in named[:half] for i in shard) == sorted(r.id for r in rows)
    assert all(len(shard) == size for shard in named[: half - 1])


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 100))
def test_batches_keep_the_budget_and_the_order(rows, budget):
    batches = plan_batches(rows, range(len(rows)), budget)
    assert [i for batch in batches for i in batch] == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or max(rows[i].num_tokens for i in batch) * len(batch) <= budget


def test_collate_pads_right_and_masks():
    batch = collate([row("a", 4), row("b", 2)], [0, 1], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 9, 9]]
    assert batch.labels.tolist() == [[-100, -100, 3, 4], [-100] * 4]
    assert batch.lengths.tolist() == [4, 2]
