"""The set-level choice as a linear program, and its one-line inner problem (ours, after arXiv 2602.06359).

    maximize    sum_i w_i d_i
    subject to  sum_i w_i r_im >= -eps_m  for every anchor m,   sum_i w_i c_i = total,   0 <= w_i <= 1

c_i is 1 for a budget in rows and the trained tokens of row i for a budget in tokens. For fixed prices lambda the best w
takes the rows of largest (d_i + sum_m lambda_m r_im) / c_i until the total is used, which costs one partial sort.
N rows, M anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float

from gradsift.errors import NumericsError

Fill = Literal["full", "positive"]


@dataclass(frozen=True)
class Program:
    """One linear program; built by :func:`set_program`.

    Args:
        gain: float64 [N], d.
        dots: float64 [N, M], r.
        allowance: float64 [M], eps.
        cost: float64 [N], c; all ones for a budget in rows.
        total: what the costs sum to; never above the sum of all costs.
        by_rows: the budget counts rows, so whole rows always fill it.
        fill: ``full`` uses the total up, ``positive`` stops where a further row would lower the objective.
        names: M anchor names, for messages.
    """

    gain: Float[np.ndarray, " N"]
    dots: Float[np.ndarray, "N M"]
    allowance: Float[np.ndarray, " M"]
    cost: Float[np.ndarray, " N"]
    total: float
    by_rows: bool
    fill: Fill
    names: tuple[str, ...]

    @cached_property
    def units(self) -> Float[np.ndarray, " M"]:
        """Natural size of a sum of r_m over a random choice, sqrt(k) sd(r_m); float64 [M], > 0."""
        num_rows = max(1.0, self.total / float(self.cost.mean()))
        spread = self.dots.std(axis=0)
        # A constant column has no spread; its own size (or 1 for a column of zeros) keeps the scaling finite.
        size = np.abs(self.dots).max(axis=0, initial=0.0)
        spread = np.where(spread > 1e-12 * size, spread, np.where(size > 0, size, 1.0))
        return np.sqrt(num_rows) * spread

    @cached_property
    def gain_size(self) -> float:
        """Size of the largest gain of a row, > 0; what numbers in units of gain are measured by where they cancel."""
        return max(float(np.abs(self.gain).max()), float(np.finfo(float).tiny))

    @cached_property
    def tolerance(self) -> Float[np.ndarray, " M"]:
        """How far below zero a slack may lie by rounding of sums; float64 [M]."""
        return 1e-9 * self.units

    def score(self, prices: Float[np.ndarray, " M"]) -> Float[np.ndarray, " N"]:
        """Price-weighted score s_i(lambda) = d_i + sum_m lambda_m r_im.

        Args:
            prices: float64 [M].

        Returns:
            float64 [N].
        """
        return self.gain + self.dots @ prices

    def slack(self, w: Float[np.ndarray, " N"]) -> Float[np.ndarray, " M"]:
        """Slack per anchor of a choice, sum_i w_i r_im + eps_m.

        Args:
            w: float64 [N] weights in [0, 1].

        Returns:
            float64 [M], >= 0 where the constraint holds.
        """
        return w @ self.dots + self.allowance

    def best_response(self, score: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """Maximize sum w_i score_i over 0 <= w <= 1 and the budget; equal ratios go to the smaller index.

        Args:
            score: float64 [N].

        Returns:
            float64 [N] weights, at most one of them fractional (token budgets only).
        """
        if self.by_rows:
            w = _top(score, round(self.total))
        else:
            order = np.argsort(-(score / self.cost), kind="stable")
            before = np.cumsum(self.cost[order]) - self.cost[order]
            w = np.empty_like(score)
            w[order] = np.clip((self.total - before) / self.cost[order], 0.0, 1.0)
        if self.fill == "positive":
            w[score <= 0] = 0.0
        return w

    def threshold(self, score: Float[np.ndarray, " N"], w: Float[np.ndarray, " N"]) -> float:
        """Price of one unit of budget: the ratio score / cost at the cut of a best response.

        Args:
            score: float64 [N].
            w: its best response.

        Returns:
            The least ratio taken; 0 where ``positive`` left budget unused.
        """
        taken = w > 0
        if self.fill == "positive" and w @ self.cost < self.total * (1 - 1e-12):
            return 0.0
        return float((score[taken] / self.cost[taken]).min())


def _top(score: Float[np.ndarray, " N"], k: int) -> Float[np.ndarray, " N"]:
    """Mark the k largest, the smaller index first among equals."""
    n = len(score)
    edge = np.partition(score, n - k)[n - k]
    w = (score > edge).astype(np.float64)
    w[np.flatnonzero(score == edge)[: k - int(w.sum())]] = 1.0
    return w


def set_program(
    gain: Float[np.ndarray, " N"],
    dots: Float[np.ndarray, "N M"],
    allowance: Float[np.ndarray, " M"],
    *,
    rows: int | None = None,
    cost: Float[np.ndarray, " N"] | None = None,
    total_cost: float | None = None,
    fill: Fill = "full",
    names: tuple[str, ...] = (),
) -> Program:
    """State the linear program for a budget in rows, or in cost (trained tokens).

    Args:
        gain: [N] d, dot with the target direction.
        dots: [N, M] r, dots with the anchors' unit directions; M may be 0.
        allowance: [M] eps in units of r summed over the choice; negative demands net synergy.
        rows: number of rows, 1 to N; or
        cost: [N] > 0 cost of each row, and
        total_cost: what may be spent; capped at the sum of all costs.
        fill: see :class:`Program`.
        names: M anchor names; ``anchor_1`` and so on when left out.

    Returns:
        The program.

    Raises:
        ValueError: sizes do not match, or the budget is not one of the two forms (our own mistake).
        NumericsError: gain, dots or allowance is not finite.
    """
    n, m = dots.shape
    arrays = {
        "gain": np.array(gain, dtype=np.float64),
        "dots": np.array(dots, dtype=np.float64),
        "allowance": np.array(allowance, dtype=np.float64),
    }
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NumericsError("a number of the set-level choice is not finite", where=name, expected="finite numbers")
    if n == 0 or len(gain) != n or len(allowance) != m or (names and len(names) != m):
        raise ValueError(f"gain {len(gain)}, dots {n} x {m}, allowance {len(allowance)}, names {len(names)}")
    if (rows is None) == (total_cost is None) or (cost is None) != (total_cost is None):
        raise ValueError("give rows, or cost and total_cost")
    weights = np.ones(n) if cost is None else np.array(cost, dtype=np.float64)
    total = float(rows) if rows is not None else min(float(total_cost or 0.0), float(weights.sum()))
    if len(weights) != n or not (weights > 0).all() or total <= 0 or (rows is not None and rows > n):
        raise ValueError(f"the budget must lie in (0, {weights.sum():g}] and every cost be above 0, got {total:g}")
    return Program(
        **arrays,
        cost=weights,
        total=total,
        by_rows=rows is not None,
        fill=fill,
        names=names or tuple(f"anchor_{j + 1}" for j in range(m)),
    )
