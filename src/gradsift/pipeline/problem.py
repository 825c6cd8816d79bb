"""From signals to the problem a method sees: eligible rows in id order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.data.lexical import lexical_scores
from gradsift.data.token_rows import lengths, pick, places, sorted_by_id, texts_of
from gradsift.pipeline.checkpoints import checkpoint_fields
from gradsift.pipeline.forward import extra_fields, text_fields
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.probe import Probed
from gradsift.pipeline.probe_design import copy_groups, row_likeness
from gradsift.store.signals import SignalStore
from gradsift.store.sketches import stored_sketches
from gradsift.types import Problem, TokenRow

IN_MEMORY = 1 << 28  # bytes of sketches above which they stay on the disk: 16,395 rows of 4,093 numbers


def eligible_rows(prepared: Prepared, measured: Measurement | None) -> Sequence[TokenRow]:
    """List the rows that may be selected: usable, and measured without failure where anything was measured.

    Args:
        prepared: the run's inputs.
        measured: the signals, or None.

    Returns:
        Token rows in id order, kept copies included.
    """
    rows = sorted_by_id(prepared.pool.usable)
    if measured is None:
        return rows
    pool, store = prepared.pool.pool, measured.store
    measured_at = pool.index.find(store.ids)
    good = np.full(len(pool) + 1, -1, dtype=np.int8)  # the last one takes rows that another pool had
    good[measured_at] = [status.usable for status in store.status]
    found = good[pool.first[places(pool, rows)]]
    if (found < 0).any():
        raise ValueError(f"eligible_rows: row {rows[int(np.argmin(found))].id} was not measured")
    return pick(rows, np.flatnonzero(found))


def build_problem(prepared: Prepared, measured: Measurement | None, probed: Probed | None = None) -> Problem:
    """Join tokens and signals of the rows that may be selected.

    Exact copies that were kept share the signals of the first copy.

    Args:
        prepared: the run's inputs.
        measured: the signals, or None for methods that need no model.
        probed: losses under probes, or None where none were trained.

    Returns:
        The problem; rows whose measurement failed are not in it.
    """
    rows, pool = eligible_rows(prepared, measured), prepared.pool.pool
    where = places(pool, rows)
    num_tokens, num_trained = lengths(rows)
    common = {
        "ids": tuple(row.id for row in rows),
        "sources": tuple(pool.label(int(i)) for i in where),
        "num_tokens": num_tokens,
        "num_trained": num_trained,
        "num_read": len(prepared.pool.tokens),
        "num_trained_read": int(lengths(prepared.pool.tokens)[1].sum()),
        "lexical": _lexical(prepared, rows),
        "likeness": _likeness(prepared, rows),
        "general": tuple(source.label for source in prepared.recipe.general),
        **_probed(probed, rows),
        **text_fields(prepared, rows),
    }
    if measured is None:
        return Problem(**common)
    # Exact copies that were kept share one measurement.
    ranks, at = np.unique(pool.index.rank[pool.first[where]], return_inverse=True)
    originals = [pool.index.at(int(i)) for i in np.argsort(pool.index.rank)[ranks]]
    store = measured.store.take(originals)
    signals = store.spec.signals
    embeds = "embedding" in prepared.method.needs.signals  # as wide as the model: read for the methods that use it only
    anchors = [d for d in measured.directions if d.role == "protect"]
    target = next((d for d in measured.directions if d.role == "target"), None)
    return Problem(
        **common,
        loss=store.loss[at],
        grad_norm=store.grad_norm[at] if "grad_norm" in signals else None,
        anchor_dot=store.dots([d.name for d in anchors])[at] if anchors else None,
        target_dot=store.dots([target.name])[at, 0] if target else None,
        gram=measured.gram if measured.directions else None,
        direction_sketch=measured.direction_sketch,
        sketch=_sketch(store, originals, at) if "sketch" in signals and store.spec.direction == "raw" else None,
        emb_grad_norm=store.emb_grad_norm[at] if "emb_grad_norm" in signals else None,
        head_grad_norm=store.head_grad_norm[at] if "head_grad_norm" in signals else None,
        anchors=tuple(anchors),
        target=target,
        embedding=store.embedding(originals)[at] if embeds else None,
        target_embedding=measured.target_embedding if embeds else None,
        target_ids=tuple(sorted(row.id for row in prepared.target.usable)) if embeds and prepared.target else (),
        noise=measured.noise,
        **checkpoint_fields(prepared, measured, originals, at),
        **extra_fields(prepared, store, originals, at),
    )


def _sketch(store: SignalStore, originals: Sequence[str], at: Int[np.ndarray, " N"]) -> Any:
    """Sketches of the rows: an array where it is small, else left on the disk and read in blocks."""
    assert store.spec.projection is not None
    if len(at) * store.spec.projection.dim * 4 > IN_MEMORY:
        return stored_sketches(store, at)
    return store.gather([originals[int(i)] for i in at])


def _likeness(prepared: Prepared, rows: Sequence[TokenRow]) -> Float[np.ndarray, " N"] | None:
    if "likeness" not in prepared.method.needs.signals or prepared.target is None:
        return None
    return row_likeness(prepared, rows)


def _probed(probed: Probed | None, rows: Sequence[TokenRow]) -> dict[str, Any]:
    if probed is None:
        return {}
    groups = copy_groups(rows)
    return {
        "held_out_loss": np.array([probed.held_out[groups[row.id]] for row in rows]),
        "anchor_loss": probed.anchor_loss,
        "copy_group": tuple(groups[row.id] for row in rows),
    }


def _lexical(prepared: Prepared, rows: Sequence[TokenRow]) -> Float[np.ndarray, " N"] | None:
    if "lexical" not in prepared.method.needs.signals or prepared.target is None:
        return None
    return lexical_scores(
        [row.id for row in rows],
        texts_of(prepared.pool.pool, rows),
        texts_of(prepared.target.pool, prepared.target.usable),
    )
