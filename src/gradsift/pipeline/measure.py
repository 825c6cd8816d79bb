"""From tokens to signals: load the navigator, build the directions, walk the pool once."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from gradsift.data.token_rows import TokenRows, among
from gradsift.errors import ConfigError, DataError, ModelError
from gradsift.geometry.anchors import split_half
from gradsift.geometry.checkpoints import Warmup
from gradsift.gradients.collect import (
    Pass,
    measure_shard,
    refuse_if_mostly_bad,
    unmeasured,
)
from gradsift.gradients.directions import (
    BuiltDirection,
    attach,
    build_direction,
    gram,
    load_direction,
    save_direction,
    sketch_directions,
)
from gradsift.gradients.folded import fold_directions, keep_parts
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.gradients.upper import Upper, choose_upper
from gradsift.launch.bench import Bench
from gradsift.launch.flight import Flight, Watchdog, flying, forget, gather
from gradsift.manifest import hash_parts, make_folder, versions
from gradsift.models.adapter import attach_lora
from gradsift.models.load import Navigator, load_navigator
from gradsift.models.parameters import Coverage, Parameters, choose_parameters
from gradsift.pipeline.active import activate
from gradsift.pipeline.asked import covered_by, engine_spec, folds, held_note, spec_of, wants_edges, wants_gradients
from gradsift.pipeline.embedding import embed_target, wants_embedding
from gradsift.pipeline.forward import told_apart, wanted_extras
from gradsift.pipeline.fsdp import load_shared
from gradsift.pipeline.noise import noise_of
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.progress import Clock
from gradsift.pipeline.warm import (
    At,
    bend_engine,
    direction_noise,
    enter_checkpoint,
    spec_at,
    target_sketches,
    train_navigator,
)
from gradsift.seeds import stream
from gradsift.store.room import refuse_if_it_does_not_fit
from gradsift.store.signals import SignalStore, open_store
from gradsift.store.spec import GradientSpec, store_folder
from gradsift.store.staging import STAGING, adopt_staged
from gradsift.store.writer import SignalWriter, open_writer
from gradsift.types import Direction, Noise, Note, RowStatus, TokenRow

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Measurement:
    """What the pass left behind.

    Args:
        navigator: the model that measured.
        parameters: the weights that count.
        coverage: share of them that the signals see.
        spec: what the numbers mean.
        store: the signals.
        directions: facts of the anchors, then the target.
        gram: float64 [K, K] inner products of the unit directions, in that order.
        noise: measured numerical bounds.
        notes: remarks for the report.
        target_embedding: float32 [n_t, d] embeddings of the target's rows in id order, or None.
        direction_sketch: float32 [K, D] sketches of the unit directions, or None without gradients.
        target_sketch: float32 [n_t, D] sketches of the target rows' gradients in id order; None unless rows' directions are
            kept.
        direction_noise: bound on a cosine of two unit sketches, where rows' directions are kept.
        checkpoints: passes at the checkpoints of a warm-up (:mod:`gradsift.pipeline.checkpoints`).
        warmup: facts of the training before, or None.
        launch: which processes measured and what became of their units; None for one process alone.
    """

    navigator: Navigator
    parameters: Parameters
    coverage: Coverage
    spec: GradientSpec
    store: SignalStore
    directions: tuple[Direction, ...]
    gram: Float[np.ndarray, "K K"]
    noise: Noise
    notes: tuple[Note, ...]
    target_embedding: Float[np.ndarray, "n_t d"] | None = None
    direction_sketch: Float[np.ndarray, "K D"] | None = None
    target_sketch: Float[np.ndarray, "n_t D"] | None = None
    direction_noise: float = 0.0
    checkpoints: tuple[Any, ...] = ()
    warmup: Mapping[str, Any] | None = None
    launch: Mapping[str, Any] | None = None


def measured_rows(prepared: Prepared) -> Sequence[TokenRow]:
    """Give the pool rows that are measured: usable ones, the first of each set of exact copies.

    Args:
        prepared: the run's inputs.

    Returns:
        Token rows in input order.
    """
    first, index, rows = prepared.pool.pool.columns.first, prepared.pool.pool.index, prepared.pool.usable
    if isinstance(rows, TokenRows):
        return rows.take(rows.at[first[rows.at] < 0])
    return tuple(row for row in rows if first[index[row.id]] < 0)


@dataclass(frozen=True)
class Part:
    """Which rows a pass measures, and where it keeps them.

    Args:
        signals: folder of the store in the run folder; a checkpoint's goes before it.
        ids: the rows; None for all.
    """

    signals: str = "signals"
    ids: frozenset[str] | None = None


WHOLE = Part()
LOOKED_UP = 1 << 14  # rows that the store is asked about at a time


def measure(prepared: Prepared, out: Path, clock: Clock, at: At | None = None, *, part: Part = WHOLE) -> Measurement:
    """Measure every usable pool row, resuming what an earlier run committed.

    Args:
        prepared: the run's inputs.
        out: the run folder.
        clock: timing and progress.
        at: the checkpoint of a warm-up, and what is kept of every row there; None for the navigator as it is.
        part: which rows, and where they are kept.

    Returns:
        The signals and what is known of the directions.

    Raises:
        DataError: rows that were measured earlier are no longer in the pool.
    """
    recipe, gradients = prepared.recipe, wants_gradients(prepared, out)
    notes: list[Note] = []
    signals = part.signals if at is None else at.signals
    navigator, (model, parameters, upper, remarks) = _load(
        prepared, signals, lambda navigator: _entered(prepared, navigator, at, gradients, out, clock), clock
    )
    notes += [*navigator.notes, *remarks]
    rows = measured_rows(prepared)
    names = () if not gradients else parameters.names if upper is None else upper.parameters.names
    first_layer = None if upper is None else upper.first
    active = activate(prepared, navigator, model, names, out, clock, first_layer)
    prepared, notes = active.prepared, [*notes, *active.notes]
    projector = Projector(recipe.seed, recipe.collect.sketch_dim) if gradients else None
    embeds = wants_embedding(prepared, out)
    trained_only = gradients and recipe.collect.positions == "trained"
    engine = GradientEngine(
        model,
        names,
        projector=projector,
        embedding=embeds,
        edges=wants_edges(prepared, out),
        first_layer=first_layer,
        trained_only=trained_only,
    )
    covered, remarks = covered_by(parameters, upper, tuple(engine.blocks) if gradients else parameters.names)
    notes += [*remarks, *(held_note(rows) if trained_only else [])]
    if gradients and engine.road != "tiles":
        notes.append(Note("engine", f"gradients were measured with {engine.description}"))
    extras = wanted_extras(prepared, model, out)
    folded, remarks = folds(prepared, engine, trained_only and at is None)
    notes += remarks
    if folded:
        extras = dataclasses.replace(extras, parts=keep_parts(engine) * (len(prepared.directions) + 1))
    prepared, rows = told_apart(prepared, extras, rows)
    if part.ids is not None:
        rows = among(rows, part.ids)
    more = (*(["embedding"] if embeds else []), *extras.names, *(engine.edge_norms if gradients else ()))
    spec = spec_of(prepared, navigator, model, parameters if upper is None else upper, gradients, more)
    spec = engine_spec(spec if at is None else spec_at(spec, at), engine, folded)
    folder = store_folder(out / signals, spec)
    built = _directions(prepared, model, engine, folder, clock, embeds) if gradients else []
    attach(engine, built)
    if folded:
        fold_directions(engine)
    if at is not None:
        bend_engine(engine, at)
    run = Pass(
        engine,
        tuple(d.name for d in built),
        recipe.collect.tokens_per_batch,
        prepared.pad_id,
        gradients,
        lambda n, tokens: clock.tick("collect", n, tokens),
        extras,
    )
    target_embedding = embed_target(prepared, run, built, folder, clock) if embeds else None
    _collect(prepared, run, rows, folder, spec, clock)
    store = open_store(folder, spec)
    notes += _set_aside_note(store)
    with clock.stage("noise"):
        quiet = dataclasses.replace(run, tick=lambda n, tokens: clock.tick("noise", n, tokens))
        noise = noise_of(quiet, rows, store, folder, recipe.seed)
    facts = tuple(_facts(d, prepared, recipe.seed) for d in built)
    notes += _reliability_notes(facts)
    return Measurement(
        navigator,
        parameters,
        covered,
        spec,
        store,
        facts,
        gram(built) if built else np.zeros((0, 0)),
        noise,
        tuple(notes),
        target_embedding,
        sketch_directions(built) if built else None,
        *_directions_kept(prepared, at, run, rows, built, store, folder),
    )


_Entered = tuple["nn.Module", Parameters, Upper | None, list[Note]]


def _load(
    prepared: Prepared, signals: str, enter: Callable[[Navigator], _Entered], clock: Clock
) -> tuple[Navigator, _Entered]:
    """Load the navigator and choose what is measured of it, together with the other ranks where they share it."""
    wanted, lockstep = prepared.recipe.navigator, prepared.launch.lockstep

    def load(device: str) -> Navigator:
        with clock.stage("load"):
            navigator = load_navigator(prepared.resolved, dtype=wanted.dtype, device=device)
            _check_fit(prepared, navigator)
            return navigator

    def wait() -> None:
        # A worker goes on when rank 0 has made the adapter, the anchors' rows and the directions, and reads them back.
        prepared.launch.wait_open(signals, lambda n, tokens: clock.tick("wait", n, tokens))

    if lockstep is not None:
        found = load_shared(lockstep, load, enter)
        wait()
        return found
    navigator = load(wanted.device)
    wait()
    return navigator, enter(navigator)


def _entered(
    prepared: Prepared, navigator: Navigator, at: At | None, gradients: bool, out: Path, clock: Clock
) -> _Entered:
    """Put the adapter on, and choose the parameters and layers that are measured."""
    recipe, remarks = prepared.recipe, list[Note]()
    model: Any = navigator.model
    if at is not None and at.checkpoint is not None:
        with clock.stage("adapter"):
            model, remarks = enter_checkpoint(prepared, navigator, at.checkpoint)
    elif recipe.navigator.parameters == "lora" and gradients:
        with clock.stage("adapter"):
            model, remarks = with_adapter(prepared, navigator, measured_rows(prepared), out, clock)
    parameters = choose_parameters(model, recipe.navigator.parameters if gradients else "all")
    upper = choose_upper(model, parameters, recipe.collect.layers) if gradients and recipe.collect.layers else None
    return model, parameters, upper, list(remarks)


def _directions_kept(
    prepared: Prepared,
    at: At | None,
    run: Pass,
    rows: Sequence[TokenRow],
    built: Sequence[BuiltDirection],
    store: SignalStore,
    folder: Path,
) -> tuple[Float[np.ndarray, "n_t D"] | None, float]:
    """The target rows' gradients and the bound on cosines with a row's direction, where directions are kept."""
    if at is None or at.form == "none":
        return None, 0.0
    return target_sketches(built, prepared), direction_noise(run, rows, store, folder, prepared.recipe.seed)


def _check_fit(prepared: Prepared, navigator: Navigator) -> None:
    """Refuse tokens that the model cannot take, before any is measured."""
    table = navigator.model.get_input_embeddings().get_parameter("weight").shape[0]
    longest = getattr(navigator.model.config, "max_position_embeddings", None)
    for source in (prepared.pool, *prepared.directions):
        for row in source.usable:
            if row.top_id >= table:
                raise ModelError(
                    "the tokenizer makes ids that the model has no embedding for",
                    where=f"row {row.id} of {source.name}",
                    got=f"id {row.top_id}",
                    expected=f"below {table}",
                    do="use the tokenizer that belongs to the model; gradsift doctor checks this",
                )
            if longest is not None and row.num_tokens > longest:
                raise ConfigError(
                    "a row is longer than the model's positions",
                    where=f"row {row.id} of {source.name}; data.max_length",
                    got=f"{row.num_tokens} tokens",
                    expected=f"at most {longest}",
                    do=f"--set data.max_length={longest}",
                )


def with_adapter(
    prepared: Prepared, navigator: Navigator, rows: Sequence[TokenRow], out: Path, clock: Clock
) -> tuple[Any, list[Note]]:
    """Put the run's adapter on a navigator: seeded, and warmed up where the recipe says so (once, then read back).

    Args:
        prepared: the run's inputs.
        navigator: a model without adapter; changed in place.
        rows: the rows that are measured.
        out: the run folder.
        clock: timing and progress.

    Returns:
        The model with its adapter, and remarks.
    """
    lora, seed = prepared.recipe.navigator.lora, prepared.recipe.seed
    if lora.warmup_share == 0:
        text = (
            "the adapter starts at B = 0, so only the gradients of B carry signal (those of A are exactly zero); "
            "--set navigator.lora.warmup_share=0.05 trains it on a share of the pool first"
        )
        return attach_lora(navigator.model, lora, seed), [Note("lora_at_start", text)]
    model = attach_lora(navigator.model, lora, seed)
    warmed = train_navigator(
        prepared, navigator, model, rows, Warmup(lora.warmup_share), out, clock, lr=lora.warmup_lr, stage="adapter"
    )
    text = f"the adapter was trained on {warmed.num_rows} pool rows before measuring"
    return model, [Note("lora_warmed", text, warmed.num_rows)]


def _directions(
    prepared: Prepared, model: nn.Module, engine: GradientEngine, folder: Path, clock: Clock, embeds: bool
) -> list[BuiltDirection]:
    recipe = prepared.recipe
    projector = Projector(recipe.seed, recipe.collect.sketch_dim)
    device = next(model.parameters()).device
    place = folder / "directions"
    make_folder(folder)
    make_folder(place)
    built = []
    flight, dog = Flight(place), Watchdog(recipe.collect.hang_seconds)

    def noted(rows: Sequence[TokenRow]) -> None:
        flight.write(rows)
        dog.pet()

    _tell_deaths(place, prepared, clock)
    with clock.stage("anchors", sum(r.num_tokens for s in prepared.directions for r in s.usable)), flying(flight), dog:
        for source in prepared.directions:
            digest = hash_parts([source.name.encode(), source.digest.encode()])
            found = load_direction(source.name, place, digest, device)
            if found is None:
                found = build_direction(
                    source.name,
                    model,
                    tuple(engine.blocks),
                    source.usable,
                    projector,
                    tokens_per_batch=recipe.collect.tokens_per_batch,
                    pad_id=prepared.pad_id,
                    tick=lambda n, tokens: clock.tick("anchors", n, tokens),
                    before=noted,
                    embedding=embeds and source is prepared.target,
                    first_layer=engine.first_layer,
                    trained_only=engine.trained_only,
                )
                save_direction(found, place, digest)
            built.append(found)
    forget(place)
    return built


def _tell_deaths(place: Path, prepared: Prepared, clock: Clock) -> None:
    """Name the rows of anchors and target over which earlier processes died: a direction cannot do without its rows."""
    deaths: Counter[frozenset[str]] = Counter(fall.rows for fall in gather(place, frozenset()))
    for rows, count in deaths.most_common(3):
        names = [source.name for source in prepared.directions if rows & {row.id for row in source.usable}]
        some = ", ".join(sorted(rows)[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        died = "an earlier process" if count == 1 else f"{count} earlier processes"
        clock.progress.say(
            f"{died} died while measuring these rows of {', '.join(names) or 'an anchor'}: {some}; if this one does too, look at "
            "them with gradsift inspect and take the one that kills out of the file"
        )


def _collect(
    prepared: Prepared, run: Pass, rows: Sequence[TokenRow], folder: Path, spec: GradientSpec, clock: Clock
) -> None:
    recipe = prepared.recipe
    made_by = {**versions(), "device": str(next(run.engine.model.parameters()).device)}
    flight, dog = Flight(folder), Watchdog(recipe.collect.hang_seconds)

    def noted(rows: Sequence[TokenRow]) -> None:
        flight.write(rows)
        dog.pet()

    run = dataclasses.replace(run, before=noted)
    bench = Bench(
        folder.parent.name, folder, spec, rows, recipe.collect.rows_per_shard,
        lambda some: measure_shard(run, some), run.tick, made_by,
        lambda some, why: unmeasured(run, some, RowStatus.WORKER_CRASH, why), flight, dog,
    )  # fmt: skip
    if not prepared.launch.commits:
        with run.engine:
            prepared.launch.serve(bench)
        return
    with open_writer(folder, spec, made_by=made_by) as writer, run.engine:
        _adopt_left(bench, writer, clock)
        done = _committed(prepared, writer)
        _refuse_removed(prepared, writer, int(done.sum()), folder)
        index = prepared.pool.pool.index
        todo, left, some = 0, 0, []
        for row in rows:
            if not done[index[row.id]]:
                todo, left = todo + row.num_tokens, left + 1
                some += [row.id] if left <= recipe.collect.rows_per_shard else []
        if done.any():
            clock.progress.say(f"resuming: {int(done.sum())} of {len(rows)} rows were measured before")
        if recipe.collect.check_disk:
            refuse_if_it_does_not_fit(
                folder, spec, some, recipe.collect.rows_per_shard, num_rows=left, widths=_widths(run, spec)
            )
        with clock.stage("collect", todo):

            def after() -> None:
                counts = Counter({RowStatus(k): n for k, n in writer.status_counts().items()})
                refuse_if_mostly_bad(counts, recipe.collect.abort_share, len(rows))

            prepared.launch.collect(bench, writer, after)


def _set_aside_note(store: SignalStore) -> list[Note]:
    """Name the rows that are left out because they ended the processes that measured them."""
    bad = [name for name, status in zip(store.ids, store.status, strict=True) if status is RowStatus.WORKER_CRASH]
    if not bad:
        return []
    text = f"{len(bad)} rows were set aside, since processes died whenever they measured them: {', '.join(bad[:5])}"
    return [Note("worker_crash", text, len(bad), tuple(bad[:5]))]


def _adopt_left(bench: Bench, writer: SignalWriter, clock: Clock) -> None:
    """Commit what workers of a killed run had staged, and say so."""
    if not (bench.folder / STAGING).is_dir():
        return
    left = adopt_staged(writer, bench.contents(), opening=True)
    if left.units:
        clock.progress.say(f"adopted {left.num_rows} rows that workers of an earlier run had measured")
    for unit, why in left.refused.items():
        clock.progress.say(f"refused the staged shard {unit}: {why}; its rows are measured again")


def _widths(run: Pass, spec: GradientSpec) -> dict[str, int]:
    """Lengths of the vectors beside the sketch."""
    config = run.engine.model.config
    size = int(getattr(config, "hidden_size", getattr(config, "n_embd", 1024)))
    return {name: size for name in spec.signals if name == "embedding" or name.startswith("hidden_")}


def _committed(prepared: Prepared, writer: SignalWriter) -> Bool[np.ndarray, " N"]:
    """Say which rows of the pool are committed."""
    index, done = prepared.pool.pool.index, np.zeros(len(prepared.pool.pool), dtype=bool)
    if len(writer.committed_ids()):
        for start in range(0, len(done), LOOKED_UP):
            ids = list(islice(index.names(start), LOOKED_UP))
            done[start : start + len(ids)] = [content is not None for content in writer.contents(ids)]
    return done


def _refuse_removed(prepared: Prepared, writer: SignalWriter, num_found: int, folder: Path) -> None:
    """Refuse where more is committed than the pool holds."""
    if num_found < len(writer.committed_ids()):
        gone = sorted(row for row in writer.committed_ids() if row not in prepared.pool.pool.index)
        raise DataError(
            "rows that were measured earlier are no longer in the pool",
            where=str(folder),
            got=f"{len(gone)} rows gone or edited, first {gone[0]}",
            expected="the same rows, or more of them",
            do="use another --out, or restore the pool file",
        )


def _facts(direction: BuiltDirection, prepared: Prepared, seed: int) -> Direction:
    reliability = split_half(direction.sketches, stream(seed, f"split_half/{direction.name}"))
    return Direction(
        direction.name,
        "target" if prepared.target is not None and direction.name == prepared.target.name else "protect",
        direction.norm,
        direction.num_rows,
        direction.num_tokens,
        reliability.mean,
        reliability.sd,
    )


def _reliability_notes(facts: Sequence[Direction]) -> list[Note]:
    notes = []
    for d in facts:
        figure = f"split-half reliability {d.reliability:.2f} (sd {d.reliability_sd:.2f}, 20 splits, {d.num_rows} rows)"
        if not d.reliable:
            text = f"{d.name} has no reliable direction: {figure}, below 0.2; give it more rows or another source"
            notes.append(Note("no_reliable_direction", text, d.num_rows))
        elif d.reliability < 0.5:
            text = f"the direction of {d.name} is weak: {figure}, below 0.5; more rows would make it firmer"
            notes.append(Note("weak_anchor", text, d.num_rows))
    return notes


def refuse_weak(prepared: Prepared, facts: Mapping[str, Direction]) -> None:
    """Refuse to constrain on a direction that is mostly noise, unless the user insists.

    Args:
        prepared: the run's inputs.
        facts: directions by name.

    Raises:
        ConfigError: the method constrains on anchors and one is below 0.2 without ``allow_weak_anchor``.
    """
    weak = [d for d in facts.values() if d.role == "protect" and not d.reliable]
    if weak and prepared.method.needs.constrains and not prepared.recipe.allow_weak_anchor:
        raise ConfigError(
            f"{prepared.method.name} constrains on anchors, and {weak[0].name} has no reliable direction",
            where=f"--anchor {weak[0].name}",
            got=f"split-half reliability {weak[0].reliability:.2f} (sd {weak[0].reliability_sd:.2f}) over {weak[0].num_rows} rows",
            expected="at least 0.2; 0.5 is comfortable",
            do="give more anchor rows or another source, or insist with --set allow_weak_anchor=true",
        )
