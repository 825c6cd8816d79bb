"""Active anchors: the anchor rows that the domain's gradient opposes most, an opt-in choice of what to protect with.

Source: ogs.md 2.12; secondary summaries of arXiv 2602.06359 speak of anchors opposed to the mean domain gradient, without
a formula. Score and quotas are ours: c_a = cos(g_a, g_dom), the m lowest of every source, outliers by |g_a| left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

OUTLIER_SHARE = 0.01


def active_rows(
    cos_to_target: Float[np.ndarray, " n"], sources: Sequence[str], norms: Float[np.ndarray, " n"], per_source: int
) -> Int[np.ndarray, " k"]:
    """Keep the rows of every source that oppose the target most.

    The quota is per source so that one source cannot fill the anchor; the longest gradients go first, floor(1% of the
    source's rows), because one row of huge norm would be the anchor's mean direction.

    Args:
        cos_to_target: float64 [n] cosine of every anchor candidate with the mean target gradient, finite.
        sources: n source names.
        norms: float64 [n] gradient norms, > 0.
        per_source: m >= 1, rows kept of each source.

    Returns:
        int64 [k] row numbers in increasing order, at most m per source; all that are left of a source with fewer (the
        caller counts and reports that). Among equals the smaller row number is kept: give rows in id order. Wrong
        lengths, m < 1 or rows without a gradient are our own mistake (ValueError).
    """
    n = len(cos_to_target)
    if len(sources) != n or len(norms) != n or per_source < 1:
        raise ValueError(f"active_rows needs one source and norm per row and m >= 1, got {n} rows, m {per_source}")
    if not (np.isfinite(cos_to_target).all() and np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError("active_rows needs finite cosines and norms above 0: leave unscored rows out")
    label = np.asarray(sources, dtype=object)
    kept = []
    for source in sorted(set(sources)):
        rows = np.flatnonzero(label == source)
        num_outliers = int(np.floor(OUTLIER_SHARE * len(rows) + 1e-9))
        # Stable sorts on row numbers: of two equally long rows the later one is the outlier.
        rows = np.sort(rows[np.argsort(norms[rows], kind="stable")][: len(rows) - num_outliers])
        kept.append(rows[np.argsort(cos_to_target[rows], kind="stable")][:per_source])
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.int64)
