"""The upper part of a model: which decoder layers are hooked, and which of the chosen parameters count there (ours).

With the state that enters decoder layer ``first`` held constant, the loss has a gradient in whatever is used from there on:
the parameters of these layers, the last norm and the LM head. A weight that is also used further down counts through its
upper uses alone: a head tied to the embedding is measured as if it were untied. The backward then costs the layers' share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradsift.errors import ConfigError
from gradsift.gradients.taps import find_layers
from gradsift.models.parameters import Parameters


@dataclass(frozen=True)
class Upper:
    """The parameters that are measured with the backward stopped.

    Args:
        first: decoder layer, from 0, where the backward stops.
        num_layers: layers of the model.
        parameters: the chosen parameters that are used at or above that layer, in model order.
        in_part: those among them that are also used below it, and count through their upper uses alone.
    """

    first: int
    num_layers: int
    parameters: Parameters
    in_part: tuple[str, ...]

    @property
    def text(self) -> str:
        """What the spec says: ``layers 23 to 30 of 30``, counted from 1."""
        return f"{self.first + 1} to {self.num_layers} of {self.num_layers}"


def first_layer(share: str, num_layers: int) -> int:
    """Read how many upper layers are meant: ``25%``, rounded up and at least one, or a count such as ``8``.

    Args:
        share: the text of ``collect.layers``.
        num_layers: layers of the model, at least 1.

    Returns:
        Number of the lowest layer that is hooked, in [0, num_layers).

    Raises:
        ConfigError: none or more layers than there are are asked for.
    """
    text = share.strip()
    percent = text.endswith("%")
    amount = float(text.removesuffix("%"))
    # 1e-9: 10% of 30 layers are 3, which floating point may put just above.
    count = math.ceil(amount / 100 * num_layers - 1e-9) if percent else int(amount)
    if not 1 <= count <= num_layers or amount <= 0:
        raise ConfigError(
            "the model has no such number of upper layers",
            where="--layers",
            got=share,
            expected=f"a share above 0% and at most 100%, or a count from 1 to {num_layers}",
            do="write 25% or 8, or leave it out to measure every layer",
        )
    return num_layers - count


def choose_upper(model: nn.Module, parameters: Parameters, share: str) -> Upper:
    """Keep the parameters that are used at or above the layer where the backward stops.

    What runs before and after that layer is seen by one forward of two tokens: final norms, heads and projections stand
    in other places in every architecture.

    Args:
        model: a causal language model in eval mode, with its adapter where it has one.
        parameters: the parameters that were chosen.
        share: the text of ``collect.layers``.

    Returns:
        What is measured.

    Raises:
        ConfigError: the share is out of range, or no chosen parameter is used there.
    """
    layers = find_layers(model)
    first = first_layer(share, len(layers))
    before, after = _trace(model, layers[first])
    above = after | {module for layer in layers[first:] for module in layer.modules()}
    below = before | {module for layer in layers[:first] for module in layer.modules()}
    chosen = set(parameters.names)
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in chosen}
    used, elsewhere = ({names[id(p)] for module in some for p in module.parameters(recurse=False) if id(p) in names}
                       for some in (above, below))  # fmt: skip
    kept = [(name, size) for name, size in zip(parameters.names, parameters.sizes, strict=True) if name in used]
    if not kept:
        raise ConfigError(
            "no chosen parameter is used in these layers",
            where="--layers and navigator.parameters",
            got=f"{share}, layers from {first + 1} of {len(layers)}",
            do="ask for more layers, or choose other parameters",
        )
    reduced = Parameters(tuple(name for name, _ in kept), tuple(size for _, size in kept), parameters.kind)
    return Upper(first, len(layers), reduced, tuple(name for name, _ in kept if name in elsewhere))


@torch.no_grad()
def _trace(model: nn.Module, first: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """Modules with parameters of their own that are called before, and from, the layer where the backward stops."""
    before: set[nn.Module] = set()
    after: set[nn.Module] = set()
    seen = before

    def begin(*_: Any) -> None:
        nonlocal seen
        seen = after

    handles = [
        module.register_forward_hook(lambda module, *_: seen.add(module))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    handles.append(first.register_forward_pre_hook(begin))
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return before, after
