"""An adapted layer as one step of the graph: what peft computes, with fewer passes over its large arrays (ours).

Peft adds ``scaling * lora_B(lora_A(x))`` to a layer's output by a product, a scaling and a sum, each over all tokens and
outputs, and autograd goes the same way back. Here the two products add to what is already there, the scaling is applied to
the r numbers of a token between them, and the backward hands the factors of both gradients straight to the engine: A's are
the layer's input and ``scaling * g B``, B's are ``scaling * A x`` and g. Nothing is merged or copied, so weights stay as
they are and the result differs from peft's by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.gradients.products import linear

FULL = (torch.float32, torch.float64)  # half precision keeps peft's own roundings
Arrived = Callable[[nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True)
class Adapted:
    """The parts of one adapted layer, all of one dtype.

    Args:
        base: the layer itself, frozen; asked for its weight at every call, since that may be whole only while it runs.
        rows: length of its output.
        a: the module of A [r, cols].
        b: the module of B [rows, r].
        scaling: factor of the product.
    """

    base: nn.Module
    rows: int
    a: nn.Linear
    b: nn.Linear
    scaling: float

    @property
    def weight(self) -> Float[Tensor, "rows cols"]:
        """The layer's weight as torch's linear layers have it."""
        weight: Any = self.base.weight
        return weight.detach() if type(self.base) is nn.Linear else weight.detach().t()

    @property
    def bias(self) -> Float[Tensor, " rows"] | None:
        """The layer's bias, if it has one."""
        bias: Any = self.base.bias
        return None if bias is None else bias.detach()


class _Step(torch.autograd.Function):
    """Output of an adapted layer; in the backward both factors of A's and B's gradients arrive at the engine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _spark: Tensor, layer: Adapted, arrived: Arrived) -> Tensor:
        out, between = _apply(x, layer)
        ctx.save_for_backward(x, between)
        ctx.layer, ctx.arrived = layer, arrived
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        layer: Adapted = ctx.layer
        x, between = ctx.saved_tensors
        g = grads[0].reshape(-1, layer.rows)
        steep = linear(g, layer.b.weight.t()).mul_(layer.scaling)
        lead = x.shape[:-1]
        ctx.arrived(layer.b, between.view(*lead, -1), g.view(*lead, -1))
        ctx.arrived(layer.a, x, steep.view(*lead, -1))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        down = linear(g, layer.weight.t()).addmm_(steep, layer.a.weight)
        return down.view_as(x), None, None, None


def _apply(x: Float[Tensor, "*lead cols"], layer: Adapted) -> tuple[Float[Tensor, "*lead rows"], Float[Tensor, "n r"]]:
    flat = x.reshape(-1, x.shape[-1])
    out = linear(flat, layer.weight, layer.bias)
    between = linear(flat, layer.a.weight).mul_(layer.scaling)
    return out.addmm_(between, layer.b.weight.t()).view(*x.shape[:-1], -1), between


def read(module: nn.Module) -> Adapted | None:
    """Read an adapted layer that is what this module computes, or None for any other module.

    Args:
        module: any module.

    Returns:
        Its parts, where it is peft's plain LoRA of one adapter without dropout, without biases of its own and without
        foreign hooks, on a frozen linear layer (torch's or GPT-2's) of the same single or double precision.
    """
    if type(module).__module__ != "peft.tuners.lora.layer" or type(module).__name__ != "Linear":
        return None
    layer: Any = module
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if "forward" in vars(module) or layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name, base = active[0], layer.base_layer
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain = type(base) is nn.Linear or type(base).__name__ == "Conv1D"
    if not plain or type(a) is not nn.Linear or type(b) is not nn.Linear or layer.lora_variant.get(name) is not None:
        return None
    if (isinstance(dropout, nn.Dropout) and dropout.training) or not isinstance(dropout, nn.Dropout | nn.Identity):
        return None
    if any(one._forward_hooks or one._forward_pre_hooks for one in (base, a, b, dropout)):
        return None
    weights = [base.weight, a.weight, b.weight]
    if a.bias is not None or b.bias is not None or len({w.dtype for w in weights}) > 1 or base.weight.dtype not in FULL:
        return None
    return Adapted(base, b.out_features, a, b, float(layer.scaling[name]))


def of_parameters(model: nn.Module) -> set[nn.Module]:
    """Find the A and B that peft adds to a weight itself, those of fused experts: no token passes through them.

    Args:
        model: any model.

    Returns:
        Their modules, whose gradients cannot be measured here.
    """
    wrappers: list[Any] = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    return {one for wrapper in wrappers for half in (wrapper.lora_A, wrapper.lora_B) for one in half.modules()}


@contextmanager
def stepping(module: nn.Module, layer: Adapted, tracks: Callable[[Tensor], bool], arrived: Arrived) -> Iterator[None]:
    """Let an adapted layer run as one step until the context ends.

    Args:
        module: the adapted layer.
        layer: its parts, from :func:`read`.
        tracks: called with every input; tells whether the gradient is wanted, and notes that one will arrive.
        arrived: called in the backward with the module of A or B, its input and the gradient of its output.

    Yields:
        None: nothing.
    """
    plain = module.forward
    spark = torch.zeros((), requires_grad=True)  # the lowest layer's input needs no gradient, and its output must

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        off: Any = module
        if args or kwargs or x.dtype != layer.a.weight.dtype or off.disable_adapters or off.merged:
            return plain(x, *args, **kwargs)
        if tracks(x):
            return _Step.apply(x, spark, layer, arrived)  # type: ignore[return-value]
        if x.requires_grad and torch.is_grad_enabled():
            return plain(x)
        return _apply(x, layer)[0]

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
