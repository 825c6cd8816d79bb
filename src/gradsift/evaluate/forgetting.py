"""Forgetting per question: what was right and is wrong now, and the reverse, with guessing taken out.

Averages hide compensation, so transitions are counted (right -> wrong is forgetting, wrong -> right backward transfer;
arXiv 2510.17776, openreview znzsM56COB in trials.md section 11). The adjustment for guessing is derived here (ours):

A question with chance c = 1 / options is known or guessed, before and after; a known one is answered right, a guessed
one right with probability c, guesses of the two phases being independent. Let KU be the probability of known then
guessed, UK the reverse and UU of guessed both times. Then

    P(wrong, wrong) = UU (1 - c)^2          P(right, wrong) = KU (1 - c) + UU c (1 - c)

and the second term of P(right, wrong) is what guessing alone produces. Subtracting it leaves

    KU = P(right, wrong) / (1 - c) - c P(wrong, wrong) / (1 - c)^2,

which each question estimates without bias by its own indicators; UK is the same with the phases exchanged. Their
difference is the change of the chance-adjusted accuracy, exactly when all chances are equal. Estimates may fall below 0
by chance and are not clipped, since clipping would add forgetting that is not there. With c = 0 (exact match) they are
the plain shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from gradsift.errors import DataError
from gradsift.evaluate.choice import standard_error


@dataclass(frozen=True)
class Transitions:
    """What became of n questions.

    Args:
        n: questions.
        forgotten: share right before and wrong after, in [0, 1].
        learned: share wrong before and right after (backward transfer), in [0, 1].
        forgotten_adjusted: share known before and only guessed after; can fall below 0 by chance.
        learned_adjusted: share only guessed before and known after; can fall below 0 by chance.
        forgotten_error: standard error of ``forgotten_adjusted``; NaN for one question.
        learned_error: standard error of ``learned_adjusted``; NaN for one question.
    """

    n: int
    forgotten: float
    learned: float
    forgotten_adjusted: float
    learned_adjusted: float
    forgotten_error: float
    learned_error: float


def transitions(
    before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"], chance: Float[np.ndarray, " n"]
) -> Transitions:
    """Count transitions of aligned questions.

    Args:
        before: right before fine-tuning.
        after: right after it, the same questions in the same order.
        chance: probability of guessing each right, in [0, 1); 1 / options for multiple choice, 0 for exact match.

    Returns:
        Plain and chance-adjusted shares.

    Raises:
        DataError: no questions, different numbers of them, or a chance outside [0, 1).
    """
    sizes = {len(before), len(after), len(chance)}
    if len(sizes) != 1 or not len(before) or not ((chance >= 0) & (chance < 1)).all():
        raise DataError(
            "answers before and after must be of the same questions",
            where="transitions",
            got=f"{len(before)} before, {len(after)} after, {len(chance)} chances",
            expected="equal numbers, at least one, chances in [0, 1)",
            do="evaluate both phases with the same file",
        )
    lost, won = before & ~after, ~before & after
    from_guessing = chance * (~before & ~after) / (1 - chance) ** 2
    known_lost, known_won = lost / (1 - chance) - from_guessing, won / (1 - chance) - from_guessing
    return Transitions(
        len(before),
        float(lost.mean()),
        float(won.mean()),
        float(known_lost.mean()),
        float(known_won.mean()),
        standard_error(known_lost),
        standard_error(known_won),
    )


def align(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[int, ...]:
    """Find for every id before its place after.

    Args:
        before: n different ids.
        after: the same ids in any order.

    Returns:
        n positions in ``after``.

    Raises:
        DataError: an id is missing, added or repeated.
    """
    place = {name: i for i, name in enumerate(after)}
    odd = sorted(set(before) ^ place.keys())
    if odd or len(place) != len(after) or len(set(before)) != len(before):
        raise DataError(
            "the two phases did not measure the same rows",
            where=odd[0] if odd else "ids",
            got=f"{len(odd)} rows in one phase only" if odd else "an id stands twice",
            do="evaluate both phases with the same file",
        )
    return tuple(place[name] for name in before)


def average_accuracy(table: Float[np.ndarray, "S S"]) -> float:
    """Mean accuracy over all tasks after the last stage (ACC of GEM, arXiv 1706.08840, equation 2).

    Args:
        table: row i is the accuracy on each of the S tasks after training stage i, in [0, 1].

    Returns:
        The mean of the last row.
    """
    return float(table[-1].mean())


def backward_transfer(table: Float[np.ndarray, "S S"]) -> float:
    """How later stages changed earlier tasks (BWT of GEM, arXiv 1706.08840, equation 3).

    Args:
        table: row i is the accuracy on each of the S >= 2 tasks after training stage i, in [0, 1].

    Returns:
        Mean over tasks but the last of accuracy at the end minus accuracy when the task was learned; negative is
        forgetting.

    Raises:
        DataError: the table is not square, or has fewer than two stages.
    """
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2:
        raise DataError(
            "backward transfer needs a square table of at least two stages", where="table", got=str(table.shape)
        )
    return float((table[-1, :-1] - np.diagonal(table)[:-1]).mean())
