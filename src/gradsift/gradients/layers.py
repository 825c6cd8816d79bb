"""One registered rule per layer kind: how a module's input and output gradient become parameter gradients.

A rule gets the module, the input it saw [B, T, .] and the gradient of its output [B, T, .] and names, for each of the
module's own parameters, what flowed into it. Adding a layer kind is adding one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsift.gradients.blocks import Contribution, Dense, Outer, Scatter
from gradsift.gradients.experts import is_experts


@dataclass(frozen=True)
class Seen:
    """What one call of a module left behind.

    Args:
        x: its input [B, T, cols], or token ids [B, T] for an embedding.
        g: gradient of its output, [B, T, rows].
        lengths: tokens per example.
        starts: first token per example for flat layouts (the LM head at supervised positions only), else None.
    """

    x: Tensor
    g: Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...] | None = None

    def summed(self, values: Tensor) -> Dense:
        """Sum a [B, T, n] quantity over each example's tokens (zero on padding), and over heads: [B, T, heads, n]."""
        if values.dtype in (torch.bfloat16, torch.float16):  # on a GPU linear layers are not widened before
            values = values.float()
        if self.starts is None:
            return Dense(values.sum(tuple(range(1, values.ndim - 1))))
        pieces = [values[s : s + n].sum(0) for s, n in zip(self.starts, self.lengths, strict=True)]
        return Dense(torch.stack(pieces))


@dataclass(frozen=True)
class LayerRule:
    """How a layer kind is measured.

    Args:
        shape: parameter's local name and module -> (rows, cols) of the matrix it is seen as.
        parts: module and what it saw -> (local parameter name, contribution) pairs.
        to_matrix: a parameter-shaped tensor -> [rows, cols], for oracles and anchors.
    """

    shape: Callable[[nn.Module, str], tuple[int, int]]
    parts: Callable[[nn.Module, Seen], Iterator[tuple[str, Contribution]]]
    to_matrix: Callable[[Tensor], Tensor]


_RULES: dict[str, LayerRule] = {}


def _shape(size: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    if len(size) == 1:
        return 1, size[0]
    return (size[1], size[0]) if transposed else (size[0], size[1])


def register_layer(*names: str, transposed: bool = False) -> Callable[[Callable], Callable]:
    """Register a rule for module classes by class name (subclasses inherit it through their bases).

    Args:
        *names: class names; ``*RMSNorm`` style endings are written with a leading star.
        transposed: the module keeps its weight as [in, out].

    Returns:
        A decorator for the ``parts`` function.
    """

    def shape(module: nn.Module, local: str) -> tuple[int, int]:
        return _shape(tuple(module.get_parameter(local).shape), transposed)

    def to_matrix(value: Tensor) -> Tensor:
        if value.ndim == 1:
            return value[None]
        return value.t() if transposed else value

    def wrap(parts: Callable) -> Callable:
        for name in names:
            _RULES[name] = LayerRule(shape, parts, to_matrix)
        return parts

    return wrap


def rule_for(module: nn.Module) -> LayerRule | None:
    """Find the rule of a module, by its class, its bases, or the ending of its class name.

    A subclass that overrides ``forward`` of a plain torch layer is only accepted when its own name is registered:
    what it computes is not known.

    Args:
        module: any module.

    Returns:
        The rule, or None when the kind is not supported (its parameters then count as not covered).
    """
    cls = type(module)
    if is_experts(module):
        return _EXPERTS[bool(module.is_transposed)]
    if cls.__name__ in _RULES:
        return _RULES[cls.__name__]
    for name, rule in _RULES.items():
        if name.startswith("*") and cls.__name__.endswith(name[1:]):
            return rule
    for base in cls.__mro__[1:]:
        if base.__name__ in _RULES and base in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm):
            return _RULES[base.__name__] if cls.forward is base.forward else None
    return None


@register_layer("Linear")
def linear(module: nn.Module, seen: Seen) -> Iterator[tuple[str, Contribution]]:
    """Y = x W' + b: dW = sum_t g_t x_t', db = sum_t g_t."""
    yield "weight", Outer(seen.x, seen.g, seen.lengths, seen.starts)
    if getattr(module, "bias", None) is not None:
        yield "bias", seen.summed(seen.g)


@register_layer("Conv1D", transposed=True)
def conv1d(module: nn.Module, seen: Seen) -> Iterator[tuple[str, Contribution]]:
    """GPT-2's linear layer with its weight stored as [in, out]; measured as [out, in]."""
    yield "weight", Outer(seen.x, seen.g, seen.lengths, seen.starts)
    yield "bias", seen.summed(seen.g)


@register_layer("Embedding", "*ScaledWordEmbedding")
def embedding(module: nn.Module, seen: Seen) -> Iterator[tuple[str, Contribution]]:
    """Row lookup; families that scale inside the module (Gemma 3) scale the gradient too."""
    scale = getattr(module, "embed_scale", None)
    g = seen.g if scale is None else seen.g * torch.as_tensor(scale, dtype=seen.g.dtype, device=seen.g.device)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:  # torch gives the padding row no gradient
        g = g * (seen.x != padding)[..., None]
    yield "weight", Scatter(seen.x, g, seen.lengths)


@register_layer("LayerNorm")
def layer_norm(module: nn.Module, seen: Seen) -> Iterator[tuple[str, Contribution]]:
    """Y = w * normalized(x) + b."""
    assert isinstance(module, nn.LayerNorm)
    normalized = torch.nn.functional.layer_norm(seen.x, module.normalized_shape, eps=module.eps)
    yield "weight", seen.summed(seen.g * normalized)
    if module.bias is not None:
        yield "bias", seen.summed(seen.g)


@register_layer("RMSNorm", "*RMSNorm")
def rms_norm(module: nn.Module, seen: Seen) -> Iterator[tuple[str, Contribution]]:
    """Y = w * x / rms(x), or (1 + w) * x / rms(x) in Gemma: y is affine in w, and y(1) - y(0) is the normalized input.

    Asking the module itself keeps its epsilon and its arithmetic (transformers normalizes in float32 whatever the
    model's dtype) without knowing how each family names them.
    """
    weight = module.get_parameter("weight")
    with torch.no_grad():
        ones = torch.func.functional_call(module, {"weight": torch.ones_like(weight)}, (seen.x.to(weight.dtype),))
        zeros = torch.func.functional_call(module, {"weight": torch.zeros_like(weight)}, (seen.x.to(weight.dtype),))
    yield "weight", seen.summed(seen.g * (ones - zeros).to(seen.g.dtype))


@register_layer("*TopKRouter", "*TopkRouter")
def router(module: nn.Module, seen: Seen) -> Iterator[tuple[str, Contribution]]:
    """Logits of experts, a linear layer that the module runs itself; the engine checks that its output is theirs."""
    return linear(module, seen)


def _expert_rule(transposed: bool) -> LayerRule:
    def shape(module: nn.Module, local: str) -> tuple[int, int]:
        num, *size = module.get_parameter(local).shape
        if len(size) == 1:  # a bias
            return num, size[0]
        rows, cols = _shape(tuple(size), transposed)
        return num * rows, cols

    def to_matrix(value: Tensor) -> Tensor:
        if value.ndim == 2:
            return value
        return (value.transpose(1, 2) if transposed else value).flatten(0, 1)

    def parts(_module: nn.Module, _seen: Seen) -> Iterator[tuple[str, Contribution]]:
        raise AssertionError("what experts see arrives through gradsift.gradients.experts.tapped")

    return LayerRule(shape, parts, to_matrix)


_EXPERTS = {transposed: _expert_rule(transposed) for transposed in (False, True)}
