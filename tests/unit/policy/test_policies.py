"""The policies without a network: they keep the mask, draw what they say, learn what pays, and follow their program."""

from __future__ import annotations

import itertools
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy_worlds import Quadratic, make_world

from gradsift.policy.bandits import (
    EpsilonGreedy,
    Exp3,
    Thompson,
    add_payoffs,
    empty_state,
    exp3_chances,
)
from gradsift.policy.episodes import NO_ROW, Episodes, Observation, Terms
from gradsift.policy.plan import Effects
from gradsift.policy.planned import DualPlan, PricedRounds, RecedingDual, TightenedDual
from gradsift.policy.play import play
from gradsift.policy.simple import Draws, Scheduled, Single, SizeProportional, Uniform, draw_cluster
from gradsift.seeds import stream

QUICK = settings(max_examples=20, deadline=None)


def effects_of(episodes):
    """[K] and [K, M] effects where the learner starts."""
    twin = deepcopy(episodes.dynamics)
    twin.reset(1)
    all_of = twin.effects(episodes.table.members)
    return Effects(all_of.gain[0], all_of.harm[0])


def twin_of(episodes):
    return Episodes(episodes.table, deepcopy(episodes.dynamics), episodes.terms, episodes.stream)


def everyone(episodes):
    """One of each policy."""
    effects, k = effects_of(episodes), episodes.table.num_clusters

    def measure(policy):
        return play(twin_of(episodes), policy, stream(9, "measure"), num=2).rise.mean(axis=0)

    return [
        Uniform(),
        SizeProportional(),
        Single(k - 1),
        Scheduled([0, k - 1] * 3),
        EpsilonGreedy(),
        Exp3(),
        Thompson(),
        DualPlan(effects),
        TightenedDual(effects, measure, num_halvings=3),
        RecedingDual(effects),
        RecedingDual(deepcopy(episodes.dynamics), every=3),
        PricedRounds(effects),
        PricedRounds(deepcopy(episodes.dynamics), every=2),
    ]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.booleans(), st.integers(1, 25))
def test_every_policy_keeps_the_mask_and_ends_the_episode(seed, num, tokens, budget):
    episodes = make_world(seed, sizes=(3, 1, 4), num_sources=2, width=2, budget=budget, tokens=tokens)
    for policy in everyone(episodes):
        trace = play(episodes, policy, stream(seed, "draws"), first=1, num=num)  # a masked choice raises
        again = play(episodes, policy, stream(seed, "draws"), first=1, num=num)
        for e in range(num):
            rows = trace.rows[e][trace.rows[e] != NO_ROW]
            assert episodes.table.price[rows].sum() <= budget
        if policy.name not in ("epsilon_greedy", "exp3", "thompson"):
            np.testing.assert_array_equal(trace.actions, again.actions)


@pytest.mark.parametrize("make", [Uniform, SizeProportional])
def test_draws_are_those_that_are_named(make):
    episodes = make_world(sizes=(6, 3, 1), budget=4, width=1)
    num = 3000
    actions = play(episodes, make(), stream(0, "draws"), num=num).actions
    want = np.full(3, 1 / 3) if make is Uniform else np.array([0.6, 0.3, 0.1])
    got = np.bincount(actions[:, 0], minlength=3) / num
    assert np.abs(got - want).max() < 4 * np.sqrt(0.25 / num)
    # the second decision after cluster 2 was used up
    then = actions[actions[:, 0] == 2, 1]
    want = np.array([0.5, 0.5, 0]) if make is Uniform else np.array([2 / 3, 1 / 3, 0])
    got = np.bincount(then, minlength=3) / len(then)
    assert np.abs(got - want).max() < 4 * np.sqrt(0.25 / len(then))


def test_size_proportional_uses_up_every_cluster_alike():
    # A batch at a time it is a random draw of rows: each row is as likely to be within the budget.
    episodes = make_world(sizes=(10, 5, 5), budget=8, width=1)
    trace = play(episodes, SizeProportional(), stream(1, "draws"), num=2000)
    share = np.bincount(trace.rows.ravel(), minlength=20) / 2000
    assert np.abs(share - 0.4).max() < 4 * np.sqrt(0.24 / 2000)


@QUICK
@given(st.integers(0, 1000))
def test_drawing_a_cluster_is_the_inverse_of_its_shares(seed):
    random = np.random.default_rng(seed)
    weights, mask = random.random((5, 4)) + 0.01, random.random((5, 4)) < 0.6
    u = random.random(5)
    got = draw_cluster(weights, mask, u)
    for e in range(5):
        heap, want = 0.0, 0
        total = sum(w for w, m in zip(weights[e], mask[e], strict=True) if m)
        for k in range(4):
            heap += weights[e, k] if mask[e, k] else 0.0
            if heap > u[e] * total:
                want = k
                break
        assert got[e] == want
        assert mask[e, got[e]] or not mask[e].any()


def test_draws_are_keyed_by_episode():
    both, one = Draws(stream(3, "x"), np.array([4, 9])), Draws(stream(3, "x"), np.array([9]))
    np.testing.assert_array_equal(both.uniform(3)[1], one.uniform(3)[0])
    np.testing.assert_array_equal(both.normal(2)[1], one.normal(2)[0])
    assert Draws(stream(3, "x"), np.arange(0)).uniform(2).shape == (0, 2)


def test_a_schedule_is_followed_and_what_it_leaves_open_is_counted():
    episodes = make_world(sizes=(2, 6, 2), budget=10, width=2)
    policy = Scheduled([0, 0, 1, 1])
    trace = play(episodes, policy, stream(0, "draws"), num=2)
    np.testing.assert_array_equal(trace.actions[:, :3], [[0, 1, 1]] * 2)  # cluster 0 holds one batch only
    assert policy.num_skipped == 2
    assert policy.num_unplanned == 2 * (trace.actions.shape[1] - 3) == 4
    with pytest.raises(ValueError, match="outside"):
        play(episodes, Scheduled([3]), stream(0, "draws"))
    policy = Single(0)
    trace = play(episodes, policy, stream(0, "draws"), num=2)
    assert (trace.actions[:, 0] == 0).all()
    assert policy.num_unplanned == 2 * 4
    with pytest.raises(ValueError, match="no cluster"):
        play(episodes, Single(3), stream(0, "draws"))


# ---- bandits


@QUICK
@given(st.integers(0, 1000), st.lists(st.integers(0, 9), max_size=4))
def test_means_and_spreads_are_exact_in_any_grouping(seed, cuts):
    random = np.random.default_rng(seed)
    actions, payoff = random.integers(0, 3, 9), 100 + random.normal(size=9)
    state, edges = empty_state(4, np.zeros(1)), sorted({0, 9, *cuts})
    for a, b in itertools.pairwise(edges):
        state = add_payoffs(state, actions[a:b], payoff[a:b])
    for k in range(4):
        mine = payoff[actions == k]
        assert state.pulls[k] == len(mine)
        if len(mine):
            np.testing.assert_allclose(state.mean[k], mine.mean())
            np.testing.assert_allclose(state.spread[k], ((mine - mine.mean()) ** 2).sum(), atol=1e-9)
    assert (state.low, state.high) == (payoff.min(), payoff.max())


def test_exp3_probabilities():
    mask = np.array([[True, True, True], [True, False, True], [False, False, False]])
    got = exp3_chances(np.log([0.5, 1.0, 0.25]), mask, 0.1)
    np.testing.assert_allclose(got[0], [0.9 * 0.5 / 1.75 + 0.1 / 3, 0.9 / 1.75 + 0.1 / 3, 0.9 * 0.25 / 1.75 + 0.1 / 3])
    np.testing.assert_allclose(got[1], [0.9 * 0.5 / 0.75 + 0.05, 0, 0.9 * 0.25 / 0.75 + 0.05])
    np.testing.assert_array_equal(got[2], 0)
    # weights that would underflow leave the exploration
    np.testing.assert_allclose(exp3_chances(np.array([0.0, -1e4]), np.ones((1, 2), bool), 0.2), [[0.9, 0.1]])


def test_exp3_step_by_hand():
    episodes = make_world(sizes=(3, 3), budget=6, width=3)
    policy = Exp3(gamma=0.2)
    seen = episodes.reset(0, 1)
    policy.begin(episodes, stream(0, "draws"))
    first = policy.act(seen)
    step = episodes.step(first)
    policy.learn(first, step)
    # nothing is known of the range of payoffs: the estimate is 1/2 over the chance 1/2
    want = np.zeros(2)
    want[first[0]] += 0.2 / 2 * 0.5 / 0.5
    np.testing.assert_allclose(policy.state.log_weight, want - want.max())
    second = policy.act(step.observation)
    policy.learn(second, episodes.step(second))
    state = policy.state
    inside = float(state.mean[second[0]] == state.high)  # the range is that of the two payoffs
    want = want - want.max()
    want[second[0]] += 0.2 / 2 * inside / 1.0  # one cluster left: its chance is 1
    np.testing.assert_allclose(state.log_weight, want - want.max(), atol=1e-12)


def arms(gains, seed=0, limits=(1.0,), harms=None, size=100, noise=0.3):
    """Additive world: a decision for cluster k gains gains[k] on average and harms source 0 by harms[k]."""
    k, random = len(gains), np.random.default_rng(seed)
    harms = np.zeros(k) if harms is None else np.asarray(harms, float)
    rows = np.stack([np.repeat(gains, size), np.repeat(-harms, size)], axis=1)
    rows[:, 0] += noise * random.normal(size=len(rows))
    base = make_world(sizes=(size,) * k, num_sources=1, width=1, budget=60)
    table = base.table
    members = tuple(tuple(range(k_ * size, (k_ + 1) * size)) for k_ in range(k))
    table = type(table)(members, table.price, table.features, table.feature_names, table.general)
    slopes = np.eye(2)
    return Episodes(table, Quadratic(rows, slopes, eta=1.0), Terms(1, 60, np.array(limits)), stream(seed, "order"))


@pytest.mark.parametrize("make", [EpsilonGreedy, Exp3, Thompson])
def test_bandits_find_what_pays_and_keep_it_across_episodes(make):
    episodes = arms([0.1, 1.0, 0.2, 0.0])
    policy = make()
    for i in range(20):
        trace = play(episodes, policy, stream(i, "a"), num=4)
    # epsilon-greedy explores 1 decision in 10 for ever: 0.925 within four standard deviations of 240 draws
    assert (trace.actions == 1).mean() > {"epsilon_greedy": 0.85, "exp3": 0.6, "thompson": 0.95}[policy.name]
    # the state is a value: given to another policy it goes on the same way, and it is not changed behind one's back
    kept = deepcopy(policy.state)
    one = play(episodes, make(state=policy.state), stream(99, "a"), num=3)
    two = play(episodes, make(state=kept), stream(99, "a"), num=3)
    np.testing.assert_array_equal(one.actions, two.actions)
    np.testing.assert_array_equal(kept.mean, policy.state.mean)


@pytest.mark.parametrize("make", [EpsilonGreedy, Thompson])
def test_bandits_weigh_costs(make):
    episodes = arms([1.0, 0.6], harms=[1.0, 0.0], limits=(10.0,))
    for price, best in ((0.0, 0), (20.0, 1)):
        policy = make(multipliers=np.array([price]))
        for i in range(6):
            trace = play(episodes, policy, stream(i, "a"), num=4)
        assert (trace.actions == best).mean() > 0.8
        np.testing.assert_array_equal(policy.state.multipliers, [price])


def test_adapted_multipliers_rise_above_the_limit_and_fall_below_it():
    episodes = arms([1.0, 0.6], harms=[1.0, 0.0], limits=(10.0,))
    policy = EpsilonGreedy(rate=0.1)
    before, rises = np.zeros(1), []
    for i in range(35):
        trace = play(episodes, policy, stream(i, "a"), num=4)
        moved, excess = policy.state.multipliers - before, trace.rise.mean() - 10.0
        assert (policy.state.multipliers >= 0).all()
        assert moved[0] * excess > 0 or (excess < 0 and policy.state.multipliers[0] == 0)
        before = policy.state.multipliers
        rises.append(trace.rise.mean())
    assert rises[0] > 20
    assert np.mean(rises[-15:]) < np.mean(rises[:5])


@pytest.mark.parametrize("make", [EpsilonGreedy, Exp3, Thompson])
def test_episodes_that_are_over_teach_nothing(make):
    episodes = make_world(seed=5, sizes=(6, 6), tokens=True, budget=12, width=1)
    policy = make()
    trace = play(episodes, policy, stream(0, "draws"), num=12)
    assert policy.state.pulls.sum() == (trace.actions >= 0).sum()
    assert (trace.actions == -1).any()


def test_a_state_of_another_process_is_refused():
    episodes = make_world(sizes=(2, 2))
    with pytest.raises(ValueError, match="another number"):
        play(episodes, Thompson(state=empty_state(3, np.zeros(1))), stream(0, "draws"))
    with pytest.raises(ValueError, match="another number"):
        play(episodes, Thompson(multipliers=np.zeros(2)), stream(0, "draws"))


# ---- plans


def curved(seed):
    """A world where the harm of a step grows with the distance gone, so a plan made at the start overshoots."""
    random = np.random.default_rng(seed)
    kinds = np.array([[1.0, 0.0, 0.0], [0.7, 0.7, 0.0], [0.0, 0.0, 1.0], [0.1, -0.4, 0.3]])
    rows = np.repeat(kinds, 30, axis=0) + 0.02 * random.normal(size=(120, 3))
    members = tuple(tuple(range(30 * k, 30 * k + 30)) for k in range(4))
    base = make_world(sizes=(30,) * 4, width=3, budget=60).table
    table = type(base)(members, base.price, base.features, base.feature_names, base.general)
    dynamics = Quadratic(rows, [[1.0, 0.2, 0.1], [0.05, -0.3, 0.2]], eta=0.02, bend=0.6)
    return Episodes(table, dynamics, Terms(3, 60, np.array([0.01])), stream(seed, "order"))


def test_a_plan_is_the_program_dealt_out():
    episodes = arms([1.0, 0.5, 0.0], harms=[1.0, 0.2, -0.5], limits=(20.0,), noise=0.0)
    policy = DualPlan(effects_of(episodes))
    trace = play(episodes, policy, stream(0, "draws"), num=2)
    assert policy.plan.feasible
    np.testing.assert_allclose(trace.gain, policy.plan.gain)
    np.testing.assert_allclose(trace.rise[:, 0], policy.plan.rise[0])
    assert (trace.rise <= 20 + 1e-9).all()
    # by hand: 60 decisions; the price makes clusters 0 and 1 equal: 1 - p = 0.5 - 0.2 p, 10 and 50 decisions
    assert np.bincount(trace.actions[0], minlength=3).tolist() == [10, 50, 0]
    np.testing.assert_allclose(policy.plan.prices, [0.625], atol=1e-6)
    assert policy.schedule.num_unplanned == policy.schedule.num_skipped == 0


@pytest.mark.parametrize("seed", range(3))
def test_tightening_and_receding_keep_what_one_plan_overshoots(seed):
    episodes = curved(seed)
    limit = episodes.terms.limits[0]
    effects = effects_of(episodes)

    def measure(policy):
        return play(twin_of(episodes), policy, stream(7, "measure"), num=4).rise.mean(axis=0)

    def mean(policy):
        trace = play(episodes, policy, stream(1, "draws"), num=4)
        return trace.gain.mean(), trace.rise.mean()

    _, rise = mean(DualPlan(effects))
    assert rise > 1.5 * limit
    tight = TightenedDual(effects, measure)
    tight_gain, rise = mean(tight)
    assert tight.fits
    assert tight.tightening > 0
    assert (tight.measured <= episodes.terms.limits).all()
    assert rise <= limit * 1.05
    receding_gain, rise = mean(RecedingDual(deepcopy(episodes.dynamics)))
    assert rise <= limit * 1.1
    priced_gain, rise = mean(PricedRounds(deepcopy(episodes.dynamics)))
    assert rise <= limit * 1.3
    uniform_gain, _ = mean(Uniform())
    assert min(tight_gain, receding_gain, priced_gain) > uniform_gain


def test_tightening_that_cannot_fit_says_so():
    episodes = arms([1.0, 0.5], harms=[2.0, 1.0], limits=(10.0,), noise=0.0)
    policy = TightenedDual(effects_of(episodes), lambda p: play(twin_of(episodes), p, stream(0, "m")).rise[0])
    trace = play(episodes, policy, stream(0, "draws"))
    assert not policy.fits
    assert not policy.plan.feasible
    np.testing.assert_allclose(policy.plan.excess, 5.0, atol=1e-4)  # 60 decisions rise by 60 at least, the limit is 10
    assert (trace.actions == 1).all()


def test_tightening_takes_no_more_than_it_must():
    # Cluster 1 really harms half as much again as the plan is told: a rise of 10 is one of 6.67 as told.
    episodes = arms([0.0, 1.0], harms=[0.0, 0.4], limits=(10.0,), noise=0.0)
    told = effects_of(episodes)
    less = Effects(told.gain, told.harm / 1.5)
    policy = TightenedDual(less, lambda p: play(twin_of(episodes), p, stream(0, "m")).rise[0])
    trace = play(episodes, policy, stream(0, "draws"))
    assert policy.fits
    assert np.bincount(trace.actions[0], minlength=2).tolist() == [35, 25]
    # 26 decisions rise by 6.93 as told, 25 by 6.67: the limit has to come below the first and may stay above the second
    assert 1 - 26 * 0.8 / 30 < policy.tightening < 1 - 26 * 0.8 / 30 + 1e-3


def test_tightening_leaves_a_plan_that_fits_alone():
    episodes = arms([1.0, 0.5], harms=[0.1, 0.0], limits=(10.0,), noise=0.0)
    policy = TightenedDual(effects_of(episodes), lambda p: play(twin_of(episodes), p, stream(0, "m")).rise[0])
    play(episodes, policy, stream(0, "draws"))
    assert policy.fits
    assert policy.tightening == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_prices_rise_above_pro_rata_and_fall_below(sign):
    episodes = arms([1.0, 0.5], harms=[0.3, 0.1], limits=(12.0,), noise=0.0)
    # effects that promise too little (or too much) harm: what was measured has the last word
    told = effects_of(episodes)
    policy = PricedRounds(Effects(told.gain, told.harm * (1 - 0.5 * sign)), every=2)
    seen = episodes.reset(0, 1)
    policy.begin(episodes, stream(0, "draws"))
    rise, before, moves = 0.0, policy.multipliers, []
    for t in range(12):
        action = policy.act(seen)
        if t and t % 2 == 0:
            moves.append((float(policy.multipliers[0, 0] - before[0, 0]), rise - 2 * 12.0 / 60))
            before, rise = policy.multipliers, 0.0
        else:
            np.testing.assert_array_equal(policy.multipliers, before)
        step = episodes.step(action)
        policy.learn(action, step)
        rise += float(step.cost[0, 0])
        seen = step.observation
    for moved, excess in moves:
        assert moved * excess > 0 or abs(excess) < 1e-9 or (excess < 0 and policy.multipliers[0, 0] == 0)
    trace = play(episodes, policy, stream(0, "draws"))
    assert trace.rise[0, 0] <= 12.0 * 1.1
    assert trace.gain[0] >= 0.9 * 42.0  # best: 30 of each, gain 45; never better than that
    assert trace.gain[0] <= 45.0 + 3.0


def test_masks_of_an_observation_without_a_choice():
    seen = Observation(np.zeros((2, 3, 1)), np.zeros((2, 2)), np.zeros((2, 3), bool))
    assert seen.done.all()
    assert draw_cluster(np.ones((2, 3)), seen.mask, np.array([0.5, 0.1])).tolist() == [0, 0]
