"""What a fine-tuning run reads: the selected rows with their weights, general rows, and rows that must stay unseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsift.data.pool import Pool, read_pool
from gradsift.data.tokenize import MaskRule, mask_rule, tokenize_rows
from gradsift.errors import DataError, ModelError
from gradsift.manifest import NEXT_RECIPE, RECIPE, read_finished
from gradsift.models.load import load_tokenizer
from gradsift.models.resolve import Resolved, resolve_navigator
from gradsift.recipe import DataConfig, Recipe, SourceConfig, build_recipe, load_recipe
from gradsift.store.spec import content_hash
from gradsift.train.config import TrainConfig
from gradsift.types import Note, RowStatus, Shape, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Material:
    """Rows as the trained model's tokenizer sees them.

    Args:
        resolved: where the model is.
        tokenizer: its tokenizer.
        data: how rows were read.
        rule: which tokens carry loss.
        selected: rows that can be trained on, in the selection's order.
        weights: id -> weight; empty when the selection has none or all are 1.
        general: usable rows of the general files; their ids begin with ``general:``.
        anchors: the selecting run's anchors and target; read only where general rows or a hook ask for them.
        held_out: evaluation rows by file.
        notes: rows that cannot be trained on, truncated rows.
        inputs: role, path, sha256 and number of rows of every file.
    """

    resolved: Resolved
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    rule: MaskRule
    selected: tuple[TokenRow, ...]
    weights: Mapping[str, float]
    general: tuple[TokenRow, ...]
    anchors: Mapping[str, tuple[TokenRow, ...]]
    held_out: Mapping[str, tuple[TokenRow, ...]]
    notes: tuple[Note, ...]
    inputs: tuple[Mapping[str, Any], ...]

    @property
    def pad_id(self) -> int:
        """Padding token; it never carries loss, so any id will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0


@dataclass(frozen=True)
class Place:
    """Where a selection stands.

    Args:
        rows: the file of chosen rows.
        audit: ``audit.parquet`` beside it, or None.
        recipe: recipe of the run that made it, or None.
    """

    rows: Path
    audit: Path | None
    recipe: Recipe | None


def find_selection(path: Path) -> Place:
    """Find the chosen rows in a run folder, a selection folder or a file.

    Args:
        path: as given.

    Returns:
        The files.

    Raises:
        DataError: there is no selection, or it is that of a run that is not finished.
    """
    if path.is_file():
        return Place(path, None, None)
    for folder in (path / "selection", path):
        rows = folder / "selected.jsonl"
        if rows.is_file():
            audit, run, built = folder / "audit.parquet", folder.parent, None
            if any((run / name).is_file() for name in (RECIPE, NEXT_RECIPE)):
                read_finished(run)
                built = build_recipe(load_recipe(run / RECIPE))
            return Place(rows, audit if audit.is_file() else None, built)
    raise DataError(
        "there is no selection",
        where=f"--selection {path}",
        expected="a run folder of gradsift select, a folder with selected.jsonl, or a file of rows",
        do="run gradsift select first, or give the file",
    )


def read_material(config: TrainConfig, selection: Path) -> Material:
    """Read and tokenize everything that a run needs; no weights are loaded.

    Args:
        config: settings.
        selection: run folder, selection folder or file of rows.

    Returns:
        The rows.

    Raises:
        ModelError: the model cannot be found.
        DataError: no selected row can be trained on.
    """
    place = find_selection(selection)
    data = config.data or (place.recipe.data if place.recipe else DataConfig())
    try:
        resolved = resolve_navigator(config.model, config.revision)
        tokenizer = load_tokenizer(resolved)
    except ModelError as error:
        raise as_model(error) from None
    wanted = [("selected", "selected", (str(place.rows),))]
    wanted += [("general", "general", config.general)] if config.general else []
    wanted += [("held_out", path, (path,)) for path in config.held_out]
    if place.recipe is not None and (config.general or config.hook.name is not None):
        wanted += [("anchor", source.label, (source.path,)) for source in place.recipe.anchors]
        wanted += [("target", "target", (place.recipe.target,))] if place.recipe.target else []
    pools = [(role, name, _read(role, paths, data)) for role, name, paths in wanted]
    shapes: set[Shape] = {shape for _, _, pool in pools for shape in pool.shapes}
    rule = mask_rule(tokenizer, data.loss_on, shapes)
    tokens = {
        (role, name): tokenize_rows(pool.rows, tokenizer, rule, max_length=data.max_length)
        for role, name, pool in pools
    }
    usable = {key: tuple(row for row in rows if row.status.usable) for key, rows in tokens.items()}
    chosen = tokens["selected", "selected"]
    if not usable["selected", "selected"]:
        raise _nothing_usable(chosen, str(place.rows))
    general, again = _general(usable.get(("general", "general"), ()), usable["selected", "selected"])
    return Material(
        resolved=resolved,
        tokenizer=tokenizer,
        data=data,
        rule=rule,
        selected=usable["selected", "selected"],
        weights=_weights(place, chosen),
        general=general,
        anchors={name: rows for (role, name), rows in usable.items() if role in ("anchor", "target")},
        held_out={name: rows for (role, name), rows in usable.items() if role == "held_out"},
        notes=(*_notes(chosen, data.max_length), *again),
        inputs=tuple(
            {"role": role, "name": name, "path": file.path, "sha256": file.sha256, "num_rows": file.num_rows}
            for role, name, pool in pools
            for file in pool.files
        ),
    )


def _read(role: str, paths: Sequence[str], data: DataConfig) -> Pool:
    # What was selected is trained on as it stands; copies within general files would only be drawn twice.
    dedup = "keep" if role == "selected" else "drop"
    sources = [SourceConfig(label=f"rows{n}", path=path) for n, path in enumerate(paths)]
    return read_pool(sources, fmt=data.format, dedup=dedup)


def _general(rows: Sequence[TokenRow], selected: Sequence[TokenRow]) -> tuple[tuple[TokenRow, ...], tuple[Note, ...]]:
    """General rows under names of their own (files often number their rows alike), without those that are selected."""
    known = {content_hash(row.input_ids, row.trained) for row in selected}
    fresh = [row for row in rows if content_hash(row.input_ids, row.trained) not in known]
    named = tuple(replace(row, id=f"general:{row.id}") for row in fresh)
    if len(fresh) == len(rows):
        return named, ()
    count = len(rows) - len(fresh)
    return named, (Note("general_selected", f"{count} general rows are selected anyway and are not drawn", count),)


def _weights(place: Place, chosen: Sequence[TokenRow]) -> dict[str, float]:
    """Weights of the audit table, matched by place: an id that was made by hashing may differ for copies."""
    if place.audit is None:
        return {}
    import pyarrow.parquet as pq

    table = pq.read_table(place.audit, columns=["selected", "order", "weight"]).to_pylist()
    kept = sorted((row for row in table if row["selected"]), key=lambda row: row["order"])
    if len(kept) != len(chosen):
        raise DataError(
            "the selected rows and the audit table do not match",
            where=str(place.rows),
            got=f"{len(chosen)} rows",
            expected=f"{len(kept)} rows selected in {place.audit}",
            do="run gradsift select again, or give the file itself to --selection",
        )
    weights = {row.id: float(entry["weight"]) for row, entry in zip(chosen, kept, strict=True)}
    return {} if set(weights.values()) == {1.0} else weights


def _notes(rows: Sequence[TokenRow], max_length: int) -> tuple[Note, ...]:
    notes = []
    bad = [row for row in rows if not row.status.usable]
    if bad:
        text = f"{len(bad)} selected rows cannot be trained on with this tokenizer; the first: {bad[0].reason}"
        notes.append(Note("unusable", text, len(bad), tuple(row.id for row in bad[:5])))
    cut = [row for row in rows if row.status is RowStatus.TRUNCATED]
    if cut:
        text = f"{len(cut)} selected rows were cut to {max_length} tokens"
        notes.append(Note("truncated", text, len(cut), tuple(row.id for row in cut[:5])))
    return tuple(notes)


def _nothing_usable(rows: Sequence[TokenRow], path: str) -> DataError:
    first = next((row.reason for row in rows if row.reason), "no rows at all")
    return DataError(
        "no selected row can be trained on", where=path, got=f"{len(rows)} rows; first reason: {first}",
        do="check data.format and data.loss_on; gradsift inspect FILE --row 0 shows how a row is read",
    )  # fmt: skip


def as_model(error: ModelError) -> ModelError:
    """Let an error of the loader, which speaks of the navigator, speak of the model that is trained.

    Args:
        error: what the loader raised.

    Returns:
        The same with other words.
    """
    words = (("--navigator", "--model"), ("navigator's ", "model's "), ("navigator.", ""), ("navigator", "model"))
    texts = [error.what, error.where, error.expected, error.do]
    for old, new in words:
        texts = [text.replace(old, new) for text in texts]
    return ModelError(texts[0], where=texts[1], got=error.got, expected=texts[2], do=texts[3])
