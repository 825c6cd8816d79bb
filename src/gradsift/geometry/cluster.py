"""Seeded spherical mini-batch k-means on unit sketches (ours, with scikit-learn's MiniBatchKMeans).

Directions matter and lengths do not, so rows are scaled to length 1 before and centres after the fit, and a row belongs
to the centre of largest cosine.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.geometry.rows import is_stored, row_lengths, unit_sketches
from gradsift.seeds import Stream
from gradsift.types import StoredRows

BATCH_ROWS = 1024
CHUNK_ROWS = 4096
FITTED_BYTES = 1 << 28  # of sketches that the fit has in memory at once: 16,395 rows of 4,093 numbers
LEAST_PER_CLUSTER = 32


@dataclass(frozen=True)
class Clusters:
    """Found groups of rows.

    Args:
        labels: int32 [N], 0 to K - 1, numbered by their first row; every number is in use.
        centers: float32 [K, D], unit length.
        sizes: int64 [K] rows per group, >= 1.
    """

    labels: Int[np.ndarray, " N"]
    centers: Float[np.ndarray, "K D"]
    sizes: Int[np.ndarray, " K"]


def default_num_clusters(num_rows: int) -> int:
    """Choose the number of clusters from the pool's size (ours).

    Args:
        num_rows: N.

    Returns:
        10 below 20,000 rows, then sqrt(N) / 5 up to 64, and never more than N.
    """
    wanted = 10 if num_rows < 20_000 else min(64, int(np.sqrt(num_rows) / 5))
    return min(wanted, num_rows)


def spherical_kmeans(
    sketch: Float[np.ndarray, "N D"] | StoredRows,
    stream: Stream,
    *,
    ids: tuple[str, ...],
    num_clusters: int | None = None,
) -> Clusters:
    """Group rows by the direction of their sketches.

    The fit reads rows in the order given, which must be id order, and is a function of the sketches and the stream
    alone. Groups that no row belongs to in the end are left out, so there may be fewer than asked. Of sketches that stay on
    the disk as many rows as fit ``FITTED_BYTES`` are drawn for the fit, by id; one walk over the disk then gives every row
    its group. Where all rows fit, the result is that of an array.

    Args:
        sketch: float32 [N, D], N >= 1, or rows that are read when asked for; not changed.
        stream: seeds the first centres and the batches.
        ids: N ids, to name a row that cannot be used.
        num_clusters: K; by :func:`default_num_clusters` when None, and never more than N.

    Returns:
        Labels and unit centres. A sketch that is not finite or is zero is refused by row (NumericsError).
    """
    wanted = default_num_clusters(len(sketch)) if num_clusters is None else min(num_clusters, len(sketch))
    if is_stored(sketch):
        rows = _drawn(sketch.shape, stream, ids, wanted)
        centers = _fit(unit_sketches(sketch[rows], tuple(ids[i] for i in rows)), stream, wanted)
        return _numbered_by_first_row(_walk(sketch, centers, ids), centers)
    unit = unit_sketches(np.asarray(sketch), ids)
    centers = _fit(unit, stream, wanted)
    return _numbered_by_first_row(_nearest(unit, centers), centers)


def _drawn(shape: tuple[int, ...], stream: Stream, ids: tuple[str, ...], num_clusters: int) -> Int[np.ndarray, " n"]:
    """Rows that the fit reads, in id order: all, or a draw keyed by id."""
    count = max(FITTED_BYTES // (4 * shape[1]), LEAST_PER_CLUSTER * num_clusters)
    if shape[0] <= count:
        return np.arange(shape[0])
    return np.sort(np.argsort(stream.child("fitted").uniform(ids), kind="stable")[:count])


def _fit(unit: Float[np.ndarray, "n D"], stream: Stream, num_clusters: int) -> Float[np.ndarray, "K D"]:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    fit = MiniBatchKMeans(
        n_clusters=num_clusters,
        batch_size=BATCH_ROWS,
        n_init=3,  # pyright: ignore[reportArgumentType] - its stubs know only "auto"
        random_state=int(stream.numpy().integers(2**32)),
    )
    with warnings.catch_warnings():
        # Fewer distinct directions than clusters is no fault: unused groups are left out below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(unit)
    centers = np.asarray(fit.cluster_centers_, dtype=np.float32)
    lengths = np.linalg.norm(centers, axis=1, keepdims=True)
    return centers / np.where(lengths > 0, lengths, 1)


def _walk(sketch: StoredRows, centers: Float[np.ndarray, "K D"], ids: tuple[str, ...]) -> Int[np.ndarray, " N"]:
    """Nearest centres of rows on the disk, block by block; a row's length does not change which cosine is largest."""
    labels = np.empty(len(sketch), dtype=np.int64)
    for at, block in sketch.blocks():
        row_lengths(block, tuple(ids[i] for i in at))
        labels[at] = np.argmax(block @ centers.T, axis=1)
    return labels


def _nearest(unit: Float[np.ndarray, "N D"], centers: Float[np.ndarray, "K D"]) -> Int[np.ndarray, " N"]:
    chunks = [unit[i : i + CHUNK_ROWS] @ centers.T for i in range(0, len(unit), CHUNK_ROWS)]
    return np.concatenate([np.argmax(chunk, axis=1) for chunk in chunks])  # argmax: ties to the smaller number


def _numbered_by_first_row(labels: Int[np.ndarray, " N"], centers: Float[np.ndarray, "K D"]) -> Clusters:
    used, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(used), dtype=np.int32)
    number[order] = np.arange(len(used), dtype=np.int32)
    renumbered = number[inverse]
    return Clusters(renumbered, centers[used[order]], np.bincount(renumbered).astype(np.int64))
