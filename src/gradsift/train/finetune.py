"""The stage ``train``: a selection and a model become an adapter or weights, with a manifest that says what it took.

``OUT/train`` is published by rename and skipped when its manifest proves it done; a run that was stopped resumes from
``OUT/train-work``. The weights stand in ``OUT/train/model``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradsift.errors import DependencyError
from gradsift.manifest import make_folder
from gradsift.models.load import weights_key
from gradsift.train.assembly import load_model, make_parts, make_plan, prepare_rows
from gradsift.train.config import TrainConfig
from gradsift.train.material import Material, read_material
from gradsift.train.outcome import publish, read_done, stage_key, start_key
from gradsift.train.plan import TrainPlan
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Trained:
    """What a fine-tuning run left.

    Args:
        folder: ``OUT/train``.
        model: the folder of the adapter or the weights.
        manifest: content of ``manifest.json``.
        skipped: True when the manifest proved it done before.
        remarks: what a resumed run passed over.
    """

    folder: Path
    model: Path
    manifest: Mapping[str, Any]
    skipped: bool = False
    remarks: tuple[str, ...] = ()


def _nothing(rows: int, tokens: int) -> None:
    """Tell nobody."""


def require_trainer() -> ModuleType:
    """Import the trainer of TRL, or say what is missing before anything is read.

    Returns:
        The module ``gradsift.train.trainer``.

    Raises:
        DependencyError: trl is not installed.
    """
    try:
        from gradsift.train import trainer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "trl":
            raise
        raise DependencyError(
            "trl is not installed", where="gradsift train", do="pip install 'gradsift[train]'"
        ) from None
    return trainer


def finetune(
    config: TrainConfig,
    selection: Path,
    out: Path,
    *,
    command: str = "gradsift.train(...)",
    tick: Callable[[int, int], None] = _nothing,
    begin: Callable[[int], None] = lambda tokens: None,
) -> Trained:
    """Fine-tune a model on a selection; the same call resumes a run that was stopped.

    Args:
        config: everything but the rows.
        selection: run folder, selection folder or file of rows.
        out: the run folder.
        command: what a person would type to get the same; goes into the manifest.
        tick: called with rows and tokens of every optimizer step; what it raises stops the run.
        begin: called with the tokens to train on, before the first step.

    Returns:
        Where the weights are, and the manifest.

    Raises:
        DependencyError: trl is not installed.
    """
    engine = require_trainer()
    material = read_material(config, selection)
    _refuse_leaks(config, material)
    base = weights_key(material.resolved.folder)
    key, folder = stage_key(config, material, base), out / "train"
    done = read_done(folder, key)
    if done is not None:
        return Trained(folder, folder / "model", done, skipped=True)
    make_folder(out)
    model = load_model(config, material)
    start = _start(config, model)
    work = prepare_rows(config, material, model)
    plan = make_plan(config, work.rows)
    penalties, hook = make_parts(config, material, model)
    begin(sum(row.num_tokens for row in _rows_of(work.rows, plan)))
    place = out / "train-work"
    make_folder(place)
    data = engine.TrainData(plan, {row.id: row for row in work.rows}, _weights_of(work.rows, material.weights))
    trainer = engine.SelectionTrainer(
        model, material.tokenizer, config, data, penalties=penalties, hook=hook, folder=place,
        base=start_key(material, base), tick=tick,
    )  # fmt: skip
    found = trainer.resume()
    if config.wise_ft != 1.0:
        from gradsift.train.averaging import wise_ft

        wise_ft(model, config.wise_ft, start)
    head = {"key": key, "command": command, "remarks": list(found.remarks),
            "base": {"model": config.model, "source": material.resolved.source, "weights_sha256": base}}  # fmt: skip
    manifest = publish(folder, config, material, work, trainer, head)
    shutil.rmtree(place, ignore_errors=True)
    return Trained(folder, folder / "model", manifest, remarks=found.remarks)


def _refuse_leaks(config: TrainConfig, material: Material) -> None:
    from gradsift.train.replay import refuse_leak

    refuse_leak(material.selected, material.held_out, "the selected rows")
    refuse_leak(material.general, {**material.held_out, **material.anchors}, "the general rows")
    if config.hook.name is not None:
        for name, rows in material.anchors.items():
            refuse_leak(rows, material.held_out, f"the rows of {name}, which the hook measures,")


def _start(config: TrainConfig, model: nn.Module) -> dict[str, Any] | None:
    if config.wise_ft == 1.0 or config.mode == "lora":
        return None
    from gradsift.train.averaging import copy_weights

    return copy_weights(model)


def _rows_of(rows: Sequence[TokenRow], plan: TrainPlan) -> list[TokenRow]:
    """Rows of all steps, repeated as they are."""
    known = {row.id: row for row in rows}
    return [known[i] for step in plan.steps for i in step]


def _weights_of(rows: Sequence[TokenRow], weights: Mapping[str, float]) -> dict[str, float]:
    return {row.id: weights[row.id] for row in rows if row.id in weights}


@dataclass(frozen=True)
class Forecast:
    """What a run would take, without loading weights.

    Args:
        num_rows: rows it would train on, before token masking.
        num_steps: optimizer steps.
        tokens: tokens sent forward and backward.
        trained_tokens: tokens that carry loss, over all steps.
        num_replayed: general rows among the rows.
        folder: of the model.
        notes: remarks about the data.
    """

    num_rows: int
    num_steps: int
    tokens: int
    trained_tokens: int
    num_replayed: int
    folder: Path
    notes: tuple[str, ...]


def forecast(config: TrainConfig, selection: Path) -> Forecast:
    """Read and tokenize everything and count what would be trained on.

    Args:
        config: settings.
        selection: run folder, selection folder or file of rows.

    Returns:
        Rows, steps and tokens.
    """
    material = read_material(config, selection)
    _refuse_leaks(config, material)
    work = prepare_rows(config, material, None)
    plan = make_plan(config, work.rows)
    rows = _rows_of(work.rows, plan)
    return Forecast(
        num_rows=len(work.rows),
        num_steps=plan.num_steps,
        tokens=sum(row.num_tokens for row in rows),
        trained_tokens=sum(row.num_trained for row in rows),
        num_replayed=work.mixed.num_replayed if work.mixed else 0,
        folder=material.resolved.folder,
        notes=tuple(note.text for note in work.notes),
    )
