"""Likeness of tokens: equal to the slow twin, blind to every order, above 0 for rows like the target."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.geometry.likeness import SMOOTHING, token_likeness

ROW = st.lists(st.integers(0, 30), min_size=1, max_size=9).map(lambda ids: np.array(ids, np.int32))
ROWS = st.lists(ROW, min_size=1, max_size=8)


def slow(rows, target):
    """The definition in plain Python: token by token, counts in dictionaries."""
    pool, wanted = Counter(), Counter()
    for counts, some in ((pool, rows), (wanted, target)):
        for row in some:
            counts.update(int(t) for t in row)
    size = max(*pool, *wanted) + 1

    def log_p(counts, token):
        return math.log((counts[token] + SMOOTHING) / (sum(counts.values()) + SMOOTHING * size))

    return [math.fsum(log_p(wanted, int(t)) - log_p(pool, int(t)) for t in row) / len(row) for row in rows]


@settings(max_examples=60, deadline=None)
@given(ROWS, ROWS)
def test_it_equals_the_slow_twin(rows, target):
    got = token_likeness(rows, target)
    assert got.dtype == np.float64
    assert np.allclose(got, slow(rows, target), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS, st.randoms(use_true_random=False))
def test_no_order_matters(rows, target, random):
    """Neither of rows, nor of target rows, nor of the tokens within a row."""
    got = token_likeness(rows, target)
    order = random.sample(range(len(rows)), len(rows))
    turned = token_likeness([rows[k][::-1] for k in order], target[::-1])
    assert np.allclose(turned, got[order], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS, st.integers(2, 4))
def test_a_row_written_twice_over_is_as_like_as_before(rows, target, times):
    """Per token: beside a pool whose frequencies stay (every row grows), length itself earns nothing."""
    got = token_likeness([*rows, np.tile(rows[0], times)], target)
    assert math.isclose(got[0], got[-1], abs_tol=1e-12)


def test_a_pool_that_is_the_target_is_no_more_like_it():
    rows = [np.array([1, 2, 3]), np.array([2, 2, 5])]
    assert np.allclose(token_likeness(rows, rows), 0, atol=1e-15)


def test_rows_in_the_targets_words_stand_above_zero_and_above_all_others():
    rng = np.random.default_rng(0)
    like, unlike = ([rng.integers(low, low + 20, 12) for _ in range(30)] for low in (0, 40))
    got = token_likeness([*like, *unlike], [rng.integers(0, 20, 12) for _ in range(10)])
    assert got[:30].min() > 0 > got[30:].max()


@pytest.mark.parametrize(("rows", "target"), [([], [np.array([1])]), ([np.array([1])], [])])
def test_nothing_to_compare_is_refused(rows, target):
    with pytest.raises(ValueError, match="needs pool rows and target rows"):
        token_likeness(rows, target)
