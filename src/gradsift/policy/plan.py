"""How often to choose each cluster when effects add up: the cluster-level linear program, whole counts, and their order.

ogs.md 3.3: in a world of first order the best policy is this program's solution, max sum n_k gain_k with
sum n_k harm_km <= limit_m, 0 <= n_k <= capacity_k and a budget that is used up. Rounding and order are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import NumericsError
from gradsift.policy.episodes import Table, Terms

MAX_ENUMERATED = 12
MAX_SWAPS = 1000
TINY = 1e-9


@dataclass(frozen=True)
class Effects:
    """What one decision for a cluster is expected to do, in nats.

    Args:
        gain: float64 [K] (or [E, K], per episode) fall of the target loss.
        harm: float64 [K, M] (or [E, K, M]) rise of each protected source's loss; below 0 where it falls.
    """

    gain: Float[np.ndarray, "*e K"]
    harm: Float[np.ndarray, "*e K M"]


@dataclass(frozen=True)
class ClusterProgram:
    """The linear program over counts.

    Args:
        gain: float64 [K] fall of the target loss per decision, nats.
        harm: float64 [K, M] rise of each source's loss per decision, nats.
        capacity: float64 [K] decisions each cluster has rows for.
        limits: float64 [M] allowed rises, not 0; each is its own unit.
        budget: what an episode may use, in the unit of ``price``.
        price: float64 [K] what one decision uses, above 0.
        spent: float64 [M] rise that has already happened, as a share of |limit|; also what limits are tightened by.

    Raises:
        NumericsError: an effect or a rise is not finite.
    """

    gain: Float[np.ndarray, " K"]
    harm: Float[np.ndarray, "K M"]
    capacity: Float[np.ndarray, " K"]
    limits: Float[np.ndarray, " M"]
    budget: float
    price: Float[np.ndarray, " K"]
    spent: Float[np.ndarray, " M"]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.gain).all() and np.isfinite(self.harm).all() and np.isfinite(self.spent).all()):
            raise NumericsError(
                "an effect of a cluster or a measured rise is not finite",
                where="policy: gain, harm and rise",
                got=f"gain {self.gain.tolist()}, harm {self.harm.tolist()}, rise over limit {self.spent.tolist()}",
                expected="finite numbers",
                do="look at the losses of the roll-outs; a learner that diverged needs a smaller step",
            )

    @property
    def total(self) -> float:
        """What the counts have to use: the budget, or all there is."""
        return float(min(self.budget, self.capacity @ self.price))

    @property
    def bounds(self) -> Float[np.ndarray, " M"]:
        """Limits that are left, as shares of |limit|."""
        return np.sign(self.limits) - self.spent

    @property
    def relative_harm(self) -> Float[np.ndarray, "K M"]:
        """Rises per decision as shares of |limit|."""
        return self.harm / np.abs(self.limits)

    def excess(self, counts: Float[np.ndarray, "*n K"]) -> Float[np.ndarray, "*n"]:
        """By how much the worst source is above its limit.

        Args:
            counts: [..., K] decisions per cluster.

        Returns:
            float64 [...] as a share of |limit|; at most 0 where all limits hold, -inf without sources.
        """
        return np.max(counts @ self.relative_harm - self.bounds, axis=-1, initial=-np.inf)


@dataclass(frozen=True)
class Plan:
    """A solution of the program.

    Args:
        counts: float64 [K] decisions per cluster.
        prices: float64 [M] lambda, nats of gain per nat of allowed rise, >= 0.
        gain: expected gain in nats.
        rise: float64 [M] expected rises in nats.
        excess: by how much the worst limit is missed, as a share of |limit|; at most 0 when feasible. Where no counts
            keep the limits, this is the smallest excess there is and the counts are the best that reach it.
        feasible: whether all limits hold.
    """

    counts: Float[np.ndarray, " K"]
    prices: Float[np.ndarray, " M"]
    gain: float
    rise: Float[np.ndarray, " M"]
    excess: float
    feasible: bool


def plan_lp(
    gain: Float[np.ndarray, " K"],
    harm: Float[np.ndarray, "K M"],
    capacity: Float[np.ndarray, " K"] | Int[np.ndarray, " K"],
    limits: Float[np.ndarray, " M"],
    decisions: float,
    price: Float[np.ndarray, " K"] | None = None,
) -> Plan:
    """Solve the cluster-level program (ogs.md 3.3) with HiGHS.

    Args:
        gain: [K] fall of the target loss per decision, nats.
        harm: [K, M] rise of each source's loss per decision, nats.
        capacity: [K] decisions each cluster has rows for.
        limits: [M] allowed rises over the episode, nats, not 0.
        decisions: decisions of an episode, or its budget in the unit of ``price``; used up as far as rows reach.
        price: [K] what a decision uses; 1 each when None.

    Returns:
        Fractional counts (a vertex: at most M + 1 are not at a bound) and the prices of the limits.

    Raises:
        NumericsError: the solver did not reach an optimum.
    """
    each = np.ones(len(gain)) if price is None else price
    wide = capacity.astype(np.float64)
    return solve(ClusterProgram(gain, harm, wide, limits, float(decisions), each, np.zeros(len(limits))))


def solve(program: ClusterProgram) -> Plan:
    """Solve the program; with the smallest excess where no counts keep the limits.

    Args:
        program: what is asked.

    Returns:
        Fractional counts and prices.

    Raises:
        NumericsError: the solver did not reach an optimum.
    """
    found = _highs(program, program.bounds)
    if found is None:
        short = max(0.0, least_excess(program))
        found = _highs(program, program.bounds + short * (1 + 1e-7) + 1e-7)
        if found is None:
            raise _unsolved("no answer at its own smallest excess")
    counts = np.clip(found.x, 0.0, program.capacity)
    slopes = -np.asarray(found.ineqlin.marginals, dtype=np.float64) if len(program.limits) else np.zeros(0)
    prices = np.maximum(0.0, slopes) * _unit(program.gain) / np.abs(program.limits)
    return _plan(program, counts, prices, slack=1e-6)


def least_excess(program: ClusterProgram) -> float:
    """The smallest share of |limit| by which all limits would have to move for the program to be just feasible.

    Args:
        program: what is asked.

    Returns:
        Above 0 when the limits cannot be kept; below 0 there is room to tighten them by as much.

    Raises:
        NumericsError: the solver did not reach an optimum.
    """
    from scipy.optimize import linprog

    k, m = program.harm.shape
    if m == 0:
        return -np.inf
    result = linprog(
        np.append(np.zeros(k), 1.0),
        A_ub=np.column_stack([program.relative_harm.T, -np.ones(m)]),
        b_ub=program.bounds,
        A_eq=np.append(program.price, 0.0)[None] / program.price.max(),
        b_eq=[program.total / program.price.max()],
        bounds=[*((0.0, c) for c in program.capacity), (None, None)],
        method="highs-ds",
    )
    if result.status != 0:
        raise _unsolved(result.message)
    return float(result.fun)


def _highs(program: ClusterProgram, bounds: Float[np.ndarray, " M"]) -> Any:
    """SciPy's result, or None where no counts keep the bounds; everything is scaled to be of order 1."""
    from scipy.optimize import linprog

    sources = len(program.limits)
    result = linprog(
        -program.gain / _unit(program.gain),
        A_ub=program.relative_harm.T if sources else None,
        b_ub=bounds if sources else None,
        A_eq=program.price[None] / program.price.max(),
        b_eq=[program.total / program.price.max()],
        bounds=[(0.0, c) for c in program.capacity],
        method="highs-ds",
    )
    if result.status == 0:
        return result
    if result.status == 2:
        return None
    raise _unsolved(result.message)


def _unit(gain: Float[np.ndarray, " K"]) -> float:
    return float(np.abs(gain).max(initial=0.0)) or 1.0


def _unsolved(message: str) -> NumericsError:
    return NumericsError(
        "the cluster-level linear program did not solve",
        where="policy: gain, harm, capacity and limits of the clusters",
        got=message,
        expected="finite numbers",
        do="look at the effects of the clusters; report this with them if they are finite",
    )


def _plan(program: ClusterProgram, counts: Float[np.ndarray, " K"], prices: Any, slack: float = TINY) -> Plan:
    excess = float(program.excess(counts))
    return Plan(
        counts, prices, float(counts @ program.gain), counts @ program.harm, excess, feasible=bool(excess <= slack)
    )


def whole_counts(program: ClusterProgram, plan: Plan) -> Plan:
    """Make the counts whole (ours, after ogs.md 3.2 step 6: subsets of the fractional ones, then single swaps).

    The counts use the budget up and at most one decision more, which the episode cuts short. Among whole counts that
    keep the limits the swaps raise the gain; where none were found they lower the excess.

    Args:
        program: what was asked.
        plan: its fractional solution.

    Returns:
        Whole counts with the prices of the fractional solution.
    """
    whole = np.floor(plan.counts + TINY)
    part = plan.counts - whole
    order = np.argsort(-part, kind="stable")
    split = order[part[order] > TINY]
    whole[split[MAX_ENUMERATED:]] += np.rint(part[split[MAX_ENUMERATED:]])
    split = split[:MAX_ENUMERATED]
    subsets = (np.arange(2 ** len(split))[:, None] >> np.arange(len(split))) & 1
    candidates = np.tile(whole, (len(subsets), 1))
    candidates[:, split] += subsets
    inside = _uses_up(program, candidates)
    # with more fractional counts than are tried the budget may be missed: all of them is the nearest from above
    candidates = candidates[inside] if inside.any() else candidates[-1:]
    counts = candidates[_best(program.excess(candidates), candidates @ program.gain)]
    for _ in range(MAX_SWAPS):
        better = _swapped(program, counts)
        if better is None:
            break
        counts = better
    return _plan(program, counts, plan.prices)


def _uses_up(program: ClusterProgram, counts: Float[np.ndarray, "*n K"]) -> Bool[np.ndarray, "*n"]:
    used = counts @ program.price
    slack = 1e-9 * max(1.0, program.total)
    # the last decision may go over the budget, the one before it may not: dropping the dearest must fall below
    dearest = np.max(np.where(counts > 0, program.price, 0.0), axis=-1)
    return (used >= program.total - slack) & (used - dearest < program.total - slack)


def _best(excess: Float[np.ndarray, " n"], gain: Float[np.ndarray, " n"]) -> int:
    """Largest gain among those within the limits, else least excess; the first of equals."""
    if (excess <= TINY).any():
        return int(np.argmax(np.where(excess <= TINY, gain, -np.inf)))
    return int(np.argmin(excess))


def _swapped(program: ClusterProgram, counts: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"] | None:
    """The counts after the best move of one decision from one cluster to another; None when none is better."""
    k = len(counts)
    give, take = np.divmod(np.arange(k * k), k)
    allowed = (give != take) & (counts[give] >= 1) & (counts[take] + 1 <= program.capacity[take])
    give, take = give[allowed], take[allowed]
    moved = np.tile(counts, (len(give), 1))
    moved[np.arange(len(give)), give] -= 1
    moved[np.arange(len(give)), take] += 1
    moved = moved[_uses_up(program, moved)]
    if not len(moved):
        return None
    excess, gain = program.excess(moved), moved @ program.gain
    best, here = _best(excess, gain), float(program.excess(counts))
    if here > TINY:
        return moved[best] if excess[best] < here - TINY else None
    margin = TINY * _unit(program.gain)
    return moved[best] if excess[best] <= TINY and gain[best] > counts @ program.gain + margin else None


def deal(counts: Float[np.ndarray, " K"]) -> Int[np.ndarray, " T"]:
    """Put whole counts into an even order: the j-th of n decisions for a cluster stands at (j - 1/2) / n of the episode.

    Args:
        counts: [K] whole numbers.

    Returns:
        int64 [T] cluster numbers, T their sum; the smaller number first among equals.
    """
    n = np.rint(counts).astype(np.int64)
    cluster = np.repeat(np.arange(len(n)), n)
    turn = np.arange(len(cluster)) - np.repeat(np.cumsum(n) - n, n)
    return cluster[np.lexsort((cluster, (turn + 0.5) / n[cluster]))]


def program_of(table: Table, terms: Terms, effects: Effects) -> ClusterProgram:
    """The program of a whole episode.

    Args:
        table: the clusters.
        terms: batch, budget and limits.
        effects: [K] and [K, M] effects per decision.

    Returns:
        The program; a decision's price is that of a full batch at the cluster's mean price per row.
    """
    per_row = np.array([table.price[list(some)].mean() for some in table.members])
    batches = np.ceil(table.sizes / terms.rows_per_decision)
    nothing = np.zeros(len(terms.limits))
    return ClusterProgram(
        effects.gain,
        effects.harm,
        batches,
        terms.limits,
        float(terms.budget),
        terms.rows_per_decision * per_row,
        nothing,
    )


def tightened(program: ClusterProgram, share: float) -> ClusterProgram:
    """The program with every limit lowered.

    Args:
        program: what is asked.
        share: of |limit|, at least 0.

    Returns:
        The stricter program.
    """
    return replace(program, spent=program.spent + share)
