"""PPO-Lagrangian for choosing clusters: probe, train, judge every epoch by the episodes it would deploy, keep the best feasible.

Sources: arXiv 2602.06359 names the learner; the equations are those of Schulman et al. 1707.06347 with the multiplier of
Ray et al. 2019 in omnisafe's form (ogs.md 2.11, 3.4). Network, probe, PI multiplier and the choice of the policy are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import BudgetError, ConfigError, InfeasibleError, NumericsError
from gradsift.policy.advantage import lagrangian_advantage
from gradsift.policy.descent import Descent
from gradsift.policy.episodes import Episodes, Observation, Step
from gradsift.policy.learned import LearnedPolicy, deal
from gradsift.policy.multiplier import start_multiplier, update_multiplier, violation
from gradsift.policy.network import Shape, start_actor, start_critic
from gradsift.policy.play import play
from gradsift.policy.ppo_state import (
    Kept,
    Probe,
    TrainState,
    check_continues,
    empty_history,
    from_arrays,
    to_arrays,
)
from gradsift.policy.ppo_update import PPOConfig, collect, improve_actor, improve_critic
from gradsift.seeds import Stream, stream

__all__ = ["LearnedPolicy", "PPOConfig", "TrainState", "Trained", "from_arrays", "to_arrays", "train_policy"]

ROUNDING = 1e-9  # share of a limit by which sums of floats may exceed it
HEDGE = 0.5  # step of the weights of the cost-only policy


@dataclass(frozen=True)
class Trained:
    """A policy and how it came about.

    Args:
        policy: the best feasible policy, greedy or dealt; the one that broke the limits least when none was feasible.
        feasible: whether it kept every limit in its episode.
        gain: fall of the target loss over that episode, in nats.
        rise: float64 [M] rises of the sources' losses over it.
        state: where the training stopped, with its history and the probe.
        num_decisions: decisions played in all, probe included.
        note: what a report must say; empty when all is well.
    """

    policy: LearnedPolicy
    feasible: bool
    gain: float
    rise: Float[np.ndarray, " M"]
    state: TrainState
    num_decisions: int
    note: str


@dataclass
class _Prober:
    """Episode e prefers cluster e and then anything; the last one draws uniformly."""

    name: str = "probe"

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        self._random, self._prefer = (
            stream.numpy(),
            np.eye(episodes.table.num_clusters + 1, episodes.table.num_clusters),
        )

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        wish = self._prefer * 2 + self._random.random(self._prefer.shape)
        return np.argmax(np.where(observation.mask, wish, -1.0), axis=1)

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        pass


def keeps(rise: Float[np.ndarray, "*E M"], limits: Float[np.ndarray, " M"]) -> Bool[np.ndarray, "*E"]:
    """Whether every source stays within its limit.

    Args:
        rise: rises of the sources' losses, in nats.
        limits: allowed rises.

    Returns:
        One truth per episode.
    """
    return np.all(violation(rise, limits) <= ROUNDING, axis=-1)


def better(new: Kept, old: Kept | None, limits: Float[np.ndarray, " M"]) -> Kept:
    """The policy to keep: feasible before infeasible, then larger gain, or smaller worst violation; the older at ties.

    Args:
        new: a candidate.
        old: what was kept so far.
        limits: allowed rises, in nats.

    Returns:
        One of them.
    """
    if old is None:
        return new
    if new.feasible != old.feasible:
        return new if new.feasible else old
    if new.feasible:
        return new if new.gain > old.gain else old
    worst = [float(violation(some.rise, limits).max()) for some in (new, old)]
    return new if worst[0] < worst[1] else old


def train_policy(
    episodes: Episodes,
    config: PPOConfig,
    seed: int,
    *,
    state: TrainState | None = None,
    on_epoch: Callable[[TrainState], None] | None = None,
) -> Trained:
    """Train a policy for a constrained process.

    Every draw is keyed by the seed and the number of the epoch, so a run that goes on from a state is the run that was
    never stopped, bit for bit on one machine with one number of threads, if the dynamics draw nothing by position.

    Args:
        episodes: the process.
        config: settings.
        seed: of the run.
        state: where to go on; None starts anew.
        on_epoch: called with the state after every epoch.

    Returns:
        The policy and its history.

    Raises:
        InfeasibleError: neither single clusters, nor uniform draws, nor a policy trained for low costs alone keep the
            limits; the smallest rises reached are named.
        ConfigError: there is nothing to protect, or a limit is 0.
        BudgetError: the budget does not reach for one row.
        NumericsError: a reward, a cost or a gradient is not finite.
        SpecError: the state was made with other settings.
    """
    limits = episodes.terms.limits
    if len(limits) == 0:
        raise ConfigError(
            "a constrained policy needs a protected source", where="terms.limits", expected="at least one"
        )
    violation(limits, limits)  # refuses a limit of 0 before anything is played
    base = stream(seed, "policy/ppo")
    if state is None:
        state = _start(episodes, config, seed, base)
    else:
        check_continues(state, config, seed, _shape(episodes, config))
    while state.epoch < config.num_epochs:
        state = _epoch(episodes, state, base.child(f"epoch/{state.epoch}"))
        if on_epoch is not None:
            on_epoch(state)
    return _finish(episodes, state)


def _shape(episodes: Episodes, config: PPOConfig) -> Shape:
    sources = len(episodes.terms.limits)
    return Shape(episodes.table.features.shape[1] + 1, 2 + 2 * sources, sources, config.hidden)


def _start(episodes: Episodes, config: PPOConfig, seed: int, base: Stream) -> TrainState:
    """Probe with simple episodes, and with the cost-only policy when none of them keeps the limits."""
    limits, shape = episodes.terms.limits, _shape(episodes, config)
    episodes.multipliers = np.zeros(len(limits))
    trace = play(episodes, _Prober(), base.child("probe"), num=episodes.table.num_clusters + 1)
    gain, rise = trace.gain, trace.rise
    if not trace.actions.size:
        raise BudgetError("the budget of an episode does not reach for a single row", got=episodes.terms.budget,
                          where="terms.budget", do="allow more rows or tokens")  # fmt: skip
    if not (np.isfinite(gain).all() and np.isfinite(rise).all()):
        raise NumericsError("a reward or cost is not finite", where="probe episodes",
                            do="check the simulator's step, or the navigator's learning rate")  # fmt: skip
    scale = np.maximum(
        np.abs(np.column_stack([gain, rise])).max(axis=0), np.concatenate([[1e-6], 1e-3 * np.abs(limits)])
    )
    probe = Probe(gain, rise, bool(keeps(rise, limits).any()), 0, rise.min(axis=0), int((trace.actions >= 0).sum()))
    state = TrainState(
        seed, config, shape, _descent(start_actor(shape, base.child("actor"))),
        _descent(start_critic(shape, base.child("critic"))), start_multiplier(len(limits), config.multiplier), scale,
        probe, None, empty_history(len(limits)),
    )  # fmt: skip
    return state if probe.fits else _cost_only(episodes, state, base.child("cost"))


def _descent(weights: Float[np.ndarray, " P"]) -> Descent:
    return Descent(weights, np.zeros_like(weights), np.zeros_like(weights))


def _cost_only(episodes: Episodes, state: TrainState, draws: Stream) -> TrainState:
    """Train for low costs alone, sources weighted by Hedge on their violations, until one episode fits."""
    limits, config, probe = episodes.terms.limits, state.config, state.probe
    smallest, actor, critic, regret = probe.smallest, state.actor, state.critic, np.zeros(len(limits))
    decisions = probe.num_decisions
    for epoch in range(config.cost_epochs):
        keyed = draws.child(f"epoch/{epoch}")
        batch = collect(
            episodes, state.shape, (actor.weights, critic.weights), state.scale,
            (epoch * config.num_episodes, config.num_episodes), keyed.child("act").numpy(), config.decay,
        )  # fmt: skip
        regret = regret + HEDGE * np.clip(violation(batch.rise.mean(axis=0), limits), -1, 1)
        weight = np.exp(regret - regret.max())
        advantage = lagrangian_advantage(batch.advantage[:, 0], batch.advantage[:, 1:], weight / weight.sum(), 0.0)
        actor, _ = improve_actor(
            actor, state.shape, batch, advantage, config, (config.lr, keyed.child("order").numpy())
        )
        critic = improve_critic(critic, state.shape, batch, config)
        greedy, dealt, deployed = _judge(episodes, state.shape, actor, np.zeros(len(limits)), 0)
        kept = better(dealt, greedy, limits)
        decisions += len(batch.advantage) + deployed
        smallest = np.minimum(smallest, np.minimum(batch.rise.min(axis=0), kept.rise))
        if kept.feasible or keeps(batch.rise, limits).any():
            probe = replace(probe, fits=True, num_cost_epochs=epoch + 1, smallest=smallest, num_decisions=decisions)
            return replace(state, best=kept, probe=probe)
    names = episodes.dynamics.sources
    reached = ", ".join(f"{n} {s:.4g} (limit {e:.4g})" for n, s, e in zip(names, smallest, limits, strict=True))
    raise InfeasibleError(
        "PROBABLY INFEASIBLE: no policy was found that keeps the limits",
        where=f"{len(probe.gain)} probe episodes and {config.cost_epochs} epochs of training for low costs alone",
        got=f"smallest rise reached in nats, each source by itself: {reached}",
        expected="every source within its limit in one episode",
        do="allow a larger rise, choose a smaller budget, or add general rows for replay",
    )


class _Deployed:
    """One forward pass for two episodes of a policy: the first greedy, the second dealt."""

    name = "deployed"

    def __init__(self, policy: LearnedPolicy) -> None:
        self.policy, self.owed = policy, np.zeros((1, 0))

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        self.owed = np.zeros((1, episodes.table.num_clusters))

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        share = self.policy.probabilities(observation)
        return np.concatenate([np.argmax(share[:1], axis=1), deal(self.owed, share[1:], observation.mask[1:])])

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        pass


def _judge(
    episodes: Episodes, shape: Shape, actor: Descent, prices: Float[np.ndarray, " M"], epoch: int
) -> tuple[Kept, Kept, int]:
    """Play the greedy and the dealt episode in the order of the table, which is how a policy is deployed."""
    policy = LearnedPolicy(actor.weights, shape, prices)
    trace = play(episodes, _Deployed(policy), Stream(0, "policy/deployed"), num=2, shuffle=False)
    fits = keeps(trace.rise, episodes.terms.limits)
    greedy, dealt = (
        Kept(actor.weights, prices, bool(e), float(trace.gain[e]), trace.rise[e], bool(fits[e]), epoch) for e in (0, 1)
    )
    return greedy, dealt, int((trace.actions >= 0).sum())


def _epoch(episodes: Episodes, state: TrainState, draws: Stream) -> TrainState:
    """Collect, move the prices, update actor and critics, judge (ogs.md 3.4, step 2)."""
    config, shape, limits, done = state.config, state.shape, episodes.terms.limits, state.epoch + 1
    episodes.multipliers = state.multiplier.price
    batch = collect(
        episodes, shape, (state.actor.weights, state.critic.weights), state.scale,
        (state.epoch * config.num_episodes, config.num_episodes), draws.child("act").numpy(), config.decay,
    )  # fmt: skip
    rise = batch.rise.mean(axis=0)
    multiplier = update_multiplier(state.multiplier, rise, limits, config.multiplier)
    advantage = lagrangian_advantage(batch.advantage[:, 0], batch.advantage[:, 1:], multiplier.price)
    how = (config.lr_in(state.epoch), draws.child("order").numpy())
    actor, kl = improve_actor(state.actor, shape, batch, advantage, config, how)
    critic = improve_critic(state.critic, shape, batch, config)
    greedy, dealt, deployed = _judge(episodes, shape, actor, multiplier.price, done)
    history = state.history.add(
        gain=batch.gain.mean(), rise=rise, price=multiplier.price, kl=kl, greedy_gain=greedy.gain,
        greedy_rise=greedy.rise, dealt_gain=dealt.gain, dealt_rise=dealt.rise,
        decisions=len(batch.advantage) + deployed,
    )  # fmt: skip
    best = better(dealt, better(greedy, state.best, limits), limits)
    return replace(state, actor=actor, critic=critic, multiplier=multiplier, best=best, history=history)


def _finish(episodes: Episodes, state: TrainState) -> Trained:
    best, limits = state.best, episodes.terms.limits
    if best is None:
        raise ConfigError("nothing was trained", where="num_epochs", expected=">= 1")
    note = ""
    if not best.feasible:
        over = ", ".join(
            f"{name} {value:.4g} nats (limit {limit:.4g})"
            for name, value, limit in zip(episodes.dynamics.sources, best.rise, limits, strict=True)
        )
        note = f"no epoch's policy kept the limits, greedy or dealt; the least violating one is returned: {over}"
    policy = LearnedPolicy(best.actor, state.shape, best.prices, "deal" if best.dealt else "greedy")
    return Trained(
        policy,
        best.feasible,
        best.gain,
        best.rise,
        state,
        state.probe.num_decisions + int(state.history.decisions.sum()),
        note,
    )
