"""Mixture-of-experts layers: fused expert weights [E, out, in] and their routers, told apart by token (ours).

transformers keeps a layer's experts in 3-D parameters that no submodule owns, so no hook sees what each expert read. While an
engine is entered, an expert module runs :func:`routed_forward` instead of its own forward: the same sums, token by expert,
with a call-back at each product. A parameter [E, out, in] is measured as the matrix [E * out, in]; token t of expert e
adds g_t x_t' to rows e * out and on. Which expert a token takes is not differentiated, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from gradsift.errors import ModelError
from gradsift.gradients.blocks import Block, Outer, Routed, Squares, Totals
from gradsift.gradients.prefold import add_rows_
from gradsift.gradients.wide import bmm_wide, padded

ENTRIES = 1 << 19  # of gradients formed at a time; 2 MiB in float32

# Local name of the parameter, its input [S, in], its output [S, out], and for each of the S pairs token and expert.
Tap = Callable[[str, Tensor, Tensor, Int[Tensor, " S"], Int[Tensor, " S"]], None]


def is_experts(module: nn.Module) -> bool:
    """Tell whether a module keeps fused experts in the layout that transformers exchanges implementations of.

    Args:
        module: any module.

    Returns:
        True for classes under ``use_experts_implementation``, which name their layout.
    """
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts", "down_proj"))


def routed_forward(
    module: Any,
    tap: Tap,
    hidden_states: Float[Tensor, "N d"],
    top_k_index: Int[Tensor, "N K"],
    top_k_weights: Float[Tensor, "N K"],
) -> Float[Tensor, "N d"]:
    """Run all experts, pairs of a token and its expert sorted by expert, then by token.

    Args:
        module: the experts.
        tap: called behind each product.
        hidden_states: input of N tokens.
        top_k_index: experts of each token.
        top_k_weights: weight of each.

    Returns:
        [N, d] what the module's own forward returns, up to rounding.
    """
    num_tokens, top_k = top_k_index.shape
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    token, expert = order // top_k, top_k_index.reshape(-1)[order]
    counts = torch.bincount(expert, minlength=module.num_experts).tolist()
    name = "gate_up_proj" if module.has_gate else "up_proj"
    x = hidden_states[token]
    inner = _products(module, name, x, counts)
    tap(name, x, inner, token, expert)
    x = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    out = _products(module, "down_proj", x, counts)
    tap("down_proj", x, out, token, expert)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(num_tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _products(module: Any, name: str, x: Float[Tensor, "S i"], counts: Sequence[int]) -> Float[Tensor, "S o"]:
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
    out = []
    for e, part in enumerate(torch.split(x, list(counts))):
        if len(part):
            matrix = weight[e].t() if module.is_transposed else weight[e]
            out.append(functional.linear(part.to(weight.dtype), matrix, None if bias is None else bias[e]))
    return torch.cat(out)


@contextmanager
def tapped(module: nn.Module, tap: Tap) -> Iterator[None]:
    """Let a module run :func:`routed_forward` for a while.

    Args:
        module: the experts.
        tap: called behind each product.
    """
    module.forward = partial(routed_forward, module, tap)
    try:
        yield
    finally:
        del module.forward


def check_router(module: Any, x: Tensor, logits: Tensor) -> None:
    """Hold a router to its rule: what it returns first are the logits of its experts.

    Args:
        module: the router, with ``weight`` [E, d] and perhaps ``bias``.
        x: its input.
        logits: what it returned first.

    Raises:
        ModelError: it is something else, so its gradient is not that of the weight's product.
    """
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    with torch.no_grad():
        want = functional.linear(x.reshape(-1, x.shape[-1]).to(weight.dtype), weight, bias)
    got = logits.detach().to(want.dtype)
    # A row that is not finite says nothing of the router; it is set aside by its loss.
    if got.shape != want.shape or not torch.allclose(got, want, atol=1e-2, rtol=1e-2, equal_nan=True):
        raise ModelError(
            "a router does not return the logits of its experts first, so its gradient cannot be measured",
            where=type(module).__name__,
            do="leave its weight out of navigator.parameters",
        )


def bias_sums(
    g: Float[Tensor, "S o"], expert: Int[Tensor, " S"], example: Int[Tensor, " S"], num_experts: int, num_examples: int
) -> Float[Tensor, "B n"]:
    """Sum output gradients by example and expert: the gradients of a bias [E, o].

    Args:
        g: output gradient of each pair.
        expert: its expert.
        example: its example.
        num_experts: E.
        num_examples: B.

    Returns:
        [B, E * o].
    """
    sums = g.new_zeros(num_examples * num_experts, g.shape[1]).index_add_(0, example * num_experts + expert, g)
    return sums.view(num_examples, -1)


def measure_routed(block: Block, parts: Sequence[Routed], totals: Totals) -> Squares:
    """Add every example's dots, squared norm and sketch of one fused parameter to the totals, expert by expert.

    Args:
        block: the parameter as [E * out, in].
        parts: what flowed into it; several uses of one module add up.
        totals: running totals, changed in place.

    Returns:
        Squared norms of the linear part; nothing is looked up.
    """
    if block.bend is not None:
        from gradsift.gradients.adam import measure_bent  # it builds on blocks

        return measure_bent(block, [_spread(block, part, totals) for part in parts], [], totals)
    before = totals.square.clone()
    size = totals.square.shape[0]
    expert, example = (torch.cat([getattr(part, name) for part in parts]) for name in ("expert", "example"))
    order = torch.argsort(expert * size + example, stable=True)
    x, g = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("x", "g"))
    rows = g.shape[1]
    counts = torch.bincount(expert[order], minlength=block.rows // rows).tolist()
    first = 0
    for e, count in enumerate(counts):
        if count:
            some = slice(first, first + count)
            if block.mean is not None:
                block.mean[e * rows : (e + 1) * rows].addmm_(g[some].t(), x[some])
            _measure_expert(block, e * rows, x[some], g[some], example[order][some], totals)
        first += count
    return Squares(totals.square - before, torch.zeros_like(before))


def _measure_expert(block: Block, base: int, x: Tensor, g: Tensor, example: Tensor, totals: Totals) -> None:
    """Form one expert's gradients of the examples that met it, some rows at a time."""
    those, counts = torch.unique_consecutive(example, return_counts=True)
    lengths, starts = counts.tolist(), (counts.cumsum(0) - counts).tolist()
    x, g = padded(x, lengths, starts), padded(g, lengths, starts)
    rows, cols = g.shape[-1], block.cols
    height = max(1, min(rows, ENTRIES // (len(lengths) * cols)))
    for low in range(0, rows, height):
        tile = bmm_wide(g[..., low : low + height].transpose(1, 2).contiguous(), x).flatten(1)
        if totals.norms:
            totals.square[those] += torch.linalg.vector_norm(tile, dim=1).double().square()
            if block.directions is not None:
                at = (base + low) * cols
                some = block.directions[:, at : at + tile.shape[1]].to(tile.dtype)
                totals.dots[those] += torch.mm(tile, some.t()).double()
        if totals.sketch is not None:
            sketch = totals.sketch[those]
            add_rows_(sketch, tile, base + low, block.cells)
            totals.sketch[those] = sketch


def _spread(block: Block, part: Routed, totals: Totals) -> Outer:
    """The same outer products with output gradients over the rows of all experts, for what needs whole gradients."""
    order = torch.argsort(part.example, stable=True)
    x, g, expert = part.x[order], part.g[order], part.expert[order]
    wide = g.new_zeros(len(g), block.rows // g.shape[1], g.shape[1])
    wide[torch.arange(len(g), device=g.device), expert] = g
    counts = torch.bincount(part.example, minlength=totals.square.shape[0])
    return Outer(x, wide.flatten(1), tuple(counts.tolist()), tuple((counts.cumsum(0) - counts).tolist()))
