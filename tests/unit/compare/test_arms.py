"""Arms: within budget, replay as asked, honest about costs and shortages, and placebos that know nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tests.mini import BUDGET, desk, taught

from gradsift.compare.arms import (
    ArmSpec,
    Desk,
    build_settings,
    choose,
    choose_own,
    composition,
    disguise,
    draw_replay,
    keyed_order,
)
from gradsift.errors import ConfigError
from gradsift.seeds import stream
from gradsift.train.crossfit import CrossfitConfig
from gradsift.types import SIGNALS

PROBE = {"num_steps": 2, "batch_size": 8}
ARMS = [
    ArmSpec("random", "random"),
    ArmSpec("loss", "loss", {"band": "low"}),
    ArmSpec("bm25", "bm25"),
    ArmSpec("rds", "rds"),
    ArmSpec("cosine", "target_cosine"),
    ArmSpec("dual", "ogs_dual", {"kappa": 1.0}),
    ArmSpec("permuted", "target_cosine", placebo="permuted_scores"),
    ArmSpec("domain", "domain_looking"),
    ArmSpec("crossfit", "crossfit", PROBE),
    ArmSpec("oracle", "oracle"),
]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shared(_own_cache):
    return desk()


def with_other_order(some):
    """The same world, its pool and its replay rows listed the other way round."""
    return Desk(replace(some.world, pool=some.world.pool[::-1], replay=some.world.replay[::-1]), some.budget)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_keeps_to_its_budget_and_its_share_of_replay(shared, arm, share):
    choice = choose(shared, replace(arm, replay=share))
    replay = [i for i in choice.ids if i.startswith("replay-")]
    own = choice.ids[: len(choice.ids) - len(replay)]
    assert len(replay) == round(share * BUDGET)
    assert choice.ids[len(own) :] == tuple(replay), "replay rows last"
    assert len(own) == BUDGET - len(replay)
    assert len(set(own)) == len(own)
    assert set(own) <= {row.id for row in shared.world.pool}
    repeats = Counter(replay).values()
    assert max(repeats, default=0) - min(repeats, default=0) <= (1 if len(repeats) == len(shared.world.replay) else 0)
    shares = composition(shared.world, choice.ids)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares.get("replay set", 0.0) == pytest.approx(len(replay) / BUDGET)
    assert set(choice.weights) <= set(choice.ids)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_the_same_seed_chooses_the_same(shared, arm):
    fresh = Desk(shared.world, BUDGET)
    assert choose(shared, arm).ids == choose(fresh, arm).ids


@pytest.mark.parametrize("name", ["random", "loss", "bm25", "cosine", "dual", "domain", "crossfit", "oracle"])
def test_the_order_of_the_pool_chooses_nothing(shared, name):
    arm = replace(next(arm for arm in ARMS if arm.name == name), replay=0.25)
    assert choose(with_other_order(shared), arm).ids == choose(shared, arm).ids


def test_draws_are_keyed_by_id_and_seed(shared):
    order = keyed_order(shared)
    assert sorted(order) == [row.id for row in shared.world.pool]
    assert keyed_order(with_other_order(shared)) == order
    fewer = Desk(replace(shared.world, pool=shared.world.pool[::2]), BUDGET)
    kept = {row.id for row in fewer.world.pool}
    assert keyed_order(fewer) == [i for i in order if i in kept]
    reseeded = Desk(replace(shared.world, seed=9), BUDGET)
    assert keyed_order(reseeded) != order
    assert draw_replay(reseeded, 8) != draw_replay(shared, 8)


def test_replay_rows_are_each_drawn_as_often_as_any_other(shared):
    ids = {row.id for row in shared.world.replay}
    assert draw_replay(shared, 0) == ()
    assert set(draw_replay(shared, len(ids))) == ids
    drawn = draw_replay(shared, 2 * len(ids) + 3)
    assert drawn[: len(ids)] == draw_replay(shared, len(ids))
    assert sorted(Counter(drawn).values()) == [2] * (len(ids) - 3) + [3] * 3


def test_a_world_without_replay_rows_refuses_replay(shared):
    bare = Desk(replace(shared.world, replay=()), BUDGET)
    assert draw_replay(bare, 0) == ()
    with pytest.raises(ConfigError, match="no replay rows"):
        choose(bare, ArmSpec("random", "random", replay=0.25))


def test_the_oracle_takes_clean_and_replay_rows_five_to_three(shared):
    choice = choose_own(shared, ArmSpec("oracle", "oracle"), 40)
    assert composition(shared.world, choice.ids) == {"clean": 0.625, "replay": 0.375}
    assert choice.cost == {}
    assert choice.notes == ()


@pytest.mark.parametrize("method", ["oracle", "domain_looking"])
def test_a_shortage_is_said(shared, method):
    choice = choose_own(shared, ArmSpec("arm", method), len(shared.world.pool))
    most = 60 + 30 if method == "oracle" else 60 + 30 + 8  # clean, replay; clean, noise, duplicate
    assert len(choice.ids) == most
    assert choice.notes == (f"shortage: {most} of {len(shared.world.pool)} rows",)


def test_domain_looking_rows_carry_the_domains_operator(shared):
    ids = choose_own(shared, ArmSpec("domain", "domain_looking"), 30).ids
    assert {shared.world.kinds[i] for i in ids} <= {"clean", "noise", "duplicate"}
    assert ids == tuple(i for i in keyed_order(shared) if i in shared.world.looks_domain)[:30]


def test_an_arm_pays_for_what_it_reads(shared):
    world = shared.world
    size = sum(p.numel() for p in world.make_model().parameters())
    measured = len({row.input_ids.tobytes() for row in world.pool})
    tokens = 6 * (measured + len(world.anchors["A"]) + len(world.target))
    paid = {arm.name: sum(c.flops for c in choose_own(shared, arm, 10).cost.values()) for arm in ARMS}
    free = ("random", "bm25", "domain", "oracle")
    assert [paid[name] for name in free] == [0.0] * 4
    for name in ("cosine", "dual", "permuted"):
        assert paid[name] == pytest.approx(6.0 * size * tokens)
    for name in ("loss", "rds"):
        assert paid[name] == pytest.approx(2.0 * size * tokens)
    assert set(choose_own(shared, ARMS[8], 10).cost) == {"base", "probes"}
    assert paid["crossfit"] > 0


def test_full_takes_every_row_whatever_the_budget(shared):
    choice = choose_own(shared, ArmSpec("full", "full"), 10)
    assert sorted(choice.ids) == [row.id for row in shared.world.pool]
    assert choice.cost == {}


def test_permuted_scores_are_the_same_scores_of_other_rows(shared):
    problem, _ = shared.start
    sham = disguise(problem, "permuted_scores", stream(0, "placebo"))
    assert sham.ids == problem.ids
    keys = {}
    for name in SIGNALS:
        real, dealt = getattr(problem, name), getattr(sham, name)
        assert (real is None) == (dealt is None)
        if real is not None:
            keys[name] = (real.reshape(problem.size, -1), dealt.reshape(problem.size, -1))
            assert np.array_equal(
                np.sort(real.reshape(problem.size, -1), 0), np.sort(dealt.reshape(problem.size, -1), 0)
            )
    whole = [np.concatenate([np.asarray(pair[side], np.float64) for pair in keys.values()], 1) for side in (0, 1)]
    # every signal of a row goes to the same other row, so what is dealt is a permutation of whole rows
    assert Counter(map(bytes, np.ascontiguousarray(whole[0]))) == Counter(map(bytes, np.ascontiguousarray(whole[1])))
    moved = (whole[0] != whole[1]).any(1).mean()
    assert moved > 0.9
    assert abs(np.corrcoef(problem.target_cos, sham.target_cos)[0, 1]) < 0.3
    other = disguise(problem, "permuted_scores", stream(1, "placebo"))
    assert not np.array_equal(other.loss, sham.loss)


def test_a_placebo_chooses_other_rows_than_the_method(shared):
    real, sham = (
        choose_own(shared, ArmSpec("arm", "target_cosine", placebo=p), 30).ids for p in ("", "permuted_scores")
    )
    by_chance = 30 * 30 / len(shared.world.pool)
    assert len(set(real) & set(sham)) < by_chance + 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"replay": 1.0}, "replay"),
        ({"replay": -0.1}, "replay"),
        ({"train": {"wiseft": 0.5}}, "wiseft"),
        ({"method": "crossfit", "placebo": "permuted_scores"}, "no scores to permute"),
        ({"method": "oracle", "placebo": "permuted_scores"}, "no scores to permute"),
        ({"method": "domain_looking", "placebo": "permuted_scores"}, "no scores to permute"),
    ],
)
def test_arms_that_would_not_be_what_they_say_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        ArmSpec(**{"name": "arm", "method": "random", **given})


def test_unknown_placebos_and_settings_are_refused(shared):
    with pytest.raises(ConfigError, match="no such placebo"):
        choose(shared, ArmSpec("arm", "target_cosine", placebo="shuffled"))
    with pytest.raises(ConfigError, match="nonsense"):
        choose(shared, ArmSpec("arm", "crossfit", {"nonsense": 1}))
    with pytest.raises(ConfigError, match="wrong value"):
        build_settings(CrossfitConfig, {"num_steps": "many"}, "arm")
    with pytest.raises(ConfigError, match="trust"):
        build_settings(CrossfitConfig, {"trust": 2.0}, "arm")
    assert build_settings(CrossfitConfig, {"lr": 1}, "arm").lr == 1.0


def test_composition_falls_back_to_sources_where_nothing_was_planted():
    world = replace(taught(), kinds={}, sources={"a": "web", "b": "books"})
    assert composition(world, ["a", "b", "a", "replay-00-00"]) == {"books": 0.25, "replay set": 0.25, "web": 0.5}
