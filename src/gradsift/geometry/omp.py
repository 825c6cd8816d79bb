"""Non-negative orthogonal matching pursuit: few atoms with weights whose sum stands in for a target vector.

After GRAD-MATCH (Killamsetty et al. 2021, arXiv 2103.00123): minimize |sum_q x_q a_q - b|^2 + ridge |x|^2 over x >= 0
with few atoms. The system of the chosen atoms is kept as a Cholesky factor that grows and shrinks by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import cho_solve, solve_triangular

from gradsift.errors import BudgetError, NumericsError

Stop = Literal["budget", "matched", "no_atom_helps", "no_atom_fits", "no_nearer", "all_chosen"]
ROUNDING = 1e-12  # relative: correlations this close tie, and one this small is none


@dataclass(frozen=True)
class Pursuit:
    """Settings of the pursuit.

    Args:
        ridge: added to the diagonal of the chosen atoms' Gram matrix, in its units, >= 0.
        tolerance: relative residual at which the target counts as matched, >= 0.
        max_repeats: how often an atom that was dropped may be picked again.
    """

    ridge: float = 0.0
    tolerance: float = 1e-4
    max_repeats: int = 2


@dataclass(frozen=True)
class Matched:
    """The best set of atoms that was seen.

    Args:
        chosen: int64 [k] atoms in the order they were picked, unique.
        weights: float64 [k], > 0.
        residual: |b - sum x_q a_q| / |b|, in [0, 1].
        stop: why the pursuit ended: the ``budget`` is used up, the target is ``matched``, ``no_atom_helps`` (none points
            towards what is left), ``no_atom_fits`` what is left of the budget, ``no_nearer`` (the budget was used up by
            a set that is no nearer than a smaller one, which is returned), or ``all_chosen``.
        last: atom whose picking used the budget up, so that it may reach beyond it; -1 for none.
        num_dropped: times an atom's weight fell to 0 or below and it was dropped.
        num_banned: atoms dropped more often than ``max_repeats`` allows.
        duplicates: int64 [d] atoms passed over because they equal a chosen one or depend on those chosen.
        condition: condition number of the chosen atoms' system, ridge included; 1 for none.
        residuals: float64 [s] relative residual after every pick.
    """

    chosen: Int[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    residual: float
    stop: Stop
    last: int
    num_dropped: int
    num_banned: int
    duplicates: Int[np.ndarray, " d"]
    condition: float
    residuals: Float[np.ndarray, " s"]


@dataclass
class _State:
    """What a pursuit holds while it runs; the factor is stored in the lower triangle of its first rows."""

    factor: Float[np.ndarray, "c c"]
    chosen: list[int] = field(default_factory=list)
    drops: dict[int, int] = field(default_factory=dict)
    passed: list[int] = field(default_factory=list)

    @property
    def part(self) -> Float[np.ndarray, "k k"]:
        """The factor of the chosen atoms' system."""
        return self.factor[: len(self.chosen), : len(self.chosen)]


def match(
    atoms: Float[np.ndarray, "Q D"],
    target: Float[np.ndarray, " D"],
    budget: int,
    pursuit: Pursuit = Pursuit(),
    *,
    cost: Int[np.ndarray, " Q"] | None = None,
    least: Int[np.ndarray, " Q"] | None = None,
) -> Matched:
    """Choose atoms and weights >= 0 whose sum approximates the target (GRAD-MATCH, arXiv 2103.00123; repeat cap ours).

    The atom of largest signed correlation with the residual is added and all weights are solved anew; an atom whose
    weight is not positive is dropped. Atoms are added while less than the budget is used, so the last one may reach
    beyond it. Among the sets seen, the one of smallest residual is returned.

    Args:
        atoms: Q vectors; float64, anything else is copied to it. Ties go to the smaller row.
        target: b.
        budget: what the atoms may cost, >= 1; at most their total cost.
        pursuit: ridge, tolerance and repeat cap.
        cost: int64 [Q] >= 1; 1 by default, so that the budget is a number of atoms.
        least: int64 [Q], the least of what is left of the budget at which an atom may be picked; 1 by default.

    Returns:
        The choice, possibly of no atom, with the reason it ended. O(Q D) per pick, and O(k D + k^2) for k chosen atoms.
        A target or atom that is not finite, or a zero target, is refused (NumericsError), and so is a budget that is
        out of range (BudgetError).
    """
    a, b = np.asarray(atoms, dtype=np.float64), np.asarray(target, dtype=np.float64)
    price = np.ones(len(a), dtype=np.int64) if cost is None else cost
    fits = np.ones(len(a), dtype=np.int64) if least is None else least
    norms = np.linalg.norm(a, axis=1)
    whole = float(np.linalg.norm(b))
    _check(norms, whole, budget, int(price.sum()))
    state, side = _State(np.zeros((min(8, len(a)), min(8, len(a))))), a @ b
    left, residual, last = b, 1.0, -1
    best, trail = ((), np.zeros(0), 1.0, -1), []
    while True:
        used = int(price[state.chosen].sum())
        free = _free(state, len(a), pursuit.max_repeats)
        stop = _stop(residual, pursuit, budget - used, free, fits)
        pick = _best(a @ left, norms, float(np.linalg.norm(left)), free & (fits <= budget - used)) if not stop else -1
        if stop or pick < 0:
            break
        if not _add(state, a, norms, pick, pursuit.ridge):
            state.passed.append(pick)
            continue
        last = pick if used + price[pick] > budget else -1
        weights = _settle(state, side)
        left = b - weights @ a[state.chosen]
        residual = float(np.linalg.norm(left)) / whole
        trail.append(residual)
        if residual < best[2]:
            best = (tuple(state.chosen), weights, residual, last if last in state.chosen else -1)
    chosen = np.array(best[0], dtype=np.int64)
    reason: Stop = stop or "no_atom_helps"
    if reason in ("budget", "no_atom_fits") and len(trail) and residual > best[2]:
        reason = "no_nearer"
    return Matched(
        chosen, best[1], best[2], reason, best[3], sum(state.drops.values()),
        sum(n > pursuit.max_repeats for n in state.drops.values()), np.array(state.passed, dtype=np.int64),
        condition_number(a[chosen], pursuit.ridge), np.array(trail),
    )  # fmt: skip


def _check(norms: Float[np.ndarray, " Q"], whole: float, budget: int, total: int) -> None:
    bad = np.flatnonzero(~np.isfinite(norms))
    if bad.size:
        raise NumericsError("an atom is not finite", where=f"atom {bad[0]}", expected="finite gradients")
    if not np.isfinite(whole) or whole == 0:
        raise NumericsError(
            "the target gradient is zero or not finite",
            where="the target of the matching",
            got=f"length {whole}",
            expected="a finite vector with a direction",
            do="use more target rows, or steer by another set",
        )
    if not 1 <= budget <= total:
        raise BudgetError(
            "the matching's budget is out of range", got=budget, expected=f"1 to {total}, the cost of all atoms"
        )


def _free(state: _State, size: int, max_repeats: int) -> Bool[np.ndarray, " Q"]:
    """Atoms that may be picked: not chosen, not passed over, not dropped too often."""
    free = np.ones(size, dtype=bool)
    banned = [q for q, n in state.drops.items() if n > max_repeats]
    free[[*state.chosen, *state.passed, *banned]] = False
    return free


def _stop(
    residual: float, pursuit: Pursuit, left: int, free: Bool[np.ndarray, " Q"], fits: Int[np.ndarray, " Q"]
) -> Stop | None:
    if residual < pursuit.tolerance:
        return "matched"
    if left <= 0:
        return "budget"
    if not free.any():
        return "all_chosen"
    return None if (free & (fits <= left)).any() else "no_atom_fits"


def _best(
    dots: Float[np.ndarray, " Q"], norms: Float[np.ndarray, " Q"], length: float, free: Bool[np.ndarray, " Q"]
) -> int:
    """Free atom of largest correlation, the first among ties; -1 where none points towards the residual."""
    top = float(dots[free].max())
    close = free & (dots >= top - ROUNDING * norms * length) & (dots > ROUNDING * norms * length)
    return int(close.argmax()) if close.any() else -1


def _add(
    state: _State, atoms: Float[np.ndarray, "Q D"], norms: Float[np.ndarray, " Q"], pick: int, ridge: float
) -> bool:
    """Append an atom to the factor; False where it equals a chosen atom or depends on those chosen."""
    k, atom = len(state.chosen), atoms[pick]
    cross = atoms[state.chosen] @ atom
    own = float(atom @ atom)
    if k and float((own + norms[state.chosen] ** 2 - 2 * cross).min()) <= ROUNDING * own:
        return False
    row = solve_triangular(state.part, cross, lower=True) if k else cross
    rest = own + ridge - float(row @ row)
    if rest <= ROUNDING * (own + ridge):
        return False
    if k == len(state.factor):
        size = min(2 * k, len(atoms))
        state.factor = np.pad(state.factor, (0, size - k))
    state.factor[k, :k], state.factor[k, k] = row, np.sqrt(rest)
    state.chosen.append(pick)
    return True


def _settle(state: _State, side: Float[np.ndarray, " Q"]) -> Float[np.ndarray, " k"]:
    """Weights of the chosen atoms; while one of them is not positive the lowest is dropped."""
    while state.chosen:
        weights = cho_solve((state.part, True), side[state.chosen])
        low = int(np.argmin(weights))
        if weights[low] > 0:
            return weights
        drop_column(state.part, low)
        gone = state.chosen.pop(low)
        state.drops[gone] = state.drops.get(gone, 0) + 1
    return np.zeros(0)


def drop_column(factor: Float[np.ndarray, "k k"], at: int) -> None:
    """Turn the Cholesky factor of a matrix, in place, into that of the matrix without one row and column.

    What stands below the dropped row takes up its column by a rank-one update (Golub and Van Loan, section 6.5.4).

    Args:
        factor: lower triangle [k, k]; afterwards its first k - 1 rows hold the new factor and the last row is 0.
        at: row to drop, in [0, k).
    """
    k = len(factor)
    carry = factor[at + 1 :, at].copy()
    factor[at : k - 1, :at] = factor[at + 1 :, :at]
    factor[at : k - 1, at : k - 1] = np.tril(factor[at + 1 :, at + 1 :])
    factor[k - 1], factor[:, k - 1] = 0, 0
    for j, row in enumerate(range(at, k - 1)):
        head = float(factor[row, row])
        length = float(np.hypot(head, carry[j]))
        cos, sin = length / head, carry[j] / head
        factor[row, row] = length
        below = factor[row + 1 : k - 1, row]
        below[:] = (below + sin * carry[j + 1 :]) / cos
        carry[j + 1 :] = cos * carry[j + 1 :] - sin * below


def condition_number(atoms: Float[np.ndarray, "k D"], ridge: float) -> float:
    """Condition number of the chosen atoms' Gram matrix with its ridge.

    Args:
        atoms: the chosen atoms.
        ridge: what is added to the diagonal.

    Returns:
        Largest over smallest eigenvalue, >= 1 and perhaps infinite; 1 for no atom.
    """
    if not len(atoms):
        return 1.0
    values = np.linalg.eigvalsh(atoms @ atoms.T) + ridge
    return float(values[-1] / values[0]) if values[0] > 0 else float("inf")
