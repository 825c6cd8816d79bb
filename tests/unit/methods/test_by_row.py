"""Needs.by_row: a row chosen out of all rows is chosen out of any part of them; what the screen's certificate rests on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gradsift.methods import make_method, methods
from gradsift.seeds import stream
from gradsift.types import Budget
from planted import planted_world

VARIANTS = [(name, {}) for name in methods()] + [
    ("norm", {"band": "low"}), ("norm", {"band": "high"}), ("conflict", {"drop": "worst", "worst_share": 0.4}),
]  # fmt: skip
JUDGED = [(n, s) for n, s in VARIANTS if n not in ("thtb", "memory_level") and make_method(n, s).needs.by_row]
BUDGET = Budget(rows=24)


def lost(name, settings, seed):
    """Share of the rows chosen out of all that are in a part and are not chosen out of it."""
    world = planted_world("gradient", seed=seed)
    generator = np.random.default_rng(seed)
    # Every other part is lopsided, as those are that a screen leaves.
    value = [np.linalg.norm(row.gradient) if seed % 2 else generator.uniform() for row in world.rows]
    some = tuple(row for row, v in zip(world.rows, value, strict=True) if v < np.median(value))
    part = dataclasses.replace(world, rows=some).problem()
    chosen = [
        set(make_method(name, settings).select(p, BUDGET, stream(1, "select/x")).ids) for p in (world.problem(), part)
    ]
    there = chosen[0] & set(part.ids)
    return len(there - chosen[1]) / max(1, len(there))


def test_the_methods_that_say_so():
    assert {name for name, _ in JUDGED} == {"target_cosine", "conflict", "ogs_static", "ogs_dual", "norm"}
    assert ("conflict", {"drop": "worst", "worst_share": 0.4}) not in JUDGED
    assert not make_method("norm", {"band": "middle"}).needs.by_row


@pytest.mark.parametrize(("name", "settings"), [case for case in JUDGED if case[0] != "ogs_dual"])
def test_a_row_chosen_out_of_all_is_chosen_out_of_a_part(name, settings):
    assert [lost(name, settings, seed) for seed in range(12)] == [0.0] * 12


def test_prices_make_it_an_approximation():
    """ogs_dual: rows share prices, so a few change; the docstring of the certificate says so."""
    shares = [lost("ogs_dual", {}, seed) for seed in range(12)]
    assert 0 < np.mean(shares) < 0.15


@pytest.mark.parametrize(("name", "settings"), [("norm", {"band": "middle"}), ("hybrid", {})])
def test_methods_that_do_not_say_so_lose_rows(name, settings):
    assert max(lost(name, settings, seed) for seed in range(12)) > 0
