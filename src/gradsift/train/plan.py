"""Which rows each optimizer step trains on: fixed before training, so every arm and every trainer sees the same order.

Epochs are shuffled by a stream of their own (the data-order seed), keyed by (seed, epoch, id, occurrence): two arms that share rows
meet them in the same relative order. ``order="selection"`` keeps the order the method chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradsift.seeds import Stream


@dataclass(frozen=True)
class TrainPlan:
    """Row ids of every optimizer step.

    Args:
        steps: one tuple of ids per step; ids may repeat over steps.
    """

    steps: tuple[tuple[str, ...], ...]

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return len(self.steps)


def plan_steps(
    ids: Sequence[str],
    *,
    batch_size: int,
    num_steps: int | None = None,
    num_epochs: float | None = None,
    stream: Stream,
    shuffle: bool = True,
) -> TrainPlan:
    """Deal rows into steps, epoch after epoch; a step may span two epochs, so every step is full.

    Args:
        ids: rows to train on, in the selection's order; an id may occur several times.
        batch_size: rows per optimizer step.
        num_steps: steps; or
        num_epochs: passes over the rows (steps are rounded up). Exactly one of the two.
        stream: data order.
        shuffle: False keeps the given order in every epoch.

    Returns:
        The plan.

    Raises:
        ValueError: no rows, or not exactly one of ``num_steps`` and ``num_epochs``.
    """
    if not ids or (num_steps is None) == (num_epochs is None):
        raise ValueError("plan_steps takes rows and exactly one of num_steps and num_epochs")
    count = num_steps if num_steps is not None else int(np.ceil(len(ids) * (num_epochs or 0.0) / batch_size))
    needed, flat, epoch = count * batch_size, [], 0
    occurrence: dict[str, int] = {}
    keyed = []
    for i in ids:
        occurrence[i] = occurrence.get(i, -1) + 1
        keyed.append(f"{i}\x1e{occurrence[i]}")
    while len(flat) < needed:
        if shuffle:
            draws = stream.child(str(epoch)).uniform(keyed)
            flat += [ids[k] for k in np.lexsort((np.array(keyed), draws))]
        else:
            flat += list(ids)
        epoch += 1
    return TrainPlan(tuple(tuple(flat[s * batch_size : (s + 1) * batch_size]) for s in range(count)))
