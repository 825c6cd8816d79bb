"""Three scores from one Gram matrix: the KL and sign goldens of dids.md, normalization and the rank test."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gradsift.errors import NumericsError
from gradsift.geometry.impact import SCORES, impact_scores, rank_test, shift_min_columns, softmax_columns, spearman
from gradsift.geometry.mixture import effective_number
from gradsift.geometry.potential import Curve, fit_curve, potential

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
THETA = np.array([[0.5, -0.2], [0.1, 0.4], [-0.3, 0.2]])
INPUTS = np.array([[1.0, 0], [0.5, 1], [-1, 0.5]])


def probabilities(theta):
    logits = INPUTS @ theta.T
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def gradient(rows, labels):
    p = probabilities(THETA)
    return np.mean([np.outer(p[i] - np.eye(3)[y], INPUTS[i]) for i, y in zip(rows, labels, strict=True)], axis=0)


def fisher():
    out = np.zeros((6, 6))
    for p, x in zip(probabilities(THETA), INPUTS, strict=True):
        out += np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x)) / 3
    return out


def gram(g, h, f):
    both = np.vstack([g, h])
    return both @ f @ both.T


@pytest.mark.parametrize(
    ("eta", "true", "quadratic", "diagonal"),
    [(0.01, 7.711746e-6, 7.712061e-6, 5.520229e-6), (0.1, 7.708433e-4, 7.712061e-4, 5.520229e-4),
     (0.5, 1.920790e-2, 1.928015e-2, 1.380057e-2)],
)  # fmt: skip
def test_the_golden_kl_and_its_quadratic_forms(eta, true, quadratic, diagonal):
    g, h = gradient([0, 1], [0, 1]), gradient([1, 2], [1, 0])
    p, q = probabilities(THETA - eta * g), probabilities(THETA - eta * h)
    assert np.mean((p * np.log(p / q)).sum(axis=1)) == pytest.approx(true, rel=1e-6)
    flat, full = (g.reshape(1, -1), h.reshape(1, -1)), fisher()
    for f, wanted in ((full, quadratic), (np.diag(np.diag(full)), diagonal)):
        score = impact_scores(gram(*flat, f), 1)["diff_kl"][0, 0]
        assert -(eta**2) * score == pytest.approx(wanted, rel=1e-6)


@quick
@given(st.integers(0, 10**6))
def test_scores_equal_their_definitions_and_cosines_know_no_length(seed):
    rng = np.random.default_rng(seed)
    g, h, f = rng.normal(size=(4, 7)), rng.normal(size=(2, 7)), rng.uniform(0.1, 2, size=7)
    scores = impact_scores(gram(g, h, np.diag(f)), 4)
    for i in range(4):
        for j in range(2):
            assert scores["diff_kl"][i, j] == pytest.approx(-0.5 * ((h[j] - g[i]) ** 2 * f).sum(), abs=1e-10)
            assert scores["inner"][i, j] == pytest.approx((g[i] * f * h[j]).sum(), abs=1e-10)
    longer = impact_scores(gram(g * rng.uniform(0.1, 9, size=(4, 1)), 3 * h, np.diag(f)), 4)
    assert np.allclose(longer["cos"], scores["cos"], atol=1e-12)
    assert not np.allclose(longer["inner"], scores["inner"])


def test_a_gradient_of_length_zero_is_named():
    with pytest.raises(NumericsError, match="zero or not finite") as refusal:
        impact_scores(np.diag([1.0, 0.0, 1.0]), 2)
    assert refusal.value.where == "domain number 1"
    with pytest.raises(NumericsError) as refusal:
        impact_scores(np.diag([1.0, 1.0, np.inf]), 2)
    assert refusal.value.where == "task number 0"


ALIGNED = np.array([[0.8], [0.2], [-0.4]])


def test_the_golden_sign_test_and_what_it_must_reject():
    assert np.allclose(shift_min_columns(ALIGNED)[:, 0], [2 / 3, 1 / 3, 0])
    soft = softmax_columns(ALIGNED, 0.4)[:, 0]
    assert np.abs(soft - [0.785597, 0.175290, 0.039113]).max() < 5e-7
    release = (ALIGNED.max() - ALIGNED) / (ALIGNED.max() - ALIGNED).sum()
    assert np.allclose(release[:, 0], [0, 1 / 3, 2 / 3])
    for ours in (shift_min_columns(ALIGNED), softmax_columns(ALIGNED), softmax_columns(ALIGNED, 0.4)):
        assert spearman(ours[:, 0], ALIGNED[:, 0]) == pytest.approx(1)
    assert spearman(release[:, 0], ALIGNED[:, 0]) == pytest.approx(-1)


@quick
@given(st.integers(2, 9), st.integers(0, 10**6), st.floats(0.01, 100))
def test_columns_sum_to_one_order_as_the_scores_and_let_about_half_count(k, seed, scale):
    scores = np.random.default_rng(seed).normal(size=(k, 3)) * scale
    for columns in (softmax_columns(scores), shift_min_columns(scores)):
        assert np.allclose(columns.sum(axis=0), 1, atol=1e-12)
        for share, score in zip(columns.T, scores.T, strict=True):
            assert spearman(share, score) > 0.999
    for column in softmax_columns(scores).T:
        assert effective_number(column) == pytest.approx(max(1.2, k / 2), abs=1e-6)
    assert np.allclose(softmax_columns(5 * scores), softmax_columns(scores), atol=1e-9)
    assert np.allclose(softmax_columns(scores[::-1]), softmax_columns(scores)[::-1], atol=1e-9)


def test_equal_scores_are_a_uniform_column():
    for how in (softmax_columns, shift_min_columns):
        assert np.allclose(how(np.full((4, 2), 3.0)), 0.25)


@quick
@given(st.lists(st.integers(-3, 3), min_size=3, max_size=9), st.integers(0, 99))
def test_spearman_equals_scipys_and_is_zero_where_nothing_varies(values, seed):
    first = np.array(values, dtype=float)
    second = np.random.default_rng(seed).normal(size=len(first))
    if len(set(values)) == 1:
        assert spearman(first, second) == 0
    else:
        assert spearman(first, second) == pytest.approx(float(spearmanr(first, second).statistic))


def test_the_rank_test_holds_all_scores_in_all_metrics_against_measured_steps():
    rng = np.random.default_rng(1)
    g, h, eta = rng.normal(size=(6, 9)), rng.normal(size=(2, 9)), 1e-3
    drops = eta * g @ h.T  # the first order of a step on each domain
    f = np.diag(rng.uniform(0.5, 2, size=9))
    found = rank_test({"identity": gram(g, h, np.eye(9)), "other": gram(g, h, f)}, drops, 5)
    assert set(found.rho) == {f"{s}/{m}" for s in SCORES for m in ("identity", "other")}
    assert found.rho["inner/identity"] == pytest.approx(1)
    against = rank_test({"identity": gram(g, h, np.eye(9))}, -drops, 5)
    assert against.rho["inner/identity"] == pytest.approx(-1)
    assert found.round == 5


def test_the_golden_potential():
    losses = np.exp(-0.3 * np.arange(6)) + 2
    curve = fit_curve(losses)
    assert np.allclose([curve.a, curve.b, curve.c], [1, 0.3, 2], atol=1e-5)
    assert losses[-1] == pytest.approx(2.223130, abs=5e-7)
    assert Curve(1, 0.3, 2).at(11) == pytest.approx(2.036883, abs=5e-7)
    assert losses[-1] - curve.at(11) == pytest.approx(0.186247, abs=5e-6)
    assert potential(losses).value == pytest.approx(0.057831, abs=5e-6)


def test_a_rising_or_short_history_promises_nothing_and_a_steep_one_no_more_than_its_cap():
    assert potential(2 + 0.1 * np.arange(8)).value == 0
    assert potential(np.array([3.0, 2.5, 2.2, 2.0])).value == 0
    assert not potential(np.array([3.0, 2.5, 2.2, 2.0])).failed
    losses = np.array([3.0, 3.0, 3.0, 3.0, 2.999, 2.0])
    assert potential(losses).value <= 3 * max(0.0, float(np.median(-np.diff(losses)[-5:]))) + 1e-12


@quick
@given(st.lists(st.floats(0.1, 9), min_size=5, max_size=12))
def test_a_potential_is_finite_and_never_negative(losses):
    assert 0 <= potential(np.array(losses)).value < np.inf


def test_a_fit_that_fails_counts_and_is_zero(monkeypatch):
    monkeypatch.setattr("gradsift.geometry.potential.fit_curve", lambda losses: None)
    found = potential(np.exp(-0.3 * np.arange(6)) + 2)
    assert (found.value, found.failed) == (0.0, True)
