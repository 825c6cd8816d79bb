"""The parts of PPO-Lagrangian: advantages, clipping, networks and Adam against slow twins and golden numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradsift.errors import NumericsError
from gradsift.policy.advantage import gae, lagrangian_advantage, standardize
from gradsift.policy.descent import Descent, Runner, adam_step
from gradsift.policy.learned import deal, draw, tensor
from gradsift.policy.network import (
    Shape,
    actor_logits,
    critic_values,
    masked_log_softmax,
    orthogonal,
    pool,
    start_actor,
    start_critic,
    tanh,
    unpack,
)
from gradsift.policy.ppo_update import clipped_objective
from gradsift.seeds import stream

SHAPE = Shape(features=4, common=3, sources=2, hidden=8)


def slow_gae(rewards, values, decay, discount):
    out = []
    for t in range(len(rewards)):
        total, weight = 0.0, 1.0
        for s in range(t, len(rewards)):
            following = values[s + 1] if s + 1 < len(rewards) else 0.0
            total += weight * (rewards[s] + discount * following - values[s])
            weight *= decay * discount
        out.append(total)
    return out


def test_gae_golden():
    everywhere = np.ones((3, 1), dtype=bool)
    got = gae(np.array([1.0, 2, 3]).reshape(3, 1, 1), np.zeros((3, 1, 1)), everywhere)
    np.testing.assert_allclose(got[:, 0, 0], [5.6075, 4.85, 3])
    rewards, values = np.array([[0.02, -0.01, 0.03], [0.03, 0.02, 0.025]]).reshape(2, 3, 1, 1)
    got = gae(rewards, values, everywhere)
    np.testing.assert_allclose(got[:, 0, 0], [0.009763, -0.00025, 0.005], atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.floats(0, 1), st.floats(0.5, 1), st.integers(0, 9))
def test_gae_of_episodes_of_different_length_is_that_of_each_alone(steps, num, decay, discount, seed):
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, steps, num, 2))
    lengths = random.integers(1, steps + 1, num)
    running = np.arange(steps)[:, None] < lengths
    got = gae(rewards, values, running, decay, discount)
    for e, length in enumerate(lengths):
        for a in range(2):
            alone = slow_gae(rewards[:length, e, a], values[:length, e, a], decay, discount)
            np.testing.assert_allclose(got[:length, e, a], alone, atol=1e-12)
        assert not got[length:, e].any()


def test_lagrangian_golden():
    got = lagrangian_advantage(np.array([0.04, 0.02, 0.03]), np.array([[1.2], [0.7], [0.6]]), np.array([0.5]))
    np.testing.assert_allclose(got, [0.350829, -0.647163, 0.296334], atol=2e-6)


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, (9, 3), elements=st.floats(-5, 5)), st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0, 20)
)
def test_the_mixture_knows_no_units_and_weighs_rewards_less_as_prices_rise(table, unit, other, price):
    reward, cost, prices = table[:, 0], table[:, 1:], np.array([price, price / 2])
    if min(np.ptp(table, axis=0)) < 1e-2:  # the 1e-8 beside a standard deviation knows units
        return
    plain = lagrangian_advantage(reward, cost, prices)
    np.testing.assert_allclose(lagrangian_advantage(unit * reward, other * cost, prices), plain, atol=1e-4)
    by_hand = [
        (standardize(reward)[b] - sum(prices[m] * standardize(cost[:, m])[b] for m in range(2))) / (1 + prices.sum())
        for b in range(9)
    ]
    np.testing.assert_allclose(plain, by_hand, atol=1e-12)
    np.testing.assert_allclose(lagrangian_advantage(reward, cost[:, :1], np.ones(1), 0.0), -standardize(cost[:, 0]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "value"), [(1.3, 1, 1.2), (1.3, -1, -1.3), (0.7, 1, 0.7), (0.7, -1, -0.8)]
)
def test_clip_golden(ratio, advantage, value):
    assert clipped_objective(torch.tensor([ratio]), torch.tensor([float(advantage)]), 0.2).item() == pytest.approx(
        value
    )


def inputs(num=5, k=6, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(num, k, SHAPE.features)), random.normal(size=(num, SHAPE.common))


def slow_actor(flat, clusters, common):
    """One cluster at a time, in float64."""
    of_cluster, of_common, bias, second, bias_2, last = [p.double().numpy() for p in unpack(flat, SHAPE.actor)]
    out = np.zeros(clusters.shape[:2])
    for b in range(clusters.shape[0]):
        for k in range(clusters.shape[1]):
            row = np.concatenate([clusters[b, k], common[b]])
            hidden = np.tanh(row @ np.vstack([of_cluster, of_common]) + bias)
            out[b, k] = 3.5 * np.tanh(np.tanh(hidden @ second + bias_2) @ last / 3.5)
    return out


def test_networks_equal_their_slow_twins():
    clusters, common = inputs()
    actor = tensor(10 * start_actor(SHAPE, stream(0, "a")))
    got = actor_logits(actor, SHAPE, tensor(clusters), tensor(common)).numpy()
    np.testing.assert_allclose(got, slow_actor(actor, clusters, common), atol=2e-4)
    critic = tensor(start_critic(SHAPE, stream(0, "c")))
    pooled = pool(tensor(clusters), tensor(common))
    got = critic_values(critic, SHAPE, pooled).numpy()
    parts = [p.double().numpy() for p in unpack(critic, SHAPE.critic)]
    for a in range(3):
        first, bias, second, bias_2, last, bias_3 = (p[a] for p in parts)
        read = np.hstack([clusters.mean(1), clusters.max(1), common])
        by_hand = np.tanh(np.tanh(read @ first + bias) @ second + bias_2) @ last + bias_3
        np.testing.assert_allclose(got[:, a], by_hand[:, 0], atol=1e-5)
    grid = torch.linspace(-12, 12, 10001)
    assert (tanh(grid) - torch.tanh(grid)).abs().max() < 4e-7


@settings(deadline=None)
@given(st.permutations(range(6)), st.integers(0, 5))
def test_permuting_clusters_permutes_the_policy_and_leaves_the_critics(order, seed):
    clusters, common = inputs(seed=seed)
    mask = np.random.default_rng(seed).random((5, 6)) < 0.7
    mask[:, 0] = True
    actor, critic = tensor(30 * start_actor(SHAPE, stream(1, "a"))), tensor(start_critic(SHAPE, stream(1, "c")))

    def outputs(c, m):
        log = masked_log_softmax(actor_logits(actor, SHAPE, tensor(c), tensor(common)), tensor(m, torch.bool))
        return log.exp().numpy(), critic_values(critic, SHAPE, pool(tensor(c), tensor(common))).numpy()

    plain, moved = outputs(clusters, mask), outputs(clusters[:, order], mask[:, order])
    np.testing.assert_allclose(moved[0], plain[0][:, order], atol=1e-6)
    np.testing.assert_allclose(moved[1], plain[1], atol=1e-5)
    assert not plain[0][~mask].any()
    np.testing.assert_allclose(plain[0].sum(1), 1, atol=1e-6)


def test_first_weights():
    for m, n in ((9, 5), (5, 9), (4, 1)):
        q = orthogonal(m, n, 2.0, np.random.default_rng(0))
        small = q.T @ q if m >= n else q @ q.T
        np.testing.assert_allclose(small, 4 * np.eye(min(m, n)), atol=1e-12)
    clusters, common = inputs()
    actor = start_actor(SHAPE, stream(0, "a"))
    logits = actor_logits(tensor(actor), SHAPE, tensor(clusters), tensor(common))
    assert logits.abs().max() < 0.05
    assert actor.dtype == start_critic(SHAPE, stream(0, "c")).dtype == np.float32
    np.testing.assert_array_equal(actor, start_actor(SHAPE, stream(0, "a")))


def test_adam_equals_torchs():
    random = torch.Generator().manual_seed(0)
    ours, theirs = torch.ones(7), torch.ones(7, requires_grad=True)
    moments, optimizer = (torch.zeros(7), torch.zeros(7)), torch.optim.Adam([theirs], lr=0.01)
    for step in range(1, 6):
        gradient = torch.randn(7, generator=random)
        adam_step(ours, gradient, moments, step, 0.01)
        theirs.grad = gradient
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_stopping_between_steps_changes_no_bit():
    begin = Descent(np.ones(5, dtype=np.float32), np.zeros(5, dtype=np.float32), np.zeros(5, dtype=np.float32))

    def walk(runner, steps):
        for _ in range(steps):
            runner.descend((runner.weights**4 + runner.weights.cumsum(0) ** 2).sum(), 0.1, 1.0, "test")
        return runner.stop()

    whole, halves = walk(Runner(begin), 6), walk(Runner(walk(Runner(begin), 3)), 3)
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(value, getattr(halves, name))
    assert (begin.weights == 1).all()
    runner = Runner(begin)
    with pytest.raises(NumericsError, match="not finite"):
        runner.descend((runner.weights * np.inf).sum(), 0.1, 1.0, "test")


@settings(deadline=None)
@given(st.integers(0, 20))
def test_drawing_never_takes_a_masked_cluster_and_follows_the_shares(seed):
    random = np.random.default_rng(seed)
    mask = random.random((4, 5)) < 0.5
    mask[:, 2] = True
    share = np.where(mask, random.dirichlet(np.ones(5), 4), 0.0)
    for uniform in (0.0, np.nextafter(1.0, 0.0)):
        assert mask[np.arange(4), draw(share, np.full(4, uniform))].all()
    drawn = draw(np.repeat(share[:1], 2000, 0), (np.arange(2000) + 0.5) / 2000)
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 2000, share[0] / share[0].sum(), atol=1e-3)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(2, 6), st.integers(1, 40))
def test_dealt_counts_follow_the_summed_probabilities(seed, k, steps):
    random = np.random.default_rng(seed)
    owed, count, total = np.zeros((3, k)), np.zeros((3, k)), np.zeros((3, k))
    for _ in range(steps):
        share = random.dirichlet(np.full(k, 0.5), 3)
        chosen = deal(owed, share, np.ones((3, k), dtype=bool))
        count[np.arange(3), chosen] += 1
        total += share
        assert (count - total).max() <= 1 + 1e-9  # never ahead by more than the choice just made
    np.testing.assert_allclose(owed, total - count, atol=1e-9)
    masked = np.zeros((1, 3)), np.array([[0.9, 0.0, 0.1]]), np.array([[False, True, True]])
    assert deal(masked[0], np.where(masked[2], masked[1], 0.0), masked[2])[0] == 2
    assert deal(np.array([[5.0, 4.0, 0.0]]), np.array([[0.0, 0.0, 0.1]]), masked[2])[0] == 2
    over = np.zeros((1, 3))
    deal(over, np.zeros((1, 3)), np.zeros((1, 3), dtype=bool))
    assert not over.any()
