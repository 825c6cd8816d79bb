"""Kept subspaces of gradient surgery: OGD's basis of directions and GPM's input subspaces, as values and pure functions.

Both are two-sided: the helpful part of a gradient inside the subspace is removed with the harmful one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.train.surgery import dot, vanishes

Compress = Literal["svd", "oldest"]
DEPENDENT = 1e-4  # below this share of a direction's length, float32 cannot tell the rest from rounding


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis of kept directions, with the coordinates of the directions it was made from.

    Args:
        vectors: [r, P] orthonormal rows (the columns of V).
        coordinates: float64 [n, r]; row i holds the i-th direction, d_i = sum_j c_ij v_j. A basis alone has no order of
            importance; these few numbers give it one, without keeping the directions.
    """

    vectors: Float[Tensor, "r P"]
    coordinates: Float[np.ndarray, "n r"]

    @property
    def size(self) -> int:
        """Number of kept directions, r."""
        return len(self.vectors)


def empty_basis(num_parameters: int, like: Tensor) -> Basis:
    """Make a basis of nothing.

    Args:
        num_parameters: P.
        like: gives dtype and device.

    Returns:
        A basis of size 0.
    """
    return Basis(like.new_zeros((0, num_parameters)), np.zeros((0, 0)))


def extend(basis: Basis, direction: Float[Tensor, " P"]) -> Basis:
    """Take a direction into the basis by Gram-Schmidt, twice over for float32 (OGD, arXiv 1910.07104, alg. 1).

    Args:
        basis: what is kept so far.
        direction: finite and not zero.

    Returns:
        A basis whose span contains the direction; of the same size where it did before.
    """
    length = math.sqrt(dot(direction, direction))
    rest, along = direction / length, np.zeros(basis.size)
    for _ in range(2):  # the classical form, twice: as orthogonal as the modified one, and one product instead of r
        part = basis.vectors @ rest
        along += part.double().cpu().numpy()
        rest = rest - basis.vectors.T @ part
    left = math.sqrt(dot(rest, rest))
    if left <= DEPENDENT:
        return Basis(basis.vectors, np.vstack([basis.coordinates, along * length]))
    vectors = torch.cat([basis.vectors, (rest / left)[None]])
    wider = np.pad(basis.coordinates, ((0, 0), (0, 1)))
    return Basis(vectors, np.vstack([wider, np.append(along, left) * length]))


def compress(basis: Basis, r_max: int, how: Compress = "svd") -> Basis:
    """Shrink a basis to at most r_max directions (ours; the paper has no limit).

    Args:
        basis: what is kept.
        r_max: directions to keep, >= 1.
        how: ``svd`` keeps the r_max leading right singular vectors of the directions that were taken in, ``oldest``
            drops the basis vectors that came first.

    Returns:
        The same basis where it is small enough.
    """
    if basis.size <= r_max:
        return basis
    if how == "oldest":
        return Basis(basis.vectors[-r_max:].clone(), basis.coordinates[:, -r_max:])
    _, values, right = np.linalg.svd(basis.coordinates, full_matrices=False)
    turn = torch.from_numpy(right[:r_max]).to(basis.vectors)
    return Basis(turn @ basis.vectors, np.diag(values[:r_max]))


def ogd(g: Float[Tensor, " P"], basis: Basis) -> Float[Tensor, " P"]:
    """OGD (arXiv 1910.07104, alg. 1): z = g - V V'g, always.

    Args:
        g: gradient of the step.
        basis: kept directions; g itself is returned where there are none.

    Returns:
        z with V'z = 0; exact zeros where nothing is left.
    """
    if basis.size == 0:
        return g
    z = g
    for _ in range(2):  # one pass leaves rounding of the size of g, not of z
        z = z - basis.vectors.T @ (basis.vectors @ z)
    return torch.zeros_like(g) if vanishes(z, g) else z


def energy_rank(singular: Float[np.ndarray, " d"], energy: float) -> int:
    """How many leading directions hold a share of the energy (GPM, arXiv 2103.09762, eq. 5).

    Args:
        singular: singular values, descending, not all zero.
        energy: share of the sum of squares, in (0, 1].

    Returns:
        The least k with sum of the first k squares >= energy times the sum of all.
    """
    share = np.cumsum(np.square(singular)) / np.square(singular).sum()
    return int(np.searchsorted(share, energy - 1e-12) + 1)


def input_subspace(moment: Float[Tensor, "d d"], energy: float) -> Float[Tensor, "d r"]:
    """Leading directions of a layer's inputs, from their summed outer products X'X.

    Args:
        moment: float64 X'X, sum over positions of x x'.
        energy: share of the energy to keep, in (0, 1].

    Returns:
        float64 [d, r] orthonormal columns U; [d, 0] for inputs that were all zero.
    """
    values, vectors = torch.linalg.eigh(moment)
    singular = values.clamp(min=0).sqrt().flip(0).cpu().numpy()
    if not singular.any():
        return vectors[:, :0]
    return vectors.flip(1)[:, : energy_rank(singular, energy)]


def gpm(g: Float[Tensor, "o d"], subspace: Float[Tensor, "d r"]) -> Float[Tensor, "o d"]:
    """GPM (arXiv 2103.09762, eq. 6): G - G U U', input dimension last.

    Args:
        g: gradient of a layer's weight, [out, in].
        subspace: U, orthonormal columns.

    Returns:
        G with G U = 0; g itself where the subspace is empty.
    """
    if subspace.shape[1] == 0:
        return g
    wide = g.double()
    basis = subspace.to(wide)
    z = wide - (wide @ basis) @ basis.T
    # Not "vanishes" per layer: a layer may rightly have nothing left while others move.
    return z.to(g.dtype)
