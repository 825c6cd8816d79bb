"""Hybrid: clipping, caps and shortages."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import InfeasibleError
from gradsift.methods.hybrid import Hybrid, clipped_gain
from gradsift.seeds import stream
from gradsift.types import Budget, Noise
from planted import P, PlantedRow, planted_world, problem_from_rows


def test_gains_are_dots_until_the_99th_percentile_of_the_norms():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(300, P))
    gradients[7] *= 100
    rows = [PlantedRow(f"r{i:03d}", "a", 5, 1.0, g, 0.0) for i, g in enumerate(gradients)]
    target = np.eye(P)[0]
    problem = problem_from_rows(rows, np.eye(P)[1:2], target)
    clip = np.quantile(np.linalg.norm(gradients, axis=1), 0.99)
    expected = [min(1, clip / np.linalg.norm(g)) * g[0] for g in gradients]
    np.testing.assert_allclose(clipped_gain(problem).value, expected, rtol=1e-12)


@pytest.mark.parametrize("budget", [Budget(rows=40), Budget(tokens=1500)], ids=str)
def test_no_cluster_gives_more_than_its_cap(budget):
    problem = planted_world("gradient").problem()
    selection = Hybrid(num_clusters=4).select(problem, budget, stream(0, "select/hybrid"))
    cluster = dict(zip(problem.ids, selection.cluster, strict=True))
    cost = dict(zip(problem.ids, problem.num_trained if budget.tokens else np.ones(problem.size), strict=True))
    used = Counter()
    last = {}
    for i in selection.ids:  # by falling gain
        used[cluster[i]] += cost[i]
        last[cluster[i]] = cost[i]
    # The row that reaches the cap is the last one.
    assert max(used[c] - last[c] for c in used) < np.ceil(1.5 * (budget.rows or budget.tokens) / 4)
    assert "dropped:cluster_cap" in selection.reason_code
    assert selection.reason_code.count("dropped:conflict_quantile") == 16


def test_what_caps_leave_over_is_noted_and_not_filled():
    # 19 rows of one direction and 1 of another: two clusters, of which the big one may give 15 of 20.
    gradients = [np.eye(P)[2] + 0.5 * np.eye(P)[0] + 1e-3 * i * np.eye(P)[3] for i in range(19)] + [-np.eye(P)[4]]
    rows = [PlantedRow(f"r{i:02d}", "a", 5, 1.0, g, 0.0) for i, g in enumerate(gradients)]
    problem = problem_from_rows(rows, np.eye(P)[1:2], np.eye(P)[0])
    selection = Hybrid(conflict_quantile=0.0, num_clusters=2).select(problem, Budget(rows=20), stream(0, "s"))
    assert sorted(Counter(selection.cluster).values()) == [1, 19]
    assert len(selection.ids) == 16
    assert [(n.code, n.count) for n in selection.notes] == [("shortage", 4)]
    assert selection.reason_code.count("dropped:cluster_cap") == 4


def pool_of(tokens, seed=0):
    """Random gradients; the trained tokens are given."""
    tokens = np.asarray(tokens, dtype=np.int64)
    gradients = np.random.default_rng(seed).normal(size=(len(tokens), P))
    rows = [
        PlantedRow(f"r{i:03d}", "a", int(t), 1.0, g, 0.0)
        for i, (t, g) in enumerate(zip(tokens, gradients, strict=True))
    ]
    return problem_from_rows(rows, np.eye(P)[1:2], np.eye(P)[0])


def test_rows_longer_than_a_share_are_chosen_as_they_are_under_a_budget_in_rows():
    problem = pool_of([200] * 200)
    method = Hybrid(num_clusters=10)  # a share of 1,000 tokens is 150
    by_rows, by_tokens = (method.select(problem, b, stream(0, "s")) for b in (Budget(rows=5), Budget(tokens=1000)))
    assert by_tokens.ids == by_rows.ids
    assert len(by_tokens.ids) == 5
    assert max(Counter(by_tokens.cluster[problem.ids.index(i)] for i in by_tokens.ids).values()) == 1


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    budget=st.integers(40, 600),
    num_clusters=st.integers(1, 8),
    lengths=st.sampled_from([(5, 40), (30, 30), (5, 400)]),
)
def test_what_the_audit_says_of_shares_and_long_rows_holds(seed, budget, num_clusters, lengths):
    tokens = np.random.default_rng(seed).integers(*lengths, endpoint=True, size=60)
    tokens[7] = min(tokens[7], 40)
    problem = pool_of(tokens, seed)
    budget = min(budget, int(tokens.sum()))
    try:
        found = Hybrid(num_clusters=num_clusters).select(problem, Budget(tokens=budget), stream(0, "s"))
    except InfeasibleError:  # only where no row that conflict leaves fits the budget
        assert (tokens > budget).sum() >= 60 - 6
        return
    codes, cap = np.array(found.reason_code), np.ceil(1.5 * budget / (found.cluster.max() + 1) - 1e-9)
    competing = (codes != "dropped:conflict_quantile") & (tokens <= budget)
    for i in np.flatnonzero(codes == "dropped:cluster_cap"):
        better = competing & (found.cluster == found.cluster[i]) & (found.score > found.score[i])
        assert tokens[better].sum() >= cap
    for i in np.flatnonzero(competing & (codes != "dropped:cluster_cap")):
        better = competing & (found.cluster == found.cluster[i]) & (found.score > found.score[i])
        assert tokens[better].sum() < cap
    for i in np.flatnonzero(tokens > budget):
        assert codes[i] in ("dropped:conflict_quantile", "dropped:does_not_fit", "dropped:budget")
    assert found.num_skipped == (codes == "dropped:does_not_fit").sum()
    assert found.num_trained <= budget


def test_rows_longer_than_the_budget_neither_fill_a_share_nor_hide_a_shortage():
    # One cluster of 12 rows: the two best hold more than the budget, the other ten 10 tokens each.
    gradients = [(3 - 0.1 * i) * np.eye(P)[0] + 5 * np.eye(P)[2] for i in range(12)] + [-np.eye(P)[4]] * 2
    tokens = [500, 400, *[10] * 10, 300, 300]
    rows = [
        PlantedRow(f"r{i:02d}", "a", t, 1.0, g, 0.0) for i, (t, g) in enumerate(zip(tokens, gradients, strict=True))
    ]
    problem = problem_from_rows(rows, np.eye(P)[1:2], np.eye(P)[0])
    method = Hybrid(conflict_quantile=0.0, cap_factor=1.0, num_clusters=2)
    found = method.select(problem, Budget(tokens=100), stream(0, "s"))
    assert found.ids == tuple(f"r{i:02d}" for i in range(2, 7))  # a share is 50
    assert found.reason_code[:2] == ("dropped:does_not_fit",) * 2
    assert "its 500 trained tokens did not fit" in found.reason[0]
    assert set(found.reason_code[7:12]) == {"dropped:cluster_cap"}
    assert [(n.code, n.count) for n in found.notes] == [("shortage", 50)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), budget=st.integers(60, 400), size=st.sampled_from([1e-4, 1e-2]))
def test_a_margin_above_the_bound_proves_the_choice_under_a_token_budget(seed, budget, size):
    rng = np.random.default_rng(seed)
    problem = replace(pool_of(rng.integers(5, 120, size=60), seed), noise=Noise(cos=size, norm=size))
    method = Hybrid(num_clusters=4)
    first = method.select(problem, Budget(tokens=budget), stream(0, "s"))
    if first.cut.margin <= first.cut.bound:
        return
    for _ in range(3):
        error = size * rng.choice([-0.999, 0.0, 0.999], size=(60, 3))
        norms = problem.grad_norm * (1 + error[:, 0])
        moved = replace(
            problem,
            grad_norm=norms,
            target_dot=(problem.target_cos + error[:, 1]) * norms,
            anchor_dot=(problem.anchor_cos + error[:, 2:]) * norms[:, None],
        )
        assert set(method.select(moved, Budget(tokens=budget), stream(0, "s")).ids) == set(first.ids)
