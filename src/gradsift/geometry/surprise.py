"""Weights by prompt perplexity (tlm.md 2 and 3.1; Hu et al. 2025, arXiv 2505.20633, equations 2, 5 and 6)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def quantile_threshold(values: Float[np.ndarray, " n"], share: float) -> float:
    """Find the threshold above which a share of the values lies: the ceil((1 - share) n)-th smallest (ours).

    Args:
        values: float64 [n], in any unit that grows with perplexity.
        share: in (0, 1]; 1 lets every value in.

    Returns:
        The threshold, to be exceeded strictly; -inf at share 1.
    """
    place = int(np.ceil((1.0 - share) * len(values) - 1e-9))  # 1e-9: (1 - 0.8) 10 is just above 2
    return -np.inf if place == 0 else float(np.sort(values)[place - 1])


def surprise_weights(
    cross_entropy: Float[np.ndarray, " n"], log_threshold: float, scale: float = 0.1
) -> Float[np.ndarray, " n"]:
    """Weigh inputs by how far their perplexity exceeds the threshold: S = scale (P / P0) 1[P > P0] (equations 5 and 6).

    Args:
        cross_entropy: float64 [n] mean nats per prompt token, log P.
        log_threshold: log P0 in nats.
        scale: lambda of the paper.

    Returns:
        float64 [n] >= 0, exactly 0 at and below the threshold.
    """
    above = cross_entropy > log_threshold
    return np.where(above, scale * np.exp(np.where(above, cross_entropy - log_threshold, 0.0)), 0.0)


def clip_at(values: Float[np.ndarray, " n"], quantile: float) -> float:
    """Find the value at a quantile, the larger neighbor where it falls between two (so that it is one of the values).

    Args:
        values: float64 [n], n >= 1.
        quantile: in (0, 1]; 1 is the largest value.

    Returns:
        The value, the same for every increasing transformation of the values.
    """
    return float(np.quantile(values, quantile, method="higher"))
