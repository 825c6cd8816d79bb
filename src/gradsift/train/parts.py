"""What one optimizer step is made of, shared by the plain loop and the trainer (ours).

A step is: weighted token-mean loss of each micro-batch, plus the penalties; backward; the step hook, which may rewrite the
accumulated gradients; clipping; the optimizer. Penalties and hooks count what they cost themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsift.data.batches import IGNORED, collate
from gradsift.types import TokenRow


@dataclass(frozen=True)
class Cost:
    """What a part of a run used, so that arms are compared at equal total cost.

    Args:
        flops: floating-point operations of model passes, 2 per parameter and token forward and 4 backward.
        forward_tokens: tokens sent forward.
        backward_tokens: tokens sent backward.
        seconds: wall time.
    """

    flops: float = 0.0
    forward_tokens: int = 0
    backward_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.forward_tokens + other.forward_tokens,
            self.backward_tokens + other.backward_tokens,
            self.seconds + other.seconds,
        )

    @staticmethod
    def of(num_parameters: int, *, forward: int = 0, backward: int = 0, seconds: float = 0.0) -> Cost:
        """Count the passes of one model.

        Args:
            num_parameters: of the model that did the work.
            forward: tokens sent forward.
            backward: tokens sent backward (a training step sends its tokens both ways).
            seconds: wall time.

        Returns:
            The cost.
        """
        return Cost(num_parameters * (2.0 * forward + 4.0 * backward), forward, backward, seconds)


@dataclass(frozen=True)
class TrainBatch:
    """A right-padded micro-batch of training rows on the model's device.

    Args:
        ids: B row ids.
        input_ids: int64 [B, T].
        labels: int64 [B, T], -100 where a token carries no loss.
        attention_mask: int64 [B, T], 0 on padding.
        weights: float32 [B], >= 0, what each row's tokens count.
    """

    ids: tuple[str, ...]
    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    attention_mask: Int[Tensor, "B T"]
    weights: Float[Tensor, " B"]

    @property
    def num_tokens(self) -> int:
        """Real tokens of the batch."""
        return int(self.attention_mask.sum())


def make_batch(
    rows: Sequence[TokenRow], pad_id: int, device: torch.device, weights: Sequence[float] | None = None
) -> TrainBatch:
    """Pad some rows into a batch.

    Args:
        rows: B token rows.
        pad_id: padding token.
        device: where the tensors go.
        weights: B weights; 1 by default.

    Returns:
        The batch.
    """
    tokens = collate(rows, range(len(rows)), pad_id)
    width = tokens.input_ids.shape[1]
    mask = torch.from_numpy((np.arange(width)[None, :] < tokens.lengths.numpy()[:, None]).astype(np.int64))
    given = torch.ones(len(rows)) if weights is None else torch.tensor(list(weights), dtype=torch.float32)
    return TrainBatch(
        tuple(row.id for row in rows),
        tokens.input_ids.to(device),
        tokens.labels.to(device),
        mask.to(device),
        given.to(device),
    )


def token_nats(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B S"]:
    """Cross-entropy of every predicted token, 0 where it carries no loss; labels are shifted here, once.

    Args:
        logits: of the model at every position.
        labels: unshifted, -100 where no loss is carried.

    Returns:
        float32 [B, T-1] nats, position t for the token at t+1.
    """
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape[0], -1)


def supervised_nats(model: nn.Module, batch: TrainBatch) -> Float[Tensor, "B S"]:
    """Run a model and take the cross-entropy of every trained token, with the LM head at the columns that need it only.

    Args:
        model: a causal language model.
        batch: rows with unshifted labels.

    Returns:
        float32 [B, T-1] as :func:`token_nats` of all logits, 0 where a token carries no loss.
    """
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if not keeps_logits(model):
        return token_nats(model(**given).logits, batch.labels)
    columns = (batch.labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
    logits = model(**given, logits_to_keep=columns).logits
    targets = batch.labels[:, columns + 1]
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    nats = flat.view(targets.shape)
    return nats.new_zeros(nats.shape[0], batch.labels.shape[1] - 1).index_copy(1, columns, nats)


def forward_nats(model: nn.Module, batch: TrainBatch, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Run a model for a training step.

    Args:
        model: in training.
        batch: rows with unshifted labels.
        whole: penalties want the logits of every position.

    Returns:
        float32 [B, T-1] nats, and logits [B, T, V]; [B, 0, 0] unless ``whole``.
    """
    if not whole:
        nats = supervised_nats(model, batch)
        return nats, nats.new_zeros(nats.shape[0], 0, 0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return token_nats(logits, batch.labels), logits


def keeps_logits(model: nn.Module) -> bool:
    """Tell whether a model can compute its LM head at some positions only.

    Args:
        model: a causal language model, with or without an adapter.

    Returns:
        Whether its forward takes ``logits_to_keep``.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def weighted_loss(nats: Float[Tensor, "B S"], weights: Float[Tensor, " B"], total: float | Tensor) -> Float[Tensor, ""]:
    """Weighted token mean, sum_i w_i sum_t nats_it / total; with weights 1 and one micro-batch, the trainer's own loss.

    Args:
        nats: from :func:`token_nats` or :func:`supervised_nats`.
        weights: one per row.
        total: sum over the whole optimizer step of w_i times the row's trained tokens (:func:`trained_weight`), so that
            micro-batches of one step add up to the step's mean.

    Returns:
        The micro-batch's share of the step's loss.
    """
    return (weights * nats.sum(1)).sum() / total


def trained_weight(labels: Int[Tensor, "B T"], weights: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Sum of w_i times the row's trained tokens.

    Args:
        labels: unshifted labels.
        weights: one per row.

    Returns:
        The denominator's share of this micro-batch.
    """
    return (weights * (labels[:, 1:] != IGNORED).sum(1)).sum()


class Penalty(Protocol):
    """Something added to the loss of every optimizer step, such as the KL to the base model or L2-SP."""

    name: str
    cost: Cost

    def __call__(self, model: nn.Module, batch: TrainBatch, logits: Float[Tensor, "B T V"], share: float) -> Tensor:
        """Return the scalar to add for this micro-batch, which is ``share`` (0..1] of the optimizer step."""
        ...


class StepHook(Protocol):
    """Something that rewrites the accumulated gradients before clipping, such as A-GEM."""

    name: str
    cost: Cost

    def __call__(self, model: nn.Module, step: int) -> None:
        """Edit ``.grad`` of the trainable parameters in place; ``step`` counts optimizer steps from 0."""
        ...

    def summary(self) -> Mapping[str, float]:
        """Figures for the report: projected share of steps, mean |z|/|g|, reference passes, seconds."""
        ...


def call_hook(hook: StepHook, model: nn.Module, step: int) -> float:
    """Call a step hook and tell the seconds that it counts itself, which a step must not count again.

    Args:
        hook: the hook.
        model: in training, with the step's gradients.
        step: 0-based optimizer step.

    Returns:
        Seconds by which the hook's own cost grew.
    """
    before = hook.cost.seconds
    hook(model, step)
    return hook.cost.seconds - before


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List the parameters that training moves, in the model's fixed order; tied weights once.

    Args:
        model: any model.

    Returns:
        Names and parameters with ``requires_grad``.
    """
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
