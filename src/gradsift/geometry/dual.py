"""Solve the set-level linear program by its dual: prices per anchor, bound, and a vertex (ours).

For prices lambda >= 0 the number q(lambda) = max_w sum w_i s_i(lambda) + lambda'eps bounds every feasible choice from
above; q is convex and piecewise linear with subgradient v = R'w + eps. Steps: feasibility first; bisection (one anchor)
or projected ascent (several) collects choices w; a small program over those choices (column generation) closes the gap;
a last small program over the rows near the cut yields a vertex, which has at most M + 1 fractional rows.
Inside, gains are divided by their spread and every anchor by ``Program.units``, so tolerances mean the same everywhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from gradsift.geometry.feasible import Reach, feasible_columns, solve_small
from gradsift.geometry.program import Program

ASCENT_STEPS = 200
BISECTION_STEPS = 100
POLISH_STEPS = 100
COLUMNS = 30
GAP = 1e-6
EXACT_GAP = 1e-10
WHOLE = 1e-7


@dataclass(frozen=True)
class DualSolution:
    """The fractional optimum and its proof.

    Args:
        w: float64 [N] weights in [0, 1], at most M + 1 strictly between.
        prices: float64 [M] lambda, gain lost per unit of protection.
        threshold: score / cost at the cut under these prices.
        upper_bound: least dual value found; no choice within the constraints gains more.
        lp_value: gain of ``w``.
        gap_lp: (upper_bound - lp_value) / max(|upper_bound|, largest gain of a row).
        num_fractional: entries of ``w`` strictly between 0 and 1.
        iterations: prices tried.
        slack: float64 [M] of ``w``.
    """

    w: Float[np.ndarray, " N"]
    prices: Float[np.ndarray, " M"]
    threshold: float
    upper_bound: float
    lp_value: float
    gap_lp: float
    num_fractional: int
    iterations: int
    slack: Float[np.ndarray, " M"]


@dataclass
class _Search:
    """Columns collected so far and the least dual value, all in scaled units."""

    program: Program
    columns: list[Float[np.ndarray, " N"]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    slacks: list[Float[np.ndarray, " M"]] = field(default_factory=list)
    bound: float = np.inf
    prices: Float[np.ndarray, " M"] = field(default_factory=lambda: np.zeros(0))
    iterations: int = 0

    def add(self, w: Float[np.ndarray, " N"]) -> bool:
        """Keep a choice as a column; False when an equal one is there."""
        value, slack = float(self.program.gain @ w), self.program.slack(w)
        for known, known_slack in zip(self.values, self.slacks, strict=True):
            if value == known and np.array_equal(slack, known_slack):
                return False
        self.columns.append(w)
        self.values.append(value)
        self.slacks.append(slack)
        return True

    def try_prices(self, prices: Float[np.ndarray, " M"]) -> tuple[Float[np.ndarray, " M"], bool]:
        """Evaluate q(prices); return its subgradient and whether the column is new."""
        score = self.program.score(prices)
        w = self.program.best_response(score)
        self.iterations += 1
        q = float(w @ score + prices @ self.program.allowance)
        # On ties the later prices win: those of the last small programs satisfy complementary slackness exactly.
        if q <= self.bound + 1e-12 * max(1.0, abs(self.bound)) or not np.isfinite(self.bound):
            self.bound, self.prices = min(q, self.bound), prices
        return self.program.slack(w), self.add(w)


def solve_dual(program: Program) -> DualSolution:
    """Solve the linear program (ours; ogs_dual's steps of prices, polish and vertex).

    Args:
        program: gains, anchor dots, allowances and budget.

    Returns:
        Weights, prices and bounds; gap_lp is at most 1e-6 and usually rounding error. A program without a feasible
        choice is refused by :func:`feasible_columns` with its proof.
    """
    scaled, gain_unit = _scale(program)
    search = _Search(scaled)
    slack, _ = search.try_prices(np.zeros(scaled.dots.shape[1]))
    if (slack >= -1e-9).all():
        return _finish(program, search, gain_unit, search.columns[0])
    reach = feasible_columns(program, scaled)
    if len(slack) == 1:
        _bisect(search)
    else:
        _ascend(search)
    mix = _polish(search, reach)
    return _finish(program, search, gain_unit, _vertex(search, mix))


def _scale(program: Program) -> tuple[Program, float]:
    """Divide gains by their spread and every anchor by its unit."""
    spread = float(program.gain.std())
    # Equal gains have a spread of rounding errors, by which nothing can be divided.
    unit = spread if spread > 1e-12 * program.gain_size else program.gain_size
    scaled = dataclasses.replace(
        program,
        gain=program.gain / unit,
        dots=program.dots / program.units,
        allowance=program.allowance / program.units,
    )
    return scaled, unit


def _finish(program: Program, search: _Search, gain_unit: float, w: Float[np.ndarray, " N"]) -> DualSolution:
    prices = search.prices * gain_unit / program.units
    score = program.score(prices)
    response = program.best_response(score)
    value = float(program.gain @ w)
    # The bound is recomputed in plain units so that one top-B by these prices reproduces it; rounding of long sums
    # must not put it below the value that was reached.
    bound = max(float(response @ score + prices @ program.allowance), value)
    return DualSolution(
        w=w,
        prices=prices,
        threshold=program.threshold(score, response),
        upper_bound=bound,
        lp_value=value,
        gap_lp=(bound - value) / max(abs(bound), program.gain_size),
        num_fractional=int(((w > WHOLE) & (w < 1 - WHOLE)).sum()),
        iterations=search.iterations,
        slack=program.slack(w),
    )


def _bisect(search: _Search) -> None:
    """One anchor: the slack grows with its price, so halve the interval around the sign change."""
    low, high = 0.0, 1.0
    while search.try_prices(np.array([high]))[0][0] < 0 and high < 1e15:
        low, high = high, 2 * high
    for _ in range(BISECTION_STEPS):
        middle = 0.5 * (low + high)
        if middle in (low, high) or high - low <= 1e-15 * high:
            break
        if search.try_prices(np.array([middle]))[0][0] < 0:
            low = middle
        else:
            high = middle


def _ascend(search: _Search) -> None:
    """Several anchors: the price rises where the constraint is violated and falls where it is slack."""
    num_rows = search.program.total / float(search.program.cost.mean())
    prices = np.zeros(len(search.program.allowance))
    for k in range(ASCENT_STEPS):
        v, _ = search.try_prices(prices)
        step = np.sqrt(num_rows) / np.sqrt(k + 1)
        prices = np.maximum(0.0, prices - step * v / max(1.0, float(np.linalg.norm(v))))
        drop = len(search.columns) - COLUMNS
        if drop > 0:  # N numbers each: only the last ones are of use to the polish
            del search.columns[:drop], search.values[:drop], search.slacks[:drop]


def _polish(search: _Search, reach: Reach) -> Float[np.ndarray, " N"]:
    """Best mixture of columns; its duals are the next prices, whose best response is the next column."""
    for w in reach.columns:
        search.add(w)
    theta = np.zeros(0)
    # What the feasibility test let through, mostly 0.
    short = max(0.0, -reach.least_slack)
    for _ in range(POLISH_STEPS):
        slacks, values = np.array(search.slacks), np.array(search.values)
        num = len(values)
        result = solve_small(
            c=values[0] - values,  # a constant shift: theta sums to 1
            A_ub=-slacks.T,
            b_ub=np.full(slacks.shape[1], short),
            A_eq=np.ones((1, num)),
            b_eq=[1.0],
            bounds=[(0, None)] * num,
        )
        theta = result.x
        if search.bound - float(values @ theta) <= GAP * abs(search.bound):
            break
        if not search.try_prices(np.maximum(0.0, -result.ineqlin.marginals))[1]:
            break
    theta = np.where(theta > 1e-12, theta, 0.0)
    return sum((t * w for t, w in zip(theta / theta.sum(), search.columns, strict=False) if t > 0), np.zeros(1))


def _vertex(search: _Search, mix: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Solve the program over the rows that the mixture splits and those nearest the cut; widen until it is exact.

    Rows outside stay at the mixture's 0 or 1, so the mixture itself is allowed and the result is at least as good. The
    simplex method ends in a vertex: at most one fractional row per constraint.
    """
    program = search.program
    width = 4 * (len(program.allowance) + 1)
    free = (mix > 1e-9) & (mix < 1 - 1e-9)
    while True:
        score = program.score(search.prices)
        cut = program.threshold(score, program.best_response(score))
        distance = np.abs(score / program.cost - cut)
        free[np.argsort(distance, kind="stable")[:width]] = True
        w, prices = _restricted(program, mix, free)
        search.try_prices(prices)
        gap = search.bound - float(program.gain @ w)
        if gap <= EXACT_GAP * max(1.0, abs(search.bound)) or free.all():
            return w
        width *= 4


def _restricted(
    program: Program, mix: Float[np.ndarray, " N"], free: Bool[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " M"]]:
    """Solve the program with all rows but the free ones fixed at the mixture's 0 or 1."""
    w = np.where(free, 0.0, np.round(mix))
    # A mixture that lies below zero by rounding stays allowed.
    room = program.slack(w) + np.maximum(0.0, -program.slack(np.where(free, mix, w)))
    left = program.total - float(program.cost @ w)
    budget = program.cost[free][None]
    whole = program.fill == "full"
    # Units of one row instead of sqrt(k): the solver drops matrix entries below 1e-9.
    zoom = np.sqrt(max(1.0, program.total / float(program.cost.mean())))
    rows, bounds = -zoom * program.dots[free].T, zoom * room
    result = solve_small(
        c=-program.gain[free],
        A_ub=rows if whole else np.vstack([rows, budget]),
        b_ub=bounds if whole else np.append(bounds, left),
        A_eq=budget if whole else None,
        b_eq=[left] if whole else None,
        bounds=(0.0, 1.0),
    )
    x = np.where(result.x < 1e-9, 0.0, np.where(result.x > 1 - 1e-9, 1.0, result.x))
    w[free] = x
    return w, np.maximum(0.0, -result.ineqlin.marginals[: len(bounds)]) * zoom
