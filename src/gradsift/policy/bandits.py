"""Bandits over clusters that know no state: epsilon-greedy, EXP3, Gaussian Thompson sampling (ogs.md 3.5).

Payoff of a decision, in nats: r - sum_m lambda_m c_m / |limit_m|. They learn within an episode and across episodes;
episodes side by side feed one :class:`BanditState`, so their number changes what is learned when.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.policy.episodes import NO_ROW, Episodes, Observation, Step
from gradsift.policy.simple import Draws, draw_cluster
from gradsift.seeds import Stream


@dataclass(frozen=True)
class BanditState:
    """All that a bandit has learned; a value that may be kept and given back.

    Args:
        pulls: float64 [K] decisions per cluster.
        mean: float64 [K] mean payoff in nats, 0 before the first.
        spread: float64 [K] sum of squared deviations from that mean.
        log_weight: float64 [K] EXP3's log weights, the largest is 0.
        low: least payoff seen.
        high: largest payoff seen.
        multipliers: float64 [M] lambda, >= 0, in nats of target loss per limit of rise.
    """

    pulls: Float[np.ndarray, " K"]
    mean: Float[np.ndarray, " K"]
    spread: Float[np.ndarray, " K"]
    log_weight: Float[np.ndarray, " K"]
    low: float
    high: float
    multipliers: Float[np.ndarray, " M"]


def empty_state(num_clusters: int, multipliers: Float[np.ndarray, " M"]) -> BanditState:
    """Know nothing yet.

    Args:
        num_clusters: K.
        multipliers: float64 [M] lambda to start with.

    Returns:
        The state.
    """
    zeros = np.zeros(num_clusters)
    return BanditState(zeros, zeros, zeros, zeros, np.inf, -np.inf, multipliers)


def add_payoffs(state: BanditState, actions: Int[np.ndarray, " n"], payoff: Float[np.ndarray, " n"]) -> BanditState:
    """Take payoffs into the means (the pairwise update of Chan, Golub and LeVeque, 1979, exact in any grouping).

    Args:
        state: what is known.
        actions: int64 [n] chosen clusters.
        payoff: float64 [n] what each brought.

    Returns:
        The new state.
    """
    if not len(actions):
        return state
    k = len(state.pulls)
    count = np.bincount(actions, minlength=k).astype(np.float64)
    mean = np.bincount(actions, payoff, minlength=k) / np.maximum(count, 1)
    inner = np.bincount(actions, (payoff - mean[actions]) ** 2, minlength=k)
    pulls = state.pulls + count
    gap = np.where(count > 0, mean - state.mean, 0.0)
    share = count / np.maximum(pulls, 1)
    return replace(
        state,
        pulls=pulls,
        mean=state.mean + gap * share,
        spread=state.spread + inner + gap**2 * state.pulls * share,
        low=min(state.low, float(payoff.min())),
        high=max(state.high, float(payoff.max())),
    )


class _Bandit(ABC):
    """What the bandits share: payoffs and multipliers.

    The multipliers are those given, or, when None, start at 0 and move after every set of episodes by a projected step,
    lambda_m <- max(0, lambda_m + rate * mean |gain| * (mean rise_m - limit_m) / |limit_m|) (ours).
    """

    name = "bandit"

    def __init__(
        self,
        multipliers: Float[np.ndarray, " M"] | None = None,
        rate: float = 0.5,
        state: BanditState | None = None,
    ) -> None:
        self.multipliers, self.rate, self.state = multipliers, rate, state

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Make the episodes' generators; what was learned before is kept.

        Args:
            episodes: the process.
            stream: of this run's draws.

        Raises:
            ValueError: the state or the multipliers belong to another process.
        """
        self._limits = episodes.terms.limits
        given = np.zeros(len(self._limits)) if self.multipliers is None else np.asarray(self.multipliers, dtype=float)
        if self.state is None:
            self.state = empty_state(episodes.table.num_clusters, given)
        if len(self.state.pulls) != episodes.table.num_clusters or len(self.state.multipliers) != len(self._limits):
            raise ValueError("the bandit's state is of another number of clusters or sources")
        self._draws = Draws(stream, episodes.numbers)
        self._gain = np.zeros(len(episodes.numbers))
        self._rise = np.zeros((len(episodes.numbers), len(self._limits)))

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose by what is known.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        return self._choose(observation.mask)

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Take the payoffs of the running episodes; move the multipliers when all are over.

        Args:
            actions: what was chosen.
            step: what came of it.
        """
        running = (step.rows != NO_ROW).any(axis=1)
        payoff = step.reward - (step.cost / np.abs(self._limits)) @ self._state.multipliers
        self._absorb(actions, payoff, running)
        self._gain += step.reward
        self._rise += step.cost
        if self.multipliers is None and step.observation.done.all():
            excess = (self._rise.mean(axis=0) - self._limits) / np.abs(self._limits)
            moved = self._state.multipliers + self.rate * np.abs(self._gain).mean() * excess
            self.state = replace(self._state, multipliers=np.maximum(0.0, moved))

    @property
    def _state(self) -> BanditState:
        assert self.state is not None, "begin comes first"
        return self.state

    @abstractmethod
    def _choose(self, mask: Bool[np.ndarray, "E K"]) -> Int[np.ndarray, " E"]: ...

    def _absorb(
        self, actions: Int[np.ndarray, " E"], payoff: Float[np.ndarray, " E"], running: Bool[np.ndarray, " E"]
    ) -> None:
        self.state = add_payoffs(self._state, actions[running], payoff[running])


class EpsilonGreedy(_Bandit):
    """The cluster of largest mean payoff, and with probability epsilon any (Sutton and Barto, 2018, section 2.2).

    Clusters never chosen come first; ties are drawn.

    Args:
        multipliers: float64 [M] lambda to keep, in nats per limit; adapted when None.
        rate: step of the adapted multipliers.
        state: what was learned before.
        epsilon: probability of any cluster, in [0, 1].
    """

    name = "epsilon_greedy"

    def __init__(
        self,
        multipliers: Float[np.ndarray, " M"] | None = None,
        rate: float = 0.5,
        state: BanditState | None = None,
        epsilon: float = 0.1,
    ) -> None:
        super().__init__(multipliers, rate, state)
        self.epsilon = epsilon

    def _choose(self, mask: Bool[np.ndarray, "E K"]) -> Int[np.ndarray, " E"]:
        draws = self._draws.uniform(2)
        known = np.where(self._state.pulls > 0, self._state.mean, np.inf)
        value = np.where(mask, known, -np.inf)
        best = mask & (value == value.max(axis=1, keepdims=True))
        options = np.where((draws[:, 0] < self.epsilon)[:, None], mask, best)
        return draw_cluster(np.ones(mask.shape), options, draws[:, 1])


class Exp3(_Bandit):
    """Exponential weights with exploration (Auer, Cesa-Bianchi, Freund and Schapire, 2002, figure 1).

    Departures: payoffs are put into [0, 1] by the range seen so far, probabilities are made to sum to 1 over the clusters
    that may be chosen, and the decisions of episodes side by side are taken in together.

    Args:
        multipliers: float64 [M] lambda to keep, in nats per limit; adapted when None.
        rate: step of the adapted multipliers.
        state: what was learned before.
        gamma: share of uniform exploration and step of the weights, in (0, 1].
    """

    name = "exp3"

    def __init__(
        self,
        multipliers: Float[np.ndarray, " M"] | None = None,
        rate: float = 0.5,
        state: BanditState | None = None,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(multipliers, rate, state)
        self.gamma = gamma

    def _choose(self, mask: Bool[np.ndarray, "E K"]) -> Int[np.ndarray, " E"]:
        self._chance = exp3_chances(self._state.log_weight, mask, self.gamma)
        return draw_cluster(self._chance, mask, self._draws.uniform(1)[:, 0])

    def _absorb(
        self, actions: Int[np.ndarray, " E"], payoff: Float[np.ndarray, " E"], running: Bool[np.ndarray, " E"]
    ) -> None:
        super()._absorb(actions, payoff, running)
        state, k = self._state, len(self._state.pulls)
        width = state.high - state.low
        inside = (payoff - state.low) / width if width > 0 else np.full(len(payoff), 0.5)
        chosen = actions[running]
        estimate = inside[running] / self._chance[running, chosen]
        weight = state.log_weight + self.gamma / k * np.bincount(chosen, estimate, minlength=k)
        self.state = replace(state, log_weight=weight - weight.max())


def exp3_chances(
    log_weight: Float[np.ndarray, " K"], mask: Bool[np.ndarray, "E K"], gamma: float
) -> Float[np.ndarray, "E K"]:
    """Probabilities of EXP3 over the clusters that may be chosen: (1 - gamma) w_k / sum w + gamma / K.

    Args:
        log_weight: [K] log weights.
        mask: [E, K] clusters that may be chosen.
        gamma: share of uniform exploration.

    Returns:
        float64 [E, K], 0 where masked; sums to 1 in every episode that is not over.
    """
    top = np.where(mask, log_weight, -np.inf).max(axis=1, keepdims=True)
    weight = np.where(mask, np.exp(np.minimum(log_weight - np.where(np.isfinite(top), top, 0.0), 0.0)), 0.0)
    total, num = weight.sum(axis=1, keepdims=True), mask.sum(axis=1, keepdims=True)
    return (1 - gamma) * weight / np.maximum(total, 1e-300) + gamma * mask / np.maximum(num, 1)


class Thompson(_Bandit):
    """Thompson sampling: the largest of one draw per cluster from a Gaussian around its mean payoff.

    A draw is mean_k + s z / sqrt(n_k) (Agrawal and Goyal, 2013, the Gaussian form) with s the payoffs' standard deviation
    within clusters in place of 1; clusters never chosen come first.

    Args:
        multipliers: float64 [M] lambda to keep, in nats per limit; adapted when None.
        rate: step of the adapted multipliers.
        state: what was learned before.
    """

    name = "thompson"

    def _choose(self, mask: Bool[np.ndarray, "E K"]) -> Int[np.ndarray, " E"]:
        state, (num, k) = self._state, mask.shape
        degrees = float((state.pulls - (state.pulls > 0)).sum())
        # before any cluster was chosen twice the spread is unknown: the range seen stands for it
        wide = max(0.0, state.high - state.low) if np.isfinite(state.high) else 0.0
        deviation = np.sqrt(state.spread.sum() / degrees) if degrees > 0 else wide
        noise = self._draws.normal(k)
        draw = state.mean + deviation * noise / np.sqrt(np.maximum(state.pulls, 1))
        value = np.where(mask, draw, -np.inf)
        new = mask & (state.pulls == 0)
        first = np.where(new, noise, -np.inf)
        return np.where(new.any(axis=1), np.argmax(first, axis=1), np.argmax(value, axis=1)).reshape(num)
