"""Adam-shaped directions of single rows, inside the engine: Gamma(g) before it is sketched (less.md 2, arXiv 2402.04333).

Gamma is not linear in g, so it needs each row's gradient itself. The engine forms that gradient anyway, tile by tile, for its
norm; here every tile is bent on its way into the sketch. Norms and dots stay those of the plain gradient.

Cost: what the dense path of the engine takes, plus a handful of operations per entry and row; tables that are looked up are
made dense row by row, which is why all weights of a large vocabulary are slow here and an adapter is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.errors import StoreError
from gradsift.gradients.blocks import CHUNK, TILE, Block, Dense, Outer, Scatter, Squares, Totals, sum_repeated
from gradsift.gradients.prefold import add_rows_, refuse_without_norms

if TYPE_CHECKING:
    from gradsift.gradients.hooks import GradientEngine

EPS = 1e-8
Form = Literal["adam", "adam_diag"]


def gamma(grad: Tensor, first: Tensor, second: Tensor, *, eps: float = EPS) -> Tensor:
    """Turn a gradient into LESS's Adam direction: m' / sqrt(v' + eps), m' = .9 m + .1 g, v' = .999 v + .001 g^2.

    As in the released code: eps inside the root, no bias correction, no learning rate (less.md 2). It is not what one
    optimizer step does; that is :func:`gradsift.train.moments.adam_direction`.

    Args:
        grad: g, any shape.
        first: m, broadcast to it.
        second: v >= 0, broadcast to it.
        eps: added to v'.

    Returns:
        The direction, shaped like the gradient.
    """
    return (0.9 * first + 0.1 * grad) / (0.999 * second + 0.001 * grad.square() + eps).sqrt()


def gamma_diag(grad: Tensor, second: Tensor, *, eps: float = EPS) -> Tensor:
    """Scale a gradient by Adam's second moment alone: g / sqrt(v + eps), which is linear in g (README K4, adam_diag; ours).

    Args:
        grad: g, any shape.
        second: v >= 0, broadcast to it.
        eps: added to v.

    Returns:
        The direction, shaped like the gradient.
    """
    return grad / (second + eps).sqrt()


@dataclass(frozen=True)
class Bend:
    """What turns a block's flat gradient into its Adam direction.

    Args:
        first: [n] m.
        second: [n] v.
        form: ``adam`` or ``adam_diag``.
    """

    first: Float[Tensor, " n"]
    second: Float[Tensor, " n"]
    form: Form

    def __call__(self, tile: Float[Tensor, "c t"], position: int) -> Float[Tensor, "c t"]:
        """Bend the entries from ``position`` on."""
        stop = position + tile.shape[1]
        if self.form == "adam_diag":
            return gamma_diag(tile, self.second[position:stop])
        return gamma(tile, self.first[position:stop], self.second[position:stop])


def bend(engine: GradientEngine, first: Mapping[str, Tensor], second: Mapping[str, Tensor], form: Form) -> None:
    """Make an engine sketch Adam directions instead of gradients; each row's sketch gets the length of its gradient.

    Args:
        engine: with a projector, not entered.
        first: parameter name -> m, in the parameter's own shape.
        second: parameter name -> v.
        form: ``adam`` or ``adam_diag``.

    Raises:
        StoreError: a parameter has no moments, or of another shape; the first is named.
        ConfigError: the engine was made for the sketch alone.
    """
    refuse_without_norms(engine.norms, "Adam directions")
    for name, block in engine.blocks.items():
        if name not in first or name not in second:
            raise StoreError(
                "there is no Adam state for a parameter", where=name, got=f"moments of {len(first)} parameters",
                expected="moments of every parameter that is measured",
                do="delete the folder warmup of the run and try again, or use --set direction=raw",
            )  # fmt: skip
        m, v = (engine.matrix(name, part[name].to(engine.device, engine.dtype)) for part in (first, second))
        if m.shape != (block.rows, block.cols) or v.shape != m.shape:
            raise StoreError(
                "the Adam state does not fit the parameter", where=name, got=str(tuple(m.shape)),
                expected=str((block.rows, block.cols)), do="delete the folder warmup of the run and try again",
            )  # fmt: skip
        block.bend = Bend(m.reshape(-1).contiguous(), v.reshape(-1).contiguous(), form)
    engine.bent = True


def unit_length(sketch: Float[Tensor, "B D"], square: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """Bring sketches of directions to the lengths of the gradients, so that a store keeps them as unit sketches.

    Args:
        sketch: [B, D].
        square: float64 [B] squared gradient norms; 0 leaves zeros.

    Returns:
        [B, D].
    """
    length = torch.linalg.vector_norm(sketch, dim=1).double()
    factor = torch.where(length > 0, square.clamp_min(0).sqrt() / length.clamp_min(1e-300), torch.zeros_like(length))
    return sketch * factor.to(sketch.dtype)[:, None]


def measure_bent(
    block: Block, linear: Sequence[Outer | Dense], looked_up: Sequence[Scatter], totals: Totals
) -> Squares:
    """Add a parameter's dots and squared norms of the gradient, and the sketch of its Adam direction.

    Args:
        block: a parameter with ``bend``.
        linear: outer products and dense parts that flowed into it.
        looked_up: scattered parts.
        totals: running totals, changed in place.

    Returns:
        Squared norms of the linear and of the looked-up part, apart.
    """
    size = totals.square.shape[0]
    squares = Squares(torch.zeros_like(totals.square), torch.zeros_like(totals.square))
    if not looked_up and all(isinstance(p, Dense) or (p.starts is None and fits_whole(p, block)) for p in linear):
        parts = [p.g if isinstance(p, Dense) else torch.bmm(p.g.transpose(1, 2), p.x).flatten(1) for p in linear]
        whole = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        _add(block, slice(0, size), 0, whole, None, totals, squares)
        return squares
    height = max(1, min(block.rows, TILE // block.cols))
    for b in range(size):
        strip = dense_strips(block, linear, looked_up, b)
        for low in range(0, block.rows, height):
            flat, found = strip(low, min(block.rows, low + height))
            _add(block, slice(b, b + 1), low, flat, found, totals, squares)
    return squares


def fits_whole(outer: Outer, block: Block) -> bool:
    """Tell whether the gradients of a whole batch fit one buffer.

    Args:
        outer: a padded batch's outer products.
        block: the parameter.

    Returns:
        Whether B times rows times cols is within eight tiles.
    """
    return outer.x.shape[0] * block.numel <= CHUNK * TILE


def dense_strips(
    block: Block, linear: Sequence[Outer | Dense], looked_up: Sequence[Scatter], b: int
) -> Callable[[int, int], tuple[Tensor, Tensor | None]]:
    """Form one row's dense gradient in strips of whole matrix rows.

    Args:
        block: the parameter.
        linear: outer products and dense parts that flowed into it.
        looked_up: scattered parts.
        b: which row of the batch.

    Returns:
        A function of a strip's first matrix row and the one behind its last, which gives the linear and the looked-up
        part, [1, strip] each; None where nothing is looked up.
    """
    outers = [part.row(b) for part in linear if isinstance(part, Outer)]
    denses = [part.g[b].view(block.rows, block.cols) for part in linear if isinstance(part, Dense)]
    ids, summed = sum_repeated(looked_up, b) if looked_up else (None, None)
    like = next(t for t in (*(g for _, g in outers), *denses, summed) if t is not None)

    def strip(low: int, high: int) -> tuple[Tensor, Tensor | None]:
        flat = like.new_zeros(high - low, block.cols)
        for x, g in outers:
            flat += g[:, low:high].t() @ x
        for g in denses:
            flat += g[low:high]
        if ids is None or summed is None:
            return flat.view(1, -1), None
        found = torch.zeros_like(flat)
        inside = (ids >= low) & (ids < high)
        found[ids[inside] - low] = summed[inside]
        return flat.view(1, -1), found.view(1, -1)

    return strip


def _add(
    block: Block, rows: slice, low: int, flat: Tensor, found: Tensor | None, totals: Totals, squares: Squares
) -> None:
    """Add a strip of some rows' gradients: squares and dots as they are, the sketch bent."""
    squares.linear[rows] += flat.double().square().sum(1)
    if found is not None:
        squares.looked_up[rows] += found.double().square().sum(1)
        flat = flat + found
    position = low * block.cols
    totals.square[rows] += flat.double().square().sum(1)
    if block.directions is not None:
        totals.dots[rows] += torch.mm(flat, block.directions[:, position : position + flat.shape[1]].t()).double()
    if totals.sketch is not None and block.bend is not None:
        add_rows_(totals.sketch[rows], block.bend(flat, position).contiguous(), low, block.cells)
