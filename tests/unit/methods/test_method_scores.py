"""Golden numbers of the methods that rank by one score."""

from __future__ import annotations

import numpy as np
import pytest

from gradsift.errors import InfeasibleError, NumericsError, SignalError
from gradsift.geometry.similarity import conf_max
from gradsift.methods import make_method
from gradsift.methods.loss import band_bound, band_score
from gradsift.methods.ogs_static import mean_anchor
from gradsift.seeds import stream
from gradsift.types import Budget, Noise
from planted import PlantedRow, problem_from_rows

# ogs.md's worked example: two anchors that partly oppose each other.
ANCHORS = np.array([[1.0, 0, 0], [-0.6, 0.8, 0]])
GRADIENTS = np.array([[-1.0, -2, 2], [1, 0.5, 1], [-1, 1, 1]])
COS = np.array([[-0.3333, -0.3333], [0.6667, -0.1333], [-0.5774, 0.8083]])


def problem(gradients, anchors=ANCHORS, target=None, **kwargs):
    rows = [
        PlantedRow(f"r{i}", "a", 5, 1.0 + i, np.asarray(g, dtype=np.float64), float(i)) for i, g in enumerate(gradients)
    ]
    return problem_from_rows(rows, anchors, target, **kwargs)


def choose(name, config, problem, rows=1, seed=0):
    return make_method(name, config).select(problem, Budget(rows=rows), stream(seed, "select"))


def test_conflict_max_is_the_worst_of_several_anchors():
    measured = problem(GRADIENTS)
    np.testing.assert_allclose(measured.anchor_cos, COS, atol=5e-5)
    np.testing.assert_allclose(conf_max(measured.anchor_cos), [0.3333, 0.1333, 0.5774], atol=5e-5)


def test_the_mean_anchor_equals_the_mean_written_out():
    measured = problem(GRADIENTS)  # both anchors have length 1
    mean = mean_anchor(measured, measured.gram)
    np.testing.assert_allclose(mean.cos, [-0.7454, 0.5963, 0.2582], atol=5e-5)
    rng = np.random.default_rng(0)
    anchors, gradients = rng.normal(size=(4, 7)) * [[1], [3], [0.2], [1]], rng.normal(size=(10, 7))
    measured = problem(gradients, anchors)
    norms = np.linalg.norm(anchors, axis=1)
    long_way = gradients @ anchors.mean(axis=0)
    long_way /= np.linalg.norm(gradients, axis=1) * np.linalg.norm(anchors.mean(axis=0))
    mean = mean_anchor(measured, measured.gram)
    np.testing.assert_allclose(mean.cos, long_way, atol=1e-12)
    assert mean.amplification == pytest.approx(norms.sum() / np.linalg.norm(anchors.sum(axis=0)))


def test_orthogonality_is_two_sided():
    one = np.array([[1.0, 0, 0]])
    selection = choose(
        "ogs_static", {}, problem([[3, 4, 0], [-3, 4, 0], [0, 2, 0], [2, 0, 0], [-1, 0, 0]], one), rows=2
    )
    np.testing.assert_allclose(selection.score, [0.4, 0.4, 1, 0, 0], atol=1e-12)
    assert selection.ids == ("r2", "r0")


def test_anchors_that_cancel_have_no_mean():
    with pytest.raises(NumericsError, match="cancel"):
        choose("ogs_static", {}, problem(GRADIENTS, np.array([[1.0, 0, 0], [-1, 0, 0]])))


def test_several_anchors_need_their_gram_matrix_and_one_does_not():
    from dataclasses import replace

    with pytest.raises(SignalError, match="gram"):
        choose("ogs_static", {}, replace(problem(GRADIENTS), gram=None))
    one = problem(GRADIENTS, ANCHORS[:1])
    assert choose("ogs_static", {}, replace(one, gram=None)).ids == choose("ogs_static", {}, one).ids


def test_conflict_drops_every_opposing_row_and_says_which_anchor():
    target = np.array([0.0, 1, 0])
    measured = problem([[1, 2, 0], [-1, 5, 0], [1, -1, 0], [0.5, 0.6, 1]], target=target)
    selection = choose("conflict", {}, measured, rows=2)
    assert selection.ids == ("r0", "r3")
    assert selection.reason_code[1] == "dropped:conflict"
    assert selection.reason[1] == "opposes anchor0: cosine -0.196"
    assert "opposes anchor1" in selection.reason[2]


def test_conflict_without_a_target_draws_among_the_rest():
    measured = problem(
        np.vstack([np.eye(3)[1:], [[1, 1, 0], [1, 2, 0], [1, 3, 0], [-1, 0, 0]]]), np.array([[1.0, 0, 0]])
    )
    first = [choose("conflict", {}, measured, rows=2, seed=s).ids for s in range(20)]
    assert len(set(first)) > 3
    assert not any("r5" in ids for ids in first)


def test_conflict_worst_drops_the_floor_of_the_share():
    measured = problem([[-c, 1, 0] for c in (0.1, 0.9, 0.3, 0.8, 0.5)], np.array([[1.0, 0, 0]]), np.array([0.0, 1, 0]))
    selection = choose("conflict", {"drop": "worst", "worst_share": 0.4}, measured, rows=3)
    assert set(selection.ids) == {"r0", "r2", "r4"}
    assert (
        choose("conflict", {"drop": "worst", "worst_share": 0.39}, measured, rows=5).reason_code.count(
            "dropped:conflict_quantile"
        )
        == 1
    )


def test_rows_that_cannot_be_placed_beside_the_threshold_are_listed():
    noise = Noise(cos=0.05)
    measured = problem([[0.01, 1, 0], [-0.02, 1, 0], [0.5, 1, 0], [-0.5, 1, 0]], ANCHORS[:1], noise=noise)
    note = next(n for n in choose("conflict", {}, measured).notes if n.code == "undecided_threshold")
    assert (note.count, note.ids) == (2, ("r0", "r1"))


def test_a_pool_in_which_every_row_opposes_an_anchor_is_refused():
    with pytest.raises(InfeasibleError, match="no row to choose") as refusal:
        choose("conflict", {}, problem([[-1, 0, 0], [-1, 1, 0]], ANCHORS[:1]))
    assert "ogs_dual" in refusal.value.do


def test_bands():
    values = np.array([1.0, 2, 4, 8, 16])
    np.testing.assert_array_equal(band_score(values, "middle"), [-3, -2, 0, -4, -12])
    np.testing.assert_array_equal(band_score(values, "low"), -values)
    np.testing.assert_array_equal(band_score(values, "high"), values)
    assert (band_bound(0.1, "middle"), band_bound(0.1, "low")) == (0.2, 0.1)


def test_the_middle_of_the_norms_is_measured_in_ratios():
    # 4 is closer to 8 than 13 is, but 8 / 4 is a larger ratio than 13 / 8
    measured = problem([[n, 0, 0] for n in (13.0, 1, 8, 4, 64)])
    selection = choose("norm", {"band": "middle"}, measured, rows=2)
    assert selection.ids == ("r2", "r0")
    assert selection.reason[2] == "rank 1 of 5: gradient norm 8, pool median 8"


def test_the_bounds_are_those_of_the_signals():
    noise = Noise(loss=0.01, norm=0.02, cos=0.03)
    measured = problem(GRADIENTS, target=np.ones(3), noise=noise)
    bound = {
        (name, band): choose(name, {"band": band} if band else {}, measured).cut.bound / 4
        for name, band in [("loss", "low"), ("loss", "middle"), ("norm", "high"), ("target_cosine", ""), ("length", "")]
    }
    assert bound["loss", "low"] == pytest.approx(0.01)
    assert bound["loss", "middle"] == pytest.approx(0.02)
    assert bound["norm", "high"] == pytest.approx(-np.log(0.98))
    assert bound["target_cosine", ""] == pytest.approx(0.03)
    assert bound["length", ""] == 0
