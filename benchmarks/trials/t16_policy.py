"""T16, is the policy worth its cost? Learned, bandit and static policies on a simulated cluster bandit of known optimum.

Three variants: `stationary`, `drifting` (the clusters' gains turn around within an episode) and `binding` (the gainful
clusters cost more than the limit allows). Every learner gets the decisions that PPO used. Regret is counted on the
clusters' mean effects, so the luck of single rows is out of it, and breaking the limit earns nothing:

    regret = optimum - (gain - price * max(0, cost - limit)), as a share of the optimum, never below 0,

with optimum and price from the linear program over (cluster, decision), which knows the drift.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from benchmarks.trials.common import Check, Outcome, Trial, main, over_seeds
from scipy.optimize import linprog

from gradsift.errors import InfeasibleError
from gradsift.evaluate.statistics import iqm, probability_of_improvement
from gradsift.policy.bandits import EpsilonGreedy, Exp3, Thompson
from gradsift.policy.episodes import Episodes, Losses, Table, Terms
from gradsift.policy.plan import Effects
from gradsift.policy.planned import DualPlan
from gradsift.policy.play import Policy, play
from gradsift.policy.ppo_lagrangian import PPOConfig, train_policy
from gradsift.policy.simple import Scheduled, Uniform
from gradsift.seeds import Stream, stream

VARIANTS = ("stationary", "drifting", "binding")
PPO, STATIC, UNIFORM = "ppo_lagrangian", "static plan", "uniform"
CLUSTERS, DECISIONS, CAPACITY, ROWS = 6, 20, 8, 2
ROW_SPREAD = 0.2  # of a row's effect, as a share of its cluster's
MEASURE_NOISE = 0.1  # of the measured effect of a cluster, as a share of the true one
NUM_EVAL = 32
QUANTILE = 0.25  # of the clusters, the most harmful ones, that the quantile rule drops
ALLOWED = 0.05  # excess over the limit, as a share of it, that is stated
CONFIG = PPOConfig()


@dataclass(frozen=True)
class Bandit:
    """One simulated process.

    Args:
        episodes: the process.
        gain: float [K, T] mean gain of a decision, in nats.
        cost: float [K] mean rise of a decision, in nats.
        measured: effects at the start, with noise: what a static rule knows.
        optimum: largest gain within the limit.
        price: of the limit at the optimum.
    """

    episodes: Episodes
    gain: np.ndarray
    cost: np.ndarray
    measured: Effects
    optimum: float
    price: float

    @property
    def limit(self) -> float:
        return float(self.episodes.terms.limits[0])

    def regret(self, actions: np.ndarray) -> np.ndarray:
        """Regret of episodes [E, T] as a share of the optimum."""
        gain, cost = self.gain[actions, np.arange(actions.shape[1])].sum(1), self.cost[actions].sum(1)
        return (self.optimum - gain + self.price * np.maximum(0, cost - self.limit)) / abs(self.optimum)

    def excess(self, actions: np.ndarray) -> np.ndarray:
        """Mean-effect cost over the limit as a share of it; below 0 where it is kept."""
        return self.cost[actions].sum(1) / self.limit - 1


class Moving:
    """Rows with fixed costs, and gains that move from a first to a last value over an episode."""

    sources = ("general",)

    def __init__(self, first: np.ndarray, last: np.ndarray, cost: np.ndarray) -> None:
        self.first, self.last, self.cost = (np.append(x, 0.0) for x in (first, last, cost))  # the last entry: NO_ROW

    def reset(self, num: int) -> Losses:
        self.decision, self.target, self.protect = 0, np.zeros(num), np.zeros((num, 1))
        return Losses(self.target, self.protect)

    def step(self, rows: np.ndarray) -> Losses:
        share = self.decision / (DECISIONS - 1)
        self.decision += 1
        self.target = self.target - ((1 - share) * self.first[rows] + share * self.last[rows]).sum(1)
        self.protect = self.protect + self.cost[rows].sum(1)[:, None]
        return Losses(self.target, self.protect)


def solve(gain: np.ndarray, cost: np.ndarray, limit: float | None) -> tuple[float, float, float]:
    """Best gain [K, T] with each cluster at most CAPACITY times: optimum, price of the limit, cost."""
    k, t = gain.shape
    once, often = np.kron(np.ones((1, k)), np.eye(t)), np.kron(np.eye(k), np.ones((1, t)))
    bounded, most = [often], [np.full(k, CAPACITY)]
    if limit is not None:
        bounded, most = [np.repeat(cost, t)[None], *bounded], [np.array([limit]), *most]
    got = linprog(-gain.ravel(), A_ub=np.vstack(bounded), b_ub=np.concatenate(most), A_eq=once, b_eq=np.ones(t))
    price = 0.0 if limit is None else -float(got.ineqlin.marginals[0])
    return -float(got.fun), price, float(np.repeat(cost, t) @ got.x)


def make(variant: str, seed: int) -> Bandit:
    """Draw a process; the last cluster is general: little gain, and the loss that is protected falls."""
    base = stream(seed, f"trials/t16/{variant}")
    random = base.numpy()
    first = random.uniform(0.005, 0.05, CLUSTERS)
    cost = 0.03 * random.uniform(0.2, 1.0, CLUSTERS) * first / first.max()
    first[-1], cost[-1] = 0.002, -0.01
    last = first[np.argsort(first)[::-1]][np.argsort(np.argsort(first))] if variant == "drifting" else first
    when = np.linspace(0, 1, DECISIONS)
    gain = first[:, None] * (1 - when) + last[:, None] * when
    _, _, free = solve(gain, cost, None)
    low = -solve(np.tile(-cost[:, None], DECISIONS), cost, None)[0]
    limit = low + 0.4 * (free - low) if variant == "binding" else 2 * max(free, 0.05)
    optimum, price, _ = solve(gain, cost, limit)
    rows = np.repeat(np.arange(CLUSTERS), CAPACITY * ROWS)
    own = 1 + ROW_SPREAD * random.normal(size=(2, CLUSTERS, CAPACITY * ROWS))
    own = (own / own.mean(axis=2, keepdims=True)).reshape(2, -1)  # a cluster's mean is what it is said to be
    dynamics = Moving(first[rows] * own[0] / ROWS, last[rows] * own[0] / ROWS, cost[rows] * own[1] / ROWS)
    noisy = 1 + MEASURE_NOISE * random.normal(size=(2, CLUSTERS))
    measured = Effects(first * noisy[0], (cost * noisy[1])[:, None])
    members = tuple(tuple(np.flatnonzero(rows == k).tolist()) for k in range(CLUSTERS))
    features = np.column_stack([measured.gain, measured.harm, np.arange(CLUSTERS) == CLUSTERS - 1])
    table = Table(members, np.ones(len(rows), dtype=np.int64), features, ("gain", "harm", "general"),
                  np.arange(CLUSTERS) == CLUSTERS - 1)  # fmt: skip
    terms = Terms(ROWS, ROWS * DECISIONS, np.array([limit]))
    return Bandit(Episodes(table, dynamics, terms, base.child("episodes")), gain, cost, measured, optimum, price)


def greedy(bandit: Bandit) -> Policy:
    """The largest measured gain until it is used up, then the next; the limit is not looked at."""
    return Scheduled(np.repeat(np.argsort(-bandit.measured.gain, kind="stable"), CAPACITY)[:DECISIONS], "greedy")


def quantile(bandit: Bandit) -> Policy:
    """Drop the most harmful quarter of the clusters, then the largest measured gain with a cap of 1.5 T / K each."""
    harm = bandit.measured.harm[:, 0]
    left = np.argsort(harm, kind="stable")[: CLUSTERS - int(QUANTILE * CLUSTERS)]
    order, cap = left[np.argsort(-bandit.measured.gain[left], kind="stable")], int(np.ceil(1.5 * DECISIONS / CLUSTERS))
    rounds = np.concatenate([np.repeat(order, cap), np.repeat(order, CAPACITY - cap)])
    return Scheduled(rounds[:DECISIONS], "static quantile")


def static(bandit: Bandit) -> Policy:
    """ogs_dual on clusters: the linear program on the effects measured at the start."""
    return DualPlan(bandit.measured)


OTHERS: dict[str, Callable[[Bandit], Policy]] = {
    "greedy": greedy,
    "static quantile": quantile,
    STATIC: static,
    "thompson": lambda bandit: Thompson(),
    "epsilon_greedy": lambda bandit: EpsilonGreedy(),
    "exp3": lambda bandit: Exp3(),
    UNIFORM: lambda bandit: Uniform(),
}
LEARNERS = ("thompson", "epsilon_greedy", "exp3")


def score(bandit: Bandit, policy: Policy, draws: Stream) -> dict[str, float]:
    """Mean regret and excess over fresh episodes, which no learner has seen."""
    trace = play(bandit.episodes, policy, draws, first=1_000_000, num=NUM_EVAL)
    return {"regret": float(bandit.regret(trace.actions).mean()), "excess": float(bandit.excess(trace.actions).mean())}


def measure_variant(variant: str, seed: int, config: PPOConfig) -> dict[str, Any]:
    """Train and score every policy on one process."""
    bandit, draws = make(variant, seed), stream(seed, f"trials/t16/{variant}/play")
    out: dict[str, Any] = {}
    steps = config.num_epochs * config.num_episodes * DECISIONS
    try:
        trained = train_policy(bandit.episodes, config, seed)
        steps = trained.num_decisions
        out[PPO] = score(bandit, trained.policy, draws.child(PPO)) | {"feasible": trained.feasible}
    except InfeasibleError:
        out[PPO] = score(bandit, Uniform(), draws.child(PPO)) | {"feasible": False}
    for name, make_policy in OTHERS.items():
        policy = make_policy(bandit)
        bandit.episodes.multipliers = np.zeros(1)
        if name in LEARNERS:
            for part in range(steps // (NUM_EVAL * DECISIONS)):
                play(bandit.episodes, policy, draws.child(f"{name}/{part}"), first=part * NUM_EVAL, num=NUM_EVAL)
        out[name] = score(bandit, policy, draws.child(name))
    return out | {"decisions": steps, "price": bandit.price, "optimum": bandit.optimum}


def measure(seed: int) -> dict[str, Any]:
    """All variants for one seed."""
    return {variant: measure_variant(variant, seed, CONFIG) for variant in VARIANTS}


def judge(figures: Mapping[int, dict[str, Any]]) -> Outcome:
    """PPO nowhere worse than uniform, better than the static plan when drifting, limit kept as stated."""
    some = list(figures.values())

    def regrets(variant: str, name: str) -> list[float]:
        return [f[variant][name]["regret"] for f in some]

    checks, words = [], []
    against = {v: over_seeds(regrets(v, UNIFORM), regrets(v, PPO)) for v in VARIANTS}
    text = ", ".join(f"{v} {i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}]" for v, i in against.items())
    checks.append(Check("uniform's regret minus PPO's", text, "interval above 0 in every variant",
                        min(i.low for i in against.values()) > 0))  # fmt: skip
    drift = over_seeds(regrets("drifting", STATIC), regrets("drifting", PPO))
    checks.append(Check("the static plan's regret minus PPO's, drifting",
                        f"{drift.mean:+.3f} [{drift.low:+.3f}, {drift.high:+.3f}]", "interval above 0", drift.low > 0))  # fmt: skip
    excess = [max(0.0, f["binding"][PPO]["excess"]) for f in some]
    kept = sum(e <= ALLOWED for e in excess)
    checks.append(Check("PPO's excess over the binding limit",
                        f"mean {np.mean(excess):.1%}, largest {max(excess):.1%}, {kept} of {len(some)} within {ALLOWED:.0%}",
                        f"mean <= {ALLOWED:.0%}, and 90% of the seeds", bool(np.mean(excess) <= ALLOWED and kept >= 0.9 * len(some))))  # fmt: skip
    for variant in VARIANTS:
        parts = []
        for name in (PPO, *OTHERS):
            seen = regrets(variant, name)
            over = float(np.mean([max(0.0, f[variant][name]["excess"]) for f in some]))
            parts.append(f"{name} {iqm(seen):.3f}" + (f" (limit exceeded by {over:.0%})" if over > 0.005 else ""))
        words.append(f"regret (interquartile mean), {variant}: " + ", ".join(parts))
        better = {n: probability_of_improvement(regrets(variant, n), regrets(variant, PPO)) for n in OTHERS}
        words.append("PPO better with probability " + ", ".join(f"{n} {p:.2f}" for n, p in better.items()))
        none = [n for n in OTHERS if not over_seeds(regrets(variant, n), regrets(variant, PPO)).low > 0]
        if none:
            words.append(f"no advantage over {', '.join(none)} was measured ({variant})")
    return Outcome("T16", tuple(checks), tuple(words))


TRIAL = Trial(
    "T16",
    range(20),
    measure,
    judge,
    {
        "clusters": CLUSTERS,
        "decisions": DECISIONS,
        "capacity": CAPACITY,
        "rows_per_decision": ROWS,
        "row_spread": ROW_SPREAD,
        "measure_noise": MEASURE_NOISE,
        "episodes_scored": NUM_EVAL,
        "quantile": QUANTILE,
        "allowed_excess": ALLOWED,
        "ppo": {k: v for k, v in vars(CONFIG).items() if k != "multiplier"} | {"multiplier": vars(CONFIG.multiplier)},
    },
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
