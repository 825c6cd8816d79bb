"""Norms at the two ends of a model, by closed forms, where the tables themselves are not measured (grads.md 2.1)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.gradients.layers import LayerRule, Seen, rule_for
from gradsift.gradients.products import linear


def head_squares(seen: Seen) -> Float[Tensor, " B"]:
    """Squared norm of the LM head's gradient by two Gram matrices: sum_tu (d_t . d_u)(h_t . h_u) (grads.md 2.1)."""
    assert seen.starts is not None
    out = torch.zeros(len(seen.lengths), dtype=torch.float64, device=seen.g.device)
    for b, (start, n) in enumerate(zip(seen.starts, seen.lengths, strict=True)):
        x, g = seen.x[start : start + n], seen.g[start : start + n]
        out[b] = (linear(g, g).double() * linear(x, x).double()).sum()
    return out


def embedding_squares(rule: LayerRule | None, module: nn.Module, seen: Seen) -> Float[Tensor, " B"]:
    """Squared norm of the input embedding's gradient, repeated tokens summed first; NaN where no rule knows the lookup."""
    rule = rule or rule_for(module)
    if rule is None:
        return torch.full((len(seen.lengths),), float("nan"), dtype=torch.float64, device=seen.g.device)
    scatter = dict(rule.parts(module, seen))["weight"]
    size = (len(seen.lengths), int(scatter.g.shape[-1]))  # type: ignore[union-attr]
    out = []
    for b, n in enumerate(seen.lengths):
        ids, inverse = torch.unique(seen.x[b, :n], return_inverse=True)
        summed = seen.g.new_zeros(ids.shape[0], size[1]).index_add_(0, inverse, scatter.g[b, :n])  # type: ignore[union-attr]
        out.append(summed.double().square().sum())
    return torch.stack(out)
