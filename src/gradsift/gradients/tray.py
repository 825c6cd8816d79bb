"""Small parameters measured together: gradients of one micro-batch lie side by side until a tray is full (ours).

An adapter has hundreds of matrices of some thousand entries; measured one by one, most of their time is calls and not
arithmetic. Here each is formed in its place of a row per example, and a full tray is read once for squares, once against
the directions of all its parameters and once for the sketch. Places follow the order in which gradients arrive, so that a
tray is any stretch of them that fits the batch at hand. With a sketch, a parameter's place is its first bucket modulo D,
so that a whole tray folds in one sum; what lies between two parameters is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.gradients.blocks import TILE, Block, Contribution, Dense, Outer, Totals, row_squares
from gradsift.gradients.products import outer_, takes, worth
from gradsift.gradients.project import fold_

ROOM = 1 << 19  # entries of a tray, all examples together: 2 MiB in float32, and a tile's length for each of eight
PADDED = 0.9  # with fewer real tokens than this the examples' products are taken one by one


@dataclass
class Tray:
    """Places of small parameters and what lies in them.

    Args:
        dim: D of the sketch, or None without one.
    """

    dim: int | None
    _order: tuple[str, ...] = ()
    _places: dict[str, tuple[int, int, Tensor | None]] = field(default_factory=dict)
    _signs: Tensor | None = None
    _directions: Tensor | None = None
    _buffer: Tensor | None = None
    _size: int = 0
    _span: tuple[int, int] | None = None
    _into: Totals | None = None

    def plan(self, blocks: Sequence[Block], size: int) -> None:
        """Get ready for a micro-batch; places are kept as long as the same parameters and directions are measured.

        Args:
            blocks: those whose gradient will arrive once, in the order in which they will.
            size: B, examples of the micro-batch.
        """
        self._span, self._into, self._size = None, None, size
        small = [block for block in blocks if _is_small(block, self.dim)]
        order = tuple(block.name for block in small)
        if order != self._order or any(block.directions is not self._places[block.name][2] for block in small):
            self._lay_out(small, order)

    def _lay_out(self, blocks: Sequence[Block], order: tuple[str, ...]) -> None:
        self._order, self._places, end = order, {}, 0
        for block in blocks:
            start = end if self.dim is None else end + (block.offset - end) % self.dim
            end = start + block.numel
            self._places[block.name] = (start, end, None)
        self._signs = self._directions = None
        for block in blocks:
            start, stop, _ = self._places[block.name]
            if self.dim is not None:
                signs = torch.outer(*(s for s in (block.row_sign, block.col_sign) if s is not None)).flatten()
                self._signs = signs.new_zeros(end) if self._signs is None else self._signs
                self._signs[start:stop] = signs
            if block.directions is not None:
                if self._directions is None:
                    self._directions = block.directions.new_zeros(block.directions.shape[0], end)
                self._directions[:, start:stop] = block.directions
                block.directions = self._directions[:, start:stop]  # the same numbers, kept once
            self._places[block.name] = (start, stop, block.directions)

    def takes(self, block: Block, parts: Sequence[Contribution]) -> bool:
        """Tell whether a gradient that has arrived can lie in the tray.

        Args:
            block: its parameter.
            parts: everything that flowed into it.

        Returns:
            True for one dense part or one padded batch of outer products of a parameter with a place, where at least two
            like it fit.
        """
        if len(parts) != 1 or block.name not in self._places or 2 * block.numel * self._size > ROOM:
            return False
        part = parts[0]
        return isinstance(part, Dense) or (isinstance(part, Outer) and part.starts is None)

    def add(self, block: Block, part: Contribution, totals: Totals) -> None:
        """Form a parameter's gradients in its place; a tray that is full is measured before.

        Args:
            block: one that :meth:`takes` accepts.
            part: what flowed into it.
            totals: running totals, changed when the tray is measured: before what belongs to other totals, or no longer fits.
        """
        start, stop, _ = self._places[block.name]
        if self._span is not None:
            low, high = self._span
            if self._into is not totals or start < high or stop - low > min(TILE, ROOM // self._size):
                self.measure()
        assert isinstance(part, Outer | Dense)
        low, high = self._span or (start, start)
        rows = self._rows(part.g)
        if start > high:
            rows[:, high - low : start - low] = 0
        self._span, self._into = (low, stop), totals
        place = rows[:, start - low : stop - low]
        if isinstance(part, Dense):
            place.copy_(part.g)
        else:
            _form(part, place.unflatten(1, (block.rows, block.cols)))

    def _rows(self, like: Tensor) -> Float[Tensor, "B width"]:
        width = ROOM // self._size
        held = self._buffer
        if held is None or held.dtype != like.dtype:
            held = self._buffer = torch.empty(ROOM, dtype=like.dtype)
        return held[: self._size * width].view(self._size, width)

    def measure(self) -> None:
        """Add what lies in the tray to the totals that it was given with, and empty it."""
        if self._span is None:
            return
        (low, high), totals = self._span, self._into
        self._span = self._into = None
        assert self._buffer is not None
        assert totals is not None
        tray = self._rows(self._buffer)[:, : high - low]
        totals.square += row_squares(tray)
        if self._directions is not None:
            totals.dots += torch.mm(tray, self._directions[:, low:high].t()).double()
        if totals.sketch is not None and self._signs is not None:
            _fold_signed_(totals.sketch, tray, self._signs[low:high], low)


def _is_small(block: Block, dim: int | None) -> bool:
    """Whether a block's gradient may lie beside others: every entry has a cell of its own, and nothing else is asked."""
    plain = block.road == "tiles" and block.mean is None and block.bend is None
    return plain and 2 * block.numel <= TILE and (dim is None or block.cells.count == block.numel)


def _form(outer: Outer, place: Float[Tensor, "B rows cols"]) -> None:
    """Form every example's gradient; padding has zero output gradient."""
    size, width = outer.g.shape[:2]
    length = sum(outer.lengths) // size
    fast = takes(outer.g, outer.x) and worth(outer.g.shape[2], outer.x.shape[2], length)
    if length > PADDED * width and not fast:
        torch.bmm(outer.g.transpose(1, 2), outer.x, out=place)
        return
    for b in range(size):
        x, g = outer.padded_row(b)
        outer_(place[b], g, x)


def _fold_signed_(
    sketch: Float[Tensor, "B D"], tray: Float[Tensor, "B n"], signs: Float[Tensor, " n"], start: int
) -> None:
    """Flip signs and fold in one read: numpy's sum of products takes half the time of torch's ways."""
    dim = sketch.shape[1]
    whole = tray.shape[1] // dim * dim
    if whole:
        folded = np.einsum(
            "bkd,kd->bd", tray[:, :whole].unflatten(1, (-1, dim)).numpy(), signs[:whole].view(-1, dim).numpy()
        )
        fold_(sketch, torch.from_numpy(folded), start)
    if whole < tray.shape[1]:
        fold_(sketch, tray[:, whole:] * signs[whole:], start)
