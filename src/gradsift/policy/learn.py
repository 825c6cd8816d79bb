"""From clusters and a navigator to a schedule: calibrate, train in the simulator, confirm on roll-outs, keep the best.

Source: ogs.md 3.3 to 3.5 (the paper's abstract, arXiv 2602.06359, names a learned constrained policy and no more). Ours:
trivial policies play under the same limits, all are confirmed on real roll-outs, and the learned one is returned only
where it is the best of those that keep the limits; whether it beat them beyond noise is said in words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import InfeasibleError
from gradsift.policy.accept import Bench, Settled, calibration_schedules, settle
from gradsift.policy.bandits import EpsilonGreedy, Exp3, Thompson
from gradsift.policy.calibration import Rollout
from gradsift.policy.contest import LEARNED, Tried, best_of, compare_with, confirm, simulate
from gradsift.policy.coordinates import Coordinates
from gradsift.policy.episodes import Dynamics, Episodes, Table, Terms
from gradsift.policy.kept import KEPT, KeptPolicy, kept_to_arrays, table_key
from gradsift.policy.lookahead import Lookahead
from gradsift.policy.mixture import fit_mixture
from gradsift.policy.plan import Effects
from gradsift.policy.planned import DualPlan, PricedRounds, RecedingDual, TightenedDual
from gradsift.policy.play import Policy, play
from gradsift.policy.ppo_lagrangian import Trained, from_arrays, to_arrays, train_policy
from gradsift.policy.schedule import LearnConfig, Learner, Schedule
from gradsift.policy.simple import Single, SizeProportional, Uniform
from gradsift.policy.simulator import Simulator
from gradsift.seeds import Stream, key64

MAX_DECISIONS = 10
"""Decisions of an episode when nothing else is asked: each is followed by a measurement of every held-out set."""


MIN_MIXED = 3
"""Different schedules below which no effects are regressed."""

MIXTURE_ROUNDS = 3
"""Plans from regressed effects, each fitted to the roll-outs of the one before as well."""


def learn_schedule(
    table: Table, budget: int, coordinates: Coordinates, learner: Learner, config: LearnConfig, stream: Stream
) -> Schedule:
    """Decide which cluster feeds each step.

    Args:
        table: the clusters.
        budget: of an episode, in the unit of the table's prices.
        coordinates: the pool in short vectors.
        learner: the navigator.
        config: settings.
        stream: of every draw.

    Returns:
        The schedule of the best policy that keeps the limits on real roll-outs.

    Raises:
        InfeasibleError: nothing keeps the limits and ``infeasible`` is ``stop``.
    """
    rows = config.rows_per_decision or _rows_per_decision(table, budget)
    learner.start(rows)
    terms = Terms(rows, budget, np.ones(len(coordinates.sources)))
    bench = Bench(table, terms, coordinates, None, stream.child("bench"))
    first = calibration_schedules(bench)
    begun = learner.roll(first[0], "calibration 1")
    start = begun.losses[0]
    nats, share = config.allowed_nats, config.allowed_rise
    limits = share * start[:-1] if nats is None else np.full(len(start) - 1, nats)
    bench = replace(bench, terms=replace(terms, limits=limits))
    made = _Planners(bench, learner, config, stream)
    made.rolled[first[0].tobytes()] = begun
    settled = settle(bench, made.roll, [made.dual, made.learned], first)
    return _contest(bench, made, settled, start, config, stream)


def _rows_per_decision(table: Table, budget: int) -> int:
    """A tenth of the rows that the budget buys at the mean price."""
    everyone = np.concatenate([np.array(some) for some in table.members])
    return max(1, round(budget / float(table.price[everyone].mean()) / MAX_DECISIONS))


class _Planners:
    """Schedules that depend on the simulator's fit; the last learned policy and what went wrong are kept."""

    def __init__(self, bench: Bench, learner: Learner, config: LearnConfig, stream: Stream) -> None:
        self.bench, self.learner, self.config, self.stream = bench, learner, config, stream
        self.trained: Trained | None = None
        self.refused: InfeasibleError | None = None
        self.number = 0
        self.rolled: dict[bytes, Rollout] = {}

    def roll(self, rows: Int[np.ndarray, "T b"]) -> Rollout:
        self.number += 1
        return self.roll_named(rows, f"calibration {self.number}")

    def roll_named(self, rows: Int[np.ndarray, "T b"], name: str) -> Rollout:
        if (key := rows.tobytes()) not in self.rolled:  # equal schedules are one roll-out
            self.rolled[key] = self.learner.roll(rows, name)
        return replace(self.rolled[key], name=name)

    def episodes(self, dynamics: Dynamics) -> Episodes:
        return Episodes(self.bench.table, dynamics, self.bench.terms, self.stream.child("episodes"))

    def dual(self, simulator: Simulator) -> Int[np.ndarray, "T b"]:
        policy = DualPlan(effects_of(simulator, self.bench.table, self.bench.terms))
        return play(self.episodes(simulator), policy, self.stream.child("dual"), shuffle=False).rows[0]

    def learned(self, simulator: Simulator) -> Int[np.ndarray, "T b"]:
        """Train in the simulator; where it finds nothing feasible, the linear program's plan stands in."""
        self.train(simulator)
        if self.trained is None:
            return self.dual(simulator)
        return play(self.episodes(simulator), self.trained.policy, self.stream.child("ppo"), shuffle=False).rows[0]

    def train(self, dynamics: Dynamics, keep: str = "") -> None:
        """Train anew, or from where a stopped run was; ``keep`` names the state on disk."""
        kept = self.learner.load(keep) if keep else None
        self.trained = self.refused = None
        try:
            self.trained = train_policy(
                self.episodes(dynamics),
                self.config.ppo,
                self.stream.seed,
                state=None if kept is None else from_arrays(kept),
                on_epoch=(lambda state: self.learner.save(keep, to_arrays(state))) if keep else None,
            )
        except InfeasibleError as error:
            self.refused = error


def effects_of(simulator: Simulator, table: Table, terms: Terms) -> Effects:
    """What one decision does at the starting weights, by the calibrated simulator.

    Args:
        simulator: calibrated.
        table: the clusters.
        terms: rows per decision.

    Returns:
        [K] gains and [K, M] harms in nats, each the mean over the consecutive batches of a cluster.
    """
    gain, harm = [], []
    for some in table.members:
        width = terms.rows_per_decision
        count = max(1, len(some) // width)
        batches = np.array(some[: count * width]).reshape(count, -1)
        paths = simulator.run(batches[:, None])
        change = (paths[:, 1] - paths[:, 0]).mean(axis=0)
        gain.append(-change[-1])
        harm.append(change[:-1])
    return Effects(np.array(gain), np.stack(harm))


def _contest(
    bench: Bench, made: _Planners, settled: Settled, start: Float[np.ndarray, " A"], config: LearnConfig, stream: Stream
) -> Schedule:
    """Play every policy in the simulator and on the navigator, and keep the best that keeps the limits."""
    simulator, notes = settled.simulator, [settled.sentence]
    unbounded = replace_bound(simulator)
    told = settled.accepted or config.on == "navigator"
    if config.on == "navigator":
        made.train(made.learner.dynamics, keep=_state_name(made))
    elif not settled.accepted:
        made.trained = None
    if made.refused is not None:
        if config.infeasible == "stop" and told:
            raise made.refused
        source = "" if told else "in the simulator, which is not trusted: "
        notes.append(f"{source}{made.refused.what}; {made.refused.got}")
    effects = effects_of(unbounded, bench.table, bench.terms)
    policies = _policies(effects, unbounded, made, config)
    episodes = made.episodes(unbounded)
    num = max(config.num_simulated, config.num_confirmed - 1)  # their orders of rows are those of the real roll-outs
    tried = [simulate(episodes, p, stream.child("simulate"), num) for p in policies]
    tried = [
        confirm(one, made.roll_named, config.num_confirmed) if one.name in config.confirmed else one for one in tried
    ]
    tried += _regressed(bench, made, episodes, config, stream)
    if len(made.rolled) < MIN_MIXED:
        notes.append(f"only {len(made.rolled)} schedules differ, too few to regress effects on")
    real = [one for one in tried if len(one.gain)]
    best, feasible = best_of(real, bench.terms.limits)
    if not feasible:
        if config.infeasible == "stop":
            raise _nothing_keeps(real, best, bench.terms.limits, settled.simulator.sources)
        notes.append("no policy kept every limit on its real roll-outs; the one that broke them least is returned")
    notes.append(compare_with(real, LEARNED, bench.terms.limits))
    if made.trained is not None and made.trained.note:
        notes.append(made.trained.note)
    if len(made.rolled) >= MIN_MIXED:  # told by real roll-outs, the last plans' own among them
        effects = fit_mixture(list(made.rolled.values()), bench.table, bench.terms.rows_per_decision).effects
    return Schedule(best.name, best.actions, best.rows, feasible, bench.terms.limits, start, tuple(tried), settled,
                    made.trained, tuple(notes), effects)  # fmt: skip


def keep_learned(found: Schedule, table: Table, learner: Learner) -> None:
    """Let the learner keep what online selection needs later: effects of the clusters, and the learned policy.

    Args:
        found: the outcome.
        table: its clusters.
        learner: who keeps it, under the name ``policy.kept.KEPT``.
    """
    policy = None if found.trained is None else found.trained.policy
    kept = KeptPolicy(table_key(table), found.rows.shape[1], found.effects, policy)
    learner.save(KEPT, kept_to_arrays(kept))


def _regressed(bench: Bench, made: _Planners, episodes: Episodes, config: LearnConfig, stream: Stream) -> list[Tried]:
    """Plans from effects that were regressed on all roll-outs so far; each plan's own roll-outs enter the next fit."""
    out = []
    for turn in range(MIXTURE_ROUNDS if len(made.rolled) >= MIN_MIXED else 0):
        fit = fit_mixture(list(made.rolled.values()), bench.table, bench.terms.rows_per_decision)
        plan = DualPlan(fit.effects)
        plan.name = f"mixture_regression_{turn + 1}"
        tried = simulate(episodes, plan, stream.child("simulate"), max(config.num_simulated, config.num_confirmed - 1))
        out.append(confirm(tried, made.roll_named, config.num_confirmed))
    return out


def _nothing_keeps(
    real: Sequence[Tried], best: Tried, limits: Float[np.ndarray, " M"], sources: Sequence[str]
) -> InfeasibleError:
    """Say how close real roll-outs came."""
    smallest = np.min([one.rise.mean(axis=0) for one in real], axis=0)
    reached = ", ".join(f"{n} {s:.4g} (limit {e:.4g})" for n, s, e in zip(sources, smallest, limits, strict=True))
    return InfeasibleError(
        "no policy kept every limit on its real roll-outs",
        where=f"{len(real)} policies; {best.name} broke them least, by {best.excess(limits):.0%} of a limit",
        got=f"smallest mean rise reached in nats, each source by itself: {reached}",
        expected="every source within its limit plus one standard error",
        do="allow a larger rise, choose a smaller budget, add general rows for replay, or set infeasible=least",
    )


def _state_name(made: _Planners) -> str:
    """Name the state of a training by all that it depends on beside the navigator: another one is another training."""
    table, terms = made.bench.table, made.bench.terms
    fields = {
        "members": table.members, "price": table.price.tolist(), "features": table.features.tolist(),
        "rows_per_decision": terms.rows_per_decision, "budget": terms.budget, "limits": terms.limits.tolist(),
        "stream": [made.stream.seed, made.stream.name], "ppo": asdict(made.config.ppo),
    }  # fmt: skip
    return f"policy-{key64(json.dumps(fields, sort_keys=True)):016x}"


def replace_bound(simulator: Simulator) -> Simulator:
    """The simulator without its bound: for comparing schedules whose truth the navigator tells.

    Args:
        simulator: bounded by its validation.

    Returns:
        The same one for episodes of any length.
    """
    return Simulator(simulator.coordinates, simulator.coefficients, simulator.start, simulator.curvature)


def _policies(effects: Effects, simulator: Simulator, made: _Planners, config: LearnConfig) -> Sequence[Policy]:
    """Everything that plays; bandits learn over as many simulated episodes as one tenth of the training has."""
    own = replace_bound(simulator)  # the tightened plan tries itself out while the other one is being played

    def rises(policy: Policy) -> Float[np.ndarray, " M"]:
        trace = play(made.episodes(own), policy, made.stream.child("tighten"), num=config.num_simulated)
        return trace.rise.mean(axis=0)

    def ahead() -> Lookahead:
        return Lookahead(replace_bound(simulator), made.bench.terms.rows_per_decision)

    best = Single(int(np.argmax(effects.gain)))
    best.name = "best_single"
    out: list[Any] = [Uniform(), SizeProportional(), best, DualPlan(effects), TightenedDual(effects, rises),
                      RecedingDual(ahead()), PricedRounds(ahead())]  # fmt: skip
    for bandit in (EpsilonGreedy(), Exp3(), Thompson()):
        for turn in range(max(1, config.ppo.num_epochs // 10)):
            play(made.episodes(simulator), bandit, made.stream.child(f"{bandit.name}/{turn}"),
                 first=turn * config.ppo.num_episodes, num=config.ppo.num_episodes)  # fmt: skip
        out.append(bandit)
    if made.trained is not None:
        out.append(made.trained.policy)
    return out
