"""How far a step on a domain moves a task: three scores from one Gram matrix, their normalization and their rank test.

Source: DIDS (arXiv 2504.13227) for the Fisher metric; the release combines an inner product with a normalization made
for a divergence, so that the best aligned domain gets exactly 0. Here a larger score always means more weight, and the
scores are held against measured falls of the loss before anything rests on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from gradsift.errors import NumericsError
from gradsift.geometry.mixture import effective_number

ScoreKind = Literal["diff_kl", "inner", "cos"]
SCORES: tuple[ScoreKind, ...] = ("diff_kl", "inner", "cos")
BISECTIONS = 100


def impact_scores(gram: Float[np.ndarray, "a a"], num_domains: int) -> dict[ScoreKind, Float[np.ndarray, "k m"]]:
    """Score every domain for every task, larger is better aligned.

    With A = g'(f h), b = g'(f g) and c = h'(f h): ``diff_kl`` is minus the second-order KL between the model after a step
    on the domain and after a step on the task, -(b + c - 2 A) / 2; ``inner`` is A; ``cos`` is A / sqrt(b c).

    Args:
        gram: float64 [k+m, k+m] inner products of mean gradients in the metric f, domains first.
        num_domains: k.

    Returns:
        Score -> float64 [k, m].

    Raises:
        NumericsError: a domain's or task's gradient has length 0 in the metric, or is not finite.
    """
    squares = np.diag(gram)
    bad = np.flatnonzero(~np.isfinite(gram).all(axis=1) | (squares <= 0))
    if bad.size:
        at = int(bad[0])
        raise NumericsError(
            "a mean gradient is zero or not finite",
            where=f"domain number {at}" if at < num_domains else f"task number {at - num_domains}",
            got=f"squared length {squares[at]}",
            expected="a finite gradient with a direction",
            do="look at the rows of this domain with gradsift inspect, and lower proxy.lr",
        )
    inner = gram[:num_domains, num_domains:]
    b, c = squares[:num_domains, None], squares[None, num_domains:]
    return {"diff_kl": -0.5 * (b + c - 2 * inner), "inner": inner.copy(), "cos": inner / np.sqrt(b * c)}


def softmax_columns(scores: Float[np.ndarray, "k m"], tau: float | None = None) -> Float[np.ndarray, "k m"]:
    """Turn scores into shares of a task, one column per task.

    Args:
        scores: float64 [k, m], larger is better.
        tau: temperature > 0 in the score's unit; None sets it per task so that about half of the domains count (the
            exponential of the column's entropy is k / 2, and at least 1.2).

    Returns:
        float64 [k, m], columns sum to 1; a column of equal scores is uniform.
    """
    return np.stack([_softmax(column, tau) for column in scores.T], axis=1)


def _softmax(column: Float[np.ndarray, " k"], tau: float | None) -> Float[np.ndarray, " k"]:
    centred = column - column.max()
    if not centred.any():
        return np.full(len(column), 1 / len(column))
    if tau is not None:
        return _at(centred, tau)
    wanted = max(1.2, len(column) / 2)
    spread = -float(centred.min())
    low, high = np.log(spread * 1e-6), np.log(spread * 1e6)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        small = effective_number(_at(centred, float(np.exp(middle)))) < wanted
        low, high = (middle, high) if small else (low, middle)
    return _at(centred, float(np.exp(high)))


def _at(centred: Float[np.ndarray, " k"], tau: float) -> Float[np.ndarray, " k"]:
    raised = np.exp(centred / tau)
    return raised / raised.sum()


def shift_min_columns(scores: Float[np.ndarray, "k m"]) -> Float[np.ndarray, "k m"]:
    """Turn scores into shares by their distance from the worst, which gets exactly 0.

    This is the release's normalization with the sign that fits a score: its own form, largest minus value, fits a divergence.

    Args:
        scores: float64 [k, m], larger is better.

    Returns:
        float64 [k, m], columns sum to 1; a column of equal scores is uniform.
    """
    above = scores - scores.min(axis=0)
    total = above.sum(axis=0)
    flat = np.full_like(scores, 1 / len(scores))
    return np.where(total > 0, above / np.where(total > 0, total, 1), flat)


@dataclass(frozen=True)
class RankTest:
    """How each score orders the domains beside their measured effect.

    Args:
        rho: (score, metric) such as ``cos/identity`` -> mean over tasks of Spearman's correlation, in [-1, 1].
        round: before which round it was made.
    """

    rho: Mapping[str, float]
    round: int


def rank_test(grams: Mapping[str, Float[np.ndarray, "a a"]], drops: Float[np.ndarray, "k m"], at: int) -> RankTest:
    """Hold every score against the fall of the task's loss after one real step on each domain.

    Args:
        grams: metric -> float64 [k+m, k+m], as for :func:`impact_scores`.
        drops: float64 [k, m] loss before minus loss after the step on a domain, nats.
        at: round before which it was measured.

    Returns:
        Rank correlations. A column in which nothing differs counts as 0: it supports nothing.
    """
    rho = {}
    for metric, gram in grams.items():
        for kind, score in impact_scores(gram, len(drops)).items():
            pairs = zip(score.T, drops.T, strict=True)
            rho[f"{kind}/{metric}"] = float(np.mean([spearman(s, d) for s, d in pairs]))
    return RankTest(rho, at)


def spearman(first: Float[np.ndarray, " k"], second: Float[np.ndarray, " k"]) -> float:
    """Correlate ranks, ties sharing theirs.

    Args:
        first: k numbers.
        second: k numbers.

    Returns:
        In [-1, 1]; 0 where one of the two does not vary.
    """
    from scipy.stats import rankdata

    a, b = rankdata(first), rankdata(second)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else 0.0
