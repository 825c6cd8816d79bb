"""Densities of gradient norms: the specification's figures, the slow twin, the grid, and bounds that hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import NumericsError
from gradsift.geometry import density
from gradsift.geometry.density import (
    Points,
    combine_norms,
    kernel_density,
    rank_correlation,
    robust_scale,
    scott_bandwidth,
    standard_score,
)

EMB = np.array([0.10, 0.12, 0.15, 0.16, 0.18, 0.20, 0.40, 1.5])
HEAD = np.array([0.5, 0.7, 0.6, 0.8, 0.75, 0.9, 1.6, 6])
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(density, "MIN_ROWS", 2)


def slow(values):
    num, axes = values.shape
    b = [np.std(values[:, f], ddof=1) * num ** (-1 / (axes + 4)) for f in range(axes)]
    out = []
    for i in range(num):
        total = 0.0
        for j in range(num):
            part = 1.0
            for f in range(axes):
                t = (values[i, f] - values[j, f]) / b[f]
                part *= np.exp(-t * t / 2) / np.sqrt(2 * np.pi) / b[f]
            total += part
        out.append(total / num)
    return np.array(out)


def ranked(values):
    return (np.argsort(-values, kind="stable") + 1).tolist()


def test_the_figures_of_the_specification(small):
    points = combine_norms(EMB, HEAD, "mean_log")
    np.testing.assert_allclose(
        points.line, [-1.016406, -0.452081, -0.413891, -0.019779, 0.019779, 0.331920, 1.665924, 4.468662], atol=1e-6
    )
    assert float(scott_bandwidth(points.values)[0]) == pytest.approx(1.159934, abs=1e-6)
    rho = kernel_density(points).rho
    np.testing.assert_allclose(
        rho, [0.202164, 0.246174, 0.247782, 0.252408, 0.251669, 0.238833, 0.117861, 0.045450], atol=1e-6
    )
    assert ranked(rho) == [4, 5, 3, 2, 6, 1, 7, 8]
    assert ranked(kernel_density(combine_norms(EMB, HEAD, "sum_raw")).rho) == [4, 5, 6, 2, 3, 1, 7, 8]
    assert ranked(-np.abs(points.line - np.median(points.line))) == [4, 5, 6, 3, 2, 1, 7, 8]
    assert ranked(points.line) == [8, 7, 6, 5, 4, 3, 2, 1]


@few
@given(
    st.integers(0, 2**32 - 1),
    st.integers(20, 60),
    st.sampled_from(["mean_log", "sum_raw", "emb_only", "lm_only", "joint2d"]),
)
def test_it_equals_its_twin(seed, num, how):
    rng = np.random.default_rng(seed)
    points = combine_norms(*np.exp(rng.normal(size=(2, num))), how)
    assert points.values.shape == (num, 2 if how == "joint2d" else 1)
    np.testing.assert_allclose(kernel_density(points).rho, slow(points.values), rtol=1e-10)


def test_the_grid_is_within_a_thousandth(monkeypatch):
    rng = np.random.default_rng(3)
    points = Points(np.concatenate([rng.normal(size=4000), 4 + 0.3 * rng.standard_t(3, size=1000)])[:, None])
    want = kernel_density(points).rho
    monkeypatch.setattr(density, "DIRECT", 100)
    np.testing.assert_allclose(kernel_density(points).rho, want, rtol=1e-3)


@few
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["mean_log", "sum_raw", "lm_only", "joint2d"]),
    st.sampled_from([1e-4, 1e-2]),
)
def test_no_pair_moves_by_more_than_the_bound(seed, how, relative):
    rng = np.random.default_rng(seed)
    emb, head = np.exp(rng.normal(size=(2, 40)))
    points = combine_norms(emb, head, how, relative=relative)
    moved = [x * (1 + relative * rng.choice([-0.999, 0, 0.999], size=40)) for x in (emb, head)]
    again = combine_norms(*moved, how)
    assert np.abs(again.values - points.values).max() <= points.shift
    before, after = kernel_density(points), kernel_density(again)
    sums = [np.log(d.rho) + np.log(scott_bandwidth(p.values)).sum() for d, p in ((before, points), (after, again))]
    # The bandwidth moves every density by the same factor, so only what is left can change an order.
    assert np.abs(sums[1] - sums[0]).max() <= before.slack
    z, bound = standard_score(points)
    assert np.abs(standard_score(again)[0] - z).max() <= bound


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.003, 0.03]), st.sampled_from([1, 2]))
def test_values_that_move_by_all_of_their_shift_stay_within_the_slack(seed, shift, axes):
    rng = np.random.default_rng(seed)
    points = Points(np.concatenate([0.05 * rng.normal(size=(12, axes)), rng.normal(size=(12, axes))]), shift)
    center = points.values[:12].mean(axis=0)
    for away in (1.0, -1.0):  # everything leaves the dense part, or closes in on it
        again = Points(points.values + away * shift * np.sign(points.values - center), shift)
        sums = [np.log(kernel_density(p).rho) + np.log(scott_bandwidth(p.values)).sum() for p in (points, again)]
        assert np.abs(sums[1] - sums[0]).max() <= kernel_density(points).slack


def test_a_lone_row_and_a_crowd_that_meet_halfway_stay_within_the_slack():
    crowd, shift = np.zeros(150), 0.05
    b = float(scott_bandwidth(np.concatenate([crowd, crowd + 10])[:, None])[0])
    place = np.concatenate([[-3.4 * b], crowd, crowd + 10])
    moved = place + shift * np.concatenate([[1.0], crowd - 1.0, crowd])
    before, after = (kernel_density(Points(x[:, None], shift)) for x in (place, moved))
    change = np.log(after.rho[0] / before.rho[0]) + np.log(moved.std(ddof=1) / place.std(ddof=1))
    assert 0.5 * before.slack < abs(change) <= before.slack


def test_without_noise_nothing_can_move():
    points = combine_norms(*np.exp(np.random.default_rng(1).normal(size=(2, 30))), "mean_log")
    assert points.shift == kernel_density(points).slack == standard_score(points)[1] == 0


@few
@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_changes_nothing(seed, factor):
    emb, head = np.exp(np.random.default_rng(seed).normal(size=(2, 25)))
    one, other = combine_norms(emb, head, "mean_log"), combine_norms(factor * emb, factor * head, "mean_log")
    np.testing.assert_allclose(one.values, other.values, atol=1e-8)


def test_a_density_that_is_not_defined_is_refused():
    with pytest.raises(NumericsError, match="undefined") as refusal:
        robust_scale(np.array([1.0] * 30 + [2.0]))
    assert "31 rows" in str(refusal.value)
    assert "interquartile range 0" in str(refusal.value)
    with pytest.raises(NumericsError, match="19 rows"):
        kernel_density(Points(np.arange(19.0)[:, None]))
    with pytest.raises(NumericsError, match="standard deviation"):
        kernel_density(Points(np.ones((30, 1))))


def test_top_density_at_one_half_is_the_middle_band_of_a_unimodal_signal():
    s = np.random.default_rng(4).normal(size=20_000)
    rho = kernel_density(Points(s[:, None])).rho
    dense, middle = (set(np.argsort(-v, kind="stable")[:10_000].tolist()) for v in (rho, -np.abs(s - np.median(s))))
    assert len(dense & middle) >= 0.98 * 10_000


def test_rank_correlation_equals_scipy_s():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 9, size=50).astype(float), rng.normal(size=50)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0
