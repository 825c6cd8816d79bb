"""Linear datamodeling score (pure maths): do summed scores of random subsets rank what models trained on them do?

Park et al. 2023, TRAK, arXiv 2303.14186, section 2: for a target t, Spearman's correlation over subsets S between
sum_{i in S} score_i(t) and the output of a model trained on S, averaged over targets. Seeds of training make outputs noisy,
so the correlation between two trainings of the same subsets is printed beside it: no score can be expected to do better.
N rows, T targets, S subsets, R trainings of each subset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from gradsift.errors import ConfigError, NumericsError
from gradsift.evaluate.checks import at_least
from gradsift.evaluate.statistics import BootstrapInterval, Interval, paired_interval
from gradsift.seeds import Stream


@dataclass(frozen=True)
class Lds:
    """A linear datamodeling score.

    Args:
        per_target: float64 [T] Spearman's correlation over the subsets, in [-1, 1].
        interval: mean over targets with a t interval over targets; the targets share their subsets, so it says nothing of
            what other subsets would give (see :func:`subset_bootstrap`).
        num_subsets: S.
    """

    per_target: Float[np.ndarray, " T"]
    interval: Interval
    num_subsets: int


@dataclass(frozen=True)
class Ceiling:
    """How well one training of the subsets predicts another.

    Args:
        single: mean over targets and pairs of trainings of the correlation between their outputs.
        of_mean: correlation that the mean of R trainings would have with its own expectation, sqrt(R c / (1 + (R - 1) c))
            with c = single (Spearman 1910, Brown 1910); NaN where c < 0. An ideal score reaches about this.
        num_runs: R.
    """

    single: float
    of_mean: float
    num_runs: int


def half_subsets(
    ids: Sequence[str], num_subsets: int, stream: Stream, *, share: float = 0.5
) -> Bool[np.ndarray, "S N"]:
    """Draw random subsets, each of the same size.

    Args:
        ids: N unique row ids; a row's draws depend on its id, not on its place.
        num_subsets: S >= 1.
        stream: source of the draws.
        share: of the rows in each subset, in (0, 1).

    Returns:
        bool [S, N], floor(share N) rows true in each subset.

    Raises:
        ConfigError: a share that leaves a subset empty or whole, or no subset.
    """
    at_least(num_subsets, 1, "the number of subsets")
    size = math.floor(share * len(ids))
    if not 0 < size < len(ids):
        raise ConfigError(
            "a subset must hold some rows and leave some out",
            got=f"share {share} of {len(ids)} rows",
            expected="0 < floor(share N) < N",
        )
    members = np.zeros((num_subsets, len(ids)), dtype=bool)
    for s in range(num_subsets):
        draws = stream.child(str(s)).uniform(ids)
        members[s, np.lexsort((np.array(ids), draws))[:size]] = True
    return members


def subset_scores(scores: Float[np.ndarray, "N T"], members: Bool[np.ndarray, "S N"]) -> Float[np.ndarray, "S T"]:
    """Add up the scores of each subset's rows: the linear datamodel's prediction (TRAK, definition 2.3).

    Args:
        scores: [N, T] score of each row for each target; higher raises the target's output more.
        members: [S, N] rows of each subset.

    Returns:
        float64 [S, T].
    """
    return members.astype(np.float64) @ np.asarray(scores, dtype=np.float64)


def datamodeling_score(
    scores: Float[np.ndarray, "N T"],
    members: Bool[np.ndarray, "S N"],
    outputs: Float[np.ndarray, "S T"],
    confidence: float = 0.95,
) -> Lds:
    """Rank correlation between predicted and measured outputs over subsets, averaged over targets (TRAK, eq. 5).

    Args:
        scores: [N, T] score of each row for each target; a score without targets is repeated T times.
        members: [S, N] rows of each subset, S >= 4.
        outputs: [S, T] output of the model trained on each subset, signed like the scores (for example minus the loss).
        confidence: of the interval, in (0, 1).

    Returns:
        The score.

    Raises:
        ConfigError: fewer than 4 subsets or shapes that do not fit.
        NumericsError: a value is not finite, or a target's outputs or predictions do not vary.
    """
    _fit(scores, members, outputs)
    rho = _spearman(_ranks(subset_scores(scores, members), "predictions"), _ranks(outputs, "outputs"))
    return Lds(rho, paired_interval(rho, np.zeros(len(rho)), confidence), len(members))


def subset_bootstrap(
    scores: Float[np.ndarray, "N T"],
    members: Bool[np.ndarray, "S N"],
    outputs: Float[np.ndarray, "S T"],
    stream: Stream,
    num_draws: int = 500,
    confidence: float = 0.95,
) -> BootstrapInterval:
    """Percentile interval when subsets and targets are both drawn again (ours; shown beside and never decides).

    Args:
        scores: [N, T].
        members: [S, N].
        outputs: [S, T].
        stream: source of the draws.
        num_draws: resamples, >= 1.
        confidence: nominal, in (0, 1).

    Returns:
        The interval of the mean over targets; clusters are subsets.
    """
    _fit(scores, members, outputs)
    at_least(num_draws, 1, "the number of draws")
    predicted, rng = subset_scores(scores, members), stream.numpy()
    num_subsets, num_targets = outputs.shape
    center = float(_spearman(_ranks(predicted, "predictions"), _ranks(outputs, "outputs")).mean())
    means = []
    for _ in range(num_draws):
        rows, columns = rng.integers(num_subsets, size=num_subsets), rng.integers(num_targets, size=num_targets)
        some = np.ix_(rows, columns)
        means.append(_spearman(_ranks(predicted[some], "predictions"), _ranks(outputs[some], "outputs")).mean())
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return BootstrapInterval(center, float(low), float(high), num_subsets, outputs.size, num_draws, confidence)


def noise_ceiling(outputs: Float[np.ndarray, "R S T"]) -> Ceiling:
    """Correlate repeated trainings of the same subsets with each other.

    Args:
        outputs: [R, S, T] outputs of R >= 2 trainings that differ in their seed only.

    Returns:
        The ceiling.

    Raises:
        ConfigError: fewer than 2 trainings.
        NumericsError: outputs that are not finite or do not vary.
    """
    num_runs = len(outputs)
    at_least(num_runs, 2, "the number of trainings")
    ranks = [_ranks(run, "outputs") for run in outputs]
    pairs = [_spearman(ranks[a], ranks[b]).mean() for a in range(num_runs) for b in range(a)]
    single = float(np.mean(pairs))
    of_mean = math.sqrt(num_runs * single / (1 + (num_runs - 1) * single)) if single >= 0 else math.nan
    return Ceiling(single, of_mean, num_runs)


def _fit(scores: np.ndarray, members: np.ndarray, outputs: np.ndarray) -> None:
    at_least(len(members), 4, "the number of subsets")
    wanted = (members.shape[1], outputs.shape[1])
    if scores.shape != wanted or len(outputs) != len(members):
        raise ConfigError(
            "scores, subsets and outputs do not fit together",
            got=f"scores {scores.shape}, subsets {members.shape}, outputs {outputs.shape}",
            expected="[N, T], [S, N] and [S, T]",
        )


def _ranks(values: Float[np.ndarray, "S T"], what: str) -> Float[np.ndarray, "S T"]:
    """Centered ranks of unit length per column, ties averaged."""
    if not np.isfinite(values).all():
        raise NumericsError(f"the {what} are not finite", got=f"{int((~np.isfinite(values)).sum())} such values")
    flat = np.flatnonzero(np.ptp(values, axis=0) == 0)
    if len(flat):
        raise NumericsError(
            f"the {what} of a target do not vary over the subsets, so they have no ranks",
            where=f"target {flat[0]} and {len(flat) - 1} more",
            do="leave the target out of every score and say so",
        )
    ranks = stats.rankdata(values, axis=0)
    ranks -= ranks.mean(axis=0)
    return ranks / np.linalg.norm(ranks, axis=0)


def _spearman(a: Float[np.ndarray, "S T"], b: Float[np.ndarray, "S T"]) -> Float[np.ndarray, " T"]:
    return np.clip((a * b).sum(axis=0), -1.0, 1.0)
