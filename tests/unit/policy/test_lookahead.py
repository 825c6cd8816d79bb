"""What a cluster would do next, tried in the simulator, against the truth: copies of the episode that take each batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quadratic import exact, make_world, schedules

from gradsift.errors import ConfigError
from gradsift.policy.lookahead import Lookahead
from gradsift.policy.simulator import KINDS, Coefficients, Simulator


def simulator(world, max_steps=None):
    coordinates, curvature = exact(world)
    coefficients = Coefficients(world.eta, tuple(world.kappa), world.kappa_train, world.kind)
    return Simulator(coordinates, coefficients, np.full(len(world.kappa), world.start), curvature, max_steps)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 200), kind=st.sampled_from(KINDS), steps=st.integers(0, 5))
def test_equal_to_trying_every_batch_in_the_true_world(seed, kind, steps):
    world = make_world(seed, kind=kind, sources=2, groups=2)
    played = np.stack(schedules(world, 2, steps + 1, seed=seed))[:, :steps]
    look = Lookahead(simulator(world), rows_per_decision=3)
    look.reset(2)
    for t in range(steps):
        look.step(played[:, t])
    members = ((4, 1, 7, 9, 2, 3, 5), (10, 12), (20, 21, 22))
    got = look.effects(members)
    for e in range(2):
        for k, some in enumerate(members):
            # whole batches only; a cluster smaller than a batch is one
            batches = [some[i : i + 3] for i in range(0, len(some), 3) if i + 3 <= len(some)] or [some]
            falls = []
            for batch in batches:
                last = np.full((1, played.shape[2] if steps else 3), -1)
                width = max(last.shape[1], 3)
                rows = np.full((steps + 1, width), -1)
                rows[:steps, : played.shape[2]] = played[e]
                rows[steps, : len(batch)] = batch
                losses = world.roll(rows).losses
                falls.append(losses[-2] - losses[-1])
            np.testing.assert_allclose(got.gain[e, k], np.mean(falls, axis=0)[-1], atol=1e-9)
            np.testing.assert_allclose(got.harm[e, k], -np.mean(falls, axis=0)[:-1], atol=1e-9)


def test_looking_moves_neither_the_copy_nor_the_original():
    world = make_world(1, kind="adam")
    original = simulator(world, max_steps=2)
    look = Lookahead(original, 3)
    look.reset(2)
    first = look.step(np.array([[1, 2, 3], [4, 5, 6]]))
    one, two = look.effects(((7, 8),)), look.effects(((7, 8),))
    np.testing.assert_array_equal(one.gain, two.gain)
    assert not original.state.delta.any()
    again = Lookahead(original, 3)
    again.reset(2)
    np.testing.assert_array_equal(first.target, again.step(np.array([[1, 2, 3], [4, 5, 6]])).target)
    look.step(np.array([[1, 2, 3], [4, 5, 6]]))
    with pytest.raises(ConfigError, match="not trusted"):
        look.step(np.array([[1, 2, 3], [4, 5, 6]]))
