"""The Gymnasium environment: its own checker, and equality with the process behind it."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
from tests.policy_worlds import make_world

from gradsift.errors import ConfigError, DependencyError
from gradsift.policy.play import play
from gradsift.policy.simple import Scheduled, Uniform
from gradsift.seeds import stream

gymnasium = pytest.importorskip("gymnasium")
from gradsift.policy.environment import SelectionEnv  # noqa: E402


# the change of a loss has no bound, and Gymnasium's checker only wonders whether one was forgotten
@pytest.mark.filterwarnings("ignore:.*Box observation space (minimum|maximum) value is.*infinity:UserWarning")
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("num_sources", [1, 3])
def test_passes_gymnasiums_checker(tokens, num_sources):
    from gymnasium.utils.env_checker import check_env

    env = SelectionEnv(make_world(sizes=(9, 8, 7), num_sources=num_sources, budget=30, tokens=tokens))
    check_env(env, skip_render_check=True)


def test_an_episode_is_the_one_of_its_number():
    env, twin = SelectionEnv(make_world(budget=9)), make_world(budget=9)
    trace = play(twin, Uniform(), stream(0, "draws"), first=7)
    seen, info = env.reset(seed=7)
    assert info["episode"] == 7
    np.testing.assert_array_equal(seen["mask"], info["action_mask"])
    terminated = False
    for t, action in enumerate(trace.actions[0]):
        assert not terminated
        seen, reward, terminated, truncated, info = env.step(action)
        assert not truncated
        assert reward == trace.rewards[0, t]
        np.testing.assert_array_equal(info["cost"], trace.costs[0, t])
        assert info["rows"].tolist() == trace.rows[0, t][trace.rows[0, t] >= 0].tolist()
        np.testing.assert_array_equal(seen["mask"], info["action_mask"])
    assert terminated
    assert not info["action_mask"].any()
    _, info = env.reset()
    assert info["episode"] == 8


def test_the_mask_is_for_sampling_and_what_it_forbids_is_refused():
    env = SelectionEnv(make_world(sizes=(1, 4, 2), budget=7, width=2))
    _, info = env.reset(seed=0)
    env.action_space.seed(0)
    done, total = False, []
    while not done:
        _, _, done, _, info = env.step(env.action_space.sample(mask=info["action_mask"]))
        total += info["rows"].tolist()
    assert sorted(total) == list(range(7))
    with pytest.raises(ConfigError, match="may not be chosen"):
        env.step(0)


def test_without_shuffling_rows_stand_as_in_the_table():
    episodes = make_world(sizes=(3, 4), budget=7, width=2)
    env = SelectionEnv(episodes, shuffle=False)
    env.reset(seed=3)
    *_, info = env.step(1)
    assert info["rows"].tolist() == list(episodes.table.members[1][:2])
    trace = play(episodes, Scheduled([1]), stream(0, "x"), first=3, shuffle=False)
    assert trace.rows[0, 0].tolist() == info["rows"].tolist()


def test_without_gymnasium_the_extra_is_named(monkeypatch):
    import gradsift.policy.environment as module

    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(DependencyError, match=r"gradsift\[rl\]"):
        importlib.import_module(module.__name__)
