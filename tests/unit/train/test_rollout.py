"""Roll-outs of the navigator: repeatable to the last bit, counted, side by side, kept on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.lessons import lesson_config, lesson_rows, token_row
from tests.toy import toy_gpt2, toy_llama, toy_lora

from gradsift.errors import ConfigError, DataError, StoreError
from gradsift.policy.episodes import NO_ROW, Episodes, Table, Terms
from gradsift.seeds import stream
from gradsift.train.held_out import DevSets, measure_dev
from gradsift.train.loop import Loop
from gradsift.train.parts import Cost, make_batch, token_nats, trainable
from gradsift.train.rollout import LoopDynamics, RolloutStore, roll, split_rows
from gradsift.types import TokenRow

POOL = list(lesson_rows(12).values())
TARGET = tuple(lesson_rows(3, seed=1, prefix="t").values())
GENERAL = tuple(lesson_rows(4, seed=2, prefix="g").values())
CODE = tuple(lesson_rows(2, seed=3, prefix="c").values())
DEV = DevSets(TARGET, {"general": GENERAL, "code": CODE}, 3, 40)


def plan(*lines: list[int]) -> np.ndarray:
    return np.array([[*some, *[NO_ROW] * (4 - len(some))] for some in lines])


SCHEDULE = plan([0, 1, 2, 3], [4, 5], [7, 6, 8])


def learner(make: Any = toy_llama, **changes: Any) -> Loop:
    return Loop(make(1), lesson_config(**changes).loop(6), 3)


def navigator(loop: Loop | None = None, updates: int = 2, dev: DevSets = DEV) -> LoopDynamics:
    return LoopDynamics(loop or learner(), POOL, dev, rows_per_decision=4, updates=updates)


def slow_mean(model: torch.nn.Module, rows: tuple[TokenRow, ...]) -> float:
    """One row at a time, without padding."""
    model = copy.deepcopy(model).double().eval()
    means = []
    for row in rows:
        batch = make_batch([row], 3, torch.device("cpu"))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        means.append(float(token_nats(logits, batch.labels).double().sum().detach()) / row.num_trained)
    return float(np.mean(means))


def test_held_out_losses_are_means_over_rows_of_means_over_trained_tokens() -> None:
    model = toy_llama(1).train()
    found = measure_dev(model, DEV)
    slow = [slow_mean(model, rows) for rows in (TARGET, GENERAL, CODE)]
    np.testing.assert_allclose([found.target, *found.protect], slow, rtol=0, atol=1e-5)
    assert model.training
    assert found.cost.forward_tokens == sum(row.num_tokens for row in (*TARGET, *GENERAL, *CODE))
    assert found.cost.backward_tokens == 0
    assert found.cost.seconds > 0


@pytest.mark.parametrize("make", [toy_llama, toy_lora, toy_gpt2], ids=["full", "lora", "dropout"])
def test_a_schedule_gives_the_same_bits_each_time_and_those_of_the_plain_loop(make: Any) -> None:
    dynamics = navigator(learner(make, schedule="constant", weight_decay=0.1))
    one = roll(dynamics, SCHEDULE)
    roll(dynamics, plan([9, 10, 11, 1]))
    two = roll(dynamics, SCHEDULE)
    loop = learner(make, schedule="constant", weight_decay=0.1)
    seen = [measure_dev(loop.model, DEV)]
    for parts in ([[0, 1], [2, 3]], [[4, 5]], [[7, 6], [8]]):
        for part in parts:
            loop.step([POOL[i] for i in part])
        seen.append(measure_dev(loop.model, DEV))
    for found in (one, two):
        assert found.rollout.target.tolist() == [s.target for s in seen]
        assert found.rollout.protect.tolist() == [list(s.protect) for s in seen]
    assert len(set(one.rollout.target.tolist())) == 4
    assert (one.train.flops, one.train.backward_tokens) == (loop.cost.flops, loop.cost.backward_tokens)
    assert (two.train.flops, two.dev.forward_tokens) == (one.train.flops, one.dev.forward_tokens)
    assert one.dev.forward_tokens == sum(s.cost.forward_tokens for s in seen)
    assert dynamics.sources == ("general", "code")


@pytest.mark.parametrize("make", [toy_lora, toy_gpt2], ids=["lora", "dropout"])
def test_copies_side_by_side_equal_copies_one_after_the_other(make: Any) -> None:
    other = plan([5, 4, 3, 2], [], [1])
    alone = [roll(navigator(learner(make)), some).rollout for some in (SCHEDULE, other)]
    dynamics = navigator(learner(make))
    seen = [dynamics.reset(2)]
    for pair in zip(SCHEDULE, other, strict=True):
        seen.append(dynamics.step(np.stack(pair)))
    for e in range(2):
        assert [float(one.target[e]) for one in seen] == alone[e].target.tolist()
        assert [one.protect[e].tolist() for one in seen] == alone[e].protect.tolist()
    assert seen[2].target[1] == seen[1].target[1]


def test_the_starting_point_is_the_loop_as_it_was_given() -> None:
    loop = learner()
    loop.step(POOL[:3])
    moved = {name: p.detach().clone() for name, p in trainable(loop.model)}
    dynamics = navigator(loop)
    one = roll(dynamics, SCHEDULE)
    assert max(float((moved[n] - p.detach()).abs().max()) for n, p in trainable(loop.model)) > 0
    dynamics.reset(1)
    assert all(torch.equal(moved[name], p.detach()) for name, p in trainable(loop.model))
    assert roll(dynamics, SCHEDULE).rollout.target.tolist() == one.rollout.target.tolist()
    assert one.rollout.target.tolist() != roll(navigator(), SCHEDULE).rollout.target.tolist()


def test_it_serves_episodes() -> None:
    table = Table(
        ((0, 1, 2, 3, 4), (5, 6, 7)), np.ones(12, dtype=np.int64), np.zeros((2, 1)), ("size",), np.array([False, True])
    )
    episodes = Episodes(table, navigator(), Terms(4, 8, np.array([0.1, 0.2])), stream(0, "order"))
    episodes.reset(0, 1, shuffle=False)
    step = episodes.step(np.array([1]))
    real = roll(navigator(), plan([5, 6, 7])).rollout
    assert step.reward[0] == real.target[0] - real.target[1]
    assert step.cost[0].tolist() == (real.protect[1] - real.protect[0]).tolist()


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 7))
def test_rows_are_dealt_to_steps_in_order_and_evenly(rows: list[int], updates: int) -> None:
    parts = split_rows(rows, updates, 30)
    assert [i for part in parts for i in part] == rows
    assert len(parts) == -(-len(rows) * updates // 30)
    sizes = [len(part) for part in parts]
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1)


def test_a_killed_run_repeats_at_most_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [SCHEDULE, plan([1, 2]), plan([3])]
    whole = [roll(navigator(), some) for some in plans]
    store = RolloutStore(tmp_path, navigator())
    store.roll(plans[0])
    monkeypatch.setattr(store.dynamics.loop, "step", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.roll(plans[1])
    again = RolloutStore(tmp_path, navigator())
    found = [again.roll(some) for some in plans]
    assert (again.num_read, again.num_rolled) == (1, 2)
    for one, two in zip(found, whole, strict=True):
        for part in ("rows", "target", "protect"):
            np.testing.assert_array_equal(getattr(one.rollout, part), getattr(two.rollout, part))
        assert one.train.flops == two.train.flops
    assert again.roll(SCHEDULE).rollout.protect.shape == (4, 2)


def test_a_damaged_roll_out_is_refused(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path, navigator())
    store.roll(plan([1]))
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(file.read_bytes().replace(b'"target"', b'"tarGet"'))
    with pytest.raises(StoreError, match="a roll-out is not what was written"):
        store.roll(plan([1]))


def test_the_key_holds_everything_the_losses_depend_on() -> None:
    longer = token_row("g9", [5, 6, 7, 8])
    swapped = DevSets(TARGET, {"code": CODE, "general": GENERAL}, 3, 40)
    trained = learner()
    trained.step(POOL[:2])
    trained.losses.clear()
    frozen = toy_lora(1)
    with torch.no_grad():
        next(p for p in frozen.parameters() if not p.requires_grad).add_(1e-3)
    every = [
        navigator(), navigator(learner(lr=2e-3)), navigator(learner(seed=1)), navigator(updates=1), navigator(trained),
        navigator(dev=swapped), navigator(dev=DevSets((*TARGET, longer), DEV.protect, 3, 40)),
        LoopDynamics(learner(), POOL[:-1], DEV, rows_per_decision=4, updates=2),
        LoopDynamics(learner(), POOL, DEV, rows_per_decision=5, updates=2),
        navigator(learner(toy_lora)), navigator(Loop(frozen, lesson_config().loop(6), 3)),
    ]  # fmt: skip
    keys = [RolloutStore(Path("x"), one).records.key for one in every]
    assert len(set(keys)) == len(keys)
    assert RolloutStore(Path("x"), navigator()).records.key == keys[0]


def test_what_cannot_be_measured_or_dealt_is_refused() -> None:
    idle = token_row("idle", [4, 5, 6], [True, False, False])
    with pytest.raises(DataError, match="general"):
        DevSets(TARGET, {"general": (idle,)}, 3)
    with pytest.raises(DataError, match="no rows"):
        DevSets((), {}, 3)
    with pytest.raises(ConfigError, match="fewer rows than optimizer steps"):
        navigator(updates=5)


def test_costs_of_all_roll_outs_add_up() -> None:
    dynamics = navigator()
    done = [roll(dynamics, some) for some in (SCHEDULE, plan([1, 2]))]
    total = sum((one.train for one in done), Cost())
    assert (total.flops, total.forward_tokens) == (dynamics.train_cost.flops, dynamics.train_cost.forward_tokens)
    assert done[0].rollout.tokens == done[0].train.backward_tokens
    assert dynamics.dev_cost.flops == sum(one.dev.flops for one in done)
