"""Measuring one parameter's per-example gradients without ever keeping them.

A parameter is a matrix [rows, cols]. Its per-example gradient arrives as outer products (a linear layer: sum over tokens
of output gradient times input), as scattered rows (an embedding), or as a dense vector (norms and biases). From these a
block adds each example's exact dots with M directions, exact squared norm and sketch to running totals. Gradients are
formed tile by tile in a scratch buffer; tiles are summed in float64, since one long float32 sum over millions of entries
loses 5e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsift.gradients.prefold import Cells, add_lookups_, add_outer_, add_rows_
from gradsift.gradients.products import add_product_, linear, outer_, rounded, takes, turned, worth
from gradsift.gradients.project import Projector, signs

TILE = 1 << 16  # entries of one gradient tile; 256 KiB in float32, half of a typical second-level cache
FOLDS_FAR = 8  # where a tile is formed anyway, folding the factors pays from this many entries per cell on
CHUNK = 8  # examples whose tiles meet the directions in one product, so that each direction is read once for all

# One buffer for all blocks: a tile is done with before the next is formed, and one each was 2 MiB for every layer.
_SCRATCH: dict[tuple[torch.dtype, torch.device], Tensor] = {}


@dataclass
class Totals:
    """Running totals of one micro-batch.

    Args:
        dots: float64 [B, M].
        square: float64 [B] squared norms.
        sketch: [B, D] or None.
        norms: False when only the sketch is asked for; squares then stay as they are.
    """

    dots: Float[Tensor, "B M"]
    square: Float[Tensor, " B"]
    sketch: Float[Tensor, "B D"] | None
    norms: bool = True


@dataclass(frozen=True)
class Squares:
    """Squared norms of one parameter's parts; a tied table's own squared norm also has their cross term.

    Args:
        linear: float64 [B], the part from linear uses.
        looked_up: float64 [B], the part from lookups.
    """

    linear: Float[Tensor, " B"]
    looked_up: Float[Tensor, " B"]


@dataclass(frozen=True)
class Outer:
    """Outer products of a linear layer, each example's tokens in one piece.

    Args:
        x: layer inputs, [B, T, cols] or [S, cols] when ``starts`` is given.
        g: gradients of the layer's output, [B, T, rows] or [S, rows].
        lengths: tokens per example; whatever lies beyond has zero gradient.
        starts: first token of each example in a flat [S, .] layout, or None for padded batches.
    """

    x: Tensor
    g: Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...] | None = None

    def row(self, b: int) -> tuple[Float[Tensor, "L cols"], Float[Tensor, "L rows"]]:
        """Give one example's inputs and output gradients as views."""
        n = self.lengths[b]
        if self.starts is None:
            return self.x[b, :n], self.g[b, :n]
        s = self.starts[b]
        return self.x[s : s + n], self.g[s : s + n]

    def padded_row(self, b: int) -> tuple[Float[Tensor, "L cols"], Float[Tensor, "L rows"]]:
        """Give the same with some of the padding behind it, where that makes products of one shape."""
        if self.starts is not None:
            return self.row(b)
        n = rounded(self.lengths[b], self.x.shape[1])
        return self.x[b, :n], self.g[b, :n]


@dataclass(frozen=True)
class Scatter:
    """Rows of an embedding table that received gradient.

    Args:
        ids: int64 [B, T] row numbers.
        g: [B, T, cols] gradient of each looked-up row.
        lengths: tokens per example.
    """

    ids: Int[Tensor, "B T"]
    g: Float[Tensor, "B T cols"]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Dense:
    """A parameter's per-example gradient itself (vectors: norms and biases).

    Args:
        g: [B, rows * cols].
    """

    g: Float[Tensor, "B n"]


@dataclass(frozen=True)
class Routed:
    """Outer products that each belong to the rows of one expert.

    Args:
        x: [S, cols] inputs.
        g: [S, rows of one expert] gradients of the output.
        expert: int64 [S] which expert.
        example: int64 [S] which example.
    """

    x: Float[Tensor, "S cols"]
    g: Float[Tensor, "S r"]
    expert: Int[Tensor, " S"]
    example: Int[Tensor, " S"]


Contribution = Outer | Scatter | Dense | Routed


@dataclass
class Block:
    """One parameter as a matrix, its signs and its directions.

    Args:
        name: the parameter's name.
        rows: outputs (vocabulary for an embedding); 1 for vectors.
        cols: inputs.
        row_sign: [rows] or None without a projector.
        col_sign: [cols] or None.
        offset: first bucket of the sketch.
        directions: [M, rows * cols] unit directions, or None.
        mean: [rows, cols] running sum of gradients when anchors are being built, or None.
        bend: what turns a flat gradient into what is sketched (:mod:`gradsift.gradients.adam`), or None for itself.
        road: ``tiles`` here; ``torch`` and ``fused`` are in :mod:`gradsift.gradients.on_cuda`.
        folds: matrices those two keep.
    """

    name: str
    rows: int
    cols: int
    row_sign: Float[Tensor, " rows"] | None = None
    col_sign: Float[Tensor, " cols"] | None = None
    offset: int = 0
    directions: Float[Tensor, "M n"] | None = None
    mean: Float[Tensor, "rows cols"] | None = None
    bend: Callable[[Tensor, int], Tensor] | None = None
    road: str = "tiles"
    folds: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.rows * self.cols

    @property
    def cells(self) -> Cells:
        """Where the entries go in a sketch."""
        assert self.row_sign is not None
        assert self.col_sign is not None
        return Cells(self.row_sign, self.col_sign, self.offset)

    def measure(self, parts: Sequence[Contribution], totals: Totals) -> Squares:
        """Add every example's dots, squared norm and sketch of this parameter to the totals.

        Args:
            parts: everything that flowed into the parameter in this micro-batch.
            totals: running totals, changed in place.

        Returns:
            Squared norms of the linear and of the looked-up part, apart.
        """
        if isinstance(parts[0], Routed):
            from gradsift.gradients.experts import measure_routed  # it builds on this module

            return measure_routed(self, [p for p in parts if isinstance(p, Routed)], totals)
        if self.road == "folded":
            from gradsift.gradients import folded  # it builds on this module

            return folded.measure(self, parts, totals)
        if self.road != "tiles":
            from gradsift.gradients import on_cuda  # it builds on this module

            return on_cuda.measure(self, parts, totals)
        before = totals.square.clone()
        outers = [p for p in parts if isinstance(p, Outer)]
        scatters = [p for p in parts if isinstance(p, Scatter)]
        denses = [p for p in parts if isinstance(p, Dense)]
        if self.mean is not None:
            self._add_to_mean(outers, scatters, denses)
        if self.bend is not None:
            from gradsift.gradients.adam import measure_bent  # it builds on this module

            return measure_bent(self, [*outers, *denses], scatters, totals)
        if not totals.norms:
            self._sketch_alone(outers, scatters, denses, totals.sketch)
            return Squares(totals.square, totals.square)
        if len(outers) == 1 and outers[0].starts is None and self._fits_whole(outers[0]):
            denses = [*denses, self._as_dense(outers[0])]
            outers = []
        if denses:
            self._measure_dense(denses, totals)
        if outers:
            self._measure_outer(join_outers(outers), totals)
        linear = totals.square - before
        if scatters:
            self.measure_scatter(scatters, totals)
        squares = Squares(linear, totals.square - before - linear)
        kinds = (bool(outers), bool(scatters), bool(denses))
        if kinds == (True, True, False):
            self.add_cross(join_outers(outers), scatters, totals)
        elif sum(kinds) > 1:
            raise AssertionError(f"no rule for the mixed uses of parameter {self.name}")
        return squares

    def _sketch_alone(
        self, outers: Sequence[Outer], scatters: Sequence[Scatter], denses: Sequence[Dense], sketch: Tensor | None
    ) -> None:
        """Sketch whatever flowed in; the map is linear, so parts need not meet and no gradient is formed."""
        if sketch is None:
            return
        for outer in outers:
            add_outer_(sketch, outer.x, outer.g, outer.lengths, outer.starts, self.cells)
        for scatter in scatters:
            add_lookups_(sketch, scatter.ids, scatter.g, scatter.lengths, self.cells)
        for dense in denses:
            add_rows_(sketch, dense.g, 0, self.cells)

    # -- outer products ------------------------------------------------------------------------------------------

    def _fits_whole(self, outer: Outer) -> bool:
        return outer.x.shape[0] * self.numel <= CHUNK * TILE

    def _as_dense(self, outer: Outer) -> Dense:
        """Form small gradients for the whole batch in one product; padding has zero output gradient."""
        if not (takes(outer.g, outer.x) and worth(self.rows, self.cols, sum(outer.lengths) // len(outer.lengths))):
            return Dense(torch.bmm(outer.g.transpose(1, 2), outer.x).flatten(1))
        formed = outer.x.new_empty(outer.x.shape[0], self.rows, self.cols)
        for b, place in enumerate(formed):
            x, g = outer.padded_row(b)
            outer_(place, g, x)
        return Dense(formed.flatten(1))

    def _measure_outer(self, outer: Outer, totals: Totals) -> None:
        folds_far = totals.sketch is not None and FOLDS_FAR * self.cells.count <= self.numel
        self._tiles(outer, totals, fold=not folds_far)
        if totals.sketch is not None and folds_far:
            add_outer_(totals.sketch, outer.x, outer.g, outer.lengths, outer.starts, self.cells)

    def _tiles(self, outer: Outer, totals: Totals, *, fold: bool) -> None:
        """Walk the gradient in tiles of whole rows, CHUNK examples at a time."""
        num, cols, rows = len(outer.lengths), self.cols, self.rows
        height = max(1, min(rows, TILE // cols))
        scratch = self._buffer(outer.x, min(CHUNK, num), height * cols)
        live = [b for b in range(num) if outer.lengths[b]]
        pairs = {b: (x.contiguous(), turned(g)) for b in live for x, g in [outer.padded_row(b)]}
        for low in range(0, rows, height):
            high = min(rows, low + height)
            for first in range(0, len(live), CHUNK):
                some = live[first : first + CHUNK]
                tile = scratch[: len(some), : (high - low) * cols]
                for k, b in enumerate(some):
                    x, g = pairs[b]
                    outer_(tile[k].view(high - low, cols), g[:, low:high], x)
                self._measure_tile(tile, some, low, totals, fold=fold)

    def _measure_tile(
        self, tile: Float[Tensor, "c n"], some: list[int], low: int, totals: Totals, *, fold: bool
    ) -> None:
        rows = some if len(some) < totals.square.shape[0] else slice(None)
        totals.square[rows] += row_squares(tile)
        if self.directions is not None:
            position = low * self.cols
            dots = torch.mm(self.directions[:, position : position + tile.shape[1]], tile.t())
            totals.dots[rows] += dots.t().double()
        if fold and totals.sketch is not None:
            if isinstance(rows, slice) or some == list(range(some[0], some[0] + len(some))):
                add_rows_(totals.sketch[some[0] : some[0] + len(some)], tile, low, self.cells)
            else:
                for k, b in enumerate(some):
                    add_rows_(totals.sketch[b : b + 1], tile[k : k + 1], low, self.cells)

    def _buffer(self, like: Tensor, count: int, size: int) -> Tensor:
        key, need = (like.dtype, like.device), count * size
        held = _SCRATCH.get(key)
        if held is None or held.numel() < need:
            held = _SCRATCH[key] = torch.empty(need, dtype=like.dtype, device=like.device)
        return held[:need].view(count, size)

    # -- dense ---------------------------------------------------------------------------------------------------

    def _measure_dense(self, denses: Sequence[Dense], totals: Totals) -> None:
        g = denses[0].g if len(denses) == 1 else torch.stack([d.g for d in denses]).sum(0)
        totals.square += row_squares(g)
        if self.directions is not None:
            totals.dots += torch.mm(g, self.directions.t()).double()
        if totals.sketch is not None:
            add_rows_(totals.sketch, g, 0, self.cells)

    # -- embeddings ----------------------------------------------------------------------------------------------

    def measure_scatter(self, scatters: Sequence[Scatter], totals: Totals) -> None:
        """Add dots, squared norms and sketches of what was looked up.

        Args:
            scatters: lookups in this table.
            totals: running totals, changed in place.
        """
        for scatter in scatters:
            if totals.sketch is not None:
                add_lookups_(totals.sketch, scatter.ids, scatter.g, scatter.lengths, self.cells)
        for b in range(len(scatters[0].lengths)):
            ids, summed = sum_repeated(scatters, b)
            if not ids.numel():
                continue
            totals.square[b] += summed.double().square().sum()
            if self.directions is not None:
                table = self.directions.view(-1, self.rows, self.cols)[:, ids]
                totals.dots[b] += (table * summed).flatten(1).double().sum(1)

    def add_cross(self, outer: Outer, scatters: Sequence[Scatter], totals: Totals) -> None:
        """Add 2 <outer part, scattered part> of a tied table to the squared norm.

        Args:
            outer: what flowed into it as a linear layer.
            scatters: lookups in it.
            totals: running totals, changed in place.
        """
        for b in range(len(outer.lengths)):
            x, g = outer.row(b)
            ids, summed = sum_repeated(scatters, b)
            if x.shape[0] and ids.numel():
                totals.square[b] += 2 * (g[:, ids] * linear(x, summed)).double().sum()

    # -- anchors -------------------------------------------------------------------------------------------------

    def _add_to_mean(self, outers: Sequence[Outer], scatters: Sequence[Scatter], denses: Sequence[Dense]) -> None:
        assert self.mean is not None
        for outer in outers:
            add_product_(self.mean, outer.g.reshape(-1, self.rows), outer.x.reshape(-1, self.cols))
        for scatter in scatters:
            self.mean.index_add_(0, scatter.ids.reshape(-1), scatter.g.reshape(-1, self.cols))
        for dense in denses:
            self.mean += dense.g.sum(0).view(self.rows, self.cols)


def make_block(
    name: str, rows: int, cols: int, projector: Projector | None, *, dtype: torch.dtype, device: torch.device
) -> Block:
    """Build a block with its signs.

    Args:
        name: the parameter's name.
        rows: outputs.
        cols: inputs.
        projector: seed and size of the sketch, or None.
        dtype: arithmetic of the tiles.
        device: where they live.

    Returns:
        A block without directions.
    """
    if projector is None:
        return Block(name, rows, cols)
    row = torch.from_numpy(signs(projector.seed, name, "row", rows)).to(device=device, dtype=dtype)
    col = torch.from_numpy(signs(projector.seed, name, "col", cols)).to(device=device, dtype=dtype)
    return Block(name, rows, cols, row, col, projector.offset(name))


def row_squares(tile: Float[Tensor, "c n"]) -> Float[Tensor, " c"]:
    """Take the squared norm of each row; on a CPU by BLAS dot, the fastest single read.

    Args:
        tile: [c, n], each row contiguous.

    Returns:
        float64 [c].
    """
    if tile.device.type == "cpu":
        rows = tile.numpy()
        return torch.from_numpy(np.fromiter((np.dot(r, r) for r in rows), dtype=np.float64, count=len(rows)))
    return torch.linalg.vector_norm(tile, dim=1).double().square()


def join_outers(outers: Sequence[Outer]) -> Outer:
    """Put several uses of one layer behind each other in time: their gradients add up in the same product.

    Args:
        outers: uses of one layer, at least one.

    Returns:
        One use, flat where there were several.
    """
    if len(outers) == 1:
        return outers[0]
    rows = [[o.row(b) for o in outers] for b in range(len(outers[0].lengths))]
    lengths = tuple(sum(x.shape[0] for x, _ in row) for row in rows)
    starts = tuple(int(s) for s in np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    x = torch.cat([x for row in rows for x, _ in row])
    g = torch.cat([g for row in rows for _, g in row])
    return Outer(x, g, lengths, starts)


def sum_repeated(scatters: Sequence[Scatter], b: int) -> tuple[Int[Tensor, " u"], Float[Tensor, "u cols"]]:
    """Sum the gradients of repeated ids of one example; without this a table's norm is wrong.

    Args:
        scatters: lookups in one table.
        b: which example.

    Returns:
        The ids that occur, rising, and the sum for each.
    """
    ids = torch.cat([s.ids[b, : s.lengths[b]] for s in scatters])
    g = torch.cat([s.g[b, : s.lengths[b]] for s in scatters])
    unique, inverse = torch.unique(ids, return_inverse=True)
    return unique, g.new_zeros(unique.shape[0], g.shape[1]).index_add_(0, inverse, g)
