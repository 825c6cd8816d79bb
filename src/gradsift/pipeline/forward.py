"""Forward signals beside the loss, columns and texts: what the pass measures of them, and what a problem gets (ours)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from torch import nn

from gradsift.data.columns import read_columns
from gradsift.data.ngrams import importance_weights
from gradsift.data.prompts import prompt_and_response, prompt_mask
from gradsift.data.token_cache import tokenize_pool
from gradsift.data.token_rows import places, texts_of
from gradsift.gradients.taps import Extras, find_layers, hidden_name, refuse_layers, start_token
from gradsift.models.load import tokenizer_sha256
from gradsift.store.spec import kept_specs
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from gradsift.methods import Needs
    from gradsift.pipeline.prepare import Prepared
    from gradsift.store.signals import SignalStore


def reads_prompts(needs: Needs) -> bool:
    """Tell whether a method asks which tokens are the prompt's words.

    Args:
        needs: of the method.

    Returns:
        True where tokenization has to tell words from the template.
    """
    return needs.texts or "prompt_loss" in needs.signals


def wanted_extras(prepared: Prepared, model: nn.Module, out: Path) -> Extras:
    """Say what the pass measures beside the loss: what the method needs, and what the folder's store holds already.

    A store of an earlier method keeps its signals, so that both go on with it; a method that needs more than it holds is
    refused by the store's description.

    Args:
        prepared: the run's inputs.
        model: the navigator.
        out: the run folder; need not exist.

    Returns:
        The extra signals.

    Raises:
        ConfigError: a layer is not there.
    """
    needs = prepared.method.needs
    names = {name for name in needs.signals if name in ("prompt_loss", "alone_loss")}
    names |= {hidden_name(layer) for layer in needs.layers}
    for spec in kept_specs(out / "signals"):
        names |= set(spec.extras)
    layers = tuple(sorted(int(n.removeprefix("hidden_")) for n in names if n.startswith("hidden_")))
    if layers:
        refuse_layers(layers, len(find_layers(model)))
    start = start_token(model, prepared.pad_id)
    return Extras("prompt_loss" in names, "alone_loss" in names, layers, start)


def measures_prompts(prepared: Prepared, out: Path | None = None) -> bool:
    """Tell whether the pass measures prompts' losses: the method needs them, or the folder's store holds them.

    Args:
        prepared: the run's inputs.
        out: the run folder, which need not exist; None for a fresh one.

    Returns:
        True where logits are made at the prompts' positions too.
    """
    if "prompt_loss" in prepared.method.needs.signals:
        return True
    return out is not None and any("prompt_loss" in spec.extras for spec in kept_specs(out / "signals"))


def told_apart(prepared: Prepared, extras: Extras, rows: Sequence[TokenRow]) -> tuple[Prepared, Sequence[TokenRow]]:
    """Tell words from the template where the store holds prompt losses and the method did not ask for them.

    Args:
        prepared: the run's inputs.
        extras: what the pass measures.
        rows: pool rows that are measured.

    Returns:
        The inputs and the rows; as they were where nothing is to be told.
    """
    if not extras.prompt or reads_prompts(prepared.method.needs):
        return prepared, rows
    length = prepared.recipe.data.max_length
    tokens = tokenize_pool(
        prepared.pool.pool,
        prepared.tokenizer,
        prepared.rule,
        max_length=length,
        tokenizer_key=lambda: tokenizer_sha256(prepared.tokenizer),
        find_template=True,
    )
    told = dataclasses.replace(prepared, pool=dataclasses.replace(prepared.pool, tokens=tokens))
    return told, tokens.take(np.sort(places(prepared.pool.pool, rows)))


def extra_fields(
    prepared: Prepared, store: SignalStore, originals: Sequence[str], at: Int[np.ndarray, " N"]
) -> dict[str, Any]:
    """Read the extra signals that the method needs.

    Args:
        prepared: the run's inputs.
        store: the signals.
        originals: n ids of the rows that were measured.
        at: int64 [N] which of them each row of the problem is, or is a copy of.

    Returns:
        Fields of the problem.
    """
    needs = prepared.method.needs
    names = [name for name in ("prompt_loss", "alone_loss") if name in needs.signals]
    fields: dict[str, Any] = {name: store.extra(name, originals)[at] for name in names}
    if needs.layers:
        states = [store.extra(hidden_name(layer), originals)[at] for layer in needs.layers]
        fields |= {"hidden": np.stack(states, axis=1), "hidden_layers": needs.layers}
    return fields


def text_fields(prepared: Prepared, rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Read the texts, columns and counts that the method needs; no model is asked.

    Args:
        prepared: the run's inputs.
        rows: N token rows in id order.

    Returns:
        Fields of the problem.
    """
    needs, ids = prepared.method.needs, [row.id for row in rows]
    pool = prepared.pool.pool
    fields: dict[str, Any] = {"external": read_columns(pool, ids, needs.columns)}
    if reads_prompts(needs):
        fields["num_prompt"] = np.array([int(prompt_mask(row).sum()) for row in rows], dtype=np.int64)
    if needs.texts:
        fields["texts"] = tuple(prompt_and_response(pool.row(int(i))) for i in places(pool, rows))
    if "importance" in needs.signals and prepared.target is not None:
        wanted = texts_of(prepared.target.pool, prepared.target.usable)
        fields["importance"] = importance_weights(texts_of(pool, rows), wanted)
    return fields
