"""Few mini-batches, with weights, whose gradients add up to the gradient of the target or of the whole pool.

Paper: Killamsetty, Sivasubramanian, Ramakrishnan, De, Iyer, "GRAD-MATCH: Gradient Matching based Data Subset Selection
for Efficient Deep Model Training", ICML 2021, arXiv 2103.00123. Its abstract was read; objective and solver are known
from a re-test (arXiv 2311.12727) and from released code.

Algorithm:
    1  atoms a_q: batches of rows of one source and like length; the token mean of rho_i g_i, rho_i = min(1, q99 / |g_i|)
    2  b: the target's direction, or, without a target, the token mean of the pool
    3  X <- {}, r <- b; while X uses less than the budget and |r| >= tolerance |b|:
           q* = argmax over q outside X of <a_q, r>; stop where it is not above 0
           X <- X + q*; x = (A_X'A_X + lam I)^-1 A_X'b, lam = ridge times the mean |a_q|^2
           while the least x is not above 0: drop its atom from X and solve again (picked again max_repeats times at most)
           r <- b - A_X x
    4  of the X seen take that of least |r|; a row of atom q gets the weight x_q / trained tokens of q, clipped at
       max_weight times the mean and scaled to mean 1

Departures from the paper: atoms are batches, since language has no classes and single rows are noisy; the ridge is
relative to the atoms, so that the unit of the gradient plays no part; the choice is made once, at the navigator's
starting weights, and not anew every few epochs; an atom is a token mean and its weight is dealt by tokens, because the
trainer's loss is a token mean; the atom that uses the budget up gives only the rows that fit.

Departures from released code: sketches of the chosen parameters instead of last-layer gradients in closed form; a
shortage is said instead of filled with random rows of weight 1, and a choice of no batch is refused; the pursuit ends
where no atom points towards the residual; an atom that keeps being dropped is given up; one solver for every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gradsift.methods.base import Needs, register
from gradsift.methods.grad_match_choice import choose
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection


@register
@dataclass(frozen=True)
class GradMatch:
    """Non-negative orthogonal matching pursuit over mini-batches.

    Args:
        steer: match the ``target``, the ``pool``, or what is ``given``: the target where there is one, else the pool.
        batch_size: rows of a batch; None for 16, or fewer where the budget would hold fewer than 16 batches.
        ridge: lam in units of the mean squared length of an atom.
        max_weight: weights are clipped at this many times their mean, once, before they are scaled to mean 1; the largest
            can be above it after that.
        tolerance: relative residual at which the target counts as matched.
        max_repeats: how often a dropped batch may be picked again.
    """

    name: ClassVar[str] = "grad_match"
    paper: ClassVar[str] = "Killamsetty et al. 2021, arXiv 2103.00123"
    summary: ClassVar[str] = "weighted batches whose gradients add up to the target's, or to the whole pool's"
    evidence: ClassVar[str] = "abstract + code + summaries"

    steer: Literal["given", "target", "pool"] = "given"
    batch_size: Annotated[int, Field(ge=1)] | None = None
    ridge: Annotated[float, Field(ge=0)] = 0.1
    max_weight: Annotated[float, Field(ge=1)] = 10.0
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 1e-4
    max_repeats: Annotated[int, Field(ge=0)] = 2

    @property
    def needs(self) -> Needs:
        """One forward and backward pass with sketches; a target is used when there is one."""
        return Needs(signals=frozenset({"sketch", "grad_norm"}), target=self.steer == "target")

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the batches that match, in the order they were picked.

        Args:
            problem: the eligible rows with ``sketch`` and ``grad_norm``; ``direction_sketch`` where a target is matched.
            budget: rows, percentage or trained tokens.
            stream: not drawn from; the choice is deterministic.

        Returns:
            The selection with weights of mean 1; scores are minus the place. A shortage is said, never filled; where no
            batch points towards the target the choice is refused (InfeasibleError).
        """
        return choose(problem, self, budget, stream, num_partitions=1)
