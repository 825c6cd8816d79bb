"""What gradient matching works on: mini-batches as atoms, their target, and weights of atoms made weights of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import NumericsError, SignalError
from gradsift.geometry.omp import Matched
from gradsift.geometry.similarity import row_scale
from gradsift.methods.base import Allowance
from gradsift.types import Problem

BATCH_ROWS, FEWEST = 16, 16  # rows of a batch; batches that a budget should hold at least


@dataclass(frozen=True)
class Atoms:
    """Mini-batches of one source and like length, with their gradients.

    Args:
        rows: int64 [N] every row once, batch after batch; inside a batch in id order.
        start: int64 [Q + 1] where each batch begins.
        mean: float64 [Q, D] sketch of the batch's token-mean gradient.
        tokens: int64 [Q] trained tokens of the batch.
    """

    rows: Int[np.ndarray, " N"]
    start: Int[np.ndarray, " Q1"]
    mean: Float[np.ndarray, "Q D"]
    tokens: Int[np.ndarray, " Q"]

    @property
    def size(self) -> int:
        """Number of atoms, Q."""
        return len(self.start) - 1

    def members(self, atom: int) -> Int[np.ndarray, " b"]:
        """Rows of an atom, in id order."""
        return self.rows[self.start[atom] : self.start[atom + 1]]

    def sums(self, values: Int[np.ndarray, " N"]) -> Int[np.ndarray, " Q"]:
        """Sum of a row's value over each atom."""
        return np.add.reduceat(values[self.rows], self.start[:-1])

    def least(self, values: Int[np.ndarray, " N"]) -> Int[np.ndarray, " Q"]:
        """Least of a row's value over each atom."""
        return np.minimum.reduceat(values[self.rows], self.start[:-1])


def batch_rows(problem: Problem, allowance: Allowance) -> int:
    """Choose the rows of a batch: 16, or fewer where the budget would hold fewer than 16 batches (ours).

    Args:
        problem: the eligible rows.
        allowance: rows or trained tokens.

    Returns:
        At least 1.
    """
    mean_cost = float(allowance.cost(problem).mean())
    return int(min(BATCH_ROWS, max(1.0, allowance.amount / mean_cost // FEWEST)))


def make_atoms(problem: Problem, num_rows: int) -> Atoms:
    """Group the rows of each source by length and average their clipped sketches over the trained tokens.

    The token mean is what the trainer's loss of a batch has as its gradient. Norms are clipped at their 99th percentile.

    Args:
        problem: the eligible rows with ``sketch`` and ``grad_norm``.
        num_rows: largest batch; those of a source differ by at most one row.

    Returns:
        The atoms, in order of their smallest id. Memory: 8 Q D bytes.

    Raises:
        NumericsError: a sketch is not finite.
    """
    assert problem.sketch is not None
    assert problem.grad_norm is not None
    source = np.unique(np.array(problem.sources, dtype=object).astype(str), return_inverse=True)[1]
    order = np.lexsort((np.arange(problem.size), problem.num_trained, source))
    batches: list[Int[np.ndarray, " b"]] = []
    for one in np.split(order, np.flatnonzero(np.diff(source[order])) + 1):
        batches += [np.sort(part) for part in np.array_split(one, -(-len(one) // num_rows))]
    batches.sort(key=lambda part: int(part[0]))  # so that ties go to the batch of the smaller id
    rows = np.concatenate(batches)
    start = np.concatenate([[0], np.cumsum([len(part) for part in batches])]).astype(np.int64)
    mean = np.empty((len(batches), problem.sketch.shape[1]))
    weight = problem.num_trained * row_scale(problem.grad_norm, "clipped")
    for q, part in enumerate(batches):
        some = np.asarray(problem.sketch[part], dtype=np.float64)
        _refuse_nonfinite(some, part, problem.ids)
        mean[q] = weight[part] @ some / problem.num_trained[part].sum()
    return Atoms(rows, start, mean, np.add.reduceat(problem.num_trained[rows], start[:-1]))


def _refuse_nonfinite(sketch: Float[np.ndarray, "b D"], rows: Int[np.ndarray, " b"], ids: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(sketch).all(axis=1))
    if bad.size:
        row = int(rows[bad[0]])
        raise NumericsError(
            "signal sketch is not finite",
            where=f"row {ids[row]}",
            expected="a finite sketch",
            do="collect the signals of such rows again, or give them a status that is not usable",
        )


def target_vector(problem: Problem, atoms: Atoms, to_target: bool) -> Float[np.ndarray, " D"]:
    """Give the vector to match: the target's unit direction, or the pool's token-mean gradient.

    Args:
        problem: with ``direction_sketch`` where the target is matched.
        atoms: of the pool.
        to_target: the target's, not the pool's.

    Returns:
        float64 [D]. Its length does not change which atoms are chosen, only the unit of their weights.

    Raises:
        SignalError: the target's sketch was not measured.
    """
    if not to_target:
        return atoms.tokens @ atoms.mean / atoms.tokens.sum()
    if problem.direction_sketch is None or problem.target is None:
        raise SignalError(
            "gradient matching needs the sketch of the target direction",
            where="direction_sketch",
            got="not measured",
            do="give a target (--target PATH) and collect again with the same --out, or --set steer=pool",
        )
    return np.asarray(problem.direction_sketch[len(problem.anchors)], dtype=np.float64)


@dataclass(frozen=True)
class Piece:
    """The pursuit of one part of the atoms.

    Args:
        atoms: int64 [q] the part's atoms, rising.
        amount: its share of the budget.
        length: |b_q|, length of its target.
        matched: the outcome, whose atoms count within the part; None where the part's share is 0.
    """

    atoms: Int[np.ndarray, " q"]
    amount: int
    length: float
    matched: Matched | None

    @property
    def chosen(self) -> Int[np.ndarray, " k"]:
        """Atoms chosen, in pick order."""
        return self.atoms[:0] if self.matched is None else self.atoms[self.matched.chosen]

    @property
    def used_up(self) -> bool:
        """Whether the budget, and not the matching, ended the pursuit."""
        return self.matched is None or self.matched.stop in ("budget", "no_atom_fits")


@dataclass(frozen=True)
class Spread:
    """A choice of atoms as a choice of rows.

    Args:
        chosen: int64 [k] rows, atoms in pick order, unique.
        weights: float32 [k] with mean 1, after clipping.
        cut_off: int64 [s] rows of atoms that used the budget up, for which there was no room.
        used: what the rows of each piece take of its amount.
        num_clipped: rows whose weight was clipped.
        share: largest share of one atom in the weights of all atoms, in [0, 1].
    """

    chosen: Int[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    cut_off: Int[np.ndarray, " s"]
    used: tuple[int, ...]
    num_clipped: int
    share: float


def spread(
    atoms: Atoms, pieces: Sequence[Piece], problem: Problem, cost: Int[np.ndarray, " N"], max_weight: float
) -> Spread:
    """Deal the weight of each atom to its rows, so that the trainer's weighted token mean is the weighted sum of atoms.

    The atom that uses its piece's amount up gives the rows that still fit, in id order; they carry its whole weight.

    Args:
        atoms: the atoms.
        pieces: which of them, and their weights.
        problem: the eligible rows.
        cost: int64 [N] what a row takes of the budget.
        max_weight: weights are clipped at this many times their mean.

    Returns:
        Rows and weights.
    """
    none = np.zeros(0, dtype=np.int64)
    rows, each, whole, over, used = [none], [np.zeros(0)], [np.zeros(0)], [none], []
    for piece in pieces:
        left = piece.amount
        for atom, weight in zip(piece.chosen.tolist(), _weights(piece), strict=True):
            some, rest = _fitting(atoms.members(atom), cost, left)
            left -= int(cost[some].sum())
            rows.append(some)
            over.append(rest)
            each.append(np.full(len(some), weight / problem.num_trained[some].sum()))
        whole.append(_weights(piece))
        used.append(piece.amount - left)
    weights, all_of = np.concatenate(each), np.concatenate(whole)
    limit = max_weight * weights.mean() if len(weights) else 0.0
    capped = np.minimum(weights, limit)
    if len(weights):
        capped /= capped.mean()
    return Spread(
        np.concatenate(rows), capped.astype(np.float32), np.concatenate(over), tuple(used),
        int((weights > limit).sum()), float(all_of.max() / all_of.sum()) if len(all_of) else 0.0,
    )  # fmt: skip


def _weights(piece: Piece) -> Float[np.ndarray, " k"]:
    return np.zeros(0) if piece.matched is None else piece.matched.weights


def _fitting(
    rows: Int[np.ndarray, " b"], cost: Int[np.ndarray, " N"], left: int
) -> tuple[Int[np.ndarray, " f"], Int[np.ndarray, " s"]]:
    """Rows that fit one after the other into what is left, and the others."""
    fits = np.zeros(len(rows), dtype=bool)
    for k, row in enumerate(rows.tolist()):
        fits[k] = cost[row] <= left
        left -= int(cost[row]) * bool(fits[k])
    return rows[fits], rows[~fits]
