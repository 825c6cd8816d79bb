"""The plane of general against domain ability: Pareto front and hypervolume, both coordinates maximized.

A learning rate alone moves a method along its front, so arms are compared by the area that their whole sweep dominates.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import ConfigError, NumericsError

ACCURACY_REFERENCE: Final = (0.0, 0.0)
"""Reference of (general accuracy, domain accuracy): nothing right."""
LOSS_REFERENCE: Final = (0.0, -1.0)
"""Reference of (gain, -forgetting) in nats per trained token: no gain, one nat forgotten."""


def accuracy_points(general: Float[np.ndarray, " n"], domain: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    """Put accuracies into the plane; the reference is ``ACCURACY_REFERENCE`` (ours).

    Args:
        general: accuracies on what must be kept, in [0, 1].
        domain: accuracies on what must be learned, in [0, 1], of the same n checkpoints.

    Returns:
        Points (general, domain), [n, 2].

    Raises:
        ConfigError: different lengths.
        NumericsError: an accuracy is NaN or infinite.
    """
    return _points(_pairs(general, domain))


def loss_points(gain: Float[np.ndarray, " n"], forgetting: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    """Put loss differences into the plane; the reference is ``LOSS_REFERENCE`` (ours).

    Args:
        gain: domain loss before minus after, nats per trained token; positive is good.
        forgetting: general loss after minus before, nats per trained token; positive is bad.

    Returns:
        Points (gain, -forgetting), [n, 2].

    Raises:
        ConfigError: different lengths.
        NumericsError: a loss difference is NaN or infinite.
    """
    return _points(_pairs(gain, -np.asarray(forgetting, dtype=np.float64)))


def pareto_front(points: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, " front"]:
    """Find the points that no other point dominates (at least as good in both coordinates, better in one).

    Args:
        points: [n, 2], both coordinates maximized.

    Returns:
        Their indices by rising first coordinate; of equal points only the smallest index.

    Raises:
        ConfigError: not [n, 2].
        NumericsError: a coordinate is NaN or infinite.
    """
    array = _points(points)
    order = np.lexsort((np.arange(len(array)), -array[:, 1], -array[:, 0]))  # last key first: x falling, y falling
    second = array[order, 1]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(second)[:-1]])[: len(second)]
    return order[second > best_before][::-1]


def hypervolume_2d(points: Float[np.ndarray, "n 2"], reference: tuple[float, float]) -> float:
    """Area that the points dominate above a reference (the S-metric of Zitzler and Thiele 1998), by an exact sweep.

    A point below the reference in a coordinate is moved up to it, so it contributes nothing; ``num_outside`` counts
    them. Hypervolumes compare only under one reference.

    Args:
        points: [n, 2], both coordinates maximized; n = 0 gives 0.
        reference: lower-left corner.

    Returns:
        The area, >= 0, in the product of the coordinates' units.

    Raises:
        ConfigError: not [n, 2].
        NumericsError: a coordinate is NaN or infinite.
    """
    inside = np.maximum(_points(points) - _corner(reference), 0.0)
    front = inside[pareto_front(inside)]
    widths = np.diff(front[:, 0], prepend=0.0)
    return float((widths * front[:, 1]).sum())


def num_outside(points: Float[np.ndarray, "n 2"], reference: tuple[float, float]) -> int:
    """Count the points that add nothing because they do not exceed the reference in both coordinates.

    Args:
        points: [n, 2].
        reference: lower-left corner.

    Returns:
        How many of the n points; when all are outside, no hypervolume is defined for the arm and 0 says only that.

    Raises:
        ConfigError: not [n, 2].
        NumericsError: a coordinate is NaN or infinite.
    """
    above = np.minimum(*(_points(points) - _corner(reference)).T)
    return int((above <= 0).sum())


def _pairs(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n 2"]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ConfigError("the two coordinates differ in length", got=f"{a.shape} and {b.shape}", expected="[n] both")
    return np.stack([a, b], axis=1)


def _points(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ConfigError("points of a plane have two coordinates", got=f"shape {array.shape}", expected="[n, 2]")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise NumericsError(
            f"{len(bad)} points have a coordinate that is no finite number",
            where=f"point {bad[0]}",
            got=tuple(array[bad[0]].tolist()),
            do="leave the run out of every arm and say so: a diverged run has no place in the plane",
        )
    return array


def _corner(reference: tuple[float, float]) -> Float[np.ndarray, " 2"]:
    return _points(np.asarray(reference, dtype=np.float64).reshape(1, -1))[0]
