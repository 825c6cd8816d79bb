"""Rows that share words with the target set.

Source: Robertson, Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", Foundations and Trends in
Information Retrieval 3(4), 2009. The lexical baseline that gradient selectors are compared with.

Algorithm:
    1  s_i = mean over target rows q of BM25(row i, query q), fitted on the eligible rows
    2  take the rows of largest s_i

Departures from the paper: whole target rows are the queries, and their scores are averaged; words are lower-cased runs
of letters and digits, with no stop words and no stemming, so nothing is downloaded.

Departures from released code: the scores are those of the bm25s package (Lu 2024, arXiv 2407.03618; Lucene's variant,
k1 = 1.5, b = 0.75), in float64.
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
class Bm25:
    """Highest BM25 score against the target set."""

    name: ClassVar[str] = "bm25"
    paper: ClassVar[str] = "Robertson and Zaragoza 2009"
    summary: ClassVar[str] = "rows that share words with the target set; no model"
    evidence: ClassVar[str] = "code"

    @property
    def needs(self) -> Needs:
        """The rows' words and a target set."""
        return Needs(signals=frozenset({"lexical"}), target=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows closest to the target in words.

        Args:
            problem: the eligible rows with ``lexical``.
            budget: how many rows or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection; scores are mean BM25 scores.
        """
        require(problem, self)
        score = problem.lexical
        assert score is not None
        median = float(np.median(score))
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=score,
            kept="lexical",
            why_kept=lambda i: f"BM25 {score[i]:.3g} against the target, pool median {median:.3g}",
        )
