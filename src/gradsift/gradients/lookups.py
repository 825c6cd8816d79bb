"""Lookups of a batch without a loop over examples: squared norms, dots, and the cross term of tied tables (ours).

A table's squared norm is a Gram matrix of its token gradients with pairs of unequal ids struck out; dots are linear in
the tokens. Neither needs the ids sorted or counted, so the device is not waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsift.gradients.blocks import Block, Outer, Scatter
from gradsift.gradients.wide import HALF, padded, places, real_tokens

PAIRS = 1 << 26  # token pairs, or entries of direction rows, held at a time


def masked_tokens(scatters: Sequence[Scatter]) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T cols"]]:
    """Ids and gradients of every lookup, one use behind the other; padding has zero gradient and an id of its own."""
    real = [real_tokens(s.lengths, s.ids.shape[1], s.ids.device) for s in scatters]
    ids = torch.cat([s.ids.masked_fill(~r, -1) for s, r in zip(scatters, real, strict=True)], 1)
    g = torch.cat([s.g.masked_fill(~r[..., None], 0) for s, r in zip(scatters, real, strict=True)], 1)
    return ids, g.float() if g.dtype in HALF else g


def scatter_squares(scatters: Sequence[Scatter], *, pairs: int = PAIRS) -> Float[Tensor, " B"]:
    """Squared norm of each example's table gradient: sum over pairs of tokens with one id of their gradients' dot.

    Args:
        scatters: lookups in one table.
        pairs: token pairs held at a time.

    Returns:
        float64 [B]. Pairs are summed in the dtype of the gradients, strips of pairs in float64.
    """
    ids, g = masked_tokens(scatters)
    num, width = ids.shape
    out = torch.zeros(num, dtype=torch.float64, device=ids.device)
    step = max(1, pairs // max(1, num * width))
    for low in range(0, width, step):
        some = slice(low, low + step)
        dots = torch.bmm(g[:, some], g.transpose(1, 2))
        out += dots.masked_fill(ids[:, some, None] != ids[:, None], 0).sum((1, 2), dtype=torch.float64)
    return out


def scatter_dots(block: Block, scatters: Sequence[Scatter], *, pairs: int = PAIRS) -> Float[Tensor, "B M"]:
    """Dots of each example's table gradient with the directions; linear, so repeated ids need no care.

    Args:
        block: the table, with directions.
        scatters: lookups in it.
        pairs: numbers of direction rows held at a time.

    Returns:
        float64 [B, M].
    """
    assert block.directions is not None
    ids, g = masked_tokens(scatters)
    ids = ids.clamp_min(0)
    table = block.directions.view(-1, block.rows, block.cols)
    out = torch.zeros(ids.shape[0], table.shape[0], dtype=torch.float64, device=ids.device)
    step = max(1, pairs // max(1, ids.shape[0] * block.cols))
    for low in range(0, ids.shape[1], step):
        some = slice(low, low + step)
        for m in range(table.shape[0]):
            out[:, m] += (table[m][ids[:, some]] * g[:, some]).sum((1, 2), dtype=torch.float64)
    return out


def cross_terms(outer: Outer, scatters: Sequence[Scatter]) -> Float[Tensor, " B"]:
    """Inner product of a tied table's linear and looked-up gradients: sum_tu g_t[id_u] (x_t . s_u).

    Args:
        outer: the linear use.
        scatters: the lookups.

    Returns:
        float64 [B].
    """
    ids, s = masked_tokens(scatters)
    out = torch.zeros(ids.shape[0], dtype=torch.float64, device=ids.device)
    x = padded(outer.x, outer.lengths, outer.starts)
    num, width = x.shape[:2]
    if not width:
        return out
    if outer.starts is None:
        place = torch.arange(num * width, device=x.device).view(num, width)
        real = real_tokens(outer.lengths, width, x.device)
    else:
        place, real = places(outer.lengths, outer.starts, x.device)
    flat = outer.g.reshape(-1, outer.g.shape[-1])
    meet = torch.bmm(x.to(s.dtype), s.transpose(1, 2)).masked_fill(~real[..., None], 0)
    # One number of g for each pair of tokens; rows of padding read some number that meets a zero.
    picked = flat[place[..., None], ids.clamp_min(0)[:, None, :]].to(s.dtype).masked_fill(~real[..., None], 0)
    return out + (picked * meet).sum((1, 2), dtype=torch.float64)
