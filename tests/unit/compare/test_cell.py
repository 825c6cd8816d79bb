"""Cells: figures equal to a slow computation, the same bits for the same seed, totals spent and nothing silently ignored."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.mini import BUDGET, desk

from gradsift.compare import cell as cell_module
from gradsift.compare import rounds as rounds_module
from gradsift.compare.arms import ArmSpec, Desk
from gradsift.compare.cell import Grid, measure_point, run_cell, with_total
from gradsift.compare.rounds import train_in_rounds
from gradsift.errors import ConfigError, DataError, NumericsError
from gradsift.models.adapter import attach_lora
from gradsift.recipe import LoraConfig
from gradsift.train.penalties import adapted_layers

GRID = Grid(lrs=(3e-3, 1e-2), num_steps=6, batch_size=8, budget=BUDGET)
ONE = replace(GRID, lrs=(1e-2,))
RANDOM = ArmSpec("random", "random")
ROUNDS = ArmSpec("rounds", "ogs_rounds", {"num_rounds": 3}, replay=0.25)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shared(_own_cache):
    return desk()


def timeless(cell):
    """All of a cell but the time it took."""

    def costs(some):
        return {name: (c.flops, c.forward_tokens, c.backward_tokens) for name, c in some.items()}

    points = [(p.lr, dict(p.metrics), p.num_steps, costs(p.cost), dict(p.extra)) for p in cell.points]
    return points, costs(cell.cost), dict(cell.shares), cell.num_rows, cell.num_distinct, cell.notes


@torch.no_grad()
def slow_log_probs(model, row):
    """Log-probabilities [V] of the one trained token, in float64, one row at a time."""
    model = copy.deepcopy(model).double().eval()
    ids = torch.from_numpy(row.input_ids).long()
    return model(input_ids=ids[None], use_cache=False).logits[0, -2].double().log_softmax(-1), int(ids[-1])


def test_metrics_are_those_of_a_slow_computation(shared):
    world, base = shared.world, shared.world.make_model()
    tuned = world.make_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    point = measure_point(Desk(world, GRID.budget), tuned, 1e-3, GRID, 6, {}, {"figure": 1.0})
    assert (point.lr, point.num_steps, point.extra) == (1e-3, 6, {"figure": 1.0})
    for held in world.evaluations:
        before, after, kl, right = [], [], [], []
        for row in held.rows:
            (p, z), (q, _) = slow_log_probs(base, row), slow_log_probs(tuned, row)
            before.append(-float(p[z]))
            after.append(-float(q[z]))
            kl.append(float((p.exp() * (p - q)).sum()))
            right.append((int(p.argmax()) == z, int(q.argmax()) == z))
        n, got = len(held.rows), point.metrics[held.name]
        assert got == {
            "loss_before": pytest.approx(math.fsum(before) / n, abs=1e-4),
            "loss_after": pytest.approx(math.fsum(after) / n, abs=1e-4),
            "kl": pytest.approx(math.fsum(kl) / n, abs=1e-4),
            "exact_before": pytest.approx(sum(b for b, _ in right) / n),
            "exact_after": pytest.approx(sum(a for _, a in right) / n),
            "num_rows": n,
            "lost": sum(b and not a for b, a in right),
            "won": sum(a and not b for b, a in right),
        }
        assert got["won"] - got["lost"] == pytest.approx(n * (got["exact_after"] - got["exact_before"]))
    assert point.metrics["A"]["lost"] > 0, "a perturbation this large forgets something, or the test shows nothing"


def test_the_same_seed_gives_the_same_cell_to_the_bit(shared):
    for arm in (replace(RANDOM, replay=0.25), ArmSpec("cosine", "target_cosine")):
        one = run_cell(shared, arm, GRID)
        fresh = Desk(shared.world, BUDGET)
        assert timeless(run_cell(fresh, arm, GRID)) == timeless(one)
    assert [p.lr for p in one.points] == list(GRID.lrs)
    assert one.points[0].metrics != one.points[1].metrics
    turned = Desk(replace(shared.world, pool=shared.world.pool[::-1]), BUDGET)
    assert timeless(run_cell(turned, RANDOM, ONE)) == timeless(run_cell(shared, RANDOM, ONE))


def test_costs_and_counts_of_a_cell(shared):
    cell = run_cell(shared, replace(RANDOM, replay=0.25), ONE)
    size = sum(p.numel() for p in shared.world.make_model().parameters())
    assert cell.points[0].cost["train"].flops == 6.0 * size * ONE.num_steps * ONE.batch_size * 6
    assert (cell.world, cell.seed, cell.arm, cell.num_rows) == ("arithmetic", 0, "random", BUDGET)
    assert cell.num_distinct == BUDGET - 2, "ten replay places, eight replay rows"
    assert sum(cell.shares.values()) == pytest.approx(1.0)


def test_no_share_of_the_way_is_the_base_and_the_whole_way_is_plain_training(shared):
    at = {a: run_cell(shared, replace(RANDOM, train={"wise_ft": a}), ONE).points[0].metrics for a in (0.0, 0.5, 1.0)}
    plain = run_cell(shared, RANDOM, ONE).points[0].metrics
    for name, figures in at[0.0].items():
        assert figures["loss_after"] == figures["loss_before"]
        assert figures["kl"] == pytest.approx(0.0, abs=1e-7)
        assert (figures["lost"], figures["won"]) == (0.0, 0.0)
        assert at[1.0][name]["loss_after"] == pytest.approx(plain[name]["loss_after"], abs=1e-4)
        assert 0 < at[0.5][name]["kl"] < plain[name]["kl"]


def test_training_options_do_what_their_names_say(shared):
    def ran(**train):
        return run_cell(shared, replace(RANDOM, train=train), ONE).points[0]

    plain, half = ran(), run_cell(shared, RANDOM, replace(ONE, lrs=(5e-3,))).points[0]
    assert ran(lr_factor=0.5).metrics == half.metrics
    assert ran(lr_factor=0.5).lr == 1e-2, "a point keeps the grid's own rate"
    for option in ({"kl": 5.0}, {"l2sp": 50.0}):
        point = ran(**option)
        assert point.metrics["A"]["kl"] < plain.metrics["A"]["kl"]
        assert set(point.cost) == {"train", *option}
    assert ran(kl=5.0).cost["kl"].flops > 0
    assert ran(ewc=1.0).cost["ewc"].backward_tokens == 6 * len(shared.world.replay)
    masked = ran(stm={"drop_share": 0.3})
    assert 0 < masked.extra["num_masked_away"] < BUDGET
    assert masked.cost["masking"].forward_tokens == 6 * BUDGET
    hooked = ran(hook="agem")
    assert hooked.cost["agem"].flops > 0
    assert any(name.startswith("hook_") for name in hooked.extra)


def test_ewc_without_replay_rows_is_refused(shared):
    bare = Desk(replace(shared.world, replay=()), BUDGET)
    with pytest.raises(ConfigError, match="ewc"):
        run_cell(bare, replace(RANDOM, train={"ewc": 1.0}), ONE)


def test_an_arm_may_spend_anothers_total_and_no_more(shared):
    dear = run_cell(shared, ArmSpec("cosine", "target_cosine"), GRID)
    arm = replace(RANDOM, total_of="cosine")
    total = with_total(arm, dear, GRID)
    trained = max(p.cost["train"].flops for p in dear.points)
    assert total == pytest.approx(trained + dear.cost["collect"].flops)
    cell = run_cell(shared, arm, ONE, total=total)
    spent = cell.points[0].cost["train"].flops
    size = sum(p.numel() for p in shared.world.make_model().parameters())
    step = 6.0 * size * ONE.batch_size * 6
    assert total - step < spent <= total * (1 + 1e-9)
    assert cell.points[0].num_steps == math.floor(total / step) > ONE.num_steps
    assert cell.num_rows == round(BUDGET * cell.points[0].num_steps / ONE.num_steps)
    huge = run_cell(shared, arm, replace(ONE, num_steps=1), total=step * 12)
    assert huge.num_rows == len(shared.world.pool), "more rows than the pool has are not to be had"
    with pytest.raises(ConfigError, match="nothing to train with"):
        run_cell(shared, arm, ONE, total=0.0)
    for method in ("norm", "loss"):  # choosing is paid for out of the same total
        cell = run_cell(shared, ArmSpec(method, method, total_of="cosine"), ONE, total=2 * total)
        choosing, training = cell.cost["collect"].flops, cell.points[0].cost["train"].flops
        assert choosing > step
        assert 2 * total - step < choosing + training <= 2 * total * (1 + 1e-9)
        rows = round(BUDGET * cell.points[0].num_steps / ONE.num_steps)
        assert cell.num_rows == min(rows, len(shared.world.pool))


def test_a_total_is_not_spent_on_steps_of_unknown_cost():
    for train in ({"kl": 1.0}, {"hook": "agem"}, {"stm": {"tau": 5}}):
        with pytest.raises(ConfigError, match=f"spends another's total(.|\n)*got: +{next(iter(train))}"):
            ArmSpec("dear", "random", train=train, total_of="cosine")
    ArmSpec("free", "random", train={"lr_factor": 0.5, "wise_ft": 0.5}, total_of="cosine")


@pytest.mark.parametrize("arm", [RANDOM, replace(RANDOM, train={"kl": 1.0}), ROUNDS])
def test_a_learning_rate_that_diverges_costs_its_own_point_alone(shared, arm):
    good, bad = run_cell(shared, arm, replace(GRID, lrs=(3e-3, 1e30))).points
    (alone,) = run_cell(shared, arm, replace(GRID, lrs=(3e-3,))).points
    assert good.metrics == alone.metrics
    assert bad.diverged
    assert not good.diverged
    assert 0 < bad.num_steps <= GRID.num_steps
    assert 0 < bad.cost["train"].flops <= good.cost["train"].flops
    for name, figures in bad.metrics.items():
        assert figures["loss_before"] == good.metrics[name]["loss_before"]
        assert math.isnan(figures["loss_after"])
        assert figures.keys() == good.metrics[name].keys()
    cell = run_cell(shared, arm, replace(GRID, lrs=(1e30, 3e-3)))
    assert cell.num_rows == BUDGET
    assert "at the learning rate 1e+30 training left the finite numbers after" in cell.notes[-1]


def test_a_cell_whose_every_rate_diverges_is_a_cell(shared):
    cell = run_cell(shared, ROUNDS, replace(GRID, lrs=(1e30,)))
    assert (cell.num_rows, dict(cell.shares), cell.points[0].diverged) == (0, {}, True)


def test_a_failure_in_rounds_that_is_no_divergence_is_a_failure(shared, monkeypatch):
    def fails(loop, board, config, **_):
        loop.step(list(shared.world.pool[:2]))
        raise NumericsError("a small linear program did not solve")

    monkeypatch.setattr(rounds_module, "play_rounds", fails)
    with pytest.raises(NumericsError, match="linear program"):
        run_cell(shared, ROUNDS, ONE)


def test_an_arm_that_chooses_nothing_is_refused(shared):
    bare = Desk(replace(shared.world, looks_domain=frozenset()), BUDGET)
    with pytest.raises(DataError, match="the arm chose no row"):
        run_cell(bare, ArmSpec("looks", "domain_looking"), ONE)


def test_wise_ft_goes_straight_to_the_base_with_an_adapter_too(shared, monkeypatch):
    trained = []
    real = cell_module.measure_point
    monkeypatch.setattr(
        cell_module, "measure_point", lambda d, model, *rest: trained.append(model) or real(d, model, *rest)
    )

    def adapted():
        return attach_lora(shared.world.make_model().requires_grad_(False), LoraConfig(rank=2, alpha=4.0), 0)

    for alpha in (1.0, 0.5):
        own = Desk(replace(shared.world, make_model=adapted), BUDGET)
        run_cell(own, replace(RANDOM, train={"wise_ft": alpha}), ONE)
    whole, half = (
        torch.cat([layer.get_delta_weight("default").flatten() for _, layer in adapted_layers(model)])
        for model in trained
    )
    assert whole.abs().max() > 0
    torch.testing.assert_close(half, 0.5 * whole)


def test_a_total_is_taken_from_the_arm_that_was_named_and_finished(shared):
    other = run_cell(shared, RANDOM, ONE)
    with pytest.raises(ValueError, match="takes the total of cosine"):
        with_total(replace(RANDOM, total_of="cosine"), other, ONE)
    with pytest.raises(ValueError, match="takes the total of random"):
        with_total(replace(RANDOM, total_of="random"), other, GRID)


def test_an_arm_in_rounds(shared):
    cell = run_cell(shared, ROUNDS, ONE)
    assert timeless(run_cell(Desk(shared.world, BUDGET), ROUNDS, ONE)) == timeless(cell)
    (point,) = cell.points
    assert (cell.num_rows, cell.cost, cell.notes) == (BUDGET, {}, ())
    assert cell.num_distinct == BUDGET - 2
    assert cell.shares["replay set"] == pytest.approx(0.25)
    assert set(point.cost) == {"train", "rescore"}
    size = sum(p.numel() for p in shared.world.make_model().parameters())
    assert point.cost["train"].flops == 6.0 * size * ONE.num_steps * ONE.batch_size * 6
    assert {"num_halved", "rise_A", "price_A"} == set(point.extra)
    run = train_in_rounds(shared, ROUNDS, ONE, 1e-2)
    own = run.ids[: BUDGET - 10]
    assert len(own) == len(set(own))
    assert all(i.startswith("replay-") for i in run.ids[BUDGET - 10 :])


def test_rounds_say_when_the_pool_is_used_up(shared):
    few = Desk(replace(shared.world, pool=shared.world.pool[:9], copy_of={}), 20)
    cell = run_cell(few, replace(ROUNDS, replay=0.0), ONE)
    assert cell.num_rows == 9
    assert cell.notes == ("shortage: 11 rows fewer than the budget, the pool is used up",)


@pytest.mark.parametrize(
    ("given", "total"), [({"train": {"kl": 1.0}}, None), ({"placebo": "permuted_scores"}, None), ({}, 1e9)]
)
def test_rounds_refuse_what_they_do_not_do(shared, given, total):
    with pytest.raises(ConfigError, match="rounds takes no"):
        run_cell(shared, replace(ROUNDS, **given), ONE, total=total)


def test_rounds_refuse_unknown_settings(shared):
    with pytest.raises(ConfigError, match="num_turns"):
        run_cell(shared, replace(ROUNDS, settings={"num_turns": 3}), ONE)
