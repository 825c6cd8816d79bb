"""Influence over checkpoints: the specification's figures, the slow twin, and near-copies left out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError
from gradsift.geometry.checkpoints import CheckpointSignals, Warmup, checkpoint_weights, unit_rows
from gradsift.geometry.influence import has_alike, influence_table, joint_features, walk_unlike

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
LRS = [1.6877e-5, 1.2859e-5, 7.703e-6, 2.5616e-6]


def checkpoints(rng, num=12, items=5, dim=7, count=3):
    return tuple(
        CheckpointSignals(unit_rows(rng.normal(size=(num, dim))), unit_rows(rng.normal(size=(items, dim))), lr)
        for lr in rng.uniform(0.1, 1, size=count)
    )


def test_the_weights_of_the_specification():
    np.testing.assert_allclose(checkpoint_weights(LRS), [0.421919, 0.321470, 0.192572, 0.064039], atol=1e-6)
    np.testing.assert_array_equal(checkpoint_weights([0.0, 0.0]), [0.5, 0.5])


def slow(made, labels, z, subtask):
    total = sum(one.lr for one in made)
    found = []
    for q, label in enumerate(labels):
        if label == subtask:
            found.append(sum(one.lr / total * float(np.dot(one.features[z].astype(float), one.target[q].astype(float)))
                             for one in made))  # fmt: skip
    return sum(found) / len(found)


@few
@given(st.integers(0, 2**32 - 1))
def test_it_equals_its_twin_and_stays_within_one(seed):
    rng = np.random.default_rng(seed)
    made, labels = checkpoints(rng), ("b", "a", "b", "c", "a")
    found = influence_table(made, labels)
    assert found.subtasks == ("a", "b", "c")
    want = [[slow(made, labels, z, name) for name in found.subtasks] for z in range(12)]
    np.testing.assert_allclose(found.table, want, atol=1e-6)
    assert np.abs(found.table).max() <= 1


@few
@given(st.integers(0, 2**32 - 1))
def test_equal_checkpoints_rank_as_one_and_the_order_of_rows_is_nothing(seed):
    rng = np.random.default_rng(seed)
    (one,), labels = checkpoints(rng, count=1), ("a",) * 5
    np.testing.assert_allclose(
        influence_table((one, one, one), labels).table, influence_table((one,), labels).table, atol=1e-7
    )
    turn = rng.permutation(12)
    moved = CheckpointSignals(one.features[turn], one.target, one.lr)
    np.testing.assert_array_equal(influence_table((moved,), labels).table, influence_table((one,), labels).table[turn])
    longer = CheckpointSignals(unit_rows(one.features * rng.uniform(0.1, 9, size=(12, 1))), one.target, one.lr)
    np.testing.assert_allclose(
        influence_table((longer,), labels).table, influence_table((one,), labels).table, atol=1e-6
    )


def test_joint_features_multiply_to_the_weighted_mean_of_cosines():
    made = checkpoints(np.random.default_rng(1))
    w, joint = checkpoint_weights([one.lr for one in made]), joint_features(made)
    want = sum(v * one.features @ one.features.T for v, one in zip(w, made, strict=True))
    np.testing.assert_allclose(joint @ joint.T, want, atol=1e-6)
    np.testing.assert_array_equal(joint_features(made, np.array([3, 1])), joint[[3, 1]])


def slow_walk(order, features, cost, amount, threshold):
    taken, left = [], amount
    redundant, skipped = {}, []
    for row in order:
        if left < max(1, cost.min()):
            break
        cosines = [float(features[row] @ features[t]) for t in taken]
        if cosines and max(cosines) > threshold:
            redundant[row] = taken[int(np.argmax(cosines))]
        elif cost[row] > left:
            skipped.append(row)
        else:
            taken.append(row)
            left -= cost[row]
    return taken, redundant, skipped


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([0.2, 0.7, 0.95]), st.booleans())
def test_the_walk_equals_its_twin_across_blocks(seed, amount, threshold, tokens):
    from gradsift.geometry import influence

    rng = np.random.default_rng(seed)
    features, order = unit_rows(rng.normal(size=(40, 3))), rng.permutation(40)
    cost = rng.integers(1, 6, size=40) if tokens else np.ones(40, dtype=np.int64)
    before, influence.WALK = influence.WALK, 7
    try:
        walked = walk_unlike(order, features, cost, amount, threshold=threshold)
        alike = has_alike(features[walked.chosen], threshold)
    finally:
        influence.WALK = before
    taken, redundant, skipped = slow_walk(order.tolist(), features, cost, amount, threshold)
    assert walked.chosen.tolist() == taken
    assert walked.redundant == redundant
    assert walked.skipped.tolist() == skipped
    assert not alike
    assert sorted([*taken, *redundant, *skipped, *walked.rest.tolist()]) == list(range(40))


def test_pairs_are_found_wherever_they_stand(monkeypatch):
    from gradsift.geometry import influence

    monkeypatch.setattr(influence, "WALK", 4)
    features = np.eye(12, dtype=np.float32)
    assert not has_alike(features, 0.5)
    for a, b in ((0, 11), (4, 5), (3, 4), (10, 11)):
        some = features.copy()
        some[b] = some[a]
        assert has_alike(some, 0.5)


def test_a_comparison_at_the_threshold_is_said_to_be_open():
    features = unit_rows(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.01]]))
    whole = walk_unlike(np.arange(3), features, np.ones(3, dtype=np.int64), 3, threshold=0.5, reach=0.01)
    near = walk_unlike(np.arange(3), features, np.ones(3, dtype=np.int64), 3, threshold=0.9999, reach=0.01)
    assert (whole.settled, near.settled) == (3, 2)


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"share": 1.5}, {"epochs": -1}, {"num_checkpoints": 0}, {"num_checkpoints": 2},
              {"epochs": 0, "direction": "adam"}],
)  # fmt: skip
def test_a_warm_up_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError):
        Warmup(**wrong)


def test_checkpoints_are_spread_evenly_and_end_at_the_end():
    assert Warmup(epochs=4, num_checkpoints=2).kept_epochs == (2, 4)
    assert Warmup(epochs=4, num_checkpoints=4).kept_epochs == (1, 2, 3, 4)
    assert Warmup(epochs=5, num_checkpoints=2).kept_epochs == (2, 5)
    assert Warmup(epochs=0, direction="raw").kept_epochs == (0,)
    for epochs in range(1, 12):
        for count in range(1, epochs + 1):
            kept = Warmup(epochs=epochs, num_checkpoints=count).kept_epochs
            assert len(set(kept)) == count
            assert kept[-1] == epochs
