"""Gradient matching as a selection: atoms, weights of rows, parts, and the plants that its own idea finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.cli.methods import setting_words
from gradsift.errors import ConfigError, InfeasibleError, NumericsError, SignalError
from gradsift.geometry.similarity import row_scale
from gradsift.methods import make_method, methods
from gradsift.methods.grad_match_atoms import batch_rows, make_atoms, target_vector
from gradsift.methods.grad_match_choice import deal, share_out
from gradsift.methods.taking import resolve_budget
from gradsift.seeds import stream
from gradsift.types import Budget, Problem
from planted import direction

FORMS = ("grad_match", "grad_match_partitioned")


def fabricate(gradients, aim=None, *, tokens=None, sources=None) -> Problem:
    """A problem whose sketches are the gradients themselves."""
    gradients = np.asarray(gradients, dtype=np.float64)
    n = len(gradients)
    tokens = np.full(n, 10) if tokens is None else np.asarray(tokens)
    unit = None if aim is None else np.asarray(aim, dtype=np.float64) / np.linalg.norm(aim)
    return Problem(
        ids=tuple(f"r{i:03d}" for i in range(n)),
        sources=("pool",) * n if sources is None else tuple(sources),
        num_tokens=tokens + 5,
        num_trained=tokens,
        num_read=n,
        num_trained_read=int(tokens.sum()),
        grad_norm=np.linalg.norm(gradients, axis=1),
        sketch=gradients,
        target=None if aim is None else direction("target", "target", np.asarray(aim, dtype=np.float64)),
        direction_sketch=None if unit is None else unit[None],
    )


def choose(problem, budget, name="grad_match", seed=1, **config):
    budget = Budget(rows=budget) if isinstance(budget, int) else budget
    return make_method(name, config).select(problem, budget, stream(seed, f"select/{name}"))


def some_problem(seed, n=60, dim=9, num_sources=3, aim=True):
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(n, dim)) * np.exp(rng.normal(scale=0.5, size=(n, 1))) + 0.4
    sources = [f"s{k}" for k in rng.integers(0, num_sources, size=n)]
    return fabricate(gradients, np.ones(dim) if aim else None, tokens=rng.integers(1, 40, size=n), sources=sources)


def weight_of(selection):
    return dict(zip(selection.ids, selection.weights.tolist(), strict=True))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 20))
def test_atoms_hold_every_row_once_by_source_and_length(seed, n, size):
    problem = some_problem(seed, n)
    atoms = make_atoms(problem, size)
    assert sorted(atoms.rows.tolist()) == list(range(n))
    rho = row_scale(problem.grad_norm, "clipped")
    spans: dict[str, list[tuple[int, int]]] = {}
    for q in range(atoms.size):
        rows = atoms.members(q)
        assert 1 <= len(rows) <= size
        (source,) = {problem.sources[i] for i in rows}
        spans.setdefault(source, []).append((problem.num_trained[rows].min(), problem.num_trained[rows].max()))
        total = sum(problem.num_trained[i] * rho[i] * problem.sketch[i].astype(np.float64) for i in rows)
        assert atoms.mean[q] == pytest.approx(total / problem.num_trained[rows].sum(), abs=1e-12)
        assert atoms.tokens[q] == problem.num_trained[rows].sum()
    assert [atoms.members(q)[0] for q in range(atoms.size)] == sorted(atoms.members(q).min() for q in range(atoms.size))
    for source in set(problem.sources):
        ordered = sorted(spans[source])
        assert all(a[1] <= b[0] for a, b in pairwise(ordered))  # of like length
        sizes = [len(atoms.members(q)) for q in range(atoms.size) if problem.sources[atoms.members(q)[0]] == source]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-sum(sizes) // size)
    whole = sum(t * r * g for t, r, g in zip(problem.num_trained, rho, problem.sketch.astype(np.float64), strict=True))
    assert target_vector(problem, atoms, to_target=False) == pytest.approx(whole / problem.num_trained.sum(), abs=1e-9)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("steer", ["target", "pool"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_trainers_weighted_token_mean_is_the_matched_gradient(name, steer, size):
    # What row weights are for: sum_i w_i T_i g_i, the trainer's gradient on the choice, points as the matched sum does.
    problem, whole = some_problem(3), 0
    feature = problem.num_trained[:, None] * row_scale(problem.grad_norm, "clipped")[:, None] * problem.sketch
    aim = target_vector(problem, make_atoms(problem, size), to_target=steer == "target")
    for budget in range(12, 32):
        selection = choose(problem, budget, name, steer=steer, batch_size=size, max_weight=1000.0)
        assert selection.weights.mean() == pytest.approx(1, abs=1e-5)
        if any("used up the budget" in reason for reason in selection.reason):
            continue  # the last batch stands for its mean with some of its rows only
        whole += 1
        rows = [problem.ids.index(i) for i in selection.ids]
        trained = selection.weights.astype(np.float64) @ feature[rows]
        scale = trained @ aim / (trained @ trained)  # weights are normalized, so only the direction is known
        error = np.linalg.norm(scale * trained - aim) / np.linalg.norm(aim)
        assert error <= selection.details["residual"] + 1e-6
        assert selection.details["residual"] < 0.7
    assert whole >= (3 if name == "grad_match" or size == 1 else 0)


def test_weights_of_single_rows_are_those_of_the_pursuit():
    gradients = [(1, 0, 0), (0, 1, 0), (0.6, 0.8, 0), (-1, 0, 0), (0, 0.6, 0.8)]
    problem = fabricate(gradients, (2, 1, 0.5), tokens=[10, 10, 10, 10, 5])
    selection = choose(problem, 3, batch_size=1, ridge=0.0)
    assert selection.ids == ("r000", "r001", "r004")  # the specification's golden, rows of unit norm
    # 2, .625 and .625 by trained tokens 10, 10 and 5, scaled to mean 1
    assert selection.weights == pytest.approx(np.array([0.2, 0.0625, 0.125]) / 0.129166667, rel=1e-5)
    assert selection.details["residual"] == pytest.approx(0, abs=1e-7)
    assert selection.score[[0, 1, 4]].tolist() == [-1, -2, -3]
    assert np.isnan(selection.score[[2, 3]]).all()
    # lam = .5 in units of the mean squared length, here 1: the specification's second golden
    ridged = choose(replace(problem, num_trained=np.full(5, 10)), 3, batch_size=1, ridge=0.5)
    assert ridged.ids == ("r000", "r002", "r004")
    assert ridged.weights == pytest.approx(np.array([1.015184, 0.795372, 0.412148]) / 0.740901, rel=1e-5)
    assert ridged.details["residual"] == pytest.approx(0.547903 / np.sqrt(5.25), abs=1e-6)


def test_the_unit_of_the_gradient_changes_neither_rows_nor_weights():
    problem = some_problem(4)
    for steer in ("target", "pool"):
        one = choose(problem, 24, steer=steer)
        other = choose(replace(problem, sketch=problem.sketch * 64, grad_norm=problem.grad_norm * 64), 24, steer=steer)
        assert other.ids == one.ids
        assert other.weights == pytest.approx(one.weights, rel=1e-5)


def planted_clusters(seed, dim=40, per=16, num=10, wanted=3):
    rng = np.random.default_rng(seed)
    center = rng.normal(size=(num, dim))
    gradients = np.concatenate([c + rng.normal(size=(per, dim)) for c in center])
    sources = [f"c{k}" for k in range(num) for _ in range(per)]
    good = set(rng.permutation(num)[:wanted].tolist())
    aim = np.mean([gradients[k * per : (k + 1) * per].mean(axis=0) for k in good], axis=0)
    return fabricate(gradients, aim, sources=sources), {f"c{k}" for k in good}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_planted_clusters_of_the_target_get_the_weight(name, seed):
    problem, good = planted_clusters(seed)
    source = dict(zip(problem.ids, problem.sources, strict=True))
    selection = choose(problem, 48, name, batch_size=4)
    share = sum(w for i, w in weight_of(selection).items() if source[i] in good) / selection.weights.sum()
    drawn = choose(problem, 48, "random")
    assert share >= (0.8 if name == "grad_match" else 0.7)  # parts see fewer batches each
    assert np.mean([source[i] in good for i in drawn.ids]) < 0.45


def test_a_redundant_half_of_the_target_does_not_crowd_out_the_other():
    # 30 rows teach one half of the target loudly, 5 the other half quietly; a ranking takes the loud ones only.
    rng = np.random.default_rng(5)
    loud, quiet = np.eye(8)[0] * 1.1, np.eye(8)[1] * 0.9
    gradients = np.vstack([np.tile(loud, (30, 1)), np.tile(quiet, (5, 1))]) + rng.normal(scale=0.02, size=(35, 8))
    aim = np.eye(8)[0] * 1.1 + np.eye(8)[1]
    problem = fabricate(gradients, aim)
    ranked = choose(replace(problem, target_dot=gradients @ (aim / np.linalg.norm(aim))), 6, "target_cosine")
    matched = choose(problem, 6, batch_size=1, ridge=0.0)
    assert sum(i >= "r030" for i in ranked.ids) == 0
    assert sum(w for i, w in weight_of(matched).items() if i >= "r030") / matched.weights.sum() == pytest.approx(
        0.53, abs=0.06
    )
    assert matched.details["residual"] < 0.05


def test_the_pool_is_matched_where_no_target_is_given():
    problem = some_problem(8, aim=False)
    selection = choose(problem, 30)
    assert selection.details["steer"] == "pool"
    drawn = [choose(problem, 30, "random", seed=s) for s in range(5)]
    rho = row_scale(problem.grad_norm, "clipped")
    feature = problem.num_trained[:, None] * rho[:, None] * problem.sketch
    aim = feature.sum(axis=0) / problem.num_trained.sum()
    for other in drawn:
        rows = [problem.ids.index(i) for i in other.ids]
        mean = feature[rows].sum(axis=0) / problem.num_trained[rows].sum()
        assert selection.details["residual"] < np.linalg.norm(mean - aim) / np.linalg.norm(aim)
    assert choose(replace(some_problem(8)), 30).details["steer"] == "target"


def test_one_part_is_the_whole():
    for seed in range(5):
        problem = some_problem(seed)
        for steer in ("target", "pool"):
            one = choose(problem, 24, steer=steer)
            same = choose(problem, 24, "grad_match_partitioned", steer=steer, num_partitions=1)
            assert same.ids == one.ids
            assert same.weights.tolist() == one.weights.tolist()
            assert same.reason == one.reason


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.sampled_from(["target", "pool"]))
def test_the_joined_error_is_at_most_the_sum_over_the_parts(seed, num, steer):
    problem = some_problem(seed % 1000)
    found = choose(problem, 24, "grad_match_partitioned", seed=seed, num_partitions=num, steer=steer).details
    assert len(found["parts"]) == num
    assert found["residual"] <= found["sum_of_residuals"] + 1e-12
    assert found["sum_of_residuals"] == pytest.approx(sum(part["residual"] for part in found["parts"]))
    assert sum(part["num_atoms"] for part in found["parts"]) == found["num_atoms"]
    assert max(p["num_atoms"] for p in found["parts"]) - min(p["num_atoms"] for p in found["parts"]) <= 1


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=7).filter(any), st.data())
def test_shares_of_a_budget_add_up(costs, data):
    amount = data.draw(st.integers(0, sum(costs)))
    shares = share_out(np.array(costs), amount)
    assert shares.sum() == amount
    assert (shares <= costs).all()
    assert (np.abs(shares - np.array(costs) * amount / sum(costs)) < 1).all()


def test_parts_are_dealt_by_id_and_seed():
    problem = some_problem(2)
    atoms, cost = make_atoms(problem, 4), np.ones(problem.size, dtype=np.int64)
    one, again, other = (deal(atoms, problem, cost, 24, 3, stream(seed, "x")) for seed in (1, 1, 2))
    assert [p.tolist() for p in one] == [p.tolist() for p in again]
    assert [p.tolist() for p in one] != [p.tolist() for p in other]
    assert sorted(np.concatenate(one).tolist()) == list(range(atoms.size))
    assert len(deal(atoms, problem, problem.num_trained, 50, 3, stream(1, "x"))) == 1  # rows of up to 39 tokens


def test_rows_of_the_batch_that_uses_the_budget_up_are_cut_and_said():
    gradients = np.vstack([np.tile(np.eye(4)[k] * (4 - k), (4, 1)) for k in range(4)])
    problem = fabricate(gradients, (4, 3, 2, 1), sources=[f"s{k}" for k in range(4) for _ in range(4)])
    selection = choose(problem, 6, batch_size=4)
    assert selection.ids == ("r000", "r001", "r002", "r003", "r004", "r005")
    assert selection.reason_code[6] == "dropped:budget"
    assert "its batch used up the budget" in selection.reason[6]
    assert "was not picked before" in selection.reason[10]
    weights = weight_of(selection)
    # Two rows carry what four would have: one batch has weight 4/(1 + lam'), the other 3/..., each dealt by tokens.
    whole = choose(problem, 8, batch_size=4)
    ratio = weight_of(whole)["r004"] / weight_of(whole)["r000"]
    assert weights["r004"] / weights["r000"] == pytest.approx(2 * ratio, rel=1e-5)
    tokens = choose(problem, Budget(tokens=65), batch_size=4)  # rows of 10
    assert tokens.ids == selection.ids
    assert tokens.num_skipped == 2
    assert [tokens.reason_code[k] for k in (6, 7)] == ["dropped:does_not_fit"] * 2


def test_a_matching_that_wants_fewer_rows_than_asked_is_a_shortage_and_nothing_is_filled():
    gradients = np.vstack([np.eye(4)[0], np.eye(4)[1], -np.eye(4)[0], -np.eye(4)[1]])
    selection = choose(fabricate(gradients, (1, 1, 0, 0)), 4, batch_size=1)
    assert selection.ids == ("r000", "r001")
    note = next(n for n in selection.notes if n.code == "shortage")
    assert note.count == 2
    assert not selection.cut.known  # no row was settled by id
    assert "no batch that is left points towards" in note.text
    assert set(selection.reason_code[2:]) == {"dropped:not_needed"}


def test_copies_are_passed_over_and_counted():
    gradients = np.repeat(np.eye(3), 3, axis=0)
    selection = choose(fabricate(gradients, (1, 1, 1)), 9, batch_size=1)
    assert selection.ids == ("r000", "r003", "r006")
    assert next(n for n in selection.notes if n.code == "duplicate_atoms").count == 6
    assert selection.reason_code.count("dropped:duplicate") == 6
    assert next(n for n in selection.notes if n.code == "shortage").count == 6


def test_large_weights_are_clipped_and_counted():
    gradients = np.diag([1.0, 1, 1, 1, 0.01])
    problem = fabricate(gradients, (1, 1, 1, 1, 1))
    free = choose(problem, 5, batch_size=1, ridge=0.0, max_weight=1000.0)
    held = choose(problem, 5, batch_size=1, ridge=0.0, max_weight=2.0)
    assert weight_of(free)["r004"] / weight_of(free)["r000"] == pytest.approx(100, rel=1e-4)
    assert weight_of(held)["r004"] / weight_of(held)["r000"] == pytest.approx(2 * 104 / 5, rel=1e-4)
    assert weight_of(held)["r004"] == pytest.approx(5 * 41.6 / 45.6, rel=1e-4)  # scaled after the clip: above 2
    for name in FORMS:
        assert "once, before they are scaled to mean 1" in setting_words(methods()[name])["max_weight"]
    assert next(n for n in held.notes if n.code == "clipped_weights").count == 1
    assert not [n for n in free.notes if n.code == "clipped_weights"]
    assert next(n for n in free.notes if n.code == "concentrated_weights").text.startswith("one batch holds 96%")


def test_nearly_dependent_batches_are_said():
    problem = fabricate([(1, 0, 0), (1, 1e-5, 0), (0, 0, 1)], (1, 5e-6, 1))
    said = [n.code for n in choose(problem, 3, batch_size=1, ridge=0.0, tolerance=0.0).notes]
    assert "near_singular" in said
    assert "near_singular" not in [n.code for n in choose(problem, 3, batch_size=1).notes]


@pytest.mark.parametrize("name", FORMS)
def test_a_pool_that_opposes_the_target_is_refused_and_not_filled(name):
    problem = some_problem(1, num_sources=1)
    against = replace(problem, sketch=-np.abs(problem.sketch))
    with pytest.raises(InfeasibleError, match="no row to choose") as refusal:
        choose(against, 12, name)
    assert "no_atom_helps" in str(refusal.value)


def test_few_batches_and_small_budgets_make_fewer_parts():
    problem = some_problem(1)
    notes = {n.code: n.count for n in choose(problem, 2, "grad_match_partitioned", num_partitions=5).notes}
    assert notes["fewer_partitions"] == 3
    assert "small_partitions" not in notes
    notes = {n.code: n.count for n in choose(problem, 30, "grad_match_partitioned", batch_size=6).notes}
    assert notes["small_partitions"] == 4
    assert "fewer_partitions" not in notes


@pytest.mark.parametrize(("budget", "rows"), [(24, 1), (40, 2), (700, 16)])
def test_batches_shrink_with_the_budget(budget, rows):
    problem = some_problem(1, n=800)
    assert batch_rows(problem, resolve_budget(problem, Budget(rows=budget))) == rows
    tokens = int(budget * problem.num_trained.mean()) + 1
    assert batch_rows(problem, resolve_budget(problem, Budget(tokens=tokens))) == rows


def test_what_a_target_needs_is_refused_by_name():
    problem = some_problem(1)
    with pytest.raises(SignalError, match="target"):
        choose(replace(problem, target=None), 5, steer="target")
    with pytest.raises(SignalError, match="sketch of the target") as refusal:
        choose(replace(problem, direction_sketch=None), 5)
    assert "direction_sketch" in str(refusal.value)
    bad = np.array(problem.sketch)
    bad[3] = np.inf
    with pytest.raises(NumericsError, match=problem.ids[3]):
        choose(replace(problem, sketch=bad), 5)
    for wrong in ({"ridge": -1}, {"max_weight": 0.5}, {"batch_size": 0}, {"tolerance": 1}, {"num_partitions": 0}):
        with pytest.raises(ConfigError):
            make_method("grad_match_partitioned", wrong)
