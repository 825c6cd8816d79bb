"""What online selection is made of: settings, decisions, rescored statistics, and how far the budget carries (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import nn

from gradsift.errors import ConfigError
from gradsift.policy.episodes import Table, Terms
from gradsift.train.parts import Cost

Features = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class OnlineConfig:
    """When is decided and measured.

    Args:
        updates: optimizer steps per decision; the rows of a decision are that many batches.
        rescore_every: optimizer steps after which the next decision sees rescored statistics; 0 for never.
        shuffle: draw the order of rows within a cluster; else as they stand in ``Table.members``.
        seed: of that order and of the policy's draws.
        policy_key: what decides choices beside the policy's name: settings, hash of weights; another one is another run.
    """

    updates: int = 1
    rescore_every: int = 0
    shuffle: bool = False
    seed: int = 42
    policy_key: str = ""

    def __post_init__(self) -> None:
        if self.rescore_every < 0:
            raise ConfigError("a count is out of range", where="rescore_every", got=self.rescore_every, expected=">= 0")


@dataclass(frozen=True)
class Refreshed:
    """Statistics of the clusters at the weights that training has reached.

    Args:
        features: float64 [K, F] in the columns of ``Table.features``.
        cost: of measuring them.
        num_dropped: rows whose loss or gradient was not finite or zero at these weights.
    """

    features: Float[np.ndarray, "K F"]
    cost: Cost
    num_dropped: int = 0


Refresh = Callable[[nn.Module, Table, Sequence[int]], Refreshed]
"""The model in training, the table so far and the row numbers not yet trained on -> statistics."""


@dataclass(frozen=True)
class Decision:
    """What was decided and what was measured after it.

    Args:
        cluster: the choice.
        rows: row numbers, in the order trained on.
        target: target loss after them, in nats per trained token.
        protect: loss of each protected source.
        features: rescored statistics [K][F] that the next decision sees, or None.
    """

    cluster: int
    rows: tuple[int, ...]
    target: float = math.nan
    protect: tuple[float, ...] = ()
    features: Features | None = None


def as_features(lines: Sequence[Sequence[float]] | None) -> Features | None:
    """Freeze statistics that may come from JSON.

    Args:
        lines: [K][F] numbers, or None.

    Returns:
        The same in tuples.
    """
    return None if lines is None else tuple(tuple(float(x) for x in line) for line in lines)


@dataclass(frozen=True)
class Pace:
    """How long training takes. The number of steps is not known before: short decisions make short steps.

    Args:
        spendable: rows or trained tokens that are there and within the budget.
        unit: what a full step costs at the mean price.
        max_steps: an upper bound on the optimizer steps; the budget ends training before.
    """

    spendable: int
    unit: float
    max_steps: int

    @classmethod
    def of(cls, table: Table, terms: Terms, updates: int) -> Pace:
        """Work it out.

        Args:
            table: clusters and prices.
            terms: rows per decision and budget.
            updates: optimizer steps per decision.

        Returns:
            The pace.
        """
        price = np.sort(table.price[[i for some in table.members for i in some]])
        num, width = int((np.cumsum(price) <= terms.budget).sum()), terms.rows_per_decision
        # a decision is short only where its cluster, or the budget for it, ends: once per cluster
        most = num * updates // width + num // width + table.num_clusters + 1
        return cls(min(terms.budget, int(price.sum())), width / updates * float(price.mean()), most)

    @property
    def nominal_steps(self) -> int:
        """Full steps that the budget pays for: the length of the learning-rate schedule, at least 1."""
        return max(1, math.ceil(round(self.spendable / self.unit, 9)))

    def position(self, spent: int) -> int:
        """Say where the schedule stands.

        Args:
            spent: rows or trained tokens.

        Returns:
            Full steps that this amounts to: where all were full and rows have one price, the steps taken.
        """
        return int(spent / self.unit + 1e-9)
