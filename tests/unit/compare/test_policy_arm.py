"""The arm ogs in a miniature of the arithmetic world: it pays for its roll-outs and may choose replay rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.mini import desk

from gradsift.compare.arms import ArmSpec, Desk, choose
from gradsift.compare.policy_arm import RolloutSettings, WorldLearner, _split
from gradsift.errors import ConfigError
from gradsift.train.held_out import DevSets

SETTINGS = {
    "num_epochs": 2, "num_episodes": 4, "num_confirmed": 1, "num_clusters": 3, "rows_per_decision": 8, "allowed_nats": 5.0,
    "rollout": {"lr": 1e-2, "updates": 1},
}  # fmt: skip
ARM = ArmSpec("ogs", "ogs", SETTINGS)
COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shared(_own_cache):
    return desk(budget=COUNT)


@pytest.fixture(scope="module")
def chosen(shared):
    return choose(shared, ARM)


def learner(shared, settings=RolloutSettings(lr=1e-2, updates=2)):  # noqa: B008 - frozen
    world = shared.world
    rows = tuple(sorted((*world.pool, *world.replay), key=lambda row: row.id))
    some = WorldLearner(world, rows, DevSets(world.target[:3], {"A": world.anchors["A"][:3]}, world.pad_id), settings)
    some.start(4)
    return some


def test_it_keeps_to_its_budget_and_says_what_it_did(shared, chosen):
    known = {row.id for row in (*shared.world.pool, *shared.world.replay)}
    assert len(chosen.ids) == len(set(chosen.ids)) == COUNT
    assert set(chosen.ids) <= known
    assert any("learned policy" in note or "simulator" in note for note in chosen.notes)
    assert {"simulator_accepted", "simulator_horizon", "policy_learned", "policy_feasible"} <= set(chosen.extra)
    gains = [name for name in chosen.extra if name.startswith("gain_")]
    assert {"gain_uniform", "gain_best_single", "gain_mixture_regression_1"} <= set(gains)
    assert all(np.isfinite(value) for value in chosen.extra.values())


def test_it_pays_for_the_pass_and_for_every_roll_out(shared, chosen):
    assert set(chosen.cost) == {"collect", "rollouts"}
    size = sum(p.numel() for p in shared.world.make_model().parameters())
    spent = chosen.cost["rollouts"]
    assert spent.backward_tokens > 8 * COUNT * 6  # at least six roll-outs of the calibration and two of its test
    assert spent.forward_tokens > spent.backward_tokens  # and the measuring between the decisions
    assert spent.flops == pytest.approx(size * (2.0 * spent.forward_tokens + 4.0 * spent.backward_tokens))
    assert spent.seconds > 0
    assert chosen.cost["collect"].backward_tokens > 0


def test_replay_rows_are_rows_like_any_other(shared):
    """More rows are asked for than the pool has."""
    count = len(shared.world.pool) + 5
    quick = replace(ARM, settings={**SETTINGS, "num_epochs": 1, "rows_per_decision": 60})
    got = choose(Desk(shared.world, count), quick)
    replayed = [i for i in got.ids if i in {row.id for row in shared.world.replay}]
    assert len(replayed) >= 5
    assert len(set(got.ids)) == len(got.ids)


def test_the_same_seed_chooses_the_same_whatever_the_order_of_the_pool(shared, chosen):
    world = shared.world
    turned = replace(world, pool=world.pool[::-1], replay=world.replay[::-1])
    got = choose(Desk(turned, COUNT), ARM)
    assert got.ids == chosen.ids
    assert {k: v for k, v in got.extra.items() if k.startswith("gain_")} == {
        k: v for k, v in chosen.extra.items() if k.startswith("gain_")
    }


def test_held_out_rows_are_no_part_of_the_directions(shared):
    for name, rows in {**shared.world.anchors, "target": shared.world.target}.items():
        kept, held = _split(rows, RolloutSettings(dev_share=0.4, dev_rows=3), 0, name)
        assert len(held) == 3
        assert {row.id for row in kept} | {row.id for row in held} == {row.id for row in rows}
        assert not {row.id for row in kept} & {row.id for row in held}
        again, _ = _split(rows[::-1], RolloutSettings(dev_share=0.4, dev_rows=3), 0, name)
        assert {row.id for row in again} == {row.id for row in kept}


def test_what_cannot_be_split_is_refused(shared):
    few = {name: rows[:1] for name, rows in shared.world.anchors.items()}
    with pytest.raises(ConfigError, match="too few rows to hold some out"):
        choose(Desk(replace(shared.world, anchors=few), COUNT), ARM)


def test_a_schedule_is_trained_once(shared):
    some, rows = learner(shared), np.array([[0, 1, 2, 3], [4, 5, 6, -1]])
    one = some.roll(rows, "first")
    spent = some.cost
    two = some.roll(rows, "second")
    assert some.cost == spent
    assert (one.name, two.name) == ("first", "second")
    assert one.target.tolist() == two.target.tolist()
    assert len(one.target) == 3
    assert one.target[0] != one.target[2]
    other = some.roll(rows[::-1].copy(), "third")
    assert some.cost.backward_tokens == 2 * spent.backward_tokens
    assert other.target[0] == one.target[0]  # each starts at the same weights
    some.save("state", {"a": np.ones(2)})
    assert some.load("state")["a"].tolist() == [1.0, 1.0]
    assert some.load("nothing") is None


def test_a_placebo_is_refused():
    with pytest.raises(ConfigError, match="no scores to permute"):
        ArmSpec("fake", "ogs", SETTINGS, placebo="permuted_scores")


def test_a_world_without_replay_rows_is_refused(shared):
    with pytest.raises(ConfigError, match="replay rows as general rows"):
        choose(Desk(replace(shared.world, replay=()), COUNT), ARM)


@pytest.mark.parametrize(
    "rollout",
    [
        {"speed": 1},
        {"dev_share": 0.0},
        {"lr": "fast"},
        {"updates": 0},
        {"dev_share": 1.5},
        {"lr": 0.0},
        {"dev_rows": 0},
    ],
    ids=str,
)
def test_wrong_settings_of_the_roll_outs_are_named(shared, rollout):
    arm = replace(ARM, settings={**SETTINGS, "rollout": rollout})
    with pytest.raises(ConfigError) as refusal:
        choose(shared, arm)
    assert "ogs" in refusal.value.where
    assert next(iter(rollout)) in str(refusal.value)
