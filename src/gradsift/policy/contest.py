"""Policies under the same limits: simulated, confirmed on real roll-outs in pairs, and the best kept (ogs.md 3.5; ours)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from gradsift.policy.calibration import Rollout
from gradsift.policy.episodes import Episodes
from gradsift.policy.play import Policy, play
from gradsift.seeds import Stream

LEARNED = "ppo_lagrangian"


@dataclass(frozen=True)
class Tried:
    """A policy and what it did.

    Args:
        name: of the policy.
        actions: int64 [T] clusters of its list, the one that would be trained on.
        rows: int64 [T, b] rows of that list.
        others: further schedules of it, [T', b] each, whose rows were drawn in other orders.
        simulated_gain: mean fall of the target loss over simulated episodes, in nats.
        simulated_rise: float64 [M] mean rises.
        gain: float64 [n] fall of the target loss in each real roll-out.
        rise: float64 [n, M] rises.
    """

    name: str
    actions: Int[np.ndarray, " T"]
    rows: Int[np.ndarray, "T b"]
    others: tuple[Int[np.ndarray, "_ b"], ...]
    simulated_gain: float
    simulated_rise: Float[np.ndarray, " M"]
    gain: Float[np.ndarray, " n"]
    rise: Float[np.ndarray, "n M"]

    def keeps(self, limits: Float[np.ndarray, " M"]) -> bool:
        """Whether the mean rise is within every limit plus one standard error; a single roll-out has none.

        Args:
            limits: allowed rises.

        Returns:
            The verdict.
        """
        return bool(np.all(self.rise.mean(axis=0) <= limits + _error(self.rise)))

    def excess(self, limits: Float[np.ndarray, " M"]) -> float:
        """By how much the worst limit is broken on average.

        Args:
            limits: allowed rises.

        Returns:
            A share of the limit; below 0 where all are kept.
        """
        return float(np.max((self.rise.mean(axis=0) - limits) / np.abs(limits), initial=-np.inf))


def simulate(episodes: Episodes, policy: Policy, stream: Stream, num: int) -> Tried:
    """Play a policy in a simulator.

    Args:
        episodes: the simulated process.
        policy: who chooses.
        stream: of the policy's draws.
        num: episodes; their orders of rows are the same for every policy.

    Returns:
        Its simulated figures and its schedules: the list of the table's order, and one per episode.
    """
    mine = stream.child(policy.name)
    own = play(episodes, policy, mine.child("list"), shuffle=False)
    drawn = play(episodes, policy, mine, num=num)
    length = int((own.actions[0] >= 0).sum())
    schedules = tuple(drawn.rows[e, : int((drawn.actions[e] >= 0).sum())] for e in range(num))
    sources = drawn.costs.shape[2]
    return Tried(policy.name, own.actions[0, :length], own.rows[0, :length], schedules, float(drawn.gain.mean()),
                 drawn.rise.mean(axis=0), np.zeros(0), np.zeros((0, sources)))  # fmt: skip


def confirm(tried: Tried, roll: Callable[[Int[np.ndarray, "T b"], str], Rollout], num: int) -> Tried:
    """Train the navigator on a policy's schedules.

    Args:
        tried: a simulated policy.
        roll: trains and measures.
        num: roll-outs, at least 1: the list itself, then orders that every policy shares.

    Returns:
        The same with real figures.
    """
    schedules = (tried.rows, *tried.others)[:num]
    done = [roll(rows, f"{tried.name} {k + 1}") for k, rows in enumerate(schedules)]
    change = np.stack([one.losses[-1] - one.losses[0] for one in done])
    return replace(tried, gain=-change[:, -1], rise=change[:, :-1])


def best_of(tried: Sequence[Tried], limits: Float[np.ndarray, " M"]) -> tuple[Tried, bool]:
    """Keep the largest real gain among those that keep the limits, else the least broken limit; the first of equals.

    Args:
        tried: confirmed policies.
        limits: allowed rises.

    Returns:
        The policy, and whether it keeps the limits.
    """
    kept = [one for one in tried if one.keeps(limits)]
    if kept:
        return max(kept, key=lambda one: float(one.gain.mean())), True
    return min(tried, key=lambda one: one.excess(limits)), False


def compare_with(tried: Sequence[Tried], name: str, limits: Float[np.ndarray, " M"]) -> str:
    """Say whether a policy beat the best of the others, in words that the figures allow.

    Args:
        tried: confirmed policies.
        name: the policy in question.
        limits: allowed rises.

    Returns:
        A sentence; an advantage is claimed only where the 95% t interval of the paired differences is above 0.
    """
    own = next((one for one in tried if one.name == name), None)
    others = [one for one in tried if one.name != name]
    if own is None:
        return f"no learned policy stood in the contest; {best_of(others, limits)[0].name} is returned"
    if not own.keeps(limits):
        return f"the learned policy broke a limit on its real roll-outs by {own.excess(limits):.0%} of it"
    rival, kept = best_of(others, limits)
    if not kept:
        return "the learned policy is the only one that kept every limit on its real roll-outs"
    beaten = [one.name for one in others if not one.keeps(limits) or one.gain.mean() < own.gain.mean()]
    difference = own.gain - rival.gain
    n = len(difference)
    figure = f"{difference.mean():+.4f} nats of gain against {rival.name} over {n} paired roll-outs"
    listed = f"; it is ahead of {', '.join(beaten)}" if beaten else "; it is ahead of none of them"
    if n < 2:
        return f"no advantage of the learned policy over {rival.name} was measured: {figure}, too few for an interval{listed}"
    low, high = _interval(difference)
    figure += f", 95% t interval [{low:+.4f}, {high:+.4f}]"
    if low > 0:
        return f"the learned policy beat {rival.name}, the best of the others that keep the limits: {figure}{listed}"
    return f"no advantage of the learned policy over {rival.name} was measured: {figure}{listed}"


def _error(rise: Float[np.ndarray, "n M"]) -> Float[np.ndarray, " M"]:
    n = len(rise)
    return np.zeros(rise.shape[1]) if n < 2 else rise.std(axis=0, ddof=1) / np.sqrt(n)


def _interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    from scipy.stats import t

    n = len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return float(values.mean() - half), float(values.mean() + half)
