"""From atoms to a selection: parts, their pursuits, rows with weights and the audit; shared by both forms of matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import InfeasibleError
from gradsift.geometry.omp import Pursuit, match
from gradsift.methods.base import Allowance, build_selection, require, resolve_budget
from gradsift.methods.grad_match_atoms import Atoms, Piece, Spread, batch_rows, make_atoms, spread, target_vector
from gradsift.seeds import Stream
from gradsift.types import Budget, Cut, Note, Problem, Selection

if TYPE_CHECKING:
    from gradsift.methods.grad_match import GradMatch

FEW_ATOMS = 20  # of a part
MOST = 0.5  # share of the weight that one batch may hold unsaid
SINGULAR = 1e10  # condition number
ENDED = {
    "matched": "the target is matched within the tolerance",
    "no_atom_helps": "no batch that is left points towards what is left of the target",
    "no_nearer": "a larger choice came no nearer to the target",
    "all_chosen": "every other batch was taken or given up",
}


def choose(problem: Problem, method: GradMatch, budget: Budget, stream: Stream, num_partitions: int) -> Selection:
    """Match gradients in each part and assemble the selection.

    Args:
        problem: the eligible rows.
        method: settings.
        budget: what was asked.
        stream: deals the atoms where there are several parts.
        num_partitions: parts wanted, >= 1.

    Returns:
        The selection.
    """
    require(problem, method)
    allowance = resolve_budget(problem, budget)
    cost = allowance.cost(problem)
    size = method.batch_size or batch_rows(problem, allowance)
    atoms = make_atoms(problem, size)
    to_target = method.steer == "target" or (method.steer == "given" and problem.target is not None)
    whole = target_vector(problem, atoms, to_target)
    amount = min(allowance.amount, int(cost.sum()))
    parts = deal(atoms, problem, cost, amount, num_partitions, stream)
    pieces = _pursue(atoms, cost, parts, amount, whole if to_target else None, method)
    spreading = spread(atoms, pieces, problem, cost, method.max_weight)
    if not len(spreading.chosen):
        _refuse(method, pieces, to_target)
    order = np.concatenate([spreading.chosen, spreading.cut_off])
    tokens = allowance.tokens is not None
    bound = max(problem.noise.norm, problem.noise.cos)
    facts = _facts(atoms, pieces, whole)
    facts = {"steer": "target" if to_target else "pool", "batch_size": size, **facts}
    return build_selection(
        problem,
        method,
        budget,
        stream,
        chosen=spreading.chosen,
        score=_scores(problem.size, order if tokens else spreading.chosen),
        order=order if tokens else spreading.chosen,
        skipped=spreading.cut_off if tokens else None,
        # a pursuit may turn on the last bit of any sketch
        cut=Cut(0.0, bound, problem.ids if bound else (), known=False),
        kept="matched",
        why_kept=_why(atoms, pieces, spreading),
        dropped=_dropped(atoms, pieces, spreading, budget),
        weights=spreading.weights,
        notes=[*allowance.notes, *_notes(method, allowance, pieces, spreading), *_part_notes(parts, num_partitions)],
        details=facts,
    )


def deal(
    atoms: Atoms, problem: Problem, cost: Int[np.ndarray, " N"], amount: int, wanted: int, stream: Stream
) -> list[Int[np.ndarray, " _"]]:
    """Deal atoms at random into parts of equal number, keyed by the id of their first row.

    Args:
        atoms: Q atoms.
        problem: the eligible rows.
        cost: int64 [N] what a row takes of the amount.
        amount: the budget.
        wanted: parts wanted.
        stream: of the draw.

    Returns:
        Parts as rising atom numbers: no more than there are atoms, or than rows of the largest cost fit into the budget.
    """
    num = max(1, min(wanted, atoms.size, amount // int(cost.max())))
    draw = stream.child("partitions").uniform([problem.ids[atoms.members(q)[0]] for q in range(atoms.size)])
    place = np.empty(atoms.size, dtype=np.int64)
    place[np.argsort(draw, kind="stable")] = np.arange(atoms.size)
    return [np.flatnonzero(place % num == p) for p in range(num)]


def share_out(costs: Int[np.ndarray, " P"], amount: int) -> Int[np.ndarray, " P"]:
    """Share an amount in proportion by largest remainders (Hamilton); ties go to the smaller part.

    Args:
        costs: int64 [P] what each part would take as a whole, >= 0, not all 0.
        amount: at most their sum.

    Returns:
        int64 [P], adds up to the amount, no part above its cost.
    """
    total = int(costs.sum())
    floor = np.array([int(c) * amount // total for c in costs], dtype=np.int64)
    rest = np.array([int(c) * amount % total for c in costs])
    extra = np.lexsort((np.arange(len(costs)), -rest))[: amount - int(floor.sum())]
    floor[extra] += 1
    return floor


def _pursue(
    atoms: Atoms,
    cost: Int[np.ndarray, " N"],
    parts: Sequence[Int[np.ndarray, " _"]],
    amount: int,
    target: Float[np.ndarray, " D"] | None,
    method: GradMatch,
) -> list[Piece]:
    price, least = atoms.sums(cost), atoms.least(cost)
    shares = share_out(np.array([price[part].sum() for part in parts]), amount)
    scale = float(np.einsum("qd,qd->q", atoms.mean, atoms.mean).mean())
    pursuit = Pursuit(method.ridge * scale, method.tolerance, method.max_repeats)
    pieces = []
    for part, share in zip(parts, shares.tolist(), strict=True):
        aim = atoms.tokens[part] @ atoms.mean[part] / atoms.tokens.sum() if target is None else target / len(parts)
        some = atoms.mean if len(parts) == 1 else atoms.mean[part]
        matched = match(some, aim, share, pursuit, cost=price[part], least=least[part]) if share else None
        pieces.append(Piece(part, share, float(np.linalg.norm(aim)), matched))
    return pieces


def _refuse(method: GradMatch, pieces: Sequence[Piece], to_target: bool) -> None:
    reasons = sorted({piece.matched.stop for piece in pieces if piece.matched is not None})
    raise InfeasibleError(
        f"{method.name} leaves no row to choose",
        where="the target's direction" if to_target else "the pool's mean gradient",
        got=f"no batch chosen: {', '.join(reasons)}",
        expected="at least one batch that points towards it",
        do="use another target or --set steer=pool, or raise the budget",
    )


def _facts(atoms: Atoms, pieces: Sequence[Piece], whole: Float[np.ndarray, " D"]) -> dict[str, Any]:
    """Residuals in units of |b|: of each part, their sum, and of the joined choice, which is at most that sum."""
    length, total = float(np.linalg.norm(whole)), np.zeros_like(whole)
    each = []
    for piece in pieces:
        found = piece.matched
        if found is not None:
            total += found.weights @ atoms.mean[piece.chosen]
        error = piece.length * (1.0 if found is None else found.residual) / length
        each.append({
            "num_atoms": len(piece.atoms), "num_chosen": len(piece.chosen), "residual": error,
            "stop": "no_budget" if found is None else found.stop,
        })  # fmt: skip
    return {
        "num_atoms": atoms.size,
        "parts": each,
        "sum_of_residuals": float(sum(one["residual"] for one in each)),
        "residual": float(np.linalg.norm(total - whole)) / length,
    }


def _scores(size: int, order: Int[np.ndarray, " n"]) -> Float[np.ndarray, " N"]:
    """Minus the place; NaN for rows without one."""
    score = np.full(size, np.nan)
    score[order] = -np.arange(1, len(order) + 1, dtype=np.float64)
    return score


def _why(atoms: Atoms, pieces: Sequence[Piece], spreading: Spread) -> Any:
    batch = {row: atom for piece in pieces for atom in piece.chosen.tolist() for row in atoms.members(atom).tolist()}
    weight = dict(zip(spreading.chosen.tolist(), spreading.weights.tolist(), strict=True))
    return lambda row: f"batch {batch[row]} of {len(atoms.members(batch[row]))} rows, weight {weight[row]:.3g}"


def _dropped(atoms: Atoms, pieces: Sequence[Piece], spreading: Spread, budget: Budget) -> dict[int, tuple[str, str]]:
    """Reasons of the rows that were not taken: budget, copies, or a matching that wants no more."""
    out: dict[int, tuple[str, str]] = {}
    for piece in pieces:
        found = piece.matched
        passed = piece.atoms[found.duplicates] if found is not None else piece.atoms[:0]
        for atom in np.setdiff1d(piece.atoms, piece.chosen).tolist():
            if atom in passed:
                reason = ("dropped:duplicate", f"batch {atom} adds nothing to the batches that were chosen")
            elif found is None or piece.used_up:
                reason = ("dropped:budget", f"batch {atom} was not picked before the budget {budget} was used up")
            else:
                reason = ("dropped:not_needed", f"batch {atom} was not picked: {ENDED[found.stop]}")
            out |= dict.fromkeys(atoms.members(atom).tolist(), reason)
    text = f"its batch used up the budget {budget} with other rows"
    return out | dict.fromkeys(spreading.cut_off.tolist(), ("dropped:budget", text))


def _notes(method: GradMatch, allowance: Allowance, pieces: Sequence[Piece], spreading: Spread) -> list[Note]:
    """Say where the matching wanted fewer rows than the budget, and what became of copies, repeats and weights."""
    found = [piece.matched for piece in pieces if piece.matched is not None]
    short = sum(p.amount - used for p, used in zip(pieces, spreading.used, strict=True) if not p.used_up)
    duplicates, banned = sum(len(m.duplicates) for m in found), sum(m.num_banned for m in found)
    worst, ended = max(m.condition for m in found), sorted({ENDED[m.stop] for m in found if m.stop in ENDED})
    unit = "rows" if allowance.tokens is None else "trained tokens"
    said = {
        "shortage": (short, f"{short} {unit} of the budget are not used: {'; '.join(ended)}"),
        "duplicate_atoms": (duplicates, f"{duplicates} batches add nothing to those chosen and were passed over"),
        "repeat_cap": (banned, f"{banned} batches fell to a weight of 0 or below too often and were given up"),
        "clipped_weights": (
            spreading.num_clipped, f"the weights of {spreading.num_clipped} rows were clipped at {method.max_weight:g} "
            "times the mean weight",
        ),
    }  # fmt: skip
    notes = [Note(code, text, count) for code, (count, text) in said.items() if count]
    if (low := float(spreading.weights.min())) != (high := float(spreading.weights.max())):
        text = (
            f"rows weigh from {low:.3g} to {high:.3g}: gradsift train takes the weights from audit.parquet, the chosen file "
            "alone does not carry them"
        )
        notes.append(Note("weighted", text, len(spreading.weights)))
    if spreading.share > MOST and sum(len(m.chosen) for m in found) > 1:
        text = f"one batch holds {spreading.share:.0%} of the weight; a larger ridge or a smaller max_weight spreads it"
        notes.append(Note("concentrated_weights", text))
    if worst > SINGULAR:
        text = f"the chosen batches nearly depend on each other (condition number {worst:.1e}): give a larger ridge"
        notes.append(Note("near_singular", text))
    return notes


def _part_notes(parts: Sequence[Int[np.ndarray, " _"]], wanted: int) -> list[Note]:
    notes = []
    if len(parts) < wanted:
        text = f"{len(parts)} parts instead of {wanted}: there are too few batches, or too small a budget, for more"
        notes.append(Note("fewer_partitions", text, wanted - len(parts)))
    small = [part for part in parts if len(part) < FEW_ATOMS]
    if len(parts) > 1 and small:
        text = f"{len(small)} parts hold fewer than {FEW_ATOMS} batches: fewer partitions would match better"
        notes.append(Note("small_partitions", text, len(small)))
    return notes
