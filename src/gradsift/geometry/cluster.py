"""Seeded spherical mini-batch k-means on unit sketches (ours, with scikit-learn's MiniBatchKMeans).

Directions matter and lengths do not, so rows are scaled to length 1 before and centres after the fit, and a row belongs
to the centre of largest cosine.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.geometry.cluster_stream import BATCH_ROWS, assign, fit_centers, unit_centers
from gradsift.geometry.rows import is_stored, unit_sketches
from gradsift.seeds import Stream
from gradsift.types import StoredRows

CHUNK_ROWS = 4096


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
    alone. Groups that no row belongs to in the end are left out, so there may be fewer than asked. Sketches that stay on
    the disk are fitted by batches read from there (:mod:`gradsift.geometry.cluster_stream`): other draws, so other groups
    than the same rows would give in memory.

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
        centers = fit_centers(sketch, stream, ids=ids, num_clusters=wanted)
        return _numbered_by_first_row(assign(sketch, centers, ids), centers)
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    unit = unit_sketches(sketch, ids)
    fit = MiniBatchKMeans(
        n_clusters=wanted,
        batch_size=BATCH_ROWS,
        n_init=3,  # pyright: ignore[reportArgumentType] - its stubs know only "auto"
        random_state=int(stream.numpy().integers(2**32)),
    )
    with warnings.catch_warnings():
        # Fewer distinct directions than clusters is no fault: unused groups are left out below.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(unit)
    centers = unit_centers(np.asarray(fit.cluster_centers_, dtype=np.float32))
    return _numbered_by_first_row(_nearest(unit, centers), centers)


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
