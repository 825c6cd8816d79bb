"""How much a task can still improve: an exponential fitted to its losses, read one round ahead.

Source: the loss-trajectory potential of DIDS (arXiv 2504.13227); the bounded form is ours. The release leaves the fit
unbounded, reads it six rounds ahead and puts 1 nat where the history is short, which swamps real gains of about 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MIN_POINTS = 5
CAP = 3.0  # times the median recent gain
RECENT = 5


@dataclass(frozen=True)
class Curve:
    """L(x) = a exp(-b x) + c.

    Args:
        a: height above the floor, >= 0.
        b: rate per round, >= 0.
        c: floor, >= 0.
    """

    a: float
    b: float
    c: float

    def at(self, x: float) -> float:
        """Read the curve at round ``x``."""
        return self.a * float(np.exp(-self.b * x)) + self.c


@dataclass(frozen=True)
class Potential:
    """What a task may still gain.

    Args:
        value: nats, >= 0.
        failed: the fit failed, and 0 stands for it.
    """

    value: float
    failed: bool = False


def fit_curve(losses: Float[np.ndarray, " t"]) -> Curve | None:
    """Fit the curve to losses after rounds 0, 1, ..., t - 1 by least squares with a, b, c >= 0.

    Args:
        losses: float64 [t] nats, t >= 3.

    Returns:
        The curve, or None where the fit did not converge.
    """
    from scipy.optimize import least_squares

    x = np.arange(len(losses), dtype=np.float64)
    start = np.maximum([losses[0] - losses[-1], 0.1, losses[-1]], 1e-9)
    found = least_squares(
        lambda v: v[0] * np.exp(-v[1] * x) + v[2] - losses,
        start,
        jac=lambda v: np.stack([np.exp(-v[1] * x), -v[0] * x * np.exp(-v[1] * x), np.ones_like(x)], axis=1),  # pyright: ignore[reportArgumentType]
        bounds=(0.0, np.inf),
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
        max_nfev=2000,
    )
    return Curve(*(float(v) for v in found.x)) if found.success and np.isfinite(found.x).all() else None


def potential(losses: Float[np.ndarray, " t"], horizon: int = 1) -> Potential:
    """Say how far a task's loss is expected to fall within the next rounds.

    Args:
        losses: float64 [t] nats after rounds 0 .. t - 1.
        horizon: rounds past the last point.

    Returns:
        L_last - L(t - 1 + horizon), clipped to [0, 3 times the median of the last five gains]; 0 with fewer than five
        points or where the fit fails.
    """
    if len(losses) < MIN_POINTS:
        return Potential(0.0)
    curve = fit_curve(losses)
    if curve is None:
        return Potential(0.0, failed=True)
    recent = float(np.median(-np.diff(losses)[-RECENT:]))
    rest = float(losses[-1]) - curve.at(len(losses) - 1 + horizon)
    return Potential(float(np.clip(rest, 0.0, max(0.0, CAP * recent))))
