"""Scores in any dimension: invariances, and the definitions by full vectors."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from gradsift.geometry.similarity import (
    clipped_conflict,
    conf_cone,
    conf_max,
    conflict,
    cosines,
    mean_cosine,
    orth_min,
    orth_sub,
    orthogonality,
)

QUICK = settings(max_examples=25, deadline=None)


def vectors(seed: int, m: int, repeat: bool):
    rng = np.random.default_rng(seed)
    anchors = rng.normal(size=(m, 12))
    if repeat:
        anchors = np.vstack([anchors, anchors[:1]])  # a singular Gram matrix
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    return rng.normal(size=(20, 12)) * rng.exponential(size=(20, 1)), anchors


worlds = st.builds(vectors, st.integers(0, 2**32 - 1), st.integers(1, 5), st.booleans())


@QUICK
@given(worlds, st.floats(1e-3, 1e3))
def test_scores_depend_on_directions_alone(world, factor):
    g, u = world
    norms = np.linalg.norm(g, axis=1)
    cos = cosines(g @ u.T, norms)
    np.testing.assert_allclose(cosines(factor * g @ u.T, factor * norms), cos, atol=1e-12)
    np.testing.assert_allclose(orthogonality(cos), 1 - np.abs(conflict(cos)))
    np.testing.assert_allclose(conf_max(cos), np.max([-c for c in cos.T], axis=0))
    np.testing.assert_allclose(orth_min(cos), np.min([1 - np.abs(c) for c in cos.T], axis=0))
    for rule in (conf_cone, orth_sub, mean_cosine):
        np.testing.assert_allclose(
            rule(factor * g @ u.T, factor * norms, u @ u.T), rule(g @ u.T, norms, u @ u.T), atol=1e-9
        )


@QUICK
@given(worlds)
def test_cone_is_what_a_projection_removes(world):
    g, u = world
    found = conf_cone(g @ u.T, np.linalg.norm(g, axis=1), u @ u.T)
    for row, value in zip(g, found, strict=True):
        v, _ = nnls(u.T, -row)  # argmin |u'v + g|, in the full space
        assert abs(np.linalg.norm(u.T @ v) / np.linalg.norm(row) - value) < 1e-9
        assert ((row + u.T @ v) @ u.T >= -1e-9).all()


@QUICK
@given(worlds)
def test_one_anchor_cone_is_clipped_conflict(world):
    g, u = world
    dots, norms = g @ u[:1].T, np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(
        conf_cone(dots, norms, u[:1] @ u[:1].T), clipped_conflict(cosines(dots, norms))[:, 0], atol=1e-12
    )


@QUICK
@given(worlds)
def test_subspace_is_the_residual_of_leading_directions(world):
    g, u = world
    values, vectors_ = np.linalg.eigh(u.T @ u)
    values, basis = values[::-1], vectors_[:, ::-1]
    rank = next(r for r in range(1, len(values) + 1) if values[:r].sum() >= (0.99 - 1e-12) * values.sum())
    rank = min(rank, int((values >= 1e-3 * values[0]).sum()))
    outside = 1 - np.linalg.norm(g @ basis[:, :rank], axis=1) / np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(orth_sub(g @ u.T, np.linalg.norm(g, axis=1), u @ u.T), outside, atol=1e-7)
