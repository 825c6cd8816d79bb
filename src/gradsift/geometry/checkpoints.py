"""What a method asks of a navigator that is trained before it measures, and what each kept checkpoint leaves (less.md 2; ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from gradsift.errors import ConfigError

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Kept = Literal["none", "raw", "adam", "adam_diag"]


@dataclass(frozen=True)
class Warmup:
    """A training of the navigator on the pool, before the pass.

    Args:
        share: share of the pool's rows that it trains on, in (0, 1]; drawn by id.
        epochs: passes over them; 0 for none, which measures at the starting weights.
        num_checkpoints: checkpoints that are measured, spread evenly over the epochs; the last one is the end.
        direction: what is kept of every row at every one of them: ``none`` (the ordinary signals at the last only), or the
            row's unit direction, ``raw``, ``adam`` or ``adam_diag`` (:mod:`gradsift.gradients.adam`), and with it the plain
            gradient of every target row.

    Raises:
        ConfigError: a share or count is out of range, there are more checkpoints than epochs, or an Adam direction is asked
            of a navigator that is not trained.
    """

    share: float = 1.0
    epochs: int = 1
    num_checkpoints: int = 1
    direction: Kept = "none"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError("a share is out of range", where="warmup share", got=self.share, expected="in (0, 1]")
        if self.epochs < 0 or self.num_checkpoints < 1 or self.num_checkpoints > max(1, self.epochs):
            raise ConfigError(
                "there is a checkpoint after an epoch only", where="num_checkpoints", got=self.num_checkpoints,
                expected=f"from 1 to the number of epochs, {self.epochs}", do="raise the epochs, or lower it",
            )  # fmt: skip
        if self.adam and self.epochs == 0:
            raise ConfigError(
                "a navigator that is not trained has no Adam state", where="direction", got=self.direction,
                expected="raw, or at least one epoch", do="--set direction=raw (weaker: SGD directions hurt clearly)",
            )  # fmt: skip

    @property
    def adam(self) -> bool:
        """Whether Adam's moments are needed."""
        return self.direction in ("adam", "adam_diag")

    @property
    def kept_epochs(self) -> tuple[int, ...]:
        """After which epochs a checkpoint is measured, rising; (0,) without training."""
        return tuple(round(k * self.epochs / self.num_checkpoints) for k in range(1, self.num_checkpoints + 1))


@dataclass(frozen=True)
class CheckpointSignals:
    """The rows' directions at one checkpoint.

    Args:
        features: float32 [N, D] unit sketches of the pool rows' directions, rows as in the problem.
        target: float32 [n_t, D] unit sketches of the target rows' plain gradients, in id order.
        lr: mean learning rate of the epoch that ends here, >= 0; what the checkpoint counts.
        noise: absolute bound on a cosine of two such sketches.
    """

    features: Float[np.ndarray, "N D"]
    target: Float[np.ndarray, "n_t D"]
    lr: float
    noise: float = 0.0


def unit_rows(rows: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Bring rows to length 1; a row of zeros stays one.

    Args:
        rows: [n, D].

    Returns:
        float32 [n, D].
    """
    wide = np.asarray(rows, dtype=np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, length, out=np.zeros_like(wide), where=length > 0).astype(np.float32)


def checkpoint_weights(lrs: Sequence[float]) -> Float[np.ndarray, " C"]:
    """Weigh checkpoints by their learning rates: w_c = eta_c / sum eta (less.md 2).

    Args:
        lrs: C mean learning rates, >= 0.

    Returns:
        float64 [C] summing to 1; equal weights where every rate is 0 (no training).
    """
    rates = np.asarray(lrs, dtype=np.float64)
    total = rates.sum()
    return rates / total if total > 0 else np.full(len(rates), 1 / len(rates))
