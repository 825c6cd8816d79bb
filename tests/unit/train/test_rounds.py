"""Rounds: what is demanded, chosen, trained on and paid, on signals with the answer written down and on a real model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.mini import desk, taught

import gradsift.train.rounds as module
from gradsift.errors import ConfigError
from gradsift.seeds import stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.masking import TokenNats
from gradsift.train.parts import Cost
from gradsift.train.rescore import RescoreConfig, Rescored
from gradsift.train.rounds import HALVINGS, Board, RoundsConfig, play_rounds
from gradsift.types import Direction, Problem, RowStatus, TokenRow

ANCHOR = TokenRow("anchor", np.array([1, 2], np.int32), np.array([False, True]), 2, RowStatus.OK)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def row(name):
    return TokenRow(name, np.array([1, 2, 3], np.int32), np.array([False, True, True]), 3, RowStatus.OK)


class Stage:
    """Rounds with signals and anchor losses that are given; the model only counts what it is trained on."""

    def __init__(self, patch, conflict, gain, losses, num_replay=6):
        self.pool = [row(f"r{k:03d}") for k in range(len(gain))]
        self.replay = [row(f"q{k}") for k in range(num_replay)]
        self.conflict, self.gain, self.losses = np.asarray(conflict), np.asarray(gain), list(losses)
        self.trained, self.rescored, self.asked = [], 0, 0
        self.loop = SimpleNamespace(model=object(), run=lambda steps, rows, weights: self.trained.append(steps))
        patch.setattr(module, "rescore", self.rescore)
        patch.setattr(module, "measure_nats", self.measure)

    def rescore(self, model, pool, anchors, target, config, **given):
        assert model is self.loop.model
        self.rescored += 1
        n = len(self.pool)
        problem = Problem(
            ids=tuple(one.id for one in self.pool), sources=("pool",) * n,
            num_tokens=np.full(n, 3), num_trained=np.full(n, 2), num_read=n, num_trained_read=2 * n,
            loss=np.ones(n), grad_norm=np.ones(n), anchor_dot=self.conflict.reshape(n, 1).astype(float),
            target_dot=self.gain.astype(float),
            anchors=(Direction("A", "protect", 1.0, 9, 9, 0.9, 0.0),), target=Direction("target", "target", 1.0, 9, 9, 0.9, 0.0),
            gram=np.eye(2),
        )  # fmt: skip
        return Rescored(problem, Cost(10.0, 10, 10), ())

    def measure(self, model, rows, pad_id, tokens_per_batch):
        loss = self.losses[min(self.asked, len(self.losses) - 1)]
        self.asked += 1
        return TokenNats({one.id: np.array([loss], np.float32) for one in rows}, Cost(1.0, 1))

    def play(self, config, num_rows, num_steps=6, tick=lambda n: None):
        board = Board(self.pool, {"A": [ANCHOR]}, [row("t")], self.replay, {}, 0, RescoreConfig(), 0)
        return play_rounds(
            self.loop, board, config,
            num_rows=num_rows, num_steps=num_steps, batch_size=200, draw=stream(0, "select"), tick=tick,
        )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(5, 30), st.integers(4, 40), st.integers(0, 3))
def test_rows_are_chosen_once_within_the_budget_and_training_is_cumulative(rounds, num_rows, num_steps, seed):
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        stage = Stage(patch, rng.uniform(-0.2, 0.6, 30), rng.normal(size=30), [0.1])
        ticks = []
        played = stage.play(RoundsConfig(num_rounds=rounds), num_rows, num_steps, ticks.append)
    assert len(played.ids) == len(set(played.ids)) == num_rows
    assert ticks == list(range(1, rounds + 1))
    assert sum(len(steps) for steps in stage.trained) == num_steps
    sizes = [len(one.ids) for one in played.rounds]
    assert max(sizes) - min(sizes) <= 1
    for r, steps in enumerate(stage.trained):
        so_far = [i for one in played.rounds[: r + 1] for i in one.ids]
        replay = [f"q{k}" for k in range(6 * (r + 1) // rounds)]
        for step in steps:  # 200 places hold every epoch several times over
            assert set(step) == {*so_far, *replay}
    assert played.cost == Cost(11.0 * rounds + 1, 11 * rounds + 1, 10 * rounds)
    assert stage.rescored == rounds


@pytest.mark.parametrize(("now", "demand"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.5, 0.025), (3.0, 0.1), (9.0, 0.2)])
def test_demand_follows_the_rise_of_the_anchors_loss_and_is_capped(monkeypatch, now, demand):
    stage = Stage(monkeypatch, np.linspace(-1, 1, 20), np.linspace(1, -1, 20), [1.0, now])
    (only,) = stage.play(RoundsConfig(num_rounds=1), 6).rounds
    assert only.rise == {"A": max(0.0, now - 1.0)}
    assert only.demand["A"] == pytest.approx(demand)
    assert only.num_halved == 0
    chosen = [int(i[1:]) for i in only.ids]
    # gain falls as synergy rises: without demand the six best already sum to a conflict, so the demand binds
    assert np.linspace(-1, 1, 20)[chosen].mean() >= demand - 1e-9
    assert only.prices["A"] > 0


@pytest.mark.parametrize("num_halved", [1, 2, 4])
def test_a_demand_that_no_choice_meets_is_halved_until_one_does(monkeypatch, num_halved):
    best = 0.2 / 2**num_halved * 1.2  # met after this many halvings, and not after one fewer
    stage = Stage(monkeypatch, np.full(12, best), np.arange(12), [0.0, 50.0])
    (only,) = stage.play(RoundsConfig(num_rounds=1), 4).rounds
    assert only.num_halved == num_halved
    assert only.demand["A"] == pytest.approx(0.2 / 2**num_halved)
    assert sorted(only.ids) == ["r008", "r009", "r010", "r011"]


def test_where_every_row_conflicts_the_demand_is_dropped_and_that_is_counted(monkeypatch):
    stage = Stage(monkeypatch, np.full(12, -0.5), np.arange(12), [0.0, 50.0])
    (only,) = stage.play(RoundsConfig(num_rounds=1), 4).rounds
    assert only.num_halved == HALVINGS + 1
    assert only.demand == {"A": -1.0}
    assert sorted(only.ids) == ["r008", "r009", "r010", "r011"]


def test_a_pool_that_runs_out_leaves_empty_rounds_and_training_goes_on(monkeypatch):
    stage = Stage(monkeypatch, np.full(5, 0.1), np.arange(5), [0.0])
    played = stage.play(RoundsConfig(num_rounds=4), 12, 8)
    assert [len(one.ids) for one in played.rounds] == [3, 2, 0, 0]
    assert sorted(played.ids) == [f"r{k:03d}" for k in range(5)]
    assert len(stage.trained) == 4


def test_more_rounds_than_rows_are_refused(monkeypatch):
    stage = Stage(monkeypatch, np.zeros(9), np.arange(9), [0.0])
    with pytest.raises(ConfigError, match="more rounds than rows"):
        stage.play(RoundsConfig(num_rounds=6), 5)


@pytest.mark.parametrize(
    "bad", [{"num_rounds": 0}, {"tau_max": -0.1}, {"tau_per_nat": float("nan")}, {"tau_max": float("inf")}]
)
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RoundsConfig(**bad)


def play_for_real(seed=0):
    world, some = taught(0), desk(0)
    model = world.make_model()
    model.lm_head.weight.requires_grad_(False)
    loop = Loop(model, LoopConfig(lr=1e-2, total_steps=9, seed=0), world.pad_id)
    board = Board(
        world.pool, world.anchors, world.target, world.replay, world.copy_of, world.pad_id, RescoreConfig(), seed
    )
    draw = some.stream("select/random")
    played = play_rounds(loop, board, RoundsConfig(num_rounds=3), num_rows=20, num_steps=9, batch_size=8, draw=draw)
    return loop, played


def test_a_real_run_is_repeatable_and_leaves_the_model_in_training():
    loop, played = play_for_real()
    again, same = play_for_real()
    assert loop.losses == again.losses
    assert played.rounds == same.rounds
    assert all((a == b).all() for a, b in zip(loop.model.parameters(), again.model.parameters(), strict=True))
    flags = {name for name, p in loop.model.named_parameters() if not p.requires_grad}
    assert flags == {"lm_head.weight"}
    assert loop.model.training
    assert len(played.ids) == len(set(played.ids)) == 20
    assert len(loop.losses) == 9
    assert played.rounds[0].rise == {"A": 0.0}
    other, _ = play_for_real(seed=1)
    assert other.losses != loop.losses
