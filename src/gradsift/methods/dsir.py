"""Rows drawn as if they came from the target: importance resampling of hashed n-grams.

Paper: Xie, Santurkar, Ma, Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023, arXiv
2302.03169 (DSIR).

Algorithm:
    1  count each row's unigrams and bigrams in 10,000 hash buckets; p_target and p_pool are the summed counts, normalized
    2  log w_i = sum over buckets of count x (log p_target - log p_pool)
    3  draw g_i, standard Gumbel; take the rows of largest log w_i + g_i: a draw without replacement in proportion to w
       (``draw = top`` leaves g out)

Departures from the paper: the pool's distribution is fitted on the eligible rows of this pool, all of them; nothing is
filtered by length (rows of instructions are shorter than the paper's documents); the draw is keyed by the row's id, so
the order of the rows has no part in it.

Departures from released code: none from data-selection 1.0.3 in the weights, which a test compares with that package; its
filter of texts below 100 words is left out, as said.
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
class Dsir:
    """Importance resampling by words.

    Args:
        draw: ``gumbel`` draws in proportion to the weights, ``top`` takes the largest.
    """

    name: ClassVar[str] = "dsir"
    paper: ClassVar[str] = "Xie et al. 2023, arXiv 2302.03169 (DSIR)"
    summary: ClassVar[str] = "rows drawn in proportion to how much likelier their words are in the target; no model"
    evidence: ClassVar[str] = "code"

    draw: Literal["gumbel", "top"] = "gumbel"

    @property
    def needs(self) -> Needs:
        """The rows' words and a target set."""
        return Needs(signals=frozenset({"importance"}), target=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Draw rows in proportion to their importance weights.

        Args:
            problem: the eligible rows with ``importance``.
            budget: rows, percentage or trained tokens.
            stream: of the draw.

        Returns:
            The selection; scores are log weights plus the draw.
        """
        require(problem, self)
        weight = problem.importance
        assert weight is not None
        score = weight + (gumbel(problem.ids, stream.child("draw")) if self.draw == "gumbel" else 0.0)
        median = float(np.median(weight))
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=score,
            kept="importance",
            why_kept=lambda i: (
                f"log weight {weight[i]:.4g}, pool median {median:.4g}"
                + (f", drawn with {score[i] - weight[i]:+.3g}" if self.draw == "gumbel" else "")
            ),
        )


def gumbel(ids: tuple[str, ...], stream: Stream) -> np.ndarray:
    """Draw one standard Gumbel number per id.

    Args:
        ids: N row ids.
        stream: of the draw.

    Returns:
        float64 [N]; equal ids get equal numbers.
    """
    return -np.log(-np.log(stream.uniform(ids) + 2.0**-54))  # 2^-54: a draw of 0 has no logarithm
