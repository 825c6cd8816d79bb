"""What chooses clusters, and playing whole episodes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from gradsift.policy.episodes import Episodes, Observation, Step
from gradsift.seeds import Stream


class Policy(Protocol):
    """What chooses clusters; learned policies and trivial ones stand behind the same interface."""

    name: str

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Prepare for episodes that were just reset.

        Args:
            episodes: the process; only its table, its terms and the ``numbers`` of the running episodes may be read.
            stream: of this run's draws.
        """
        ...

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose a cluster that is not masked for every running episode.

        Args:
            observation: what is seen.

        Returns:
            int64 [E]; anything where the episode is over.
        """
        ...

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """See what the choice brought; policies that do not learn within an episode ignore it.

        Args:
            actions: what was chosen.
            step: what came of it.
        """
        ...


@dataclass(frozen=True)
class Trace:
    """Finished episodes.

    Args:
        actions: int64 [E, T] chosen clusters; -1 once an episode is over.
        rewards: float64 [E, T].
        costs: float64 [E, T, M].
        rows: int64 [E, T, b].
    """

    actions: Int[np.ndarray, "E T"]
    rewards: Float[np.ndarray, "E T"]
    costs: Float[np.ndarray, "E T M"]
    rows: Int[np.ndarray, "E T b"]

    @property
    def gain(self) -> Float[np.ndarray, " E"]:
        """Fall of the target loss over each episode, in nats."""
        return self.rewards.sum(axis=1)

    @property
    def rise(self) -> Float[np.ndarray, "E M"]:
        """Rise of each source's loss over each episode, in nats."""
        return self.costs.sum(axis=1)


def play(
    episodes: Episodes, policy: Policy, stream: Stream, *, first: int = 0, num: int = 1, shuffle: bool = True
) -> Trace:
    """Play whole episodes.

    Args:
        episodes: the process.
        policy: who chooses.
        stream: of the policy's draws.
        first: number of the first episode.
        num: E.
        shuffle: whether the order of rows is drawn.

    Returns:
        What happened.
    """
    seen = episodes.reset(first, num, shuffle=shuffle)
    policy.begin(episodes, stream)
    actions, steps = [], []
    while not seen.done.all():
        chosen = np.where(seen.done, -1, policy.act(seen))
        step = episodes.step(chosen)
        policy.learn(chosen, step)
        actions.append(chosen)
        steps.append(step)
        seen = step.observation
    width, sources = episodes.terms.rows_per_decision, len(episodes.terms.limits)
    if not steps:
        return Trace(np.zeros((num, 0), dtype=np.int64), np.zeros((num, 0)), np.zeros((num, 0, sources)),
                     np.zeros((num, 0, width), dtype=np.int64))  # fmt: skip
    return Trace(
        np.stack(actions, axis=1),
        np.stack([s.reward for s in steps], axis=1),
        np.stack([s.cost for s in steps], axis=1),
        np.stack([s.rows for s in steps], axis=1),
    )
