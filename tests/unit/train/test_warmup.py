"""Warm-ups: keyed rows, checkpoints with moments, and stopped runs that end where an unstopped one does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.toy import VOCABULARY, toy_lora

from gradsift.errors import Interrupted, NumericsError, StoreError
from gradsift.geometry.checkpoints import Warmup
from gradsift.train import warmup as module
from gradsift.train.loop import Loop, LoopConfig, schedule_factor
from gradsift.train.parts import trainable
from gradsift.train.warmup import WarmupRun, draw_rows, plan_epochs, warm_up
from gradsift.types import RowStatus, TokenRow

RUN = WarmupRun(1e-3, batch_size=4, pad_id=3, seed=5)
THREE = Warmup(0.5, 3, 3, "adam")


def rows(num=20, seed=0):
    rng = np.random.default_rng(seed)
    return [
        TokenRow(f"r{k:02d}", rng.integers(4, VOCABULARY, size=6 + k % 3).astype(np.int32), np.arange(6 + k % 3) > 1, 9,
                 RowStatus.OK)
        for k in range(num)
    ]  # fmt: skip


def model():
    made = toy_lora()
    for name, p in made.named_parameters():
        p.requires_grad_("lora_" in name)
    return made


def same(a, b):
    assert [one.epoch for one in a.checkpoints] == [one.epoch for one in b.checkpoints]
    for x, y in zip(a.checkpoints, b.checkpoints, strict=True):
        assert x.lr == y.lr
        assert x.weights.keys() == y.weights.keys() == x.moments.exp_avg.keys()
        for name in x.weights:
            assert torch.equal(x.weights[name], y.weights[name])
            assert torch.equal(x.moments.exp_avg[name], y.moments.exp_avg[name])
            assert torch.equal(x.moments.exp_avg_sq[name], y.moments.exp_avg_sq[name])


def test_rows_are_drawn_by_id_and_every_epoch_takes_each_once():
    some = rows()
    drawn = draw_rows(some, 0.3, 5)
    assert len(drawn) == 6
    assert drawn == draw_rows(some[::-1], 0.3, 5)
    assert drawn != draw_rows(some, 0.3, 6)
    assert {r.id for r in drawn} <= {r.id for r in draw_rows(some, 0.6, 5)}
    plan = plan_epochs([row.id for row in drawn], 3, 4, 5)
    assert [len(step) for step in plan[0]] == [4, 2]
    for steps in plan:
        assert sorted(i for step in steps for i in step) == [row.id for row in drawn]
    assert plan[0] != plan[1]


def test_it_is_the_plain_loop_over_that_plan():
    some = rows()
    found = warm_up(model(), some, THREE, RUN)
    drawn = {row.id: row for row in draw_rows(some, 0.5, 5)}
    plan = plan_epochs(sorted(drawn), 3, 4, 5)
    total = sum(map(len, plan))
    config = LoopConfig(1e-3, total, "linear", round(0.03 * total), seed=5)
    twin = Loop(model(), config, 3)
    step = 0
    for steps, one in zip(plan, found.checkpoints, strict=True):
        rates = []
        for ids in steps:
            twin.step([drawn[i] for i in ids])
            rates.append(1e-3 * schedule_factor(config, step))
            step += 1
        for name, p in trainable(twin.model):
            assert torch.equal(one.weights[name], p)
            assert torch.equal(one.moments.exp_avg[name], twin.optimizer.state[p]["exp_avg"])
        assert one.lr == pytest.approx(np.mean(rates))
    assert found.num_rows == 10
    assert found.cost.forward_tokens == 3 * sum(row.num_tokens for row in drawn.values())


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
@pytest.mark.parametrize("often", [True, False])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, stop, often):
    whole = warm_up(model(), rows(), THREE, RUN, folder=tmp_path / "whole")
    monkeypatch.setattr(module, "SAVE_SECONDS", -1.0 if often else 1e9)
    steps = []

    def tick(n, tokens):
        steps.append(n)
        if len(steps) == stop:
            raise Interrupted(15, resume="the same command")

    import dataclasses

    run = dataclasses.replace(RUN, tick=tick)
    with pytest.raises(Interrupted):
        warm_up(model(), rows(), THREE, run, folder=tmp_path / "cut")
    resumed = warm_up(model(), rows(), THREE, run, folder=tmp_path / "cut")
    same(whole, resumed)
    done = stop - 1 if often else 3 * ((stop - 1) // 3)  # three steps an epoch
    assert len(steps) == stop + 9 - done
    assert resumed.cost.forward_tokens == whole.cost.forward_tokens
    again = warm_up(model(), rows(), THREE, run, folder=tmp_path / "cut")
    assert len(steps) == stop + 9 - done, "read back, not trained"
    same(whole, again)
    assert not list((tmp_path / "cut").glob("*/progress"))


def test_another_setting_row_or_start_is_another_folder(tmp_path):
    import dataclasses

    keys = {
        warm_up(model(), some, warmup, run, folder=tmp_path, start=start).key
        for some, warmup, run, start in (
            (rows(), Warmup(0.5), RUN, ""), (rows(seed=1), Warmup(0.5), RUN, ""), (rows(), Warmup(0.6), RUN, ""),
            (rows(), Warmup(0.5, 2), RUN, ""), (rows(), Warmup(0.5), dataclasses.replace(RUN, lr=2e-3), ""),
            (rows(), Warmup(0.5), RUN, "other"),
        )
    }  # fmt: skip
    assert len(keys) == 6


def test_a_damaged_epoch_is_trained_again(tmp_path):
    first = warm_up(model(), rows(), THREE, RUN, folder=tmp_path)
    path = tmp_path / first.key / "epoch-2" / "moments.safetensors"  # the record beside it knows its hash
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # what was read is mapped from the file
    path.write_bytes(data)
    same(first, warm_up(model(), rows(), THREE, RUN, folder=tmp_path))


def test_a_damaged_epoch_behind_a_stopped_run_starts_it_over(tmp_path, monkeypatch):
    import dataclasses

    monkeypatch.setattr(module, "SAVE_SECONDS", -1.0)
    whole, count = warm_up(model(), rows(), THREE, RUN), []

    def tick(n, tokens):
        count.append(n)
        if len(count) == 6:
            raise Interrupted(15, resume="the same command")

    run = dataclasses.replace(RUN, tick=tick)
    with pytest.raises(Interrupted):
        warm_up(model(), rows(), THREE, run, folder=tmp_path)
    next(tmp_path.glob("*/epoch-1/weights.safetensors")).write_bytes(b"")
    same(whole, warm_up(model(), rows(), THREE, run, folder=tmp_path))
    assert len(count) == 6 + 9


def test_global_randomness_stays_as_it_was():
    made = model()
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    warm_up(made, rows(), Warmup(), RUN)
    assert torch.equal(torch.rand(3), want)


def test_a_loss_that_is_not_finite_says_what_to_lower():
    broken = model()
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_" in n).fill_(float("nan"))
    with pytest.raises(NumericsError, match="warm-up") as refusal:
        warm_up(broken, rows(), Warmup(), RUN)
    assert "warmup.lr" in str(refusal.value)


def test_a_checkpoint_of_another_model_is_refused():
    one = warm_up(model(), rows(), Warmup(), RUN).checkpoints[0]
    from tests.toy import toy_llama

    with pytest.raises(StoreError, match="does not fit"):
        one.enter(toy_llama())
    fresh = model()
    one.enter(fresh)
    assert all(torch.equal(dict(fresh.named_parameters())[n], w) for n, w in one.weights.items())
