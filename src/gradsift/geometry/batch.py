"""Conflict of batches: a weak shared component survives averaging, noise does not (ours).

For unit gradients with cosine c to an anchor and mean inner product rho between their parts outside it, a batch of B has

    c_B = c sqrt(B) / sqrt(1 + (B - 1)(c^2 + rho)),

so examples that are almost orthogonal one by one (c = -.05) oppose the anchor at c_64 = -.37 when rho = 0. Batches
are therefore measured: sums of exact dots over the length of the summed gradient. |sum g|^2 is estimated by
|sum sketch|^2, which is unbiased in the square (its root is not, by about 1/(4 D) of itself).
k chosen rows, M anchors, D sketch size, B batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.types import StoredRows

PREDICTION_ROWS = 512
PERCENTILES = (5, 50, 95)


@dataclass(frozen=True)
class BatchConflict:
    """Cosines of summed gradients with each anchor; negative is conflict.

    Args:
        batch_size: rows per batch, B (all rows when fewer were chosen).
        num_batches: random batches drawn.
        random: float64 [3, M] percentiles 5, 50 and 95 over random batches.
        ordered: float64 [3, M] the same over the full batches of the list in its order.
        whole: float64 [M] of the sum of all rows.
        mean_cos: float64 [M] mean cosine of single rows, c.
        shared: float64 [M] mean inner product of the unit gradients outside each anchor, rho.
        predicted: float64 [M] c_B by the formula; far from ``random`` means that norms and cosines go together.
    """

    batch_size: int
    num_batches: int
    random: Float[np.ndarray, "3 M"]
    ordered: Float[np.ndarray, "3 M"]
    whole: Float[np.ndarray, " M"]
    mean_cos: Float[np.ndarray, " M"]
    shared: Float[np.ndarray, " M"]
    predicted: Float[np.ndarray, " M"]


def predicted_conflict(c: float, rho: float, batch_size: int) -> float:
    """Cosine of a batch's sum with an anchor, from single rows (ours; see the module).

    Args:
        c: mean cosine of single rows with the anchor, in [-1, 1].
        rho: mean inner product of their unit gradients outside the anchor.
        batch_size: rows per batch, B >= 1.

    Returns:
        c_B in [-1, 1]; NaN where c^2 + rho is so negative that no such rows exist.
    """
    square = 1.0 + (batch_size - 1) * (c * c + rho)
    return float(c * np.sqrt(batch_size) / np.sqrt(square)) if square > 0 else float("nan")


def batch_conflict(
    dots: Float[np.ndarray, "k M"],
    norms: Float[np.ndarray, " k"],
    sketch: Float[np.ndarray, "k D"] | StoredRows,
    batch_size: int,
    generator: np.random.Generator,
    *,
    num_batches: int = 200,
) -> BatchConflict:
    """Measure the conflict of batches of the chosen rows, given in training order.

    Args:
        dots: [k, M] exact dots of the rows' gradients with the anchors' unit directions.
        norms: [k] exact norms of the rows' gradients, > 0.
        sketch: [k, D] sketches, <sketch_i, sketch_j> estimates <g_i, g_j>; may stay on the disk.
        batch_size: rows per batch.
        generator: draws the random batches.
        num_batches: how many.

    Returns:
        Percentiles over random and ordered batches, the whole choice, and the formula's prediction.

    Raises:
        ValueError: no row, or a batch size or number of batches below 1.
    """
    k = len(dots)
    if k == 0 or batch_size < 1 or num_batches < 1:
        raise ValueError(f"batch_conflict needs rows and batches, got {k} rows, {num_batches} batches of {batch_size}")
    size = min(batch_size, k)
    random = [_sum_cos(dots, sketch, generator.choice(k, size, replace=False)) for _ in range(num_batches)]
    ordered = [_sum_cos(dots, sketch, np.arange(s, s + size)) for s in range(0, k - size + 1, size)]
    mean_cos = (dots / norms[:, None]).mean(axis=0)
    shared = _shared(dots, norms, sketch, generator)
    return BatchConflict(
        batch_size=size,
        num_batches=num_batches,
        random=np.percentile(random, PERCENTILES, axis=0),
        ordered=np.percentile(ordered, PERCENTILES, axis=0),
        whole=_sum_cos(dots, sketch, np.arange(k)),
        mean_cos=mean_cos,
        shared=shared,
        predicted=np.array([predicted_conflict(c, r, size) for c, r in zip(mean_cos, shared, strict=True)]),
    )


def _sum_cos(
    dots: Float[np.ndarray, "k M"], sketch: Float[np.ndarray, "k D"] | StoredRows, rows: Int[np.ndarray, " B"]
) -> Float[np.ndarray, " M"]:
    """Cosine of the rows' summed gradient with each anchor; NaN when the sum vanishes."""
    total = np.zeros(sketch.shape[1])
    for start in range(0, len(rows), 4096):  # the whole choice may not fit in memory at once
        total += sketch[np.sort(rows[start : start + 4096])].sum(axis=0, dtype=np.float64)
    length = np.linalg.norm(total)
    # The length is an estimate, so a cosine near 1 can come out a little beyond it.
    return np.clip(dots[rows].sum(axis=0) / (length or np.nan), -1.0, 1.0)


def _shared(
    dots: Float[np.ndarray, "k M"],
    norms: Float[np.ndarray, " k"],
    sketch: Float[np.ndarray, "k D"] | StoredRows,
    generator: np.random.Generator,
) -> Float[np.ndarray, " M"]:
    """Mean of <g_i, g_j> / (|g_i||g_j|) - c_i c_j over pairs of up to 512 rows; 0 for a single row."""
    k = len(dots)
    rows = np.sort(generator.choice(k, min(k, PREDICTION_ROWS), replace=False))
    n = len(rows)
    if n < 2:
        return np.zeros(dots.shape[1])
    unit = sketch[rows].astype(np.float64) / norms[rows, None]
    cos = dots[rows] / norms[rows, None]
    inner = float((unit.sum(axis=0) ** 2).sum() - (unit**2).sum())
    along = cos.sum(axis=0) ** 2 - (cos**2).sum(axis=0)
    return (inner - along) / (n * (n - 1))


def serpentine(
    order: Int[np.ndarray, " k"], binding: Float[np.ndarray, " k"], batch_size: int
) -> Int[np.ndarray, " k"]:
    """Deal rows into batches so that each carries a like share of the most binding anchor's conflict (ours).

    The rows, sorted by their dot, are dealt to the full batches forward and backward in turn; a last short batch takes
    rows spread evenly over the sorted list. Within a batch the given order is kept.

    Args:
        order: int64 [k] row indices, best first.
        binding: [k] dot of each of them with the most binding anchor.
        batch_size: rows per batch; cutting the result every ``batch_size`` rows gives the batches.

    Returns:
        int64 [k] the same indices in training order.

    Raises:
        ValueError: a batch size below 1 or arrays of different lengths.
    """
    k = len(order)
    if batch_size < 1 or len(binding) != k:
        raise ValueError(f"serpentine got {k} rows, {len(binding)} dots, batches of {batch_size}")
    ranked = np.lexsort((np.arange(k), binding))
    num_full, rest = divmod(k, batch_size)
    batch = np.full(k, num_full)
    spread = ((np.arange(rest) + 0.5) * k / max(1, rest)).astype(np.int64)
    dealt = np.delete(ranked, spread)
    turn = np.arange(len(dealt))
    if num_full:
        lap, seat = np.divmod(turn, num_full)
        batch[dealt] = np.where(lap % 2 == 0, seat, num_full - 1 - seat)
    return order[np.lexsort((np.arange(k), batch))]
