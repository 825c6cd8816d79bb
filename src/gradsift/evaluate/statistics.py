"""Intervals of paired differences between arms, and how often each rule is wrong on null data.

The two-sided Student t interval over paired seeds decides, and only from 10 seeds on. A percentile bootstrap is shown
beside it and never decides: its 95% interval excludes zero in about 16% of null draws at n = 5 and 10% at n = 10.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from gradsift.errors import ConfigError
from gradsift.evaluate.checks import Numbers, at_least, check_confidence, finite, paired
from gradsift.evaluate.ranks import (
    Correlation,
    Wins,
    auc,
    decision_accuracy,
    iqm,
    jaccard,
    paired_wins,
    probability_of_improvement,
    spearman_interval,
)
from gradsift.seeds import Stream

__all__ = [
    "MIN_CONFIDENCE",
    "MIN_SEEDS",
    "BootstrapInterval",
    "Correlation",
    "Interval",
    "Uniformity",
    "Wins",
    "auc",
    "cluster_bootstrap",
    "decision_accuracy",
    "enough_for_a_claim",
    "false_positive_rate",
    "iqm",
    "jaccard",
    "kolmogorov_smirnov_uniform",
    "paired_interval",
    "paired_wins",
    "probability_of_improvement",
    "smallest_detectable",
    "spearman_interval",
]

MIN_SEEDS = 10
MIN_CONFIDENCE = 0.95
_CHUNK = 4_000_000  # resampled numbers held at once, 32 MB

Rule = Literal["t", "bootstrap"]


@dataclass(frozen=True)
class Interval:
    """Mean of n paired differences with its two-sided Student t interval.

    Args:
        mean: mean difference, in the metric's unit; positive is better.
        sd: standard deviation of the differences (n - 1 in the denominator); NaN for n = 1.
        low: lower end; -inf for n = 1.
        high: upper end; +inf for n = 1.
        n: number of pairs.
        p_value: two-sided, in [0, 1]; NaN for n = 1.
        confidence: share of such intervals that cover the truth, in (0, 1).
    """

    mean: float
    sd: float
    low: float
    high: float
    n: int
    p_value: float
    confidence: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the closed interval."""
        return self.low > 0 or self.high < 0

    @property
    def constant(self) -> bool:
        """Whether every pair gave the same difference: seeds that change nothing are one measurement, however many."""
        return self.n > 1 and self.sd == 0

    @property
    def supports_gain(self) -> bool:
        """Whether a claim may rest on it: 10 seeds or more that differ, 95% or more, and all of it above zero."""
        return enough_for_a_claim(self.n) and not self.constant and self.confidence >= MIN_CONFIDENCE and self.low > 0

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:+.3f} [no interval], n = 1"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], n = {self.n}"


@dataclass(frozen=True)
class BootstrapInterval:
    """Percentile interval of a cluster bootstrap: shown beside the t interval, never decides.

    Args:
        mean: mean of all differences.
        low: lower percentile; -inf for one cluster.
        high: upper percentile; +inf for one cluster.
        num_clusters: clusters that were resampled.
        num_values: differences in them.
        num_draws: resamples.
        confidence: nominal, in (0, 1); the true one is lower when clusters are few.
    """

    mean: float
    low: float
    high: float
    num_clusters: int
    num_values: int
    num_draws: int
    confidence: float = 0.95

    def __str__(self) -> str:
        if self.num_clusters == 1:
            return f"{self.mean:+.3f} [no interval], 1 cluster"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {self.num_clusters} clusters (bootstrap)"


@dataclass(frozen=True)
class Uniformity:
    """A Kolmogorov-Smirnov test against the uniform distribution on [0, 1].

    Args:
        statistic: largest distance between the two distribution functions, in [0, 1].
        p_value: probability of at least that distance when the values are uniform.
        n: number of values.
    """

    statistic: float
    p_value: float
    n: int


def enough_for_a_claim(n: int) -> bool:
    """Return whether n paired seeds are enough for a claim: n >= 10 (ours, trial definition).

    Args:
        n: number of paired seeds.

    Returns:
        True from 10 on.
    """
    return n >= MIN_SEEDS


def paired_interval(a: Numbers, b: Numbers, confidence: float = 0.95) -> Interval:
    """Two-sided Student t interval of the mean of a - b, paired by position (Student 1908).

    One pair gives no interval: the ends are infinite, sd and p-value NaN. Differences that are all equal (up to the
    rounding of one subtraction) give sd 0, an interval of width 0, and p-value 1 at zero and 0 elsewhere, the limits of
    the t test; ``Interval.constant`` tells them apart.

    Args:
        a: n metric values of the arm, one per seed, in seed order.
        b: n metric values of the baseline for the same seeds.
        confidence: in (0, 1).

    Returns:
        The interval.

    Raises:
        ConfigError: different lengths, no pair, or a confidence outside (0, 1).
        NumericsError: a value is NaN or infinite.
    """
    first, second = paired(a, b)
    check_confidence(confidence)
    differences = first - second
    n, mean = len(differences), float(differences.mean())
    if n == 1:
        return Interval(mean, math.nan, -math.inf, math.inf, 1, math.nan, confidence)
    sd = float(differences.std(ddof=1))
    rounding = 4 * np.finfo(float).eps * float(np.abs([first, second]).max())
    if sd <= rounding:
        mean = mean if abs(mean) > rounding else 0.0
        return Interval(mean, 0.0, mean, mean, n, 0.0 if mean else 1.0, confidence)
    se = sd / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * se
    p_value = float(2 * stats.t.sf(abs(mean) / se, n - 1))
    return Interval(mean, sd, mean - half, mean + half, n, p_value, confidence)


def cluster_bootstrap(
    differences: Numbers,
    clusters: Sequence[Hashable],
    stream: Stream,
    num_draws: int = 10_000,
    confidence: float = 0.95,
) -> BootstrapInterval:
    """Percentile interval of the mean when whole clusters are drawn with replacement; shown beside and never decides.

    A draw takes as many clusters as there are and averages all their values, so a large cluster weighs more (Miller
    2411.00640 on clustered questions; Efron's percentile interval). Clusters are read in sorted order, so the order of
    the values does not matter. Undercovers when clusters are few: see ``false_positive_rate``.

    Args:
        differences: n paired differences.
        clusters: n labels, of one sortable kind; equal labels are drawn together.
        stream: source of the draws.
        num_draws: resamples, >= 1.
        confidence: in (0, 1).

    Returns:
        The interval; infinite ends for one cluster.

    Raises:
        ConfigError: lengths differ, nothing is given, or a setting is out of range.
        NumericsError: a difference is NaN or infinite.
    """
    values = finite(differences, "differences")
    check_confidence(confidence)
    at_least(num_draws, 1, "num_draws")
    if len(clusters) != len(values):
        raise ConfigError("every difference needs one cluster", got=f"{len(clusters)} labels, {len(values)} values")
    place = {label: index for index, label in enumerate(sorted(set(clusters)))}  # type: ignore[type-var]
    which = np.array([place[label] for label in clusters])
    size, mean = len(place), float(values.mean())
    if size == 1:
        return BootstrapInterval(mean, -math.inf, math.inf, 1, len(values), num_draws, confidence)
    total, count = np.bincount(which, values), np.bincount(which)
    rng, means = stream.numpy(), []
    for rows in _chunks(num_draws, size):
        drawn = rng.integers(0, size, (rows, size))
        means.append(total[drawn].sum(axis=1) / count[drawn].sum(axis=1))
    low, high = _percentiles(np.concatenate(means), confidence)
    return BootstrapInterval(mean, float(low), float(high), size, len(values), num_draws, confidence)


def false_positive_rate(
    n: int, stream: Stream, num_draws: int = 20_000, rule: Rule = "t", num_resamples: int = 2_000
) -> float:
    """Simulate how often the 95% interval of a rule excludes zero when n standard normal differences have mean zero.

    The bootstrap rule is the percentile interval over n clusters of one value. All null draws share one set of
    resamples, which turns them into one matrix product; the draws stay independent of each other.

    Args:
        n: number of paired seeds, >= 2.
        stream: source of the draws.
        num_draws: null experiments, >= 1; the standard error of the rate is sqrt(rate (1 - rate) / num_draws).
        rule: ``t`` or ``bootstrap``.
        num_resamples: resamples per experiment of the bootstrap rule, >= 1.

    Returns:
        Share of null draws whose interval excludes zero, in [0, 1].

    Raises:
        ConfigError: a number out of range or an unknown rule.
    """
    at_least(n, 2, "n")
    at_least(num_draws, 1, "num_draws")
    at_least(num_resamples, 1, "num_resamples")
    null = stream.child("null").numpy().standard_normal((num_draws, n))
    if rule == "t":
        mean, se = null.mean(axis=1), null.std(axis=1, ddof=1) / math.sqrt(n)
        return float((np.abs(mean) > stats.t.ppf(0.975, n - 1) * se).mean())
    if rule != "bootstrap":
        raise ConfigError("unknown rule", got=rule, expected="t or bootstrap")
    weights = stream.child("resamples").numpy().multinomial(n, np.full(n, 1 / n), num_resamples) / n
    excluded, start = 0, 0
    for rows in _chunks(num_draws, num_resamples):
        low, high = _percentiles(null[start : start + rows] @ weights.T, 0.95)
        excluded, start = excluded + int(((low > 0) | (high < 0)).sum()), start + rows
    return excluded / num_draws


def smallest_detectable(sd: float, n: int) -> float:
    """Smallest true mean difference that n pairs find in about 80% of repeats at the 5% level: 2.8 sd / sqrt(n).

    2.8 = 1.96 + 0.84, normal quantiles; a little too small below 10 pairs.

    Args:
        sd: standard deviation of the paired differences, >= 0, in the metric's unit.
        n: number of pairs, >= 1.

    Returns:
        The difference, in the metric's unit.

    Raises:
        ConfigError: sd is negative or not finite, or n is below 1.
    """
    at_least(n, 1, "n")
    if not (sd >= 0 and math.isfinite(sd)):
        raise ConfigError("a standard deviation is finite and not negative", got=sd, expected=">= 0")
    return 2.8 * sd / math.sqrt(n)


def kolmogorov_smirnov_uniform(p_values: Numbers) -> Uniformity:
    """Test p-values of null runs against the uniform distribution they must have (Kolmogorov 1933; scipy's kstest).

    Args:
        p_values: n values in [0, 1].

    Returns:
        Distance and p-value.

    Raises:
        ConfigError: no value, or one outside [0, 1].
        NumericsError: a value is NaN or infinite.
    """
    values = finite(p_values, "p-values")
    if values.min() < 0 or values.max() > 1:
        raise ConfigError("a p-value lies in [0, 1]", got=f"{values.min():g} to {values.max():g}")
    found = stats.kstest(values, "uniform")
    return Uniformity(float(found.statistic), float(found.pvalue), len(values))


def _chunks(num_rows: int, width: int) -> list[int]:
    """Split num_rows into row counts of at most _CHUNK numbers each (a single row may be wider)."""
    rows = max(1, _CHUNK // width)
    return [min(rows, num_rows - start) for start in range(0, num_rows, rows)]


def _percentiles(draws: Float[np.ndarray, "... draws"], confidence: float) -> Float[np.ndarray, "ends ..."]:
    tail = (1 - confidence) / 2
    return np.quantile(draws, [tail, 1 - tail], axis=-1)
