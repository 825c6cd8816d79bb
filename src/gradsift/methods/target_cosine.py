"""Rows whose gradient points where the target's does.

Source: Xia, Malladi, Gururangan, Arora, Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning", 2024,
arXiv 2402.04333, reduced to one checkpoint and raw gradients.

Algorithm:
    1  t_i = <g_i, u_target> / |g_i|, u_target the unit mean gradient of the target set
    2  take the rows of largest t_i

Departures from the paper: the raw gradient instead of Adam's direction, one checkpoint instead of a sum over a warm-up
run, the mean over all target rows instead of the maximum over subtasks, and exact dots instead of projected ones.

Departures from released code: none beyond those; it is a baseline and no reproduction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection


@register
@dataclass(frozen=True)
class TargetCosine:
    """Highest cosine with the target direction."""

    name: ClassVar[str] = "target_cosine"
    paper: ClassVar[str] = "after Xia et al. 2024, arXiv 2402.04333"
    summary: ClassVar[str] = "highest gradient cosine with the target set"
    evidence: ClassVar[str] = "ours"

    @property
    def needs(self) -> Needs:
        """One forward and backward pass, and a target set."""
        return Needs(signals=frozenset({"target_dot", "grad_norm"}), target=True, by_row=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows closest to the target in direction.

        Args:
            problem: the eligible rows with ``target_dot`` and ``grad_norm``.
            budget: how many rows or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are cosines in [-1, 1].
        """
        require(problem, self)
        cos = problem.target_cos
        assert cos is not None
        median = float(np.median(cos))
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=cos,
            bound=problem.noise.cos,
            kept="target",
            why_kept=lambda i: f"cosine {cos[i]:.3f} with the target, pool median {median:.3f}",
        )
