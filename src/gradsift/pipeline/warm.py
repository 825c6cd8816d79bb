"""Training the navigator in a run folder, and the model, the spec and the target's gradients at one of its checkpoints.

Checkpoints stand in ``warmup/KEY``; the stage ``warmup`` counts what the training took. Nothing here walks the pool.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gradsift.errors import NumericsError
from gradsift.geometry.checkpoints import Kept, Warmup
from gradsift.gradients.adam import bend
from gradsift.gradients.collect import SAFETY, Pass, measure_shard
from gradsift.gradients.directions import BuiltDirection
from gradsift.gradients.embed import unit_distance
from gradsift.gradients.hooks import GradientEngine
from gradsift.manifest import hash_parts, write_json_atomic
from gradsift.models.adapter import adapter_sha256, attach_lora
from gradsift.models.load import Navigator
from gradsift.models.parameters import choose_parameters
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.progress import Clock
from gradsift.seeds import stream
from gradsift.store.signals import SignalStore
from gradsift.store.spec import GradientSpec
from gradsift.train.warmup import Checkpoint, Warmed, WarmupRun, draw_rows, warm_up
from gradsift.types import Note, TokenRow

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class At:
    """Where a pass measures.

    Args:
        checkpoint: weights and moments; None for the starting weights.
        form: what is sketched of every row; ``none`` measures the ordinary signals.
        signals: folder of the stores, under the run folder; a folder holds signals of one meaning.
    """

    checkpoint: Checkpoint | None
    form: Kept = "none"
    signals: str = "signals"


def train_navigator(
    prepared: Prepared,
    navigator: Navigator,
    model: nn.Module,
    rows: Sequence[TokenRow],
    warmup: Warmup,
    out: Path,
    clock: Clock,
    *,
    lr: float | None = None,
    stage: str = "warmup",
) -> Warmed:
    """Train what ``navigator.parameters`` names, or read back what an earlier run trained.

    Args:
        prepared: the run's inputs.
        navigator: the model as loaded.
        model: the same, with its adapter where it has one; left frozen at the last checkpoint.
        rows: the measured pool rows.
        warmup: share, epochs and checkpoints.
        out: the run folder.
        clock: timing and progress.
        lr: learning rate; the recipe's ``warmup.lr`` by default.
        stage: the clock's stage that counts its tokens.

    Returns:
        The checkpoints.
    """
    recipe = prepared.recipe
    names = set(choose_parameters(model, recipe.navigator.parameters).names)
    lora = recipe.navigator.parameters == "lora"
    # The adapter's scale and the arithmetic are no part of its bits, and train to other weights.
    how = [f"{recipe.navigator.lora.alpha!r}" if lora else "", recipe.navigator.dtype]
    start = hash_parts(part.encode() for part in (navigator.model_sha256, adapter_sha256(model) if lora else "", *how,
                                                  *sorted(names)))  # fmt: skip
    config = recipe.warmup
    run = WarmupRun(
        lr=config.lr if lr is None else lr, batch_size=config.batch_size, schedule=config.schedule, rise=config.rise,
        tokens_per_batch=recipe.collect.tokens_per_batch, pad_id=prepared.pad_id, seed=recipe.seed,
        tick=lambda n, tokens: clock.tick(stage, n, tokens),
    )  # fmt: skip
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names)
    try:
        warmed = warm_up(model, rows, warmup, run, folder=out / "warmup", start=start)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        model.eval()
    warmed.checkpoints[-1].enter(model)
    return warmed


def num_warmup_tokens(rows: Sequence[TokenRow], warmup: Warmup, seed: int) -> int:
    """Count the tokens that a warm-up trains on, epochs included.

    Args:
        rows: the measured pool rows.
        warmup: share and epochs.
        seed: the run's seed.

    Returns:
        Tokens.
    """
    return warmup.epochs * sum(row.num_tokens for row in draw_rows(rows, warmup.share, seed)) if warmup.epochs else 0


def enter_checkpoint(prepared: Prepared, navigator: Navigator, at: Checkpoint) -> tuple[Any, list[Note]]:
    """Bring a fresh navigator to a checkpoint.

    Args:
        prepared: the run's inputs.
        navigator: the model as loaded; changed in place.
        at: the checkpoint.

    Returns:
        The model, with its adapter where it has one, and a remark.
    """
    recipe, model = prepared.recipe, navigator.model
    if recipe.navigator.parameters == "lora":
        model = attach_lora(navigator.model, recipe.navigator.lora, recipe.seed)
    at.enter(model)
    text = f"measured at the weights after epoch {at.epoch} of a training on the pool, not at the navigator's own"
    return model, [Note("warmed", text, at.epoch)]


def bend_engine(engine: GradientEngine, at: At) -> None:
    """Make a pass sketch Adam directions where that is asked for.

    Args:
        engine: the pass's engine.
        at: where it measures.
    """
    if at.form in ("adam", "adam_diag"):
        assert at.checkpoint is not None
        bend(engine, at.checkpoint.moments.exp_avg, at.checkpoint.moments.exp_avg_sq, at.form)  # type: ignore[arg-type]


def spec_at(spec: GradientSpec, at: At) -> GradientSpec:
    """Say in the spec which weights measured, and what was sketched.

    Args:
        spec: that of an ordinary pass with this model.
        at: where it measures.

    Returns:
        The spec: weights of a checkpoint that are no adapter change ``model_sha256``, Adam directions ``direction``.
    """
    if at.checkpoint is None:
        return spec
    digests = at.checkpoint.digests
    if spec.adapter_sha256 is None:
        spec = dataclasses.replace(
            spec, model_sha256=hash_parts([spec.model_sha256.encode(), digests["weights"].encode()], digest_size=32)
        )
    if at.form in ("adam", "adam_diag"):
        spec = dataclasses.replace(spec, direction=f"{at.form}/{digests['moments'][:32]}")
    return spec


def target_sketches(built: Sequence[BuiltDirection], prepared: Prepared) -> Float[np.ndarray, "n_t D"] | None:
    """Give the sketches of the target rows' plain gradients.

    Args:
        built: the directions that were measured.
        prepared: the run's inputs.

    Returns:
        float32 [n_t, D] in id order, or None without a target.

    Raises:
        NumericsError: a target row's gradient is zero.
    """
    target = prepared.target
    found = None if target is None else next((d.sketches for d in built if d.name == target.name), None)
    if target is None or found is None:
        return None
    measured = sorted(target.usable, key=lambda row: (row.num_tokens, row.id))  # as build_direction reads them
    place = {row.id: k for k, row in enumerate(measured)}
    rows = found[[place[name] for name in sorted(place)]]
    zero = np.flatnonzero(~rows.any(axis=1))
    if zero.size:
        raise NumericsError(
            "the gradient of a target row is zero", where=f"target row {sorted(place)[zero[0]]}",
            expected="a gradient with a direction", do="leave this row out of the target",
        )  # fmt: skip
    return rows


def direction_noise(run: Pass, rows: Sequence[TokenRow], store: SignalStore, folder: Path, seed: int) -> float:
    """Measure how far a row's unit sketch turns when it is measured alone; once per set of rows.

    Args:
        run: the pass, not entered.
        rows: the measured pool rows.
        store: what it left.
        folder: of the store.
        seed: of the draw.

    Returns:
        A bound on a cosine with such a sketch: four times the largest distance seen on four rows, plus rounding.
    """
    path = folder / "direction_noise.json"
    key = hash_parts(sorted(row.id.encode("utf-8", "surrogatepass") for row in rows))
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["rows"] == key:
            return float(kept["noise"])
    usable = {name for name, status in zip(store.ids, store.status, strict=True) if status.usable}
    some = [row for row in rows if row.id in usable]
    draws = stream(seed, "noise/direction").uniform([row.id for row in some])
    turned = 0.0
    with run.engine:
        for i in np.argsort(draws, kind="stable")[:4]:
            alone = measure_shard(run, [some[i]])
            if alone.usable[0] and alone.sketch is not None:
                turned = max(turned, unit_distance(alone.sketch[0], store.unit_sketch([some[i].id])[0]))
    noise = SAFETY * turned + 1e-6
    write_json_atomic(path, {"rows": key, "noise": noise})
    return noise
