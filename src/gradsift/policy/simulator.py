"""The navigator's training, imitated in a few hundred numbers (ogs.md 3.3; ours): first order, with curvature if wanted.

    g = mean y_i + kappa_train H delta,   delta <- delta - eta g             (plain: SGD)
                                          delta <- delta - eta g / |g|       (normalized: every step of one length)
                                          delta <- delta - eta m / sqrt(v)   (adam: see below)
    L_A(delta) = L_A(0) + a_A'delta + 1/2 kappa_A delta'H_A delta

delta is the displacement of the weights in the axes of :mod:`gradsift.policy.coordinates`. Losses stand in the order
protected sources, then the target (A = M+1). ``adam`` keeps Adam's two running means (arXiv 1412.6980, algorithm 1, bias
corrected), the second one of the whole gradient's squared length: axes of a sketch mix weights, so a mean per weight
cannot be imitated, while the lag of the first one shows in every step's loss. Everything is float64 and runs many episodes at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import ConfigError
from gradsift.policy.coordinates import Coordinates
from gradsift.policy.curvature import Curvature
from gradsift.policy.episodes import NO_ROW, Losses

Kind = Literal["plain", "normalized", "adam"]
KINDS: tuple[Kind, ...] = ("plain", "normalized", "adam")
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Coefficients:
    """What calibration finds.

    Args:
        eta: step size: per unit of gradient (``plain``), else the length of a step; at least 0.
        losses: A curvature multipliers kappa_A of the held-out losses, each at least 0.
        train: kappa_train, at least 0.
        kind: how a gradient becomes a step.
    """

    eta: float
    losses: tuple[float, ...]
    train: float = 0.0
    kind: Kind = "plain"


@dataclass(frozen=True)
class Batch:
    """What batches of rows do, before any displacement.

    Args:
        mean: float64 [..., q] weighted mean gradient.
        lost: float64 [...] squared length of that mean outside the axes, rows taken as orthogonal there.
        share: float64 [..., G] weight of each group of rows.
        there: bool [...] whether the batch holds any row.
    """

    mean: Float[np.ndarray, "*S q"]
    lost: Float[np.ndarray, "*S"]
    share: Float[np.ndarray, "*S G"]
    there: Bool[np.ndarray, "*S"]

    def at(self, step: int) -> Batch:
        """The batches of one step, from batches of shape [E, T].

        Args:
            step: 0-based.

        Returns:
            Batches of shape [E].
        """
        return Batch(self.mean[:, step], self.lost[:, step], self.share[:, step], self.there[:, step])


def batch_of(coordinates: Coordinates, rows: Int[np.ndarray, "*S b"], curvature: Curvature | None) -> Batch:
    """Average the gradients of batches.

    Args:
        coordinates: the pool.
        rows: row numbers, ``NO_ROW`` where there is none.
        curvature: whose groups are counted; None for none.

    Returns:
        The batches.
    """
    there = rows != NO_ROW
    place = np.where(there, rows, 0)
    weight = np.where(there, coordinates.weights[place], 0.0)
    weight = weight / np.maximum(weight.sum(axis=-1, keepdims=True), 1e-300)
    mean = np.matmul(weight[..., None, :], coordinates.rows[place])[..., 0, :]
    lost = (np.square(weight) * coordinates.lost[place]).sum(axis=-1)
    any_row = there.any(axis=-1)
    if curvature is None or len(curvature.train) == 1:
        share = any_row[..., None].astype(np.float64)
    else:
        kinds = curvature.group[place][..., None] == np.arange(len(curvature.train))
        share = (weight[..., None] * kinds).sum(axis=-2)
    return Batch(mean, lost, share, any_row)


@dataclass(frozen=True)
class State:
    """Where the learners are.

    Args:
        delta: float64 [E, q] displacement.
        first: float64 [E, q] running mean of the gradient (``adam``).
        second: float64 [E] running mean of its squared length (``adam``).
        count: int64 [E] steps taken.
    """

    delta: Float[np.ndarray, "E q"]
    first: Float[np.ndarray, "E q"]
    second: Float[np.ndarray, " E"]
    count: Int[np.ndarray, " E"]

    @classmethod
    def start(cls, num: int, size: int) -> State:
        """Learners at the starting weights.

        Args:
            num: E.
            size: q.

        Returns:
            Zeros.
        """
        return cls(np.zeros((num, size)), np.zeros((num, size)), np.zeros(num), np.zeros(num, dtype=np.int64))


def move(state: State, batch: Batch, coefficients: Coefficients, curvature: Curvature | None) -> State:
    """Take one step in every episode.

    Args:
        state: before it.
        batch: batches of shape [E].
        coefficients: step size, kind and kappa_train.
        curvature: of the training rows; None for order 1.

    Returns:
        The state after it; unchanged where the batch is empty.
    """
    there, gradient = batch.there, batch.mean
    if curvature is not None and coefficients.train > 0:
        groups, rank, q = curvature.train.shape
        through = (state.delta @ curvature.train.reshape(-1, q).T).reshape(-1, groups, rank) * batch.share[:, :, None]
        gradient = gradient + coefficients.train * (through.reshape(-1, groups * rank) @ curvature.train.reshape(-1, q))
    count, first, second = state.count + there, state.first, state.second
    if coefficients.kind == "plain":
        step = gradient
    else:
        square = np.square(gradient).sum(axis=1) + batch.lost
        if coefficients.kind == "adam":
            one, two = BETAS
            first = np.where(there[:, None], one * first + (1 - one) * gradient, first)
            second = np.where(there, two * second + (1 - two) * square, second)
            taken = np.maximum(count, 1)
            gradient, square = first / (1 - one**taken)[:, None], second / (1 - two**taken)
        step = gradient / np.sqrt(np.where(square > 0, square, 1.0))[:, None]
    delta = state.delta - coefficients.eta * np.where(there[:, None], step, 0.0)
    return State(delta, first, second, count)


def parts(
    delta: Float[np.ndarray, "*S q"], coordinates: Coordinates, curvature: Curvature | None
) -> tuple[Float[np.ndarray, "*S A"], Float[np.ndarray, "*S A"]]:
    """Split the changes of the losses.

    Args:
        delta: displacements.
        coordinates: whose slopes a_A are used.
        curvature: of the losses; None for order 1.

    Returns:
        a_A'delta and 1/2 delta'H_A delta in nats, each [*S, A].
    """
    linear = delta @ coordinates.slopes.T
    if curvature is None:
        return linear, np.zeros_like(linear)
    count, rank, q = curvature.losses.shape
    through = delta @ curvature.losses.reshape(-1, q).T
    return linear, 0.5 * np.square(through).reshape(*delta.shape[:-1], count, rank).sum(axis=-1)


class Simulator:
    """The imitation as a :class:`~gradsift.policy.episodes.Dynamics`.

    Args:
        coordinates: the pool.
        coefficients: step size and curvature multipliers.
        start: float64 [A] losses at the starting weights in nats per trained token, the target's last.
        curvature: for order 2; None for order 1.
        max_steps: steps that validation trusts; a longer episode is refused. None for no bound.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        coefficients: Coefficients,
        start: Float[np.ndarray, " A"],
        curvature: Curvature | None = None,
        max_steps: int | None = None,
    ) -> None:
        if len(coefficients.losses) != len(coordinates.names) or len(start) != len(coordinates.names):
            raise ValueError("Simulator: one kappa and one starting loss per loss")
        self.coordinates, self.coefficients, self.curvature = coordinates, coefficients, curvature
        self.start, self.max_steps = np.asarray(start, dtype=np.float64), max_steps
        self.sources = coordinates.sources
        self._kappa = np.array(coefficients.losses)
        self.reset(1)

    @property
    def order(self) -> int:
        """1 without curvature, else 2."""
        return 1 if self.curvature is None else 2

    def within(self, max_steps: int) -> Simulator:
        """The same simulator, bounded to the steps that validation trusts.

        Args:
            max_steps: at least 0.

        Returns:
            A simulator that refuses longer episodes.
        """
        return Simulator(self.coordinates, self.coefficients, self.start, self.curvature, max_steps)

    def scaled(self, factor: float) -> Simulator:
        """The same simulator with another step size.

        Args:
            factor: of eta, at least 0.

        Returns:
            A simulator.
        """
        changed = replace(self.coefficients, eta=self.coefficients.eta * factor)
        return Simulator(self.coordinates, changed, self.start, self.curvature, self.max_steps)

    def reset(self, num: int) -> Losses:
        """Put every copy to the starting weights.

        Args:
            num: E.

        Returns:
            The losses there.
        """
        self.state = State.start(num, self.coordinates.rows.shape[1])
        self.num_steps = 0
        return self._losses()

    def step(self, rows: Int[np.ndarray, "E b"]) -> Losses:
        """Train each copy on some rows.

        Args:
            rows: row numbers, ``NO_ROW`` where there is none.

        Returns:
            The losses after it.

        Raises:
            ConfigError: a step beyond those that validation trusts.
        """
        self.num_steps += 1
        if self.max_steps is not None and self.num_steps > self.max_steps:
            raise ConfigError(
                "the simulator is not trusted for so long an episode",
                where="policy.simulator",
                got=f"step {self.num_steps}",
                expected=f"at most {self.max_steps} steps, the horizon of its validation against real roll-outs",
                do="play shorter episodes, use the navigator as the environment, or use ogs_dual",
            )
        batch = batch_of(self.coordinates, rows, self.curvature)
        self.state = move(self.state, batch, self.coefficients, self.curvature)
        return self._losses()

    def _losses(self) -> Losses:
        linear, quadratic = parts(self.state.delta, self.coordinates, self.curvature)
        losses = self.start + linear + self._kappa * quadratic
        return Losses(losses[:, -1], losses[:, :-1])

    def run(self, rows: Int[np.ndarray, "E T b"]) -> Float[np.ndarray, "E T1 A"]:
        """Train copies on whole schedules, whatever ``max_steps`` says (validation needs the steps beyond it).

        Args:
            rows: row numbers per step.

        Returns:
            float64 [E, T+1, A] losses before and after every step, the target's last.
        """
        batches = batch_of(self.coordinates, rows, self.curvature)
        path = trajectory(batches, self.coefficients, self.curvature)
        linear, quadratic = parts(path, self.coordinates, self.curvature)
        begin = np.broadcast_to(self.start, (len(rows), 1, len(self.start)))
        return np.concatenate([begin, self.start + linear + self._kappa * quadratic], axis=1)


def trajectory(batches: Batch, coefficients: Coefficients, curvature: Curvature | None) -> Float[np.ndarray, "E T q"]:
    """Displacements after every step.

    Args:
        batches: of shape [E, T].
        coefficients: step size and kappa_train.
        curvature: None for order 1.

    Returns:
        float64 [E, T, q].
    """
    num, steps, q = batches.mean.shape
    path, state = np.empty((num, steps, q)), State.start(num, q)
    for t in range(steps):
        state = move(state, batches.at(t), coefficients, curvature)
        path[:, t] = state.delta
    return path
