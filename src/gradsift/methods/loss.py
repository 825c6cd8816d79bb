"""Rows by the navigator's loss: lowest, closest to the median, or highest.

Source: Marion et al., "When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale", 2023,
arXiv 2309.04564: rank by perplexity and keep the bottom, middle or top of the distribution.

Algorithm:
    1  l_i = mean nats per trained token of row i on the navigator
    2  low: take the smallest l_i;  high: the largest;  middle: the smallest |l_i - median(l)|

Departures from the paper: the loss is conditional on the prompt (only trained tokens count) and the model is an
off-the-shelf navigator; the middle is a distance from the median, so the budget may be any size. Perplexity is
exp(loss), hence the same order for low and high.

Departures from released code: none known; no code of the paper was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection

Band = Literal["low", "middle", "high"]


def band_score(values: Float[np.ndarray, " N"], band: Band) -> Float[np.ndarray, " N"]:
    """Score rows so that one band of a signal comes first (ours).

    Args:
        values: float64 [N].
        band: ``low``, ``middle`` (closest to the median) or ``high``.

    Returns:
        float64 [N], in the unit of the values.
    """
    if band == "middle":
        return -np.abs(values - np.median(values))
    return values if band == "high" else -values


def band_bound(noise: float, band: Band) -> float:
    """How far a band score may move when each value moves by ``noise``.

    Args:
        noise: absolute bound on a value.
        band: as in :func:`band_score`.

    Returns:
        The bound; twice the noise for the middle, because the median may move the other way.
    """
    return 2 * noise if band == "middle" else noise


@register
@dataclass(frozen=True)
class Loss:
    """A band of the loss distribution.

    Args:
        band: ``low``, ``middle`` or ``high``.
    """

    band: Band = "middle"

    name: ClassVar[str] = "loss"
    paper: ClassVar[str] = "Marion et al. 2023, arXiv 2309.04564"
    summary: ClassVar[str] = "lowest, middle or highest loss of the navigator"
    evidence: ClassVar[str] = "abstract"

    @property
    def needs(self) -> Needs:
        """One forward pass."""
        return Needs(signals=frozenset({"loss"}))

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take one band of the losses.

        Args:
            problem: the eligible rows with ``loss``.
            budget: how many rows or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are in nats.
        """
        require(problem, self)
        loss = problem.loss
        assert loss is not None
        median = float(np.median(loss))
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=band_score(loss, self.band),
            bound=band_bound(problem.noise.loss, self.band),
            kept="loss",
            why_kept=lambda i: f"loss {loss[i]:.3g}, pool median {median:.3g}",
        )
