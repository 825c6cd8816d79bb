"""Whether any choice meets the allowances, and the proof when none does (ours).

t* = max_w min_m (sum_i w_i r_im + eps_m) = min over prices on the simplex of max_w sum_i w_i (R lambda)_i + lambda'eps.
Both sides grow towards each other by column generation; t* < 0 comes with prices that anyone can check by one sort.
N rows, M anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from gradsift.errors import InfeasibleError, NumericsError
from gradsift.geometry.program import Program

STEPS = 100


@dataclass(frozen=True)
class InfeasibilityProof:
    """Why no choice exists; anyone can check it with one sort: max_w sum w_i (R lambda)_i + lambda'eps < 0.

    Args:
        prices: float64 [M] lambda on the simplex.
        bound: the sum above; below 0.
        relaxation: smallest number that, added to every allowance, makes a fractional choice exist.
        best_alone: float64 [M] largest sum of r_m + eps_m that each anchor could reach if it stood alone.
    """

    prices: Float[np.ndarray, " M"]
    bound: float
    relaxation: float
    best_alone: Float[np.ndarray, " M"]


class NoChoiceError(InfeasibleError):
    """No choice meets the allowances.

    Args:
        proof: the certificate.
        program: the program it is about.
    """

    def __init__(self, proof: InfeasibilityProof, program: Program) -> None:
        self.proof = proof
        mix = " + ".join(f"{p:.4g} x {name}" for p, name in zip(proof.prices, program.names, strict=True) if p > 0)
        alone = ", ".join(f"{name} {b:+.4g}" for name, b in zip(program.names, proof.best_alone, strict=True))
        need = np.nextafter(proof.relaxation, np.inf)
        super().__init__(
            "no selection of this size can keep every anchor within its allowance",
            where="the anchors " + ", ".join(program.names),
            got=f"the best rows for {mix} reach {proof.bound:.6g}; each anchor alone reaches {alone}",
            expected="at least 0, the allowance included",
            do=f"raise the allowance of every anchor by {_round_up(need)} (--set eps=...), change the budget, "
            "add rows that agree with the anchors, or give up an anchor",
        )


def _round_up(value: float, digits: int = 4) -> str:
    """Write a positive number rounded up, so that following the advice is enough."""
    if value <= 0:
        return "0"
    unit = 10.0 ** (np.floor(np.log10(value)) - digits + 1)
    return f"{np.ceil(value / unit - 1e-9) * unit:.{digits}g}"


@dataclass(frozen=True)
class Reach:
    """How well the allowances can be met by mixtures of choices.

    Args:
        columns: choices, float64 [N] each, some mixture of which has the least slack below.
        prices: float64 [M] on the simplex, the proof that no mixture does better.
        least_slack: largest least slack / unit of a mixture, t*; below 0 nothing meets the allowances.
    """

    columns: list[Float[np.ndarray, " N"]]
    prices: Float[np.ndarray, " M"]
    least_slack: float


def feasible_columns(program: Program, scaled: Program) -> Reach:
    """Find choices whose mixture meets every allowance, or prove that there are none (ours).

    Args:
        program: the program in its own units, for the proof.
        scaled: the same with anchors in units of ``program.units``, for the decision.

    Returns:
        Choices and a least slack that is at most a rounding error below 0.

    Raises:
        NoChoiceError: there are none.
    """
    reach = _max_min_slack(scaled, np.ones(len(scaled.allowance)), stop_at=0.0)
    if reach.least_slack >= -1e-9:
        return reach
    unit = float(program.units.max())
    prices = _max_min_slack(program, np.full(len(program.allowance), unit), stop_at=np.inf).prices
    alone = [program.slack(program.best_response(r))[j] for j, r in enumerate(program.dots.T)]
    best = program.best_response(program.dots @ prices)
    bound = float(best @ (program.dots @ prices) + prices @ program.allowance)
    raise NoChoiceError(InfeasibilityProof(prices, bound, -bound, np.array(alone)), program)


def _max_min_slack(program: Program, unit: Float[np.ndarray, " M"], stop_at: float) -> Reach:
    """Maximize the least slack / unit over mixtures by column generation: t* and its prices."""
    columns = [program.best_response(r) for r in program.dots.T]
    prices, reach = np.zeros(len(unit)), -np.inf
    for _ in range(STEPS):
        slacks = np.array([program.slack(w) for w in columns]) / unit
        num = len(columns)
        result = solve_small(
            c=np.append(np.zeros(num), -1.0),
            A_ub=np.hstack([-slacks.T, np.ones((len(unit), 1))]),
            b_ub=np.zeros(len(unit)),
            A_eq=np.append(np.ones(num), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * num + [(None, None)],
        )
        reach, prices = float(result.x[-1]), np.maximum(0.0, -result.ineqlin.marginals)
        prices = prices / prices.sum()
        best = program.best_response(program.dots @ (prices / unit))
        if reach >= stop_at or float(program.slack(best) / unit @ prices) <= reach + 1e-11 * max(1.0, abs(reach)):
            break
        columns.append(best)
    return Reach(columns, prices, reach)


def solve_small(**problem: Any) -> Any:
    """Run HiGHS' simplex at tight tolerances on one of the small programs.

    Args:
        **problem: arguments of ``scipy.optimize.linprog``; a minimization.

    Returns:
        SciPy's result: the vertex ``x`` and the marginals of the constraints.

    Raises:
        NumericsError: the solver did not reach an optimum.
    """
    from scipy.optimize import linprog

    # At the edge of feasibility the tightest tolerance can end without an answer; bound and slack are recomputed from
    # the result in any case, so a looser one shows in the certificate.
    for tolerance in (1e-10, 1e-9, 1e-8):
        options = {"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance}
        result = linprog(method="highs-ds", options={**options, "presolve": tolerance == 1e-10}, **problem)
        if result.status == 0:
            return result
    raise NumericsError(
        "a small linear program of the set-level choice did not solve",
        got=str(result.message),
        do="report this with the signals of the run",
    )
