"""Active anchors (opt-in): only the anchor rows that the target's gradient opposes most give the directions.

Source: ogs.md 2.12 and 6; the choice itself is :func:`gradsift.geometry.active.active_rows`. One more pass over the anchors
finds the rows, once per run folder; the rows that were chosen are part of what the store's numbers mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradsift.errors import ConfigError
from gradsift.geometry.active import active_rows
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.directions import attach, build_direction
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.manifest import hash_parts, make_folder, write_json_atomic
from gradsift.models.adapter import adapter_sha256
from gradsift.models.load import Navigator
from gradsift.pipeline.prepare import Prepared, Source
from gradsift.pipeline.progress import Clock
from gradsift.types import Note

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Activated:
    """The inputs with the rows that are to give directions.

    Args:
        prepared: the run's inputs; anchors hold the chosen rows only.
        notes: what was left out.
    """

    prepared: Prepared
    notes: tuple[Note, ...] = ()


def activate(
    prepared: Prepared,
    navigator: Navigator,
    model: nn.Module,
    names: Sequence[str],
    out: Path,
    clock: Clock,
    first_layer: int | None = None,
) -> Activated:
    """Keep the rows of every anchor that oppose the target most, where the recipe asks for it.

    Args:
        prepared: the run's inputs.
        navigator: the model as loaded.
        model: the same, with its adapter.
        names: parameters that gradients are taken over; empty where none are.
        out: the run folder.
        clock: timing and progress.
        first_layer: where the backward stops; None for the embedding.

    Returns:
        The inputs to go on with; the same ones where nothing is asked for or no gradient is measured.

    Raises:
        ConfigError: an anchor has fewer than two rows with a gradient.
    """
    count, target = prepared.recipe.active_anchors, prepared.target
    if count is None or target is None or not names or not prepared.anchors:  # earlier checkpoints measure no anchor
        return Activated(prepared)
    place = out / "active"
    parts = [navigator.model_sha256, adapter_sha256(model) or "", *sorted(names), str(count), target.digest]
    parts += [] if prepared.recipe.collect.positions == "all" else [prepared.recipe.collect.positions]
    parts += [f"{s.name} {s.digest}" for s in prepared.anchors]
    parts += [f"{s.name} {row}" for s in prepared.anchors for row in sorted(row.id for row in s.usable)]  # kept by id
    key = hash_parts(part.encode("utf-8", "surrogatepass") for part in (*parts, prepared.recipe.navigator.dtype))
    path = place / f"{key}.json"
    if path.is_file():
        chosen = json.loads(path.read_text("utf-8"))
    else:
        chosen = _choose(prepared, model, names, count, clock, first_layer)
        make_folder(place)
        write_json_atomic(path, chosen)
    anchors = tuple(_only(source, set(chosen[source.name]["kept"])) for source in prepared.anchors)
    notes = tuple(_note(source, chosen[source.name], count) for source in prepared.anchors)
    return Activated(replace(prepared, anchors=anchors), notes)


def _choose(
    prepared: Prepared, model: nn.Module, names: Sequence[str], count: int, clock: Clock, first_layer: int | None
) -> dict[str, dict[str, list[str]]]:
    """Measure every anchor row's cosine with the target; ids that are kept and that have no gradient, per anchor."""
    collect, seed, target = prepared.recipe.collect, prepared.recipe.seed, prepared.target
    assert target is not None
    rows = [row for source in prepared.anchors for row in sorted(source.usable, key=lambda row: row.id)]
    label = [source.name for source in prepared.anchors for _ in source.usable]
    with clock.stage("active", sum(row.num_tokens for row in (*target.usable, *rows))):

        def tick(n: int, tokens: int) -> None:
            clock.tick("active", n, tokens)

        built = build_direction(
            target.name, model, names, target.usable, Projector(seed, collect.sketch_dim),
            tokens_per_batch=collect.tokens_per_batch, pad_id=prepared.pad_id, tick=tick, first_layer=first_layer,
            trained_only=collect.positions == "trained",
        )  # fmt: skip
        engine = GradientEngine(model, names, first_layer=first_layer, trained_only=collect.positions == "trained")
        attach(engine, [built])
        order = sorted(range(len(rows)), key=lambda i: (rows[i].num_tokens, rows[i].id))
        with engine:
            run = Pass(engine, (built.name,), collect.tokens_per_batch, prepared.pad_id, tick=tick)
            got = measure_shard(run, [rows[i] for i in order])
    usable = np.array([status.usable for status in got.status])
    at, lost = np.array(order)[usable], np.array(order)[~usable]
    norm = got.grad_norm[usable]
    back = np.argsort(at)  # id order within each source, which decides between equals
    at, norm, cos = at[back], norm[back], (got.dots[usable, 0] / norm)[back]
    kept = at[active_rows(cos, [label[i] for i in at], norm, count)]
    out = {source.name: {"kept": [], "no_gradient": []} for source in prepared.anchors}
    for what, some in (("kept", kept), ("no_gradient", lost)):
        for i in some.tolist():
            out[label[i]][what].append(rows[i].id)
    for name, found in out.items():
        if len(found["kept"]) < 2:
            raise ConfigError(
                f"anchor {name} has too few rows with a gradient", where="active_anchors",
                got=f"{len(found['kept'])} of {label.count(name)}", expected="at least 2",
                do="give more anchor rows, or leave active_anchors out",
            )  # fmt: skip
    return out


def _only(source: Source, kept: set[str]) -> Source:
    return replace(source, tokens=tuple(row for row in source.tokens if row.id in kept or not row.status.usable))


def _note(source: Source, found: dict[str, list[str]], count: int) -> Note:
    lost = len(found["no_gradient"])
    text = (
        f"{source.name} is an active anchor: its direction rests on the {len(found['kept'])} of {len(source.usable)} rows "
        f"that oppose the target most (asked {count}{f', {lost} have no gradient' if lost else ''}); its cosine with the "
        "target is lower than that of all its rows by construction"
    )
    return Note("active_anchor", text, len(found["kept"]), tuple(found["kept"][:5]))
