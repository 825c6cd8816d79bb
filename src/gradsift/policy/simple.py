"""Policies without learning: uniform, size-proportional, one cluster, a fixed schedule (ogs.md 3.5; ours).

Where a plan names nothing that may be chosen, the draw is size-proportional over what is left, as a random draw of rows
would be; such decisions are counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.policy.episodes import Episodes, Observation, Step
from gradsift.seeds import Stream


class Draws:
    """Random numbers of episodes side by side: each episode has its own, keyed by its number.

    Args:
        stream: of this run's draws.
        numbers: int64 [E] numbers of the episodes.
    """

    def __init__(self, stream: Stream, numbers: Int[np.ndarray, " E"]) -> None:
        self._generators = [stream.child(f"episode/{number}").numpy() for number in numbers]

    def uniform(self, num: int) -> Float[np.ndarray, "E n"]:
        """Draw numbers in [0, 1).

        Args:
            num: n, how many per episode.

        Returns:
            float64 [E, n].
        """
        return np.array([generator.random(num) for generator in self._generators]).reshape(-1, num)

    def normal(self, num: int) -> Float[np.ndarray, "E n"]:
        """Draw standard normal numbers.

        Args:
            num: n, how many per episode.

        Returns:
            float64 [E, n].
        """
        return np.array([generator.standard_normal(num) for generator in self._generators]).reshape(-1, num)


def draw_cluster(
    weights: Float[np.ndarray, "E K"], mask: Bool[np.ndarray, "E K"], uniform: Float[np.ndarray, " E"]
) -> Int[np.ndarray, " E"]:
    """Draw a cluster with probability in proportion to its weight.

    Args:
        weights: [E, K], above 0 where the mask allows.
        mask: [E, K] clusters that may be chosen.
        uniform: [E] numbers in [0, 1).

    Returns:
        int64 [E]; 0 where nothing may be chosen.
    """
    heap = np.cumsum(np.where(mask, weights, 0.0), axis=1)
    return np.argmax(heap > uniform[:, None] * heap[:, -1:], axis=1)


def rows_left(observation: Observation, sizes: Int[np.ndarray, " K"]) -> Float[np.ndarray, "E K"]:
    """How many rows of each cluster are unused.

    Args:
        observation: what is seen; its last cluster column is the used share.
        sizes: int64 [K] rows per cluster.

    Returns:
        float64 [E, K], whole numbers.
    """
    return np.rint((1.0 - observation.clusters[:, :, -1]) * sizes)


class Uniform:
    """Every cluster that may be chosen is as likely."""

    name = "uniform"

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Make the episodes' generators.

        Args:
            episodes: the process.
            stream: of this run's draws.
        """
        self._draws = Draws(stream, episodes.numbers)

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Draw a cluster.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        return draw_cluster(np.ones(observation.mask.shape), observation.mask, self._draws.uniform(1)[:, 0])

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Learn nothing.

        Args:
            actions: what was chosen.
            step: what came of it.
        """


class SizeProportional:
    """A cluster is as likely as it has unused rows: a random draw of rows, a batch at a time."""

    name = "size_proportional"

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Make the episodes' generators.

        Args:
            episodes: the process.
            stream: of this run's draws.
        """
        self._draws, self._sizes = Draws(stream, episodes.numbers), episodes.table.sizes

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Draw a cluster.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        left = rows_left(observation, self._sizes)
        return draw_cluster(left, observation.mask, self._draws.uniform(1)[:, 0])

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Learn nothing.

        Args:
            actions: what was chosen.
            step: what came of it.
        """


class Scheduled:
    """A fixed list of clusters; entries that may not be chosen are skipped.

    ``num_skipped`` counts skipped entries and ``num_unplanned`` the decisions drawn after the end of the list, both over
    the episodes since the last ``begin``.

    Args:
        actions: int64 [T] cluster numbers in order.
        name: what the report calls it.
    """

    def __init__(self, actions: Sequence[int] | Int[np.ndarray, " T"], name: str = "scheduled") -> None:
        self.actions, self.name = np.asarray(actions, dtype=np.int64), name
        self.num_skipped = self.num_unplanned = 0

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Go to the start of the list.

        Args:
            episodes: the process.
            stream: of this run's draws.

        Raises:
            ValueError: the list names a cluster that the table does not have.
        """
        if ((self.actions < 0) | (self.actions >= episodes.table.num_clusters)).any():
            raise ValueError(f"the schedule names a cluster outside 0 to {episodes.table.num_clusters - 1}")
        self._rest = SizeProportional()
        self._rest.begin(episodes, stream)
        self._at = np.zeros(len(episodes.numbers), dtype=np.int64)
        self.num_skipped = self.num_unplanned = 0

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose the next entry that the mask allows.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        allowed = observation.mask[:, self.actions] & (np.arange(len(self.actions)) >= self._at[:, None])
        planned, running = allowed.any(axis=1), np.logical_not(observation.done)
        chosen = self._rest.act(
            observation
        )  # drawn at every step, so that one episode's draws do not hang on the others
        if planned.any():
            place = np.argmax(allowed, axis=1)
            chosen = np.where(planned, self.actions[place], chosen)
            self.num_skipped += int((place - self._at)[planned].sum())
            self._at = np.where(planned, place + 1, self._at)
        left = running & ~planned
        self.num_skipped += int((len(self.actions) - self._at)[left].sum())
        self._at = np.where(left, len(self.actions), self._at)
        self.num_unplanned += int(left.sum())
        return chosen

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Learn nothing.

        Args:
            actions: what was chosen.
            step: what came of it.
        """


class Single:
    """One cluster until it is used up, then a size-proportional draw of the rest.

    ``num_unplanned`` counts the decisions that were drawn, over the episodes since the last ``begin``.

    Args:
        cluster: its number.
    """

    def __init__(self, cluster: int) -> None:
        self.cluster, self.name, self.num_unplanned = cluster, f"single_{cluster}", 0

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Prepare for what follows once the cluster is used up.

        Args:
            episodes: the process.
            stream: of this run's draws.

        Raises:
            ValueError: the table has no such cluster.
        """
        if not 0 <= self.cluster < episodes.table.num_clusters:
            raise ValueError(f"there is no cluster {self.cluster}")
        self._rest = SizeProportional()
        self._rest.begin(episodes, stream)
        self.num_unplanned = 0

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose the cluster while the mask allows it.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        there = observation.mask[:, self.cluster]
        self.num_unplanned += int((~there & ~observation.done).sum())
        return np.where(there, self.cluster, self._rest.act(observation))

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Learn nothing.

        Args:
            actions: what was chosen.
            step: what came of it.
        """
