"""What ogs_dual says about its cut, its rows and its remarks; no decision is taken here."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from gradsift.geometry.dual import WHOLE, DualSolution
from gradsift.geometry.program import Program
from gradsift.geometry.rounding import WholeChoice
from gradsift.geometry.similarity import Scale
from gradsift.geometry.stability import stability
from gradsift.types import Cut, Note, Problem, Selection


def dot_noise(problem: Problem, rho: Float[np.ndarray, " N"], scale: Scale) -> Float[np.ndarray, " N"]:
    """Bound the error of every scaled dot of a row from the measured bounds of cosines and norms.

    A dot is cosine times norm, so |h| (noise.cos (1 + noise.norm) + noise.norm |c|) with the largest |c| of the row;
    the 99th percentile that clips moves by no more than the norms do. Cosines (``unit``) carry no error of the norm.

    Args:
        problem: the eligible rows with dots and norms.
        rho: float64 [N] row factors.
        scale: how they were made.

    Returns:
        float64 [N], >= 0.
    """
    assert problem.grad_norm is not None
    assert problem.anchor_cos is not None
    assert problem.target_cos is not None
    noise, size = problem.noise, rho * problem.grad_norm
    if scale == "unit":
        return noise.cos * size
    cos = np.maximum(np.abs(problem.anchor_cos).max(axis=1), np.abs(problem.target_cos))
    return size * (noise.cos * (1 + noise.norm) + noise.norm * cos)


def describe_cut(
    ids: tuple[str, ...],
    program: Program,
    solution: DualSolution,
    whole: WholeChoice,
    noise: Float[np.ndarray, " N"],
    noise_eps: float,
) -> Cut:
    """State margin and bound in units of score: margin > bound iff no error within the bounds changes a decision.

    The bound covers a row's dots and the prices that follow from all dots. Rounding and swaps have distances and error
    bounds of their own; the tightest decision of all sets the margin, as its ratio times the bound.

    Args:
        ids: N row ids.
        program: the program.
        solution: its solution.
        whole: the rows.
        noise: float64 [N] error bound of every dot of a row.
        noise_eps: error bound of the allowances.

    Returns:
        Margin, bound and the rows that errors could exchange.
    """
    state = stability(program, solution, noise, noise_eps)
    ratio = min(state.ratio, whole.ratio)
    margin = state.gap
    if state.bound > 0:
        margin = ratio * state.bound if math.isfinite(ratio) else 0.0
    # An infinite bound (a singular system) decides nothing, and 0 x inf is no number.
    margin = 0.0 if math.isnan(margin) else margin
    if margin > state.bound or whole.chosen.all():
        return Cut(margin, state.bound)
    # Without measured errors only exact ties at the cut are undecided.
    rows = (
        whole.movable
        if state.bound > 0
        else np.abs(program.score(solution.prices) / program.cost - solution.threshold) == 0
    )
    return Cut(margin, state.bound, tuple(ids[i] for i in np.flatnonzero(rows)))


def remarks(
    problem: Problem, program: Program, whole: WholeChoice, cut: Cut, rho: Float[np.ndarray, " N"] | None
) -> tuple[Note, ...]:
    """Collect counted remarks: undecided rows, clipped rows, unused budget, how rows are weighed.

    Args:
        problem: the eligible rows.
        program: the program.
        whole: the rows chosen.
        cut: margin, bound, undecided rows.
        rho: float64 [N] row factors when norms were clipped, else None.

    Returns:
        The notes.
    """
    text = "sums count every row once, as a trainer does that averages the loss over rows; a trainer that averages over"
    notes = [Note("row_average", f"{text} the tokens of a batch weighs each row by its trained tokens")]
    if cut.undecided:
        text = "errors within the measured bound could exchange some of these rows"
        if len(cut.undecided) == problem.size:
            text = "errors within the measured bound could change a price or the cut itself, so no row is certain"
        text += "; the numbers as measured decided, and the smaller id among equals"
        notes.append(Note("undecided", text, len(cut.undecided), cut.undecided[:5]))
    if rho is not None and (clipped := np.flatnonzero((rho < 1) & whole.chosen)).size:
        assert problem.anchor_dot is not None
        raw = problem.anchor_dot[whole.chosen].sum(axis=0)
        sums = ", ".join(f"{name} {value:+.4g}" for name, value in zip(program.names, raw, strict=True))
        text = f"chosen rows whose norm was clipped at the 99th percentile act with more than they count; unclipped: {sums}"
        notes.append(Note("clipped", text, len(clipped), tuple(problem.ids[i] for i in clipped[:5])))
    left = round(program.total - float(program.cost[whole.chosen].sum()))
    if left > 0:
        why = "no further row gains" if program.fill == "positive" else "no further row fits them and the allowances"
        unit = "rows" if program.by_rows else "trained tokens"
        notes.append(Note("unfilled", f"{left} {unit} of the budget are unused: {why}", left))
    return tuple(notes)


def explain(selection: Selection, program: Program, solution: DualSolution, whole: WholeChoice) -> Selection:
    """Give every row its reason: the parts of its score and where they put it.

    Args:
        selection: built with plain reasons.
        program: the program.
        solution: its solution.
        whole: the rows.

    Returns:
        The selection with new codes and sentences.
    """
    cut = solution.threshold
    weights = whole.base.w
    added = set(whole.added.tolist())
    priced = [(j, name) for j, name in enumerate(program.names) if solution.prices[j] > 0]
    codes, reasons = [], []
    for i, score in enumerate(selection.score):
        parts = [f"gain {program.gain[i]:+.3g}"]
        parts += [f"{name} {program.dots[i, j]:+.3g} x price {solution.prices[j]:.3g}" for j, name in priced]
        if not program.by_rows:
            parts.append(f"over {program.cost[i]:g} trained tokens")
        split = bool(WHOLE < weights[i] < 1 - WHOLE)
        # After a tightening the rows rounded are those of other prices, so a row's side of this cut is read off.
        side = (
            "at"
            if split or math.isclose(score, cut, rel_tol=1e-9, abs_tol=1e-12)
            else ("above" if score > cut else "below")
        )
        where = f"{side} the cut {cut:.3g}"
        if whole.chosen[i]:
            code, what = _why_kept(weights[i], split, i in added)
        else:
            code, what = "dropped:budget", _why_dropped(weights[i], split)
        codes.append(code)
        reasons.append(f"rank {selection.rank[i]} of {len(selection.score)}: {', '.join(parts)}, {where}{what}")
    return dataclasses.replace(selection, reason_code=tuple(codes), reason=tuple(reasons))


def _why_kept(weight: float, split: bool, added: bool) -> tuple[str, str]:
    if added:
        return "kept:fill", "; added because it still fitted the budget"
    if split:
        return "kept:fraction_rounding", f"; the fractional optimum takes {weight:.2f} of it, rounded up"
    if weight <= WHOLE:
        return "kept:swap", "; swapped in within the allowances"
    return "kept:score", ""


def _why_dropped(weight: float, split: bool) -> str:
    if split:
        return f"; the fractional optimum takes {weight:.2f} of it, rounded down"
    return "; swapped out for more gain within the allowances" if weight >= 1 - WHOLE else ""
