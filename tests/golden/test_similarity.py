"""Hand-computed scores against one and two anchors."""

from __future__ import annotations

import numpy as np
import pytest

from gradsift.geometry.similarity import (
    clipped_conflict,
    conf_cone,
    conf_max,
    conflict,
    cosines,
    mean_cosine,
    orth_sub,
    orthogonality,
    row_scale,
)

ONE = [  # g, c, Orth, Conf, Conf+ against (1, 0)
    ((3, 4), 0.6, 0.4, -0.6, 0.0),
    ((-3, 4), -0.6, 0.4, 0.6, 0.6),
    ((0, 2), 0.0, 1.0, 0.0, 0.0),
    ((2, 0), 1.0, 0.0, -1.0, 0.0),
    ((-1, 0), -1.0, 0.0, 1.0, 1.0),
]


@pytest.mark.parametrize(("g", "c", "orth", "conf", "clipped"), ONE)
def test_one_anchor(g, c, orth, conf, clipped):
    g = np.array([g], dtype=float)
    cos = cosines(g @ np.array([[1.0], [0.0]]), np.linalg.norm(g, axis=1))
    np.testing.assert_allclose(cos, [[c]], atol=1e-15)
    np.testing.assert_allclose(orthogonality(cos), [[orth]], atol=1e-15)
    np.testing.assert_allclose(conflict(cos), [[conf]], atol=1e-15)
    np.testing.assert_allclose(clipped_conflict(cos), [[clipped]], atol=1e-15)


def test_a_zero_row_has_no_score():
    zero, gram = np.zeros((1, 2)), np.eye(2)
    assert np.isnan(cosines(zero, np.zeros(1))).all()
    assert np.isnan(orthogonality(cosines(zero, np.zeros(1)))).all()
    for rule in (orth_sub, conf_cone, mean_cosine):
        assert np.isnan(rule(zero, np.zeros(1), gram)).all()


U = np.array([[1.0, 0.0, 0.0], [-0.6, 0.8, 0.0]])
TWO = [  # g, cosines, conf_max, cosine with the mean, orth_sub, conf_cone
    ((-1, -2, 2), (-0.3333, -0.3333), 0.3333, -0.7454, 0.2546, 0.7454),
    ((1, 0.5, 1), (0.6667, -0.1333), 0.1333, 0.5963, 0.2546, 0.1333),
    ((-1, 1, 1), (-0.5774, 0.8083), 0.5774, 0.2582, 0.1835, 0.5774),
]


@pytest.mark.parametrize(("g", "cos", "worst", "mean", "sub", "cone"), TWO)
def test_two_anchors(g, cos, worst, mean, sub, cone):
    g = np.array([g], dtype=float)
    gram, dots, norms = U @ U.T, g @ U.T, np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(np.linalg.eigvalsh(gram), [0.4, 1.6])
    found = cosines(dots, norms)
    np.testing.assert_allclose(found, [cos], atol=5e-5)
    np.testing.assert_allclose(conf_max(found), [worst], atol=5e-5)
    np.testing.assert_allclose(mean_cosine(dots, norms, gram), [mean], atol=5e-5)
    np.testing.assert_allclose(orth_sub(dots, norms, gram), [sub], atol=5e-5)
    np.testing.assert_allclose(conf_cone(dots, norms, gram), [cone], atol=5e-5)


def test_opposed_anchors_cancel_in_their_mean():
    opposed = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert np.isnan(mean_cosine(np.ones((3, 2)), np.ones(3), opposed @ opposed.T)).all()
    weighted = mean_cosine(np.array([[1.0, -1.0]]), np.ones(1), opposed @ opposed.T, np.array([3.0, 1.0]))
    np.testing.assert_allclose(weighted, [1.0])


def test_row_scales():
    norms = np.array([1.0] * 99 + [50.0])
    assert row_scale(norms, "raw").tolist() == [1.0] * 100
    np.testing.assert_allclose(row_scale(norms, "unit") * norms, 1.0)
    clipped = row_scale(norms, "clipped")
    assert (clipped[:99] == 1).all()
    assert clipped[99] * 50 == pytest.approx(np.quantile(norms, 0.99))
