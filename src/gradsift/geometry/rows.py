"""Rows that may be in memory or on the disk: sums and blocks of either, and parts that read nothing (ours).

An array gives exactly what it always gave; :class:`gradsift.types.StoredRows` are never read whole.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import NumericsError
from gradsift.types import StoredRows


def is_stored(rows: Any) -> TypeGuard[StoredRows]:
    """Tell whether rows must be read in blocks.

    Args:
        rows: an array [N, D], memory-mapped or not, or stored rows.

    Returns:
        False for arrays.
    """
    return not isinstance(rows, np.ndarray)


def part_of(rows: Any, some: Int[np.ndarray, " k"]) -> Any:
    """Take some rows: a copy of an array's, a look at stored ones.

    Args:
        rows: [N, D].
        some: int64 [k] positions.

    Returns:
        [k, D], in the order asked.
    """
    return rows.part(some) if is_stored(rows) else rows[some]


def row_sum(rows: Any, weights: Float[np.ndarray, " N"] | None = None) -> Float[np.ndarray, " D"]:
    """Add rows up in float64.

    Args:
        rows: [N, D].
        weights: [N] factors; None for 1.

    Returns:
        float64 [D].
    """
    if not is_stored(rows):
        if weights is None:
            return rows.sum(0, dtype=np.float64)
        return np.asarray(weights, dtype=np.float64) @ rows.astype(np.float64)
    total = np.zeros(rows.shape[1])
    for at, block in rows.blocks():
        total += block.sum(0, dtype=np.float64) if weights is None else weights[at] @ block.astype(np.float64)
    return total


def row_lengths(sketch: Float[np.ndarray, "n D"], ids: tuple[str, ...]) -> Float[np.ndarray, " n"]:
    """Lengths of sketches, all of which must have a direction.

    Args:
        sketch: [n, D].
        ids: n ids, to name a row that cannot be used.

    Returns:
        [n], > 0.

    Raises:
        NumericsError: a sketch is not finite or is zero.
    """
    lengths = np.linalg.norm(sketch, axis=1)
    bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
    if len(bad):
        raise NumericsError(
            "signal sketch is not finite or is zero",
            where=f"row {ids[bad[0]]}",
            got=f"length {lengths[bad[0]]}",
            expected="a finite sketch with a direction",
            do="collect the signals of such rows again, or give them a status that is not usable",
        )
    return lengths


def unit_sketches(sketch: Float[np.ndarray, "n D"], ids: tuple[str, ...]) -> Float[np.ndarray, "n D"]:
    """Scale sketches to length 1.

    Args:
        sketch: [n, D]; not changed.
        ids: n ids, to name a row that cannot be used.

    Returns:
        float32 [n, D]. A sketch that is not finite or is zero is refused by row (NumericsError).
    """
    rows = np.array(sketch, dtype=np.float32)  # a copy: the sketches may be read-only and stay as they are
    return rows / row_lengths(rows, ids)[:, None]
