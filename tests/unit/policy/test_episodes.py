"""Episodes of the constrained decision process against a slow twin: one episode, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy_worlds import make_world, permuted

from gradsift.errors import ConfigError
from gradsift.policy.episodes import NO_ROW, Table, Terms
from gradsift.policy.play import play
from gradsift.policy.simple import Scheduled, Single, SizeProportional, Uniform
from gradsift.seeds import stream

QUICK = settings(max_examples=25, deadline=None)


@st.composite
def worlds(draw):
    """Episodes of any small shape, in rows or tokens, some with a budget above all there is."""
    return make_world(
        seed=draw(st.integers(0, 10_000)),
        sizes=tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))),
        num_sources=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 4)),
        budget=draw(st.integers(1, 30)),
        tokens=draw(st.booleans()),
    )


def one_by_one(episodes, number, actions):
    """Play one episode with lists and no vectors; checks the mask before every decision."""
    table, terms = episodes.table, episodes.terms
    key = episodes.stream.child(f"episode/{number}").numpy().random(len(table.price))
    rest = [sorted(some, key=lambda i: key[i]) for some in table.members]
    left, taken, masks = terms.budget, [], []
    for action in actions:
        masks.append([bool(some) and table.price[some[0]] <= left for some in rest])
        rows = []
        while masks[-1][action] and rest[action] and len(rows) < terms.rows_per_decision:
            if table.price[rest[action][0]] > left:
                break
            left -= table.price[rest[action][0]]
            rows.append(rest[action].pop(0))
        taken.append(rows)
    masks.append([bool(some) and table.price[some[0]] <= left for some in rest])
    return taken, masks, left


@QUICK
@given(worlds(), st.integers(0, 50), st.integers(1, 4))
def test_equal_to_one_row_at_a_time(episodes, first, num):
    seen = [episodes.reset(first, num)]
    policy, steps, chosen = Uniform(), [], []
    policy.begin(episodes, stream(1, "draws"))
    while not seen[-1].done.all():
        chosen.append(policy.act(seen[-1]))
        steps.append(episodes.step(chosen[-1]))
        seen.append(steps[-1].observation)
    for e in range(num):
        ran = [t for t in range(len(steps)) if not seen[t].done[e]]
        taken, masks, left = one_by_one(episodes, first + e, [chosen[t][e] for t in ran])
        for t, rows, mask in zip(ran, taken, masks[:-1], strict=True):
            assert steps[t].rows[e][steps[t].rows[e] != NO_ROW].tolist() == rows
            assert seen[t].mask[e].tolist() == mask
        assert not any(masks[-1])
        assert seen[-1].common[e, 0] == left / episodes.terms.budget
        # a twin of the learner that trains on these rows alone
        world = episodes.dynamics
        before = world.reset(1)
        for t, rows in zip(ran, taken, strict=True):
            after = world.step(np.array([rows]))
            np.testing.assert_allclose(steps[t].reward[e], (before.target - after.target)[0], atol=1e-12)
            np.testing.assert_allclose(steps[t].cost[e], (after.protect - before.protect)[0], atol=1e-12)
            before = after


@QUICK
@given(worlds(), st.integers(1, 5))
def test_rewards_and_costs_telescope(episodes, num):
    begin = episodes.dynamics.reset(num)
    trace = play(episodes, SizeProportional(), stream(2, "draws"), num=num)
    end = episodes.dynamics._losses()
    np.testing.assert_allclose(trace.gain, begin.target - end.target, atol=1e-12)
    np.testing.assert_allclose(trace.rise, end.protect - begin.protect, atol=1e-12)
    seen = episodes._observe()
    np.testing.assert_allclose(seen.common[:, 1] * episodes.scales[0], trace.gain, atol=1e-12)
    m = len(episodes.terms.limits)
    np.testing.assert_allclose(seen.common[:, 2 : 2 + m] * episodes.scales[1:], trace.rise, atol=1e-12)


@QUICK
@given(worlds(), st.integers(1, 5))
def test_budget_is_kept_and_no_row_comes_twice(episodes, num):
    trace = play(episodes, Uniform(), stream(3, "draws"), num=num)
    table, terms = episodes.table, episodes.terms
    for e in range(num):
        rows = trace.rows[e][trace.rows[e] != NO_ROW]
        assert len(set(rows.tolist())) == len(rows)
        spent = int(table.price[rows].sum())
        assert spent <= terms.budget
        # over only when nothing that comes next fits
        for k, some in enumerate(table.members):
            key = episodes._draw(e)
            rest = sorted(set(some) - set(rows.tolist()), key=lambda i: key[i])
            assert not rest or table.price[rest[0]] > terms.budget - spent, k
        for action, taken in zip(trace.actions[e], trace.rows[e], strict=True):
            taken = taken[taken != NO_ROW].tolist()
            assert bool(taken) == (action >= 0)
            assert set(taken) <= set(table.members[action]) if taken else True


def assert_same(one, other, e, f):
    """Episode e of one trace is episode f of another, apart from the padding at the end."""
    t = min(one.actions.shape[1], other.actions.shape[1])
    np.testing.assert_array_equal(one.actions[e, :t], other.actions[f, :t])
    np.testing.assert_array_equal(one.rows[e, :t], other.rows[f, :t])
    np.testing.assert_allclose(one.rewards[e, :t], other.rewards[f, :t], atol=1e-12)
    np.testing.assert_allclose(one.costs[e, :t], other.costs[f, :t], atol=1e-12)
    assert (one.actions[e, t:] == -1).all()
    assert (other.actions[f, t:] == -1).all()
    assert (one.rewards[e, t:] == 0).all()
    assert (one.costs[e, t:] == 0).all()


@QUICK
@given(worlds(), st.integers(0, 9), st.integers(1, 4), st.sampled_from(["uniform", "size", "single", "scheduled"]))
def test_an_episode_is_its_number_whatever_stands_beside_it(episodes, first, num, kind):
    k = episodes.table.num_clusters
    make = {
        "uniform": Uniform,
        "size": SizeProportional,
        "single": lambda: Single(k - 1),
        "scheduled": lambda: Scheduled([0, k - 1, 0]),
    }[kind]
    together = play(episodes, make(), stream(4, "draws"), first=first, num=num)
    for e in reversed(range(num)):
        alone = play(episodes, make(), stream(4, "draws"), first=first + e)
        assert_same(together, alone, e, 0)


@QUICK
@given(worlds(), st.randoms(use_true_random=False), st.booleans())
def test_permuting_the_clusters_permutes_everything(episodes, random, shuffle):
    k = episodes.table.num_clusters
    order = list(range(k))
    random.shuffle(order)
    plan = [random.randrange(k) for _ in range(40)]
    other = permuted(episodes, np.array(order))
    back = np.argsort(order)
    seen, theirs = episodes.reset(2, 2, shuffle=shuffle), other.reset(2, 2, shuffle=shuffle)
    episodes.dynamics.reset(2)
    mine_rows, their_rows = [], []
    for action in plan:
        np.testing.assert_array_equal(seen.mask[:, order], theirs.mask)
        np.testing.assert_allclose(seen.clusters[:, order], theirs.clusters, atol=1e-9)
        if not seen.mask[:, action].all():
            continue
        mine_rows.append(episodes.deal(np.full(2, action)))
        their_rows.append(other.deal(np.full(2, back[action])))
        losses = episodes.dynamics.step(mine_rows[-1])
        one, two = episodes.settle(losses), other.settle(losses)
        np.testing.assert_array_equal(one.rows, two.rows)
        np.testing.assert_array_equal(one.reward, two.reward)
        np.testing.assert_array_equal(one.observation.common, two.observation.common)
        seen, theirs = one.observation, two.observation


def test_rows_stand_in_a_drawn_order_or_as_given():
    episodes = make_world(sizes=(30, 20), budget=50, width=50)
    trace = play(episodes, Scheduled([0, 1]), stream(0, "x"), num=3)
    fixed = play(episodes, Scheduled([0, 1]), stream(0, "x"), num=1, shuffle=False)
    first = [trace.rows[e, 0][trace.rows[e, 0] != NO_ROW].tolist() for e in range(3)]
    assert fixed.rows[0, 0][:30].tolist() == list(episodes.table.members[0])
    assert len({tuple(some) for some in first}) == 3
    assert all(sorted(some) == sorted(episodes.table.members[0]) for some in first)


def test_every_place_in_a_cluster_is_as_likely():
    episodes = make_world(sizes=(4, 3), budget=4, width=1)
    num = 4000
    trace = play(episodes, Single(0), stream(0, "x"), num=num)
    counts = np.stack([np.bincount(trace.rows[:, t, 0], minlength=7) for t in range(4)])[
        :, list(episodes.table.members[0])
    ]
    # four standard deviations of a share of 1/4
    assert np.abs(counts / num - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / num)


def test_a_masked_cluster_is_refused():
    episodes = make_world(sizes=(1, 3), budget=4, width=2)
    episodes.reset(0, 1)
    episodes.step(np.array([0]))
    with pytest.raises(ValueError, match="no row left"):
        episodes.step(np.array([0]))


def test_episodes_of_different_length_side_by_side():
    episodes = make_world(seed=5, sizes=(6, 6), tokens=True, budget=12, width=1)
    trace = play(episodes, Uniform(), stream(0, "x"), num=12)
    lengths = (trace.actions >= 0).sum(axis=1)
    assert len(set(lengths.tolist())) > 1
    for e, length in enumerate(lengths):
        assert (trace.actions[e, :length] >= 0).all()
        assert (trace.actions[e, length:] == -1).all()
        assert (trace.rows[e, length:] == NO_ROW).all()
        assert not trace.rewards[e, length:].any()
        assert not trace.costs[e, length:].any()


def test_nothing_fits_from_the_start():
    episodes = make_world(seed=1, sizes=(2, 2), tokens=True, budget=1)
    table = Table(episodes.table.members, np.full(4, 9), *_rest(episodes.table))
    episodes = type(episodes)(table, episodes.dynamics, episodes.terms, episodes.stream)
    trace = play(episodes, Uniform(), stream(0, "x"), num=2)
    assert trace.actions.shape == (2, 0)
    assert trace.gain.tolist() == [0.0, 0.0]
    assert trace.rise.shape == (2, 1)


def _rest(table):
    return table.features, table.feature_names, table.general


def test_a_statistic_that_is_the_same_everywhere_says_nothing():
    episodes = make_world(sizes=(2, 2, 2))
    features = np.array([[1.0, 1e9], [2.0, 1e9], [4.0, 1e9 * (1 + 1e-15)]])
    table = Table(episodes.table.members, episodes.table.price, features, ("x", "flat"), episodes.table.general)
    seen = type(episodes)(table, episodes.dynamics, episodes.terms, episodes.stream).reset(0, 1)
    np.testing.assert_allclose(seen.clusters[0, :, 0].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(seen.clusters[0, :, 0].std(), 1)
    assert np.abs(seen.clusters[0, :, 1]).max() < 1e-5


@pytest.mark.parametrize(
    ("width", "budget", "limits"), [(0, 1, [1.0]), (1, 0, [1.0]), (1, 1, [0.0]), (1, 1, [1.0, np.nan])]
)
def test_terms_out_of_range_are_refused(width, budget, limits):
    with pytest.raises(ConfigError, match="expected"):
        Terms(width, budget, np.array(limits))


@pytest.mark.parametrize("members", [((0, 1), ()), ((0, 1), (1, 2)), ((0, 1), (2, 3)), ((0, -1), (1, 2))])
def test_tables_that_hold_no_partition_are_refused(members):
    with pytest.raises(ValueError, match="members"):
        Table(members, np.ones(3, dtype=np.int64), np.zeros((2, 1)), ("x",), np.array([True, False]))
