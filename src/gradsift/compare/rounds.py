"""Arms whose choice and training are interleaved: ``ogs_rounds`` on the arm's own training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from gradsift.compare.arms import EVALUATION_TOKENS, build_settings, draw_replay, rescoring
from gradsift.errors import NumericsError
from gradsift.evaluate.losses import evaluate_rows
from gradsift.train.loop import Loop
from gradsift.train.parts import Cost
from gradsift.train.rounds import Board, RoundsConfig, play_rounds

if TYPE_CHECKING:
    from gradsift.compare.arms import ArmSpec, Desk
    from gradsift.compare.cell import Grid

ROUND_METHODS: frozenset[str] = frozenset({"ogs_rounds"})


@dataclass(frozen=True)
class RoundRun:
    """What a run in rounds left behind.

    Args:
        model: the trained model.
        ids: the rows it trained on in the end, replay rows last.
        cost: of choosing and training, by part.
        extra: figures per run.
        notes: what a reader must know.
        diverged_after: optimizer steps after which training left the finite numbers; None where it did not.
    """

    model: nn.Module
    ids: tuple[str, ...]
    cost: Mapping[str, Cost]
    extra: Mapping[str, float]
    notes: tuple[str, ...] = ()
    diverged_after: int | None = None


def _is_finite(desk: Desk, model: nn.Module) -> bool:
    """Whether a model has finite losses on the held-out rows."""
    try:
        for held_out in desk.world.evaluations:
            evaluate_rows(model, held_out.rows, pad_id=desk.world.pad_id, tokens_per_batch=EVALUATION_TOKENS)
    except NumericsError:
        return False
    return True


def train_in_rounds(desk: Desk, arm: ArmSpec, grid: Grid, lr: float) -> RoundRun:
    """Choose and train in rounds at one learning rate.

    Args:
        desk: the seed's shared part.
        arm: the arm; its settings are those of ``ogs_rounds``.
        grid: how every arm is trained.
        lr: learning rate.

    Returns:
        The trained model and what it cost; of a run that diverged the steps alone are counted.
    """
    world = desk.world
    config = build_settings(RoundsConfig, arm.settings, f"arm {arm.name}")
    replay = draw_replay(desk, round(arm.replay * desk.budget))
    model = world.make_model()
    board = Board(
        world.pool,
        world.anchors,
        world.target,
        tuple(desk.rows[i] for i in replay),
        world.copy_of,
        world.pad_id,
        rescoring(model, world.seed),
        world.seed,
    )
    loop = Loop(model, grid.loop(lr, grid.num_steps, world.seed), world.pad_id)
    try:
        played = play_rounds(
            loop,
            board,
            config,
            num_rows=desk.budget - len(replay),
            num_steps=grid.num_steps,
            batch_size=grid.batch_size,
            draw=desk.stream("select/random"),
        )
    except NumericsError:
        if not loop.losses or _is_finite(desk, model):  # something else is to blame than training
            raise
        return RoundRun(model, (), {"train": loop.cost}, {}, diverged_after=len(loop.losses))
    extra = {"num_halved": float(sum(r.num_halved for r in played.rounds))}
    for name in world.anchors:
        extra[f"rise_{name}"] = played.rounds[-1].rise[name]
        extra[f"price_{name}"] = played.rounds[-1].prices.get(name, 0.0)
    short = desk.budget - len(replay) - len(played.ids)
    notes = (f"shortage: {short} rows fewer than the budget, the pool is used up",) if short else ()
    return RoundRun(model, (*played.ids, *replay), {"train": loop.cost, "rescore": played.cost}, extra, notes)
