"""Arms of grads and less: trained and measured once, charged in full, and within the rules of every arm."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.mini import BUDGET, desk
from tests.toy import toy_lora

from gradsift.compare.arms import ArmSpec, Desk, choose_own
from gradsift.compare.checkpoint import WarmupSettings, is_trained, measure_trained
from gradsift.compare.world import World
from gradsift.errors import ConfigError
from gradsift.geometry.checkpoints import Warmup
from gradsift.geometry.influence import influence_table
from gradsift.methods import make_method
from gradsift.types import RowStatus, TokenRow

TRAIN = {"lr": 1e-3, "batch_size": 16, "sketch_dim": 251}
GRADS = ArmSpec("grads", "grads", {"warmup": TRAIN})
LESS = ArmSpec("less", "less", {"warmup_share": 0.3, "warmup": TRAIN})


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shared(_own_cache):
    return desk()


@pytest.mark.parametrize("arm", [GRADS, LESS], ids=lambda arm: arm.name)
def test_an_arm_pays_for_its_training_and_all_its_passes(shared, arm):
    assert is_trained(arm)
    choice = choose_own(shared, arm, BUDGET)
    assert len(set(choice.ids)) == len(choice.ids) == BUDGET
    again = choose_own(shared, arm, BUDGET)
    assert again.ids == choice.ids
    assert again.cost == choice.cost
    _, start = shared.start
    world = shared.world
    distinct = sum(row.num_tokens for row in world.pool if row.id not in world.copy_of)
    passes = 1 if arm is GRADS else 2
    assert choice.cost["collect"].forward_tokens == start.forward_tokens + (passes - 1) * (
        distinct + sum(row.num_tokens for row in world.target)
    )
    trained = choice.cost["warmup"].forward_tokens
    assert trained == distinct if arm is GRADS else 4 * 0.2 * distinct < trained < 4 * 0.4 * distinct


def test_without_a_training_the_arm_reads_the_shared_pass(shared):
    arm = ArmSpec("base", "grads", {"at_base": True})
    assert not is_trained(arm)
    assert set(choose_own(shared, arm, BUDGET).cost) == {"collect"}
    assert not is_trained(ArmSpec("oracle", "oracle"))
    assert choose_own(shared, arm, BUDGET).ids != choose_own(shared, GRADS, BUDGET).ids


def test_arms_share_a_training_and_others_do_not(shared):
    settings = WarmupSettings(**TRAIN)
    one = measure_trained(shared, Warmup(), settings)
    assert measure_trained(shared, Warmup(), WarmupSettings(**TRAIN)) is one
    assert measure_trained(shared, Warmup(), replace(settings, lr=2e-3)) is not one


def test_a_placebo_deals_the_directions_to_other_rows(shared):
    sham = choose_own(shared, replace(LESS, placebo="permuted_scores"), BUDGET)
    real = choose_own(shared, LESS, BUDGET)
    problem = measure_trained(
        shared, make_method("less", {"warmup_share": 0.3}).needs.warmup, WarmupSettings(**TRAIN)
    ).problem
    table = influence_table(problem.checkpoints, problem.subtasks).table[:, 0]
    place = {name: k for k, name in enumerate(problem.ids)}
    real_mean, sham_mean = (np.mean([table[place[i]] for i in c.ids]) for c in (real, sham))
    assert real_mean > np.quantile(table, 0.75)
    assert abs(sham_mean - table.mean()) < 0.5 * (real_mean - table.mean())


def toy_world():
    """Rows of one language, 5% of them of another of which the target has four."""
    rng = np.random.default_rng(5)

    def row(name, low):
        ids = (low + (rng.integers(8) + np.arange(10)) % 8).astype(np.int32)  # what comes next is known
        ids[:3] = rng.integers(low, low + 8, size=3)
        return TokenRow(name, ids, np.arange(10) > 2, 10, RowStatus.OK)

    rows = [row(f"p{k:03d}", 20 if k % 20 == 7 else 4) for k in range(120)]
    target = tuple(row(f"t{k}", 20) for k in range(4))
    texts = {one.id: "words" for one in (*rows, *target)}
    return World(
        "toy", 0, lambda: toy_lora(0), tuple(rows), {}, {}, texts, {}, target, (), (), "loss", 3
    ), {one.id for k, one in enumerate(rows) if k % 20 == 7}  # fmt: skip


@pytest.mark.parametrize("direction", ["adam", "adam_diag"])
def test_rows_of_the_target_s_kind_are_found_in_a_pool_of_another(direction):
    world, planted = toy_world()
    arm = ArmSpec(
        "less", "less", {"warmup_share": 0.5, "direction": direction, "warmup": {"lr": 1e-3, "batch_size": 8}}
    )
    chosen = choose_own(Desk(world, 6), arm, len(planted))
    assert len(planted & set(chosen.ids)) / len(planted) >= 0.8  # a random draw finds one in twenty


def test_shared_momentum_makes_directions_alike():
    """What docs/methods/less.md says of our toy pool."""
    world, _ = toy_world()
    mean = {}
    for direction in ("adam", "raw"):
        warmup = make_method("less", {"warmup_share": 0.5, "direction": direction}).needs.warmup
        found = measure_trained(Desk(world, 6), warmup, WarmupSettings(lr=1e-3, batch_size=8))
        gram = found.problem.checkpoints[-1].features @ found.problem.checkpoints[-1].features.T
        mean[direction] = float(gram[~np.eye(len(gram), dtype=bool)].mean())
    assert 0.4 <= mean["adam"] <= 0.85
    assert 0.0 <= mean["raw"] < 0.2


def test_shuffled_completions_are_not_in_the_dense_middle():
    """2% of corrupted rows: rare at the densest norms, common at the largest (grads.md 8)."""
    rng = np.random.default_rng(2)
    rows, corrupted = [], set()
    for k in range(200):
        start = rng.integers(4, 16)
        ids = (start + 3 * np.arange(10)) % 12 + 4
        if k % 50 == 9:
            ids[4:] = rng.integers(40, 60, size=6)
            corrupted.add(f"p{k:03d}")
        rows.append(TokenRow(f"p{k:03d}", ids.astype(np.int32), np.arange(10) > 3, 10, RowStatus.OK))
    world = World(
        "toy", 0, lambda: toy_lora(0), tuple(rows), {}, {}, {r.id: "w" for r in rows}, {}, (), (), (), "loss", 3
    )
    share = {}
    for rule in ("top_density", "top_norm"):
        settings = {"rule": rule, "warmup": {"lr": 1e-2, "batch_size": 8}}
        chosen = choose_own(Desk(world, 10), ArmSpec(rule, "grads", settings), 10)
        share[rule] = len(corrupted & set(chosen.ids)) / 10
    assert share["top_density"] < 0.01
    assert share["top_norm"] > 0.05


def test_directions_are_those_of_one_backward_per_row(shared):
    """Features of the last checkpoint against Gamma of the oracle's gradient, sketched by hand."""
    from gradsift.compare.checkpoint import _train
    from gradsift.gradients.adam import gamma
    from gradsift.gradients.hooks import GradientEngine
    from gradsift.gradients.loop import example_gradient
    from gradsift.gradients.project import Projector, sketch_matrix
    from gradsift.models.parameters import choose_parameters

    world, settings = shared.world, WarmupSettings(**TRAIN)
    warmup = make_method("less", {"warmup_share": 0.3}).needs.warmup
    found = measure_trained(shared, warmup, settings)
    at = _train(world, warmup, settings).checkpoints[-1]
    model = world.make_model()
    at.enter(model)
    model = model.eval()
    names = choose_parameters(model, "all").names
    engine = GradientEngine(model, names)
    row = world.pool[5]
    import torch

    ids = torch.tensor(row.input_ids, dtype=torch.long)
    labels = torch.where(torch.tensor(row.trained), ids, -100)
    gradient = example_gradient(model, names, ids, labels).by_name
    want = sum(
        sketch_matrix(engine.matrix(n, gamma(g, at.moments.exp_avg[n], at.moments.exp_avg_sq[n])),
                      Projector(world.seed, settings.sketch_dim), n)
        for n, g in gradient.items()
    )  # fmt: skip
    got = found.problem.checkpoints[-1].features[found.problem.ids.index(row.id)]
    np.testing.assert_allclose(got, want / np.linalg.norm(want), atol=2e-3)
    assert [one.lr for one in found.problem.checkpoints] == sorted(
        (one.lr for one in found.problem.checkpoints), reverse=True
    )


def test_a_setting_that_is_not_there_is_refused(shared):
    with pytest.raises(ConfigError, match="no such setting"):
        choose_own(shared, ArmSpec("x", "less", {"warmup": {"rate": 1}}), 5)
    with pytest.raises(ConfigError, match="no such setting"):
        choose_own(shared, ArmSpec("x", "grads", {"combin": "lm_only"}), 5)
