"""Spherical mini-batch k-means on sketches that are read from the disk, batch by batch (ours, with scikit-learn's steps).

Source: Sculley, "Web-Scale K-Means Clustering", WWW 2010: a batch of drawn rows moves the centers they are nearest to, each
by 1 / (rows it has seen); here by MiniBatchKMeans.partial_fit on rows of length 1.

  1  centers: the best of 3 greedy k-means++ choices among 3,072 drawn rows, judged on 3,072 others
  2  batches of 1,024 drawn rows, until the smoothed loss has not fallen for 10 batches, at most 100 batches or N rows, what is more
  3  one walk in the order of the disk gives every row the center of largest cosine

Departures from the paper: k-means++ instead of drawn rows as first centers, a stop rule (scikit-learn's), centers that next to
no row is near are moved, and rows and centers have length 1. Rows are drawn with replacement, by position in id order.
"""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float, Int

from gradsift.geometry.rows import row_lengths, unit_sketches
from gradsift.seeds import Stream
from gradsift.types import StoredRows

BATCH_ROWS = 1024
INIT_ROWS = 3 * BATCH_ROWS
NUM_STARTS = 3
PATIENCE = 10
LEAST_STEPS = 100


def fit_centers(
    sketch: StoredRows, stream: Stream, *, ids: tuple[str, ...], num_clusters: int
) -> Float[np.ndarray, "K D"]:
    """Find unit centers by mini-batches.

    Args:
        sketch: N rows of length D, read when asked for.
        stream: seeds the first centers and draws the batches.
        ids: N ids, to name a row that cannot be used.
        num_clusters: K, at most N.

    Returns:
        float32 [K, D], length 1, or 0 for a center that never moved from the origin. A sketch that is not finite or is
        zero is refused by row (NumericsError).
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    draw, num = stream.numpy(), len(sketch)

    def rows(count: int) -> Float[np.ndarray, "b D"]:
        at = draw.integers(num, size=count)
        return unit_sketches(sketch[at], tuple(ids[i] for i in at))

    seed = int(draw.integers(2**32))
    centers = _first_centers(rows(max(INIT_ROWS, num_clusters)), rows(INIT_ROWS), num_clusters, seed)
    fit = MiniBatchKMeans(
        num_clusters, init=centers, n_init=1, batch_size=BATCH_ROWS, compute_labels=False, random_state=seed
    )
    share, smooth, best, waited = min(1.0, 2.0 * BATCH_ROWS / (num + 1)), None, np.inf, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for step in range(max(LEAST_STEPS, num // BATCH_ROWS)):
            batch = rows(BATCH_ROWS)
            loss = 1.0 - float(cosine_to(batch, centers).max(axis=1).mean())
            fit.partial_fit(batch)
            centers = unit_centers(np.asarray(fit.cluster_centers_, dtype=np.float32))
            if step == 0:  # that of the first centers
                continue
            smooth = loss if smooth is None else smooth * (1 - share) + loss * share
            waited = 0 if smooth < best else waited + 1
            best = min(best, smooth)
            if waited >= PATIENCE:
                break
    return centers


def _first_centers(
    rows: Float[np.ndarray, "n D"], others: Float[np.ndarray, "m D"], num_clusters: int, seed: int
) -> Float[np.ndarray, "K D"]:
    from sklearn.cluster import kmeans_plusplus

    tried = [kmeans_plusplus(rows, num_clusters, random_state=(seed + n) % 2**32)[0] for n in range(NUM_STARTS)]
    return max(tried, key=lambda centers: float(cosine_to(others, centers).max(axis=1).mean()))


def cosine_to(unit: Float[np.ndarray, "n D"], centers: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "n K"]:
    """Cosines of unit rows with unit centers.

    Args:
        unit: [n, D]; rows of another length give cosines times that.
        centers: [K, D].

    Returns:
        float32 [n, K].
    """
    return unit @ centers.T


def unit_centers(centers: Float[np.ndarray, "K D"]) -> Float[np.ndarray, "K D"]:
    """Scale centers to length 1; the zero vector stays.

    Args:
        centers: [K, D].

    Returns:
        float32 [K, D].
    """
    lengths = np.linalg.norm(centers, axis=1, keepdims=True)
    return centers / np.where(lengths > 0, lengths, 1)


def assign(sketch: StoredRows, centers: Float[np.ndarray, "K D"], ids: tuple[str, ...]) -> Int[np.ndarray, " N"]:
    """Give every row the center of largest cosine, the smaller number among equals; one walk over the disk.

    Args:
        sketch: N rows.
        centers: float32 [K, D], unit length.
        ids: N ids, to name a row that cannot be used.

    Returns:
        int64 [N].
    """
    labels = np.empty(len(sketch), dtype=np.int64)
    for at, block in sketch.blocks():
        row_lengths(block, tuple(ids[i] for i in at))
        labels[at] = np.argmax(cosine_to(block, centers), axis=1)  # a row's length does not change which is largest
    return labels
