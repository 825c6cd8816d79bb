"""Clusters of domain and general rows, and what is measured about them, against loops over rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError, SignalError
from gradsift.policy.statistics import describe_clusters, first_order_effects, make_clusters
from gradsift.seeds import stream
from gradsift.types import Direction, Problem

QUICK = settings(max_examples=10, deadline=None)


def problem_of(seed=0, n=40, d=12, m=2):
    """Rows whose sketch is the gradient itself, so that every estimate is exact."""
    random = np.random.default_rng(seed)
    g = (random.normal(size=(4, d))[random.integers(0, 4, n)] + 0.3 * random.normal(size=(n, d))).astype(np.float32)
    units = random.normal(size=(m + 1, d))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    wide = g.astype(np.float64)
    directions = [Direction(f"a{j}", "protect", 2.0 + j, 5, 50, 0.9, 0.01) for j in range(m)]
    problem = Problem(
        ids=tuple(f"row{i:03d}" for i in range(n)),
        sources=("pool",) * n,
        num_tokens=np.full(n, 9),
        num_trained=random.integers(1, 9, n),
        num_read=n,
        num_trained_read=9 * n,
        loss=random.random(n),
        grad_norm=np.linalg.norm(wide, axis=1),
        anchor_dot=wide @ units[:m].T,
        target_dot=wide @ units[m],
        sketch=g,
        anchors=tuple(directions),
        target=Direction("target", "target", 3.0, 5, 50, 0.9, 0.01),
    )
    return problem, wide, units


@QUICK
@given(st.integers(0, 1000), st.integers(0, 40), st.integers(2, 12))
def test_clusters_never_mix_kinds_and_general_rows_get_their_share(seed, num_general, k):
    problem, *_ = problem_of(seed)
    general = np.zeros(40, bool)
    general[np.random.default_rng(seed).permutation(40)[:num_general]] = True
    clusters = make_clusters(problem, general, stream(seed, "clusters"), k)
    kinds = [set(general[clusters.labels == c].tolist()) for c in range(len(clusters.sizes))]
    assert all(len(kind) == 1 for kind in kinds)
    num = sum(kind == {True} for kind in kinds)
    assert len(kinds) <= k
    assert (num >= 1) == (num_general > 0)
    assert (num < len(kinds)) == (num_general < 40)
    if 0 < num_general < 40:
        assert num <= min(max(1, round(k * num_general / 40)), k - 1)
    assert clusters.sizes.tolist() == np.bincount(clusters.labels).tolist()
    first = [int(np.flatnonzero(clusters.labels == c)[0]) for c in range(len(kinds))]
    assert first == sorted(first)
    for c in range(len(kinds)):  # centres moved with their numbers
        unit = problem.sketch / np.linalg.norm(problem.sketch, axis=1, keepdims=True)
        near = unit[clusters.labels == c] @ clusters.centers.T
        peers = [j for j, kind in enumerate(kinds) if kind == kinds[c]]
        assert (near[:, peers].max(axis=1) <= near[:, c] + 1e-5).all()


def test_every_statistic_by_hand():
    problem, g, units = problem_of()
    general = np.arange(40) % 5 == 0
    clusters = make_clusters(problem, general, stream(0, "clusters"), 6)
    table = describe_clusters(problem, clusters, general, stream(0, "order"), tau=0.1)
    for c, features in enumerate(table.features):
        mine = dict(zip(table.feature_names, features, strict=True))
        rows = [i for i in range(40) if clusters.labels[i] == c]
        mean = sum(g[i] for i in rows) / len(rows)
        for m in range(2):
            cos = [g[i] @ units[m] / np.linalg.norm(g[i]) for i in rows]
            want = {
                f"orth_a{m}": np.mean([1 - abs(x) for x in cos]),
                f"cos_a{m}": np.mean(cos),
                f"mean_gradient_cos_a{m}": mean @ units[m] / np.linalg.norm(mean),
                f"cos_sd_a{m}": np.std(cos),
                f"conflicting_a{m}": np.mean([x < -0.1 for x in cos]),
            }
            for name, value in want.items():
                np.testing.assert_allclose(mine.pop(name), value, atol=1e-6, err_msg=name)
        cos = [g[i] @ units[2] / np.linalg.norm(g[i]) for i in rows]
        np.testing.assert_allclose(mine.pop("cos_target"), np.mean(cos), atol=1e-6)
        np.testing.assert_allclose(
            mine.pop("mean_gradient_cos_target"), mean @ units[2] / np.linalg.norm(mean), atol=1e-6
        )
        np.testing.assert_allclose(mine.pop("loss"), np.mean([problem.loss[i] for i in rows]))
        np.testing.assert_allclose(mine.pop("log_size"), np.log(len(rows)))
        assert mine.pop("is_general") == float(general[rows[0]]) == float(table.general[c])
        assert not mine
        assert sorted(table.members[c]) == rows
        assert (table.price == 1).all()
    tokens = describe_clusters(problem, clusters, general, stream(0, "order"), unit="tokens")
    np.testing.assert_array_equal(tokens.price, problem.num_trained)


def test_the_order_within_a_cluster_is_drawn_by_id():
    problem, *_ = problem_of()
    general = np.zeros(40, bool)
    clusters = make_clusters(problem, general, stream(0, "clusters"), 2)
    table = describe_clusters(problem, clusters, general, stream(0, "order"))
    key = stream(0, "order").uniform(problem.ids)
    assert all(np.diff(key[list(some)]).min(initial=1) > 0 for some in table.members)
    other = describe_clusters(problem, clusters, general, stream(1, "order"))
    assert any(a != b for a, b in zip(table.members, other.members, strict=True))
    np.testing.assert_array_equal(table.features, other.features)


def test_first_order_effects_are_the_slopes_of_the_losses():
    problem, g, units = problem_of()
    clusters = make_clusters(problem, np.zeros(40, bool), stream(0, "clusters"), 3)
    effects = first_order_effects(problem, clusters, step_size=0.1)
    for c in range(3):
        move = -0.1 * g[clusters.labels == c].mean(axis=0)
        np.testing.assert_allclose(effects.gain[c], -(3.0 * units[2]) @ move, atol=1e-6)
        np.testing.assert_allclose(effects.harm[c], [(2.0 * units[0]) @ move, (3.0 * units[1]) @ move], atol=1e-6)


def test_what_is_missing_or_mixed_is_refused():
    problem, *_ = problem_of()
    general = np.arange(40) < 10
    clusters = make_clusters(problem, general, stream(0, "c"), 4)
    with pytest.raises(ConfigError, match="too few clusters"):
        make_clusters(problem, general, stream(0, "c"), 1)
    with pytest.raises(SignalError, match="sketch"):
        make_clusters(replace(problem, sketch=None), general, stream(0, "c"), 4)
    with pytest.raises(SignalError, match="loss"):
        describe_clusters(replace(problem, loss=None), clusters, general, stream(0, "o"))
    with pytest.raises(ValueError, match="mixes"):
        describe_clusters(problem, clusters, np.arange(40) < 11, stream(0, "o"))
    with pytest.raises(SignalError, match="target"):
        first_order_effects(replace(problem, target=None), clusters)


def test_one_kind_of_rows_takes_all_clusters():
    problem, *_ = problem_of()
    for general in (np.zeros(40, bool), np.ones(40, bool)):
        clusters = make_clusters(problem, general, stream(0, "c"))
        assert 1 < len(clusters.sizes) <= 10
