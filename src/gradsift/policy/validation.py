"""Does the simulator agree with the navigator on roll-outs it was not fitted to? (ogs.md 3.3 steps 5-6; ours).

A figure of agreement is only good up to a number of steps, the *horizon*; beyond it the simulator must not be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata

from gradsift.policy.calibration import Rollout, Runs, side_by_side
from gradsift.policy.simulator import Simulator

MIN_SPEARMAN, MAX_ERROR, MIN_SIGN = 0.8, 0.5, 0.8
RANK_DIGITS = 9  # of the largest increment: what differs by rounding alone is a tie
MIN_PAIRS = 8
"""Increments below which a rank correlation of 0.8 says little: by chance it is reached by 1 of 6 draws of 4 pairs."""


@dataclass(frozen=True)
class Fit:
    """Agreement of one loss with the real roll-outs, over the first steps.

    Args:
        name: the protected source, or ``target``.
        error: root mean square over roll-outs of predicted minus real change after those steps, over that of the real
            change: 0 is perfect, 1 is as bad as predicting no change.
        spearman: rank correlation over (roll-out, step) increments; 0 where one side is constant.
        sign: share of increments of equal sign.
        bias: mean over roll-outs of predicted minus real change after those steps, in nats.
    """

    name: str
    error: float
    spearman: float
    sign: float
    bias: float

    @property
    def failures(self) -> tuple[str, ...]:
        """What falls short, in words."""
        out = []
        if not self.spearman >= MIN_SPEARMAN:
            out.append(f"Spearman {self.spearman:.2f} (needs {MIN_SPEARMAN})")
        if not self.error <= MAX_ERROR:
            out.append(f"normalized error {self.error:.2f} (at most {MAX_ERROR})")
        if not self.sign >= MIN_SIGN:
            out.append(f"sign agreement {self.sign:.2f} (needs {MIN_SIGN})")
        return tuple(out)


@dataclass(frozen=True)
class Validation:
    """What fresh roll-outs say of a simulator.

    Args:
        whole: agreement over whole episodes, per loss, the target last.
        at_horizon: the same over the first ``horizon`` steps; empty at horizon 0.
        horizon: the largest number of steps over which every loss agrees well enough; 0 for none.
        num_steps: steps of the longest episode.
        num_rollouts: episodes.
        feasible: int64 [2, 2] episodes by (predicted, real): 0 over a limit, 1 within all limits.
    """

    whole: tuple[Fit, ...]
    at_horizon: tuple[Fit, ...]
    horizon: int
    num_steps: int
    num_rollouts: int
    feasible: Int[np.ndarray, "2 2"]

    @property
    def trusted(self) -> bool:
        """Whether whole episodes may be simulated."""
        return self.horizon == self.num_steps

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        fresh = f"{self.num_rollouts} fresh roll-outs of the navigator"
        if self.horizon == 0:
            head = f"the simulator is not trusted for any number of steps on {fresh}"
        else:
            worst = (
                f"Spearman {min(f.spearman for f in self.at_horizon):.2f}, "
                f"normalized error {max(f.error for f in self.at_horizon):.2f}, "
                f"sign agreement {min(f.sign for f in self.at_horizon):.2f}"
            )
            head = (
                f"the simulator is trusted for {self.horizon} of {self.num_steps} steps: over them the worst of "
                f"{len(self.whole)} losses on {fresh} has {worst}"
            )
        if self.trusted:
            return head
        short = "; ".join(f"{f.name}: {', '.join(f.failures)}" for f in self.whole if f.failures)
        return f"{head}; over all {self.num_steps} steps {short or 'too few increments were seen'}"


def validate(simulator: Simulator, rollouts: Sequence[Rollout], limits: Float[np.ndarray, " M"]) -> Validation:
    """Compare a simulator with real episodes that it was not fitted to.

    Args:
        simulator: calibrated.
        rollouts: real episodes; those shorter than others count with their last values.
        limits: float64 [M] allowed rise of each protected loss, in nats.

    Returns:
        The agreement.
    """
    runs = side_by_side(rollouts)
    predicted = simulator.run(runs.rows) - simulator.start
    names, steps = simulator.coordinates.names, runs.there.shape[1]
    horizon, at_horizon = 0, ()
    for h in range(steps, 0, -1):
        fits = _agreement(names, predicted, runs, h)
        if runs.there[:, :h].sum() >= MIN_PAIRS and not any(f.failures for f in fits):
            horizon, at_horizon = h, fits
            break
    feasible = np.zeros((2, 2), dtype=np.int64)
    for guess, real in zip(predicted[:, -1, :-1], runs.changes[:, -1, :-1], strict=True):
        feasible[int((guess <= limits).all()), int((real <= limits).all())] += 1
    whole = _agreement(names, predicted, runs, steps)
    return Validation(whole, at_horizon, horizon, steps, len(rollouts), feasible)


def _agreement(names: Sequence[str], predicted: Float[np.ndarray, "E T1 A"], runs: Runs, steps: int) -> tuple[Fit, ...]:
    """Agreement over the first steps."""
    there = runs.there[:, :steps]
    guess = np.diff(predicted[:, : steps + 1], axis=1)[there]
    real = np.diff(runs.changes[:, : steps + 1], axis=1)[there]
    end, true_end = predicted[:, steps], runs.changes[:, steps]
    size = np.sqrt(np.square(true_end).mean(axis=0))
    wrong = np.sqrt(np.square(end - true_end).mean(axis=0))
    return tuple(
        Fit(
            name,
            float(wrong[a] / size[a]) if size[a] > 0 else (0.0 if wrong[a] == 0 else np.inf),
            _rank_correlation(guess[:, a], real[:, a]),
            float((np.sign(guess[:, a]) == np.sign(real[:, a])).mean()),
            float((end - true_end)[:, a].mean()),
        )
        for a, name in enumerate(names)
    )


def _rank_correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    one, other = (np.round(v / (float(np.abs(v).max(initial=0.0)) or 1.0), RANK_DIGITS) for v in (one, other))
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
