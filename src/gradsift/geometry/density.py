"""Scales, combinations and kernel densities of the two norms that ``grads`` ranks by (grads.md 2.2 and 3; scale and bounds ours)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from gradsift.errors import NumericsError

MIN_ROWS = 20  # fewer rows have no density worth the name (grads.md 7)
DIRECT = 20_000  # rows up to which every pair of them is evaluated; 9 s at this size
GRID = 2048
BLOCK = 1 << 22  # pairs that stand in memory at once

Combine = Literal["mean_log", "sum_raw", "emb_only", "lm_only", "joint2d"]


@dataclass(frozen=True)
class Points:
    """The signal of one group of rows.

    Args:
        values: float64 [n, F]; F is 1, or 2 for ``joint2d``.
        shift: how far a value may move when the norms are measured again.
    """

    values: Float[np.ndarray, "n F"]
    shift: float = 0.0

    @property
    def line(self) -> Float[np.ndarray, " n"]:
        """The signal as one number per row: the mean over F."""
        return self.values.mean(axis=1)


@dataclass(frozen=True)
class Density:
    """A density at the rows it was fitted on.

    Args:
        rho: float64 [n] > 0, per unit of the signal (per unit squared in two dimensions).
        slack: how far ``log rho`` of a row may move against that of another when the norms are measured again.
    """

    rho: Float[np.ndarray, " n"]
    slack: float


def robust_scale(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Center on the median and divide by the distance of the quartiles.

    Args:
        values: n finite numbers.

    Returns:
        (a - median) / (q75 - q25), without a unit.

    Raises:
        NumericsError: the quartiles are equal, so there is no scale.
    """
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    if not high > low:
        raise NumericsError(
            "the density of the gradient norms is undefined",
            where=f"{len(values)} rows",
            got=f"interquartile range {high - low:g}",
            expected="norms that differ",
            do="look for copies of one row, or choose by another method",
        )
    return (values - middle) / (high - low)


def combine_norms(
    emb: Float[np.ndarray, " n"] | None, head: Float[np.ndarray, " n"] | None, how: Combine, *, relative: float = 0.0
) -> Points:
    """Make one signal of the two norms.

    ``mean_log``: mean of the robust-scaled logarithms (grads.md 3, steps 6 and 7; ours); ``joint2d``: both of them;
    ``emb_only``, ``lm_only``: one scaled logarithm; ``sum_raw``: the plain sum.

    Args:
        emb: [n] norms of the embedding's gradient, > 0; may be None for ``lm_only``.
        head: [n] norms of the LM head's gradient, > 0; may be None for ``emb_only``.
        how: the combination.
        relative: relative bound on a norm, in [0, 1).

    Returns:
        The signal, and a bound on how far it may move.
    """
    if how == "sum_raw":
        assert emb is not None
        assert head is not None
        total = emb + head
        return Points(total[:, None], relative * float(total.max()))
    used = [x for x, skip in ((emb, how == "lm_only"), (head, how == "emb_only")) if x is not None and not skip]
    scaled = [_scaled_log(x, relative) for x in used]
    values = np.column_stack([z for z, _ in scaled])
    if how == "joint2d":
        return Points(values, max(shift for _, shift in scaled))
    return Points(values.mean(axis=1, keepdims=True), float(np.mean([shift for _, shift in scaled])))


def _scaled_log(norm: Float[np.ndarray, " n"], relative: float) -> tuple[Float[np.ndarray, " n"], float]:
    """A robust-scaled logarithm and how far it may move: the log by d, the median by d, the quartiles' distance by 2 d."""
    logs = np.log(norm)
    z = robust_scale(logs)
    d = -float(np.log1p(-relative)) if relative < 1 else np.inf
    low, high = np.quantile(logs, [0.25, 0.75])
    left = high - low - 2 * d
    return z, 0.0 if d == 0 else (2 * d * (1 + float(np.abs(z).max())) / left if left > 0 else np.inf)


def scott_bandwidth(values: Float[np.ndarray, "n F"]) -> Float[np.ndarray, " F"]:
    """Scott's rule: sd(s) n^(-1/(F + 4)), with the n - 1 standard deviation.

    Args:
        values: [n, F].

    Returns:
        float64 [F], one bandwidth per axis.

    Raises:
        NumericsError: an axis is constant.
    """
    num, axes = values.shape
    spread = values.std(axis=0, ddof=1)
    if not (spread > 0).all():
        raise NumericsError(
            "the density of the gradient norms is undefined", where=f"{num} rows", got="a standard deviation of 0",
            expected="norms that differ", do="look for copies of one row, or choose by another method",
        )  # fmt: skip
    return spread * num ** (-1.0 / (axes + 4))


def kernel_density(points: Points) -> Density:
    """Estimate the density of the signal at every row, with Gaussian kernels.

    rho(s) = 1 / (n b) sum_j phi((s - s_j) / b), b by Scott's rule (grads.md 2.2); a product of kernels in two dimensions.
    One-dimensional signals of more than 20,000 rows are evaluated on a grid and interpolated.

    Args:
        points: n >= 20 rows.

    Returns:
        The density, and how far its logarithm may move.

    Raises:
        NumericsError: fewer than 20 rows, or they are all alike.
    """
    values = points.values
    num, axes = values.shape
    if num < MIN_ROWS:
        raise NumericsError(
            "the density of the gradient norms is undefined", where=f"{num} rows", got=f"{num} rows in one source",
            expected=f"at least {MIN_ROWS}",
            do="give more rows, join the sources with --set per_source=false, or choose by another method",
        )  # fmt: skip
    b = scott_bandwidth(values)
    scale = num * float(np.prod(b)) * (2 * np.pi) ** (axes / 2)
    total = _sums(values, b, lambda t: t)
    if points.shift == 0:
        return Density(total / scale, 0.0)
    # The standard deviation moves by at most sqrt(n / (n - 1)) times the shift, since centering does not lengthen.
    give = points.shift * np.sqrt(num / (num - 1)) / (b * num ** (1.0 / (axes + 4)))
    if (give >= 1).any():
        return Density(total / scale, float("inf"))
    near, far = 2 * points.shift / (b * (1 - give)), give / (1 - give)
    more = _sums(values, b, lambda t: np.maximum(np.abs(t) * (1 - far) - near, 0.0))
    less = _sums(values, b, lambda t: np.abs(t) * (1 + far) + near)
    slack = max(float(np.log(more / total).max()), float(np.log(total / less).max()))
    return Density(total / scale, slack)


def _sums(
    values: Float[np.ndarray, "n F"], b: Float[np.ndarray, " F"], bend: Callable[[np.ndarray], np.ndarray]
) -> Float[np.ndarray, " n"]:
    """Sum exp(-|bend((s_i - s_j) / b)|^2 / 2) over j, for every i."""
    if values.shape[1] == 1 and len(values) > DIRECT:
        return _grid_sums(values, b, bend)
    return _direct_sums(values, values, b, bend)


def _direct_sums(
    at: Float[np.ndarray, "m F"],
    values: Float[np.ndarray, "n F"],
    b: Float[np.ndarray, " F"],
    bend: Callable[[np.ndarray], np.ndarray],
) -> Float[np.ndarray, " m"]:
    out = np.empty(len(at))
    step = max(1, BLOCK // (len(values) * values.shape[1]))
    for low in range(0, len(at), step):
        t = bend((at[low : low + step, None, :] - values[None]) / b)
        out[low : low + step] = np.exp(-0.5 * np.square(t).sum(axis=2)).sum(axis=1)
    return out


def _grid_sums(
    values: Float[np.ndarray, "n F"], b: Float[np.ndarray, " F"], bend: Callable[[np.ndarray], np.ndarray]
) -> Float[np.ndarray, " n"]:
    """The sums on a grid over [min - 3 b, max + 3 b], interpolated; a wide range takes more than 2,048 points."""
    low, high = float(values.min() - 3 * b[0]), float(values.max() + 3 * b[0])
    grid = np.linspace(low, high, max(GRID, int(np.ceil(16 * (high - low) / b[0]))))
    return np.interp(values[:, 0], grid, _direct_sums(grid[:, None], values, b, bend))


def standard_score(points: Points) -> tuple[Float[np.ndarray, " n"], float]:
    """Give the signal in standard deviations from its mean, and how far that may move.

    Args:
        points: n rows that differ.

    Returns:
        float64 [n] and the bound.
    """
    line, num = points.line, len(points.values)
    sd = float(line.std(ddof=1))
    z = (line - line.mean()) / sd
    if points.shift == 0:
        return z, 0.0
    give = points.shift * np.sqrt(num / (num - 1)) / sd
    if give >= 1:
        return z, float("inf")
    return z, float(2 * points.shift / (sd * (1 - give)) + np.abs(z).max() * give / (1 - give))


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation, ties at their mean rank.

    Args:
        a: n numbers.
        b: n numbers.

    Returns:
        In [-1, 1]; 0 where one of them is constant.
    """
    from scipy.stats import rankdata

    x, y = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    length = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / length if length > 0 else 0.0
