"""less: the specification's aggregation, turns of subtasks, near-copies, and what another measurement could move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError, SignalError
from gradsift.geometry.checkpoints import CheckpointSignals, unit_rows
from gradsift.methods import make_method
from gradsift.seeds import stream
from gradsift.types import Budget, Direction, Problem


def problem(features, target, subtasks, noise=0.0, count=2):
    n = len(features)
    one = CheckpointSignals(np.asarray(features, dtype=np.float32), np.asarray(target, dtype=np.float32), 1e-4, noise)
    return Problem(
        ids=tuple(f"z{i + 1:03d}" for i in range(n)), sources=("pool",) * n, num_tokens=np.full(n, 20),
        num_trained=np.random.default_rng(1).integers(3, 9, size=n), num_read=n, num_trained_read=9 * n,
        grad_norm=np.ones(n), checkpoints=(one,) * count, subtasks=tuple(subtasks),
        target=Direction("target", "target", 1.0, 4, 9, 0.9, 0.0), gram=np.eye(1),
    )  # fmt: skip


def choose(some, budget=Budget(rows=2), **config):  # noqa: B008 - frozen
    return make_method("less", config).select(some, budget, stream(1, "select/less"))


def spread(seed, n=30, items=6, dim=24):
    rng = np.random.default_rng(seed)
    return unit_rows(rng.normal(size=(n, dim))), unit_rows(rng.normal(size=(items, dim)))


COSINES = np.array([[0.10, 0.20, 0.30, 0.40, 0.00, 0.05], [0.20, 0.25, 0.15, 0.10, 0.10, 0.10]])


def golden():
    """Two rows whose cosines with six orthogonal target rows are those of the specification."""
    rest = np.sqrt(1 - np.square(COSINES).sum(axis=1))
    features = np.hstack([COSINES, np.diag(rest)])
    return problem(features, np.eye(8)[:6], "AAABBB")


def test_the_aggregation_of_the_specification():
    turns = choose(golden())
    assert turns.ids == ("z001", "z002")
    assert "taken by A" in turns.reason[0]
    assert "taken by B" in turns.reason[1]
    best = choose(golden(), aggregate="max")
    np.testing.assert_allclose(best.score, [0.20, 0.20], atol=1e-6)
    assert best.ids == ("z001", "z002"), "a tie goes to the smaller row"
    assert choose(golden(), Budget(rows=1), aggregate="max").ids == ("z001",)


def test_the_rows_chosen_are_counted_by_the_subtask_that_they_serve_best():
    for how in ("max", "round_robin"):
        note = next(n for n in choose(golden(), aggregate=how).notes if n.code == "subtasks")
        assert note.text.endswith("A 2, B 0")
    alone = problem(*spread(1), "T" * 6)
    assert "subtasks" not in {n.code for n in choose(alone).notes}


def test_the_cold_form_asks_nothing_of_epochs():
    needs = make_method("less", {"allow_cold": True, "epochs": 0}).needs
    assert needs.warmup.epochs == 0


def slow_turns(table, count):
    left, out, turn = list(range(len(table))), [], 0
    while len(out) < count:
        column = table[:, turn % table.shape[1]]
        best = max(left, key=lambda z: (column[z], -z))
        out.append(best)
        left.remove(best)
        turn += 1
    return out


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_subtasks_take_in_turn(seed, rows):
    features, target = spread(seed)
    labels = "aabbcc"
    found = choose(problem(features, target, labels), Budget(rows=rows), redundancy=1.0)
    table = np.column_stack(
        [(features @ target.T)[:, [k for k, x in enumerate(labels) if x == s]].mean(axis=1) for s in "abc"]
    )
    assert [int(i[1:]) - 1 for i in found.ids] == slow_turns(table.astype(np.float32), rows)


def test_max_can_starve_a_subtask_and_turns_cannot():
    features, _ = spread(1, n=20)
    target = unit_rows(
        np.stack([features[:10].mean(axis=0), 0.1 * features[15] + features[:10].mean(axis=0) * 0 + features[16]])
    )
    some = problem(features, target, "ab")
    turns, best = choose(some, Budget(rows=4)), choose(some, Budget(rows=4), aggregate="max")
    assert sum("taken by b" in r for r in turns.reason) == 2
    assert turns.ids[1] == "z017"
    assert best.ids[0] == "z017"


def test_names_of_subtasks_change_nothing_but_the_order_of_turns():
    features, target = spread(2)
    one = choose(problem(features, target, "aabbcc"), Budget(rows=9), aggregate="max")
    other = choose(problem(features, target, "ccaabb"), Budget(rows=9), aggregate="max")
    assert one.ids == other.ids


def test_near_copies_of_a_taken_row_are_left_out_and_counted():
    features, target = spread(3)
    features[7] = features[3]
    features[9] = unit_rows(features[3][None] + 0.01)[0]
    target[0] = unit_rows(features[3][None] + 0.1)[0]
    some = problem(features, target[:1], "a")
    found = choose(some, Budget(rows=5), redundancy=0.95)
    assert found.ids[0] in ("z004", "z010")
    assert len({"z004", "z008", "z010"} & set(found.ids)) == 1
    assert found.reason_code.count("dropped:redundant") == 2
    assert next(note.count for note in found.notes if note.code == "redundant") == 2
    assert len(found.ids) == 5
    every = choose(some, Budget(rows=5))
    assert {"z004", "z008", "z010"} <= set(every.ids)
    whole = choose(some, Budget(rows=30), redundancy=0.95)
    assert len(whole.ids) == 28
    assert next(note.count for note in whole.notes if note.code == "shortage") == 2


def test_without_near_copies_the_rule_changes_nothing():
    features, target = spread(4)
    some = problem(features, target, "aabbcc", noise=1e-3)
    for aggregate in ("round_robin", "max"):
        on, off = (choose(some, Budget(rows=9), aggregate=aggregate, redundancy=r) for r in (0.95, 1.0))
        assert on.ids == off.ids
        assert on.cut == off.cut


@pytest.mark.parametrize("aggregate", ["round_robin", "max"])
@pytest.mark.parametrize("threshold", [0.3, 0.95, 1.0])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 30), noise=st.sampled_from([1e-4, 3e-3, 3e-2]))
def test_another_measurement_changes_undecided_rows_only(aggregate, threshold, seed, rows, noise):
    rng = np.random.default_rng([seed, 1])
    features, target = spread(seed, dim=6)
    some = problem(features, target, "aabbcc", noise=noise)
    first = choose(some, Budget(rows=rows), aggregate=aggregate, redundancy=threshold)
    for _ in range(2):
        step = rng.normal(size=features.shape)
        step *= 0.49 * noise / np.linalg.norm(step, axis=1, keepdims=True)  # a distance of less than half the bound
        again = choose(problem(unit_rows(features + step), target, "aabbcc", noise=noise), Budget(rows=rows),
                       aggregate=aggregate, redundancy=threshold)  # fmt: skip
        assert set(first.ids) ^ set(again.ids) <= set(first.cut.undecided)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="trains the navigator"):
        make_method("less", {"epochs": 0})
    with pytest.raises(ConfigError, match="directions"):
        make_method("less", {"direction": "none"})
    with pytest.raises(ConfigError, match="checkpoint after an epoch"):
        make_method("less", {"num_checkpoints": 3, "epochs": 2})
    cold = make_method("less", {"allow_cold": True}).needs.warmup
    assert (cold.epochs, cold.direction, cold.num_checkpoints) == (0, "raw", 1)


def test_directions_of_other_rows_are_refused():
    features, target = spread(5)
    some = problem(features, target, "aabbcc")
    from dataclasses import replace

    with pytest.raises(SignalError, match="not those of these rows"):
        choose(replace(some, checkpoints=tuple(replace(c, features=c.features[1:]) for c in some.checkpoints)))
    with pytest.raises(SignalError, match="not those of these rows"):
        choose(replace(some, subtasks=("a",)))


def test_a_subtask_on_which_all_rows_are_alike_is_said():
    features, target = spread(6)
    target[5] = 0
    notes = choose(problem(features, target, "aaaaab")).notes
    assert next(note for note in notes if note.code == "flat_subtask").text.endswith("on b")
