"""Checks of the numbers that statistics are made from: finite, paired, in range; refused by name otherwise (ours)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from gradsift.errors import ConfigError, NumericsError

Numbers = np.ndarray | Iterable[float]
"""What the statistics read: any plain list of numbers, or a vector of any number type."""


def finite(values: Numbers, what: str) -> Float[np.ndarray, " n"]:
    """Read numbers as a vector.

    Args:
        values: n >= 1 numbers.
        what: their name in a message.

    Returns:
        float64 [n], finite.

    Raises:
        ConfigError: no number, or more than one axis.
        NumericsError: NaN or infinity.
    """
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ConfigError(f"{what} must be a plain list", got=f"shape {array.shape}", expected="at least one number")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise NumericsError(
            f"{what} hold {len(bad)} values that are no finite number",
            where=f"position {bad[0]}",
            got=array[bad[0]],
            do="leave the run out of every arm and say so, or run it again",
        )
    return array


def paired(a: Numbers, b: Numbers) -> Float[np.ndarray, "2 n"]:
    """Read two vectors that belong together by position.

    Args:
        a: n numbers.
        b: n numbers.

    Returns:
        float64 [2, n], finite.

    Raises:
        ConfigError: different lengths or no number.
        NumericsError: NaN or infinity.
    """
    first, second = finite(a, "the first values"), finite(b, "the second values")
    if len(first) != len(second):
        raise ConfigError(
            "values cannot be paired",
            got=f"{len(first)} and {len(second)}",
            expected="one value per seed and side, in the same order",
            do="run the missing seeds, or compare the seeds that both sides have",
        )
    return np.stack([first, second])


def check_confidence(confidence: float) -> None:
    """Refuse a confidence outside (0, 1).

    Args:
        confidence: share of intervals that should cover the truth.

    Raises:
        ConfigError: it lies outside.
    """
    if not 0 < confidence < 1:
        raise ConfigError("a confidence lies between 0 and 1", got=confidence, expected="0.95, for example")


def at_least(value: int, least: int, what: str) -> None:
    """Refuse a count that is too small.

    Args:
        value: the count.
        least: the smallest that is accepted.
        what: its name in the message.

    Raises:
        ConfigError: value < least.
    """
    if value < least:
        raise ConfigError(f"{what} is too small", got=value, expected=f"at least {least}")
