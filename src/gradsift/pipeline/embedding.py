"""Whether the pass pools hidden states, and the embeddings of the target's rows (ours)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from gradsift.gradients.collect import Pass, embed_rows
from gradsift.gradients.directions import BuiltDirection, load_embeddings, save_embeddings
from gradsift.gradients.embed import content_order, reorder
from gradsift.manifest import hash_parts, make_folder
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.progress import Clock
from gradsift.store.spec import kept_specs


def wants_embedding(prepared: Prepared, out: Path) -> bool:
    """Tell whether the pass pools hidden states: a method needs them, or they are part of what is measured here.

    A folder that holds signals keeps what it measures, so that other methods can go on with it.

    Args:
        prepared: the run's inputs.
        out: the run folder; need not exist.

    Returns:
        True where the embedding is measured.
    """
    if "embedding" in prepared.method.needs.signals:
        return True
    kept = kept_specs(out / "signals")
    if kept:
        return any("embedding" in spec.signals for spec in kept)
    return prepared.recipe.collect.signals == "all"


def embed_target(
    prepared: Prepared, run: Pass, built: Sequence[BuiltDirection], folder: Path, clock: Clock
) -> Float[np.ndarray, "n_t d"] | None:
    """Find the embeddings of the target's rows: from its direction's pass, or by a forward of their own, once.

    Args:
        prepared: the run's inputs.
        run: a pass whose engine pools embeddings, not entered.
        built: the directions that were measured, if any.
        folder: the store's folder.
        clock: timing and progress.

    Returns:
        float32 [n_t, d] in id order, or None without a target.
    """
    target = prepared.target
    if target is None:
        return None
    found = next((d.embeddings for d in built if d.name == target.name), None)
    if found is None:
        place = folder / "directions"
        make_folder(folder)
        make_folder(place)
        digest = hash_parts([b"embedding", target.digest.encode()])
        found = load_embeddings(place, digest)
        if found is None:
            with clock.stage("target", sum(row.num_tokens for row in target.usable)):
                run = dataclasses.replace(run, tick=lambda n, tokens: clock.tick("target", n, tokens))
                found = embed_rows(run, target.usable)
            save_embeddings(found, place, digest)
    return reorder(found, content_order(target.usable), sorted(row.id for row in target.usable))
