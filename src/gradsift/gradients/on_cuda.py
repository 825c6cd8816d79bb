"""How a block is measured on a GPU: few launches, no wait for the device, and no gradient kept (ours).

Two roads for linear layers: ``fused`` (Triton kernels, :mod:`gradsift.gradients.fused`) and ``torch`` (gradients formed by
batched products, large chunks of rows at a time). Lookups and tied tables need no loop over examples: a table's squared
norm is a Gram matrix of its token gradients with pairs of unequal ids struck out, its dots and its sketch are linear in the
tokens. Sketches multiply with 0/+1/-1 matrices that flip and fold in one product. Layers of half precision are read as
they are; products of them are exact in the float32 sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.gradients import fused
from gradsift.gradients.blocks import Block, Contribution, Dense, Outer, Scatter, Squares, Totals
from gradsift.gradients.lookups import cross_terms, masked_tokens, scatter_dots, scatter_squares
from gradsift.gradients.prefold import add_rows_
from gradsift.gradients.project import cell_shape, fold_
from gradsift.gradients.spans import Spans
from gradsift.gradients.wide import HALF, bmm_wide, mm_wide, padded

ENTRIES = 1 << 27  # of gradients formed at a time on the torch road; 512 MiB in float32
ALIGNED = 16  # columns


def measure(block: Block, parts: Sequence[Contribution], totals: Totals) -> Squares:
    """Do what :meth:`gradsift.gradients.blocks.Block.measure` does, on the block's road.

    Args:
        block: the parameter.
        parts: everything that flowed into it in this micro-batch.
        totals: running totals, changed in place.

    Returns:
        Squared norms of the linear and of the looked-up part, apart.

    Raises:
        AssertionError: the parameter mixes kinds of uses that have no cross term here.
    """
    outers = [p for p in parts if isinstance(p, Outer)]
    scatters = [p for p in parts if isinstance(p, Scatter)]
    denses = [p for p in parts if isinstance(p, Dense)]
    if len(outers) > 1:
        outers = [_join(outers)]
    if block.mean is not None:
        _add_to_mean(block, outers, scatters, denses)
    if block.bend is not None:
        from gradsift.gradients.adam import measure_bent  # it builds on blocks

        return measure_bent(block, [*(_widen(o) for o in outers), *denses], scatters, totals)
    _sketch(block, outers, scatters, denses, totals)
    if not totals.norms:
        return Squares(totals.square, totals.square)
    if denses and (outers or scatters):
        raise AssertionError(f"no rule for the mixed uses of parameter {block.name}")
    linear = looked_up = torch.zeros_like(totals.square)
    if denses:
        linear = _exact_dense(block, denses, totals)
    for outer in outers:
        linear = _exact_outer(block, outer, totals)
    if scatters:
        looked_up = scatter_squares(scatters)
        totals.square += looked_up
        if block.directions is not None:
            totals.dots += scatter_dots(block, scatters)
    for outer in outers if scatters else ():
        totals.square += 2 * cross_terms(outer, scatters)
    return Squares(linear, looked_up)


def _exact_outer(block: Block, outer: Outer, totals: Totals) -> Tensor:
    if block.road == "fused" and fused.takes(outer.x, outer.g):
        x, g = outer.x.reshape(-1, block.cols), outer.g.reshape(-1, block.rows)
        square, dots = fused.squares_and_dots(x, g, spans_of(outer), block.directions)
    else:
        square, dots = formed_squares_and_dots(block, outer)
    totals.square += square
    if block.directions is not None:
        totals.dots += dots
    return square


def spans_of(outer: Outer) -> Spans:
    """Give the places of the examples' tokens in the flat view of an outer product's factors."""
    return Spans.of(outer.lengths, outer.starts, outer.x.shape[1])


def formed_squares_and_dots(
    block: Block, outer: Outer, *, entries: int = ENTRIES
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B M"]]:
    """Form the gradients of a whole batch, some rows of the matrix at a time, by batched products.

    Args:
        block: the parameter.
        outer: what flowed into it.
        entries: numbers formed at a time, at most (at least one row for each example).

    Returns:
        float64 [B] squared norms and float64 [B, M] dots.
    """
    num = len(outer.lengths)
    num_directions = 0 if block.directions is None else block.directions.shape[0]
    square = torch.zeros(num, dtype=torch.float64, device=outer.x.device)
    dots = square.new_zeros(num, num_directions)
    x = padded(outer.x, outer.lengths, outer.starts)
    if not x.shape[1]:
        return square, dots
    height = max(1, min(block.rows, entries // max(1, num * block.cols)))
    for low in range(0, block.rows, height):
        high = min(block.rows, low + height)
        part = padded(outer.g[..., low:high], outer.lengths, outer.starts)
        tile = bmm_wide(part.transpose(1, 2), x).flatten(1)
        square += torch.linalg.vector_norm(tile, dim=1).double().square()
        if block.directions is not None:
            some = block.directions[:, low * block.cols : high * block.cols]
            dots += torch.mm(tile, some.to(tile.dtype).t()).double()
    return square, dots


def _widen(outer: Outer) -> Outer:
    if outer.x.dtype not in HALF and outer.g.dtype not in HALF:
        return outer
    return Outer(outer.x.float(), outer.g.float(), outer.lengths, outer.starts)


def _join(outers: Sequence[Outer]) -> Outer:
    """Put several uses of one layer behind each other in time; several uses are rare, so this pads."""
    x = torch.cat([padded(o.x, o.lengths, o.starts) for o in outers], 1)
    g = torch.cat([padded(o.g, o.lengths, o.starts) for o in outers], 1)
    return Outer(x, g, (x.shape[1],) * x.shape[0])


def _exact_dense(block: Block, denses: Sequence[Dense], totals: Totals) -> Tensor:
    g = sum((d.g for d in denses[1:]), denses[0].g)
    square = torch.linalg.vector_norm(g, dim=1).double().square()
    totals.square += square
    if block.directions is not None:
        totals.dots += torch.mm(g, block.directions.to(g.dtype).t()).double()
    return square


def fold_matrix(sign: Float[Tensor, " n"], width: int, dtype: torch.dtype) -> Float[Tensor, "n width"]:
    """The matrix that flips signs and folds: entry (r, r mod width) is sign[r].

    Args:
        sign: [n] of -1 and +1.
        width: of the folded axis.
        dtype: of the factor it will multiply; +1 and -1 are exact in all.

    Returns:
        [n, width].
    """
    out = torch.zeros(sign.shape[0], width, dtype=dtype, device=sign.device)
    return out.scatter_(1, (torch.arange(sign.shape[0], device=sign.device) % width)[:, None], sign[:, None].to(dtype))


def _fold(block: Block, values: Tensor, axis: Literal["row", "col"]) -> Tensor:
    """Flip and fold the last axis of a factor by one product; some columns of zeros keep rows aligned.

    The matrix is kept with the block.
    """
    key = (axis, values.dtype)
    if key not in block.folds:
        sign = block.row_sign if axis == "row" else block.col_sign
        assert sign is not None
        width = cell_shape(block.rows, block.cols)[0 if axis == "row" else 1]
        aligned = -(-width // ALIGNED) * ALIGNED  # products with odd row lengths take several times as long
        block.folds[key] = torch.nn.functional.pad(fold_matrix(sign, width, values.dtype), (0, aligned - width))
    fold = block.folds[key]
    return mm_wide(values.reshape(-1, values.shape[-1]), fold).view(*values.shape[:-1], fold.shape[1])


def _sketch(
    block: Block, outers: Sequence[Outer], scatters: Sequence[Scatter], denses: Sequence[Dense], totals: Totals
) -> None:
    """Add the sketch of whatever flowed in; the map is linear, so parts need not meet."""
    if totals.sketch is None:
        return
    if denses:
        add_rows_(totals.sketch, sum((d.g for d in denses[1:]), denses[0].g), 0, block.cells)
    pairs, (high, wide) = [], cell_shape(block.rows, block.cols)
    for outer in outers:
        x, g = _fold(block, outer.x, "col"), _fold(block, outer.g, "row")
        pairs.append([padded(v, outer.lengths, outer.starts) for v in (x, g)])
    if scatters:
        assert block.row_sign is not None
        ids, s = masked_tokens(scatters)
        known = ids.clamp_min(0)
        picks = s.new_zeros(*ids.shape, high)
        picks.scatter_(2, (known % high)[..., None], block.row_sign.to(s.dtype)[known][..., None])
        pairs.append([_fold(block, s, "col"), picks])
    for x, g in pairs:
        if x.shape[1]:
            cells = torch.bmm(g.transpose(1, 2), x)[:, :high, :wide]
            fold_(totals.sketch, cells.flatten(1).to(totals.sketch.dtype), block.offset)


def _add_to_mean(block: Block, outers: Sequence[Outer], scatters: Sequence[Scatter], denses: Sequence[Dense]) -> None:
    assert block.mean is not None
    for outer in outers:
        g, x = outer.g.reshape(-1, block.rows), outer.x.reshape(-1, block.cols)
        block.mean += mm_wide(g.t(), x).to(block.mean.dtype)
    for scatter in scatters:
        g = scatter.g.reshape(-1, block.cols).to(block.mean.dtype)
        block.mean.index_add_(0, scatter.ids.reshape(-1), g)
    for dense in denses:
        block.mean += dense.g.sum(0).view(block.rows, block.cols)


def head_squares(outer: Outer, road: str) -> Float[Tensor, " B"]:
    """Squared norm of the LM head's gradient by two Gram matrices (grads.md 2.1).

    Args:
        outer: its input and output gradient at supervised positions.
        road: the engine's.

    Returns:
        float64 [B].
    """
    if road == "fused" and fused.takes(outer.x, outer.g):
        return fused.gram_squares(outer.x, outer.g, spans_of(outer))
    x = padded(outer.x, outer.lengths, outer.starts)
    g = padded(outer.g, outer.lengths, outer.starts)
    of_g, of_x = bmm_wide(g, g.transpose(1, 2)), bmm_wide(x, x.transpose(1, 2))
    return (of_g.double() * of_x.double()).sum((1, 2))
