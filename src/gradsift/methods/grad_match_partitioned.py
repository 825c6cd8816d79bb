"""Gradient matching in parts: each part of the batches is matched on its own, with its share of budget and target.

Paper: Mittal, Sivasubramanian, Iyer, Jyothi, Ramakrishnan, "Partitioned Gradient Matching-based Data Subset Selection
for Compute-Efficient Robust ASR Training" (PGM), EMNLP 2022, arXiv 2210.16892. Only its abstract and summaries were
available to us; the formal statement below is ours.

Algorithm:
    1  atoms a_q and target b as grad_match has them
    2  deal the atoms at random into Q parts P_1 .. P_Q of equal number
    3  part p gets its share of the budget by what its rows cost, and b_p: b / Q for a target, or the part's own share of
       the pool's mean, so that sum_p b_p = b
    4  grad_match's pursuit inside every part; the choices and their weights are joined
    5  |A x - b| <= sum_p |A_p x_p - b_p|: both sides are reported

Departures from the paper: sketches of language-model gradients in place of those of a speech model; weights of all parts
are clipped and scaled together; the parts are solved one after the other, each in the memory of its own atoms, and no
schedule of re-selection is built.

Departures from released code: none was found to depart from. The specification's warning at fewer than 20 atoms per
atom of budget cannot be cured by fewer parts, since budget and atoms shrink alike; parts of fewer than 20 atoms are
reported instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from gradsift.methods.base import register
from gradsift.methods.grad_match import GradMatch
from gradsift.methods.grad_match_choice import choose
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection


@register
@dataclass(frozen=True)
class GradMatchPartitioned(GradMatch):
    """Gradient matching inside random parts of the pool.

    Args:
        num_partitions: Q; fewer where there are fewer batches, or where a part's budget would not hold a row.
    """

    name: ClassVar[str] = "grad_match_partitioned"
    paper: ClassVar[str] = "after Mittal et al. 2022, arXiv 2210.16892 (PGM)"
    summary: ClassVar[str] = "grad_match inside random parts of the pool, their choices joined"
    evidence: ClassVar[str] = "abstract + summaries"

    num_partitions: Annotated[int, Field(ge=1)] = 4

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the batches that match in every part.

        Args:
            problem: the eligible rows with ``sketch`` and ``grad_norm``; ``direction_sketch`` where a target is matched.
            budget: rows, percentage or trained tokens.
            stream: deals the batches into parts.

        Returns:
            The selection, parts one after the other, with weights of mean 1; ``details`` has the residual of every part,
            their sum and the global one.
        """
        return choose(problem, self, budget, stream, num_partitions=self.num_partitions)
