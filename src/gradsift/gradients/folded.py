"""Dots by folded factors, for a screen: neither a gradient nor the direction as a whole is read (ours).

With prompts held constant a row has a dozen tokens that count, and its gradient was formed all the same: for every row all
entries are written once and read against every direction. The sketch's first step needs no gradient: signs are flipped and
both factors folded, and one small product gives a matrix of cells (:mod:`gradsift.gradients.prefold`). A direction folds by
the same signs, once, and the product of the two matrices of cells has the dot as its expectation, with the variance of
:mod:`gradsift.gradients.project` without its first term, the buckets': 2/(R C), and what shared rows and columns add.
Squared norms are exact, from the Gram matrices of the factors: |sum_t g_t x_t'|^2 = sum_tu (g_t . g_u)(x_t . x_u).
Vectors, lookups, fused experts and parameters with a cell for every entry are measured exactly.

It is for few tokens a row: Grams grow with their square, and formed gradients do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.errors import ConfigError
from gradsift.gradients.blocks import Block, Contribution, Dense, Outer, Scatter, Squares, Totals, join_outers
from gradsift.gradients.prefold import Cells, fold_signed, folded_products
from gradsift.gradients.project import fold_
from gradsift.gradients.taps import find_layers

if TYPE_CHECKING:
    from gradsift.gradients.hooks import GradientEngine

ROAD = "folded"
GROUPS = 5  # of neighboring layers; what belongs to none is a part of its own


def fold_directions(engine: GradientEngine) -> None:
    """Let an engine take dots by folded factors; directions of the parameters that fold are replaced by their cells.

    Args:
        engine: with a projector and its directions, on a CPU, not entered.

    Raises:
        ConfigError: it has no projector, or another road than a CPU's.
    """
    if engine.projector is None or engine.road != "tiles":
        raise ConfigError(
            "folded dots need a sketch, on a CPU", where="collect.dots", got=f"{engine.description}",
            expected="the collector's road on a CPU, with a sketch", do="set collect.dots=exact",
        )  # fmt: skip
    for block in engine.blocks.values():
        if block.directions is None or block.rows == 1 or 2 * block.cells.count > block.numel:
            continue
        if engine.looks_up(block) and not engine.is_head(block):
            continue
        if engine.holds_experts(block):
            continue
        if block.mean is not None or block.bend is not None:
            raise AssertionError("anchors and Adam directions need whole gradients")
        cells = torch.stack([fold_matrix(d.view(block.rows, block.cols), block.cells) for d in block.directions])
        block.folds["cells", cells.dtype] = cells.flatten(1)
        block.road = ROAD
        if not engine.looks_up(block):  # a table's lookups are read exactly, a few rows of it
            block.directions = None


def keep_parts(engine: GradientEngine) -> int:
    """Let an engine keep dots and squared norms of groups of layers apart, the rest (head, embedding, last norm) last.

    Args:
        engine: not entered.

    Returns:
        P, at most ``GROUPS + 1``.
    """
    layers = find_layers(engine.model)
    num = min(GROUPS, len(layers))
    group_of = {id(p): k * num // len(layers) for k, layer in enumerate(layers) for p in layer.parameters()}
    names = {name: group_of.get(id(p), num) for name, p in engine.model.named_parameters()}
    engine.part_of = {name: names[name] for name in engine.blocks}
    return max(engine.part_of.values(), default=0) + 1


def fold_matrix(matrix: Float[Tensor, "rows cols"], cells: Cells) -> Float[Tensor, "high wide"]:
    """Fold a whole matrix to its cells.

    Args:
        matrix: [rows, cols].
        cells: signs of the parameter.

    Returns:
        [R, C].
    """
    high, wide = cells.shape
    columns = fold_signed(matrix, cells.col_sign, wide)
    return fold_signed(columns.t().contiguous(), cells.row_sign, high).t().contiguous()


def measure(block: Block, parts: Sequence[Contribution], totals: Totals) -> Squares:
    """Do what :meth:`gradsift.gradients.blocks.Block.measure` does, with folded dots.

    Args:
        block: a parameter on this road.
        parts: everything that flowed into it.
        totals: running totals, changed in place.

    Returns:
        Squared norms of the linear and of the looked-up part, apart.
    """
    before = totals.square.clone()
    outers = [part for part in parts if isinstance(part, Outer)]
    scatters = [part for part in parts if isinstance(part, Scatter)]
    if any(isinstance(part, Dense) for part in parts):
        raise AssertionError(f"no rule for the mixed uses of parameter {block.name}")
    outer = join_outers(outers) if outers else None
    if outer is not None:
        add_dots_(block, outer, totals)
        totals.square += gram_squares(outer)
    linear = totals.square - before
    if scatters:
        block.measure_scatter(scatters, totals)
    squares = Squares(linear, totals.square - before - linear)
    if outer is not None and scatters:
        block.add_cross(outer, scatters, totals)
    return squares


def add_dots_(block: Block, outer: Outer, totals: Totals) -> None:
    """Add dots and sketches from one product of folded factors.

    Args:
        block: with the cells of its directions.
        outer: what flowed into it.
        totals: changed in place.
    """
    cells, directions = block.cells, block.folds.get(("cells", outer.x.dtype))
    for some, product in folded_products(outer.x, outer.g, outer.lengths, outer.starts, cells):
        flat = product.view(len(some), -1)
        if directions is not None:
            totals.dots[some.start : some.stop] += torch.mm(flat, directions.t()).double()
        if totals.sketch is not None:
            fold_(totals.sketch[some.start : some.stop], flat, cells.offset)


def gram_squares(outer: Outer) -> Float[Tensor, " B"]:
    """Take squared norms by Gram matrices.

    Args:
        outer: outer products of B examples; padding has zero gradient.

    Returns:
        float64 [B].
    """
    if outer.starts is None:
        of_g, of_x = (torch.bmm(part, part.transpose(1, 2)).double() for part in (outer.g, outer.x))
        return (of_g * of_x).sum((1, 2))
    pairs = [outer.row(b) for b in range(len(outer.lengths))]
    found = [((g @ g.t()).double() * (x @ x.t()).double()).sum() for x, g in pairs]
    return torch.stack(found) if found else outer.g.new_zeros(0, dtype=torch.float64)
