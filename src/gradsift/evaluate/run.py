"""The evaluation stage: files and models in, one folder with ``eval.parquet`` out, published whole, skipped when done."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gradsift.data.cache import disk_errors, published_folder
from gradsift.errors import ConfigError, ModelError, SpecError
from gradsift.evaluate.config import EvaluateConfig
from gradsift.evaluate.inputs import Inputs, Tuned, read_inputs, worded
from gradsift.evaluate.phases import How, Measured, Sets, evaluate_model, measure_pair
from gradsift.evaluate.table import EvalTable, read_table, write_table
from gradsift.manifest import git_sha, seal, sha256_file, unseal, versions
from gradsift.models.load import load_navigator, load_tokenizer, tokenizer_sha256, weights_key
from gradsift.types import Note

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

__all__ = ["Evaluation", "How", "Sets", "evaluate", "evaluate_model", "measure_pair"]

FORMAT = 1
FIGURES, ITEMS, MANIFEST = "eval.parquet", "items.parquet", "manifest.json"


@runtime_checkable
class Progress(Protocol):
    """What the stage reports while it runs (the pipeline's protocol; it lies above this package)."""

    def start(self, stage: str, total_tokens: int) -> None:
        """A stage begins; ``total_tokens`` is 0 when its length is not known."""
        ...

    def advance(self, rows: int, tokens: int) -> None:
        """Some rows are done; raises to stop the run."""
        ...

    def finish(self, stage: str) -> None:
        """The stage is over."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What the stage left.

    Args:
        table: all figures.
        out: the folder.
        manifest: content of ``manifest.json``.
        skipped: the folder held these very figures already.
    """

    table: EvalTable
    out: Path
    manifest: Mapping[str, Any]
    skipped: bool = False


def evaluate(
    config: EvaluateConfig, out: Path, *, command: str = "gradsift.evaluate(...)", progress: Progress | None = None
) -> Evaluation:
    """Measure the base model, then the tuned one, and write the folder; the same call again only reads it.

    Args:
        config: everything that determines the figures.
        out: the folder; must be new, empty, or of an earlier run with equal inputs.
        command: what a person would type to get the same; goes into the manifest.
        progress: who is told; nobody by default.

    Returns:
        The figures.

    Raises:
        ConfigError: ``out`` holds something else, or there is nothing to measure.
        SpecError: ``out`` holds figures of other inputs; the first that differs is named.
    """
    _check_folder(out)
    inputs = read_inputs(config)
    done = _finished(out, inputs.identity)
    if done is not None:
        return done
    begun = time.perf_counter()
    measured, notes = _measure(config, inputs, progress)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        "git_sha": git_sha(Path(__file__).parent),
        "config": config.model_dump(mode="json"),
        "identity": dict(inputs.identity),
        "model": {"name": config.model, "source": inputs.resolved.source},
        "tuned": _tuned_entry(inputs.tuned),
        "rows": {name: dict(counts) for name, counts in inputs.status.items()},
        "notes": [dataclasses.asdict(note) for note in (*inputs.notes, *notes)],
        "transitions": _transitions(measured),
        "standard_errors": _standard_errors(measured),
        "cost": {**dataclasses.asdict(measured.cost), "wall_seconds": time.perf_counter() - begun},
    }
    with disk_errors(out), published_folder(out) as folder:
        import pyarrow.parquet as pq

        write_table(measured.table, folder / FIGURES)
        pq.write_table(_items(measured), folder / ITEMS)
        manifest["files"] = {name: sha256_file(folder / name) for name in (FIGURES, ITEMS)}
        (folder / MANIFEST).write_bytes(seal(manifest))
    return Evaluation(measured.table, out, manifest)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError("the folder for the figures is a file", where="--out", got=str(out), do="name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ConfigError(
            "the folder holds something else", where="--out", got=f"{out} without {MANIFEST}",
            expected="a new or empty folder, or an earlier evaluation", do="name another folder",
        )  # fmt: skip


def _finished(out: Path, identity: Mapping[str, Any]) -> Evaluation | None:
    """Read a folder whose manifest proves that it holds these very figures."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = unseal((out / MANIFEST).read_bytes())
    files = manifest.get("files", {}) if manifest is not None else {}
    whole = bool(files) and all((out / name).is_file() and sha256_file(out / name) == h for name, h in files.items())
    if manifest is None or manifest.get("format") != FORMAT or not whole:
        raise SpecError(
            "the folder holds an evaluation that is damaged, or of another version",
            where=str(out),
            got="a manifest that does not match its files",
            do="delete the folder and run the command again",
        )
    old = manifest["identity"]
    odd = [name for name in sorted({*old, *identity}) if old.get(name) != identity.get(name)]
    if odd:
        raise SpecError(
            "the folder holds figures of other inputs",
            where=f"{out}: {odd[0]}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else ""),
            got=str(identity.get(odd[0], "absent")),
            expected=str(old.get(odd[0], "absent")),
            do="name another --out, or give the old inputs",
        )
    return Evaluation(read_table(out / FIGURES), out, manifest, skipped=True)


def _measure(config: EvaluateConfig, inputs: Inputs, progress: Progress | None) -> tuple[Measured, tuple[Note, ...]]:
    """Load the base model, measure it, and only then load what fine-tuning made of it."""
    notes: list[Note] = []
    tuned = inputs.tuned
    if tuned is not None and tuned.base_sha256 is not None:
        _check_base(tuned, inputs.resolved.folder)
    base = worded("--model", lambda: load_navigator(inputs.resolved, dtype=config.dtype, device=config.device))
    notes += base.notes

    def load() -> nn.Module:
        assert tuned is not None
        if tuned.kind == "adapter":
            from gradsift.models.adapter import load_adapter

            return load_adapter(base.model, tuned.folder).requires_grad_(False)
        assert tuned.resolved is not None
        place = tuned.resolved
        other = worded("--tuned", lambda: load_navigator(place, dtype=config.dtype, device=base.device))
        return other.model

    if tuned is not None and tuned.resolved is not None:
        notes += _other_tokenizer(tuned, tokenizer_sha256(base.tokenizer))
    how = How(inputs.pad_id, config.tokens_per_batch, config.seed, config.divergence,
              progress.advance if progress else None)  # fmt: skip
    if progress:
        progress.start("measuring", _num_tokens(inputs.sets, config))
    measured = measure_pair(base.model, load if tuned is not None else None, inputs.sets, how)
    if progress:
        progress.finish("measuring")
    for result in (measured.before, measured.after):
        if result is not None and result.bench is not None:
            notes += [note for note in result.bench.notes if note not in notes]
    return measured, tuple(notes)


def _check_base(tuned: Tuned, folder: Path) -> None:
    found = weights_key(folder)
    if tuned.base_sha256 != found:
        raise ModelError(
            "the tuned model was made from other weights than the base model given",
            where="--model",
            got=f"weights {found}",
            expected=f"weights {tuned.base_sha256} (manifest of {tuned.folder.parent})",
            do="give the model that was fine-tuned; gain against another one would mean nothing",
        )


def _other_tokenizer(tuned: Tuned, base: str) -> list[Note]:
    assert tuned.resolved is not None
    place = tuned.resolved
    if tokenizer_sha256(worded("--tuned", lambda: load_tokenizer(place))) == base:
        return []
    return [
        Note("tokenizer", "the tuned model brings another tokenizer or template; both were measured with the base's")
    ]


def _num_tokens(sets: Sets, config: EvaluateConfig) -> int:
    rows = sum(row.num_tokens for one in sets.rows for row in one.rows)
    choices = sum(row.num_tokens for one in sets.choices for rows in one.encoded.rows for row in rows)
    if config.tuned is None:
        return rows + choices
    return (3 if config.divergence else 2) * rows + 2 * choices


def _tuned_entry(tuned: Tuned | None) -> dict[str, Any] | None:
    return None if tuned is None else {"folder": str(tuned.folder), "kind": tuned.kind, "sha256": tuned.sha256}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _transitions(measured: Measured) -> list[dict[str, Any]]:
    return [
        {"role": role, "task": task, "source": source,
         **{name: _number(value) for name, value in dataclasses.asdict(found).items()}}
        for (role, task, source), found in measured.transitions().items()
    ]  # fmt: skip


def _standard_errors(measured: Measured) -> list[dict[str, Any]]:
    """Standard errors of accuracies; losses have theirs in the rows of items.parquet."""
    found: list[dict[str, Any]] = []
    for result in (measured.before, measured.after):
        if result is None:
            continue
        for (role, task), answers in result.answers.items():
            for source in sorted(set(answers.sources)):
                error = _number(answers.of(source).standard_error)
                found.append({"phase": result.phase, "role": role, "task": task, "source": source,
                              "metric": "accuracy", "standard_error": error})  # fmt: skip
        for score in result.bench.scores if result.bench else ():
            found.append({"phase": result.phase, "task": score.task, "source": score.task, "metric": score.metric,
                          "standard_error": _number(score.standard_error)})  # fmt: skip
    return found


def _items(measured: Measured) -> pa.Table:
    """One row per row or question and phase, without texts: what paired statistics per question need."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    for result in (measured.before, measured.after):
        if result is None:
            continue
        for (role, task), losses in result.losses.items():
            for i, name in enumerate(losses.ids):
                rows.append({"phase": result.phase, "role": role, "task": task, "kind": "row", "id": name,
                             "loss": float(losses.loss[i]), "num_trained": int(losses.num_trained[i]),
                             "correct": bool(losses.exact[i]), "correct_norm": None, "num_options": None})  # fmt: skip
        for (role, task), answers in result.answers.items():
            for i, name in enumerate(answers.ids):
                rows.append({"phase": result.phase, "role": role, "task": task, "kind": "choice", "id": name,
                             "loss": None, "num_trained": None, "correct": bool(answers.correct[i]),
                             "correct_norm": bool(answers.correct_norm[i]),
                             "num_options": int(answers.num_options[i])})  # fmt: skip
    kinds = {"phase": "string", "role": "string", "task": "string", "kind": "string", "id": "string", "loss": "float64",
             "num_trained": "int64", "correct": "bool", "correct_norm": "bool", "num_options": "int64"}  # fmt: skip
    return pa.Table.from_pylist(rows, pa.schema([(name, pa.type_for_alias(kind)) for name, kind in kinds.items()]))
