"""Curvature of the held-out losses and of the training rows, in the short axes and of low rank (ogs.md 3.3, gn_sketch; ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.policy.coordinates import Coordinates

RANK = 64


@dataclass(frozen=True)
class Curvature:
    """Low-rank curvature, H = F'F; an empirical Fisher where the rows' labels are the data's.

    Args:
        losses: float64 [A, r, q] factor per held-out loss.
        train: float64 [G, r, q] factor per group of rows.
        group: int64 [N] group of each row.
        stand_in: whether pool rows stood in for the rows of a held-out set.
    """

    losses: Float[np.ndarray, "A r q"]
    train: Float[np.ndarray, "G r q"]
    group: Int[np.ndarray, " N"]
    stand_in: bool = False


def factor(features: Float[np.ndarray, "n q"], rank: int = RANK) -> Float[np.ndarray, "r q"]:
    """Factor the mean outer product of some gradients.

    Args:
        features: per-example gradients in the axes.
        rank: largest r.

    Returns:
        float64 [r, q] F with F'F = Y'Y/n, cut to its leading part when n exceeds the rank.
    """
    if len(features) <= rank:
        return features / np.sqrt(len(features))
    values, vectors = np.linalg.eigh(features.T @ features / len(features))
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    return (vectors * np.sqrt(np.maximum(values, 0.0))).T


def make_curvature(
    coordinates: Coordinates,
    features: Sequence[Float[np.ndarray, "n q"]],
    *,
    group: Int[np.ndarray, " N"] | None = None,
    rank: int = RANK,
    stand_in: bool = False,
) -> Curvature:
    """Build the curvature of order 2.

    Args:
        coordinates: the pool.
        features: for each of the A losses per-example gradients of its rows in the axes (``Frame.place_sketch``), or
            pool rows of the same kind.
        group: int64 [N] group (cluster) of each row, 0..G-1; one group for the whole pool when None.
        rank: largest rank of a factor.
        stand_in: whether ``features`` are pool rows.

    Returns:
        The curvature.
    """
    if len(features) != len(coordinates.names):
        raise ValueError(f"curvature of {len(features)} losses, expected {len(coordinates.names)}")
    member = np.zeros(len(coordinates.rows), dtype=np.int64) if group is None else np.asarray(group, dtype=np.int64)
    kinds = [coordinates.rows[member == g] for g in range(int(member.max()) + 1)]
    return Curvature(_stack(features, rank), _stack(kinds, rank), member, stand_in)


def _stack(features: Sequence[Float[np.ndarray, "n q"]], rank: int) -> Float[np.ndarray, "A r q"]:
    factors = [factor(some, rank) for some in features]
    out = np.zeros((len(factors), max(len(f) for f in factors), factors[0].shape[1]))
    for place, one in zip(out, factors, strict=True):
        place[: len(one)] = one
    return out
