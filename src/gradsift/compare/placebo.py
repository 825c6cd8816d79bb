"""Worlds in which a rule cannot know what it claims to know: a gain there is a leak, not a finding (trials.md T14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradsift.compare.world import World
from gradsift.errors import ConfigError
from gradsift.seeds import Stream
from gradsift.types import TokenRow


def exchangeable(world: World, kind: str = "clean") -> World:
    """Keep the pool rows of one planted kind, each content once, so that no row is better than another by its kind.

    Copies go too: a rule that skips them would train on more different rows than a random draw, which is a real
    advantage and no leak. What remains can still differ in how much a single row teaches, so this pool tests the
    comparison as a whole; only permuted scores are a null by construction.

    Args:
        world: a planted world.
        kind: the kind that stays.

    Returns:
        The world with the smaller pool.

    Raises:
        ConfigError: the pool has no row of that kind.
    """
    stays: dict[bytes, TokenRow] = {}
    for row in world.pool:
        if world.kinds.get(row.id) == kind:
            stays.setdefault(row.input_ids.tobytes(), row)
    if not stays:
        known = ", ".join(sorted(set(world.kinds.values()))) or "no planted kinds"
        raise ConfigError("the pool has no row of this kind", where="world.exchangeable", got=kind, expected=known)
    pool = tuple(stays.values())
    ids = {row.id for row in pool}
    return replace(
        world,
        pool=pool,
        kinds={i: k for i, k in world.kinds.items() if i in ids},
        sources={i: s for i, s in world.sources.items() if i in ids},
        copy_of={},
        looks_domain=world.looks_domain & ids,
    )


def shuffle_anchors(world: World, draw: Stream) -> World:
    """Deal the trained tokens of the anchor rows, and of the target rows, to other rows of the same source.

    Inputs and the counts of every token stay; what they answer is gone. Signals then know which inputs the sources
    hold, so in a pool of several kinds this is no null; in an exchangeable pool it is.

    Args:
        world: any world.
        draw: which token goes where.

    Returns:
        The world with sham anchors and a sham target; pool, replay and evaluation are untouched.
    """
    return replace(
        world,
        anchors={name: _deal(rows, draw.child(f"anchor/{name}")) for name, rows in world.anchors.items()},
        target=_deal(world.target, draw.child("target")),
    )


def _deal(rows: Sequence[TokenRow], draw: Stream) -> tuple[TokenRow, ...]:
    ordered = sorted(rows, key=lambda row: row.id)
    tokens = np.concatenate([row.input_ids[row.trained] for row in ordered])
    left = iter(draw.numpy().permutation(tokens))
    dealt = {}
    for row in ordered:
        ids = row.input_ids.copy()
        ids[row.trained] = [next(left) for _ in range(int(row.trained.sum()))]
        dealt[row.id] = replace(row, input_ids=ids)
    return tuple(dealt[row.id] for row in rows)
