"""What the search for a schedule is given and what it gives: the navigator as it may be known, settings, the outcome (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import ConfigError
from gradsift.policy.accept import Settled
from gradsift.policy.calibration import Rollout
from gradsift.policy.contest import LEARNED, Tried
from gradsift.policy.episodes import Dynamics
from gradsift.policy.multiplier import MultiplierConfig
from gradsift.policy.plan import Effects
from gradsift.policy.ppo_lagrangian import PPOConfig, Trained

CONFIRMED = ("uniform", "best_single", "ogs_dual_clusters", "ogs_dual_tightened", "ogs_dual_priced", LEARNED)


class Learner(Protocol):
    """The navigator, as far as a policy may know it."""

    dynamics: Dynamics

    def start(self, rows_per_decision: int) -> None:
        """Prepare; called once, before anything else is asked.

        Args:
            rows_per_decision: rows of a full decision.
        """
        ...

    def roll(self, rows: Int[np.ndarray, "T b"], name: str) -> Rollout:
        """Train a fresh copy on a schedule and measure it after every decision.

        Args:
            rows: row numbers, ``NO_ROW`` where there is none.
            name: what is played.

        Returns:
            The losses.
        """
        ...

    def load(self, name: str) -> Mapping[str, np.ndarray] | None:
        """Give back what :meth:`save` was handed under a name.

        Args:
            name: of the state.

        Returns:
            The arrays, or None where there is nothing.
        """
        ...

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a state of the training, so that a stopped run goes on from it.

        Args:
            name: of the state.
            arrays: what it consists of.
        """
        ...


@dataclass(frozen=True)
class LearnConfig:
    """Settings.

    Args:
        allowed_rise: allowed rise of each source's loss over an episode, as a share of its loss at the start.
        allowed_nats: the same in nats, for sources whose loss at the start is next to nothing; instead of the share.
        rows_per_decision: rows that one decision trains on; None for a tenth of the budget.
        on: ``simulator``, or ``navigator`` to train the policy on real roll-outs (many of them).
        confirmed: policies that are played on the navigator, if they are there; the others are simulated only.
        num_confirmed: real roll-outs of each of them; the first is the list that would be trained on.
        num_simulated: simulated episodes of every policy.
        infeasible: ``stop`` refuses limits that nothing keeps, ``least`` goes on with what breaks them least.
        ppo: settings of the training.

    Raises:
        ConfigError: a setting out of range.
    """

    allowed_rise: float = 0.01
    allowed_nats: float | None = None
    rows_per_decision: int | None = None
    on: Literal["simulator", "navigator"] = "simulator"
    confirmed: tuple[str, ...] = CONFIRMED
    num_confirmed: int = 2
    num_simulated: int = 16
    infeasible: Literal["stop", "least"] = "stop"
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(multiplier=MultiplierConfig()))

    def __post_init__(self) -> None:
        if not 0 < self.allowed_rise < np.inf:
            raise ConfigError("the allowed rise is out of range", where="allowed_rise", got=self.allowed_rise,
                              expected="above 0 and finite: a share of the loss at the start")  # fmt: skip
        for name in ("num_confirmed", "num_simulated", "rows_per_decision"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError("a count is out of range", where=name, got=value, expected=">= 1")


@dataclass(frozen=True)
class Schedule:
    """What was decided, and how.

    Args:
        policy: whose list it is.
        actions: int64 [T] clusters in order.
        rows: int64 [T, b] row numbers, ``NO_ROW`` where there is none.
        feasible: its real roll-outs keep every limit, within one standard error of their mean.
        limits: float64 [M] allowed rises in nats.
        start: float64 [M+1] losses at the starting weights, the target's last.
        tried: every policy with its simulated and real figures.
        settled: calibration and validation of the simulator.
        trained: the learned policy, or None where none could be trained.
        notes: what a report must say.
        effects: [K] and [K, M] effects of a decision, regressed on all roll-outs, or the simulator's where they are few.
    """

    policy: str
    actions: Int[np.ndarray, " T"]
    rows: Int[np.ndarray, "T b"]
    feasible: bool
    limits: Float[np.ndarray, " M"]
    start: Float[np.ndarray, " A"]
    tried: tuple[Tried, ...]
    settled: Settled
    trained: Trained | None
    notes: tuple[str, ...]
    effects: Effects
