"""Arms of methods that measure a trained navigator: the world's model is warmed up first, and the arm pays for it.

Arms that ask for the same training share it and its passes; each is charged all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from gradsift.errors import ConfigError
from gradsift.geometry.checkpoints import CheckpointSignals, Warmup, unit_rows
from gradsift.gradients.adam import bend
from gradsift.gradients.hooks import GradientEngine
from gradsift.methods.base import make_method, methods
from gradsift.train.parts import Cost
from gradsift.train.rescore import Rescored, rescore, restrict
from gradsift.train.warmup import Checkpoint, Warmed, WarmupRun, warm_up
from gradsift.types import Budget, Problem

if TYPE_CHECKING:
    from gradsift.compare.arms import ArmSpec, Choice, Desk
    from gradsift.compare.world import World

SETTINGS = "warmup"
SKETCH_DIM = 4093


@dataclass(frozen=True)
class WarmupSettings:
    """How the world's model is warmed up.

    Args:
        lr: peak learning rate of AdamW.
        batch_size: rows per optimizer step.
        schedule: over the whole training.
        rise: share of the steps over which the learning rate rises.
        sketch_dim: numbers per direction, a prime.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-4
    batch_size: Annotated[int, Field(ge=1)] = 16
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    rise: Annotated[float, Field(ge=0, lt=1)] = 0.03
    sketch_dim: Annotated[int, Field(ge=3)] = SKETCH_DIM


@dataclass(frozen=True)
class Trained:
    """Signals at the checkpoints of a warm-up.

    Args:
        problem: at the last one, rows that have a gradient at all of them.
        cost: ``warmup`` and ``collect``.
        lost: rows without a finite gradient somewhere.
    """

    problem: Problem
    cost: Mapping[str, Cost]
    lost: int


def is_trained(arm: ArmSpec) -> bool:
    """Tell whether an arm's method measures a trained navigator.

    Args:
        arm: any arm.

    Returns:
        True for registered methods whose needs name a warm-up, settings considered.
    """
    kind = methods().get(arm.method)
    if kind is None:
        return False
    known = {one.name for one in fields(kind)}  # other settings of an arm are refused where it chooses
    return make_method(arm.method, {k: v for k, v in arm.settings.items() if k in known}).needs.warmup is not None


def _own(arm: ArmSpec) -> dict[str, Any]:
    return {name: value for name, value in arm.settings.items() if name != SETTINGS}


def choose_trained(desk: Desk, arm: ArmSpec, count: int) -> Choice:
    """Choose an arm's rows on signals of a warmed navigator.

    Args:
        desk: the seed's shared part.
        arm: the arm; ``settings.warmup`` holds the fields of :class:`WarmupSettings`, the others are the method's.
        count: how many rows.

    Returns:
        Rows in the method's order, and what training and measuring cost.
    """
    from gradsift.compare.arms import Choice, build_settings, disguise

    settings = build_settings(WarmupSettings, arm.settings.get(SETTINGS, {}), f"arm {arm.name}, {SETTINGS}")
    method = make_method(arm.method, _own(arm))
    warmup = method.needs.warmup
    assert warmup is not None
    found = measure_trained(desk, warmup, settings)
    problem = found.problem
    if arm.placebo:
        problem = disguise(problem, arm.placebo, desk.stream(f"placebo/{arm.placebo}"))
    selection = method.select(problem, Budget(rows=count), desk.stream("select/random"))
    said = (f"{found.lost} rows have no finite signal and cannot be chosen",) if found.lost else ()
    weights = dict(zip(selection.ids, selection.weights.tolist(), strict=True))
    return Choice(tuple(selection.ids), weights, found.cost, said + tuple(note.text for note in selection.notes))


def measure_trained(desk: Desk, warmup: Warmup, settings: WarmupSettings) -> Trained:
    """Train the world's model and measure the pool at every kept checkpoint, once per desk.

    Args:
        desk: the seed's shared part; it keeps what was measured.
        warmup: what the method asks for.
        settings: how the model is trained.

    Returns:
        The signals.

    Raises:
        ConfigError: rows' directions are asked of a world without target rows.
    """
    key = (warmup, settings)
    if key not in desk.trained:
        desk.trained[key] = _measure(desk, warmup, settings)
    return desk.trained[key]


def _measure(desk: Desk, warmup: Warmup, settings: WarmupSettings) -> Trained:
    world = desk.world
    if warmup.direction != "none" and not world.target:
        raise ConfigError(
            "directions are compared with a target's", where=f"the {world.name} world", got="no target rows"
        )
    warmed = _train(world, warmup, settings) if warmup.epochs else None
    places: tuple[Checkpoint | None, ...] = (None,) if warmed is None else warmed.checkpoints
    first = places[-1:] if warmup.direction == "none" else places
    found = [_pass(desk, at, warmup, settings, last=at is places[-1]) for at in first]
    ids = set.intersection(*(set(one.problem.ids) for one in found))
    problem = restrict(found[-1].problem, sorted(ids))
    if warmup.direction != "none":
        kept = [_signals(one, sorted(ids), at) for one, at in zip(found, first, strict=True)]
        raw = warmup.direction == "raw"
        problem = replace(
            problem, checkpoints=tuple(kept), subtasks=("target",) * len(world.target),
            sketch=problem.sketch if raw else None,
        )  # fmt: skip
    cost = {"warmup": Cost() if warmed is None else warmed.cost, "collect": sum((one.cost for one in found), Cost())}
    return Trained(problem, cost, len(world.pool) - len(ids))


def _train(world: World, warmup: Warmup, settings: WarmupSettings) -> Warmed:
    run = WarmupRun(
        settings.lr, settings.batch_size, settings.schedule, settings.rise, pad_id=world.pad_id, seed=world.seed
    )
    copies = set(world.copy_of)
    rows = [row for row in world.pool if row.id not in copies]  # as gradsift select trains: the first of equal rows
    return warm_up(world.make_model(), rows, warmup, run)


def _pass(desk: Desk, at: Checkpoint | None, warmup: Warmup, settings: WarmupSettings, *, last: bool) -> Rescored:
    """One pass at a checkpoint; anchors are measured at the last one only."""
    from gradsift.compare.arms import rescoring

    world, model = desk.world, desk.world.make_model()
    if at is not None:
        at.enter(model)

    def shape(engine: GradientEngine) -> None:
        if at is not None and warmup.direction in ("adam", "adam_diag"):
            bend(engine, at.moments.exp_avg, at.moments.exp_avg_sq, warmup.direction)  # type: ignore[arg-type]

    return rescore(
        model,
        world.pool,
        world.anchors if last else {},
        world.target,
        replace(rescoring(model, world.seed), keep_sketch=True, sketch_dim=settings.sketch_dim),
        pad_id=world.pad_id,
        copy_of=world.copy_of,
        sources=world.sources,
        shape=shape,
    )


def _signals(found: Rescored, ids: list[str], at: Checkpoint | None) -> CheckpointSignals:
    assert found.problem.sketch is not None
    assert found.target_sketch is not None
    place = {name: k for k, name in enumerate(found.problem.ids)}
    rows = np.array([place[name] for name in ids], dtype=np.int64)
    lr = 0.0 if at is None else at.lr
    return CheckpointSignals(unit_rows(found.problem.sketch[rows]), unit_rows(found.target_sketch), lr)
