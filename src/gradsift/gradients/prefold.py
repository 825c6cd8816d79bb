"""The sign-fold sketch of one parameter from the factors of its gradient, without forming the gradient (ours).

The map of :mod:`gradsift.gradients.project` folds rows and columns apart, so the sketch of ``sum_t g_t x_t'`` needs only
the folded factors: flip the signs of every g_t and x_t, fold them to R and C numbers, take one product [R, C] for each
example and fold it flat to D buckets. The product costs (R/rows)(C/cols) of the weight gradient's. Every function here
adds to sketches in place, is plain torch and runs on any device; on a CPU numpy's reductions take the long sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsift.errors import ConfigError
from gradsift.gradients.products import outer_, rounded, takes, worth
from gradsift.gradients.project import cell_shape, fold_

BUFFER = 1 << 18  # cells of some examples that are formed before they are folded; 1 MiB in float32


@dataclass(frozen=True)
class Cells:
    """Where one parameter's entries go.

    Args:
        row_sign: [rows] of -1 and +1.
        col_sign: [cols] of -1 and +1.
        offset: bucket of the first cell.
    """

    row_sign: Float[Tensor, " rows"]
    col_sign: Float[Tensor, " cols"]
    offset: int

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C), see :func:`gradsift.gradients.project.cell_shape`."""
        return cell_shape(self.row_sign.shape[0], self.col_sign.shape[0])

    @property
    def count(self) -> int:
        """R * C."""
        high, wide = self.shape
        return high * wide


def refuse_without_norms(norms: bool, asked: str) -> None:
    """Refuse an engine that was made for the sketch alone where gradients must be formed.

    Args:
        norms: whether the engine measures norms.
        asked: what needs gradients.

    Raises:
        ConfigError: it does not.
    """
    if not norms:
        raise ConfigError(
            f"{asked} need gradients to be formed, and this engine was made for the sketch alone", where="norms",
            got="norms=False", expected="norms=True", do="make the engine with norms=True: they cost nothing beside it",
        )  # fmt: skip


def fold_signed(
    values: Float[Tensor, "*lead n"], sign: Float[Tensor, " n"], width: int
) -> Float[Tensor, "*lead width"]:
    """Sum entries c, c + width, c + 2 width, ... of the last axis, signs flipped before.

    Args:
        values: [..., n], contiguous in the last axis.
        sign: [n] of -1 and +1 ; values of half precision are summed in its dtype.
        width: 1 <= width <= n.

    Returns:
        [..., width].
    """
    n, values = values.shape[-1], values.to(sign.dtype)
    if width == n:
        return values * sign
    folds = n // width
    whole = values[..., : folds * width].unflatten(-1, (folds, width))
    signs = sign[: folds * width].view(folds, width)
    if values.device.type == "cpu":  # one read and no copy; torch's ways take two to six times as long
        out = torch.from_numpy(np.einsum("...kw,kw->...w", whole.numpy(), signs.numpy()))
    else:
        out = (whole * signs).sum(-2)
    if folds * width < n:
        rest = values[..., folds * width :]
        out[..., : rest.shape[-1]] += rest * sign[folds * width :]
    return out


def add_outer_(
    sketch: Float[Tensor, "B D"],
    x: Float[Tensor, "*tokens cols"],
    g: Float[Tensor, "*tokens rows"],
    lengths: Sequence[int],
    starts: Sequence[int] | None,
    cells: Cells,
) -> None:
    """Add the sketches of every example's sum of outer products g_t x_t'.

    Args:
        sketch: [B, D], changed in place.
        x: layer inputs, [B, T, cols], or [S, cols] when ``starts`` is given.
        g: gradients of the layer's output, [B, T, rows] or [S, rows]; zero on padding.
        lengths: B numbers of tokens.
        starts: first token of each example in a flat [S, .] layout, or None for padded batches.
        cells: signs and place of the parameter.
    """
    for some, product in folded_products(x, g, lengths, starts, cells):
        fold_(sketch[some.start : some.stop], product.view(len(some), -1), cells.offset)


def folded_products(
    x: Float[Tensor, "*tokens cols"],
    g: Float[Tensor, "*tokens rows"],
    lengths: Sequence[int],
    starts: Sequence[int] | None,
    cells: Cells,
) -> Iterator[tuple[range, Float[Tensor, "b high wide"]]]:
    """Form the cells of some examples at a time.

    Args:
        x: as in :func:`add_outer_`.
        g: likewise.
        lengths: B numbers of tokens.
        starts: first token of each example in a flat layout, or None.
        cells: signs of the parameter.

    Yields:
        tuple[range, Tensor]: which examples, and the matrix of cells of each.
    """
    high, wide = cells.shape
    x, g = fold_signed(x, cells.col_sign, wide), fold_signed(g, cells.row_sign, high)
    step = max(1, BUFFER // (high * wide))
    for first in range(0, len(lengths), step):
        some = range(first, min(len(lengths), first + step))
        fast = takes(x, g) and worth(high, wide, sum(lengths) // max(1, len(lengths)))
        full = x.device.type != "cpu" or (sum(lengths) > 0.9 * g.shape[0] * g.shape[1] and not fast)
        if starts is None and full:
            product = torch.bmm(g[some.start : some.stop].transpose(1, 2), x[some.start : some.stop])
        else:
            product = x.new_empty(len(some), high, wide)
            for k, b in enumerate(some):  # true lengths, or nearly: little is spent on padding
                n = lengths[b]
                at = (b, slice(rounded(n, g.shape[1]))) if starts is None else slice(starts[b], starts[b] + n)
                outer_(product[k], g[at], x[at])
        yield some, product


def add_lookups_(
    sketch: Float[Tensor, "B D"],
    ids: Int[Tensor, "B T"],
    g: Float[Tensor, "B T cols"],
    lengths: Sequence[int],
    cells: Cells,
) -> None:
    """Add the sketches of an embedding table's gradient; the map is linear, so repeated ids need no care.

    Args:
        sketch: [B, D] contiguous, changed in place.
        ids: int64 [B, T] row numbers.
        g: [B, T, cols] gradient of each looked-up row.
        lengths: B numbers of tokens; what lies beyond is ignored.
        cells: signs and place of the table.
    """
    high, wide = cells.shape
    dim = sketch.shape[1]
    real = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    row, token = ids[real], fold_signed(g[real], cells.col_sign, wide)
    buckets = (cells.offset + (row % high * wide)[:, None] + torch.arange(wide, device=ids.device)) % dim
    buckets += real.nonzero()[:, :1] * dim
    sketch.view(-1).index_add_(0, buckets.flatten(), (token * cells.row_sign[row, None]).flatten())


def add_rows_(sketch: Float[Tensor, "B D"], formed: Float[Tensor, "B n"], low: int, cells: Cells) -> None:
    """Add whole rows of gradients that were formed.

    Args:
        sketch: [B, D], changed in place.
        formed: [B, h * cols], rows low, low + 1, ... of the matrix.
        low: number of the first row.
        cells: signs and place of the parameter.
    """
    high, wide = cells.shape
    cols = cells.col_sign.shape[0]
    folded = fold_signed(formed.unflatten(1, (-1, cols)), cells.col_sign, wide)
    stop = low + folded.shape[1]
    folded = folded * cells.row_sign[low:stop, None]
    while low < stop:  # rows until R is full
        count = min(stop - low, high - low % high)
        part = folded[:, folded.shape[1] - (stop - low) :][:, :count]
        fold_(sketch, part.flatten(1), cells.offset + low % high * wide)
        low += count
