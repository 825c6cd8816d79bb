"""The transfer audit's figures: slow twins, properties, what warns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gradsift.geometry.transfer import NUM_DRAWS, Transfer, transfer
from gradsift.seeds import stream

STREAM = stream(0, "transfer")


def pair(n: int, rho: float, seed: int = 0, anchors: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((2, n, anchors))
    return np.tanh(x) / 2, np.tanh(rho * x + np.sqrt(1 - rho**2) * noise) / 2


def run(x: np.ndarray, y: np.ndarray, k: int = 5) -> tuple[Transfer, ...]:
    return transfer(x, y, [f"a{i}" for i in range(x.shape[1])], k, STREAM)


def slow(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float, float]:
    """Loops and scipy, one direction."""
    best = [sorted(range(len(v)), key=lambda i: (-v[i], i))[:k] for v in (x, y)]
    same = sum(np.sign(a) == np.sign(b) for a, b in zip(x, y, strict=True)) / len(x)
    return float(spearmanr(x, y).statistic), float(same), len(set(best[0]) & set(best[1])) / k


@settings(deadline=None, max_examples=25)
@given(st.integers(5, 30), st.floats(-1, 1), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_equals_its_slow_twin(n: int, rho: float, k: int, ties: bool, seed: int) -> None:
    x, y = pair(n, rho, seed, anchors=1)
    if ties:
        x, y = np.round(x, 1), np.round(y, 1)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return
    (found,) = run(x, y, k)
    got = found.spearman.value, found.signs.value, found.overlap.value
    np.testing.assert_allclose(got, slow(x[:, 0], y[:, 0], k), atol=1e-12)


def test_the_interval_is_that_of_a_slow_bootstrap() -> None:
    x, y = pair(25, 0.6, anchors=1)
    (found,) = run(x, y)
    draws = STREAM.child("bootstrap").numpy().integers(0, 25, size=(NUM_DRAWS, 25))
    values = [spearmanr(x[rows, 0], y[rows, 0]).statistic for rows in draws[:NUM_DRAWS]]
    np.testing.assert_allclose(
        [found.spearman.low, found.spearman.high], np.quantile(values, [0.025, 0.975]), atol=1e-12
    )
    assert found.spearman.low < found.spearman.value < found.spearman.high


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), st.sampled_from([0.1, 1.0, 7.0]))
def test_ranks_do_not_see_a_monotone_change_and_directions_stand_alone(seed: int, power: float) -> None:
    x, y = pair(20, 0.5, seed)
    bent = np.sign(y) * np.abs(y) ** power
    assert run(x, y) == run(x, bent)
    assert run(x[:, 1:], y[:, 1:])[0].spearman == run(x, y)[1].spearman


def test_the_same_model_agrees_in_full_and_the_opposite_in_nothing() -> None:
    x, _ = pair(40, 0.0)
    for found in run(x, x):
        assert (found.spearman.value, found.signs.value, found.overlap.value) == (1.0, 1.0, 1.0)
        assert (found.spearman.low, found.spearman.high, found.overlap.low) == (1.0, 1.0, 1.0)
        assert not found.warns
        assert "carries over" in found.sentence
    for found in run(x, -x):
        assert (found.spearman.value, found.signs.value, found.overlap.value) == (-1.0, 0.0, 0.0)
        assert found.warns


def test_unrelated_models_warn_and_overlap_as_chance_does() -> None:
    x, y = pair(4000, 0.0, anchors=1)
    (found,) = transfer(x[:400], y[:400], ["math"], 40, STREAM)
    assert found.warns
    assert "not what the target model would rank" in found.sentence
    assert found.by_chance == 0.1
    assert abs(found.overlap.value - 0.1) < 0.15
    assert found.spearman.low < 0 < found.spearman.high


def test_a_good_value_from_few_rows_asks_for_more() -> None:
    x, y = pair(12, 0.6, seed=1, anchors=1)
    (found,) = run(x, y)
    assert not found.warns
    assert found.spearman.low < 0.3
    assert "measure more rows" in found.sentence


def test_a_model_without_an_order_warns_instead_of_giving_a_number() -> None:
    x, _ = pair(12, 0.0, anchors=1)
    (found,) = run(x, np.full_like(x, 0.25))
    assert np.isnan(found.spearman.value)
    assert found.warns
    assert "no order" in found.sentence


def test_coverage_of_the_interval_is_near_what_it_says() -> None:
    # Spearman of a bivariate normal: 6/pi asin(rho/2)
    truth, hits = 6 / np.pi * np.arcsin(0.5 / 2), 0
    for seed in range(60):
        x, y = pair(60, 0.5, seed, anchors=1)
        (found,) = run(x, y)
        hits += found.spearman.low <= truth <= found.spearman.high
    assert hits >= 51  # 95% of 60 is 57


@pytest.mark.parametrize("k", [0, 21])
def test_our_own_mistakes_are_refused(k: int) -> None:
    x, y = pair(20, 0.5)
    with pytest.raises(ValueError, match="k"):
        run(x, y, k)
    with pytest.raises(ValueError, match="finite"):
        run(np.where(x == x[0, 0], np.nan, x), y)
    with pytest.raises(ValueError, match="names"):
        transfer(x, y, ["one"], 5, STREAM)
