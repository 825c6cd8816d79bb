"""Weights by prompt perplexity: the golden numbers of tlm.md and its properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.geometry.surprise import clip_at, quantile_threshold, surprise_weights

LOSSES = st.lists(st.floats(0.01, 12), min_size=1, max_size=20).map(np.array)


def test_golden_weights():
    got = surprise_weights(np.array([2.9, 3.0, 3.2, 4.0]), 3.0)
    assert got[:2].tolist() == [0.0, 0.0]  # strictly above
    assert got[2:] == pytest.approx([0.122140, 0.271828], abs=1e-6)
    assert np.exp([2.9, 3.0, 3.2, 4.0]) == pytest.approx([18.1741, 20.0855, 24.5325, 54.5982], abs=1e-4)
    assert got[1:] / got[1:].sum() == pytest.approx([0, 0.310026, 0.689974], abs=1e-6)


def test_golden_quantile():
    perplexity = np.arange(1.0, 11.0)
    loss = np.log(perplexity)
    edge = quantile_threshold(loss, 0.5)
    assert np.exp(edge) == pytest.approx(5)
    weights = surprise_weights(np.minimum(loss, clip_at(loss, 0.99)), edge)
    assert np.flatnonzero(weights).tolist() == [5, 6, 7, 8, 9]
    assert weights[5:] / weights[5] == pytest.approx(np.arange(6, 11) / 6)


@given(loss=LOSSES, edge=st.floats(0, 10), scale=st.floats(0.01, 5))
@settings(derandomize=True, database=None)
def test_zero_up_to_the_threshold_and_rising_above_and_the_scale_cancels(loss, edge, scale):
    loss = np.sort(loss)
    got = surprise_weights(loss, edge)
    assert ((got == 0) == (loss <= edge)).all()
    assert (np.diff(got) >= 0).all()
    if got.any():
        other = surprise_weights(loss, edge, scale)
        assert other / other.sum() == pytest.approx(got / got.sum())


@given(loss=LOSSES, share=st.floats(0.01, 1), factor=st.floats(0.1, 9))
@settings(derandomize=True, database=None)
def test_a_quantile_keeps_the_same_rows_whatever_the_unit(loss, share, factor):
    kept = loss > quantile_threshold(loss, share)
    scaled = loss * factor
    if len(np.unique(scaled)) == len(np.unique(loss)):
        assert (kept == (scaled > quantile_threshold(scaled, share))).all()
    assert kept.sum() <= np.floor(share * len(loss) + 1e-6)
    assert quantile_threshold(loss, 1.0) == -np.inf
