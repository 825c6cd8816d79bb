"""Comparisons that use order or membership only: wins, AUC, rank correlation, overlap, trimmed means."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gradsift.errors import ConfigError, NumericsError
from gradsift.evaluate.checks import Numbers, at_least, check_confidence, finite, paired


@dataclass(frozen=True)
class Wins:
    """Counts of paired comparisons.

    Args:
        wins: pairs in which the first is larger.
        ties: pairs that differ by no more than the tolerance.
        losses: pairs in which the second is larger.
    """

    wins: int
    ties: int
    losses: int

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.wins + self.ties + self.losses

    @property
    def share(self) -> float:
        """Share of wins, a tie counting half, in [0, 1]."""
        return (self.wins + 0.5 * self.ties) / self.n

    @property
    def strict_share(self) -> float:
        """Share of wins, a tie counting nothing, in [0, 1]."""
        return self.wins / self.n


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval.

    Args:
        rho: Spearman's coefficient, in [-1, 1].
        low: lower end.
        high: upper end.
        n: number of pairs.
    """

    rho: float
    low: float
    high: float
    n: int


def probability_of_improvement(a: Numbers, b: Numbers) -> float:
    """Probability that a random run of a exceeds a random run of b, ties half (rliable, 2108.13264; Mann-Whitney U).

    Unpaired: for several tasks take it per task and average, as rliable does. Its paired twin is ``paired_wins``.

    Args:
        a: scores of one arm on one task, any number of runs.
        b: scores of the other.

    Returns:
        A share in [0, 1]; 0.5 when neither is better.

    Raises:
        ConfigError: an arm has no run.
        NumericsError: a score is NaN or infinite.
    """
    return auc(a, b)


def paired_wins(a: Numbers, b: Numbers, tolerance: float = 0.0) -> Wins:
    """Count in how many pairs a exceeds b (ours).

    Args:
        a: n values.
        b: n values for the same seeds, or the same cells of a table.
        tolerance: differences up to this size are ties; above 0 where values are averages that carry rounding.

    Returns:
        Wins, ties and losses; they add up to n.

    Raises:
        ConfigError: different lengths, no pair, or a negative tolerance.
        NumericsError: a value is NaN or infinite.
    """
    first, second = paired(a, b)
    if not tolerance >= 0:
        raise ConfigError("a tolerance cannot be negative", got=tolerance, expected=">= 0")
    differences = first - second
    wins, losses = int((differences > tolerance).sum()), int((differences < -tolerance).sum())
    return Wins(wins, len(differences) - wins - losses, losses)


def iqm(scores: Numbers) -> float:
    """Interquartile mean: the mean without the lowest and highest quarter, floor(n / 4) each (rliable, 2108.13264).

    Args:
        scores: any number of scores of any shape, all runs and tasks pooled.

    Returns:
        The trimmed mean.

    Raises:
        ConfigError: no score.
        NumericsError: a score is NaN or infinite.
    """
    values = scores.ravel() if isinstance(scores, np.ndarray) else scores
    return float(stats.trim_mean(finite(values, "scores"), 0.25))


def auc(scores_pos: Numbers, scores_neg: Numbers) -> float:
    """Area under the ROC curve: share of (positive, negative) pairs in the right order, ties half (Mann-Whitney U).

    Args:
        scores_pos: scores of the positives.
        scores_neg: scores of the negatives.

    Returns:
        A share in [0, 1].

    Raises:
        ConfigError: one side is empty.
        NumericsError: a score is NaN or infinite.
    """
    positive, negative = finite(scores_pos, "the first scores"), finite(scores_neg, "the second scores")
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = float(ranks[: len(positive)].sum()) - len(positive) * (len(positive) + 1) / 2
    return above / (len(positive) * len(negative))


def spearman_interval(x: Numbers, y: Numbers, confidence: float = 0.95) -> Correlation:
    """Spearman's rank correlation with a Fisher z interval.

    z = artanh(rho) has standard error sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett and Wright 2000). Fewer than 4 pairs
    give [-1, 1]. At rho = +-1, where z is infinite, the far end is taken from the nearest value that n untied ranks can
    have, 1 - 12 / (n^3 - n) (ours).

    Args:
        x: n values.
        y: n values for the same items.
        confidence: in (0, 1).

    Returns:
        The coefficient and its interval within [-1, 1].

    Raises:
        ConfigError: different lengths, fewer than 2 pairs, or a confidence outside (0, 1).
        NumericsError: a value is NaN or infinite, or one side is constant, so that it has no ranks.
    """
    first, second = paired(x, y)
    check_confidence(confidence)
    n = len(first)
    at_least(n, 2, "the number of pairs")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        raise NumericsError("a constant has no rank correlation", got=f"{n} equal values", expected="values that vary")
    ranks = stats.rankdata(np.stack([first, second]), axis=1)
    rho = float(np.clip(np.corrcoef(ranks)[0, 1], -1, 1))
    if n < 4:
        return Correlation(rho, -1.0, 1.0, n)
    nearest = 1 - 12 / (n**3 - n)
    z = math.atanh(min(max(rho, -nearest), nearest))
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return Correlation(rho, min(rho, math.tanh(z - half)), max(rho, math.tanh(z + half)), n)


def jaccard(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """Overlap of two selections: size of the intersection over size of the union (Jaccard 1901).

    Args:
        a: ids; repeated ids count once.
        b: ids.

    Returns:
        A share in [0, 1].

    Raises:
        ConfigError: both are empty.
    """
    first, second = set(a), set(b)
    if not first | second:
        raise ConfigError("two empty selections have no overlap", expected="at least one id")
    return len(first & second) / len(first | second)


def decision_accuracy(small: Numbers, large: Numbers) -> float:
    """Share of pairs of arms that the small setting puts in the order of the large one (DataDecide, 2504.11393).

    A pair that is tied in either setting counts half (ours), so the result is (1 + Kendall's tau-a) / 2.

    Args:
        small: one score per arm from the small or cheap setting.
        large: one score per arm, same order, from the setting that matters.

    Returns:
        A share in [0, 1]; 0.5 is what a coin reaches.

    Raises:
        ConfigError: different lengths or fewer than 2 arms.
        NumericsError: a score is NaN or infinite.
    """
    first, second = paired(small, large)
    at_least(len(first), 2, "the number of arms")
    i, j = np.triu_indices(len(first), 1)
    agree = np.sign(first[i] - first[j]) * np.sign(second[i] - second[j])
    return float((1 + agree.mean()) / 2)
