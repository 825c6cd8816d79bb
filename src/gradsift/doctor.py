"""``gradsift doctor``: try a navigator on a few real rows before a long run, and say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from gradsift.data.batches import collate
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.project import Projector, sketch_matrix
from gradsift.methods import make_method
from gradsift.models.adapter import attach_lora
from gradsift.models.load import load_navigator
from gradsift.models.parameters import choose_parameters, coverage
from gradsift.pipeline.prepare import Prepared, Source, prepare
from gradsift.pipeline.progress import Clock, Progress
from gradsift.recipe import Recipe
from gradsift.types import RowStatus, TokenRow

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what.
        verdict: ok, warn or fail.
        figure: what was seen.
        advice: what to do, empty when ok.
    """

    name: str
    verdict: Verdict
    figure: str
    advice: str = ""


def examine(recipe: Recipe, progress: Progress, *, num_rows: int = 4) -> list[Check]:
    """Examine tokens and gradients of a navigator on real rows.

    Args:
        recipe: pool, navigator and data settings of the planned run.
        progress: who is told.
        num_rows: rows to differentiate one by one with the oracle.

    Returns:
        The checks, in the order they were made; a failed token check ends them before any weight is loaded.
    """
    clock = Clock(progress)
    prepared = prepare(recipe, make_method(recipe.method.name, recipe.method.settings), clock)
    checks = [check for source in (prepared.pool, *prepared.directions) for check in token_checks(prepared, source)]
    with clock.stage("load"):
        navigator = load_navigator(prepared.resolved, dtype=recipe.navigator.dtype, device=recipe.navigator.device)
    checks.append(_vocabulary(prepared, navigator.model))
    if any(check.verdict == "fail" for check in checks):
        return checks
    model: Any = navigator.model
    if recipe.navigator.parameters == "lora":
        model = attach_lora(model, recipe.navigator.lora, recipe.seed)
    parameters = choose_parameters(model, recipe.navigator.parameters)
    projector = Projector(recipe.seed, recipe.collect.sketch_dim)
    engine = GradientEngine(model, parameters.names, projector=projector)
    seen = coverage(parameters, engine.blocks)
    checks.append(
        Check(
            "coverage",
            "ok" if seen.enough else "warn",
            f"{seen.share:.1%} of {parameters.numel:,} chosen parameters are seen",
            "" if seen.enough else f"not seen: {', '.join(seen.unseen[:8])}; choose navigator.parameters without them",
        )
    )
    rows = _spread(prepared.pool.usable, num_rows)
    with clock.stage("oracle"):
        checks += _gradient_checks(prepared, engine, rows)
    return checks


def token_checks(prepared: Prepared, source: Source) -> list[Check]:
    """Look for empty masks, truncation and doubled begin tokens.

    Args:
        prepared: the run's inputs.
        source: rows of one role.

    Returns:
        Three checks.
    """
    total = len(source.tokens)
    empty = sum(row.status is RowStatus.NO_TRAINED_TOKEN for row in source.tokens)
    cut = sum(row.status is RowStatus.TRUNCATED for row in source.tokens)
    bos = prepared.tokenizer.bos_token_id
    doubled = [r.id for r in source.usable if r.num_tokens > 1 and r.input_ids[0] == bos and r.input_ids[1] == bos]
    name = source.name
    return [
        Check(
            f"{name}: loss mask",
            "ok" if empty == 0 else "warn",
            f"{empty} of {total} rows train no token",
            "" if empty == 0 else "check --loss-on and the chat template; gradsift inspect shows the mask of a row",
        ),
        Check(
            f"{name}: truncation",
            "ok" if cut <= total // 10 else "warn",
            f"{cut} of {total} rows are cut to {prepared.recipe.data.max_length} tokens",
            "" if cut <= total // 10 else "raise data.max_length here and in the trainer",
        ),
        Check(
            f"{name}: begin token",
            "fail" if doubled else "ok",
            f"{len(doubled)} rows begin with the begin token twice",
            f"the text already holds it (first row {doubled[0]}); remove it from the rows" if doubled else "",
        ),
    ]


def _vocabulary(prepared: Prepared, model: Any) -> Check:
    table = model.get_input_embeddings().weight.shape[0]
    top = max(int(r.input_ids.max()) for s in (prepared.pool, *prepared.directions) for r in s.usable)
    fits = top < table
    figure = f"largest token id {top}, the model has {table} embeddings, the tokenizer {len(prepared.tokenizer)} tokens"
    return Check("vocabulary", "ok" if fits else "fail", figure, "" if fits else "use the model's own tokenizer")


def _spread(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    """Take rows of different lengths, shortest and longest included."""
    ordered = sorted(rows, key=lambda row: (row.num_tokens, row.id))
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return [ordered[i] for i in places]


def _gradient_checks(prepared: Prepared, engine: GradientEngine, rows: Sequence[TokenRow]) -> list[Check]:
    batch = collate(rows, range(len(rows)), prepared.pad_id)
    device = next(engine.model.parameters()).device
    with engine:
        together = engine.measure(batch.input_ids.to(device), batch.labels.to(device), batch.lengths)
    assert together.sketch is not None
    assert engine.projector is not None
    norms = together.square.sqrt()
    worst_alone = worst_norm = worst_sketch = worst_loss = 0.0
    for k, row in enumerate(rows):
        single = collate([row], [0], prepared.pad_id)
        with engine:
            alone = engine.measure(single.input_ids.to(device), single.labels.to(device), single.lengths)
        assert alone.sketch is not None
        worst_alone = max(worst_alone, float((alone.sketch[0] - together.sketch[k]).norm() / norms[k]))
        names = list(engine.blocks)
        truth = example_gradient(engine.model, names, single.input_ids[0].to(device), single.labels[0].to(device))
        matrices = {name: engine.matrix(name, g) for name, g in truth.by_name.items()}
        norm = float(sum(m.double().square().sum() for m in matrices.values())) ** 0.5
        sketch = sum(sketch_matrix(m, engine.projector, name) for name, m in matrices.items())
        worst_norm = max(worst_norm, abs(float(norms[k]) / norm - 1) if norm else 0.0)
        worst_sketch = max(worst_sketch, float(np.linalg.norm(together.sketch[k].double().numpy() - sketch)) / norm)
        worst_loss = max(worst_loss, abs(truth.loss - float(together.loss[k])))
    limit = {torch.float32: 1e-4, torch.bfloat16: 5e-2}.get(next(engine.model.parameters()).dtype, 1e-8)
    oracle = max(worst_norm, worst_sketch)
    return [
        Check(
            "gradients against the oracle",
            "ok" if oracle <= limit else "fail",
            f"{len(rows)} rows: norm off by {worst_norm:.1e}, sketch by {worst_sketch:.1e}, loss by {worst_loss:.1e} nats",
            "" if oracle <= limit else "a layer computes something gradsift does not know; choose other parameters",
        ),
        Check(
            "alone or in a batch",
            "ok" if worst_alone <= limit else "warn",
            f"a row's sketch moves by {worst_alone:.1e} of its norm between batches",
            "" if worst_alone <= limit else "use navigator.dtype=float32, or collect.tokens_per_batch=1",
        ),
        Check(
            "losses",
            "ok",
            f"{float(together.loss.min()):.2f} to {float(together.loss.max()):.2f} nats per trained token",
        ),
    ]
