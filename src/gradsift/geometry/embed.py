"""Cosines of embeddings, and the order in which target rows take pool rows in turn (arXiv 2503.01807, RDS+)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

BLOCK = 4096  # rows that are widened to float64 at once


def cosine_table(
    embedding: Float[np.ndarray, "N d"], target: Float[np.ndarray, "n_t d"]
) -> Float32[np.ndarray, "N n_t"]:
    """Cosine of every pool row with every target row.

    The product is taken in float64 and rounded to float32, so that equal rows tie wherever they stand: a matrix product
    rounds its last bits by position.

    Args:
        embedding: [N, d], no row zero.
        target: [n_t, d], no row zero.

    Returns:
        float32 [N, n_t] in [-1, 1].
    """
    queries = _unit(target).T
    out = np.empty((len(embedding), len(target)), dtype=np.float32)
    for start in range(0, len(embedding), BLOCK):
        out[start : start + BLOCK] = _unit(embedding[start : start + BLOCK]) @ queries
    return np.clip(out, -1.0, 1.0)


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    wide = np.asarray(rows, dtype=np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@dataclass(frozen=True)
class Turns:
    """All pool rows in the order in which target rows took them.

    Args:
        order: int64 [N] pool rows, first turn first.
        taker: int64 [N] which target row took each, in the same order.
        gap: float64 [N] how much nearer the row taken was than the next one left; infinity at the last turn.
    """

    order: Int[np.ndarray, " N"]
    taker: Int[np.ndarray, " N"]
    gap: Float[np.ndarray, " N"]


def take_in_turns(cosines: Float[np.ndarray, "N n_t"]) -> Turns:
    """Let each target row in turn take its nearest pool row that is left, until none is left.

    Args:
        cosines: [N, n_t], finite; ties go to the smaller row.

    Returns:
        Every row once. Memory: 4 N n_t bytes for the rankings, made when a target row has its first turn.
    """
    num_rows, num_targets = cosines.shape
    left = np.ones(num_rows, dtype=bool)
    ranking: list[Int[np.ndarray, " N"] | None] = [None] * num_targets
    at = [0] * num_targets
    order, taker = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    gap = np.full(num_rows, np.inf)
    for turn in range(num_rows):
        q = turn % num_targets
        ranked = ranking[q]
        if ranked is None:
            ranked = ranking[q] = np.argsort(-cosines[:, q], kind="stable").astype(np.int32)
        first = at[q] = _next_left(ranked, at[q], left)
        row = int(ranked[first])
        order[turn], taker[turn] = row, q
        left[row] = False
        if turn + 1 < num_rows:
            second = at[q] = _next_left(ranked, first, left)
            gap[turn] = float(cosines[row, q]) - float(cosines[ranked[second], q])
    return Turns(order, taker, gap)


def _next_left(ranked: Int[np.ndarray, " N"], place: int, left: Bool[np.ndarray, " N"]) -> int:
    """First place at or after ``place`` whose row is left; there is one."""
    size = 1
    while True:
        found = left[ranked[place : place + size]]
        first = int(found.argmax())
        if found[first]:
            return place + first
        place, size = place + size, 2 * size


def unsettled(turns: Turns, cosines: Float[np.ndarray, "N n_t"], num_turns: int, reach: float) -> Int[np.ndarray, " u"]:
    """Rows that another measurement could bring into, or out of, the first turns (ours).

    While every gap exceeds ``reach`` the same rows are taken in the same turns. After the first smaller gap anything
    already taken stays, and a target row can take, within its turns, only rows to which it clearly prefers fewer rows
    than there are turns.

    Args:
        turns: from :func:`take_in_turns` on the same cosines.
        cosines: [N, n_t].
        num_turns: how many turns count, in [1, N].
        reach: twice the bound on one cosine: two cosines farther apart keep their order.

    Returns:
        int64 [u] rows in increasing order; none where all gaps exceed ``reach``.
    """
    close = np.flatnonzero(turns.gap[:num_turns] <= reach)
    if reach == 0 or close.size == 0:
        return np.zeros(0, dtype=np.int64)
    settled = turns.order[: close[0]]
    last = len(cosines) - num_turns
    edge = np.partition(cosines, last, axis=0)[last]  # of each target row, its num_turns-th nearest
    maybe = (cosines >= edge - reach).any(axis=1)
    maybe[turns.order[:num_turns]] = True
    maybe[settled] = False
    return np.flatnonzero(maybe)
