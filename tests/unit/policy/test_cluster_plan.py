"""The cluster-level program: against brute force over whole counts, and its certificate by weak duality."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import NumericsError
from gradsift.policy.episodes import Table, Terms
from gradsift.policy.plan import (
    ClusterProgram,
    Effects,
    deal,
    least_excess,
    plan_lp,
    program_of,
    solve,
    tightened,
    whole_counts,
)

QUICK = settings(max_examples=25, deadline=None)
EITHER = st.booleans()


@st.composite
def programs(draw, tokens=EITHER):
    """Small programs; effects of any size, limits of any sign."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, m = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    capacity = random.integers(1, 5, k).astype(float)
    scale = 10.0 ** draw(st.integers(-6, 2))
    price = random.integers(1, 5, k).astype(float) if draw(tokens) else np.ones(k)
    budget = float(random.integers(1, int(capacity @ price) + 2))
    harm = scale * random.normal(size=(k, m)) + draw(st.sampled_from([-0.3, 0.0, 0.3])) * scale
    limits = scale * random.choice([-1.0, 0.3, 1.0, 3.0], size=m)
    return ClusterProgram(scale * random.normal(size=k), harm, capacity, limits, budget, price, np.zeros(m))


def whole(program):
    """All whole counts that use the budget up, the last decision possibly over it."""
    every = itertools.product(*(range(int(c) + 1) for c in program.capacity))
    kept = []
    for counts in every:
        n = np.array(counts, float)
        used = n @ program.price
        if used < program.total - 1e-9:
            continue
        dearest = max((p for p, c in zip(program.price, n, strict=True) if c), default=0.0)
        if used - dearest < program.total - 1e-9:
            kept.append(n)
    return np.array(kept)


def keeps(program, counts):
    return all(counts @ program.harm[:, m] <= limit + 1e-9 * abs(limit) for m, limit in enumerate(program.limits))


@QUICK
@given(programs())
def test_prices_certify_the_plan(program):
    plan = solve(program)
    np.testing.assert_allclose(plan.counts @ program.price, program.total, rtol=1e-6)
    assert (plan.counts >= 0).all()
    assert (plan.counts <= program.capacity).all()
    assert (plan.prices >= 0).all()
    assert plan.feasible == (plan.excess <= 1e-6)
    if not plan.feasible:
        return
    # Weak duality: for these prices no counts at all, within capacity and using the budget up, gain more; best by ratio.
    score = program.gain - program.harm @ plan.prices
    order = np.argsort(-score / program.price)
    left, bound = program.total, float(plan.prices @ program.limits)
    for k in order:
        n = min(program.capacity[k], left / program.price[k])
        bound += n * score[k]
        left -= n * program.price[k]
    size = np.abs(program.gain).max() * program.total
    assert plan.gain <= bound + 1e-6 * size
    np.testing.assert_allclose(plan.gain, bound, atol=1e-5 * size)


@QUICK
@given(programs(tokens=st.just(False)))
def test_no_whole_counts_beat_the_program(program):
    plan = solve(program)
    good = [n @ program.gain for n in whole(program) if keeps(program, n)]
    if good:
        assert plan.feasible
        assert max(good) <= plan.gain + 1e-6 * np.abs(program.gain).max() * program.total


@QUICK
@given(programs())
def test_whole_counts_are_among_those_of_brute_force(program):
    plan = whole_counts(program, solve(program))
    every = whole(program)
    assert (every == plan.counts).all(axis=1).any()
    assert plan.feasible == keeps(program, plan.counts)
    np.testing.assert_allclose(plan.rise, sum(n * h for n, h in zip(plan.counts, program.harm, strict=True)))
    if plan.feasible:
        good = [n @ program.gain for n in every if keeps(program, n)]
        assert plan.gain <= max(good) + 1e-9 * max(1.0, abs(max(good)))


def test_rounding_is_rarely_short_of_the_best_whole_counts():
    random = np.random.default_rng(0)
    missed, ratio = 0, []
    for _ in range(60):
        harm = random.normal(size=(4, 1)) + 0.1
        program = ClusterProgram(random.random(4), harm, np.full(4, 4.0), np.array([0.5]), 6.0, np.ones(4), np.zeros(1))
        good = [n @ program.gain for n in whole(program) if keeps(program, n)]
        plan = whole_counts(program, solve(program))
        if good:
            missed += not plan.feasible
            ratio.append(plan.gain / max(good) if plan.feasible else 0.0)
    assert missed <= 1
    assert np.mean(ratio) >= 0.97


def test_swaps_lead_back_within_the_limits():
    # Three decisions, half a decision's harm allowed: 2.5 of the first and 0.5 of the second is the fractional plan.
    # Either way to round it breaks the other limit, and a third cluster that gains nothing is the way out.
    harm = np.array([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]])
    program = ClusterProgram(
        np.array([1.0, 1.0, 0.0]), harm, np.full(3, 3.0), np.array([0.5, 0.5]), 3.0, np.ones(3), np.zeros(2)
    )
    plan = whole_counts(program, solve(program))
    np.testing.assert_allclose(solve(program).gain, 3.0)
    assert plan.feasible
    assert plan.counts.tolist() == [1, 1, 1]


@QUICK
@given(programs(tokens=st.just(False)))
def test_least_excess_is_where_the_program_becomes_feasible(program):
    if not len(program.limits):
        assert least_excess(program) == -np.inf
        return
    edge = least_excess(program)
    plan = solve(program)
    assert plan.feasible == (edge <= 1e-6) or abs(edge) < 1e-5
    if edge > 1e-5:
        np.testing.assert_allclose(plan.excess, edge, atol=1e-5 * max(1.0, edge))
    assert not solve(tightened(program, -edge + 1e-3)).feasible
    assert solve(tightened(program, -edge - 1e-3)).feasible


def test_a_program_by_hand():
    # Two clusters, four decisions, each of the first costs 1 of the limit 2: half and half.
    plan = plan_lp(np.array([3.0, 1.0]), np.array([[1.0], [0.0]]), np.array([9, 9]), np.array([2.0]), 4)
    np.testing.assert_allclose(plan.counts, [2, 2], atol=1e-7)
    np.testing.assert_allclose(plan.prices, [2.0], atol=1e-7)
    np.testing.assert_allclose([plan.gain, plan.rise[0], plan.excess], [8.0, 2.0, 0.0], atol=1e-6)
    assert plan.feasible
    # A limit below 0 demands replay: the general cluster lowers the loss by 1 per decision.
    plan = plan_lp(np.array([3.0, 0.0]), np.array([[1.0], [-1.0]]), np.array([9, 9]), np.array([-2.0]), 4)
    np.testing.assert_allclose(plan.counts, [1, 3], atol=1e-7)
    # Out of reach: four decisions rise by at least 4, three times the limit too much of 1.
    plan = plan_lp(np.array([3.0, 1.0]), np.array([[2.0], [1.0]]), np.array([9, 9]), np.array([1.0]), 4)
    np.testing.assert_allclose([plan.excess, plan.counts[1]], [3.0, 4.0], atol=1e-5)
    assert not plan.feasible


@QUICK
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_dealing_is_even(counts):
    schedule = deal(np.array(counts, float))
    assert np.bincount(schedule, minlength=len(counts)).tolist() == counts
    total = sum(counts)
    for t in range(total + 1):
        have = np.bincount(schedule[:t], minlength=len(counts))
        # never further from pro rata than one decision per cluster in play
        assert np.abs(have - np.array(counts) * t / max(total, 1)).max(initial=0) <= len(counts)
    for k, n in enumerate(counts):
        places = np.flatnonzero(schedule == k)
        assert n < 2 or np.diff(places).max() - np.diff(places).min() <= len(counts)


def test_the_program_of_an_episode_counts_full_batches_at_mean_prices():
    table = Table(((0, 1, 2), (3, 4)), np.array([1, 2, 3, 5, 7]), np.zeros((2, 1)), ("x",), np.array([False, True]))
    program = program_of(table, Terms(2, 20, np.array([0.5])), Effects(np.array([1.0, 2.0]), np.zeros((2, 1))))
    np.testing.assert_array_equal(program.capacity, [2, 1])
    np.testing.assert_array_equal(program.price, [4, 12])
    assert program.total == 20.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_effects_that_are_not_finite_do_not_pass(bad):
    with pytest.raises(NumericsError, match="not finite"):
        plan_lp(np.array([bad, 1.0]), np.zeros((2, 1)), np.array([1, 1]), np.array([1.0]), 1)
