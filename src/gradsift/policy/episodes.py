"""The constrained decision process of OGS (arXiv 2602.06359), many episodes at a time: which cluster feeds the next steps.

The paper's abstract names the process; state, reward, cost and horizon are ours (secondary summaries give their names only).

    state    per cluster: fixed statistics and the share already used; in common: change of each loss since the start,
             share of the budget left, multipliers
    action   a cluster; the next rows of it are trained on, without replacement, in an order drawn per episode
    reward   L_target(t) - L_target(t+1) in nats
    cost_m   L_m(t+1) - L_m(t) in nats, signed, so that the costs of an episode sum to the rise of source m's loss

What a step does to the losses is a :class:`Dynamics`: a simulator, or the navigator in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import ConfigError
from gradsift.seeds import Stream

NO_ROW = -1


@dataclass(frozen=True)
class Losses:
    """Mean losses of the held-out sets, in nats per trained token, one entry per episode.

    Args:
        target: float64 [E] of what is to be learned.
        protect: float64 [E, M] of each protected source.
    """

    target: Float[np.ndarray, " E"]
    protect: Float[np.ndarray, "E M"]


class Dynamics(Protocol):
    """What training on rows does to the held-out losses."""

    sources: tuple[str, ...]
    """M names of protected sources."""

    def reset(self, num: int) -> Losses:
        """Put ``num`` copies of the learner to their starting weights.

        Args:
            num: E, how many episodes run side by side.

        Returns:
            The losses there.
        """
        ...

    def step(self, rows: Int[np.ndarray, "E b"]) -> Losses:
        """Train each copy on some rows.

        Args:
            rows: row numbers; ``NO_ROW`` fills up short batches, and a copy without any row stays as it is.

        Returns:
            The losses after it.
        """
        ...


@dataclass(frozen=True)
class Table:
    """Clusters as the things decided about.

    Args:
        members: K tuples of row numbers, each not empty, no row twice; without shuffling rows are taken in this order.
        price: int64 [N] what each row takes from the budget: 1, or its trained tokens; at least 1.
        features: float64 [K, F] fixed statistics, as measured.
        feature_names: F names.
        general: bool [K] clusters of general rows: choosing one is replay.
    """

    members: tuple[tuple[int, ...], ...]
    price: Int[np.ndarray, " N"]
    features: Float[np.ndarray, "K F"]
    feature_names: tuple[str, ...]
    general: Bool[np.ndarray, " K"]

    def __post_init__(self) -> None:
        everyone = [i for some in self.members for i in some]
        if not all(self.members) or len(everyone) != len(set(everyone)):
            raise ValueError("Table.members must be non-empty and must not share rows")
        if min(everyone, default=0) < 0 or max(everyone, default=-1) >= len(self.price):
            raise ValueError("Table.members must be row numbers below the length of Table.price")
        if self.features.shape != (len(self.members), len(self.feature_names)) or not np.isfinite(self.features).all():
            raise ValueError("Table.features must be finite, one row per cluster and one column per name")
        if len(self.general) != len(self.members) or (self.price < 1).any():
            raise ValueError("Table.general needs one entry per cluster, Table.price numbers of at least 1")

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.members)

    @property
    def sizes(self) -> Int[np.ndarray, " K"]:
        """Rows of each cluster, int64 [K], at least 1."""
        return np.array([len(some) for some in self.members], dtype=np.int64)


@dataclass(frozen=True)
class Terms:
    """What every episode is played under.

    Args:
        rows_per_decision: rows that one decision trains on, at least 1.
        budget: rows or trained tokens of an episode, in the unit of ``Table.price``.
        limits: float64 [M] allowed rise of each source's loss over an episode, in nats; finite, not 0, below 0 where the
            loss has to fall.

    Raises:
        ConfigError: a number is out of its range.
    """

    rows_per_decision: int
    budget: int
    limits: Float[np.ndarray, " M"]

    def __post_init__(self) -> None:
        for name, value in (("rows_per_decision", self.rows_per_decision), ("budget", self.budget)):
            if value < 1:
                raise ConfigError(f"{name} is too small", where="policy", got=value, expected="at least 1")
        if not np.isfinite(self.limits).all() or (self.limits == 0).any():
            raise ConfigError(
                "a limit is the unit its cost is measured in, so it has to be finite and not 0",
                where="policy: limits of the protected sources",
                got=self.limits.tolist(),
                expected="the allowed rise in nats, for example 0.01, or below 0 to demand a fall",
                do="give a small limit instead of 0",
            )


@dataclass(frozen=True)
class Observation:
    """What a policy sees.

    Args:
        clusters: float64 [E, K, F+1] statistics standardized over the clusters, and the share of each that is used.
        common: float64 [E, G] share of the budget left, changes of the losses in their units, multipliers as a share of
            themselves plus 1.
        mask: bool [E, K] clusters that may be chosen; all False where the episode is over.
    """

    clusters: Float[np.ndarray, "E K F"]
    common: Float[np.ndarray, "E G"]
    mask: Bool[np.ndarray, "E K"]

    @property
    def done(self) -> Bool[np.ndarray, " E"]:
        """Episodes without a choice left."""
        return np.logical_not(np.any(self.mask, axis=1))


@dataclass(frozen=True)
class Step:
    """What one decision brought.

    Args:
        observation: what is seen next.
        reward: float64 [E] fall of the target loss; 0 in episodes that were over.
        cost: float64 [E, M] signed rise of each source's loss.
        rows: int64 [E, b] rows that were trained on.
    """

    observation: Observation
    reward: Float[np.ndarray, " E"]
    cost: Float[np.ndarray, "E M"]
    rows: Int[np.ndarray, "E b"]


class Episodes:
    """E episodes side by side.

    Args:
        table: the clusters.
        dynamics: what training does.
        terms: batch, budget and limits.
        stream: of the order of rows within clusters.
        scales: float64 [1+M] unit of the changes of the target's and the sources' losses in the observation; the limits
            (and 1 for the target) when None.
    """

    def __init__(
        self,
        table: Table,
        dynamics: Dynamics,
        terms: Terms,
        stream: Stream,
        scales: Float[np.ndarray, " A"] | None = None,
    ) -> None:
        self.table, self.dynamics, self.terms, self.stream = table, dynamics, terms, stream
        self.scales = np.concatenate([[1.0], np.abs(terms.limits)]) if scales is None else scales
        self.multipliers = np.zeros(len(terms.limits))
        self.numbers = np.arange(0)
        self._sizes = table.sizes
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self.refresh(table.features)

    def refresh(self, features: Float[np.ndarray, "K F"]) -> None:
        """Put new statistics in the place of the clusters' former ones; what is seen from now on shows them.

        Args:
            features: float64 [K, F], finite.
        """
        self.table = replace(self.table, features=np.asarray(features, dtype=np.float64))
        spread = features.std(axis=0)
        # a statistic that hardly differs between clusters says nothing; its rounding must not be blown up
        flat = spread <= 1e-12 * np.abs(features).max(axis=0, initial=0)
        self._features = (features - features.mean(axis=0)) / np.where(flat, 1.0, spread)

    def reset(self, first: int, num: int, *, shuffle: bool = True) -> Observation:
        """Start episodes.

        Args:
            first: number of the first episode. An episode's order of rows depends on the stream and this number alone,
                and is an order of all rows of which each cluster takes its own: neither the episodes beside it nor the
                numbering of the clusters matters.
            num: E.
            shuffle: draw that order; else rows are taken as they stand in ``Table.members``.

        Returns:
            What is seen at the start.
        """
        self.numbers = np.arange(first, first + num)
        self._order = np.tile(np.concatenate([np.array(some, dtype=np.int64) for some in self.table.members]), (num, 1))
        if shuffle:
            draws = [self._draw(int(number))[rows] for number, rows in zip(self.numbers, self._order, strict=True)]
            cluster = np.repeat(np.arange(self.table.num_clusters), self._sizes)
            place = np.lexsort((np.stack(draws), np.tile(cluster, (num, 1))), axis=-1)
            self._order = np.take_along_axis(self._order, place, axis=1)
        self._used = np.zeros((num, self.table.num_clusters), dtype=np.int64)
        self._left = np.full(num, self.terms.budget, dtype=np.int64)
        self._begin = self._now = self.dynamics.reset(num)
        return self._observe()

    def step(self, actions: Int[np.ndarray, " E"]) -> Step:
        """Train every running episode on the next rows of a cluster.

        Args:
            actions: cluster numbers; what stands for an episode that is over is not read.

        Returns:
            Rewards, costs and what is seen next. Choosing a masked cluster is our own mistake (ValueError).
        """
        return self.settle(self.dynamics.step(self.deal(actions)))

    def deal(self, actions: Int[np.ndarray, " E"]) -> Int[np.ndarray, "E b"]:
        """Take the next rows of the chosen clusters: the first half of :meth:`step`, for who trains on them elsewhere.

        Args:
            actions: as for :meth:`step`.

        Returns:
            Rows to train on, ``NO_ROW`` where there is none.
        """
        mask = self._mask()
        self._running = np.asarray(mask.any(axis=1))
        episodes = np.arange(len(actions))
        if not mask[episodes[self._running], actions[self._running]].all():
            raise ValueError("a cluster was chosen that has no row left within the budget")
        self._dealt = self._take(np.where(self._running, actions, 0), self._running)
        return self._dealt

    def settle(self, losses: Losses) -> Step:
        """See the losses after training on what was dealt: the second half of :meth:`step`.

        Args:
            losses: after it.

        Returns:
            As :meth:`step`.
        """
        before, self._now = self._now, losses
        reward = np.where(self._running, before.target - losses.target, 0.0)
        cost = np.where(self._running[:, None], losses.protect - before.protect, 0.0)
        return Step(self._observe(), reward, cost, self._dealt)

    def _draw(self, number: int) -> Float[np.ndarray, " N"]:
        """The key of every row in one episode; rows of a cluster are taken by rising key."""
        return self.stream.child(f"episode/{number}").numpy().random(len(self.table.price))

    def _take(self, actions: Int[np.ndarray, " E"], running: Bool[np.ndarray, " E"]) -> Int[np.ndarray, "E b"]:
        """The next rows of the chosen clusters, as many as the budget allows."""
        episodes, width = np.arange(len(actions)), np.arange(self.terms.rows_per_decision)
        at = self._used[episodes, actions][:, None] + width
        there = (at < self._sizes[actions][:, None]) & running[:, None]
        place = np.where(there, self._starts[actions][:, None] + at, 0)
        rows = np.where(there, self._order[episodes[:, None], place], NO_ROW)
        price = np.where(there, self.table.price[rows], 0)
        fits = there & (np.cumsum(price, axis=1) <= self._left[:, None])
        self._used[episodes, actions] += fits.sum(axis=1)
        self._left -= np.where(fits, price, 0).sum(axis=1)
        return np.where(fits, rows, NO_ROW)

    def _mask(self) -> Bool[np.ndarray, "E K"]:
        there = self._used < self._sizes
        place = np.where(there, self._starts + self._used, 0)
        following = np.take_along_axis(self._order, place, axis=1)
        return there & (self.table.price[following] <= self._left[:, None])

    def _observe(self) -> Observation:
        num = len(self._left)
        used = self._used / self._sizes
        clusters = np.concatenate(
            [np.broadcast_to(self._features, (num, *self._features.shape)), used[:, :, None]], axis=2
        )
        change = np.column_stack([self._begin.target - self._now.target, self._now.protect - self._begin.protect])
        common = np.column_stack(
            [
                self._left / self.terms.budget,
                change / self.scales,
                np.tile(self.multipliers / (1 + self.multipliers), (num, 1)),
            ]
        )
        return Observation(clusters, common, self._mask())
