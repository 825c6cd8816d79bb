"""Rows whose gradient is orthogonal to the mean anchor.

Source: Zhang, Tian, Wang, Song, "Orthogonal Gradient Selection", 2026, arXiv 2602.06359: the static orthogonality
score. Only the abstract was read; the formula is known from summaries. This is no reproduction.

Algorithm:
    1  G = (1/M) sum_m G_m, the mean of the anchors' mean gradients
    2  c_i = <g_i, G> / (|g_i| |G|);  Orth_i = 1 - |c_i|
    3  take the rows of largest Orth_i

Departures from the paper: every anchor source has equal weight in G, and each is a mean over its rows. The score is
two-sided: a row that helps the anchor as much as another harms it gets the same score, and a row that teaches nothing
gets the best one. ``conflict`` is the one-sided form, ``ogs_dual`` the one that constrains sums.

Departures from released code: no official code was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from gradsift.errors import NumericsError, SignalError
from gradsift.geometry.similarity import mean_cosine
from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection


@dataclass(frozen=True)
class MeanAnchor:
    """Cosines with the mean of several anchors.

    Args:
        cos: float64 [N] cosine of each row with the mean anchor.
        amplification: sum of the anchors' norms over the norm of their sum, >= 1: how much noise of a single cosine
            grows in the mean's; large where the anchors cancel.
    """

    cos: Float[np.ndarray, " N"]
    amplification: float


def mean_anchor(problem: Problem, gram: Float[np.ndarray, "M M"]) -> MeanAnchor:
    """Cosine of each row with the mean of the anchors' gradients, from dots alone (ours; ogs, scores).

    Args:
        problem: the eligible rows with ``anchor_dot``, ``grad_norm`` and ``anchors``.
        gram: float64 [M, M] dots <u_m, u_m'> of the unit directions.

    Returns:
        Cosines and the amplification of their noise.

    Raises:
        NumericsError: the anchors cancel, so their mean has no direction.
    """
    assert problem.anchor_dot is not None
    assert problem.grad_norm is not None
    norms = np.array([anchor.norm for anchor in problem.anchors])
    length, total = float(np.sqrt(max(norms @ gram @ norms, 0.0))), float(norms.sum())
    if length <= 1e-6 * total:
        raise NumericsError(
            "the anchors cancel in their mean",
            where="the mean anchor",
            got=f"length {length:.3g} of a sum of lengths {total:.3g}",
            expected="a mean with a direction",
            do="use conflict, hybrid or ogs_dual, which keep one direction per anchor",
        )
    cos = mean_cosine(problem.anchor_dot, problem.grad_norm, gram, weights=norms)
    return MeanAnchor(cos, total / length)


@register
@dataclass(frozen=True)
class OgsStatic:
    """Highest orthogonality to the mean anchor."""

    name: ClassVar[str] = "ogs_static"
    paper: ClassVar[str] = "after Zhang et al. 2026, arXiv 2602.06359"
    summary: ClassVar[str] = "gradients most orthogonal to the mean anchor"
    evidence: ClassVar[str] = "abstract + summaries"

    @property
    def needs(self) -> Needs:
        """One forward and backward pass, and at least one anchor."""
        return Needs(signals=frozenset({"anchor_dot", "grad_norm"}), anchors=True, constrains=True, by_row=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows most orthogonal to the mean anchor.

        Args:
            problem: the eligible rows with ``anchor_dot``, ``grad_norm``, ``anchors`` and, for several anchors, ``gram``.
            budget: how many rows or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are in [0, 1].
        """
        require(problem, self)
        mean = mean_anchor(problem, _anchor_gram(problem))
        cos = mean.cos
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=1 - np.abs(cos),
            bound=problem.noise.cos * mean.amplification,
            kept="orthogonal",
            why_kept=lambda i: f"orthogonality {1 - abs(cos[i]):.3f}, cosine {cos[i]:+.3f} with the mean anchor",
        )


def _anchor_gram(problem: Problem) -> Float[np.ndarray, "M M"]:
    num = len(problem.anchors)
    if problem.gram is not None:
        return problem.gram[:num, :num]
    if num == 1:
        return np.ones((1, 1))
    raise SignalError(
        "ogs_static needs the dots between the anchors (gram) to average several of them",
        where="gram",
        got="not measured",
        expected=f"a [{num}, {num}] matrix",
        do="collect the anchors again with the same --out",
    )
