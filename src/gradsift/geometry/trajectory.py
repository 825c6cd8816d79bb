"""A proxy run as a value: what a round measures, what a rule does with it, and the driver of the rounds (ours).

A rule is a pure function of state and feedback; a bench trains and measures. The driver knows neither model nor file, so
the same rule runs on the navigator, in a planted world and in a test of a few numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import ConfigError
from gradsift.geometry.mixture import mixture_counts

Training = Literal["combined", "weighted", "sampled"]
Signal = Literal["gram", "fisher", "excess"]


@dataclass(frozen=True)
class Plan:
    """How the navigator is trained and measured in a proxy run.

    Args:
        num_rounds: T rounds.
        rows_per_domain: rows of a domain that a round measures; drawn anew each round, cycling through the domain.
        training: ``combined`` takes one step along sum_j a_j g_j of the gradients just measured; ``weighted`` one step on
            the rows just measured, weighted a_j / s_j with the weights of the round before and uniform s; ``sampled``
            trains on rows drawn by the mixture.
        rows_per_round: rows that ``sampled`` trains on in a round.
        measures: what the rule reads beside the losses: ``gram`` (mean gradients), ``fisher`` (the same in the metric of
            Adam's second moment) or ``excess`` (token losses above a reference that is trained first).
        clip: norm that a mean gradient is clipped to before anything is made of it; 0 for none.
        test_every: rounds between two rank tests, the first before round 0; 0 for none.
        max_epochs: times that ``sampled`` may use a row.
    """

    num_rounds: int
    rows_per_domain: int
    training: Training
    rows_per_round: int = 0
    measures: tuple[Signal, ...] = ()
    clip: float = 0.0
    test_every: int = 0
    max_epochs: int = 4

    def __post_init__(self) -> None:
        if min(self.num_rounds, self.rows_per_domain) < 1 or (self.training == "sampled" and self.rows_per_round < 1):
            raise ConfigError(
                "a proxy run has no rounds or no rows", where="num_rounds, rows_per_domain, rows_per_round",
                got=f"{self.num_rounds}, {self.rows_per_domain}, {self.rows_per_round}", expected="at least 1 each",
            )  # fmt: skip


@dataclass(frozen=True)
class Domains:
    """The pool in domains.

    Args:
        names: k names, rising.
        of_row: int64 [N] domain of each eligible row, in id order.
        sizes: int64 [k] rows per domain, >= 1.
        tasks: m names of what is to be learned: the target, and anchors that count as tasks.
    """

    names: tuple[str, ...]
    of_row: Int[np.ndarray, " N"]
    sizes: Int[np.ndarray, " k"]
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feedback:
    """What a round measured, before anything was trained in it.

    Args:
        lr: learning rate of the round's first step.
        losses: float64 [k] token mean loss of each domain's rows, nats; NaN for an absent domain.
        present: bool [k] domains of which rows were measured.
        gram: float64 [k+m, k+m] inner products of mean gradients, domains first, then tasks.
        fisher: the same in the metric of Adam's second moment; None before the first optimizer step.
        task_losses: float64 [m] losses of rows of each task that give no gradient.
        excess: float64 [k] mean over tokens of max(0, proxy - reference), nats.
        positive: float64 [k] share of tokens with a positive excess.
        drops: float64 [k, m] falls of the task losses after one step on each domain from a saved state; None unless
            this round tests the ranks.
    """

    lr: float
    losses: Float[np.ndarray, " k"]
    present: Bool[np.ndarray, " k"]
    gram: Float[np.ndarray, "a a"] | None = None
    fisher: Float[np.ndarray, "a a"] | None = None
    task_losses: Float[np.ndarray, " m"] | None = None
    excess: Float[np.ndarray, " k"] | None = None
    positive: Float[np.ndarray, " k"] | None = None
    drops: Float[np.ndarray, "k m"] | None = None


@dataclass(frozen=True)
class State:
    """Where a rule stands.

    Args:
        weights: float64 [k] domain probabilities.
        carried: float64 [k] what goes along from step to step: the last evidence, for domains that the next round lacks, or
            the prior.
        history: float64 [t, m] task losses so far.
        stopped: the rule has seen enough: what comes next cannot change its mixture.
        events: counted remarks, code -> how often.
        figures: what the last step found, as plain JSON values.
    """

    weights: Float[np.ndarray, " k"]
    carried: Float[np.ndarray, " k"]
    history: Float[np.ndarray, "t m"] = field(default_factory=lambda: np.zeros((0, 0)))
    stopped: bool = False
    events: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """A finished round.

    Args:
        feedback: what was measured.
        state: of the rule after it.
        counts: int64 [k] rows of each domain that were trained on.
        short: rows that no domain could give.
    """

    feedback: Feedback
    state: State
    counts: Int[np.ndarray, " k"]
    short: int = 0


@dataclass(frozen=True)
class Trajectory:
    """A finished proxy run.

    Args:
        start: the rule's first state.
        rounds: T rounds, or fewer where the rule stopped.
        task_losses: float64 [m] after the last round; None without tasks.
    """

    start: State
    rounds: tuple[Round, ...]
    task_losses: Float[np.ndarray, " m"] | None = None

    @property
    def weights(self) -> Float[np.ndarray, "T k"]:
        """Weights after every round, float64 [T, k]."""
        return np.stack([one.state.weights for one in self.rounds])

    def mean_weights(self, share: float = 1.0) -> Float[np.ndarray, " k"]:
        """Average the weights over the last rounds.

        Args:
            share: of the rounds, counted from the end and rounded up, in (0, 1].

        Returns:
            float64 [k].
        """
        last = max(1, int(np.ceil(share * len(self.rounds) - 1e-9)))
        return self.weights[-last:].mean(axis=0)

    @property
    def drift(self) -> float:
        """How far the running mean of the weights moved in the last fifth of the rounds, L1; settled below 0.01."""
        num = len(self.rounds)
        early = max(1, num - int(np.ceil(0.2 * num)))
        return float(np.abs(self.weights.mean(axis=0) - self.weights[:early].mean(axis=0)).sum())


@runtime_checkable
class Rule(Protocol):
    """What steers the mixture: pure functions, the state a value."""

    def start(self, domains: Domains) -> State:
        """Say where the rule begins."""
        ...

    def step(self, state: State, feedback: Feedback) -> State:
        """Take one round's measurement in."""
        ...


@runtime_checkable
class Bench(Protocol):
    """What trains and measures; rounds come in order, each finished one may be read back."""

    def read(self, at: int) -> Round | None:
        """Give round ``at`` back if it was finished earlier."""
        ...

    def probe(self, at: int, weights: Float[np.ndarray, " k"]) -> Feedback:
        """Measure before the training of round ``at``."""
        ...

    def train(self, at: int, weights: Float[np.ndarray, " k"], before: Float[np.ndarray, " k"],
              counts: Int[np.ndarray, " k"] | None) -> None:  # fmt: skip
        """Train round ``at`` with the weights after it and before it; with ``counts`` rows of each domain, if sampled."""
        ...

    def write(self, at: int, done: Round) -> None:
        """Keep a finished round and the model after it."""
        ...

    def finish(self, num_rounds: int) -> Float[np.ndarray, " m"] | None:
        """Measure the tasks after the last round."""
        ...


@runtime_checkable
class Proxy(Protocol):
    """The navigator in training, as far as a mixture method may know it."""

    tasks: tuple[str, ...]

    def run(self, rule: Rule, plan: Plan, domains: Domains, name: str) -> Trajectory:
        """Train a fresh copy, steered by a rule.

        Args:
            rule: whose weights it follows.
            plan: rounds and rows.
            domains: the pool's rows by domain, and the tasks.
            name: what the run is called, its settings included.

        Returns:
            All rounds.
        """
        ...


def play(rule: Rule, plan: Plan, domains: Domains, bench: Bench) -> Trajectory:
    """Drive a proxy run: measure, let the rule decide, train; finished rounds are read back.

    Args:
        rule: whose weights the training follows.
        plan: rounds and rows.
        domains: the pool in domains.
        bench: trains and measures.

    Returns:
        All rounds.
    """
    start = state = rule.start(domains)
    rounds: list[Round] = []
    used = np.zeros(len(domains.names), dtype=np.int64)
    for at in range(plan.num_rounds):
        done = bench.read(at)
        if done is None:
            feedback = bench.probe(at, state.weights)
            after = rule.step(state, feedback)
            counts, short = np.zeros_like(used), 0
            if not after.stopped:
                counts, short = _counts(plan, domains, after.weights, used)
                bench.train(at, after.weights, state.weights, counts if plan.training == "sampled" else None)
            done = Round(feedback, after, counts, short)
            bench.write(at, done)
        rounds.append(done)
        state, used = done.state, used + done.counts
        if state.stopped:
            break
    return Trajectory(start, tuple(rounds), bench.finish(len(rounds)) if domains.tasks else None)


def _counts(
    plan: Plan, domains: Domains, weights: Float[np.ndarray, " k"], used: Int[np.ndarray, " k"]
) -> tuple[Int[np.ndarray, " k"], int]:
    """Rows of each domain that a round trains on: without replacement until a domain runs out, then further epochs."""
    if plan.training != "sampled":
        return np.minimum(domains.sizes, plan.rows_per_domain), 0
    once = mixture_counts(weights, np.maximum(domains.sizes - used, 0), plan.rows_per_round)
    if not once.exhausted:
        return once.counts, once.short
    left = np.maximum(plan.max_epochs * domains.sizes - used, 0)
    found = mixture_counts(weights, left, plan.rows_per_round)
    return found.counts, found.short


def count_event(events: Mapping[str, int], code: str, more: int = 1) -> dict[str, int]:
    """Count a remark up.

    Args:
        events: code -> how often.
        code: of the remark.
        more: how often it came; 0 changes nothing.

    Returns:
        A new mapping.
    """
    return {**events, code: events.get(code, 0) + more} if more else dict(events)
