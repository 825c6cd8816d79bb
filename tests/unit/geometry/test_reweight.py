"""Update rules of domain weights: goldens of doge.md and doremi.md, and what holds for any numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import NumericsError
from gradsift.geometry.reweight import (
    alignment,
    dro_step,
    entropic_evidence,
    entropic_step,
    fill_absent,
    largest_log_step,
    root_step,
    token_excess,
)

A, DOTS, NORMS = np.array([0.5, 0.3, 0.2]), np.array([0.8, -0.3, 0.1]), np.array([1.0, 0.5, 1.5])
ETA, MU = 5e-4, 0.01
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
numbers = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=2, max_size=6).map(np.array)


def test_doges_golden_step():
    assert np.allclose(entropic_evidence(DOTS, NORMS, ETA, "none"), [4e-4, -1.5e-4, 5e-5], rtol=1e-12)
    ours = entropic_step(A, entropic_evidence(DOTS, NORMS, ETA), MU)
    release = entropic_step(A, entropic_evidence(DOTS, NORMS, ETA, "release"), MU)
    assert np.abs(ours - [0.511736, 0.290610, 0.197654]).max() < 5e-7
    assert np.abs(release - [0.509498, 0.293712, 0.196790]).max() < 5e-7


@quick
@given(numbers)
def test_doges_golden_bound_no_log_weight_moves_by_more_than_a_quarter(dots):
    norms = np.ones(len(dots))
    for clip in ("signed", "release"):
        evidence = entropic_evidence(dots, norms, ETA, clip)
        assert largest_log_step(evidence, MU) <= 0.25 + 1e-12
        assert (evidence >= 0).all() or clip == "signed"
    assert largest_log_step(entropic_evidence(np.array([1e3, 0.0]), np.ones(2), ETA), MU) == pytest.approx(0.25)


def test_doges_golden_absence():
    carried, present = np.array([4e-4, -1.5e-4, 5e-5]), np.array([True, False, True])
    now = np.array([1e-4, 9.9, 2e-4])
    assert fill_absent(now, carried, present, "zero").tolist() == [1e-4, 0.0, 2e-4]
    assert fill_absent(now, carried, present, "decay")[1] == pytest.approx(0.9 * -1.5e-4)
    moved = entropic_step(A, fill_absent(now, carried, present, "zero"), MU)
    others = entropic_step(A, np.array([1e-4, 0.0, 2e-4]), MU)
    assert np.array_equal(moved, others)  # its weight changes by the normalization alone


@quick
@given(numbers, st.floats(0.1, 10))
def test_weights_stay_on_the_simplex_and_do_not_know_their_places_or_units(evidence, scale):
    k = len(evidence)
    weights = np.arange(1, k + 1) / (k * (k + 1) / 2)
    found = entropic_step(weights, evidence, 5.0)
    assert abs(found.sum() - 1) < 1e-12
    order = np.random.default_rng(k).permutation(k)
    assert np.allclose(entropic_step(weights[order], evidence[order], 5.0), found[order], atol=1e-12)
    assert np.allclose(entropic_step(weights, scale * evidence, 5.0 * scale), found, atol=1e-12)
    assert np.allclose(entropic_step(weights, evidence + 7, 5.0), found, atol=1e-12)
    slow = weights * np.exp(evidence / 5.0)
    assert np.allclose(found, slow / slow.sum(), atol=1e-12)


def test_alignment_equals_the_sum_over_pairs_of_examples():
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, 9)) for n in (3, 5, 4)]
    target = rng.normal(size=(6, 9))
    means = np.stack([r.mean(axis=0) for r in (*rows, target)])
    slow = [np.mean([a @ b for a in some for b in target]) for some in rows]
    assert np.allclose(alignment(means @ means.T, 3), slow, atol=1e-10)
    universal = means[:3] @ means[:3].sum(axis=0)
    assert np.allclose(alignment(means[:3] @ means[:3].T, 3), universal)
    alone = alignment(means[:3] @ means[:3].T, 3, drop_self=True)
    assert np.allclose(alone, universal - (means[:3] ** 2).sum(axis=1))


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_a_gradient_without_direction_is_refused(bad):
    gram = np.eye(3)
    gram[1] = gram[:, 1] = 0.0
    gram[1, 1] = bad
    with pytest.raises(NumericsError, match="zero or not finite"):
        alignment(gram, 2)


ONE, TWO = (np.array([2.0, 3, 1]), np.array([2.5, 2, 1.2])), (np.array([1.5, 1.5]), np.array([1.0, 2.5]))


def test_doremis_golden_excess_is_clipped_per_token_and_not_per_mean():
    assert token_excess(*ONE)[0] == pytest.approx(0.333333, abs=5e-7)
    assert token_excess(*TWO)[0] == pytest.approx(0.25)
    per_mean = [max(0.0, float(p.mean() - r.mean())) for p, r in (ONE, TWO)]
    assert per_mean == [pytest.approx(0.1), 0.0]
    other = (np.array([1.5, 1.0]), np.array([1.0, 2.5]))  # the rules can differ in order
    assert token_excess(*other)[0] == pytest.approx(0.25)
    assert (other[0] - other[1]).mean() == pytest.approx(-0.5)


def test_doremis_golden_update():
    half = np.array([0.5, 0.5])
    excess = np.array([token_excess(*ONE)[0], token_excess(*TWO)[0]])
    assert np.abs(entropic_step(half, excess, 1.0) - [0.520821, 0.479179]).max() < 5e-7
    assert np.abs(dro_step(half, excess, 1.0, 1e-3) - [0.520800, 0.479200]).max() < 5e-7
    assert np.abs(dro_step(half, np.array([0.1, 0.0]), 1.0, 1e-3) - [0.524954, 0.475046]).max() < 5e-7


@quick
@given(numbers, st.floats(0, 0.5))
def test_doremis_floor_and_what_equal_excess_does(excess, c):
    excess, k = np.abs(excess), len(excess)
    weights = np.full(k, 1 / k)
    found = dro_step(weights, excess, 1.0, c)
    assert (found >= c / k - 1e-15).all()
    assert abs(found.sum() - 1) < 1e-12
    skewed = np.arange(1, k + 1) / (k * (k + 1) / 2)
    assert np.allclose(dro_step(skewed, np.full(k, 3.0), 1.0, c), (1 - c) * skewed + c / k)


@quick
@given(st.lists(st.floats(0, 9), min_size=1, max_size=8), st.floats(-5, 5))
def test_excess_is_never_negative_and_does_not_see_a_shift_of_both(losses, shift):
    proxy = np.array(losses)
    reference = proxy[::-1] + 0.25
    excess, positive = token_excess(proxy, reference)
    assert excess >= 0
    assert 0 <= positive <= 1
    assert token_excess(proxy + shift, reference + shift)[0] == pytest.approx(excess, abs=1e-9)
    assert token_excess(proxy, proxy)[0] == token_excess(proxy, proxy + 1)[0] == 0


C = np.array([4.0, 1, 1])


def quotient_path(beta, rounds):
    """The release's map: p <- beta p + (1 - beta) q, q proportional to c / p."""
    p, seen = np.full(3, 1 / 3), []
    for _ in range(rounds):
        q = C / p
        p = beta * p + (1 - beta) * q / q.sum()
        seen.append(p[0])
    return seen


@pytest.mark.parametrize(
    ("beta", "wanted"),
    [(0.2, [0.6, 0.44, 0.536, 0.4784, 0.51296]), (0.5, [0.5, 0.5, 0.5]), (0.8, [0.4, 0.44, 0.464, 0.4784])],
)
def test_the_golden_dynamics_lead_where_the_root_step_leads(beta, wanted):
    path = quotient_path(beta, 40)
    assert np.allclose(path[: len(wanted)], wanted, atol=5e-5)
    low, high = np.zeros(3), np.ones(3)
    assert path[-1] == pytest.approx(root_step(np.full(3, 1 / 3), C, 0.0, low=low, high=high)[0], abs=1e-4)


def test_the_release_oscillates_for_ever_and_the_root_step_halves_its_error():
    path = quotient_path(0.0, 9)
    assert path[0] - path[1] == pytest.approx(path[-1] - path[-2], abs=1e-9)
    p, low, high = np.full(3, 1 / 3), np.zeros(3), np.ones(3)
    for n in range(1, 8):
        p = root_step(p, C, 0.5, low=low, high=high)
        assert 0.5 - p[0] == pytest.approx((0.5 - 1 / 3) / 2**n, abs=1e-9)
