"""Transfer audit: the cosines of some rows of a finished run, measured again on the model that will be trained (ogs.md 3.6)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gradsift.errors import ConfigError, DataError, ModelError, SpecError
from gradsift.geometry.similarity import cosines
from gradsift.geometry.transfer import Transfer, transfer
from gradsift.manifest import (
    MANIFEST,
    RECIPE,
    git_sha,
    hash_parts,
    make_folder,
    read_finished,
    versions,
    write_json_atomic,
)
from gradsift.methods import make_method
from gradsift.pipeline.measure import Measurement, measure
from gradsift.pipeline.prepare import Prepared, prepare, refuse_changed
from gradsift.pipeline.progress import Clock, Progress, Silent
from gradsift.recipe import Recipe, apply_overrides, build_recipe, load_recipe
from gradsift.seeds import stream
from gradsift.store.signals import SignalStore, open_store
from gradsift.types import TokenRow

FORMAT = 1
FILE = "transfer.json"
LEAST_ROWS = 10
OPEN = ("navigator.", "collect.")  # the rest of the recipe is what the two models must have in common


@dataclass(frozen=True)
class TransferConfig:
    """What is measured again.

    Args:
        model: the model that will be trained: auto, hub id, folder or GGUF file.
        rows: how many rows, drawn by id among those that both models can use.
        settings: dotted fields under ``navigator`` or ``collect`` that differ for this model, such as
            ``navigator.lora.rank`` or ``navigator.dtype``.
    """

    model: str
    rows: int = 256
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Audited:
    """What an audit left.

    Args:
        found: one entry per direction, anchors first.
        report: content of the file.
        path: the file.
    """

    found: tuple[Transfer, ...]
    report: Mapping[str, Any]
    path: Path


@dataclass(frozen=True)
class _Run:
    """A finished run of ``gradsift select``."""

    folder: Path
    recipe: Recipe
    manifest: Mapping[str, Any]
    store: SignalStore

    @property
    def names(self) -> tuple[str, ...]:
        """Directions, anchors first."""
        return tuple(entry["name"] for entry in self.manifest["directions"])


def audit_transfer(
    run: Path, config: TransferConfig, *, command: str = "audit_transfer(...)", progress: Progress | None = None
) -> Audited:
    """Measure drawn rows on the target model and compare with what the navigator measured; the same call resumes.

    Args:
        run: folder of a finished ``gradsift select`` whose method measured gradients.
        config: model, rows and settings.
        command: what a person would type to get the same.
        progress: who is told; nobody by default.

    Returns:
        The comparison; ``RUN/transfer.json`` is written.

    Raises:
        ModelError: the model cannot be found or loaded, or does not fit its tokenizer.
        SpecError: these rows were measured before with other weights under the same name.
    """
    from gradsift.train.material import as_model

    clock, before = Clock(progress or Silent()), _read_run(run)
    recipe = _target_recipe(before.recipe, config)
    try:
        prepared = _prepare(before.recipe, recipe, clock)
        refuse_changed(prepared, before.manifest)
        rows, num_common = _draw(before, prepared, config.rows)
        place = run / "transfer" / _key(config, rows)
        make_folder(place)
        measured = measure(_only(prepared, rows, len(before.store.ids)), place, clock)
    except ModelError as error:
        raise as_model(error) from None
    except SpecError as error:
        raise SpecError("these rows were measured on other weights under this name", where=error.where, got=error.got,
                        expected="the same model as before", do=f"delete {run / 'transfer'}") from None  # fmt: skip
    with clock.stage("compare"):
        ids, here, there = _cosines(before, measured, rows)
        k = _top(before.manifest, len(ids))
        found = transfer(here, there, before.names, k, stream(before.recipe.seed, "transfer"))
    counts = {"asked": config.rows, "usable_on_both": num_common, "drawn": len(rows), "compared": len(ids), "k": k}
    report = _report(before, prepared, measured, found, counts, config, clock)
    write_json_atomic(run / FILE, {**report, "command": command})
    return Audited(found, {**report, "command": command}, run / FILE)


def _read_run(run: Path) -> _Run:
    if not (run / MANIFEST).is_file() or not (run / RECIPE).is_file():
        raise DataError("this is not a finished run", where=str(run), expected="a run folder of gradsift select",
                        do="run gradsift select first; the same command finishes a stopped run")  # fmt: skip
    manifest = read_finished(run)
    if not manifest.get("directions"):
        raise ConfigError(
            "this run measured no cosines, so there is nothing to compare", where=str(run),
            got=f"method {manifest['selection']['method']}", expected="gradients, and an anchor or a target",
            do="select with a method that measures gradients, or with --set collect.signals=all, into another --out",
        )  # fmt: skip
    store = open_store(run / "signals" / manifest["spec_key"])
    return _Run(run, build_recipe(load_recipe(run / RECIPE)), manifest, store)


def _target_recipe(recipe: Recipe, config: TransferConfig) -> Recipe:
    """Put the target model in the navigator's place; data, anchors, target, adapter settings and seed stay."""
    if config.rows < LEAST_ROWS:
        raise ConfigError("too few rows for a rank correlation", where="--rows", got=config.rows,
                          expected=f"at least {LEAST_ROWS}; 256 gives an interval of about 0.1 each way")  # fmt: skip
    for key, _ in config.settings:
        if not key.startswith(OPEN):
            raise ConfigError("this setting must be the same on both models", where=f"--set {key}",
                              expected="a field under navigator or collect")  # fmt: skip
    values = recipe.model_dump(mode="json")
    changes = [("navigator.model", config.model), ("navigator.revision", None), ("collect.signals", "auto")]
    return build_recipe(apply_overrides(values, [*changes, *config.settings]))


def _prepare(before: Recipe, recipe: Recipe, clock: Clock) -> Prepared:
    """Read the run's rows for the target model; the directions are made of the same rows as then, by id."""
    method = make_method(before.method.name, before.method.settings)
    prepared = prepare(recipe, method, clock)
    if method.needs.rollouts:  # such a method holds rows out by their tokens, and tokenizers differ
        prepared = _same_anchor_rows(prepared, prepare(before, method, clock))
    # The cheapest method that measures gradients: the pass needs none of the run's other signals.
    return dataclasses.replace(prepared, method=make_method("norm", {}))


def _same_anchor_rows(prepared: Prepared, before: Prepared) -> Prepared:
    used = {source.name: {row.id for row in source.tokens} for source in before.directions}
    held = {source.name: source.tokens for source in prepared.dev}
    sources = [
        dataclasses.replace(
            source, tokens=tuple(r for r in (*source.tokens, *held.get(source.name, ())) if r.id in used[source.name])
        )
        for source in prepared.directions
    ]
    num_anchors = len(prepared.anchors)
    target = sources[num_anchors] if prepared.target is not None else None
    return dataclasses.replace(prepared, anchors=tuple(sources[:num_anchors]), target=target, dev=())


def _draw(run: _Run, prepared: Prepared, count: int) -> tuple[tuple[TokenRow, ...], int]:
    """Draw rows by id among those that the navigator measured and the target model's tokenizer leaves usable."""
    measured = {i for i, status in zip(run.store.ids, run.store.status, strict=True) if status.usable}
    common = [row for row in prepared.pool.usable if row.id in measured]
    if len(common) < LEAST_ROWS:
        raise DataError(
            "too few rows can be used on both models", where="the pool", got=f"{len(common)} rows",
            expected=f"at least {LEAST_ROWS}", do="select from a larger pool",
        )  # fmt: skip
    draws = stream(run.recipe.seed, "transfer/rows").uniform([row.id for row in common])
    order = sorted(range(len(common)), key=lambda i: (draws[i], common[i].id))[:count]
    return tuple(sorted((common[i] for i in order), key=lambda row: row.id)), len(common)


def _only(prepared: Prepared, rows: Sequence[TokenRow], num_measured: int) -> Prepared:
    """Let the pass see the drawn rows alone, and warm the adapter on as many rows as the navigator's, if there are."""
    recipe, lora = prepared.recipe, prepared.recipe.navigator.lora
    if lora.warmup_share > 0:
        share = min(1.0, math.ceil(lora.warmup_share * num_measured) / len(rows))
        recipe = build_recipe(apply_overrides(recipe.model_dump(mode="json"), [("navigator.lora.warmup_share", share)]))
    return dataclasses.replace(prepared, recipe=recipe, pool=dataclasses.replace(prepared.pool, tokens=tuple(rows)))


def _key(config: TransferConfig, rows: Sequence[TokenRow]) -> str:
    parts = [config.model, json.dumps(config.settings, sort_keys=True), *(row.id for row in rows)]
    return hash_parts((part.encode("utf-8", "surrogatepass") for part in parts), digest_size=8)


def _cosines(
    run: _Run, measured: Measurement, rows: Sequence[TokenRow]
) -> tuple[list[str], Float[np.ndarray, "n A"], Float[np.ndarray, "n A"]]:
    """Cosines of the rows that have a gradient on both models."""
    there = measured.store.take([row.id for row in rows])
    ids = [i for i, status in zip(there.ids, there.status, strict=True) if status.usable]
    if len(ids) < LEAST_ROWS:
        raise DataError(
            "too few rows have a gradient on the target model", where="the drawn rows", got=f"{len(ids)} of {len(rows)}",
            expected=f"at least {LEAST_ROWS}", do="run gradsift doctor on the model; try --set navigator.dtype=float32",
        )  # fmt: skip
    pair = [store.take(ids) for store in (run.store, there)]
    here, target = (cosines(store.dots(run.names), store.grad_norm) for store in pair)
    return ids, here, target


def _top(manifest: Mapping[str, Any], n: int) -> int:
    """As large a share of the compared rows as the run chose of the usable ones."""
    share = manifest["selection"]["num_rows"] / max(manifest["rows"]["usable"], 1)
    return min(n, max(1, round(share * n)))


def _report(
    run: _Run,
    prepared: Prepared,
    measured: Measurement,
    found: Sequence[Transfer],
    counts: Mapping[str, int],
    config: TransferConfig,
    clock: Clock,
) -> dict[str, Any]:
    model, before = measured.navigator, run.manifest["navigator"]
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_sha": git_sha(Path(__file__).parent),
        "navigator": {name: before[name] for name in ("name", "architecture", "model_sha256", "tokenizer_sha256")},
        "model": {
            "name": config.model, "architecture": model.architecture, "model_sha256": model.model_sha256,
            "tokenizer_sha256": model.tokenizer_sha256, "num_parameters": measured.parameters.numel,
            "dtype": model.dtype, "device": model.device,
        },
        "settings": dict(config.settings),
        "rows": dict(counts),
        "anchors": [_entry(entry) for entry in found],
        "warns": any(entry.warns for entry in found),
        "notes": [*_notes(run, prepared, measured, counts, clock), *(n.text for n in measured.notes)],
        "cost": {
            "seconds": {name: round(s, 3) for name, s in clock.seconds.items()}, "tokens": dict(clock.tokens),
            "total": {"seconds": round(sum(clock.seconds.values()), 3), "tokens": sum(clock.tokens.values())},
        },
    }  # fmt: skip


def _entry(found: Transfer) -> dict[str, Any]:
    values = {name: dataclasses.asdict(getattr(found, name)) for name in ("spearman", "signs", "overlap")}
    clean = {name: {k: v if math.isfinite(v) else None for k, v in each.items()} for name, each in values.items()}
    return {"name": found.name, **clean, "by_chance": found.by_chance, "k": found.k, "num_rows": found.num_rows,
            "warns": found.warns, "sentence": found.sentence}  # fmt: skip


def _notes(run: _Run, prepared: Prepared, measured: Measurement, counts: Mapping[str, int], clock: Clock) -> list[str]:
    before, model, notes = run.manifest["navigator"], measured.navigator, []
    if counts["drawn"] < counts["asked"]:
        notes.append(f"only {counts['drawn']} rows can be used on both models; all of them were measured")
    lost = counts["drawn"] - counts["compared"]
    if lost:
        notes.append(f"{lost} drawn rows have no gradient on the target model and are not compared")
    then = {entry["name"]: entry["num_rows"] for entry in run.manifest["directions"]}
    notes += [f"{d.name} is made of {d.num_rows} rows here and of {then[d.name]} on the navigator"
              for d in measured.directions if d.num_rows != then[d.name]]  # fmt: skip
    if model.architecture != before["architecture"]:
        notes.append(f"the navigator is a {before['architecture']}, the target model a {model.architecture}: "
                     "another family, for which nothing is claimed")  # fmt: skip
    if model.tokenizer_sha256 != before["tokenizer_sha256"]:
        notes.append("the models have different tokenizers: the same rows are other tokens, and may be cut elsewhere")
    if prepared.rule.template_sha256 != run.manifest["data"]["template_sha256"]:
        notes.append("the models have different chat templates: rows stand between other words, and part of any "
                     "difference may come from there")  # fmt: skip
    if not clock.tokens.get("collect"):
        notes.append("an earlier call measured these rows; the cost is that of this call alone")
    return notes
