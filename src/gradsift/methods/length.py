"""Longest or shortest rows.

Source: Zhao, Andriushchenko, Croce, Flammarion, "Long Is More for Alignment: A Simple but Tough-to-Beat Baseline for
Instruction Fine-Tuning", 2024, arXiv 2402.04833: fine-tune on the examples with the longest responses.

Algorithm:
    1  T_i = trained tokens of row i
    2  longest: take the rows of largest T_i; shortest: of smallest T_i

Departures from the paper: lengths are the trained tokens that the run itself counts, after truncation, so a row's
length is the one the trainer sees; shortest is ours, as the opposite control.

Departures from released code: no code of the paper was read. Ties go to the smaller id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection


@register
@dataclass(frozen=True)
class Length:
    """Rows by trained tokens.

    Args:
        pick: ``longest`` or ``shortest``.
    """

    pick: Literal["longest", "shortest"] = "longest"

    name: ClassVar[str] = "length"
    paper: ClassVar[str] = "Zhao et al. 2024, arXiv 2402.04833"
    summary: ClassVar[str] = "longest (or shortest) trained spans first"
    evidence: ClassVar[str] = "abstract"

    @property
    def needs(self) -> Needs:
        """Token counts only; they are always there."""
        return Needs()

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the longest or shortest rows.

        Args:
            problem: the eligible rows.
            budget: how many rows or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are plus or minus the trained tokens.
        """
        require(problem, self)
        tokens = problem.num_trained.astype(np.float64)
        median = float(np.median(tokens))
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=tokens if self.pick == "longest" else -tokens,
            kept="length",
            why_kept=lambda i: f"{int(tokens[i])} trained tokens, pool median {median:g}",
        )
