"""ogs_dual: the most gain whose summed update opposes no anchor (ours, after OGS, arXiv 2602.06359).

Paper: Zhang, Tian, Wang, Song, "Orthogonal Gradient Selection", arXiv 2602.06359, 2026. It tests examples against a
general anchor gradient and chooses batches with a learned constrained policy; only its abstract was available to us.

Algorithm:
  1  h_i = rho_i g_i (``scale``); gain d_i = <u_target, h_i>; r_im = <u_m, h_i> for every anchor m
  2  maximize sum_i w_i d_i   subject to   sum_i w_i r_im >= -eps_m,   the budget,   0 <= w_i <= 1
  3  lambda >= 0: bound q(lambda) = budget's best sum of s_i = d_i + sum_m lambda_m r_im, plus lambda'eps; minimize it
  4  the vertex splits at most M + 1 rows: try all their roundings, then swap and fill while that gains
  5  deal the rows into batches in serpentine order of the most binding anchor

Departures from the paper: the whole choice is constrained, not each example, because almost orthogonal examples add up
to conflicting batches; one linear program on one set of signals replaces the learned policy; several anchors stay
apart, because opposed sources cancel in their mean; only the raw metric is built.

Departures from released code: none was found to depart from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import ConfigError
from gradsift.geometry.batch import serpentine
from gradsift.geometry.certify import certify
from gradsift.geometry.dual import DualSolution, solve_dual
from gradsift.geometry.program import Program, set_program
from gradsift.geometry.rounding import WholeChoice, round_whole
from gradsift.geometry.similarity import row_scale
from gradsift.methods._dual_words import describe_cut, dot_noise, explain, remarks
from gradsift.methods.base import Needs, build_selection, refuse_empty, register, require, resolve_budget
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection

# Why no row is taken, and what can be done about it.
NOTHING = {
    "full": ("none of which fits the budget and the allowances", "raise the budget or the allowance (--set eps=...)"),
    "positive": (
        "none of which gains within the budget and the allowances",
        "--set fill=full, or raise the budget or the allowance (--set eps=...)",
    ),
}


@register
@dataclass(frozen=True)
class OgsDual:
    """Set-level choice with prices per anchor, a bound and a certificate.

    Args:
        metric: gradients as they are.
        scale: ``clipped`` caps row norms at the 99th percentile, ``raw`` leaves them, ``unit`` uses cosines.
        kappa: allowance as a share of the conflict a random choice would have; instead of eps.
        eps: allowed summed conflict in units of the dots, for all anchors or by name; negative demands synergy.
        fill: ``full`` uses the budget up, ``positive`` stops where a further row would lower the objective.
        order: ``serpentine`` spreads conflict evenly over batches, ``score`` puts the best rows first.
        batch_size: rows per batch of the training order.
    """

    name: ClassVar[str] = "ogs_dual"
    paper: ClassVar[str] = "ours, after arXiv 2602.06359"
    summary: ClassVar[str] = "most target gain whose summed update opposes no anchor, with certificate"
    evidence: ClassVar[str] = "ours"

    metric: Literal["raw"] = "raw"
    scale: Literal["clipped", "raw", "unit"] = "clipped"
    kappa: float | None = None
    eps: float | dict[str, float] = 0.0
    fill: Literal["full", "positive"] = "full"
    order: Literal["serpentine", "score"] = "serpentine"
    batch_size: int = 64

    def __post_init__(self) -> None:
        given = self.eps if isinstance(self.eps, dict) else {"eps": self.eps}
        for key, value in {**given, "kappa": self.kappa or 0.0}.items():
            if not math.isfinite(value) or (key == "kappa" and value < 0):
                raise ConfigError(
                    "an allowance is out of range", where=f"--set {key}", got=value, expected="finite; kappa >= 0"
                )
        if self.kappa is not None and any(given.values()):
            raise ConfigError(
                "two kinds of allowance", where="--set", got="eps and kappa", expected="one", do="drop one"
            )
        if self.batch_size < 1:
            raise ConfigError(
                "a batch holds at least one row", where="--set batch_size", got=self.batch_size, expected=">= 1"
            )

    @property
    def needs(self) -> Needs:
        """Dots with a target and at least one anchor; a weak anchor must be allowed explicitly."""
        signals = frozenset({"grad_norm", "anchor_dot", "target_dot"})
        # Rows share prices: what is said of single rows holds as far as the prices of a part are those of the whole.
        return Needs(signals=signals, anchors=True, target=True, constrains=True, by_row=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Choose the rows of most gain within every anchor's allowance.

        Args:
            problem: the eligible rows with dots and norms.
            budget: rows, percentage or trained tokens.
            stream: not drawn from; the choice is deterministic.

        Returns:
            The selection with its certificate; a problem without a choice that keeps every anchor within its allowance
            is refused with a proof (InfeasibleError), and so is one of which no row is taken.
        """
        require(problem, self)
        assert problem.grad_norm is not None
        assert problem.anchor_dot is not None
        assert problem.target_dot is not None
        amount = resolve_budget(problem, budget)
        rho = row_scale(problem.grad_norm, self.scale)
        dots = rho[:, None] * problem.anchor_dot
        share = (
            amount.rows / problem.size if amount.rows else min(1.0, (amount.tokens or 0) / problem.num_trained.sum())
        )
        program = set_program(
            rho * problem.target_dot,
            dots,
            self._allowance(problem, share * dots.sum(axis=0)),
            rows=amount.rows,
            cost=None if amount.rows else problem.num_trained.astype(np.float64),
            total_cost=None if amount.tokens is None else float(amount.tokens),
            fill=self.fill,
            names=tuple(a.name for a in problem.anchors),
        )
        noise = dot_noise(problem, rho, self.scale)
        noise_eps = float((self.kappa or 0.0) * share * noise.sum())
        solution = solve_dual(program)
        whole = round_whole(program, solution, noise, noise_eps)
        why, do = NOTHING[self.fill]
        refuse_empty(problem, self, np.flatnonzero(whole.chosen), np.arange(problem.size), why=why, do=do)
        score = program.score(solution.prices) / program.cost
        ranked = np.lexsort((np.arange(problem.size), -score))
        cut = describe_cut(problem.ids, program, solution, whole, noise, noise_eps)
        selection = build_selection(
            problem,
            self,
            budget,
            stream,
            chosen=self._order(program, solution, whole, ranked[whole.chosen[ranked]]),
            score=score,
            order=ranked,
            cut=cut,
            certificate=certify(program, solution, whole),
            notes=(*amount.notes, *remarks(problem, program, whole, cut, rho if self.scale == "clipped" else None)),
            explained=False,
        )
        return explain(selection, program, solution, whole)

    def _allowance(self, problem: Problem, random_sum: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
        """Eps per anchor; with kappa, that share of what a random choice of the budget would do."""
        if self.kappa is not None:
            return self.kappa * np.maximum(0.0, -random_sum)
        names = [a.name for a in problem.anchors]
        if not isinstance(self.eps, dict):
            return np.full(len(names), float(self.eps))
        if unknown := sorted(set(self.eps) - set(names)):
            raise ConfigError(
                "eps names no anchor", where="--set eps", got=", ".join(unknown), expected=", ".join(names)
            )
        return np.array([float(self.eps.get(name, 0.0)) for name in names])

    def _order(
        self, program: Program, solution: DualSolution, whole: WholeChoice, best_first: Int[np.ndarray, " k"]
    ) -> Int[np.ndarray, " k"]:
        """Training order; the most binding anchor has the largest price per unit, else the least slack per unit."""
        if self.order == "score" or not len(best_first):
            return best_first
        price = solution.prices * program.units
        binding = int(np.argmax(price) if price.any() else np.argmin(whole.slack / program.units))
        return serpentine(best_first, program.dots[best_first, binding], self.batch_size)
