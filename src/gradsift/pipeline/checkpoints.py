"""``measure`` for methods that need a trained navigator: train it, then one pass at every kept checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gradsift.geometry.checkpoints import CheckpointSignals, unit_rows
from gradsift.models.adapter import attach_lora
from gradsift.models.load import load_navigator
from gradsift.pipeline.measure import Measurement, measure, measured_rows
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.progress import Clock
from gradsift.pipeline.warm import At, num_warmup_tokens, train_navigator
from gradsift.store.signals import SignalStore
from gradsift.train.warmup import Warmed
from gradsift.types import Note, RowStatus

SUBTASK = "subtask"


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """What the pass at one checkpoint left.

    Args:
        store: the rows' signals, whose sketches are those of their directions.
        target: float32 [n_t, D] sketches of the target rows' plain gradients in id order.
        lr: mean learning rate of the epoch that ends here.
        noise: bound on a cosine of two unit sketches.
    """

    store: SignalStore
    target: Float[np.ndarray, "n_t D"]
    lr: float
    noise: float


def measure_trained(prepared: Prepared, out: Path, clock: Clock) -> Measurement:
    """Measure the pool, at checkpoints of a training where the method asks for one.

    Args:
        prepared: the run's inputs.
        out: the run folder.
        clock: timing and progress.

    Returns:
        The pass at the last checkpoint, with those at the others beside it; the ordinary pass for any other method.
    """
    warmup = prepared.method.needs.warmup
    if warmup is None:
        return measure(prepared, out, clock)
    warmed = _train(prepared, out, clock) if warmup.epochs else None
    places = (
        [At(None, warmup.direction)] if warmed is None else [At(one, warmup.direction) for one in warmed.checkpoints]
    )
    kept: list[MeasuredCheckpoint] = []
    for at in places[:-1] if warmup.direction != "none" else []:
        assert at.checkpoint is not None
        earlier = replace(at, signals=f"signals-epoch-{at.checkpoint.epoch}")
        kept.append(_kept(measure(replace(prepared, anchors=()), out, clock, earlier), at))  # lets the model go
    last = measure(prepared, out, clock, places[-1])
    store, lost = _usable_everywhere(last.store, [one.store for one in kept])
    if warmup.direction != "none":
        kept.append(_kept(last, places[-1]))
    notes = last.notes + lost
    return dataclasses.replace(
        last, store=store, checkpoints=tuple(kept), warmup=_summary(prepared, warmed), notes=notes
    )


def _train(prepared: Prepared, out: Path, clock: Clock) -> Warmed:
    recipe, warmup = prepared.recipe, prepared.method.needs.warmup
    assert warmup is not None
    rows = measured_rows(prepared)
    with clock.stage("warmup", num_warmup_tokens(rows, warmup, recipe.seed)):
        navigator = load_navigator(prepared.resolved, dtype=recipe.navigator.dtype, device=recipe.navigator.device)
        model: Any = navigator.model
        if recipe.navigator.parameters == "lora":
            model = attach_lora(navigator.model, recipe.navigator.lora, recipe.seed)
        return train_navigator(prepared, navigator, model, rows, warmup, out, clock)


def _kept(measured: Measurement, at: At) -> MeasuredCheckpoint:
    assert measured.target_sketch is not None  # such a method needs a target
    lr = 0.0 if at.checkpoint is None else at.checkpoint.lr
    return MeasuredCheckpoint(measured.store, measured.target_sketch, lr, measured.direction_noise)


def _usable_everywhere(last: SignalStore, others: Sequence[SignalStore]) -> tuple[SignalStore, tuple[Note, ...]]:
    """Give a row that failed at an earlier checkpoint the status it has there."""
    status, reason, lost = list(last.status), list(last.reason), []
    for other in others:
        found = dict(zip(other.ids, zip(other.status, other.reason, strict=True), strict=True))
        for i, name in enumerate(last.ids):
            there, why = found.get(name, (RowStatus.OK, ""))
            if RowStatus(status[i]).usable and not there.usable:
                status[i], reason[i] = there, f"at an earlier checkpoint {why}"
                lost.append(name)
    if not lost:
        return last, ()
    text = f"{len(lost)} rows have no direction at an earlier checkpoint and are left out"
    note = Note("lost_at_checkpoint", text, len(lost), tuple(lost[:5]))
    return replace(last, status=tuple(status), reason=tuple(reason)), (note,)


def _summary(prepared: Prepared, warmed: Warmed | None) -> Mapping[str, Any]:
    """The manifest's ``warmup`` section."""
    warmup = prepared.method.needs.warmup
    assert warmup is not None
    found: dict[str, Any] = {**asdict(warmup), **prepared.recipe.warmup.model_dump()}
    if warmed is None:
        return found
    steps = [{"epoch": one.epoch, "lr": one.lr, **one.digests} for one in warmed.checkpoints]
    return {
        **found, "folder": f"warmup/{warmed.key}", "num_rows": warmed.num_rows, "tokens": warmed.cost.forward_tokens,
        "flops": warmed.cost.flops, "seconds": warmed.cost.seconds, "checkpoints": steps,
    }  # fmt: skip


def checkpoint_fields(
    prepared: Prepared, measured: Measurement, originals: Sequence[str], at: np.ndarray
) -> dict[str, Any]:
    """Give the problem's fields about checkpoints.

    Args:
        prepared: the run's inputs.
        measured: the passes.
        originals: ids of the first copies.
        at: int64 [N] which of them each row of the problem shares.

    Returns:
        ``checkpoints`` and ``subtasks``; nothing where no directions were kept.
    """
    if not measured.checkpoints:
        return {}
    made = tuple(
        CheckpointSignals(unit_rows(one.store.unit_sketch(originals))[at], unit_rows(one.target), one.lr, one.noise)
        for one in measured.checkpoints
    )
    return {"checkpoints": made, "subtasks": subtasks(prepared)}


def subtasks(prepared: Prepared) -> tuple[str, ...]:
    """Read the target rows' subtasks from their column ``subtask``; rows without one belong to ``target``.

    Args:
        prepared: the run's inputs, with a target.

    Returns:
        One label per usable target row, in id order.
    """
    target = prepared.target
    assert target is not None
    labels = []
    for row in sorted(target.usable, key=lambda row: row.id):
        value = json.loads(target.pool.raw(target.pool.index[row.id])).get(SUBTASK)
        labels.append("target" if value is None else str(value))
    return tuple(labels)
