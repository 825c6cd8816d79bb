"""Mixtures made into rows: goldens of dids.md, exhaustion, floors and caps, places of a budget."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import NumericsError
from gradsift.geometry.mixture import (
    bounded,
    effective_number,
    largest_remainder,
    mixture_counts,
    mixture_places,
    name_weights,
    prior_weights,
)

simplex = st.lists(st.integers(0, 30), min_size=2, max_size=7).filter(any).map(lambda v: np.array(v) / sum(v))
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("total", "weights", "wanted"),
    [(10, (0.34, 0.33, 0.33), [4, 3, 3]), (7, (0.5, 0.3, 0.2), [4, 2, 1]), (100, (1 / 3, 1 / 3, 1 / 3), [34, 33, 33])],
)
def test_rounding_gives_the_golden_counts(total, weights, wanted):
    assert largest_remainder(np.array(weights), total).tolist() == wanted
    assert mixture_counts(np.array(weights), np.array([1000] * 3), total).counts.tolist() == wanted


def test_a_share_just_below_its_whole_number_is_that_number():
    assert largest_remainder(np.array([0.29, 0.71]), 100).tolist() == [29, 71]


@quick
@given(simplex, st.integers(0, 200))
def test_counts_add_up_and_stay_within_one_row_of_their_share(weights, total):
    counts = largest_remainder(weights, total)
    assert counts.sum() == total
    assert (np.abs(counts - total * weights) < 1 + 1e-6).all()
    assert (counts[weights == 0] == 0).all()


def slow_counts(weights, available, total):
    """The rule in exact fractions: settle what runs out, drop it, deal the rest by the other weights."""
    exact = [Fraction(w).limit_denominator(10**6) for w in weights]
    counts, live, left = [0] * len(exact), [w > 0 and a > 0 for w, a in zip(exact, available, strict=True)], total
    while left and any(live):
        whole = sum(w for w, on in zip(exact, live, strict=True) if on)
        shares = [left * w / whole if on else Fraction(0) for w, on in zip(exact, live, strict=True)]
        given = [int(s) for s in shares]
        order = sorted((k for k, on in enumerate(live) if on), key=lambda k: (-(shares[k] - given[k]), k))
        for k in order[: left - sum(given)]:
            given[k] += 1
        over = [k for k, on in enumerate(live) if on and given[k] > available[k] - counts[k]]
        if not over:
            return [c + g for c, g in zip(counts, given, strict=True)], 0
        for k in over:
            left -= available[k] - counts[k]
            counts[k], live[k] = available[k], False
    return counts, left


@quick
@given(simplex, st.data(), st.integers(0, 120))
def test_exhaustion_equals_the_slow_rule_and_counts_every_shortfall(weights, data, total):
    available = np.array(data.draw(st.lists(st.integers(0, 40), min_size=len(weights), max_size=len(weights))))
    found = mixture_counts(weights, available, total)
    counts, short = slow_counts(weights, available.tolist(), total)
    assert (found.counts.tolist(), found.short) == (counts, short)
    assert found.counts.sum() + found.short == total
    assert (found.counts <= available).all()
    for d in found.exhausted:
        assert found.counts[d] == available[d]
    cut = {d for d in range(len(weights)) if found.counts[d] < found.planned[d]}
    assert cut <= set(found.exhausted)


def test_a_domain_that_runs_out_is_named_and_the_others_share_its_rest():
    found = mixture_counts(np.array([0.5, 0.25, 0.25]), np.array([10, 100, 100]), 100)
    assert found.counts.tolist() == [10, 45, 45]
    assert found.exhausted == (0,)
    assert found.planned.tolist() == [50, 25, 25]
    all_of = mixture_counts(np.array([0.5, 0.5]), np.array([3, 4]), 10)
    assert (all_of.counts.tolist(), all_of.short, all_of.exhausted) == ([3, 4], 3, (0, 1))


@pytest.mark.parametrize("weights", [(0.5, 0.6), (1.5, -0.5), (np.nan, 1.0)])
def test_what_is_no_mixture_is_refused(weights):
    with pytest.raises(NumericsError, match="no probabilities"):
        mixture_counts(np.array(weights), np.array([5, 5]), 3)


def test_priors():
    assert prior_weights(np.array([1, 3]), "size").tolist() == [0.25, 0.75]
    assert prior_weights(np.array([1, 3]), "uniform").tolist() == [0.5, 0.5]


@quick
@given(simplex, st.floats(0, 1), st.floats(1, 5))
def test_bounds_are_kept_and_free_domains_keep_their_ratios(weights, floor, cap):
    k = len(weights)
    low = np.full(k, floor / k)
    high = np.maximum(np.full(k, cap / k), low)
    found = bounded(weights, low, high)
    assert abs(found.sum() - 1) < 1e-12
    assert (found >= low - 1e-12).all()
    assert (found <= high + 1e-12).all()
    free = np.flatnonzero((found > low + 1e-9) & (found < high - 1e-9) & (weights > 0))
    ratio = found[free] / weights[free]
    assert np.allclose(ratio, ratio[:1], rtol=1e-6)
    order = np.argsort(weights, kind="stable")
    assert (np.diff(found[order]) >= -1e-9).all()
    shuffled = np.random.default_rng(0).permutation(k)
    assert np.allclose(bounded(weights[shuffled], low, high), found[shuffled], atol=1e-9)


def test_bounds_that_leave_no_mixture_are_refused():
    with pytest.raises(NumericsError, match="no mixture"):
        bounded(np.array([0.5, 0.5]), np.array([0.6, 0.6]), np.array([1.0, 1.0]))
    with pytest.raises(NumericsError, match="no mixture"):
        bounded(np.array([0.5, 0.5]), np.zeros(2), np.array([0.4, 0.4]))


def test_the_effective_number_of_the_golden_softmax():
    assert effective_number(np.array([0.785597, 0.175290, 0.039113])) == pytest.approx(1.8619, abs=1e-4)
    assert effective_number(np.full(4, 0.25)) == pytest.approx(4)
    assert effective_number(np.array([1.0, 0.0])) == 1


@quick
@given(simplex, st.integers(1, 60), st.integers(0, 10**6))
def test_the_first_places_of_a_row_budget_are_the_counts_of_the_mixture(weights, total, seed):
    rng = np.random.default_rng(seed)
    domain = np.concatenate([np.arange(len(weights)), rng.integers(len(weights), size=40)])
    total = min(total, len(domain))
    place = mixture_places(domain, rng.random(len(domain)), np.ones(len(domain), dtype=np.int64), weights, total)
    assert np.isfinite(place).all()
    wanted = mixture_counts(weights, np.bincount(domain, minlength=len(weights)), total)
    first = np.argsort(place, kind="stable")[: total - wanted.short]
    assert np.bincount(domain[first], minlength=len(weights)).tolist() == wanted.counts.tolist()


def test_tokens_are_shared_by_the_mixture_too():
    rng = np.random.default_rng(3)
    domain = rng.integers(3, size=600)
    cost = np.where(domain == 0, 30, 5) + rng.integers(5, size=600)
    weights, total = np.array([0.5, 0.3, 0.2]), 2000
    order = np.argsort(mixture_places(domain, rng.random(600), cost, weights, total))
    taken = order[np.cumsum(cost[order]) <= total]
    used = np.bincount(domain[taken], weights=cost[taken], minlength=3)
    assert np.abs(used / used.sum() - weights).max() < 0.03


def test_names_are_paired_in_order():
    assert list(name_weights(["b", "a"], np.array([0.25, 0.75])).items()) == [("b", 0.25), ("a", 0.75)]
