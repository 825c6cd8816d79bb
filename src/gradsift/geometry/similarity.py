"""Per-example geometry against protected directions: cosine, orthogonality, conflict, subspace, cone.

Everything comes from exact dots with unit anchor directions, row norms and, where several anchors are combined, the
anchors' Gram matrix. Orth and Conf follow secondary summaries of arXiv 2602.06359; the subspace and cone forms are ours.
A row of norm 0 has no direction: all its values are NaN, never "perfectly orthogonal". N rows, M anchors.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

Scale = Literal["clipped", "raw", "unit"]


def row_scale(norms: Float[np.ndarray, " N"], scale: Scale) -> Float[np.ndarray, " N"]:
    """Factor rho_i by which a row's gradient counts, h_i = rho_i g_i (ours).

    Args:
        norms: [N] norms of the rows, > 0.
        scale: ``raw`` 1; ``clipped`` min(1, q99(|g|) / |g_i|), so that no row outweighs the 99th percentile;
            ``unit`` 1 / |g_i|, which turns dots into cosines.

    Returns:
        float64 [N], > 0.
    """
    if scale == "unit":
        return 1.0 / norms
    if scale == "clipped":
        return np.minimum(1.0, np.quantile(norms, 0.99) / norms)
    return np.ones(len(norms))


def cosines(dots: Float[np.ndarray, "N M"], norms: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N M"]:
    """Cosine of every row with every anchor, c_im = <u_m, g_i> / |g_i|.

    Args:
        dots: [N, M] dots with the anchors' unit directions.
        norms: [N] norms of the rows.

    Returns:
        float64 [N, M] in [-1, 1]; NaN for rows of norm 0.
    """
    return _over_norm(np.asarray(dots, dtype=np.float64), norms)


def orthogonality(cos: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Orth = 1 - |c|: 1 where a row neither helps nor harms; two-sided, so help and harm of equal size tie.

    Args:
        cos: cosines, any shape.

    Returns:
        The same shape, in [0, 1].
    """
    return 1.0 - np.abs(cos)


def conflict(cos: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Conf = -c: above 0 a step on the row raises the anchor's loss, below 0 it lowers it.

    Args:
        cos: cosines, any shape.

    Returns:
        The same shape, in [-1, 1].
    """
    return -cos


def clipped_conflict(cos: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Conf+ = max(0, -c): the harm alone.

    Args:
        cos: cosines, any shape.

    Returns:
        The same shape, in [0, 1].
    """
    return np.maximum(0.0, -cos)


def conf_max(cos: Float[np.ndarray, "N M"]) -> Float[np.ndarray, " N"]:
    """Largest conflict with any anchor, max_m(-c_im).

    Args:
        cos: [N, M] cosines, M >= 1.

    Returns:
        float64 [N] in [-1, 1].
    """
    return (-cos).max(axis=1)


def orth_min(cos: Float[np.ndarray, "N M"]) -> Float[np.ndarray, " N"]:
    """Least orthogonality over the anchors, min_m(1 - |c_im|).

    Args:
        cos: [N, M] cosines, M >= 1.

    Returns:
        float64 [N] in [0, 1].
    """
    return orthogonality(cos).min(axis=1)


def mean_cosine(
    dots: Float[np.ndarray, "N M"],
    norms: Float[np.ndarray, " N"],
    gram: Float[np.ndarray, "M M"],
    weights: Float[np.ndarray, " M"] | None = None,
) -> Float[np.ndarray, " N"]:
    """Cosine with one averaged anchor, sum_m weight_m u_m; opposed sources cancel in it.

    Args:
        dots: [N, M] dots with the unit directions.
        norms: [N] norms of the rows.
        gram: [M, M] dots between the unit directions.
        weights: [M]; equal by default, the anchors' norms for the mean of the gradients themselves.

    Returns:
        float64 [N]; NaN for rows of norm 0, and everywhere when the mean is the zero vector.
    """
    mix = np.full(dots.shape[1], 1.0 / dots.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    length = np.sqrt(max(0.0, float(mix @ gram @ mix)))
    if length <= 1e-12 * float(np.abs(mix).sum()):
        return np.full(len(dots), np.nan)
    return _over_norm(dots @ mix / length, norms)


def orth_sub(
    dots: Float[np.ndarray, "N M"],
    norms: Float[np.ndarray, " N"],
    gram: Float[np.ndarray, "M M"],
    *,
    share: float = 0.99,
    floor: float = 1e-3,
) -> Float[np.ndarray, " N"]:
    """1 minus the share of a row's length inside the anchors' leading subspace (two-sided, several anchors; ours).

    Args:
        dots: [N, M] dots with the unit directions.
        norms: [N] norms of the rows.
        gram: [M, M] dots between the unit directions.
        share: leading eigenvalues are kept until they hold this share of the trace,
        floor: as long as they are at least this part of the largest.

    Returns:
        float64 [N] in [0, 1] up to the error of the dots; NaN for rows of norm 0.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int(np.searchsorted(np.cumsum(values) / values.sum(), share - 1e-12)) + 1
    rank = min(rank, int((values >= floor * values[0]).sum()))
    inside = dots @ vectors[:, :rank] / np.sqrt(values[:rank])
    return 1.0 - _over_norm(np.linalg.norm(inside, axis=1), norms)


def conf_cone(
    dots: Float[np.ndarray, "N M"], norms: Float[np.ndarray, " N"], gram: Float[np.ndarray, "M M"]
) -> Float[np.ndarray, " N"]:
    """Share of a row that a projection onto {g: <u_m, g> >= 0 for all m} removes (one-sided; ours, after GEM).

    v* = argmin_{v >= 0} 1/2 v'Kv + a'v, conf_cone = sqrt(v*'Kv*) / |g|; with one anchor this is Conf+ exactly. Solved
    as a non-negative least-squares problem in M dimensions, only for rows that oppose some anchor.

    Args:
        dots: [N, M] dots a with the unit directions.
        norms: [N] norms of the rows.
        gram: [M, M] K, dots between the unit directions; may be singular.

    Returns:
        float64 [N] in [0, 1] up to the error of the dots; NaN for rows of norm 0.
    """
    from scipy.optimize import nnls

    if dots.shape[1] == 1:
        return _over_norm(np.maximum(0.0, -dots[:, 0]) / np.sqrt(float(gram[0, 0])), norms)
    values, vectors = np.linalg.eigh(gram)
    keep = values > 1e-12 * values[-1]
    root = np.sqrt(values[keep])[:, None] * vectors[:, keep].T  # K = root'root
    opposed = np.flatnonzero((dots < 0).any(axis=1))
    # root'b = -a, so |root v - b|^2 = 2 (1/2 v'Kv + a'v) + const; the projection's length follows by Pythagoras.
    sides = -(dots[opposed] @ vectors[:, keep]) / np.sqrt(values[keep])
    removed = np.zeros(len(dots))
    for row, side in zip(opposed, sides, strict=True):
        removed[row] = np.linalg.norm(root @ nnls(root, side)[0])
    return _over_norm(removed, norms)


def _over_norm(values: Float[np.ndarray, "N ..."], norms: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N ..."]:
    """Divide rows by their norms; NaN where the norm is 0."""
    known = np.where(norms > 0, norms, np.nan)
    return values / known.reshape(-1, *[1] * (values.ndim - 1))
