"""What the engine hands out: signals of a micro-batch, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """Signals of one micro-batch, on the CPU.

    Args:
        loss: float64 [B] mean nats per trained token.
        square: float64 [B] squared gradient norm over the chosen parameters.
        dots: float64 [B, M] exact dots with the unit directions.
        sketch: [B, D] or None.
        emb_norm: float64 [B] norm of the input embedding's gradient (lookup part only when tied).
        head_norm: float64 [B] norm of the LM head's gradient (head part only when tied).
        embedding: [B, d] position-weighted mean of the last hidden states, or None.
        prompt_loss: float64 [B] mean nats per prompt token, 0 without one; None where no prompt was asked for.
        parts: float64 [B, P, M + 1] dots and squared norm of each part of the parameters, or None where they were not kept
            apart; over the parts they add up to ``dots`` and ``square``.
    """

    loss: Float[Tensor, " B"]
    square: Float[Tensor, " B"]
    dots: Float[Tensor, "B M"]
    sketch: Float[Tensor, "B D"] | None
    emb_norm: Float[Tensor, " B"]
    head_norm: Float[Tensor, " B"]
    embedding: Float[Tensor, "B d"] | None = None
    prompt_loss: Float[Tensor, " B"] | None = None
    parts: Float[Tensor, "B P k"] | None = None


@dataclass(frozen=True)
class Forwarded:
    """What a forward alone gives, on the CPU.

    Args:
        loss: float64 [B] mean nats per trained token.
        embedding: [B, d] position-weighted mean of the last hidden states, or None.
        prompt_loss: float64 [B] mean nats per prompt token, 0 without one; None where no prompt was asked for.
    """

    loss: Float[Tensor, " B"]
    embedding: Float[Tensor, "B d"] | None
    prompt_loss: Float[Tensor, " B"] | None = None
