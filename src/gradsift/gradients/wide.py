"""Products of half-precision factors in float32, and examples' tokens as right-padded rows (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.gradients.spans import lengths_on

HALF = (torch.bfloat16, torch.float16)


def padded(
    values: Float[Tensor, "*tokens n"], lengths: Sequence[int], starts: Sequence[int] | None
) -> Float[Tensor, "B T n"]:
    """Give right-padded rows with zeros behind each example's tokens.

    Args:
        values: [B, T, n], or [S, n] when ``starts`` is given.
        lengths: B numbers of tokens.
        starts: first token of each example in the flat layout, or None.

    Returns:
        [B, T, n]; the values themselves when nothing is to be done.
    """
    if starts is None:
        if min(lengths, default=0) == values.shape[1]:
            return values
        return values.masked_fill(~real_tokens(tuple(lengths), values.shape[1], values.device)[..., None], 0)
    if not len(values):
        return values.new_zeros(len(lengths), 0, values.shape[-1])
    place, real = places(tuple(lengths), tuple(starts), values.device)
    return values[place].masked_fill(~real[..., None], 0)


def real_tokens(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Bool [B, T]: which tokens are real."""
    return torch.arange(width, device=device) < lengths_on(lengths, device)[:, None]


def places(lengths: tuple[int, ...], starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions int64 [B, T] of right-padded rows, and which are real; padding points at some token."""
    width = max(lengths, default=0)
    real = real_tokens(lengths, width, device)
    first = lengths_on(starts, device).long()[:, None]
    return torch.where(real, first + torch.arange(width, device=device), 0), real


@cache
def _has_wide_products(device: torch.device) -> bool:
    """Tell whether torch multiplies half precision into float32 on this device."""
    one = torch.ones(1, 16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.bmm(one, one, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
        torch.mm(one[0], one[0], out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def bmm_wide(a: Float[Tensor, "B n k"], b: Float[Tensor, "B k m"]) -> Float[Tensor, "B n m"]:
    """Multiply in the operands' precision with sums, and the result, in float32 or better.

    Args:
        a: [B, n, k].
        b: [B, k, m] of the same dtype.

    Returns:
        [B, n, m], float32 for half precision.
    """
    if a.dtype not in HALF:
        return torch.bmm(a, b)
    if _has_wide_products(a.device):
        return torch.bmm(a, b, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return torch.bmm(a.float(), b.float())


def mm_wide(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """Multiply as :func:`bmm_wide` does.

    Args:
        a: [n, k].
        b: [k, m] of the same dtype.

    Returns:
        [n, m], float32 for half precision.
    """
    if a.dtype not in HALF:
        return torch.mm(a, b)
    if _has_wide_products(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return torch.mm(a.float(), b.float())
