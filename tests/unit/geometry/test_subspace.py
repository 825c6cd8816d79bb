"""Subspace and cone of several anchors: the golden table of ogs.md section 8 and twins on the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from gradsift.geometry.similarity import clipped_conflict, conf_max, cosines, mean_cosine
from gradsift.geometry.subspace import energy, protection

U = np.array([[1.0, 0, 0], [-0.6, 0.8, 0]])


def facts(g: np.ndarray, u: np.ndarray = U) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return g @ u.T, np.linalg.norm(g, axis=1), u @ u.T


@pytest.mark.parametrize(
    ("g", "cos", "worst", "mean", "sub", "cone"),
    [
        ((-1, -2, 2), (-0.3333, -0.3333), 0.3333, -0.7454, 0.2546, 0.7454),
        ((1, 0.5, 1), (0.6667, -0.1333), 0.1333, 0.5963, 0.2546, 0.1333),
        ((-1, 1, 1), (-0.5774, 0.8083), 0.5774, 0.2582, 0.1835, 0.5774),
    ],
)
def test_golden_table(g, cos, worst, mean, sub, cone) -> None:
    dots, norms, gram = facts(np.array([g], dtype=float))
    np.testing.assert_allclose(np.linalg.eigvalsh(gram), [0.4, 1.6], atol=1e-12)
    found = protection(dots, norms, gram)
    each = cosines(dots, norms)
    got = [*each[0], conf_max(each)[0], mean_cosine(dots, norms, gram)[0], found.orth_sub[0], found.conf_cone[0]]
    np.testing.assert_allclose(got, [*cos, worst, mean, sub, cone], atol=5e-5)
    np.testing.assert_allclose(found.energy, [(1 - sub) ** 2], atol=1e-4)


@given(st.integers(1, 4), st.integers(0, 999))
def test_equal_what_the_vectors_say(m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((m, 9))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    g = rng.standard_normal((5, 9))
    found = protection(*facts(g, u))
    length = np.linalg.norm(g, axis=1)
    kept = np.linalg.eigvalsh(u @ u.T)
    if kept[0] / kept.sum() > 0.011:  # no direction is dropped: the plain projection
        basis = np.linalg.qr(u.T)[0]
        np.testing.assert_allclose(found.energy, ((g @ basis) ** 2).sum(1) / length**2, atol=1e-9)
    for row, removed in zip(g, found.conf_cone, strict=True):
        dual = minimize(
            lambda v, row=row: 0.5 * ((row + v @ u) ** 2).sum(), np.zeros(m), jac=lambda v, row=row: u @ (row + v @ u),
            bounds=[(0, None)] * m, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        assert removed == pytest.approx(np.linalg.norm(dual.x @ u) / np.linalg.norm(row), abs=1e-5)


@given(st.integers(0, 999))
def test_one_anchor_gives_the_clipped_conflict_and_the_squared_cosine(seed: int) -> None:
    g = np.random.default_rng(seed).standard_normal((6, 3))
    dots, norms, gram = facts(g, U[:1])
    found, cos = protection(dots, norms, gram), cosines(dots, norms)[:, 0]
    np.testing.assert_allclose(found.conf_cone, clipped_conflict(cos), atol=1e-12)
    np.testing.assert_allclose(found.energy, cos**2, atol=1e-12)


def test_scale_does_not_matter_and_repeated_directions_count_once() -> None:
    g = np.random.default_rng(0).standard_normal((6, 3))
    once, twice = protection(*facts(g)), protection(*facts(7 * g, np.concatenate([U, U[:1]])))
    for name in ("energy", "orth_sub", "conf_cone"):
        np.testing.assert_allclose(getattr(once, name), getattr(twice, name), atol=1e-6)


def test_a_weak_direction_is_dropped_by_its_share() -> None:
    near = np.array([[1.0, 0, 0], [np.cos(0.05), np.sin(0.05), 0]])
    g = np.array([[0.0, 1.0, 0.0]])
    assert energy(*facts(g, near))[0] < 1e-3
    assert energy(*facts(g, near), share=1.0, floor=0.0)[0] == pytest.approx(1.0)


def test_a_row_without_a_gradient_has_no_figure() -> None:
    found = protection(*facts(np.zeros((1, 3))))
    assert np.isnan([found.energy[0], found.orth_sub[0], found.conf_cone[0]]).all()
