"""T16 in small: its optimum is one, its regret cannot be gamed, and its verdict goes red on planted defects."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks.trials import common, t16_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.policy.play import play
from gradsift.policy.ppo_lagrangian import PPOConfig
from gradsift.policy.simple import Scheduled
from gradsift.seeds import stream

RESULT = Path(__file__).parents[2] / "docs/results/trials/t16.json"
VARIANTS = st.sampled_from(t16_policy.VARIANTS)


def figures(ppo=0.02, drifting_ppo=0.02, excess=0.0, num=12):
    random, out = np.random.default_rng(0), {}
    for seed in range(num):
        out[seed] = {}
        for variant in t16_policy.VARIANTS:
            regret = dict.fromkeys(t16_policy.OTHERS, 0.1) | {t16_policy.UNIFORM: 0.4, t16_policy.STATIC: 0.15}
            regret[t16_policy.PPO] = drifting_ppo if variant == "drifting" else ppo
            over = excess if variant == "binding" else -0.5
            out[seed][variant] = {
                name: {"regret": value + 0.01 * random.normal(), "excess": over} for name, value in regret.items()
            }
    return out


def missed(outcome):
    return [check.name for check in outcome.checks if not check.met]


def test_the_verdict_and_planted_defects():
    assert t16_policy.judge(figures()).met
    assert "no advantage" not in t16_policy.judge(figures()).line()
    assert missed(t16_policy.judge(figures(ppo=0.5))) == ["uniform's regret minus PPO's"]
    assert missed(t16_policy.judge(figures(drifting_ppo=0.2))) == ["the static plan's regret minus PPO's, drifting"]
    assert missed(t16_policy.judge(figures(excess=0.2))) == ["PPO's excess over the binding limit"]
    poor = t16_policy.judge(figures(ppo=0.1))
    assert poor.met
    assert (
        "no advantage over greedy, static quantile, thompson, epsilon_greedy, exp3 was measured (binding)"
        in poor.line()
    )


@settings(deadline=None, max_examples=25)
@given(VARIANTS, st.integers(0, 30), st.integers(0, 10_000))
def test_no_sequence_beats_the_optimum_and_breaking_the_limit_does_not_pay(variant, seed, draw):
    bandit = t16_policy.make(variant, seed)
    random = np.random.default_rng(draw)
    pool = np.repeat(np.arange(t16_policy.CLUSTERS), t16_policy.CAPACITY)
    some = np.stack([random.permutation(pool)[: t16_policy.DECISIONS] for _ in range(50)])
    assert bandit.regret(some).min() > -1e-9
    sums = bandit.gain[some, np.arange(t16_policy.DECISIONS)].sum(1)
    np.testing.assert_allclose(
        bandit.regret(some) * bandit.optimum,
        bandit.optimum - sums + bandit.price * np.maximum(0, bandit.excess(some)) * bandit.limit,
        atol=1e-12,
    )


def test_the_linear_program_against_every_sequence(monkeypatch):
    monkeypatch.setattr(t16_policy, "CAPACITY", 2)
    random = np.random.default_rng(1)
    gain, cost = random.normal(size=(3, 5)), random.normal(size=3)
    every = np.array([s for s in itertools.product(range(3), repeat=5) if np.bincount(s, minlength=3).max() <= 2])
    sums = gain[every, np.arange(5)].sum(1)
    optimum, price, at = t16_policy.solve(gain, cost, None)
    assert optimum == pytest.approx(sums.max())
    assert price == 0
    assert at == pytest.approx(cost[every[np.argmax(sums)]].sum())
    limit = at - 0.5
    bounded, price, at = t16_policy.solve(gain, cost, limit)
    assert sums[cost[every].sum(1) <= limit].max() <= bounded + 1e-9
    assert bounded < optimum
    assert price > 0
    assert at <= limit + 1e-9


@settings(deadline=None, max_examples=5)
@given(VARIANTS, st.integers(0, 9))
def test_episodes_pay_what_the_means_say(variant, seed):
    bandit = t16_policy.make(variant, seed)
    actions = np.arange(t16_policy.DECISIONS) % t16_policy.CLUSTERS
    trace = play(bandit.episodes, Scheduled(actions), stream(0, "x"), num=200)
    np.testing.assert_array_equal(trace.actions, np.tile(actions, (200, 1)))
    wanted = bandit.gain[actions, np.arange(t16_policy.DECISIONS)].sum()
    assert abs(trace.gain.mean() - wanted) < 5 * trace.gain.std() / np.sqrt(200) + 1e-9
    cost = bandit.cost[actions].sum()
    assert abs(trace.rise.mean() - cost) < 5 * trace.rise.std() / np.sqrt(200) + 1e-9


@pytest.mark.timeout(400)
def test_small():
    got = t16_policy.measure_variant("binding", 3, PPOConfig(num_epochs=2, num_episodes=4, hidden=8, cost_epochs=1))
    assert set(got) == {t16_policy.PPO, *t16_policy.OTHERS, "decisions", "price", "optimum"}
    # 2 epochs of 4 episodes and the two deployed ones, and the probe
    assert got["decisions"] == (2 * (4 + 2) + t16_policy.CLUSTERS + 1) * t16_policy.DECISIONS
    assert min(f["regret"] for f in got.values() if isinstance(f, dict)) > -1e-9


@pytest.mark.skipif(not RESULT.is_file(), reason="T16 has no committed result yet")
def test_the_committed_result_follows_from_its_figures():
    record = json.loads(RESULT.read_text())
    outcome = t16_policy.TRIAL.judge({int(seed): f for seed, f in record["per_seed"].items()})
    assert outcome.line() == record["line"]
    assert record["settings"] == common.plain(dict(t16_policy.TRIAL.settings))
    assert record["seeds"] == list(t16_policy.TRIAL.seeds)
