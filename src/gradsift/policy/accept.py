"""Fit the simulator, try it on fresh roll-outs, refit or give up (ogs.md 3.3 steps 4-6; ours). Every roll-out is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from gradsift.policy.calibration import Calibration, Rollout, calibrate
from gradsift.policy.coordinates import Coordinates
from gradsift.policy.curvature import Curvature
from gradsift.policy.episodes import Episodes, Losses, Observation, Step, Table, Terms
from gradsift.policy.play import play
from gradsift.policy.simulator import Simulator
from gradsift.policy.validation import Validation, validate
from gradsift.seeds import Stream

NUM_ROUNDS = 3

Roll = Callable[[Int[np.ndarray, "T b"]], Rollout]
"""Trains a fresh navigator on a schedule and measures every held-out loss before and after every step."""

Planner = Callable[[Simulator], Int[np.ndarray, "T b"]]
"""Makes a schedule with a calibrated simulator: ogs_dual on clusters, the learned policy."""


@dataclass(frozen=True)
class Bench:
    """What the simulator is made for.

    Args:
        table: the clusters.
        terms: batch, budget and limits.
        coordinates: the pool in short vectors.
        curvature: for order 2, where it predicts better than order 1; None for order 1 alone.
        stream: of the schedules.
    """

    table: Table
    terms: Terms
    coordinates: Coordinates
    curvature: Curvature | None
    stream: Stream


@dataclass(frozen=True)
class Settled:
    """How it ended.

    Args:
        simulator: the last one fitted; it refuses episodes longer than the horizon of its validation.
        calibration: its fit.
        validation: its test on roll-outs that were not part of the fit.
        rollouts: every real roll-out, in the order played.
        num_rounds: fits, 1 to ``NUM_ROUNDS``.
    """

    simulator: Simulator
    calibration: Calibration
    validation: Validation
    rollouts: tuple[Rollout, ...]
    num_rounds: int

    @property
    def accepted(self) -> bool:
        """Whether whole episodes may be simulated; else fall back to ogs_dual or to the navigator as environment."""
        return self.validation.trusted

    @property
    def cost(self) -> dict[str, float]:
        """Roll-outs, decisions, trained tokens and seconds that went into it."""
        played = {r.rows.tobytes(): r for r in self.rollouts}.values()  # equal schedules are one roll-out
        return {
            "num_rollouts": len(played),
            "num_decisions": sum(len(r.rows) for r in played),
            "num_tokens": sum(r.tokens for r in played),
            "seconds": sum(r.seconds for r in played),
        }

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        spent = (
            f"{self.cost['num_rollouts']:.0f} roll-outs, {self.cost['num_decisions']:.0f} decisions and "
            f"{self.cost['num_tokens']:.0f} tokens of the navigator went into it"
        )
        end = "" if self.accepted else f"; after {self.num_rounds} fits no further one is made: fall back to ogs_dual"
        return f"{self.validation.sentence}{end}; {spent}"


def settle(
    bench: Bench, roll: Roll, planners: Sequence[Planner], calibration: Sequence[Int[np.ndarray, "T b"]] | None = None
) -> Settled:
    """Calibrate and validate until the simulator may be trusted for whole episodes, or ``NUM_ROUNDS`` fits failed.

    Args:
        bench: clusters, terms, coordinates.
        roll: plays a schedule on the real navigator.
        planners: schedules that depend on the fit; by ogs.md ogs_dual and the candidate policy.
        calibration: schedules of the first fit; :func:`calibration_schedules` when None.

    Returns:
        The last simulator and what is known of it.
    """
    schedules = calibration_schedules(bench) if calibration is None else calibration
    fitted = [_played(roll, rows) for rows in schedules]
    done, number = list(fitted), len(fitted)
    start = np.mean([r.losses[0] for r in fitted], axis=0)
    for turn in range(1, NUM_ROUNDS + 1):
        found = calibrate(bench.coordinates, fitted, bench.curvature)
        curvature = bench.curvature if found.order == 2 else None
        simulator = Simulator(bench.coordinates, found.coefficients, start, curvature)
        fresh_schedules = [*_mixtures(bench, number, 2), *(plan(simulator) for plan in planners)]
        number += len(fresh_schedules)
        seen = {one.rows.tobytes() for one in fitted}  # a planner may come back to a schedule: no test of the fit
        played = [_played(roll, rows) for rows in fresh_schedules]
        fresh = list({k: one for one in played if (k := one.rows.tobytes()) not in seen}.values())
        done += played
        checked = validate(simulator, fresh or played, bench.terms.limits)
        if not fresh:  # so few rows that every schedule was in the fit: agreement says nothing
            checked = replace(checked, horizon=0)
        if checked.trusted or turn == NUM_ROUNDS:
            return Settled(simulator.within(checked.horizon), found, checked, tuple(done), turn)
        fitted += fresh
    raise AssertionError("unreachable: the last round returns")


def calibration_schedules(bench: Bench) -> tuple[Int[np.ndarray, "T b"], ...]:
    """Six schedules: two uniform over clusters, the best and the worst cluster by target slope, two random mixtures.

    Args:
        bench: clusters, terms, coordinates.

    Returns:
        Rows of each step; once a cluster is used up, the next best (or worst) follows.
    """
    flat = np.zeros(bench.table.num_clusters)
    slope = bench.coordinates.rows @ bench.coordinates.slopes[-1]
    gain = np.array([slope[list(some)].mean() for some in bench.table.members])
    plays = [(flat, True), (flat, True), (gain, False), (-gain, False)]
    return (*(_schedule(bench, i, score, noise=noise) for i, (score, noise) in enumerate(plays)),
            *_mixtures(bench, len(plays), 2))  # fmt: skip


def _mixtures(bench: Bench, first: int, count: int) -> tuple[Int[np.ndarray, "T b"], ...]:
    """Schedules whose cluster shares are drawn evenly from the simplex."""
    out = []
    for number in range(first, first + count):
        share = bench.stream.child(f"mixture/{number}").numpy().exponential(size=bench.table.num_clusters)
        out.append(_schedule(bench, number, np.log(share), noise=True))
    return tuple(out)


def _schedule(bench: Bench, number: int, score: Float[np.ndarray, " K"], *, noise: bool) -> Int[np.ndarray, "T b"]:
    episodes = Episodes(bench.table, _Still(bench.coordinates.sources), bench.terms, bench.stream.child("rows"))
    draws = bench.stream.child(f"schedule/{number}")
    return play(episodes, _Preferring(score, noise), draws, first=number, num=1).rows[0]


def _played(roll: Roll, rows: Int[np.ndarray, "T b"]) -> Rollout:
    out = roll(rows)
    if not np.array_equal(out.rows, rows):
        raise ValueError(f"roll-out {out.name} trained on other rows than were asked for")
    return out


class _Preferring:
    """Takes the cluster of the highest score, or draws in proportion to exp(score) by the Gumbel-max rule."""

    name = "preferring"

    def __init__(self, score: Float[np.ndarray, " K"], noise: bool) -> None:
        self.score, self.noise = score, noise

    def begin(self, episodes: Episodes, stream: Stream) -> None:
        self.random = stream.numpy()

    def act(self, observation: Observation) -> Int[np.ndarray, " E"]:
        extra = self.random.gumbel(size=observation.mask.shape) if self.noise else 0.0
        return np.where(observation.mask, self.score + extra, -np.inf).argmax(axis=1)

    def learn(self, actions: Int[np.ndarray, " E"], step: Step) -> None:
        pass


class _Still:
    """A learner that never moves: schedules are made without one."""

    def __init__(self, sources: tuple[str, ...]) -> None:
        self.sources = sources

    def reset(self, num: int) -> Losses:
        return Losses(np.zeros(num), np.zeros((num, len(self.sources))))

    def step(self, rows: Int[np.ndarray, "E b"]) -> Losses:
        return self.reset(len(rows))
