"""The oracle: one ordinary backward per example. Slow, obvious, and what every fast path is tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class ExampleGradient:
    """One example's loss and gradient.

    Args:
        loss: mean nats per trained token.
        by_name: gradient of each chosen parameter, in the parameter's own shape.
    """

    loss: float
    by_name: Mapping[str, Tensor]


def example_gradient(
    model: nn.Module, names: Sequence[str], input_ids: Int[Tensor, " T"], labels: Int[Tensor, " T"]
) -> ExampleGradient:
    """Differentiate one example's loss through the model's ordinary forward, without padding or hooks.

    The loss is the mean cross-entropy over the positions whose next label is not -100.

    Args:
        model: a causal language model in eval mode.
        names: parameters to differentiate.
        input_ids: [T] tokens.
        labels: [T] labels with -100 where no loss is taken.

    Returns:
        Loss and gradients; parameters that the loss does not reach have zeros.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    before = {name: p.requires_grad for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.requires_grad_(name in chosen)
        logits = model(input_ids=input_ids[None], use_cache=False).logits[0]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = torch.nn.functional.cross_entropy(wide[:-1], labels[1:], ignore_index=-100)
        grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])
    pairs = zip(chosen.items(), grads, strict=True)
    return ExampleGradient(
        float(loss.detach()), {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}
    )


def finite_difference(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    input_ids: Int[Tensor, " T"],
    labels: Int[Tensor, " T"],
    *,
    step: float = 1e-6,
) -> Float[Tensor, ""]:
    """Central difference of the loss along a direction in parameter space.

    Args:
        model: a float64 model in eval mode.
        direction: one tensor per parameter name.
        input_ids: [T] tokens.
        labels: [T] labels.
        step: h of (L(w + h d) - L(w - h d)) / 2h.

    Returns:
        The slope, a scalar tensor.
    """
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def loss_at(h: float) -> Tensor:
        for name, d in direction.items():
            parameters[name].add_(d, alpha=h)
        logits = model(input_ids=input_ids[None], use_cache=False).logits[0]
        value = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
        for name, d in direction.items():
            parameters[name].sub_(d, alpha=h)
        return value

    return (loss_at(step) - loss_at(-step)) / (2 * step)
