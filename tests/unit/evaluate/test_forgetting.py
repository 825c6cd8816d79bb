"""Forgetting per question: golden counts, the guessing model by enumeration, and GEM's figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from gradsift.errors import DataError
from gradsift.evaluate.choice import chance_adjusted
from gradsift.evaluate.forgetting import align, average_accuracy, backward_transfer, transitions

ANSWERS = st.integers(1, 30).flatmap(
    lambda n: st.tuples(hn.arrays(bool, n), hn.arrays(bool, n), st.sampled_from([0.0, 0.2, 0.25, 0.5]))
)


def test_golden_counts():
    before = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool)
    after = np.array([1, 0, 0, 1, 0, 0, 0, 1], bool)
    plain = transitions(before, after, np.zeros(8))
    assert (plain.forgotten, plain.learned) == (2 / 8, 1 / 8)
    assert (plain.forgotten_adjusted, plain.learned_adjusted) == (2 / 8, 1 / 8)
    quarter = transitions(before, after, np.full(8, 0.25))
    # by hand: (2 / .75 - .25 * 3 / .5625) / 8 and (1 / .75 - .25 * 3 / .5625) / 8
    assert quarter.forgotten_adjusted == pytest.approx((8 / 3 - 4 / 3) / 8)
    assert quarter.learned_adjusted == pytest.approx(0)


@given(ANSWERS)
def test_properties(drawn):
    before, after, c = drawn
    chance = np.full(len(before), c)
    got, reverse = transitions(before, after, chance), transitions(after, before, chance)
    assert (got.forgotten, got.forgotten_adjusted) == (reverse.learned, reverse.learned_adjusted)
    assert got.forgotten - got.learned == pytest.approx(before.mean() - after.mean())
    known = chance_adjusted(before.mean(), c) - chance_adjusted(after.mean(), c)
    assert got.forgotten_adjusted - got.learned_adjusted == pytest.approx(known, abs=1e-12)
    order = np.random.default_rng(0).permutation(len(before))
    assert transitions(before[order], after[order], chance).forgotten_adjusted == pytest.approx(got.forgotten_adjusted)


@pytest.mark.parametrize("c", [0.0, 0.2, 0.25, 0.5])
@pytest.mark.parametrize("shares", [(0.4, 0.1, 0.2, 0.3), (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0)])
def test_the_expectation_is_what_was_known_and_is_not(c, shares):
    """Slow twin: enumerate kept, lost, won, never known and both guesses, each with its probability."""
    expected_lost, expected_won = shares[1], shares[2]
    lost = won = plain = 0.0
    for share, (known_before, known_after) in zip(shares, ((1, 1), (1, 0), (0, 1), (0, 0)), strict=True):
        for right_before, right_after in itertools.product((0, 1), (0, 1)):
            p = share
            for known, right in ((known_before, right_before), (known_after, right_after)):
                p *= float(right) if known else (c if right else 1 - c)
            one = transitions(np.array([right_before], bool), np.array([right_after], bool), np.array([c]))
            lost, won, plain = (
                lost + p * one.forgotten_adjusted,
                won + p * one.learned_adjusted,
                plain + p * one.forgotten,
            )
    assert lost == pytest.approx(expected_lost)
    assert won == pytest.approx(expected_won)
    if shares[3] == 1 and c:
        assert plain == pytest.approx(c * (1 - c))  # pure guessing looks like forgetting until it is taken out


def test_mixed_numbers_of_options_and_errors():
    generator = np.random.default_rng(1)
    n = 40_000
    chance = generator.choice([1 / 2, 1 / 4, 1 / 5], n)
    kind = generator.choice(4, n, p=[0.5, 0.1, 0.05, 0.35])
    known = np.isin(kind, (0, 1)), np.isin(kind, (0, 2))
    before, after = (k | (generator.random(n) < chance) for k in known)
    got = transitions(before, after, chance)
    assert abs(got.forgotten_adjusted - 0.1) < 4 * got.forgotten_error
    assert abs(got.learned_adjusted - 0.05) < 4 * got.learned_error
    assert 0 < got.forgotten_error < 0.01


def test_refusals_and_alignment():
    yes = np.ones(2, bool)
    for bad in ((yes, yes[:1], np.zeros(2)), (yes, yes, np.ones(2)), (yes[:0], yes[:0], np.zeros(0))):
        with pytest.raises(DataError, match="same questions"):
            transitions(*bad)
    assert align(("a", "b", "c"), ("c", "a", "b")) == (1, 2, 0)
    for before, after in ((("a",), ("b",)), (("a", "a"), ("a",)), (("a",), ("a", "a")), (("a", "b"), ("a",))):
        with pytest.raises(DataError, match="same rows"):
            align(before, after)


def test_gem_figures():
    table = np.array([[0.9, 0.1, 0.2], [0.7, 0.8, 0.3], [0.6, 0.9, 0.7]])
    assert average_accuracy(table) == pytest.approx((0.6 + 0.9 + 0.7) / 3)
    assert backward_transfer(table) == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    with pytest.raises(DataError, match="square"):
        backward_transfer(np.ones((1, 1)))
