"""How much a row's tokens look like the target's rather than the pool's: a unigram likelihood ratio.

The unigram case of data selection with importance resampling (DSIR; Xie et al., arXiv 2302.03169), on token ids and per
token, so that long rows are not favored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

SMOOTHING = 0.5  # added to every token's count on both sides


def token_likeness(
    rows: Sequence[Int[np.ndarray, " _"]], target: Sequence[Int[np.ndarray, " _"]]
) -> Float[np.ndarray, " N"]:
    """Score rows by the mean over their tokens of log p_target(token) / p_pool(token).

    Args:
        rows: token ids of the N pool rows; the pool's frequencies are those of all of them.
        target: token ids of the target rows.

    Returns:
        float64 [N] nats per token; above 0 where a row looks more like the target than like the pool.

    Raises:
        ValueError: no row or no target row (our own mistake).
    """
    if not rows or not target:
        raise ValueError("token_likeness needs pool rows and target rows")
    size = max(int(ids.max()) for ids in (*rows, *target)) + 1
    pool = np.bincount(np.concatenate([np.asarray(ids) for ids in rows]), minlength=size) + SMOOTHING
    wanted = np.bincount(np.concatenate([np.asarray(ids) for ids in target]), minlength=size) + SMOOTHING
    ratio = np.log(wanted / wanted.sum()) - np.log(pool / pool.sum())
    return np.array([float(ratio[np.asarray(ids)].mean()) for ids in rows])
