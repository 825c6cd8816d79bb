"""ogs_dual: nothing to choose is refused, and what the audit says of equal rows is what was done with them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import InfeasibleError
from gradsift.methods.ogs_dual import OgsDual
from gradsift.seeds import stream
from gradsift.types import Budget, Problem
from planted import P, direction


def problem(gain, dots, tokens=None):
    n, m = np.shape(dots)
    tokens = np.full(n, 10) if tokens is None else np.asarray(tokens)
    return Problem(
        ids=tuple(f"r{i:03d}" for i in range(n)),
        sources=("pool",) * n,
        num_tokens=tokens + 5,
        num_trained=tokens,
        num_read=n,
        num_trained_read=int(tokens.sum()),
        grad_norm=np.full(n, 9.0),
        anchor_dot=np.asarray(dots, dtype=np.float64),
        target_dot=np.asarray(gain, dtype=np.float64),
        anchors=tuple(direction(f"anchor{k}", "protect", np.ones(P)) for k in range(m)),
        target=direction("target", "target", np.ones(P)),
    )


def choose(some, budget, **config):
    return OgsDual(**config).select(some, budget, stream(1, "select/ogs_dual"))


def test_a_pool_in_which_nothing_gains_is_refused_where_only_gains_are_taken():
    some = problem([-1, -2, -3, -1, -2, -3], np.ones((6, 1)))
    assert len(choose(some, Budget(rows=3)).ids) == 3
    with pytest.raises(InfeasibleError, match="leaves no row to choose") as refusal:
        choose(some, Budget(rows=3), fill="positive")
    assert "none of which gains" in str(refusal.value)
    assert "fill=full" in str(refusal.value)


@pytest.mark.parametrize("tokens", [10, 12, 15])
def test_a_budget_that_no_allowed_choice_fits_is_refused(tokens):
    some = problem([3, 2, 1], [[-1], [1], [1]], tokens=[10, 20, 30])  # the one that fits opposes the anchor
    with pytest.raises(InfeasibleError, match="leaves no row to choose") as refusal:
        choose(some, Budget(tokens=tokens))
    assert "none of which fits the budget and the allowances" in str(refusal.value)
    assert "or use ogs_dual" not in str(refusal.value)
    assert choose(some, Budget(tokens=20)).ids == ("r001",)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.integers(2, 5),
    anchors=st.integers(1, 2),
    lengths=st.sampled_from([(10,), (4, 7)]),
    tokens=st.booleans(),
    share=st.floats(0.05, 0.95),
)
def test_rows_are_swapped_in_the_audit_only_where_swaps_were_made(seed, kinds, anchors, lengths, tokens, share):
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, kinds, 4 * kinds)  # many equal rows
    length = np.asarray(lengths)[rng.integers(0, len(lengths), kinds)][kind]
    some = problem(rng.normal(size=kinds)[kind], rng.normal(size=(kinds, anchors))[kind], length)
    amount = share * (length.sum() if tokens else some.size)
    budget = Budget(tokens=max(int(amount), int(length.min()))) if tokens else Budget(rows=max(int(amount), 1))
    try:
        chosen = choose(some, budget, scale="raw")
    except InfeasibleError:
        return
    made = sum(int(n) for n in re.findall(r"(\d+) swaps", chosen.certificate.fill))
    said_in = chosen.reason_code.count("kept:swap")
    assert said_in <= made
    assert sum("swapped out" in text for text in chosen.reason) <= made
    assert said_in == sum("swapped in" in text for text in chosen.reason)
    added = re.search(r"(\d+) rows added", chosen.certificate.fill)
    assert chosen.reason_code.count("kept:fill") == (int(added[1]) if added else 0)
    kept = np.isin(some.ids, chosen.ids)
    for one in range(kinds):  # equal rows: those of smaller id
        for size in set(length):
            same = kept[(kind == one) & (length == size)]
            assert (same[:-1] >= same[1:]).all()
