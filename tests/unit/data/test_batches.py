"""Shards do not depend on input order; batches keep the budget and lose nothing; padding never carries loss."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.data.batches import IGNORED, collate, plan_batches, plan_shards
from gradsift.types import RowStatus, TokenRow


def row(name: str, length: int, trained_from: int = 2) -> TokenRow:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return TokenRow(name, ids, ids > trained_from, length, RowStatus.OK)


ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=30).map(
    lambda lengths: [row(f"r{i:02d}", n) for i, n in enumerate(lengths)]
)


@settings(deadline=None)
@given(ROWS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_shards_hold_the_same_rows_whatever_the_order(rows: list[TokenRow], size: int, random: Random) -> None:
    shuffled, places = rows[:], list(range(len(rows)))
    random.shuffle(shuffled)
    random.shuffle(places)
    straight = [tuple(rows[i].id for i in shard) for shard in plan_shards(rows, range(len(rows)), size)]
    mixed = [tuple(shuffled[i].id for i in shard) for shard in plan_shards(shuffled, places, size)]
    assert straight == mixed
    assert sorted(name for shard in straight for name in shard) == [r.id for r in rows]
    assert all(len(shard) == size for shard in straight[:-1])
    assert 1 <= len(straight[-1]) <= size


@settings(deadline=None)
@given(ROWS, st.integers(1, 9))
def test_shards_go_by_length_and_then_by_id(rows: list[TokenRow], size: int) -> None:
    order = [rows[i] for shard in plan_shards(rows, range(len(rows)), size) for i in shard]
    assert all((a.num_tokens, a.id) < (b.num_tokens, b.id) for a, b in pairwise(order))


def test_shards_hold_what_was_asked_for_alone() -> None:
    rows = [row("b", 3), row("a", 3), row("c", 1), row("d", 2)]
    assert plan_shards(rows, [0, 1, 3], 2) == ((3, 1), (0,))
    assert plan_shards(rows, [], 2) == ()


def slow_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """The twin: grow a batch row by row, and measure it anew each time."""
    batches: list[list[int]] = []
    for i in range(len(lengths)):
        grown = [*batches[-1], i] if batches else []
        if grown and max(lengths[k] for k in grown) * len(grown) <= budget:
            batches[-1] = grown
        else:
            batches.append([i])
    return batches


@settings(deadline=None)
@given(ROWS, st.integers(1, 100))
def test_batches_are_as_full_as_the_budget_lets_them(rows: list[TokenRow], budget: int) -> None:
    batches = plan_batches(rows, range(len(rows)), budget)
    assert [list(batch) for batch in batches] == slow_batches([r.num_tokens for r in rows], budget)
    assert [i for batch in batches for i in batch] == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or max(rows[i].num_tokens for i in batch) * len(batch) <= budget


def test_no_rows_make_no_batches() -> None:
    assert plan_batches([], [], 10) == ()


@settings(deadline=None)
@given(ROWS, st.data())
def test_padding_is_on_the_right_and_carries_no_loss(rows: list[TokenRow], data: st.DataObject) -> None:
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    pad = data.draw(st.integers(0, 50))  # also an id that stands in the rows
    batch = collate(rows, picked, pad_id=pad)
    width = max(rows[i].num_tokens for i in picked)
    assert batch.input_ids.shape == batch.labels.shape == (len(picked), width)
    assert batch.rows.tolist() == picked
    for b, i in enumerate(picked):
        n = rows[i].num_tokens
        assert batch.lengths[b] == n
        assert batch.input_ids[b].tolist() == [*rows[i].input_ids.tolist(), *[pad] * (width - n)]
        labels = [t if on else IGNORED for t, on in zip(rows[i].input_ids.tolist(), rows[i].trained, strict=True)]
        assert batch.labels[b].tolist() == [*labels, *[IGNORED] * (width - n)]


def test_collate_gives_64_bit_integers() -> None:
    import torch

    batch = collate([row("a", 4), row("b", 2)], [0, 1], pad_id=9)
    assert {t.dtype for t in (batch.rows, batch.input_ids, batch.labels, batch.lengths)} == {torch.int64}
    assert batch.labels.tolist() == [[-100, -100, 3, 4], [-100] * 4]


def test_a_batch_of_nothing_is_our_own_mistake() -> None:
    with pytest.raises(ValueError):
        collate([row("a", 4)], [], pad_id=0)
