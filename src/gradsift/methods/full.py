"""All eligible rows: the control that a selection should come close to, or beat.

Source: no paper; full-data fine-tuning.

Algorithm:
    1  take every eligible row, in id order

Departures from the paper: none, there is no paper.

Departures from released code: none. The budget is ignored, and a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradsift.methods.base import Needs, build_selection, register, require
from gradsift.seeds import Stream
from gradsift.types import Budget, Note, Problem, Selection


@register
@dataclass(frozen=True)
class Full:
    """Every eligible row."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "control"
    summary: ClassVar[str] = "all eligible rows; ignores the budget"
    evidence: ClassVar[str] = "control"

    @property
    def needs(self) -> Needs:
        """Nothing is measured."""
        return Needs()

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take all rows of the problem.

        Args:
            problem: the eligible rows.
            budget: ignored.
            stream: unused, nothing is drawn.

        Returns:
            The selection; it has no scores.
        """
        require(problem, self)
        rows = np.arange(problem.size)
        text = f"full takes all {problem.size} eligible rows; the budget {budget} is ignored"
        return build_selection(
            problem,
            self,
            budget,
            stream,
            chosen=rows,
            score=np.full(problem.size, np.nan),
            order=rows,
            kept="all",
            why_kept="every eligible row is taken",
            notes=[Note("budget_ignored", text, problem.size)],
        )
