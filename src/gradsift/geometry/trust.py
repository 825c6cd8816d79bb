"""Which rows are likely domain, which of them are trusted, and how two groups share a budget (ours).

Shared by the method ``crossfit``, the stage that trains its probes and the comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Prior:
    """Which rows may be domain, by their tokens alone.

    Args:
        share: share of the rows, those most like the target; in (0, 1].
        max_copies: rows of equal tokens of which probes learn at most this many; >= 1.
    """

    share: float
    max_copies: int


def by_score(score: Float[np.ndarray, " N"], rows: Int[np.ndarray, " n"] | None = None) -> Int[np.ndarray, " n"]:
    """Sort rows by falling score, ties by index.

    Args:
        score: float64 [N], finite on the rows.
        rows: int64 [n] which rows; all by default.

    Returns:
        int64 [n].
    """
    rows = np.arange(len(score)) if rows is None else rows
    return rows[np.lexsort((rows, -score[rows]))]


def likely_domain(likeness: Float[np.ndarray, " N"], share: float) -> Int[np.ndarray, " n"]:
    """Take the share of the rows that looks most like the target.

    Args:
        likeness: float64 [N], nats per token; rows in id order.
        share: in (0, 1]; at least one row is taken.

    Returns:
        int64 [n] row indices by falling likeness, ties by index.
    """
    return by_score(likeness)[: max(1, round(share * len(likeness)))]


def cap_copies(rows: Sequence[int] | Int[np.ndarray, " n"], group: Sequence[str], cap: int) -> Int[np.ndarray, " k"]:
    """Keep at most ``cap`` rows of each group, in the order given.

    Args:
        rows: n row indices.
        group: a name per row of the pool; empty where every row is its own group.
        cap: >= 1.

    Returns:
        int64 [k] the rows kept, in that order.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if not group:
        return rows
    seen: Counter[str] = Counter()
    kept: list[bool] = []
    for i in map(int, rows):
        seen[group[i]] += 1
        kept.append(seen[group[i]] <= cap)
    return rows[np.array(kept, dtype=bool)]


def num_trusted(share: float, count: int) -> int:
    """Count the rows of the prior that are trusted.

    Args:
        share: in (0, 1].
        count: rows of the prior.

    Returns:
        At least 1.
    """
    return max(1, round(share * count))


def fair_places(
    first: Int[np.ndarray, " n"], second: Int[np.ndarray, " m"], cost: Int[np.ndarray, " N"], share: float
) -> Float[np.ndarray, " N"]:
    """Merge two queues so that every prefix gives the second its share of the cost, as nearly as rows allow.

    A row's place is where the middle of it comes in its own queue, over the queue's share (the divisor method of
    Webster and Sainte-Lague, which for two parties rounds each one's exact share). With unit costs the k smallest places hold
    round(share * k) rows of the second queue; when a queue is used up the other goes on.

    Args:
        first: int64 [n] rows of the first queue, in order.
        second: int64 [m] rows of the second queue, in order; disjoint from the first.
        cost: int64 [N] what a row takes, > 0.
        share: of the second queue, in [0, 1).

    Returns:
        float64 [N], smaller first; infinite for rows of neither queue, and past every row of the first where ``share`` is 0.
    """
    place = np.full(len(cost), np.inf)
    for queue, part in ((first, 1 - share), (second, share)):
        taken = cost[queue].astype(np.float64)
        middle = np.cumsum(taken) - taken / 2
        # At share 0 the second queue only fills what the first leaves.
        place[queue] = middle / part if part > 0 else float(cost[first].sum()) + middle
    return place


def settled_ranks(
    draw: Float[np.ndarray, " N"], sure: Bool[np.ndarray, " N"], maybe: Bool[np.ndarray, " N"]
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Bound the place of each row in a queue whose membership is not settled.

    Args:
        draw: float64 [N], smaller first; ties by index.
        sure: bool [N], rows that are in the queue for certain.
        maybe: bool [N], rows that may be in it; disjoint from ``sure``.

    Returns:
        int64 [N] the least and the largest number of rows before each row.
    """
    order = np.argsort(draw, kind="stable")
    low, high = np.empty(len(draw), dtype=np.int64), np.empty(len(draw), dtype=np.int64)
    low[order] = np.cumsum(sure[order]) - sure[order]
    high[order] = np.cumsum((sure | maybe)[order]) - (sure | maybe)[order]
    return low, high
