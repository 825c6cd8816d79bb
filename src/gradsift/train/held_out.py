"""Held-out rows on which each decision of a policy is judged, and how their losses are measured (ours)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gradsift.errors import DataError
from gradsift.policy.episodes import Losses
from gradsift.store.spec import content_hash
from gradsift.train.masking import measure_nats
from gradsift.train.parts import Cost
from gradsift.types import TokenRow


@dataclass(frozen=True)
class DevSets:
    """Held-out rows on which a decision is judged; none of them may be an anchor, a pool row or a test row.

    Args:
        target: rows of what is to be learned.
        protect: protected source -> its rows; the order of the sources is that of ``Losses.protect``.
        pad_id: padding token.
        tokens_per_batch: longest row times rows of a forward pass.
    """

    target: tuple[TokenRow, ...]
    protect: Mapping[str, tuple[TokenRow, ...]]
    pad_id: int
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        for name, rows in {"target": self.target, **self.protect}.items():
            idle = [row.id for row in rows if row.num_trained == 0]
            if not rows or idle:
                raise DataError(
                    "a held-out set cannot be measured", where=name, got=f"rows without a trained token: {idle[:3]}" if idle
                    else "no rows", expected="rows with at least one trained token", do="give other held-out rows",
                )  # fmt: skip

    def hashes(self) -> dict[str, Any]:
        """Hash what the losses depend on.

        Returns:
            JSON values: the content of the rows of each set, and the size of a batch.
        """
        sets = {"target": self.target, **{f"protect/{name}": rows for name, rows in self.protect.items()}}
        return {
            "rows": {name: [content_hash(r.input_ids, r.trained) for r in rows] for name, rows in sets.items()},
            "order": list(self.protect),
            "tokens_per_batch": self.tokens_per_batch,
        }


@dataclass(frozen=True)
class DevLosses:
    """A measurement of the held-out sets.

    Args:
        target: mean over rows of their mean nats per trained token.
        protect: the same of each protected source.
        cost: of the measurement.
    """

    target: float
    protect: tuple[float, ...]
    cost: Cost

    def losses(self, num: int = 1) -> Losses:
        """Repeat it for episodes that stand at the same weights.

        Args:
            num: E.

        Returns:
            float64 [E] and [E, M].
        """
        return Losses(np.full(num, self.target), np.tile(np.array(self.protect, dtype=np.float64), (num, 1)))


def measure_dev(model: nn.Module, dev: DevSets) -> DevLosses:
    """Measure the held-out losses of a model, dropout off; nothing of it changes.

    Args:
        model: in training or not.
        dev: the rows.

    Returns:
        The losses.
    """
    started, spent, means = time.perf_counter(), Cost(), []
    for rows in (dev.target, *dev.protect.values()):
        nats = measure_nats(model, rows, dev.pad_id, dev.tokens_per_batch)
        # masked tokens stand as 0, and the sum is taken in float64
        means.append(float(np.mean([nats.nats[row.id].sum(dtype=np.float64) / row.num_trained for row in rows])))
        spent += nats.cost
    return DevLosses(means[0], tuple(means[1:]), spent + Cost(seconds=time.perf_counter() - started))
