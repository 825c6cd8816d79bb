"""Rules of online gradient surgery: pure functions from a step's gradient and reference gradients to a new gradient.

A rule that finds nothing to do returns the very tensor it was given, so "unchanged" can be told by identity and is bitwise.
Dots are summed in float64, whatever the tensors hold: the branch of a rule must not hang on rounding. P parameters, M
references. Subspace rules (OGD, GPM) are in :mod:`gradsift.train.surgery_subspace`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.errors import NumericsError

CHUNK = 1 << 22  # a float64 copy of a whole gradient would double the memory of the step
ROUNDS = 4  # proximal rounds of the GEM dual; the error shrinks by eps / (eps + least eigenvalue) in each
Combine = Literal["sum", "mean"]
OgpsaMode = Literal["orthogonal_projection", "threshold"]


def dot(a: Float[Tensor, " P"], b: Float[Tensor, " P"]) -> float:
    """Dot product summed in float64.

    Args:
        a: a vector.
        b: another.

    Returns:
        <a, b>.
    """
    pairs = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    parts = [torch.dot(x.double(), y.double()) for x, y in pairs]
    return float(torch.stack(parts).sum()) if parts else 0.0


def dots(references: Float[Tensor, "M P"], g: Float[Tensor, " P"]) -> Float[np.ndarray, " M"]:
    """Dot of every reference with a vector.

    Args:
        references: M vectors.
        g: a vector.

    Returns:
        float64 [M].
    """
    return np.array([dot(row, g) for row in references])


def gram_matrix(references: Float[Tensor, "M P"]) -> Float[np.ndarray, "M M"]:
    """Dots of all pairs of references, G G'.

    Args:
        references: M vectors.

    Returns:
        float64 [M, M], symmetric.
    """
    size = len(references)
    gram = np.zeros((size, size))
    for i in range(size):
        for j in range(i, size):
            gram[i, j] = gram[j, i] = dot(references[i], references[j])
    return gram


def vanishes(z: Float[Tensor, " P"], g: Float[Tensor, " P"]) -> bool:
    """Tell whether what a rule left of a gradient is only rounding.

    Args:
        z: what is left.
        g: what it was.

    Returns:
        True where |z| <= 16 eps |g|, eps that of the tensors' dtype.
    """
    return math.sqrt(dot(z, z)) <= 16 * torch.finfo(g.dtype).eps * math.sqrt(dot(g, g))


def agem(g: Float[Tensor, " P"], reference: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """A-GEM (arXiv 1812.00420, eq. 11): if <g, r> < 0, z = g - (<g, r> / <r, r>) r, else g itself.

    Args:
        g: gradient of the step.
        reference: r, finite and not zero; with several sources the mean of their gradients.

    Returns:
        The nearest vector that does not oppose the reference; exact zeros where g is opposite to it.
    """
    against = dot(g, reference)
    if against >= 0:
        return g
    length, z = dot(reference, reference), g
    for _ in range(2):  # the second pass takes away what rounding left, which matters where z is much shorter than g
        z = z - (against / length) * reference
        if vanishes(z, g):
            return torch.zeros_like(g)
        against = dot(z, reference)
        if against >= 0:
            break
    return z


def gem_dual(
    gram: Float[np.ndarray, "M M"],
    against: Float[np.ndarray, " M"],
    *,
    eps: float,
    lower: Float[np.ndarray, " M"] | float = 0.0,
) -> Float[np.ndarray, " M"]:
    """Solve GEM's dual once: min_v 1/2 v'(K + eps I)v + d'v with v >= lower (arXiv 1706.08840, eq. 11).

    With v = w + lower and K + eps I = LL' it is the non-negative least-squares problem |L'w + L^-1 q|, which the
    active-set method of Lawson and Hanson solves exactly.

    Args:
        gram: K, dots of the references.
        against: d, dots of the references with the gradient.
        eps: added to the diagonal, absolute.
        lower: bound on v, one number or one per reference.

    Returns:
        float64 [M] multipliers v.

    Raises:
        NumericsError: the matrix is not positive definite, or the solver does not end.
    """
    matrix = gram + eps * np.eye(len(gram))
    bound = np.broadcast_to(np.asarray(lower, dtype=np.float64), against.shape)
    try:
        factor = np.linalg.cholesky(matrix)
        right = scipy.linalg.solve_triangular(factor, matrix @ bound + against, lower=True)
        free, _ = scipy.optimize.nnls(factor.T, -right)
    except (np.linalg.LinAlgError, RuntimeError) as error:
        raise NumericsError(
            "the dual problem of GEM cannot be solved",
            where="step hook gem",
            got=f"{error}; Gram matrix {np.array2string(gram, precision=3)}",
            expected="a positive definite matrix",
            do="raise the hook's eps, or merge sources that are nearly parallel",
        ) from None
    return free + bound


def gem(
    g: Float[Tensor, " P"], references: Float[Tensor, "M P"], *, eps: float = 1e-6, margin: float = 0.0
) -> Float[Tensor, " P"]:
    """GEM (arXiv 1706.08840, eq. 8-11): the nearest z with <z, g_m> >= 0 for all m; g itself if it opposes none.

    References are scaled to length 1 first (ours), so ``eps`` is relative to trace / M and their lengths do not matter.
    The dual is solved in proximal rounds, v <- v + argmin over the step, each from the dots of the z at hand: that takes
    away the violation that eps leaves (one round leaves <z, g_m> = -eps v_m) and the rounding of z.

    Args:
        g: gradient of the step.
        references: M gradients, finite and none of them zero.
        eps: diagonal term relative to the mean diagonal.
        margin: lower bound on the multipliers of the *unscaled* references, >= 0 (``memory_strength``).

    Returns:
        z = g + G'v; exact zeros where nothing is left.
    """
    against = dots(references, g)
    if (against >= 0).all():
        return g
    norms = np.array([math.sqrt(dot(row, row)) for row in references])
    gram = gram_matrix(references) / np.outer(norms, norms)
    floor, v, z = margin * norms, np.zeros(len(norms)), g
    for _ in range(ROUNDS):
        change = gem_dual(gram, dots(references, z) / norms, eps=eps, lower=floor - v)
        v = v + change
        z = _add(z, references, change / norms)
        if vanishes(z, g):
            return torch.zeros_like(g)
        if np.abs(change).max() <= 1e-12 * max(np.abs(v).max(), 1e-300):
            break
    return z


def pcgrad_coefficients(gram: Float[np.ndarray, "K K"], orders: Sequence[Sequence[int]]) -> Float[np.ndarray, "K K"]:
    """PCGrad (arXiv 2001.06782, alg. 1) in coordinates: g_i' = sum_k C_ik g_k, from the tasks' dots alone.

    For each task i, over the others j in the given order: if <g_i', g_j> < 0, g_i' -= (<g_i', g_j> / |g_j|^2) g_j, with
    the original g_j.

    Args:
        gram: dots of the K tasks' gradients.
        orders: for each task, the other tasks in the order they are met.

    Returns:
        float64 [K, K] coefficients C; the identity where no pair conflicts. A task of length 0 is skipped.
    """
    coefficients = np.eye(len(gram))
    for i, order in enumerate(orders):
        for j in order:
            against = coefficients[i] @ gram[:, j]
            if against < 0 and gram[j, j] > 0:
                coefficients[i, j] -= against / gram[j, j]
    return coefficients


def pcgrad(
    tasks: Float[Tensor, "K P"], coefficients: Float[np.ndarray, "K K"], *, combine: Combine = "sum"
) -> Float[Tensor, " P"]:
    """Combine the tasks' gradients after PCGrad's surgery; unlike A-GEM it applies the references too.

    Args:
        tasks: K gradients, the training step's first.
        coefficients: from :func:`pcgrad_coefficients`.
        combine: sum as in the paper, or mean as in a well-known port (it divides the step by K).

    Returns:
        The sum or mean of the changed gradients.
    """
    weights = coefficients.sum(axis=0)
    if combine == "mean":
        weights = weights / len(tasks)
    return _add(torch.zeros_like(tasks[0]), tasks, weights)


def ogpsa(
    g: Float[Tensor, " P"],
    references: Float[Tensor, "M P"],
    *,
    mode: OgpsaMode = "orthogonal_projection",
    base_scale: float = 1.0,
) -> Float[Tensor, " P"]:
    """OGPSA (arXiv 2602.07892; rule read from the released code) on one tensor, flattened.

    ``orthogonal_projection`` removes the span of the references always. ``threshold`` removes the span of those that g
    opposes, and scales a tensor that opposes none by ``base_scale``; that several references are treated so is ours.

    Args:
        g: the tensor's gradient.
        references: its part of M reference gradients; those of length 0 have no direction and are passed over.
        mode: see above.
        base_scale: factor for tensors in the references' direction, > 0; used by ``threshold`` only.

    Returns:
        The changed gradient; g itself where nothing is to be done.
    """
    against = dots(references, g)
    live = [m for m, row in enumerate(references) if bool(row.any())]
    chosen = [m for m in live if against[m] < 0] if mode == "threshold" else live
    if not chosen:
        return g if mode != "threshold" or base_scale == 1.0 or not live else g * base_scale
    z = g
    for _ in range(2):  # twice, for the same reason as in agem
        for unit in _gram_schmidt(references[chosen]):
            z = z - dot(z, unit) * unit
    return torch.zeros_like(g) if vanishes(z, g) else z


def _add(g: Tensor, references: Tensor, weights: Float[np.ndarray, " M"]) -> Tensor:
    """Return g + sum_m w_m r_m, term by term, so that a weight of 0 leaves every bit alone."""
    z = g
    for weight, row in zip(weights, references, strict=True):
        if weight != 0:
            z = z + float(weight) * row
    return z


def _gram_schmidt(vectors: Float[Tensor, "M P"]) -> list[Tensor]:
    """Orthonormal vectors of the same span; what lies in the span of those before it is left out."""
    units: list[Tensor] = []
    for vector in vectors:
        rest = vector / math.sqrt(dot(vector, vector))
        for _ in range(2):
            for unit in units:
                rest = rest - dot(rest, unit) * unit
        length = math.sqrt(dot(rest, rest))
        if length > 1e-5:
            units.append(rest / length)
    return units
