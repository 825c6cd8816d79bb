"""One cell of a comparison: an arm on one seed, trained at every learning rate and measured before and after (ours)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradsift.compare.arms import ArmSpec, Choice, Desk, choose, composition
from gradsift.compare.rounds import ROUND_METHODS, train_in_rounds
from gradsift.compare.world import World
from gradsift.errors import ConfigError, DataError, DivergedError, NumericsError
from gradsift.evaluate.divergence import losses_and_kl
from gradsift.train.averaging import copy_weights, wise_ft
from gradsift.train.hooks import make_hook
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.masking import mask_rows, measure_nats
from gradsift.train.parts import Cost, Penalty, StepHook
from gradsift.train.penalties import BaseKl, Ewc, L2Sp, estimate_fisher
from gradsift.train.plan import plan_steps
from gradsift.types import TokenRow


@dataclass(frozen=True)
class Grid:
    """How every arm is trained: the same for all of them.

    Args:
        lrs: learning rates; every arm is trained at each.
        num_steps: optimizer steps.
        batch_size: rows per step.
        budget: distinct places in the training list, replay included.
        schedule: of the learning rate.
        warmup_steps: linear warm-up.
        weight_decay: decoupled.
        max_grad_norm: clipping.
        tokens_per_batch: of the evaluation.
    """

    lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    num_steps: int = 120
    batch_size: int = 64
    budget: int = 400
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    tokens_per_batch: int = 8192

    def loop(self, lr: float, num_steps: int, seed: int) -> LoopConfig:
        """Return the optimizer's settings at one learning rate."""
        return LoopConfig(
            lr=lr,
            total_steps=num_steps,
            schedule=self.schedule,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            seed=seed,
        )


@dataclass(frozen=True)
class Point:
    """What one fine-tuned model gained and forgot.

    Args:
        lr: learning rate.
        metrics: evaluation set -> ``loss_before``, ``loss_after``, ``exact_before``, ``exact_after`` (share of rows whose every
            trained token is the most likely one), ``kl`` (base to tuned, nats per trained token), ``num_rows``,
            ``lost`` (rows right before and wrong after) and ``won``.
        num_steps: optimizer steps taken.
        cost: of training, by part.
        extra: figures of hooks, rounds and penalties.
    """

    lr: float
    metrics: Mapping[str, Mapping[str, float]]
    num_steps: int
    cost: Mapping[str, Cost]
    extra: Mapping[str, float]

    @property
    def diverged(self) -> bool:
        """Whether the trained model has no finite figures."""
        return any(not math.isfinite(one["loss_after"]) for one in self.metrics.values())


@dataclass(frozen=True)
class Cell:
    """An arm on one seed.

    Args:
        world: its name.
        seed: its seed.
        arm: the arm's name.
        points: one per learning rate.
        cost: of choosing, by part; paid once for all learning rates.
        shares: share of each planted kind or source among the training rows.
        num_rows: training rows, replay included.
        num_distinct: distinct ones.
        notes: what a reader must know.
        seconds: wall time of the cell.
    """

    world: str
    seed: int
    arm: str
    points: tuple[Point, ...]
    cost: Mapping[str, Cost]
    shares: Mapping[str, float]
    num_rows: int
    num_distinct: int
    notes: tuple[str, ...]
    seconds: float


def run_cell(desk: Desk, arm: ArmSpec, grid: Grid, *, total: float | None = None) -> Cell:
    """Choose an arm's rows, train at every learning rate and measure.

    Args:
        desk: the seed's shared part.
        arm: the arm.
        grid: how every arm is trained.
        total: flops that choosing and training together may use (an arm with ``total_of``); None for the grid's own steps.

    Returns:
        The cell.

    Raises:
        ConfigError: an arm in rounds asks for what rounds do not do, or choosing costs as much as the total.
        DataError: the arm chose no row.
    """
    started = time.perf_counter()
    world, num_steps = desk.world, grid.num_steps
    if arm.method in ROUND_METHODS:
        if arm.train or arm.placebo or total is not None:
            raise ConfigError(
                "an arm in rounds takes no training options, placebo or other arm's total", where=f"arm {arm.name}"
            )
        runs = [train_in_rounds(desk, arm, grid, lr) for lr in grid.lrs]
        points = tuple(
            measure_point(desk, run.model, lr, grid, num_steps, run.cost, run.extra)
            if run.diverged_after is None
            else diverged_point(desk, lr, run.diverged_after, run.cost, run.extra)
            for run, lr in zip(runs, grid.lrs, strict=True)
        )
        last = next((run for run in reversed(runs) if run.ids), runs[-1])
        choice = Choice(last.ids, notes=last.notes)
    else:
        num_steps, choice = (num_steps, choose(desk, arm)) if total is None else _spend(desk, arm, grid, total)
        if not choice.ids:
            raise DataError("the arm chose no row", where=f"arm {arm.name}, seed {world.seed}", got=choice.notes)
        points = tuple(_train(desk, arm, grid, choice, lr, num_steps) for lr in grid.lrs)
    return Cell(
        world.name,
        world.seed,
        arm.name,
        points,
        choice.cost,
        composition(world, choice.ids),
        len(choice.ids),
        len(set(choice.ids)),
        (*choice.notes, *diverged_notes(points)),
        time.perf_counter() - started,
    )


def _spend(desk: Desk, arm: ArmSpec, grid: Grid, total: float) -> tuple[int, Choice]:
    """Choose, and turn what choosing left of a total of flops into steps and rows at the same number of epochs.

    The rows are chosen twice: how many there may be follows from what choosing them costs. The first choice is not charged:
    it is made to count, and what it measured serves the second.
    """
    size = sum(p.numel() for p in desk.world.make_model().parameters())
    per_token = Cost.of(size, forward=1, backward=1).flops * grid.batch_size

    def steps_for(choice: Choice) -> int:
        left = total - sum((c for c in choice.cost.values()), Cost()).flops
        tokens = sum(desk.rows[i].num_tokens for i in choice.ids) / max(1, len(choice.ids))
        steps = math.floor(left / (per_token * tokens) + 1e-9) if tokens else 0
        if steps < 1:
            raise ConfigError(
                "choosing leaves nothing to train with", where=f"arm {arm.name}", got=f"{left:.3g} flops of {total:.3g}",
                expected=f"at least one step of {per_token * tokens:.3g} flops", do="leave total_of out",
            )  # fmt: skip
        return steps

    share = steps_for(choose(desk, arm)) / grid.num_steps
    choice = choose(desk.with_budget(max(1, min(len(desk.world.pool), round(desk.budget * share)))), arm)
    return steps_for(choice), choice


def _train(desk: Desk, arm: ArmSpec, grid: Grid, choice: Choice, lr: float, num_steps: int) -> Point:
    world, options = desk.world, dict(arm.train)
    model = world.make_model()
    rows, ids, cost = _masked(desk, choice.ids, options.get("stm"))
    penalties, hook = make_parts(world, model, options)
    start = copy_weights(model) if "wise_ft" in options else None
    config = grid.loop(lr * options.get("lr_factor", 1.0), num_steps, world.seed)
    loop = Loop(model, config, world.pad_id, penalties, hook)
    plan = plan_steps(ids, batch_size=grid.batch_size, num_steps=num_steps, stream=desk.stream("order"))
    with suppress(DivergedError):
        loop.run(plan.steps, rows.__getitem__, choice.weights)
    if start is not None:
        wise_ft(model, options["wise_ft"], start)
    cost |= {"train": loop.cost, **{p.name: p.cost for p in penalties}}
    extra = dict(choice.extra)
    if "stm" in options:
        extra["num_masked_away"] = float(len(choice.ids) - len(ids))
    if hook is not None:
        cost[hook.name] = hook.cost
        extra |= {f"hook_{k}": float(v) for k, v in hook.summary().items() if math.isfinite(v)}
    if len(loop.losses) < num_steps:
        return diverged_point(desk, lr, len(loop.losses), cost, extra)
    return measure_point(desk, model, lr, grid, num_steps, cost, extra)


def _masked(
    desk: Desk, ids: tuple[str, ...], settings: Mapping[str, Any] | None
) -> tuple[Mapping[str, TokenRow], tuple[str, ...], dict[str, Cost]]:
    """Mask unlikely tokens where the arm asks for it; rows that keep none leave the training list."""
    if settings is None:
        return desk.rows, ids, {}
    distinct = [desk.rows[i] for i in dict.fromkeys(ids)]
    nats = measure_nats(desk.world.make_model(), distinct, desk.world.pad_id)
    masked = mask_rows(distinct, nats, **settings)
    kept = {row.id: row for row in masked.rows}
    return kept, tuple(i for i in ids if i in kept), {"masking": nats.cost}


def make_parts(
    world: World, model: nn.Module, options: Mapping[str, Any]
) -> tuple[tuple[Penalty, ...], StepHook | None]:
    """Build penalties and hook out of an arm's training options.

    Args:
        world: whose anchors and replay rows they read.
        model: the model about to be trained, at its starting weights.
        options: ``kl``, ``l2sp``, ``ewc`` (weights), ``hook`` (name) and ``hook_settings``.

    Returns:
        The penalties and the hook, or None.

    Raises:
        ConfigError: ``ewc`` is asked of a world without replay rows.
    """
    penalties: list[Penalty] = []
    if weight := options.get("kl"):
        penalties.append(BaseKl(model, weight, pad_id=world.pad_id))
    if weight := options.get("l2sp"):
        penalties.append(L2Sp(model, weight))
    if weight := options.get("ewc"):
        if not world.replay:
            raise ConfigError("ewc is estimated on replay rows, and the world has none", where=world.name)
        penalties.append(Ewc(model, weight, estimate_fisher(model, list(world.replay), world.pad_id)))
    if name := options.get("hook"):
        settings = dict(options.get("hook_settings", {}))
        return tuple(penalties), make_hook(
            name, settings, model=model, sources=world.anchors, pad_id=world.pad_id, seed=world.seed
        )
    return tuple(penalties), None


def diverged_point(
    desk: Desk, lr: float, num_steps: int, cost: Mapping[str, Cost], extra: Mapping[str, float]
) -> Point:
    """Make the point of a run that left the finite numbers: it is a result, and every figure after it is NaN.

    Args:
        desk: evaluation sets and starting weights.
        lr: learning rate it was trained at.
        num_steps: optimizer steps taken until then.
        cost: of training so far, by part.
        extra: further figures to keep.

    Returns:
        The point.
    """
    after = dict.fromkeys(("loss_after", "exact_after", "kl", "lost", "won"), math.nan)
    metrics = {
        one.name: {
            "loss_before": desk.before[one.name].token_mean,
            "exact_before": desk.before[one.name].exact_share,
            "num_rows": float(len(one.rows)),
            **after,
        }
        for one in desk.world.evaluations
    }
    return Point(lr, metrics, num_steps, dict(cost), dict(extra))


def diverged_notes(points: Sequence[Point]) -> tuple[str, ...]:
    """Name the learning rates at which training left the finite numbers.

    Args:
        points: of a cell.

    Returns:
        A sentence each.
    """
    return tuple(
        f"at the learning rate {point.lr:g} training left the finite numbers after {point.num_steps} steps: the point adds nothing"
        for point in points
        if point.diverged
    )


def measure_point(
    desk: Desk,
    model: nn.Module,
    lr: float,
    grid: Grid,
    num_steps: int,
    cost: Mapping[str, Cost],
    extra: Mapping[str, float],
) -> Point:
    """Measure a fine-tuned model beside the starting weights on every held-out set.

    Args:
        desk: evaluation sets and starting weights.
        model: the fine-tuned model.
        lr: learning rate it was trained at.
        grid: batch size of the evaluation.
        num_steps: optimizer steps taken.
        cost: of training, by part.
        extra: further figures to keep.

    Returns:
        The point; one that diverged where the model has no finite figures.
    """
    metrics = {}
    for held_out in desk.world.evaluations:
        rows, pad, size = held_out.rows, desk.world.pad_id, grid.tokens_per_batch
        before, base = desk.before[held_out.name], desk.base_log_probs[held_out.name]
        try:
            after, kl = losses_and_kl(model, rows, base=base, pad_id=pad, tokens_per_batch=size)
        except NumericsError:  # the starting weights have finite figures on the same rows
            return diverged_point(desk, lr, num_steps, cost, extra)
        metrics[held_out.name] = {
            "loss_before": before.token_mean,
            "loss_after": after.token_mean,
            "exact_before": before.exact_share,
            "exact_after": after.exact_share,
            "kl": kl.token_mean,
            "num_rows": float(len(rows)),
            "lost": float((before.exact & ~after.exact).sum()),
            "won": float((~before.exact & after.exact).sum()),
        }
    return Point(lr, metrics, num_steps, dict(cost), dict(extra))


def with_total(arm: ArmSpec, other: Cell, grid: Grid) -> float:
    """Add up what another arm's cell cost, per learning rate.

    Args:
        arm: an arm with ``total_of``.
        other: the finished cell of that arm on the same seed.
        grid: to check that it is complete.

    Returns:
        Flops of choosing and of one training run.

    Raises:
        ValueError: the cell belongs to another arm or lacks learning rates (our own mistake).
    """
    if other.arm != arm.total_of or len(other.points) != len(grid.lrs):
        raise ValueError(f"{arm.name} takes the total of {arm.total_of}, got {other.arm}")
    chosen = sum((c for c in other.cost.values()), Cost())
    trained = max(sum((c for c in p.cost.values()), Cost()).flops for p in other.points)
    return chosen.flops + trained
