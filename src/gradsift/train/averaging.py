"""WiSE-FT: the line between the starting weights and the fine-tuned ones (Wortsman et al., arXiv 2109.01903, eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradsift.errors import ConfigError
from gradsift.train.parts import trainable
from gradsift.train.penalties import adapted_layers


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Keep the trainable weights as they are now.

    Args:
        model: before training.

    Returns:
        name -> copy, on the CPU.
    """
    return {name: p.detach().cpu().clone() for name, p in trainable(model)}


def wise_ft(model: nn.Module, alpha: float, start: Mapping[str, Tensor] | None = None) -> None:
    """Set the weights to theta0 + alpha (theta - theta0), in place.

    An adapter's part of the weight, s B A, is linear in B, so scaling B by alpha is exactly that and needs no copy of
    theta0, which is the base model.

    Args:
        model: after training.
        alpha: 0 gives the starting weights, 1 the trained ones.
        start: from :func:`copy_weights` before training; not used with an adapter.

    Raises:
        ConfigError: alpha lies outside [0, 1], or the starting weights are missing.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError("alpha must lie in [0, 1]", where="wise_ft", got=alpha)
    layers = adapted_layers(model)
    with torch.no_grad():
        for _, layer in layers:
            for name in layer.active_adapters:
                layer.lora_B[name].weight.mul_(alpha)
        if layers:
            return
        named = dict(trainable(model))
        if start is None or start.keys() != named.keys():
            raise ConfigError("the starting weights are missing", where="wise_ft", do="copy them before training")
        for name, p in named.items():
            begin = start[name].to(p.device, p.dtype)
            p.copy_(begin + alpha * (p - begin))
