"""Rows against all protected directions at once: the two-sided subspace form and the one-sided cone form (ogs.md 2.5; ours).

The mathematics is in :mod:`gradsift.geometry.similarity` (``orth_sub``, ``conf_cone``); here the figures stand together, with the
share of a row's energy inside the protected subspace.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gradsift.geometry.similarity import conf_cone, orth_sub

__all__ = ["Protection", "conf_cone", "energy", "orth_sub", "protection"]


@dataclass(frozen=True)
class Protection:
    """What N rows do to M protected directions taken together; NaN for rows of norm 0.

    Args:
        energy: float64 [N] share of |g|^2 inside the protected subspace, in [0, 1] up to the error of the dots.
        orth_sub: float64 [N] 1 minus the share of |g| inside it: 1 leaves every direction alone, help and harm tie.
        conf_cone: float64 [N] share of |g| that a projection onto the cone of harmless steps removes; 0 harms nobody.
    """

    energy: Float[np.ndarray, " N"]
    orth_sub: Float[np.ndarray, " N"]
    conf_cone: Float[np.ndarray, " N"]


def energy(
    dots: Float[np.ndarray, "N M"],
    norms: Float[np.ndarray, " N"],
    gram: Float[np.ndarray, "M M"],
    *,
    share: float = 0.99,
    floor: float = 1e-3,
) -> Float[np.ndarray, " N"]:
    """Share of a row's squared length inside the anchors' leading subspace, |y_i|^2 / |g_i|^2.

    Args:
        dots: [N, M] dots with the unit directions.
        norms: [N] norms of the rows.
        gram: [M, M] dots between the unit directions; may be singular.
        share: leading eigenvalues are kept until they hold this share of the trace,
        floor: as long as they are at least this part of the largest.

    Returns:
        float64 [N] in [0, 1] up to the error of the dots; NaN for rows of norm 0.
    """
    return (1.0 - orth_sub(dots, norms, gram, share=share, floor=floor)) ** 2


def protection(
    dots: Float[np.ndarray, "N M"], norms: Float[np.ndarray, " N"], gram: Float[np.ndarray, "M M"]
) -> Protection:
    """Measure rows against all directions, with the defaults of ogs.md.

    Args:
        dots: [N, M] dots with the unit directions, M >= 1.
        norms: [N] norms of the rows.
        gram: [M, M] dots between the unit directions; may be singular.

    Returns:
        Subspace and cone figures.
    """
    return Protection(energy(dots, norms, gram), orth_sub(dots, norms, gram), conf_cone(dots, norms, gram))
