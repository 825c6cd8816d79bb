"""One arm's figures out of its cells: points of the plane, hypervolume per seed, KL, lost and won rows, cost (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gradsift.compare.cell import Cell, Point
from gradsift.compare.config import ArmConfig, CompareConfig
from gradsift.evaluate.pareto import hypervolume_2d, num_outside, pareto_front
from gradsift.train.parts import Cost


@dataclass(frozen=True)
class SetFigures:
    """A held-out set at one learning rate, means over the seeds that did not diverge; NaN where all did.

    Args:
        name: of the set.
        role: domain or general.
        before: accuracy (exact rows) or loss before.
        after: the same after.
        kl: base to tuned, nats per trained token.
        lost: share of rows right before and wrong after.
        won: share of rows wrong before and right after.
        lost_adjusted: ``lost`` without what guessing alone produces.
        won_adjusted: ``won`` without it.
    """

    name: str
    role: str
    before: float
    after: float
    kl: float
    lost: float
    won: float
    lost_adjusted: float
    won_adjusted: float


@dataclass(frozen=True)
class PlanePoint:
    """An arm at one learning rate, mean over seeds; a seed that diverged counts as the corner.

    Args:
        lr: learning rate.
        x: general accuracy, or gain in nats per trained token.
        y: domain accuracy, or minus the forgetting.
        on_front: no other learning rate of the arm is at least as good in both.
        sets: the held-out sets one by one.
    """

    lr: float
    x: float
    y: float
    on_front: bool
    sets: tuple[SetFigures, ...]


@dataclass(frozen=True)
class Spent:
    """What an arm cost, means over seeds.

    Args:
        parts: part -> flops: of choosing, paid once, and of one training run (mean over learning rates).
        choosing: flops of choosing.
        training: flops of the dearest training run of the grid.
        relative: both together over the flops of the random arm's training; NaN without a random arm.
        seconds: wall time of a cell, all learning rates and evaluations.
    """

    parts: Mapping[str, float]
    choosing: float
    training: float
    relative: float
    seconds: float


@dataclass(frozen=True)
class ArmFigures:
    """An arm.

    Args:
        name: of the arm.
        method: of the arm.
        family: what it is compared as.
        seeds: finished ones, rising.
        volumes: hypervolume per seed.
        num_outside: points below the reference in a coordinate, which add nothing.
        num_diverged: points that are no finite number, which add nothing.
        num_points: of all seeds and learning rates.
        points: per learning rate.
        shares: of each planted kind or source among the training rows.
        num_rows: training rows.
        num_distinct: distinct ones.
        spent: cost.
        notes: of the cells, each once, with the number of seeds that have it.
    """

    name: str
    method: str
    family: str
    seeds: tuple[int, ...]
    volumes: tuple[float, ...]
    num_outside: int
    num_diverged: int
    num_points: int
    points: tuple[PlanePoint, ...]
    shares: Mapping[str, float]
    num_rows: float
    num_distinct: float
    spent: Spent
    notes: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Mean hypervolume over the finished seeds."""
        return float(np.mean(self.volumes))

    @property
    def sd(self) -> float:
        """Standard deviation of the hypervolume; NaN for one seed."""
        return float(np.std(self.volumes, ddof=1)) if len(self.volumes) > 1 else math.nan

    def best_point(self, corner: tuple[float, float]) -> PlanePoint:
        """Return the learning rate whose mean point spans the largest area by itself.

        Args:
            corner: the reference point.

        Returns:
            The point; where none lies inside, the one that is least far below.
        """

        def rank(point: PlanePoint) -> tuple[float, float]:
            x, y = point.x - corner[0], point.y - corner[1]
            return max(x, 0.0) * max(y, 0.0), min(x, 0.0) + min(y, 0.0)

        return max(self.points, key=rank)

    def at(self, seeds: Sequence[int]) -> list[float]:
        """Return the hypervolumes of some finished seeds, in their order."""
        known = dict(zip(self.seeds, self.volumes, strict=True))
        return [known[seed] for seed in seeds]


def coordinates(point: Point, roles: Mapping[str, str], metric: str) -> tuple[float, float]:
    """Place a fine-tuned model in the plane.

    Args:
        point: its metrics.
        roles: evaluation set -> domain or general; sets of one role count alike, whatever their sizes.
        metric: accuracy or loss.

    Returns:
        (general accuracy, domain accuracy), or (gain, -forgetting) in nats per trained token; both maximized.
    """
    mean = {"domain": 0.0, "general": 0.0}
    for role in mean:
        sets = [m for name, m in point.metrics.items() if roles[name] == role]
        if metric == "accuracy":
            mean[role] = float(np.mean([m["exact_after"] for m in sets]))
        else:
            mean[role] = float(np.mean([m["loss_before"] - m["loss_after"] for m in sets]))
    return (mean["general"], mean["domain"]) if metric == "accuracy" else (mean["domain"], mean["general"])


def arm_figures(
    arm: ArmConfig, cells: Mapping[int, Cell], config: CompareConfig, roles: Mapping[str, str], plain_flops: float
) -> ArmFigures:
    """Work an arm's finished cells up.

    Args:
        arm: the arm.
        cells: seed -> cell, at least one.
        config: metric, reference point and chance.
        roles: evaluation set -> domain or general.
        plain_flops: mean flops of the random arm's training; NaN when unknown.

    Returns:
        The figures.
    """
    seeds = tuple(sorted(cells))
    assert config.reference is not None, "resolve the comparison first"
    reference = config.reference
    placed = {s: np.array([coordinates(p, roles, config.metric) for p in cells[s].points]) for s in seeds}
    diverged = sum(int((~np.isfinite(p)).any(axis=1).sum()) for p in placed.values())
    inside = {s: _clipped(p, reference) for s, p in placed.items()}
    notes: dict[str, int] = {}
    for seed in seeds:
        for note in dict.fromkeys(cells[seed].notes):
            notes[note] = notes.get(note, 0) + 1
    kinds = sorted({kind for cell in cells.values() for kind in cell.shares})
    return ArmFigures(
        arm.name,
        arm.method,
        arm.family,
        seeds,
        tuple(hypervolume_2d(inside[s], reference) for s in seeds),
        sum(num_outside(inside[s], reference) for s in seeds),
        diverged,
        sum(len(p) for p in placed.values()),
        _mean_points(cells, inside, roles, config),
        {kind: float(np.mean([cells[s].shares.get(kind, 0.0) for s in seeds])) for kind in kinds},
        float(np.mean([cells[s].num_rows for s in seeds])),
        float(np.mean([cells[s].num_distinct for s in seeds])),
        spent(list(cells.values()), plain_flops),
        tuple(f"{text} ({count} of {len(seeds)} seeds)" for text, count in notes.items()),
    )


def _clipped(points: Float[np.ndarray, "n 2"], reference: tuple[float, float]) -> Float[np.ndarray, "n 2"]:
    """Move points that diverged onto the reference, where they add nothing."""
    return np.where(np.isfinite(points).all(axis=1, keepdims=True), points, np.asarray(reference, dtype=np.float64))


def _mean_points(
    cells: Mapping[int, Cell],
    placed: Mapping[int, Float[np.ndarray, "n 2"]],
    roles: Mapping[str, str],
    config: CompareConfig,
) -> tuple[PlanePoint, ...]:
    some = list(cells.values())
    mean = np.mean([placed[seed] for seed in cells], axis=0)
    front = set(pareto_front(mean).tolist())
    return tuple(
        PlanePoint(
            point.lr,
            float(mean[k, 0]),
            float(mean[k, 1]),
            k in front,
            tuple(
                _set_figures(name, role, [c.points[k].metrics[name] for c in some if not c.points[k].diverged], config)
                for name, role in roles.items()
            ),
        )
        for k, point in enumerate(some[0].points)
    )


def _set_figures(name: str, role: str, metrics: Sequence[Mapping[str, float]], config: CompareConfig) -> SetFigures:
    kind, c = ("exact" if config.metric == "accuracy" else "loss"), config.chance

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if len(values) else math.nan

    lost = mean([m["lost"] / m["num_rows"] for m in metrics])
    won = mean([m["won"] / m["num_rows"] for m in metrics])
    # Wrong in both phases, as evaluate.forgetting has it: what guessing alone turns over is taken off.
    still_wrong = mean([1 - m["exact_before"] - m["won"] / m["num_rows"] for m in metrics])
    guessed = c * still_wrong / (1 - c) ** 2
    return SetFigures(
        name,
        role,
        mean([m[f"{kind}_before"] for m in metrics]),
        mean([m[f"{kind}_after"] for m in metrics]),
        mean([m["kl"] for m in metrics]),
        lost,
        won,
        lost / (1 - c) - guessed,
        won / (1 - c) - guessed,
    )


def spent(cells: Sequence[Cell], plain_flops: float) -> Spent:
    """Add up what an arm cost.

    Args:
        cells: its finished cells.
        plain_flops: mean flops of the random arm's training; NaN when unknown.

    Returns:
        Means over seeds.
    """
    parts: dict[str, float] = {}
    for cell in cells:
        for name, cost in cell.cost.items():
            parts[name] = parts.get(name, 0.0) + cost.flops / len(cells)
        for point in cell.points:
            for name, cost in point.cost.items():
                parts[name] = parts.get(name, 0.0) + cost.flops / len(cells) / len(cell.points)
    choosing = float(np.mean([sum((c for c in cell.cost.values()), Cost()).flops for cell in cells]))
    training = float(
        np.mean([max(sum((c for c in p.cost.values()), Cost()).flops for p in cell.points) for cell in cells])
    )
    relative = (choosing + training) / plain_flops if plain_flops > 0 else math.nan
    return Spent(parts, choosing, training, relative, float(np.mean([cell.seconds for cell in cells])))
