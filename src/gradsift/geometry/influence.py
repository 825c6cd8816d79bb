"""Influence of pool rows on target rows over checkpoints, and choices without near-copies (less.md 2 and 3, arXiv 2402.04333)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.geometry.checkpoints import CheckpointSignals, checkpoint_weights

BLOCK = 4096  # rows that are widened to float64 at once
WALK = 256  # candidates that are compared with the chosen rows in one product


@dataclass(frozen=True)
class Influence:
    """What every pool row does for every subtask.

    Args:
        table: float32 [N, S] weighted mean cosines, in [-1, 1].
        subtasks: S labels, sorted.
        noise: absolute bound on an entry.
    """

    table: Float[np.ndarray, "N S"]
    subtasks: tuple[str, ...]
    noise: float


def influence_table(checkpoints: Sequence[CheckpointSignals], labels: Sequence[str]) -> Influence:
    """Score rows: sum_c w_c cos(G_c[z], V_c[z']), its mean over the target rows of each subtask (less.md 2).

    The product is taken in float64 and rounded to float32, so that equal rows tie wherever they stand.

    Args:
        checkpoints: C checkpoints over the same N rows and n_t target rows.
        labels: n_t subtask labels.

    Returns:
        One column per subtask.
    """
    weights = checkpoint_weights([one.lr for one in checkpoints])
    names = tuple(sorted(set(labels)))
    mean = np.array([[label == name for label in labels] for name in names], dtype=np.float64)
    mean /= mean.sum(axis=1, keepdims=True)
    num = len(checkpoints[0].features)
    total = np.zeros((num, len(names)))
    for weight, one in zip(weights, checkpoints, strict=True):
        columns = (mean @ one.target.astype(np.float64)).T * weight  # the mean of cosines is linear in unit rows
        for start in range(0, num, BLOCK):
            total[start : start + BLOCK] += one.features[start : start + BLOCK].astype(np.float64) @ columns
    noise = float(weights @ np.array([one.noise for one in checkpoints]))
    return Influence(np.clip(total, -1, 1).astype(np.float32), names, noise)


@dataclass(frozen=True)
class Walked:
    """Rows taken in order, near-copies of taken ones left out.

    Args:
        chosen: int64 [k] rows in the order taken.
        redundant: row -> the taken row that it is like.
        skipped: rows that did not fit what was left of the budget.
        rest: int64 [r] rows that were not looked at, in order.
        settled: how many rows of the order were decided before the first comparison that lies within the bound of the
            threshold.
    """

    chosen: Int[np.ndarray, " k"]
    redundant: dict[int, int]
    skipped: Int[np.ndarray, " s"]
    rest: Int[np.ndarray, " r"]
    settled: int


def joint_features(
    checkpoints: Sequence[CheckpointSignals], rows: Int[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, "n E"]:
    """Stand the checkpoints' directions side by side, so that a dot product is the weighted mean of their cosines.

    Args:
        checkpoints: C checkpoints with [N, D] features.
        rows: int64 [n] which rows; all by default.

    Returns:
        float32 [n, C D], rows of length 1.
    """
    weights = checkpoint_weights([one.lr for one in checkpoints])
    parts = [
        np.sqrt(w) * (one.features if rows is None else one.features[rows])
        for w, one in zip(weights, checkpoints, strict=True)
    ]
    return np.concatenate(parts, axis=1).astype(np.float32)


def has_alike(features: Float[np.ndarray, "n E"], threshold: float) -> bool:
    """Tell whether two rows have a larger cosine than a threshold.

    Args:
        features: [n, E] unit rows.
        threshold: any number.

    Returns:
        True where such a pair exists.
    """
    for start in range(0, len(features), WALK):
        block = features[start : start + WALK] @ features[start:].T
        block[np.tril_indices(len(block), m=block.shape[1])] = -np.inf  # itself and pairs that were seen
        if block.size and block.max() > threshold:
            return True
    return False


def walk_unlike(
    order: Int[np.ndarray, " N"],
    features: Float[np.ndarray, "N E"],
    cost: Int[np.ndarray, " N"],
    amount: int,
    *,
    threshold: float,
    reach: float = 0.0,
) -> Walked:
    """Take rows in order, but none whose cosine with a taken row exceeds a threshold (less.md 3, step 6; ours).

    Args:
        order: int64 [N] rows, best first.
        features: [N, E] unit rows.
        cost: int64 [N] what each row takes.
        amount: what there is.
        threshold: cosine above which a row counts as a copy.
        reach: a cosine this near the threshold is not settled.

    Returns:
        What was taken. Memory: a copy of the chosen rows' features.
    """
    taken: list[int] = []
    redundant: dict[int, int] = {}
    skipped: list[int] = []
    left, at, settled = int(amount), 0, len(order)
    cheapest = int(cost.min()) if len(cost) else 0
    kept = np.empty((0, features.shape[1]), dtype=np.float32)
    while at < len(order) and left >= max(1, cheapest):
        some = order[at : at + WALK]
        block = features[some]
        with_kept, within = block @ kept.T, block @ block.T
        first = len(taken)
        for k, row in enumerate(some.tolist()):
            if left < max(1, cheapest):
                break
            at += 1
            fresh = [int(np.flatnonzero(some == t)[0]) for t in taken[first:]]
            cosines = np.concatenate([with_kept[k], within[k, fresh]])
            if cosines.size and (np.abs(cosines - threshold) <= reach).any() and reach > 0:
                settled = min(settled, at - 1)
            if cosines.size and cosines.max() > threshold:
                redundant[row] = taken[int(cosines.argmax())]
            elif cost[row] > left:
                skipped.append(row)
            else:
                taken.append(row)
                left -= int(cost[row])
        kept = np.concatenate([kept, features[taken[first:]]])
    whole = np.array(taken, dtype=np.int64), np.array(skipped, dtype=np.int64)
    return Walked(whole[0], redundant, whole[1], np.asarray(order[at:], dtype=np.int64), min(settled, at))
