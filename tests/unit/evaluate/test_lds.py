"""The linear datamodeling score beside slow twins, its properties, and planted defects that must show."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradsift.errors import ConfigError, NumericsError
from gradsift.evaluate.lds import datamodeling_score, half_subsets, noise_ceiling, subset_bootstrap, subset_scores
from gradsift.seeds import stream

IDS = [f"r{k:03d}" for k in range(24)]


def linear_world(seed: int, noise: float = 0.0, num_targets: int = 7, num_subsets: int = 40):
    """Outputs that truly are the sums of the scores, plus noise."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(len(IDS), num_targets))
    members = half_subsets(IDS, num_subsets, stream(seed, "test"))
    return scores, members, subset_scores(scores, members) + noise * rng.normal(size=(num_subsets, num_targets))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.0, 20.0))
def test_equals_the_slow_twin(seed: int, noise: float) -> None:
    scores, members, outputs = linear_world(seed, noise, 3, 12)
    want = []
    for t in range(3):
        predicted = [math.fsum(scores[i, t] for i in range(len(IDS)) if members[s, i]) for s in range(12)]
        want.append(stats.spearmanr(np.round(predicted, 9), outputs[:, t]).statistic)
    found = datamodeling_score(scores, members, outputs)
    np.testing.assert_allclose(found.per_target, want, atol=1e-12)
    assert found.interval.mean == pytest.approx(np.mean(want))
    assert (found.interval.n, found.num_subsets) == (3, 12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.1, 5.0))
def test_properties(seed: int, scale: float) -> None:
    """A sign error mirrors it; units and a constant per row change nothing; truth reaches 1; order does not matter."""
    scores, members, outputs = linear_world(seed, 3.0)
    base = datamodeling_score(scores, members, outputs).per_target
    assert (np.abs(base) <= 1).all()
    np.testing.assert_allclose(datamodeling_score(-scores, members, outputs).per_target, -base, atol=1e-12)
    moved = datamodeling_score(scores * scale, members, np.exp(outputs / 10)).per_target
    np.testing.assert_allclose(moved, base, atol=1e-12)
    order = np.random.default_rng(seed).permutation(len(IDS))
    np.testing.assert_allclose(
        datamodeling_score(scores[order], members[:, order], outputs).per_target, base, atol=1e-12
    )
    assert datamodeling_score(scores, members, subset_scores(scores, members)).interval.mean == pytest.approx(1.0)


def test_planted_defects_show() -> None:
    """Sign error, scores of other rows, and scores of other targets: each loses what the right scores have."""
    scores, members, outputs = linear_world(1, 2.0, 30, 60)
    right = datamodeling_score(scores, members, outputs).interval
    assert right.low > 0.5
    assert datamodeling_score(-scores, members, outputs).interval.high < -0.5
    for wrong in (np.roll(scores, 1, axis=0), np.roll(scores, 1, axis=1)):
        assert abs(datamodeling_score(wrong, members, outputs).interval.mean) < 0.15


def test_subsets_have_one_size_and_follow_the_id() -> None:
    members = half_subsets(IDS, 50, stream(3, "subsets"))
    assert (members.sum(1) == len(IDS) // 2).all()
    assert len({row.tobytes() for row in members}) == 50
    np.testing.assert_array_equal(half_subsets(IDS[::-1], 50, stream(3, "subsets")), members[:, ::-1])
    share = half_subsets(IDS, 400, stream(4, "subsets"), share=0.25).mean(0)
    assert (np.abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)).all()


def test_bootstrap_covers_the_mean_and_is_wider_than_targets_alone_when_they_move_together() -> None:
    rng = np.random.default_rng(0)
    members = half_subsets(IDS, 60, stream(0, "b"))
    scores = np.repeat(rng.normal(size=(len(IDS), 1)), 40, axis=1)
    outputs = rng.normal(size=(60, 1)) + 0.1 * rng.normal(size=(60, 40))  # one noise for all targets
    alone = datamodeling_score(scores, members, outputs).interval
    both = subset_bootstrap(scores, members, outputs, stream(0, "b"), 200)
    assert both.low < both.mean < both.high
    assert both.mean == pytest.approx(alone.mean)
    assert both.high - both.low > 3 * (alone.high - alone.low)
    again = subset_bootstrap(scores, members, outputs, stream(0, "b"), 200)
    assert (again.low, again.high) == (both.low, both.high)


def test_ceiling_is_the_mean_pair_and_what_the_mean_of_runs_can_reach() -> None:
    rng = np.random.default_rng(5)
    truth = rng.normal(size=(400, 5))
    outputs = truth + rng.normal(size=(3, 400, 5))  # reliability 1/2
    found = noise_ceiling(outputs)
    pairs = [
        np.mean([stats.spearmanr(outputs[a][:, t], outputs[b][:, t]).statistic for t in range(5)])
        for a, b in itertools.combinations(range(3), 2)
    ]
    assert found.single == pytest.approx(np.mean(pairs), abs=1e-12)
    reached = np.mean([stats.spearmanr(outputs.mean(0)[:, t], truth[:, t]).statistic for t in range(5)])
    assert found.of_mean == pytest.approx(reached, abs=0.03)
    assert noise_ceiling(np.stack([truth, truth])).of_mean == pytest.approx(1.0)
    assert math.isnan(noise_ceiling(np.stack([truth, -truth])).of_mean)


def test_refusals() -> None:
    scores, members, outputs = linear_world(0)
    for bad in (scores[:, :-1], scores[:-1]):
        with pytest.raises(ConfigError, match="do not fit"):
            datamodeling_score(bad, members, outputs)
    with pytest.raises(ConfigError, match="number of subsets"):
        datamodeling_score(scores, members[:3], outputs[:3])
    with pytest.raises(NumericsError, match="outputs of a target do not vary"):
        datamodeling_score(scores, members, outputs * (np.arange(7) != 2))
    broken = outputs.copy()
    broken[0, 0] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        datamodeling_score(scores, members, broken)
    with pytest.raises(ConfigError, match="leave some out"):
        half_subsets(IDS[:1], 3, stream(0, "s"))
    with pytest.raises(ConfigError, match="number of trainings"):
        noise_ceiling(outputs[None])
    with pytest.raises(ConfigError, match="number of draws"):
        subset_bootstrap(scores, members, outputs, stream(0, "s"), 0)
