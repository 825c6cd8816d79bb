"""Fit the simulator to real roll-outs of the navigator (ogs.md 3.3 step 4; ours): step size and curvature multipliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import least_squares

from gradsift.errors import NumericsError
from gradsift.policy.coordinates import Coordinates
from gradsift.policy.curvature import Curvature
from gradsift.policy.episodes import NO_ROW
from gradsift.policy.simulator import KINDS, Batch, Coefficients, Kind, Simulator, batch_of, parts, trajectory

NUM_STARTS = 2
"""Best of six starting points that the search goes on from."""

NUM_FOLDS = 3

MARGIN = 0.05
"""Share by which order 2 must predict better on roll-outs left out than order 1 does, to be used."""


@dataclass(frozen=True)
class Rollout:
    """One real episode of the navigator.

    Args:
        name: what was played.
        rows: int64 [T, b] rows of each step, ``NO_ROW`` where there is none.
        target: float64 [T+1] loss of the target before and after every step, nats per trained token.
        protect: float64 [T+1, M] loss of each protected source.
        tokens: tokens that were trained on.
        seconds: wall time of training and measuring.
    """

    name: str
    rows: Int[np.ndarray, "T b"]
    target: Float[np.ndarray, " T1"]
    protect: Float[np.ndarray, "T1 M"]
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        steps = len(self.rows)
        if steps < 1 or self.target.shape != (steps + 1,) or self.protect.shape[:1] != (steps + 1,):
            raise ValueError("Rollout needs T >= 1 steps and T+1 losses")
        if not (np.isfinite(self.target).all() and np.isfinite(self.protect).all()):
            raise NumericsError("a loss of a roll-out is not finite", where=f"roll-out {self.name}",
                                expected="finite losses", do="lower the learning rate of the navigator")  # fmt: skip

    @property
    def losses(self) -> Float[np.ndarray, "T1 A"]:
        """All losses, the target's last."""
        return np.column_stack([self.protect, self.target])


@dataclass(frozen=True)
class Runs:
    """Roll-outs of any length side by side.

    Args:
        rows: int64 [E, T, b], filled up with ``NO_ROW``.
        changes: float64 [E, T+1, A] losses minus those at the start, the last value repeated at the end.
        there: bool [E, T] steps that were taken.
    """

    rows: Int[np.ndarray, "E T b"]
    changes: Float[np.ndarray, "E T1 A"]
    there: Bool[np.ndarray, "E T"]

    def some(self, which: Bool[np.ndarray, " E"]) -> Runs:
        """Some of the roll-outs.

        Args:
            which: those to keep.

        Returns:
            The smaller stack.
        """
        return Runs(self.rows[which], self.changes[which], self.there[which])


def side_by_side(rollouts: Sequence[Rollout]) -> Runs:
    """Stack roll-outs.

    Args:
        rollouts: at least one, over the same sources.

    Returns:
        The stack.
    """
    steps, width = max(len(r.rows) for r in rollouts), max(r.rows.shape[1] for r in rollouts)
    count = len(rollouts)
    rows = np.full((count, steps, width), NO_ROW)
    changes = np.zeros((count, steps + 1, rollouts[0].protect.shape[1] + 1))
    there = np.zeros((count, steps), dtype=bool)
    for e, one in enumerate(rollouts):
        t, b = one.rows.shape
        rows[e, :t, :b], there[e, :t] = one.rows, True
        changes[e, : t + 1] = one.losses - one.losses[0]
        changes[e, t + 1 :] = changes[e, t]
    return Runs(rows, changes, there)


@dataclass(frozen=True)
class Calibration:
    """The fitted coefficients.

    Args:
        coefficients: what the simulator is run with.
        order: 1 (no curvature) or 2.
        error: root mean square of predicted minus real change over that of the real change, over every step, per loss
            (target last), on the roll-outs of the fit.
        held_out: the same over all losses on roll-outs left out of the fit in turn, by ``kind/order``; what chose.
        num_rollouts: roll-outs of the fit.
        num_steps: their steps.
    """

    coefficients: Coefficients
    order: int
    error: tuple[float, ...]
    held_out: Mapping[str, float]
    num_rollouts: int
    num_steps: int


def calibrate(
    coordinates: Coordinates,
    rollouts: Sequence[Rollout],
    curvature: Curvature | None = None,
    *,
    kinds: Sequence[Kind] = KINDS,
) -> Calibration:
    """Fit step size and curvature multipliers by least squares on the changes of the losses.

    Each loss counts in its own unit (the root mean square of its real changes). For given step size and kappa_train the
    displacement is known and each kappa_A has a closed form, so only two numbers are searched for. Kind of step and
    order are chosen on roll-outs left out of the fit: curvature always fits the roll-outs it has seen at least as well.

    Args:
        coordinates: the pool.
        rollouts: real episodes.
        curvature: for order 2, which then competes with order 1; None for order 1 alone.
        kinds: of steps to try.

    Returns:
        The fit.

    Raises:
        NumericsError: a loss never changed.
    """
    runs = side_by_side(rollouts)
    unit = np.sqrt(np.square(runs.changes[:, 1:][runs.there]).mean(axis=0))
    if (unit == 0).any():
        raise NumericsError(
            "a held-out loss never changed in the roll-outs",
            where=f"loss {coordinates.names[int(np.flatnonzero(unit == 0)[0])]}",
            expected="a learner that moves",
            do="check that the navigator trains (learning rate, trainable parameters)",
        )
    orders = (None,) if curvature is None else (None, curvature)
    tries: dict[str, tuple[Kind, Curvature | None]] = {
        f"{kind}/{1 if c is None else 2}": (kind, c) for kind in kinds for c in orders
    }
    held_out = {name: _left_out(coordinates, c, runs, unit, kind) for name, (kind, c) in tries.items()}
    kind, used = tries[min(tries, key=lambda name: held_out[name] * (1 if tries[name][1] is None else 1 + MARGIN))]
    coefficients = _Fit.of(coordinates, used, runs, unit, kind).solve()
    error = np.sqrt(np.square(_wrong(coordinates, used, coefficients, runs)).mean(axis=0)) / unit
    return Calibration(
        coefficients,
        1 if used is None else 2,
        tuple(map(float, error)),
        held_out,
        len(rollouts),
        int(runs.there.sum()),
    )


def _wrong(
    coordinates: Coordinates, curvature: Curvature | None, coefficients: Coefficients, runs: Runs
) -> Float[np.ndarray, "S A"]:
    """Predicted minus real change at every step."""
    predicted = Simulator(coordinates, coefficients, np.zeros(len(coordinates.names)), curvature).run(runs.rows)
    return (predicted - runs.changes)[:, 1:][runs.there]


def _left_out(
    coordinates: Coordinates, curvature: Curvature | None, runs: Runs, unit: Float[np.ndarray, " A"], kind: Kind
) -> float:
    """Error in units of the losses on roll-outs left out in turn; on the fitted ones where there is only one."""
    number = np.arange(len(runs.rows))
    folds = min(NUM_FOLDS, len(number))
    total = 0.0
    for fold in range(folds):
        out = number % folds == fold
        fit = _Fit.of(coordinates, curvature, runs.some(~out if folds > 1 else out), unit, kind)
        total += float(np.square(_wrong(coordinates, curvature, fit.solve(), runs.some(out)) / unit).sum())
    return float(np.sqrt(total / (runs.there.sum() * len(unit))))


@dataclass(frozen=True)
class _Fit:
    """One least-squares problem: all of it that does not change during the search."""

    coordinates: Coordinates
    curvature: Curvature | None
    batches: Batch
    runs: Runs
    unit: Float[np.ndarray, " A"]
    kind: Kind

    @classmethod
    def of(
        cls,
        coordinates: Coordinates,
        curvature: Curvature | None,
        runs: Runs,
        unit: Float[np.ndarray, " A"],
        kind: Kind,
    ) -> _Fit:
        """Average the batches once."""
        return cls(coordinates, curvature, batch_of(coordinates, runs.rows, curvature), runs, unit, kind)

    def solve(self) -> Coefficients:
        """Return the coefficients of least squared error in units of the losses."""
        real, none = self._real(), (0.0,) * len(self.unit)
        first, _ = self._parts(Coefficients(1.0, none, 0.0, self.kind))
        eta = float(max(0.0, (first * real).sum() / max(np.square(first).sum(), 1e-300)))
        if self.curvature is None:
            return Coefficients(eta, none, 0.0, self.kind)
        # the size that the changes ask for, in case curvature hides the slope from the straight-line fit
        size = float(np.sqrt(np.square(real).sum() / max(np.square(first).sum(), 1e-300)))
        center = float(np.log(max(size, 1e-300)))
        stiff = self._stiff(self.curvature)

        def residual(x: Float[np.ndarray, " 2"]) -> Float[np.ndarray, " S"]:
            return self._best(x, stiff)[0].ravel()

        starts = [np.array([np.log(s), ratio]) for s in (max(eta, 0.1 * size), size, 3 * size) for ratio in (0.01, 0.3)]
        starts = sorted(starts, key=lambda x: float(np.square(residual(x)).sum()))[:NUM_STARTS]
        box = ([center - 7, 0.0], [center + 7, 1.0])
        found = [
            least_squares(residual, x, bounds=box, x_scale=[0.3, 0.1], xtol=1e-9, ftol=1e-9, gtol=1e-12, max_nfev=30)
            for x in starts
        ]
        return self._best(min(found, key=lambda f: f.cost).x, stiff)[1]

    def _stiff(self, curvature: Curvature) -> float:
        """The eta x kappa_train at which a step along the steepest training axis goes to its bottom."""
        steepest = max(float(np.linalg.norm(f, 2)) ** 2 for f in curvature.train)
        length = np.sqrt(np.square(self.batches.mean).sum(axis=-1) + self.batches.lost)[self.batches.there].mean()
        return (1.0 if self.kind == "plain" else float(length)) / max(steepest, 1e-300)

    def _best(self, x: Float[np.ndarray, " 2"], stiff: float) -> tuple[Float[np.ndarray, "S A"], Coefficients]:
        """Errors, and the coefficients for (log eta, share of the stiffest kappa_train): every kappa_A in closed form."""
        eta = float(np.exp(x[0]))
        train = float(x[1]) * stiff / eta
        linear, quadratic = self._parts(Coefficients(eta, (0.0,) * len(self.unit), train, self.kind))
        left = self._real() - linear
        kappa = np.maximum(0.0, (quadratic * left).sum(axis=0) / np.maximum(np.square(quadratic).sum(axis=0), 1e-300))
        return kappa * quadratic - left, Coefficients(eta, tuple(map(float, kappa)), train, self.kind)

    def _parts(self, coefficients: Coefficients) -> tuple[Float[np.ndarray, "S A"], Float[np.ndarray, "S A"]]:
        path = trajectory(self.batches, coefficients, self.curvature)
        linear, quadratic = parts(path[self.runs.there], self.coordinates, self.curvature)
        return linear / self.unit, quadratic / self.unit

    def _real(self) -> Float[np.ndarray, "S A"]:
        return self.runs.changes[:, 1:][self.runs.there] / self.unit
