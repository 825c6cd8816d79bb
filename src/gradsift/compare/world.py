"""What a comparison runs on: initial weights, a pool, anchors, a target, replay rows and evaluation sets (ours).

Planted worlds and real data give the same type, so every arm runs the same code on both. ``kinds`` is the planted truth:
it reaches the oracle arm and the report, never a method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from gradsift.types import TokenRow


@dataclass(frozen=True)
class EvalSet:
    """Held-out rows that are measured before and after.

    Args:
        name: source of the rows.
        role: ``domain`` (gain) or ``general`` (forgetting).
        rows: token rows, in no pool, anchor, target or replay set.
    """

    name: str
    role: Literal["domain", "general"]
    rows: tuple[TokenRow, ...]


@dataclass(frozen=True)
class World:
    """One seed of a world.

    Args:
        name: the world's name.
        seed: which draw of data and initial weights.
        make_model: gives a fresh copy of the initial weights.
        pool: candidate rows in id order.
        kinds: row id -> planted kind; empty for real data without planted junk.
        sources: row id -> source label.
        texts: row id -> words, for lexical scores; anchors, target and replay included.
        anchors: protected sources by name.
        target: rows of what must be learned, for scoring only.
        replay: general rows an arm may train on, disjoint from anchors and evaluation.
        evaluations: held-out sets.
        metric: ``accuracy`` (reference point (0, 0)) or ``loss`` (gain, -forgetting; reference (0, -1 nat)).
        pad_id: padding token.
        copy_of: row id -> id of its first exact copy.
        looks_domain: pool rows that a word cue calls domain.
        base: digest of starting weights that were taught on a machine of its own and may round otherwise on another; empty
            where there are none.
    """

    name: str
    seed: int
    make_model: Callable[[], nn.Module]
    pool: tuple[TokenRow, ...]
    kinds: Mapping[str, str]
    sources: Mapping[str, str]
    texts: Mapping[str, str]
    anchors: Mapping[str, tuple[TokenRow, ...]]
    target: tuple[TokenRow, ...]
    replay: tuple[TokenRow, ...]
    evaluations: tuple[EvalSet, ...]
    metric: Literal["accuracy", "loss"]
    pad_id: int
    copy_of: Mapping[str, str] = field(default_factory=dict)
    looks_domain: frozenset[str] = frozenset()
    base: str = ""
