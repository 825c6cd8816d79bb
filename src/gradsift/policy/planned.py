"""Policies that solve the cluster-level program: once, tightened, again and again, or by prices alone (ogs.md 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from gradsift.policy.episodes import Dynamics, Episodes, Observation, Step
from gradsift.policy.plan import (
    TINY,
    ClusterProgram,
    Effects,
    Plan,
    deal,
    least_excess,
    plan_lp,
    program_of,
    solve,
    tightened,
    whole_counts,
)
from gradsift.policy.play import Policy
from gradsift.policy.simple import Scheduled, rows_left
from gradsift.seeds import Stream

__all__ = ["DualPlan", "Effects", "Linearization", "Plan", "PricedRounds", "RecedingDual", "TightenedDual", "plan_lp"]


class Linearization(Dynamics, Protocol):
    """A simulator that knows what each cluster would do from where its learners stand.

    It follows the episodes by ``step``, so it must not be the very object that the episodes play.
    """

    def effects(self, members: tuple[tuple[int, ...], ...]) -> Effects:
        """First-order effects of one decision.

        Args:
            members: K clusters as row numbers.

        Returns:
            [E, K] gains and [E, K, M] harms, nats per decision.
        """
        ...


class DualPlan:
    """ogs_dual on clusters: the linear program's counts, made whole and dealt evenly over the episode.

    Args:
        effects: [K] and [K, M] effects per decision at the start.
    """

    name = "ogs_dual_clusters"

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.plan: Plan | None = None

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Solve the program.

        Args:
            episodes: the process.
            stream: of this run's draws (only where the plan leaves decisions open).
        """
        self.plan = self._solve(program_of(episodes.table, episodes.terms, self.effects))
        self.schedule = Scheduled(deal(self.plan.counts), self.name)
        self.schedule.begin(episodes, stream)

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose the next of the plan.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        return self.schedule.act(observation)

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Learn nothing.

        Args:
            actions: what was chosen.
            step: what came of it.
        """

    def _solve(self, program: ClusterProgram) -> Plan:
        return whole_counts(program, solve(program))


class TightenedDual(DualPlan):
    """ogs_dual on clusters with the limits tightened until the simulated rises keep the real ones, by bisection.

    After ``begin``: ``tightening`` is the share of |limit| taken off, ``measured`` float64 [M] the simulated rise of the
    plan that is played and ``fits`` whether it keeps every limit; when no tightening does, the one of least excess is
    played.

    Args:
        effects: [K] and [K, M] effects per decision at the start.
        measure: plays a policy in a simulator of the same table and terms and gives its mean rises, float64 [M].
        num_halvings: bisection steps.
    """

    name = "ogs_dual_tightened"

    def __init__(
        self, effects: Effects, measure: Callable[[Policy], Float[np.ndarray, " M"]], num_halvings: int = 12
    ) -> None:
        super().__init__(effects)
        self.measure, self.num_halvings = measure, num_halvings
        self.tightening, self.fits, self.measured = 0.0, False, np.zeros(0)

    def _solve(self, program: ClusterProgram) -> Plan:
        self._tried: list[tuple[float, float, Float[np.ndarray, " M"], Plan]] = []
        room = max(0.0, -least_excess(program))
        if not self._try(program, 0.0) and np.isfinite(room) and room > 0 and self._try(program, room):
            low, high = 0.0, room
            for _ in range(self.num_halvings):
                middle = (low + high) / 2
                low, high = (low, middle) if self._try(program, middle) else (middle, high)
        # the least tightening that fits, else the one of least excess
        excess, self.tightening, self.measured, plan = min(self._tried, key=lambda one: (max(one[0], TINY), one[1]))
        self.fits = excess <= TINY
        return plan

    def _try(self, program: ClusterProgram, share: float) -> bool:
        stricter = tightened(program, share)
        plan = whole_counts(stricter, solve(stricter))
        rise = self.measure(Scheduled(deal(plan.counts), self.name))
        excess = float(np.max((rise - program.limits) / np.abs(program.limits), initial=-np.inf))
        self._tried.append((excess, share, rise, plan))
        return excess <= TINY


class _Following:
    """What the closed-loop plans share: effects that may move with the learner, and rises that were measured."""

    name = "following"

    def __init__(self, effects: Effects | Linearization) -> None:
        self.effects = effects

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Start at the beginning of the episodes.

        Args:
            episodes: the process.
            stream: not used; these policies do not draw.
        """
        self._table, self._terms = episodes.table, episodes.terms
        num, sources = len(episodes.numbers), len(episodes.terms.limits)
        self._rise = np.zeros((num, sources))
        if not isinstance(self.effects, Effects):
            self.effects.reset(num)

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        """Follow the learner and add up what was measured.

        Args:
            actions: what was chosen.
            step: what came of it.
        """
        self._rise += step.cost
        if not isinstance(self.effects, Effects):
            self.effects.step(step.rows)

    def _now(self) -> Effects:
        """[E, K] and [E, K, M] effects where the learners stand."""
        if not isinstance(self.effects, Effects):
            return self.effects.effects(self._table.members)
        num = len(self._rise)
        return Effects(np.stack([self.effects.gain] * num), np.stack([self.effects.harm] * num))


class RecedingDual(_Following):
    """ogs_dual on clusters, linearized and solved again for what is left of the episode every few decisions.

    Args:
        effects: a simulator to follow, or fixed effects (then only the measured rises and what is left move the plan).
        every: decisions between two solutions, at least 1.
    """

    name = "ogs_dual_receding"

    def __init__(self, effects: Effects | Linearization, every: int = 1) -> None:
        super().__init__(effects)
        self.every = every

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Start at the beginning of the episodes.

        Args:
            episodes: the process.
            stream: not used; this policy does not draw.
        """
        super().begin(episodes, stream)
        self._whole = program_of(self._table, self._terms, Effects(np.zeros(0), np.zeros((0, 0))))
        self._queue: list[list[int]] = [[] for _ in episodes.numbers]

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose the first of the plan for what is left.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        chosen = np.zeros(len(observation.mask), dtype=np.int64)
        now: Effects | None = None
        left = rows_left(observation, self._table.sizes)
        for e in np.flatnonzero(~observation.done):
            self._queue[e] = [k for k in self._queue[e] if observation.mask[e, k]]
            if not self._queue[e]:
                now = self._now() if now is None else now
                batches = np.where(observation.mask[e], np.ceil(left[e] / self._terms.rows_per_decision), 0.0)
                program = replace(
                    self._whole,
                    gain=now.gain[e],
                    harm=now.harm[e],
                    capacity=batches,
                    budget=float(np.rint(observation.common[e, 0] * self._terms.budget)),
                    spent=self._rise[e] / np.abs(self._terms.limits),
                )
                self._queue[e] = deal(whole_counts(program, solve(program)).counts)[: self.every].tolist()
            chosen[e] = self._queue[e].pop(0)
        return chosen


class PricedRounds(_Following):
    """ogs_dual by prices alone, and the prices driven by what was measured.

    Chosen is the cluster of largest gain_k - sum_m lambda_m harm_km per unit of budget.
    At the end of each round, lambda_m <- max(0, lambda_m + rate * unit_m * (rise_m - limit_m * share) / |limit_m|) with
    the source's rise in the round and the share of the budget that the round used: a virtual queue (the drift-plus-
    penalty rule, Neely, 2010, chapter 4), so a rise above the pro-rata limit raises the price and one below it lowers it.
    unit_m is the median |gain| over the median |harm| of source m at the start. The first prices are the linear program's.

    Args:
        effects: a simulator to follow, or fixed effects.
        every: decisions of a round, at least 1.
        rate: how fast prices move; at 10 a rise of a tenth of the limit beyond pro rata moves a price by one unit.
    """

    name = "ogs_dual_priced"

    def __init__(self, effects: Effects | Linearization, every: int = 1, rate: float = 10.0) -> None:
        super().__init__(effects)
        self.every, self.rate = every, rate

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        """Take the first prices from the linear program.

        Args:
            episodes: the process.
            stream: not used; this policy does not draw.
        """
        super().begin(episodes, stream)
        now = self._now()
        first = Effects(now.gain[0], now.harm[0])  # all learners start alike
        program = program_of(self._table, self._terms, first)
        self._price, size = program.price, np.median(np.abs(first.harm), axis=0)
        self._unit = np.median(np.abs(first.gain)) / np.where(size > 0, size, 1.0)
        self.multipliers = np.tile(solve(program).prices, (len(self._rise), 1))
        self._from = np.zeros_like(self._rise)
        self._used, self._time = np.zeros(len(self._rise)), 0

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        """Choose by today's prices, after moving them where a round has ended.

        Args:
            observation: what is seen.

        Returns:
            int64 [E].
        """
        if self._time and self._time % self.every == 0:
            used = 1.0 - observation.common[:, 0]
            due = (used - self._used)[:, None] * self._terms.limits
            over = (self._rise - self._from - due) / np.abs(self._terms.limits)
            self.multipliers = np.maximum(0.0, self.multipliers + self.rate * self._unit * over)
            self._from, self._used = self._rise.copy(), used
        self._time += 1
        now = self._now()
        score = (now.gain - np.einsum("ekm,em->ek", now.harm, self.multipliers)) / self._price
        return np.argmax(np.where(observation.mask, score, -np.inf), axis=1)
