"""Rows whose hidden states are nearest to those of the target's rows.

Paper: Ivison, Zhang, Brahman, Koh, Dasigi, "Large-Scale Data Selection for Instruction Tuning", 2025, arXiv 2503.01807
(RDS+): the embedding baseline that gradient selectors are compared with, at the cost of one forward.

Algorithm:
    1  e = sum_t t h_t / sum_t t over all tokens of a row, prompt and completion; h_t the last hidden state, t = 1 .. n
    2  c_iq = cos(e_i, e_q) for every pool row i and target row q
    3  each target row in turn takes the row of largest c_iq that is left, until the budget is used up

``aggregate = mean`` or ``max`` ranks by the mean or largest c_iq over the target rows instead of step 3.

Departures from the paper: the navigator embeds, whatever its size, and reads rows with the trainer's own template and
truncation; target rows take their turns in id order, so that their order in the file does not matter; a token budget
skips rows that do not fit, and the turn passes on; several tasks are one target set, each of whose rows counts alike.

Departures from released code: none was read, because it carries no license.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from gradsift.errors import NumericsError
from gradsift.geometry.embed import Turns, cosine_table, take_in_turns, unsettled
from gradsift.methods.base import (
    Needs,
    build_selection,
    register,
    require,
    resolve_budget,
    select_ranked,
    shortage_note,
    take_ranked,
)
from gradsift.seeds import Stream
from gradsift.types import Budget, Cut, Note, Problem, Selection


@register
@dataclass(frozen=True)
class Rds:
    """Nearest rows by pooled hidden states.

    Args:
        aggregate: ``round_robin`` lets target rows choose in turn, ``mean`` and ``max`` rank by the cosines with them.
    """

    name: ClassVar[str] = "rds"
    paper: ClassVar[str] = "Ivison et al. 2025, arXiv 2503.01807 (RDS+)"
    summary: ClassVar[str] = "nearest hidden states: each target row in turn takes its closest row"
    evidence: ClassVar[str] = "abstract"

    aggregate: Literal["round_robin", "mean", "max"] = "round_robin"

    @property
    def needs(self) -> Needs:
        """One forward pass over pool and target."""
        return Needs(signals=frozenset({"embedding"}), target=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows nearest to the target's rows.

        Args:
            problem: the eligible rows with ``embedding``, and the ``target_embedding``.
            budget: rows, percentage or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection. Scores are mean or largest cosines, or, in turns, minus the number of the turn.
        """
        require(problem, self)
        assert problem.embedding is not None
        assert problem.target_embedding is not None
        _refuse_zero(problem.embedding, problem.ids, "row")
        _refuse_zero(problem.target_embedding, problem.target_ids, "target row")
        cosines = cosine_table(problem.embedding, problem.target_embedding)
        if self.aggregate == "round_robin":
            return self._in_turns(problem, budget, stream, cosines)
        wide = cosines.astype(np.float64)
        score = wide.mean(axis=1) if self.aggregate == "mean" else wide.max(axis=1)
        nearest, median = cosines.argmax(axis=1), float(np.median(score))
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=score,
            bound=problem.noise.embedding,
            kept=self.aggregate,
            why_kept=lambda i: (
                f"{self.aggregate} cosine {score[i]:.4f}, pool median {median:.4f}; nearest to target row "
                f"{problem.target_ids[nearest[i]]}"
            ),
        )

    def _in_turns(
        self, problem: Problem, budget: Budget, stream: Stream, cosines: Float[np.ndarray, "N n_t"]
    ) -> Selection:
        turns, allowance = take_in_turns(cosines), resolve_budget(problem, budget)
        turn_of = np.empty(problem.size, dtype=np.int64)
        turn_of[turns.order] = np.arange(problem.size)
        taken = take_ranked(problem, -1.0 - turn_of, allowance)
        used = int(turn_of[taken.chosen].max()) + 1
        reach = 2 * problem.noise.embedding  # both cosines of a comparison may move
        cut, notes = Cut(0.0, reach), shortage_note(problem, allowance, taken)
        if len(taken.chosen) < problem.size:
            undecided = unsettled(turns, cosines, used, reach)
            cut = Cut(float(turns.gap[:used].min()), reach, tuple(problem.ids[i] for i in undecided))
            notes += _near_ties(problem, turns, used, reach) if undecided.size else ()

        def why(i: int) -> str:
            q = turns.taker[turn_of[i]]
            return f"nearest row left to target row {problem.target_ids[q]}, cosine {cosines[i, q]:.4f}"

        return build_selection(
            problem,
            self,
            budget,
            stream,
            chosen=taken.chosen,
            score=-1.0 - turn_of,
            order=taken.order,
            skipped=taken.skipped,
            cut=cut,
            kept="turn",
            why_kept=why,
            notes=notes,
        )


def _near_ties(problem: Problem, turns: Turns, used: int, reach: float) -> tuple[Note, ...]:
    """Say at how many turns the measurement does not settle which row is nearer."""
    close = np.flatnonzero(turns.gap[:used] <= reach)
    text = (
        f"at {len(close)} of {used} turns two rows were closer than the numerical bound; each such turn can exchange one "
        "row for another, and the undecided rows are all that this could ever reach"
    )
    return (Note("near_ties", text, len(close), tuple(problem.ids[i] for i in turns.order[close[:5]])),)


def _refuse_zero(rows: Float[np.ndarray, "n d"], ids: tuple[str, ...], what: str) -> None:
    zero = np.flatnonzero(~rows.any(axis=1))
    if zero.size:
        raise NumericsError(
            "signal embedding is zero",
            where=f"{what} {ids[zero[0]]}",
            expected="a hidden state that is not zero everywhere: zero has no direction",
            do="check the navigator with gradsift doctor",
        )
