"""Whether cosines measured on the navigator say anything about the target model: ranks, signs and the top of the list.

The claim that relative geometry carries over between sizes of one family is secondary for arXiv 2602.06359 and without a
published coefficient; so it is measured (ogs.md 2.12 and 3.6 step 3; the figures and their intervals are ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from gradsift.seeds import Stream

LEAST_SPEARMAN = 0.3  # ogs.md section 4, transfer guard
NUM_DRAWS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Agreement:
    """One figure of agreement with its percentile bootstrap interval over rows.

    Args:
        value: in [-1, 1] for a correlation, in [0, 1] for a share; NaN where it does not exist.
        low: lower end of the 95% interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Transfer:
    """How one direction's cosines on the navigator agree with those on the target model.

    Args:
        name: the anchor's name, or ``target``.
        spearman: rank correlation over the rows; NaN where one model gives all rows the same cosine.
        signs: share of rows whose cosines have the same sign.
        overlap: share of the navigator's top k rows that are among the target model's top k.
        num_rows: n.
        k: rows at the top.
    """

    name: str
    spearman: Agreement
    signs: Agreement
    overlap: Agreement
    num_rows: int
    k: int

    @property
    def by_chance(self) -> float:
        """Expected overlap of two lists that have nothing to do with each other, k / n."""
        return self.k / self.num_rows

    @property
    def warns(self) -> bool:
        """Whether the ranks agree too little (Spearman below 0.3, or without a value) to choose rows by them."""
        return not self.spearman.value >= LEAST_SPEARMAN

    @property
    def sentence(self) -> str:
        """The figures in plain words."""
        if not np.isfinite(self.spearman.value):
            return f"{self.name}: one of the models gives every row the same cosine, so there is no order to compare"
        words = (
            f"{self.name}: Spearman {self.spearman.value:+.2f} [{self.spearman.low:+.2f}, {self.spearman.high:+.2f}] over "
            f"{self.num_rows} rows; {self.overlap.value:.0%} of the navigator's top {self.k} are in the target model's top "
            f"{self.k} (by chance {self.by_chance:.0%})"
        )
        if self.warns:
            return f"{words}; below {LEAST_SPEARMAN}: what the navigator ranks is not what the target model would rank"
        if self.spearman.low < LEAST_SPEARMAN:
            return f"{words}; the interval reaches below {LEAST_SPEARMAN}: measure more rows before relying on it"
        return f"{words}; the navigator's order carries over"


def transfer(
    navigator_cos: Float[np.ndarray, "n A"],
    target_cos: Float[np.ndarray, "n A"],
    names: Sequence[str],
    k: int,
    stream: Stream,
) -> tuple[Transfer, ...]:
    """Compare the cosines of the same rows with the same directions on two models.

    Args:
        navigator_cos: float64 [n, A] in [-1, 1], finite; rows in id order, n >= 2.
        target_cos: float64 [n, A] of the same rows on the target model.
        names: A names.
        k: rows at the top, in [1, n].
        stream: of the bootstrap; 1,000 draws of n rows, the same for every direction.

    Returns:
        One entry per direction. Shapes, k or values out of range are our own mistake (ValueError).
    """
    n = len(navigator_cos)
    if navigator_cos.shape != target_cos.shape or navigator_cos.shape[1:] != (len(names),):
        raise ValueError(f"shapes {navigator_cos.shape} and {target_cos.shape} do not fit {len(names)} names")
    if n < 2 or not 1 <= k <= n:
        raise ValueError(f"transfer needs 2 rows and k in [1, n], got n {n}, k {k}")
    if not (np.isfinite(navigator_cos).all() and np.isfinite(target_cos).all()):
        raise ValueError("transfer needs finite cosines: leave rows without a gradient out")
    draws = stream.child("bootstrap").numpy().integers(0, n, size=(NUM_DRAWS, n))
    return tuple(_compare(name, navigator_cos[:, a], target_cos[:, a], k, draws) for a, name in enumerate(names))


def _compare(
    name: str,
    navigator: Float[np.ndarray, " n"],
    target: Float[np.ndarray, " n"],
    k: int,
    draws: Int[np.ndarray, "D n"],
) -> Transfer:
    every = np.arange(len(navigator))[None, :]
    same = np.sign(navigator) == np.sign(target)
    overlap = _overlap(navigator[every], target[every], every, k), _overlap(navigator[draws], target[draws], draws, k)
    return Transfer(
        name,
        _agreement(_spearman(navigator[every], target[every]), _spearman(navigator[draws], target[draws])),
        _agreement(same[every].mean(axis=1), same[draws].mean(axis=1)),
        _agreement(*overlap),
        len(navigator),
        k,
    )


def _agreement(value: Float[np.ndarray, " 1"], drawn: Float[np.ndarray, " D"]) -> Agreement:
    """Percentile interval; draws without a value (every row the same) say nothing and are left out."""
    known = drawn[np.isfinite(drawn)]
    if not len(known) or not np.isfinite(value[0]):
        return Agreement(float(value[0]), float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Agreement(float(value[0]), float(low), float(high))


def _spearman(x: Float[np.ndarray, "D n"], y: Float[np.ndarray, "D n"]) -> Float[np.ndarray, " D"]:
    """Pearson correlation of average ranks, line by line; NaN where a line is constant."""
    a, b = (rankdata(v, axis=1) for v in (x, y))
    a, b = (v - v.mean(axis=1, keepdims=True) for v in (a, b))
    length = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), length, out=np.full(len(a), np.nan), where=length > 0).clip(-1, 1)


def _overlap(
    x: Float[np.ndarray, "D n"], y: Float[np.ndarray, "D n"], rows: Int[np.ndarray, "D n"], k: int
) -> Float[np.ndarray, " D"]:
    """Share of the top k of x that is in the top k of y, line by line; ties go to the smaller row."""
    return (_top(x, rows, k) & _top(y, rows, k)).sum(axis=1) / k


def _top(values: Float[np.ndarray, "D n"], rows: Int[np.ndarray, "D n"], k: int) -> Bool[np.ndarray, "D n"]:
    first = np.lexsort((rows, -values), axis=1)[:, :k]
    out = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(out, first, True, axis=1)
    return out
