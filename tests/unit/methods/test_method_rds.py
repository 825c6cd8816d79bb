"""rds by hand: who takes which row in which turn, budgets, refusals and the audit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gradsift.errors import NumericsError, SignalError
from gradsift.methods import make_method
from gradsift.seeds import stream
from gradsift.types import Budget, Noise, Problem


def problem_of(cosines, *, trained=None, noise=Noise()):  # noqa: B008 - frozen
    """Rows in the plane of two orthogonal target rows q0 and q1, and a third axis that takes up the rest."""
    first = np.asarray(cosines, dtype=np.float64)
    rest = np.sqrt(1 - np.square(first).sum(axis=1))
    n = len(first)
    trained = np.full(n, 5) if trained is None else np.asarray(trained)
    return Problem(
        ids=tuple(f"r{i}" for i in range(n)),
        sources=("a",) * n,
        num_tokens=trained + 3,
        num_trained=trained,
        num_read=n,
        num_trained_read=int(trained.sum()),
        embedding=(np.column_stack([first, rest]) * np.arange(1, n + 1)[:, None]).astype(np.float32),
        target_embedding=np.array([[2.0, 0, 0], [0, 5.0, 0]], dtype=np.float32),
        target_ids=("q0", "q1"),
        noise=noise,
    )


# q0 likes r0 > r1 > r2 > r3; q1 likes r0 > r2 > r1 > r3
COSINES = [[0.70, 0.60], [0.60, 0.30], [0.40, 0.50], [0.10, 0.20]]


def choose(problem, budget, **settings):
    return make_method("rds", settings).select(problem, budget, stream(0, "select/rds"))


def test_target_rows_take_turns():
    got = choose(problem_of(COSINES), Budget(rows=3))
    assert got.ids == ("r0", "r2", "r1")  # q0 takes r0, q1 finds it gone and takes r2, q0 takes r1
    assert got.reason[0] == "rank 1 of 4: nearest row left to target row q0, cosine 0.7000"
    assert got.reason[2] == "rank 2 of 4: nearest row left to target row q1, cosine 0.5000"
    assert got.reason_code == ("kept:turn", "kept:turn", "kept:turn", "dropped:budget")
    assert got.score.tolist() == [-1, -3, -2, -4]
    assert abs(got.cut.margin - 0.1) < 1e-6  # q0: .70 against .60; q1: .50 against .30; q0: .60 against .10


@pytest.mark.parametrize(("aggregate", "order"), [("mean", "r0 r1 r2 r3"), ("max", "r0 r1 r2 r3")])
def test_mean_and_max_rank_by_the_cosines(aggregate, order):
    problem = problem_of(COSINES)
    got = choose(problem, Budget(rows=4), aggregate=aggregate)
    table = np.asarray(COSINES)
    np.testing.assert_allclose(got.score, table.mean(1) if aggregate == "mean" else table.max(1), atol=1e-6)
    assert " ".join(got.ids) == order
    assert "nearest to target row q0" in got.reason[0]


def test_mean_and_max_differ_where_a_row_suits_one_target_row_only():
    problem = problem_of([[0.9, 0.0], [0.5, 0.5]])
    assert choose(problem, Budget(rows=1), aggregate="mean").ids == ("r1",)
    assert choose(problem, Budget(rows=1), aggregate="max").ids == ("r0",)


def test_a_row_that_does_not_fit_is_skipped_and_the_turn_passes_on():
    got = choose(problem_of(COSINES, trained=[5, 4, 9, 3]), Budget(tokens=12))
    assert got.ids == ("r0", "r1", "r3")
    assert got.num_skipped == 1
    assert got.reason_code[2] == "dropped:does_not_fit"


def test_the_order_of_the_target_rows_is_that_of_their_ids():
    problem = problem_of(COSINES)
    turned = replace(problem, target_embedding=problem.target_embedding[::-1].copy())
    assert choose(turned, Budget(rows=2)).ids == ("r0", "r1")  # now q0 is the one that likes r0 > r2 > r1
    with pytest.raises(ValueError, match="increasing"):
        replace(problem, target_ids=("q1", "q0"))
    with pytest.raises(ValueError, match="one id per row"):
        replace(problem, target_ids=("q0",))


def test_near_ties_are_undecided_and_said():
    problem = problem_of([*COSINES[:2], [0.599, 0.3], COSINES[3]], noise=Noise(embedding=1e-3))
    got = choose(problem, Budget(rows=2))
    assert got.cut.margin <= got.cut.bound == 2e-3
    assert set(got.cut.undecided) == {"r1", "r2"}
    assert [(n.code, n.count, n.ids) for n in got.notes] == [("near_ties", 1, got.ids[1:])]
    assert not choose(problem, Budget(rows=4)).cut.undecided


def test_length_does_not_matter():
    problem = problem_of(COSINES)
    longer = replace(
        problem, embedding=problem.embedding * np.float32(3), target_embedding=problem.target_embedding / 8
    )
    for aggregate in ("round_robin", "mean", "max"):
        assert (
            choose(longer, Budget(rows=3), aggregate=aggregate).ids
            == choose(problem, Budget(rows=3), aggregate=aggregate).ids
        )


@pytest.mark.parametrize("field", ["embedding", "target_embedding"])
def test_zero_missing_and_broken_embeddings_are_refused_by_name(field):
    problem = problem_of(COSINES)
    name = "r1" if field == "embedding" else "q1"
    for value, where in ((0.0, name), (np.nan, name)):
        array = np.array(getattr(problem, field))
        array[1] = value
        with pytest.raises(NumericsError, match="embedding") as caught:
            choose(replace(problem, **{field: array}), Budget(rows=1))
        assert where in caught.value.where
    gone = {"target_embedding": None, "target_ids": ()} if field == "target_embedding" else {"embedding": None}
    with pytest.raises(SignalError, match="embedding"):
        choose(replace(problem, **gone), Budget(rows=1))


def test_it_costs_a_forward():
    assert make_method("rds", {}).needs.cost_class == "forward"
    assert make_method("rds", {}).needs.target
