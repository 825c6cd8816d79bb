"""The certificate of a set-level choice: what it gains, what any choice could gain, what it costs (ours)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from gradsift.geometry.dual import DualSolution
from gradsift.geometry.program import Program
from gradsift.geometry.rounding import WholeChoice
from gradsift.types import Certificate


def certify(program: Program, solution: DualSolution, whole: WholeChoice) -> Certificate:
    """Put bound, fractional optimum and whole choice side by side: value <= lp_value <= upper_bound.

    Under a token budget that is to be used up, the last tokens may cost gain (a threshold below 0). A whole choice
    leaves some unused and may so beat the fractional one; then bound and optimum are stated for any choice of at least
    the tokens used, which adds -threshold per token left (the optimum is concave in the budget). Gaps are shares of the
    bound, or of the largest gain of a row where the bound is less than that.

    Args:
        program: the program with the allowances asked for.
        solution: its solution.
        whole: the rows.

    Returns:
        The certificate.
    """
    used = float(program.cost[whole.chosen].sum())
    bonus = max(0.0, -solution.threshold) * (program.total - used) if program.fill == "full" else 0.0
    lp_value = max(solution.lp_value + bonus, whole.value)  # equal up to the rounding of sums when no row is split
    upper = max(solution.upper_bound + bonus, lp_value)
    size = max(abs(upper), program.gain_size)
    unit = "rows" if program.by_rows else "trained tokens"
    fill = f"{int(whole.chosen.sum())} rows use {used:g} of {program.total:g} {unit}"
    fill += f"; {solution.num_fractional} split by the fractional optimum, {whole.num_swaps} swaps"
    if whole.num_tightened:
        fill += f"; allowances tightened {whole.num_tightened} times before a rounding kept them"
    if whole.num_repaired:
        fill += f"; no rounding kept them, {whole.num_repaired} swaps did"
    if len(whole.added):
        fill += f"; {len(whole.added)} rows added because they still fitted"
    if not program.by_rows and program.fill == "full":
        negative = int((whole.chosen & (program.score(solution.prices) < 0)).sum())
        fill += f"; {negative} rows of negative score taken to use the tokens up"
    if bonus > 0:
        fill += f"; the bound is for any choice of at least {used:g} {unit}"
    return Certificate(
        prices=_named(program, solution.prices),
        upper_bound=upper,
        lp_value=lp_value,
        value=whole.value,
        gap=(upper - whole.value) / size,
        lp_gap=(upper - lp_value) / size,
        slack=_named(program, whole.slack),
        allowance=_named(program, program.allowance),
        num_fractional=solution.num_fractional,
        iterations=solution.iterations,
        fill=fill,
    )


def _named(program: Program, values: Float[np.ndarray, " M"]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(program.names, values, strict=True)}
