"""The folder of a fine-tuning run: key, log, manifest, and the proof that it is done."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.data.cache import published_folder
from gradsift.errors import ConfigError
from gradsift.manifest import (
    canonical_json,
    git_sha,
    hash_parts,
    pretty_json,
    sha256_file,
    versions,
    write_bytes_atomic,
)
from gradsift.store.spec import content_hash
from gradsift.train.assembly import Work
from gradsift.train.config import TrainConfig
from gradsift.train.material import Material
from gradsift.train.moments import read_moments, save_moments
from gradsift.train.parts import trainable
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from gradsift.train.trainer import SelectionTrainer

FORMAT = 1


def stage_key(config: TrainConfig, material: Material, base: str) -> str:
    """Hash everything that decides the result.

    Args:
        config: settings.
        material: rows.
        base: hash of the starting weights.

    Returns:
        32 hex digits.
    """
    rows = {"selected": _contents(material.selected), **_read_beside(material)}
    parts = [config.model_dump(mode="json", exclude={"device", "save_steps"}), rows, dict(material.weights), base]
    return hash_parts(canonical_json(part).encode() for part in parts)


def start_key(material: Material, base: str) -> str:
    """Hash the starting weights and the rows that penalties and hooks read.

    With the settings and the plan's rows that is everything a checkpoint depends on: one whose general or anchor rows were
    edited since is of another run.

    Args:
        material: rows.
        base: hash of the starting weights.

    Returns:
        32 hex digits.
    """
    return hash_parts(canonical_json(part).encode() for part in [base, _read_beside(material)])


def _read_beside(material: Material) -> dict[str, list[tuple[str, str]]]:
    """Ids and contents of the general and the anchor rows."""
    groups = {"general": material.general, **{f"anchor {name}": rows for name, rows in material.anchors.items()}}
    return {name: _contents(rows) for name, rows in groups.items()}


def _contents(rows: Sequence[TokenRow]) -> list[tuple[str, str]]:
    return [(row.id, content_hash(row.input_ids, row.trained)) for row in rows]


def read_done(folder: Path, key: str) -> dict[str, Any] | None:
    """Read the manifest of a finished run whose files are what was written.

    Args:
        folder: ``OUT/train``.
        key: from :func:`stage_key`.

    Returns:
        The manifest, or None when the folder does not exist.

    Raises:
        ConfigError: the folder holds another run, or files that were changed.
    """
    path = folder / "manifest.json"
    if not folder.exists():
        return None
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(path.read_text("utf-8"))
        files, same = manifest["files"], manifest["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        files, same = {}, False
    if same and all((folder / n).is_file() and sha256_file(folder / n) == digest for n, digest in files.items()):
        return manifest
    raise ConfigError(
        "the folder holds another training run, or files that were changed", where=str(folder),
        got=f"key {manifest['key']}" if files else "no readable manifest.json", expected=f"key {key}",
        do="use another --out, or delete the folder",
    )  # fmt: skip


def publish(
    folder: Path, config: TrainConfig, material: Material, work: Work, trainer: SelectionTrainer, head: dict[str, Any]
) -> dict[str, Any]:
    """Write weights, log and manifest, and rename the folder into place.

    Args:
        folder: ``OUT/train``; must not exist.
        config: settings.
        material: what was read.
        work: what was done to the rows.
        trainer: after training.
        head: entries of the manifest that the caller knows.

    Returns:
        The manifest.
    """
    with published_folder(folder) as temporary:
        model: Any = trainer.model
        if config.mode == "lora":
            from gradsift.models.adapter import save_adapter

            save_adapter(model, temporary / "model")
        else:
            bare = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            bare.save_pretrained(str(temporary / "model"))
            material.tokenizer.save_pretrained(str(temporary / "model"))
        if config.save_moments:
            save_moments(read_moments(model, trainer.optimizer), temporary / "moments.safetensors")
        write_bytes_atomic(temporary / "log.jsonl", _log(trainer))
        files = {str(p.relative_to(temporary)): sha256_file(p) for p in sorted(temporary.rglob("*")) if p.is_file()}
        manifest = _finite({**head, **_manifest(config, material, work, trainer), "files": files})
        write_bytes_atomic(temporary / "manifest.json", pretty_json(manifest))
    return manifest


def _log(trainer: SelectionTrainer) -> bytes:
    """One line per optimizer step: loss, loss with penalties, learning rate, rows and trained tokens."""
    lines = []
    for at, ids in enumerate(trainer.data.plan.steps):
        rows = [trainer.data.rows[i] for i in ids]
        line = {"step": at, "loss": trainer.losses[at], "total": trainer.totals[at],
                "lr": trainer.schedule.lr * trainer._rate_factor(at), "num_rows": len(rows),
                "num_tokens": sum(r.num_tokens for r in rows), "num_trained": sum(r.num_trained for r in rows)}  # fmt: skip
        lines.append(canonical_json(line) + "\n")
    return "".join(lines).encode("ascii")


def _manifest(config: TrainConfig, material: Material, work: Work, trainer: SelectionTrainer) -> dict[str, Any]:
    costs = {"train": trainer.cost, **{p.name: p.cost for p in trainer.penalties}}
    costs |= {f"hook {trainer.hook.name}": trainer.hook.cost} if trainer.hook else {}
    costs |= {"masking": work.cost} if work.masked else {}
    total = work.cost
    for cost in [*(p.cost for p in trainer.penalties), *([trainer.hook.cost] if trainer.hook else []), trainer.cost]:
        total = total + cost
    notes = (*work.notes, *(getattr(trainer.hook, "notes", tuple)() if trainer.hook else ()))
    steps = trainer.data.plan.steps
    mixed, masked = work.mixed, work.masked
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_sha": git_sha(Path(__file__).parent),
        "config": config.model_dump(mode="json"),
        "data": {**material.data.model_dump(mode="json"), "template_sha256": material.rule.template_sha256},
        "inputs": [dict(entry) for entry in material.inputs],
        "rows": {
            "selected": len(material.selected),
            "trained_on": len(work.rows),
            "trained_tokens": sum(row.num_trained for row in work.rows),
            "weighted": bool(material.weights),
            "replayed": mixed.num_replayed if mixed else 0,
            "replayed_tokens": mixed.replayed_tokens if mixed else 0,
        },
        "plan": {"num_steps": len(steps), "batch_size": config.batch_size, "num_rows": sum(map(len, steps))},
        "loss": {"first": trainer.losses[0], "last": trainer.losses[-1], "mean": math.fsum(trainer.losses) / len(steps)},
        "cost": {**{name: dataclasses.asdict(c) for name, c in costs.items()}, "total": dataclasses.asdict(total)},
        "hook": {"name": trainer.hook.name, **trainer.hook.summary()} if trainer.hook else None,
        "stm": {"tau": masked.tau, "share": masked.share, "num_dropped": len(masked.dropped), "dropped": masked.dropped,
                "deciles": masked.deciles} if masked else None,
        "num_trainable": sum(p.numel() for _, p in trainable(trainer.model)),  # pyright: ignore[reportArgumentType]
        "device": str(trainer.args.device),
        "notes": [dataclasses.asdict(note) for note in notes],
    }  # fmt: skip


def _finite(value: Any) -> Any:
    """Write numbers that do not exist (a mean over no step) as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
