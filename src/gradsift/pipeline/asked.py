"""What a pass measures: which signals are asked for, what of the model they see, and the fingerprint that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradsift.gradients.collect import CODE_VERSION
from gradsift.gradients.hooks import EDGE_NORMS, GradientEngine
from gradsift.gradients.project import VERSION
from gradsift.gradients.upper import Upper
from gradsift.manifest import hash_parts
from gradsift.models.adapter import adapter_sha256
from gradsift.models.load import Navigator
from gradsift.models.parameters import Coverage, Parameters, coverage
from gradsift.pipeline.prepare import Prepared
from gradsift.store.spec import GradientSpec, Projection, kept_specs
from gradsift.types import Note, TokenRow

if TYPE_CHECKING:
    from torch import nn


def wants_gradients(prepared: Prepared, out: Path | None = None) -> bool:
    """Tell whether the pass needs a backward: the method's signals, all of them, or what the folder holds already.

    A folder that holds signals keeps what it measures, so that a method that needs less goes on with them.

    Args:
        prepared: the run's inputs.
        out: the run folder, which need not exist; None for a fresh one.

    Returns:
        True where gradients are measured.
    """
    if prepared.recipe.collect.signals == "all" or prepared.method.needs.gradients:
        return True
    return out is not None and any(spec.parameters != "none" for spec in kept_specs(out / "signals"))


def wants_edges(prepared: Prepared, out: Path) -> bool:
    """Tell whether the gradient norms of embedding and LM head are measured where these tables are not chosen themselves.

    They cost 2% to 7% of such a pass; where the tables are chosen they come with it. A folder keeps what it measures.

    Args:
        prepared: the run's inputs.
        out: the run folder; need not exist.

    Returns:
        True where a method needs them, they are part of what is measured here, or a fresh folder is to hold all signals.
    """
    if prepared.method.needs.signals & set(EDGE_NORMS):
        return True
    kept = [spec for spec in kept_specs(out / "signals") if spec.parameters != "none"]
    if kept:
        return any(set(EDGE_NORMS) <= set(spec.signals) for spec in kept)
    return prepared.recipe.collect.signals == "all"


def covered_by(parameters: Parameters, upper: Upper | None, seen: Sequence[str]) -> tuple[Coverage, list[Note]]:
    """Say what is seen of the parameters; of upper layers only, those are unseen that were to be seen.

    Args:
        parameters: the chosen ones.
        upper: the part of them that is measured, or None for all.
        seen: names that the engine covers.

    Returns:
        The coverage and what a reader must know.
    """
    if upper is None:
        covered = coverage(parameters, seen)
        return covered, _coverage_note(covered)
    there = coverage(upper.parameters, seen)
    covered = Coverage(there.num_seen, parameters.numel, there.unseen)
    part = f"; {', '.join(upper.in_part)} by its use in the head alone" if upper.in_part else ""
    text = (
        f"only layers {upper.text} and what follows them were measured: {covered.share:.1%} of the chosen parameters"
        f"{part}; gradsift doctor --layers shows how well that ranks"
    )
    return covered, [Note("coverage_layers", text, len(upper.parameters.names)), *_coverage_note(there)]


def folds(prepared: Prepared, engine: GradientEngine, held: bool) -> tuple[bool, list[Note]]:
    """Tell whether dots are taken by folded factors, and why not where that was asked for.

    Args:
        prepared: the run's inputs.
        engine: the collector.
        held: whether prompts are held constant and plain gradients are measured.

    Returns:
        Whether they are, and a note where they were asked for.
    """
    if prepared.recipe.collect.dots != "folded":
        return False, []
    if not held or not prepared.directions or engine.road != "tiles":
        return False, [Note("dots", "dots were taken exactly: folded ones are for held prompts, on a CPU", 0)]
    return True, [Note("dots", "dots were taken by folded factors, which are exact only on average over seeds", 0)]


def held_note(rows: Sequence[TokenRow]) -> list[Note]:
    """Say which share of the tokens is differentiated where prompts are held constant.

    Args:
        rows: what is measured.

    Returns:
        One note.
    """
    left = sum(row.num_tokens - max(0, int(row.trained[1:].argmax())) for row in rows)
    share = left / sum(row.num_tokens for row in rows)
    text = (
        f"prompts were held constant: the gradients are those of {share:.1%} of the tokens, from the one that predicts a row's "
        "first trained token on"
    )
    return [Note("held_prompts", text, len(rows))]


def _coverage_note(covered: Coverage) -> list[Note]:
    if covered.enough:
        return []
    text = (
        f"the signals see {covered.share:.1%} of the chosen parameters; not seen: {', '.join(covered.unseen[:6])}"
        f"{' ...' if len(covered.unseen) > 6 else ''}"
    )
    return [Note("coverage", text, len(covered.unseen))]


def spec_of(
    prepared: Prepared,
    navigator: Navigator,
    model: nn.Module,
    measured: Parameters | Upper,
    gradients: bool,
    more: Sequence[str],
) -> GradientSpec:
    """Write down what the numbers of a pass mean.

    Args:
        prepared: the run's inputs, anchors as they are used.
        navigator: whose hashes count.
        model: the navigator, with its adapter where it has one.
        measured: the parameters, or those of the upper layers.
        gradients: whether there is a backward.
        more: signals beside the loss and what every gradient pass measures.

    Returns:
        The fingerprint of the store.
    """
    recipe = prepared.recipe
    upper = measured if isinstance(measured, Upper) else None
    parameters = measured.parameters if isinstance(measured, Upper) else measured
    signals = ["loss", *more]
    if gradients:
        signals += ["grad_norm", "sketch"]
        signals += ["dots"] if prepared.directions else []
    lora = gradients and parameters.kind == "lora"
    return GradientSpec(
        parameters=parameters.kind if gradients else "none",
        parameters_sha256=hash_parts(name.encode() for name in (sorted(parameters.names) if gradients else ())),
        model_sha256=navigator.model_sha256,
        tokenizer_sha256=navigator.tokenizer_sha256,
        loss_on=recipe.data.loss_on or "by shape",
        max_length=recipe.data.max_length,
        signals=tuple(signals),
        code_version=CODE_VERSION,
        anchors={s.name: s.digest for s in prepared.directions} if gradients else {},
        projection=Projection(recipe.collect.sketch_dim, recipe.seed, VERSION) if gradients else None,
        adapter_sha256=adapter_sha256(model) if lora else None,
        template_sha256=prepared.rule.template_sha256,
        dtype=recipe.navigator.dtype,
        layers=None if upper is None else upper.text,
        positions=recipe.collect.positions if gradients else "all",
    )


def engine_spec(spec: GradientSpec, engine: GradientEngine, folded: bool) -> GradientSpec:
    """Write down what of the collector changes the numbers and follows from the model.

    Args:
        spec: as the recipe has it.
        engine: the collector.
        folded: whether dots are taken by folded factors.

    Returns:
        The fingerprint of the store.
    """
    if engine.adjacent:  # stores from before padding stood there hold other numbers
        spec = dataclasses.replace(spec, positions="trained, padding first")
    if folded:
        experts = any(engine.holds_experts(block) for block in engine.blocks.values())
        spec = dataclasses.replace(spec, dots="folded, experts exact" if experts else "folded")
    return spec
