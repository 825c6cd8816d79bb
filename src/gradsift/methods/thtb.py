"""A funnel to hard rows: quality, then thinking level and disciplines, then length and place among the prompts.

Paper: Shang et al., "The Harder The Better: Maintaining Supervised Fine-tuning Generalization with Less but Harder Data",
2025, arXiv 2510.13892 (THTB). Of the paper only the opening was at hand; formulas are those of its released code.

Algorithm:
    1  q_i = clip((reward + 5)/10, 0, 1); the best keep1 -> P1
    2  on P1: IHS = ((b - 1)/20 + IC)/2, b the thinking level of 1 to 21, IC = minmax(number of disciplines) + mean
       distance of their vectors; the best keep2 -> P2
    3  on P2: EHS = (IREI + SC)/2, IREI = (minmax(prompt + response) + minmax(response / prompt))/2 of the lengths, SC =
       rescaled silhouette of the prompt among K-means clusters of TF-IDF vectors; take the rows of largest EHS
    keep1, keep2, keep3 = 4 f, 1/2, 1/2 for a budget of a fraction f <= 1/4 (20%, 50%, 50% at 5%), else 1, sqrt(f), sqrt(f)

Reward, level, disciplines and their vectors are columns of the rows; gradsift has no judge of its own and makes up none.

Departures from the paper: the bounded forms of the code; the README's length term has an unbounded ratio, which alone
decides the order.

Departures from released code: from DYJG-research/THTB at 2eb4016 in these: lengths are tokens (``unit = chars`` for its own); K is
floor(sqrt(n/2)) of the rows that reach step 3, where the code documents 161, which is that rule on Alpaca; clusters of
one prompt join their neighbor, where the code then sets every SC to 0; scores are not rounded; the last stage keeps as
many rows as the budget, so that rounding down twice leaves none short; below 4 rows SC is 0, and that is said. Departures
from our specification: a row without a score is always refused and never dropped; the level is the score of 1 to 21 only;
nothing stands in for the reward; ranges are those of the stage and are not reported for the whole pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from gradsift.errors import DataError, InfeasibleError
from gradsift.geometry.hardness import (
    bloom_share,
    effort,
    funnel_shares,
    mean_distance,
    min_max,
    quality,
    stage_size,
    text_silhouettes,
)
from gradsift.methods.base import Needs, register, require, resolve_budget, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Column, Note, Problem, Selection


@register
@dataclass(frozen=True)
class Thtb:
    """Hard rows by a funnel of three stages.

    Args:
        reward: column of reward scores, about -5 to 5.
        bloom: column of thinking levels, 1 to 21.
        disciplines: column of lists of disciplines.
        vectors: column of lists of vectors, one per discipline; empty leaves their distance out, which is said.
        unit: of lengths, ``tokens`` or ``chars``.
        max_features: words that the clusters of prompts rest on.
    """

    name: ClassVar[str] = "thtb"
    paper: ClassVar[str] = "Shang et al. 2025, arXiv 2510.13892 (THTB)"
    summary: ClassVar[str] = "a funnel to hard rows by reward, thinking level, disciplines and length; your scores"
    evidence: ClassVar[str] = "sections + code"

    reward: str = "reward"
    bloom: str = "bloom"
    disciplines: str = "disciplines"
    vectors: str = "discipline_vectors"
    unit: Literal["tokens", "chars"] = "tokens"
    max_features: Annotated[int, Field(ge=1)] = 100

    @property
    def needs(self) -> Needs:
        """Columns that somebody else scored, and the rows' texts; no model."""
        columns = [Column(self.reward), Column(self.bloom), Column(self.disciplines, "words")]
        columns += [Column(self.vectors, "vectors")] if self.vectors else []
        return Needs(columns=tuple(columns), texts=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Send the rows through the funnel.

        Args:
            problem: the eligible rows with the columns, the texts and ``num_prompt``.
            budget: rows, percentage or trained tokens.
            stream: of the clusters' first centers.

        Returns:
            The selection; scores are EHS, NaN for rows that left before the last stage.
        """
        require(problem, self)
        self._check(problem)
        prompt, response = self._lengths(problem)
        usable = np.flatnonzero(prompt > 0)
        if not usable.size:
            raise InfeasibleError(
                "no row has a prompt", got=f"{problem.size} rows", expected="prompts that carry no loss",
                do="train on completions only (--loss-on completion or assistant)",
            )  # fmt: skip
        shares = funnel_shares(self._fraction(problem, budget, usable))
        notes = self._first_notes(problem, usable)
        q = quality(problem.external[self.reward])
        first = best(q, usable, stage_size(shares[0], len(usable)))
        ihs = self._intrinsic(problem, first, notes)
        second = best(ihs, first, stage_size(shares[1], len(first)))
        ehs = self._extrinsic(problem, second, (prompt, response), stream, notes)
        candidates = np.zeros(problem.size, dtype=bool)
        candidates[second] = True
        selection = select_ranked(
            problem,
            self,
            budget,
            stream,
            score=ehs,
            kept="extrinsic",
            why_kept=lambda i: f"quality {q[i]:.3f}, intrinsic hardness {ihs[i]:.3f}, extrinsic hardness {ehs[i]:.3f}",
            candidates=candidates,
            dropped=_dropped(q, ihs, usable, first, second),
            notes=notes,
        )
        return _with_length_note(problem, selection)

    def _check(self, problem: Problem) -> None:
        level = problem.external[self.bloom]
        bad = np.flatnonzero((level < 1) | (level > 21))
        if bad.size:
            raise DataError(
                "a thinking level is out of range", where=f"column {self.bloom}, row {problem.ids[bad[0]]}",
                got=str(level[bad[0]]), expected="1 to 21", do="correct the column",
            )  # fmt: skip
        for i in range(problem.size) if self.vectors else ():
            named, given = len(problem.external[self.disciplines][i]), problem.external[self.vectors][i]
            if len(given) != named or any(not np.any(v) for v in given):
                raise DataError(
                    "the vectors of a row's disciplines do not fit", where=f"column {self.vectors}, row {problem.ids[i]}",
                    got=f"{len(given)} vectors for {named} disciplines, or a vector of zeros",
                    expected="one vector per discipline, none zero", do="correct the column, or --set vectors=",
                )  # fmt: skip

    def _lengths(self, problem: Problem) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
        if self.unit == "chars":
            sizes = np.array([[len(a), len(b)] for a, b in problem.texts], dtype=np.float64)
            return sizes[:, 0], sizes[:, 1]
        assert problem.num_prompt is not None
        return problem.num_prompt.astype(np.float64), problem.num_trained.astype(np.float64)

    def _fraction(self, problem: Problem, budget: Budget, usable: Int[np.ndarray, " n"]) -> float:
        """What share of the usable rows, or of their trained tokens, the budget is."""
        allowance = resolve_budget(problem, budget)
        return min(1.0, allowance.amount / int(allowance.cost(problem)[usable].sum()))

    def _intrinsic(self, problem: Problem, rows: Int[np.ndarray, " n"], notes: list[Note]) -> Float[np.ndarray, " N"]:
        named = problem.external[self.disciplines]
        count = np.array([len(named[i]) for i in rows], dtype=np.float64)
        apart = np.zeros(len(rows))
        if self.vectors:
            apart = np.array([mean_distance(list(problem.external[self.vectors][i])) for i in rows])
        if np.ptp(count) == 0:
            notes.append(
                Note("constant", "every row of stage 2 names equally many disciplines: that term is 0", len(rows))
            )
        ihs = np.full(problem.size, np.nan)
        ihs[rows] = (bloom_share(problem.external[self.bloom][rows]) + min_max(count) + apart) / 2.0
        return ihs

    def _extrinsic(
        self,
        problem: Problem,
        rows: Int[np.ndarray, " n"],
        lengths: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]],
        stream: Stream,
        notes: list[Note],
    ) -> Float[np.ndarray, " N"]:
        prompt, response = (length[rows] for length in lengths)
        for what, values in (("in all", prompt + response), ("as a ratio", response / prompt)):
            if np.ptp(values) == 0:
                notes.append(
                    Note("constant", f"the rows of stage 3 are equally long {what}: that term is 0", len(rows))
                )
        found = text_silhouettes([problem.texts[i][0] for i in rows], self.max_features, stream.child("clusters"))
        if not found.defined:
            text = f"the {len(rows)} prompts of stage 3 give no two clusters: silhouettes are 0 for all"
            notes.append(Note("no_clusters", text, len(rows)))
        if found.merged:
            notes.append(Note("merged", f"{found.merged} clusters of one prompt joined their neighbor", found.merged))
        ehs = np.full(problem.size, np.nan)
        ehs[rows] = (effort(prompt, response) + found.score) / 2.0
        return ehs

    def _first_notes(self, problem: Problem, usable: Int[np.ndarray, " n"]) -> list[Note]:
        notes, size = [], problem.size
        if len(usable) < size:
            gone = np.setdiff1d(np.arange(size), usable)
            text = f"{len(gone)} rows have no prompt, so no ratio of lengths, and cannot be chosen"
            notes.append(Note("no_prompt", text, len(gone), tuple(problem.ids[i] for i in gone[:5])))
        reward = problem.external[self.reward]
        clipped = np.flatnonzero(np.abs(reward) > 5)
        if len(clipped) > 0.05 * size:
            text = f"{len(clipped)} of {size} rewards are beyond -5 to 5 and count as if they stood there"
            notes.append(Note("clipped", text, len(clipped), tuple(problem.ids[i] for i in clipped[:5])))
        if np.ptp(reward[usable]) == 0:
            notes.append(Note("constant", "every reward is equal, so stage 1 keeps rows in the order of their ids"))
        bare = np.array([not words for words in problem.external[self.disciplines]])
        if bare.any():
            text = f"{int(bare.sum())} rows name no discipline, which counts as none"
            notes.append(Note("no_discipline", text, int(bare.sum())))
        if not self.vectors:
            notes.append(Note("no_vectors", "disciplines come without vectors: their distance counts as 0 for all"))
        return notes


def best(score: Float[np.ndarray, " N"], rows: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " k"]:
    """Keep the best of some rows, ties to the smaller.

    Args:
        score: float64 [N].
        rows: int64 [n].
        count: how many.

    Returns:
        int64 [count], rising.
    """
    return np.sort(rows[np.lexsort((rows, -score[rows]))][:count])


def _dropped(
    q: Float[np.ndarray, " N"], ihs: Float[np.ndarray, " N"], *stages: Int[np.ndarray, " _"]
) -> dict[int, tuple[str, str]]:
    usable, first, second = (_mask(len(q), rows) for rows in stages)
    least = float(q[first].min()), float(ihs[second].min())
    out: dict[int, tuple[str, str]] = {}
    for i in np.flatnonzero(~second).tolist():
        if not usable[i]:
            out[i] = ("dropped:no_prompt", "no prompt token without loss")
        elif not first[i]:
            out[i] = ("dropped:quality", f"stage 1: quality {q[i]:.3f}, the least that stays is {least[0]:.3f}")
        else:
            out[i] = ("dropped:intrinsic", f"stage 2: hardness {ihs[i]:.3f}, the least that stays is {least[1]:.3f}")
    return out


def _mask(size: int, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " N"]:
    mask = np.zeros(size, dtype=bool)
    mask[rows] = True
    return mask


def _with_length_note(problem: Problem, selection: Selection) -> Selection:
    """Say when the rows chosen are much longer than the pool: hard rows are long rows."""
    import dataclasses

    place = {row: k for k, row in enumerate(problem.ids)}
    taken: Sequence[int] = [place[row] for row in selection.ids]
    here, all_of = float(np.median(problem.num_trained[taken])), float(np.median(problem.num_trained))
    if here <= 1.5 * all_of:
        return selection
    text = f"the rows chosen have a median of {here:.0f} trained tokens, the pool {all_of:.0f}: compare at equal tokens"
    return dataclasses.replace(selection, notes=(*selection.notes, Note("long", text, len(selection.ids))))
