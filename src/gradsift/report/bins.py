"""Rows made few enough to draw: histograms and keyed samples (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.seeds import stream

MAX_POINTS = 20_000
MIN_BINS, MAX_BINS = 12, 28


@dataclass(frozen=True)
class Bins:
    """Two histograms over the same bins, each as shares of its own rows.

    Args:
        edges: float64 [K + 1].
        pool: float64 [K], adds up to 1.
        kept: float64 [K], adds up to 1, or all 0 when no row was kept.
        log: whether the edges are evenly spaced on a log scale.
    """

    edges: Float[np.ndarray, " K1"]
    pool: Float[np.ndarray, " K"]
    kept: Float[np.ndarray, " K"]
    log: bool


def bin_shares(values: Float[np.ndarray, " N"], kept: Bool[np.ndarray, " N"], *, log: bool = False) -> Bins:
    """Count rows in bins that hold every value.

    Args:
        values: float64 [N], finite, N >= 1.
        kept: bool [N].
        log: space the bins evenly on a log scale where all values are positive and span a factor of 8 or more.

    Returns:
        The shares.
    """
    low, high = float(values.min()), float(values.max())
    log = log and low > 0 and high / low >= 8
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = 0.5 * abs(low) or 0.5
        low, high = low - pad, high + pad
    # Few kept rows in many bins would show the draw and not the shape.
    num = int(np.clip(2 * np.sqrt(kept.sum()), MIN_BINS, MAX_BINS))
    edges = np.geomspace(low, high, num + 1) if log else np.linspace(low, high, num + 1)
    edges[0], edges[-1] = low, high
    counted = [np.histogram(v, edges)[0].astype(np.float64) for v in (values, values[kept])]
    return Bins(edges, counted[0] / counted[0].sum(), counted[1] / max(1.0, counted[1].sum()), log)


def sample_rows(ids: Sequence[str], kept: Bool[np.ndarray, " N"], limit: int = MAX_POINTS) -> Int[np.ndarray, " n"]:
    """Draw at most ``limit`` rows, keyed by id, kept rows first in line for half of the places.

    Args:
        ids: N ids.
        kept: bool [N].
        limit: most rows drawn.

    Returns:
        int64 [n] indices, rising; all rows when they fit.
    """
    if len(ids) <= limit:
        return np.arange(len(ids))
    draw = stream(0, "report/sample").uniform(ids)
    groups = [rows[np.argsort(draw[rows], kind="stable")] for rows in (np.flatnonzero(kept), np.flatnonzero(~kept))]
    first = min(len(groups[0]), max(limit // 2, limit - len(groups[1])))
    return np.sort(np.concatenate([groups[0][:first], groups[1][: limit - first]]))
