"""How far a solved program is from another solution, in units of the measured error of its numbers (ours).

Every dot of row i is known up to e_i. The vertex is decided by: which rows lie above and below the cut, which prices are
above 0, which rows are taken in part, and which constraints are slack. Each of these is a number with a distance from
changing and a bound on how far the errors can move it; the least ratio of the two says whether the solution is certain.
The rows taken in part fix prices and cut through a square system G x = d_F, so the bounds follow from |G^-1|.
N rows, M anchors, F rows taken in part, A anchors with a price.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.geometry.dual import WHOLE, DualSolution
from gradsift.geometry.program import Program


@dataclass(frozen=True)
class Stability:
    """Result of :func:`stability`.

    Args:
        ratio: least distance over error bound; above 1 no error within the bounds changes the vertex.
        gap: distance in score between the cut and the nearest row that is not taken in part (twice the distance, the
            whole gap, where no row is).
        bound: error bound that belongs to ``gap``, at the row where the ratio of the two is least.
        score_noise: float64 [N] error bound of s_i - cut, errors of the prices included.
    """

    ratio: float
    gap: float
    bound: float
    score_noise: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class _Errors:
    """Bounds on the errors of prices [M], cut and fractions [F]; infinite where the system is singular."""

    prices: Float[np.ndarray, " M"]
    cut: float
    fractions: Float[np.ndarray, " F"]


def least_ratio(distance: Float[np.ndarray, " n"], noise: Float[np.ndarray, " n"]) -> float:
    """Least distance / noise; infinite where nothing is noisy.

    Args:
        distance: [n] >= 0.
        noise: [n] >= 0.

    Returns:
        The least ratio, inf for n = 0; entries without noise do not count.
    """
    noisy = noise > 0
    return float(np.min(np.maximum(distance[noisy], 0.0) / noise[noisy], initial=np.inf))


def stability(
    program: Program, solution: DualSolution, noise: Float[np.ndarray, " N"], allowance_noise: float = 0.0
) -> Stability:
    """Compare every decision of a solved program with the error that could overturn it (first order made rigorous).

    Args:
        program: the program.
        solution: its vertex.
        noise: float64 [N] error bound e_i of every dot of row i, >= 0.
        allowance_noise: error bound of the allowances.

    Returns:
        The least ratio and what the cut looks like.
    """
    w, cost, prices = solution.w, program.cost, solution.prices
    part = (w > WHOLE) & (w < 1 - WHOLE)
    errors = _solve_errors(program, solution, np.flatnonzero(part), noise, allowance_noise)
    sure = np.isfinite(errors.cut) and np.isfinite(errors.prices).all()
    weight = 1.0 + float((prices + errors.prices).sum()) if sure else np.inf
    score_noise = noise.copy()
    if sure and noise.any():
        score_noise = noise * weight + np.abs(program.dots) @ errors.prices + cost * errors.cut
    ratio_of = program.score(prices) / cost
    twice, cut = 1.0, solution.threshold
    if not part.any() and (w > WHOLE).any() and (w <= WHOLE).any() and not _open(program, solution):
        twice, cut = 2.0, 0.5 * float(ratio_of[w > WHOLE].min() + ratio_of[w <= WHOLE].max())
    distance, unit_noise = np.abs(ratio_of - cut), score_noise / cost
    # A row in the wrong place (a tie that the vertex broke) is no distance away.
    distance[(~part) & ((ratio_of > cut) != (w > WHOLE))] = 0.0
    others = np.flatnonzero(~part) if (w <= WHOLE).any() or part.any() else np.zeros(0, dtype=np.int64)
    if not len(others):
        return Stability(np.inf, 0.0, float(unit_noise.max()), score_noise)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(unit_noise > 0, distance / unit_noise, np.inf)[others]
    nearest = others[np.argmin(ratios)] if np.isfinite(ratios).any() else others[np.argmin(distance[others])]
    fractions = w[part]
    carried = np.full(len(prices), np.inf)
    if np.isfinite(errors.fractions).all():
        carried = float(noise @ w) + allowance_noise + np.abs(program.dots[part]).T @ errors.fractions
    system = min(
        least_ratio(prices[prices > 0], errors.prices[prices > 0]),
        least_ratio(np.minimum(fractions, 1 - fractions), errors.fractions),
        least_ratio(solution.slack[prices == 0], carried[prices == 0]),
    )
    if not sure:
        system = 0.0
    return Stability(
        ratio=min(system, float(ratios.min())),
        gap=twice * float(distance[nearest]),
        bound=twice * float(unit_noise[nearest]),
        score_noise=score_noise,
    )


def _open(program: Program, solution: DualSolution) -> bool:
    """Whether budget is left over, so that the cut stands at 0 and not between two rows."""
    return program.fill == "positive" and solution.threshold == 0.0


def _solve_errors(
    program: Program,
    solution: DualSolution,
    part: Int[np.ndarray, " F"],
    noise: Float[np.ndarray, " N"],
    allowance_noise: float,
) -> _Errors:
    """Bound the errors of prices, cut and fractions from the square system of the rows taken in part."""
    active = np.flatnonzero(solution.prices > 0)
    num_prices, e = len(solution.prices), noise[part]
    if (not noise.any() and not allowance_noise) or (len(part) == 0 and len(active) == 0):
        return _Errors(np.zeros(num_prices), 0.0, np.zeros(len(part)))
    singular = _Errors(np.full(num_prices, np.inf), np.inf, np.full(len(part), np.inf))
    with_cut = not _open(program, solution)
    matrix = -program.dots[np.ix_(part, active)]
    blur = np.repeat(e[:, None], len(active), axis=1)
    x = solution.prices[active]
    if with_cut:
        matrix = np.column_stack([matrix, program.cost[part]])
        blur = np.column_stack([blur, np.zeros(len(part))])
        x = np.append(x, solution.threshold)
    if matrix.shape[0] != matrix.shape[1] or np.linalg.matrix_rank(matrix) < len(part):
        return singular
    inverse = np.abs(np.linalg.inv(matrix))
    whole = solution.w > 1 - WHOLE
    sums = np.full(len(active), float(noise[whole].sum()) + allowance_noise)
    right = np.append(sums, 0.0) if with_cut else sums
    shift = _bounded(inverse, blur, e + blur @ np.abs(x))
    fractions = _bounded(inverse.T, blur.T, right + blur.T @ solution.w[part])
    if shift is None or fractions is None:
        return singular
    errors = np.zeros(num_prices)
    errors[active] = shift[: len(active)]
    return _Errors(errors, float(shift[-1]) if with_cut else 0.0, fractions)


def _bounded(
    inverse: Float[np.ndarray, "n n"], blur: Float[np.ndarray, "n n"], right: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"] | None:
    """Componentwise bound (I - |G^-1| E)^-1 |G^-1| f of a linear system's error; None where it does not contract."""
    feedback = inverse @ blur
    if np.abs(np.linalg.eigvals(feedback)).max(initial=0.0) >= 1.0:
        return None
    return np.linalg.solve(np.eye(len(right)) - feedback, inverse @ right)
