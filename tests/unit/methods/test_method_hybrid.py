"""Hybrid: clipping, caps and shortages."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gradsift.methods.hybrid import Hybrid, clipped_gain
from gradsift.seeds import stream
from gradsift.types import Budget
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
    for i in selection.ids:
        used[cluster[i]] += cost[i]
    assert max(used.values()) <= np.ceil(1.5 * (budget.rows or budget.tokens) / 4)
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
