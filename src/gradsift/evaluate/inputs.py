"""Files and names become what is measured: models found and hashed, rows tokenized, questions encoded, all counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gradsift.data.pool import Pool, open_source, read_pool
from gradsift.data.tokenize import MaskRule, mask_rule, tokenize_rows
from gradsift.errors import ConfigError, DataError, ModelError
from gradsift.evaluate.benchmarks import require_lm_eval
from gradsift.evaluate.choice import Style, encode_choices
from gradsift.evaluate.config import EvaluateConfig
from gradsift.evaluate.phases import Benchmarks, ChoiceSet, RowSet, Sets
from gradsift.evaluate.questions import read_choices
from gradsift.evaluate.table import Role
from gradsift.manifest import hash_parts, sha256_file
from gradsift.models.load import load_tokenizer, tokenizer_sha256
from gradsift.models.resolve import Resolved, resolve_navigator
from gradsift.recipe import SourceConfig
from gradsift.store.spec import content_hash
from gradsift.types import Note, RowStatus, Shape, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "adapter_config.json"
# Where a fine-tuning folder keeps what it made, besides standing for itself.
INSIDE = ("", "model", "train/model", "adapter")
T = TypeVar("T")


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model that was found, not yet loaded.

    Args:
        folder: an adapter's folder or a whole model's.
        kind: which of the two.
        sha256: hash over names and bytes of its configuration and weights.
        resolved: of a whole model.
        base_sha256: hash of the base weights it was trained from, where fine-tuning left its manifest beside it.
    """

    folder: Path
    kind: Literal["adapter", "model"]
    sha256: str
    resolved: Resolved | None = None
    base_sha256: str | None = None


@dataclass(frozen=True)
class Inputs:
    """Everything that was read before a model is loaded.

    Args:
        resolved: the base model.
        tokenizer: its tokenizer, used in both phases.
        rule: which tokens carry loss.
        tuned: the fine-tuned model, or None.
        sets: what is measured.
        status: per row set, rows per status; the values add up to the rows read.
        identity: what determines the figures, by name; equal mappings give equal figures.
        notes: counted remarks about the data.
    """

    resolved: Resolved
    tokenizer: PreTrainedTokenizerBase
    rule: MaskRule
    tuned: Tuned | None
    sets: Sets
    status: Mapping[str, Mapping[str, int]]
    identity: Mapping[str, Any]
    notes: tuple[Note, ...]

    @property
    def pad_id(self) -> int:
        """Padding token; it never carries loss, so any id will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0


def read_inputs(config: EvaluateConfig) -> Inputs:
    """Read, tokenize and hash every input.

    Args:
        config: the run's settings.

    Returns:
        What is measured, under which models.

    Raises:
        ConfigError: nothing is to be measured, or a name is used twice.
        DataError: a set has no usable row.
        ModelError: a model cannot be found.
    """
    if config.lm_eval.tasks:
        require_lm_eval()
    resolved = worded("--model", lambda: resolve_navigator(config.model, config.revision))
    tokenizer = worded("--model", lambda: load_tokenizer(resolved))
    tuned = find_tuned(Path(config.tuned)) if config.tuned is not None else None
    groups: tuple[tuple[Role, tuple[SourceConfig, ...]], ...] = (("domain", config.domain), ("general", config.general))
    wanted: list[tuple[Role, SourceConfig]] = []
    for role, sources in groups:
        for source in sources:
            wanted.append((role, source))
    pools: list[tuple[Role, str, Pool]] = [
        (role, s.label, read_pool([s], fmt=config.data.format, dedup=config.data.dedup)) for role, s in wanted
    ]
    shapes: set[Shape] = {shape for _, _, pool in pools for shape in pool.shapes}
    rule = mask_rule(tokenizer, config.data.loss_on, shapes)
    sets, status, notes = [], {}, []
    for role, label, pool in pools:
        tokens = tokenize_rows(pool.rows, tokenizer, rule, max_length=config.data.max_length)
        status[f"{role} {label}"] = {s.value: n for s, n in sorted(Counter(row.status for row in tokens).items())}
        sets.append(_row_set(role, label, pool, tokens, config.split_by))
        notes += _row_notes(f"{role} {label}", tokens, config.data.max_length)
    style: Style = (
        config.choice_style if config.choice_style != "auto" else "chat" if tokenizer.chat_template else "plain"
    )
    choices = []
    for source in config.choice:
        items = read_choices(source.path, source.label)
        encoded = encode_choices(items, tokenizer, style=style, max_length=config.data.max_length)
        choices.append(ChoiceSet(source.label, source.role, encoded))
        notes += encoded.notes
    bench = Benchmarks(config.lm_eval, tokenizer) if config.lm_eval.tasks else None
    identity = {**_identity(config, resolved, tuned, pools), "choice style": style,
                "tokenizer": tokenizer_sha256(tokenizer), "template": rule.template_sha256}  # fmt: skip
    notes += _shared_rows(sets)
    return Inputs(resolved, tokenizer, rule, tuned, Sets(tuple(sets), tuple(choices), bench), status, identity,
                  tuple(notes))  # fmt: skip


def worded(flag: str, call: Callable[[], T]) -> T:
    """Let a refusal of the model loader name the flag of this command instead of ``--navigator``.

    Args:
        flag: the flag.
        call: what may refuse.

    Returns:
        What the call returns.

    Raises:
        ModelError: the refusal, reworded.
    """
    try:
        return call()
    except ModelError as error:
        where, do = (text.replace("--navigator", flag).replace("navigator.", "") for text in (error.where, error.do))
        raise ModelError(error.what, where=where, got=error.got, expected=error.expected, do=do) from None


def find_tuned(path: Path) -> Tuned:
    """Find an adapter or a whole model in a folder, or in the folder of it that fine-tuning writes.

    Args:
        path: the folder.

    Returns:
        What it holds.

    Raises:
        ModelError: it holds neither.
    """
    for name in INSIDE:
        folder = path / name
        base = _trained_from(folder.absolute().parent / "manifest.json")
        if (folder / ADAPTER).is_file():
            digest = hash_folder(folder, (ADAPTER, "adapter_model.safetensors"))
            return Tuned(folder, "adapter", digest, base_sha256=base)
        if (folder / "config.json").is_file():
            resolved = worded("--tuned", lambda place=folder: resolve_navigator(str(place.absolute())))
            return Tuned(folder, "model", hash_folder(folder, ("config.json", "*.safetensors")), resolved, base)
    raise ModelError(
        "there is no fine-tuned model in the folder",
        where="--tuned",
        got=str(path),
        expected=f"a folder with {ADAPTER}, or with config.json and *.safetensors",
        do="give the folder that fine-tuning wrote",
    )


def _trained_from(manifest: Path) -> str | None:
    """Read from the manifest of a fine-tuning folder which base weights it began with; others' folders have none."""
    try:
        found = json.loads(manifest.read_text("utf-8"))["base"]["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def hash_folder(folder: Path, patterns: Sequence[str]) -> str:
    """Hash names and bytes of files in a folder.

    Args:
        folder: an existing folder.
        patterns: which files.

    Returns:
        64 hexadecimal digits.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    parts = (part.encode() for path in files for part in (path.relative_to(folder).as_posix(), sha256_file(path)))
    return hash_parts(parts, digest_size=32)


def _identity(
    config: EvaluateConfig, resolved: Resolved, tuned: Tuned | None, pools: Sequence[tuple[Role, str, Pool]]
) -> dict[str, Any]:
    """Name by name what determines the figures: contents instead of paths."""
    named = {f"{role} {label}": pool.files[0].sha256 for role, label, pool in pools}
    named |= {f"choice {source.role} {source.label}": open_source(source.path).sha256 for source in config.choice}
    settings = ("split_by", "divergence", "tokens_per_batch", "dtype", "seed")
    values = {name: getattr(config, name) for name in settings}
    values |= {f"data.{name}": value for name, value in config.data.model_dump(mode="json").items()}
    if config.lm_eval.tasks:
        if config.lm_eval.folder is None:
            raise ConfigError("no folder of tasks is named", where="--lm-eval-dir", do="add --lm-eval-dir DIR")
        values["lm_eval"] = config.lm_eval.model_dump(mode="json", exclude={"folder"})
        values["lm_eval.folder"] = hash_folder(Path(config.lm_eval.folder), ("**/*",))
        values["lm_eval.version"] = require_lm_eval()
    base = hash_folder(resolved.folder, ("config.json", "*.safetensors"))
    return {"model": base, "tuned": tuned.sha256 if tuned else None, **named, **values}


def _row_set(role: Role, label: str, pool: Pool, tokens: Sequence[TokenRow], split_by: str | None) -> RowSet:
    usable = [i for i, row in enumerate(tokens) if row.status.usable]
    if not usable:
        counts = ", ".join(f"{s.value} {n}" for s, n in sorted(Counter(row.status for row in tokens).items()))
        first = next((row.reason for row in tokens if row.reason), "")
        raise DataError(
            f"no usable row in {role} {label}",
            where=pool.files[0].path,
            got=(counts or "no rows at all") + (f"; first reason: {first}" if first else ""),
            expected="at least one row that trains a token",
            do="check --format and --loss-on; gradsift inspect FILE --row 0 shows how a row is read",
        )
    sources = tuple(label if split_by is None else _source(pool, i, split_by) for i in usable)
    return RowSet(label, role, tuple(tokens[i] for i in usable), sources)


def _source(pool: Pool, i: int, column: str) -> str:
    value = json.loads(pool.raw(i)).get(column)
    if value in (None, ""):
        raise DataError(
            f"a row does not say its {column}",
            where=f"{pool.rows[i].file}, row {pool.rows[i].row}",
            expected=f"a column {column}, as split_by asks for",
            do="fill the column, or leave --set split_by out",
        )
    return str(value)


def _row_notes(name: str, tokens: Sequence[TokenRow], max_length: int) -> list[Note]:
    cut = [row.id for row in tokens if row.status is RowStatus.TRUNCATED]
    lost = [row.id for row in tokens if not row.status.usable]
    notes = []
    if cut:
        text = f"{len(cut)} rows of {name} were cut to {max_length} tokens, as the trainer would"
        notes.append(Note("truncated", text, len(cut), tuple(cut[:5])))
    if lost:
        counts = Counter(row.status.value for row in tokens if not row.status.usable)
        text = f"{len(lost)} rows of {name} were not measured: " + ", ".join(f"{n} {s}" for s, n in counts.items())
        notes.append(Note("unusable", text, len(lost), tuple(lost[:5])))
    return notes


def _shared_rows(sets: Sequence[RowSet]) -> list[Note]:
    """Rows that stand in two sets, by content: their figures are not independent."""
    notes = []
    hashes = [{content_hash(row.input_ids, row.trained): row.id for row in one.rows} for one in sets]
    for i, one in enumerate(sets):
        for j in range(i + 1, len(sets)):
            both = sorted(hashes[i].keys() & hashes[j].keys())
            if both:
                text = f"{len(both)} rows of {one.role} {one.name} also stand in {sets[j].role} {sets[j].name}"
                notes.append(Note("shared", text, len(both), tuple(hashes[i][h] for h in both[:5])))
    return notes
