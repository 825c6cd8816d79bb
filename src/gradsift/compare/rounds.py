"""Arms whose choice and training are interleaved; filled in by ogs_rounds (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gradsift.train.parts import Cost

if TYPE_CHECKING:
    from gradsift.compare.arms import ArmSpec, Desk
    from gradsift.compare.cell import Grid

ROUND_METHODS: frozenset[str] = frozenset({"ogs_rounds"})


@dataclass(frozen=True)
class RoundRun:
    """What a run in rounds left behind.

    Args:
        model: the trained model.
        ids: the rows it trained on in the end.
        cost: of choosing and training, by part.
        extra: figures per run.
        notes: what a reader must know.
    """

    model: nn.Module
    ids: tuple[str, ...]
    cost: Mapping[str, Cost]
    extra: Mapping[str, float]
    notes: tuple[str, ...] = ()


def train_in_rounds(desk: Desk, arm: ArmSpec, grid: Grid, lr: float) -> RoundRun:
    """Choose and train in rounds."""
    raise NotImplementedError
