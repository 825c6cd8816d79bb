"""The learned policy as something that can be deployed: an actor with the prices it was kept with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from gradsift.errors import ConfigError, SpecError
from gradsift.policy.episodes import Episodes, Observation, Step
from gradsift.policy.network import Shape, actor_logits, masked_log_softmax
from gradsift.seeds import Stream

Mode = Literal["greedy", "deal", "sample"]


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Copy an array into memory of torch's own.

    Numpy's memory starts at other multiples than torch's, and the last bit of a matrix product may depend on that; a
    resumed run must not.

    Args:
        array: numbers.
        dtype: of the tensor.

    Returns:
        The copy.
    """
    return torch.empty(array.shape, dtype=dtype).copy_(torch.from_numpy(np.ascontiguousarray(array)))


def log_probabilities(
    actor: torch.Tensor, shape: Shape, observation: Observation
) -> tuple[Float[torch.Tensor, "E K"], Float[torch.Tensor, "E K F"], Float[torch.Tensor, "E G"]]:
    """What the actor thinks of an observation.

    Args:
        actor: float32 [P] parameters.
        shape: sizes.
        observation: what is seen.

    Returns:
        Log-probabilities, and the two float32 inputs for later use; rows of ended episodes mean nothing.
    """
    clusters, common = tensor(observation.clusters), tensor(observation.common)
    mask = tensor(observation.mask | observation.done[:, None], torch.bool)
    with torch.inference_mode():
        return masked_log_softmax(actor_logits(actor, shape, clusters, common), mask), clusters, common


def draw(share: Float[np.ndarray, "E K"], uniform: Float[np.ndarray, " E"]) -> Int[np.ndarray, " E"]:
    """Draw one cluster per episode by inverting the distribution function.

    Args:
        share: probabilities, 0 where masked; they need not sum to 1.
        uniform: one number in [0, 1) per episode.

    Returns:
        Cluster numbers, never one of probability 0 where there is a choice.
    """
    reached = np.cumsum(share, axis=1)
    return np.argmax(reached > (uniform * reached[:, -1])[:, None], axis=1)


def deal(
    owed: Float[np.ndarray, "E K"], share: Float[np.ndarray, "E K"], mask: Bool[np.ndarray, "E K"]
) -> Int[np.ndarray, " E"]:
    """Choose what a mixture owes most, so that counts follow the summed probabilities within a decision or two (ours).

    Where the policy mixes clusters, as it must where a limit binds, its likeliest cluster is one end of the mixture;
    dealing keeps the mixture's gain and cost without a draw.

    Args:
        owed: summed probabilities less the number of choices so far; this decision is added in place.
        share: probabilities of this decision.
        mask: clusters that may be chosen.

    Returns:
        Cluster numbers, the smaller one at ties.
    """
    owed += share
    chosen = np.argmax(np.where(mask & (share > 0), owed, -np.inf), axis=1)
    owed[np.arange(len(chosen)), chosen] -= mask.any(axis=1)
    return chosen


@dataclass
class LearnedPolicy:
    """A trained actor behind the interface of :class:`~gradsift.policy.play.Policy`.

    Args:
        actor: float32 [P] parameters.
        shape: sizes of the networks.
        prices: float64 [M] the multipliers the actor sees, whatever the process says.
        mode: ``greedy`` takes the likeliest cluster (smaller number at ties), ``deal`` what :func:`deal` takes, and
            ``sample`` draws from the stream given to ``begin``.
        name: for reports.
    """

    actor: Float[np.ndarray, " P"]
    shape: Shape
    prices: Float[np.ndarray, " M"]
    mode: Mode = "greedy"
    name: str = "ppo_lagrangian"
    _weights: torch.Tensor = field(init=False, repr=False)
    _random: np.random.Generator | None = field(init=False, default=None, repr=False)
    _owed: Float[np.ndarray, "E K"] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("greedy", "deal", "sample"):
            raise ConfigError("unknown way to deploy a policy", got=self.mode, expected="greedy, deal or sample")
        self._weights = tensor(self.actor)

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Prepare for episodes.

        Args:
            episodes: the process that was reset.
            stream: of the draws in mode ``sample``.

        Raises:
            SpecError: the process has another number of sources than the policy was trained for.
        """
        if len(episodes.terms.limits) != self.shape.sources:
            raise SpecError("the policy was trained for another number of protected sources",
                            got=len(episodes.terms.limits), expected=str(self.shape.sources), do="train it again")  # fmt: skip
        self._random, self._owed = stream.numpy() if self.mode == "sample" else None, None

    def probabilities(self, observation: Observation) -> Float[np.ndarray, "E K"]:
        """How likely each cluster is.

        Args:
            observation: what is seen.

        Returns:
            float64, 0 where masked; rows of ended episodes are 0.
        """
        common = observation.common.copy()
        common[:, common.shape[1] - self.shape.sources :] = self.prices / (1 + self.prices)
        seen = Observation(observation.clusters, common, observation.mask)
        logs = log_probabilities(self._weights, self.shape, seen)[0].numpy()
        return np.where(observation.mask, np.exp(logs.astype(np.float64)), 0.0)

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose clusters.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        share = self.probabilities(observation)
        if self.mode == "greedy":
            return np.argmax(share, axis=1)
        if self.mode == "deal":
            self._owed = np.zeros(share.shape) if self._owed is None else self._owed
            return deal(self._owed, share, observation.mask)
        assert self._random is not None, "begin comes first"
        return draw(share, self._random.random(len(share)))

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Ignore it: the policy is finished.

        Args:
            actions: what was chosen.
            step: what came of it.
        """
