"""The sign-fold sketch (ours): flip signs, fold rows and columns to a small matrix of cells, fold that to D numbers.

Entry (r, c) of a parameter's gradient, seen as a matrix [rows, cols], is multiplied by ``row_sign[r] * col_sign[c]`` and
belongs to cell (r mod R, c mod C) of a matrix [R, C], whose size depends on the parameter's shape alone
(:func:`cell_shape`). Cell (i, j) is added to bucket ``(offset + i * C + j) mod D``. Signs and offset are functions of
(seed, parameter name, index) alone, by a counter-based generator in 64-bit integer arithmetic, so they have the same bits
on every machine, device and library version.

Rows and columns fold apart, so the sketch of a sum of outer products is that of the folded factors: a linear layer is
sketched without its gradient ever being formed (:mod:`gradsift.gradients.prefold`).

Inner products are unbiased: for entries (a, b) != (c, d) the expectation of the four signs is zero. For gradients U and V
of one parameter their variance is at most about

    (|U|^2 |V|^2 + <U, V>^2) (1/D + 2/(R C)) + 2 |U V'|^2 (1/R - 1/rows) + 2 |U' V|^2 (1/C - 1/cols) .

First term: the hash of a random sign into D buckets, and into R C cells, where an entry's pairs count double. Two entries
in different cells and their "crossed" twins (a, d), (c, b) fall into common buckets together only when 2 (b - d) is a
multiple of D, b and d taken modulo C; an odd prime D > C excludes it, and keeps two cells of one row, or of one column,
apart. (Where C is larger than D, and no multiple of it, this holds for columns closer than D.) Other terms: entries of one
row whose columns differ by a multiple of C share a cell in every row alike, and rows likewise. They vanish without
folding. For gradients of many directions |U V'|^2 is near |U|^2 |V|^2 / rows, small beside 1/D; a gradient that is one
outer product has the full 2/R, which only the average over parameters makes small. Between parameters signs are
independent: 1/D alone counts. docs/decisions/0007-prefold.md has what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import isqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsift.errors import ConfigError
from gradsift.seeds import key64

VERSION = "signfold-2"
CELLS = 1 << 15  # cells of a parameter, at least, unless it has fewer entries: eight times the usual D
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def signs(seed: int, name: str, axis: str, count: int) -> Int[np.ndarray, " n"]:
    """Draw the signs of one axis of a parameter (splitmix64 of a keyed counter; its top bit).

    Args:
        seed: the run's seed.
        name: the parameter's name.
        axis: ``row`` or ``col``.
        count: length of the axis.

    Returns:
        int8 [count] of -1 and +1, the same bits everywhere.
    """
    key = np.uint64(key64(seed, VERSION, name, axis))
    with np.errstate(over="ignore"):
        z = key + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        z = z ^ (z >> np.uint64(31))
    return (1 - 2 * (z >> np.uint64(63)).astype(np.int8)).astype(np.int8)


@cache
def is_prime(n: int) -> bool:
    """Tell whether n is prime, by trial division.

    Args:
        n: an integer.

    Returns:
        True for primes.
    """
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@dataclass(frozen=True)
class Projector:
    """What determines every sketch.

    Args:
        seed: the run's seed.
        dim: D, an odd prime.

    Raises:
        ConfigError: D is no odd prime.
    """

    seed: int
    dim: int = 4093

    def __post_init__(self) -> None:
        if self.dim < 3 or not is_prime(self.dim):
            nearest = next(p for p in range(max(self.dim, 3), 2 * max(self.dim, 3) + 2) if is_prime(p))
            raise ConfigError(
                "the sketch size must be an odd prime",
                where="collect.sketch_dim",
                got=self.dim,
                expected="a prime such as 1021, 2039, 4093 or 8191",
                do=f"use {nearest}",
            )

    def offset(self, name: str) -> int:
        """Give the bucket where a parameter starts.

        Args:
            name: the parameter's name.

        Returns:
            An integer in [0, D).
        """
        return key64(self.seed, VERSION, name, "offset") % self.dim


def cell_shape(rows: int, cols: int) -> tuple[int, int]:
    """Give the size of the matrix of cells that a parameter folds to (ours; measured in docs/decisions/0007-prefold.md).

    Both axes fold to 256 cells or a little more, always a whole number of times and as evenly as possible. Where one axis
    is so short that fewer than ``CELLS`` cells were left, the other stays longer. Vectors and whatever has at most
    ``CELLS`` entries keep every entry. Two kinds of matrix keep their columns, since measured noise asked for it: nearly
    square ones (the output projection of the first attention layer, where many rows share an output gradient), and
    tables of a vocabulary, at least six times as tall as wide, whose rows fold to 2048.

    Args:
        rows: outputs of the parameter, >= 1.
        cols: inputs, >= 1.

    Returns:
        (R, C) with R <= rows and C <= cols.
    """
    if rows == 1 or rows * cols <= CELLS:
        return rows, cols
    side, table = isqrt(2 * CELLS), rows >= 6 * cols
    high = _even(rows, max(8 * side if table else side, CELLS // cols))
    whole = table or max(rows, cols) < 2 * min(rows, cols)
    return high, cols if whole else _even(cols, max(side, CELLS // rows))


def _even(count: int, aim: int) -> int:
    folds = max(1, count // aim)
    return -(-count // folds)


def fold_(sketch: Float[Tensor, "B D"], flat: Float[Tensor, "B n"], start: int) -> None:
    """Add rows of already sign-flipped entries to sketches, in place.

    Args:
        sketch: [B, D], changed in place.
        flat: [B, n] contiguous entries at flat positions start, start + 1, ...
        start: bucket of the first entry (any integer; taken modulo D).
    """
    dim, n = sketch.shape[1], flat.shape[1]
    whole = n // dim
    if whole:
        block = flat[:, : whole * dim].view(flat.shape[0], whole, dim)
        # numpy's reduction reads twice as fast as torch's on a CPU; the sum is the same.
        on_cpu = block.device.type == "cpu"
        folded = torch.from_numpy(np.add.reduce(block.numpy(), axis=1)) if on_cpu else block.sum(1)
        _add_rolled_(sketch, folded, start)
    if n % dim:
        _add_rolled_(sketch, flat[:, whole * dim :], start)


def _add_rolled_(sketch: Float[Tensor, "B D"], part: Float[Tensor, "B n"], start: int) -> None:
    """Add part (n <= D) to consecutive buckets from ``start`` on, wrapping round."""
    dim, n = sketch.shape[1], part.shape[1]
    start %= dim
    head = min(n, dim - start)
    sketch[:, start : start + head] += part[:, :head]
    if head < n:
        sketch[:, : n - head] += part[:, head:]


def sketch_matrix(gradient: Float[Tensor, "rows cols"], projector: Projector, name: str) -> Float[np.ndarray, " D"]:
    """Sketch one parameter's whole gradient at once, by explicit bucket numbers; used by checks, not by the engine.

    Args:
        gradient: [rows, cols]; vectors are given as one row.
        projector: seed and size.
        name: the parameter's name.

    Returns:
        float64 [D].
    """
    rows, cols = gradient.shape
    row_sign = signs(projector.seed, name, "row", rows).astype(np.float64)
    col_sign = signs(projector.seed, name, "col", cols).astype(np.float64)
    flipped = gradient.detach().cpu().double().numpy() * row_sign[:, None] * col_sign
    high, wide = cell_shape(rows, cols)
    cells = np.arange(rows)[:, None] % high * wide + np.arange(cols) % wide
    buckets = (projector.offset(name) + cells.ravel()) % projector.dim
    return np.bincount(buckets, weights=flipped.ravel(), minlength=projector.dim)


def sketch_reference(
    gradient: Float[np.ndarray, "rows cols"], projector: Projector, name: str
) -> Float[np.ndarray, " D"]:
    """Sketch one parameter's gradient entry by entry: the slow, obvious twin of the engine's fold.

    Args:
        gradient: [rows, cols]; vectors are given as one row.
        projector: seed and size.
        name: the parameter's name.

    Returns:
        float64 [D].
    """
    rows, cols = gradient.shape
    row_sign = signs(projector.seed, name, "row", rows).astype(np.float64)
    col_sign = signs(projector.seed, name, "col", cols).astype(np.float64)
    out = np.zeros(projector.dim)
    offset = projector.offset(name)
    high, wide = cell_shape(rows, cols)
    for r in range(rows):
        for c in range(cols):
            out[(offset + (r % high) * wide + c % wide) % projector.dim] += (
                row_sign[r] * col_sign[c] * float(gradient[r, c])
            )
    return out
