"""Rows by the norm of their gradient: smallest, closest to the median, or largest.

Source: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", 2021,
arXiv 2107.07075: rank by the norm of the example's gradient (GraNd) and keep the largest.

Algorithm:
    1  n_i = log |g_i|, the exact norm on the navigator's trained parameters
    2  low: take the smallest n_i;  high: the largest;  middle: the smallest |n_i - median(n)|

Departures from the paper: one pretrained navigator instead of an average over several early training runs; low and
middle are ours, because a mean loss over few tokens has a large gradient and the largest norms are often the shortest
rows.

Departures from released code: no code of the paper was read. The logarithm keeps the order and turns the relative
bound of a measured norm into an absolute one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.methods.loss import Band, band_bound, band_score
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection


@register
@dataclass(frozen=True)
class Norm:
    """A band of the gradient norms.

    Args:
        band: ``low``, ``middle`` or ``high``.
    """

    band: Band = "middle"

    name: ClassVar[str] = "norm"
    paper: ClassVar[str] = "Paul et al. 2021, arXiv 2107.07075"
    summary: ClassVar[str] = "smallest, middle or largest gradient norm"
    evidence: ClassVar[str] = "abstract"

    @property
    def needs(self) -> Needs:
        """One forward and backward pass."""
        return Needs(signals=frozenset({"grad_norm"}), by_row=self.band != "middle")

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take one band of the gradient norms.

        Args:
            problem: the eligible rows with ``grad_norm``.
            budget: how many rows or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are differences of log norms.
        """
        require(problem, self)
        norm = problem.grad_norm
        assert norm is not None
        median = float(np.median(norm))
        relative = problem.noise.norm
        noise = -float(np.log1p(-relative)) if relative < 1 else np.inf  # |log(n + e n) - log n| for |e| <= relative
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=band_score(np.log(norm), self.band),
            bound=band_bound(noise, self.band),
            kept="norm",
            why_kept=lambda i: f"gradient norm {norm[i]:.3g}, pool median {median:.3g}",
        )
