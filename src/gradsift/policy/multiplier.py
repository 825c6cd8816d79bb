"""Prices of the constraints: dual ascent as published (``paper``) or controlled by proportion and integral (``pi``).

Both act on the relative violation (J_C - limit) / abs(limit) of each source, so that limits of any size and sign weigh
alike; the state is a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from gradsift.errors import ConfigError, NumericsError

BETA_1, BETA_2, ADAM_EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class MultiplierConfig:
    """How prices follow violations.

    Args:
        dual: ``pi`` (ours, after the trial in ecosystem.md) or ``paper`` (PPO-Lagrangian's projected ascent by Adam).
        start: price of every source before the first epoch, >= 0.
        cap: largest price, > 0; a price that stays there says that the limit is out of reach.
        lr: step of ``paper``; Adam makes the first step exactly this long.
        proportional: price per unit of smoothed violation of ``pi``.
        integral: price per epoch and unit of violation of ``pi``.
        smoothing: share of the old smoothed violation that ``pi`` keeps, in [0, 1).

    Raises:
        ConfigError: a setting out of range.
    """

    dual: Literal["pi", "paper"] = "pi"
    start: float = 0.001
    cap: float = 20.0
    lr: float = 0.035
    proportional: float = 5.0
    integral: float = 0.1
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        if self.dual not in ("pi", "paper"):
            raise ConfigError("unknown rule for the multiplier", got=self.dual, expected="pi or paper")
        fits = {
            "cap": 0 < self.cap < np.inf,
            "start": 0 <= self.start <= self.cap,
            "lr": 0 < self.lr < np.inf,
            "proportional": 0 <= self.proportional < np.inf,
            "integral": 0 < self.integral < np.inf,
            "smoothing": 0 <= self.smoothing < 1,
        }
        for name, fine in fits.items():
            if not fine:
                raise ConfigError("a setting of the multiplier is out of range", where=name, got=getattr(self, name),
                                  expected="start in [0, cap], smoothing in [0, 1), proportional >= 0, the rest > 0")  # fmt: skip


@dataclass(frozen=True)
class MultiplierState:
    """Prices and what they follow from.

    Args:
        price: float64 [M] the multipliers, in [0, cap].
        integral: float64 [M] accumulated part of ``pi``, in [0, cap].
        smooth: float64 [M] smoothed relative violation of ``pi``.
        first: float64 [M] Adam's first moment, for ``paper``.
        second: float64 [M] Adam's second moment, for ``paper``.
        num_steps: epochs seen.
    """

    price: Float[np.ndarray, " M"]
    integral: Float[np.ndarray, " M"]
    smooth: Float[np.ndarray, " M"]
    first: Float[np.ndarray, " M"]
    second: Float[np.ndarray, " M"]
    num_steps: int


def start_multiplier(num_sources: int, config: MultiplierConfig) -> MultiplierState:
    """Prices before the first epoch.

    Args:
        num_sources: M.
        config: the rule.

    Returns:
        The state.
    """
    nothing = np.zeros(num_sources)
    start = np.full(num_sources, config.start)
    return MultiplierState(start, start.copy(), nothing, nothing.copy(), nothing.copy(), 0)


def violation(cost: Float[np.ndarray, "*E M"], limits: Float[np.ndarray, " M"]) -> Float[np.ndarray, "*E M"]:
    """Relative violation (J_C - limit) / abs(limit): J_C / limit - 1 for positive limits (ogs.md 2.11; sign ours).

    Args:
        cost: rises of the sources' losses over episodes, in nats.
        limits: allowed rises, in nats, of any sign.

    Returns:
        Positive where a limit is broken.

    Raises:
        ConfigError: a limit is 0 or not finite, so that nothing can be measured in its unit.
    """
    if not (np.isfinite(limits).all() and np.all(limits != 0)):
        raise ConfigError("a limit must be finite and not 0", where="limits", got=limits.tolist(),
                          expected="nats, of any sign", do="for no rise at all give a small one, such as 0.001")  # fmt: skip
    return (cost - limits) / np.abs(limits)


def update_multiplier(
    state: MultiplierState, cost: Float[np.ndarray, " M"], limits: Float[np.ndarray, " M"], config: MultiplierConfig
) -> MultiplierState:
    """Move the prices after one epoch.

    ``paper``: lambda <- clip(lambda + Adam(violation), 0, cap) (PPO-Lagrangian; ogs.md 2.11). ``pi`` (ours, in the form
    of Stooke et al. 2007.03964): lambda = clip(Kp smoothed + integral, 0, cap); the integral takes at most Ki per epoch,
    stays in [0, cap] and does not grow while the price is at its cap, or it would need as long to come down again.

    Args:
        state: prices now.
        cost: mean rise of each source over the epoch's episodes, in nats.
        limits: allowed rises, in nats.
        config: the rule.

    Returns:
        The next state.

    Raises:
        NumericsError: a cost is not finite.
    """
    if not np.isfinite(cost).all():
        raise NumericsError("the cost of the episodes is not finite", where="multiplier", got=cost.tolist())
    over, step = violation(cost, limits), state.num_steps + 1
    if config.dual == "paper":
        first = BETA_1 * state.first + (1 - BETA_1) * over
        second = BETA_2 * state.second + (1 - BETA_2) * over**2
        scale = np.sqrt(second / (1 - BETA_2**step)) + ADAM_EPSILON
        moved = state.price + config.lr * first / (1 - BETA_1**step) / scale
        return MultiplierState(np.clip(moved, 0, config.cap), state.integral, state.smooth, first, second, step)
    smooth = over if step == 1 else config.smoothing * state.smooth + (1 - config.smoothing) * over
    grown = np.clip(state.integral + config.integral * np.clip(over, -1, 1), 0, config.cap)
    stuck = (config.proportional * smooth + grown > config.cap) & (over > 0)
    integral = np.where(stuck, state.integral, grown)
    price = np.clip(config.proportional * smooth + integral, 0, config.cap)
    return MultiplierState(price, integral, smooth, state.first, state.second, step)
