"""Online selection: the rows that are chosen are those trained on, when they are due; a stopped run goes on as it would have."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.lessons import lesson_config, lesson_rows, token_row
from tests.toy import toy_gpt2, toy_llama, toy_lora, toy_tokenizer

from gradsift.errors import ConfigError, DataError, Interrupted
from gradsift.geometry.cluster import Clusters
from gradsift.policy.episodes import Episodes, Observation, Step, Table, Terms
from gradsift.policy.statistics import describe_clusters
from gradsift.seeds import stream
from gradsift.train.held_out import DevSets
from gradsift.train.loop import Loop
from gradsift.train.online import OnlineSelection
from gradsift.train.online_parts import OnlineConfig, Refreshed
from gradsift.train.online_trainer import OnlineData, OnlineTrainer
from gradsift.train.parts import Cost
from gradsift.train.plan import TrainPlan
from gradsift.train.refresh import Rescorer
from gradsift.train.rescore import RescoreConfig, rescore
from gradsift.train.rollout import LoopDynamics, roll
from gradsift.train.trainer import SelectionTrainer, TrainData

ROWS = lesson_rows(14)
IDS = tuple(ROWS)
DEV = DevSets(
    tuple(lesson_rows(2, seed=1, prefix="t").values()),
    {"general": tuple(lesson_rows(2, seed=2, prefix="g").values())},
    3,
)
MEMBERS = ((3, 0, 7, 5, 9), (1, 2, 4), (13, 12, 11, 10, 8, 6))


def table(members: tuple[tuple[int, ...], ...] = MEMBERS, tokens: bool = False) -> Table:
    price = np.array([row.num_trained for row in ROWS.values()]) if tokens else np.ones(14, dtype=np.int64)
    k = len(members)
    return Table(members, price, np.arange(k, dtype=np.float64)[:, None], ("number",), np.arange(k) == k - 1)


class First:
    """Cluster 0 while it may be chosen, then the next one."""

    name = "first"

    def begin(self, episodes: Episodes, stream: Any) -> None:
        self.seen: list[Observation] = []
        self.steps: list[Step] = []

    def act(self, observation: Observation) -> np.ndarray:
        self.seen.append(observation)
        return np.argmax(observation.mask, axis=1)

    def learn(self, actions: np.ndarray, step: Step) -> None:
        self.steps.append(step)


class Moody(First):
    """Draws, and leans on what it has seen of losses and statistics: any slip of state shows in its choices."""

    name = "moody"

    def begin(self, episodes: Episodes, stream: Any) -> None:
        super().begin(episodes, stream)
        self.random, self.value = stream.numpy(), np.zeros(episodes.table.num_clusters)

    def act(self, observation: Observation) -> np.ndarray:
        super().act(observation)
        score = self.value + self.random.random(len(self.value)) * 1e-3 + observation.clusters[0, :, 0] * 1e-4
        return np.array([int(np.argmax(np.where(observation.mask[0], score, -np.inf)))])

    def learn(self, actions: np.ndarray, step: Step) -> None:
        super().learn(actions, step)
        self.value[actions[0]] += 0.3 * (step.reward[0] - step.cost[0, 0]) - 0.01


def online(policy: Any = None, budget: int = 14, members: Any = MEMBERS, **changes: Any) -> OnlineSelection:
    tokens = changes.pop("tokens", False)
    refresh = changes.pop("refresh", None)
    config = OnlineConfig(**{"updates": 2, **changes})
    terms = Terms(2 * config.updates, budget, np.array([0.1]))
    return OnlineSelection(table(members, tokens), IDS, policy or First(), terms, DEV, config, refresh=refresh)


def settings(**changes: Any) -> Any:
    return lesson_config(**{"steps": None, "batch_size": 2, **changes})


def trainer(model: Any, chosen: OnlineSelection, config: Any = None, **options: Any) -> OnlineTrainer:
    data = OnlineData(options.pop("rows", ROWS), options.pop("weights", {}))
    return OnlineTrainer(model, toy_tokenizer(), config or settings(), data, chosen, **options)


def watch(run: SelectionTrainer) -> list[tuple[str, ...]]:
    """Record the rows that are really sent through the model."""
    seen: list[tuple[str, ...]] = []
    step = run.training_step

    def spy(model: Any, inputs: Any, num: Any = None) -> Any:
        seen.append(tuple(row.id for row in inputs["rows"]))
        return step(model, inputs, num)

    run.training_step = spy  # type: ignore[method-assign]
    return seen


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_rows_trained_are_those_chosen_in_order_and_an_exhausted_cluster_is_masked() -> None:
    chosen = online()
    run = trainer(toy_llama(1), chosen)
    seen = watch(run)
    run.train()
    assert [one.cluster for one in chosen.decisions] == [0, 0, 1, 2, 2]
    assert [one.rows for one in chosen.decisions] == [(3, 0, 7, 5), (9,), (1, 2, 4), (13, 12, 11, 10), (8, 6)]
    batches = [(3, 0), (7, 5), (9,), (1, 2), (4,), (13, 12), (11, 10), (8, 6)]
    assert seen == [tuple(IDS[i] for i in batch) for batch in batches]
    assert chosen.policy.seen[2].mask[0].tolist() == [False, True, True]
    assert chosen.over
    assert run.state.global_step == 8
    assert run.cost.backward_tokens == sum(row.num_tokens for row in ROWS.values())


def test_the_losses_are_those_of_the_navigator_on_the_same_rows() -> None:
    """Constant learning rate, so that both twins take the same steps."""
    chosen = online(Moody())
    config = settings(schedule="constant", warmup_steps=0)
    run = trainer(toy_gpt2(1), chosen, config)
    run.train()
    loop = Loop(toy_gpt2(1), config.loop(99), 3)
    dynamics = LoopDynamics(loop, list(ROWS.values()), DEV, rows_per_decision=4, updates=2)
    real, got = roll(dynamics, chosen.rollout().rows).rollout, chosen.rollout()
    assert got.target.tolist() == real.target.tolist()
    assert got.protect.tolist() == real.protect.tolist()
    steps = chosen.policy.steps
    assert np.array([s.reward[0] for s in steps]).tolist() == (-np.diff(real.target)).tolist()
    assert np.array([s.cost[0] for s in steps]).tolist() == np.diff(real.protect, axis=0).tolist()
    assert chosen.dev_cost.forward_tokens == dynamics.dev_cost.forward_tokens
    assert run.cost.flops == dynamics.train_cost.flops
    assert chosen.rescore_cost == Cost()


@pytest.mark.parametrize(("updates", "schedule"), [(1, "constant"), (2, "cosine"), (3, "linear")])
def test_a_fixed_list_trains_as_an_ordinary_data_set_in_that_order(updates: int, schedule: str) -> None:
    order = tuple(int(i) for i in np.random.default_rng(0).permutation(14)[:12])
    plan = TrainPlan(tuple(tuple(IDS[i] for i in order[s : s + 2]) for s in range(0, 12, 2)))
    weights = {name: 0.5 + n for n, name in enumerate(IDS)}
    config = settings(schedule=schedule)
    usual = SelectionTrainer(toy_lora(1), toy_tokenizer(), config, TrainData(plan, ROWS, weights))
    usual.train()
    chosen = online(members=(order,), budget=12, updates=updates)
    run = trainer(toy_lora(1), chosen, config, weights=weights)
    run.train()
    assert run.losses == usual.losses
    assert same(run.model, usual.model)


def test_each_decision_is_taken_when_the_one_before_has_been_seen() -> None:
    events: list[str] = []

    class Noted(First):
        def act(self, observation: Observation) -> np.ndarray:
            events.append("act")
            return super().act(observation)

        def learn(self, actions: np.ndarray, step: Step) -> None:
            events.append("learn")

    run = trainer(toy_llama(1), online(Noted(), budget=8))
    step = run.training_step
    run.training_step = lambda *given: events.append("train") or step(*given)  # type: ignore[method-assign,func-returns-value]
    run.train()
    assert events == ["act", "train", "train", "learn", "act", "train", "learn", "act", "train", "train", "learn"]


def test_a_loader_that_reads_ahead_is_refused() -> None:
    """Accelerate's loader asks for the next batch before it hands out this one."""

    class Ahead(OnlineTrainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(super().get_train_dataloader())

    run = Ahead(toy_llama(1), toy_tokenizer(), settings(), OnlineData(ROWS, {}), online())
    with pytest.raises(ConfigError, match="reads ahead"):
        run.train()


@pytest.mark.parametrize(("field", "value"), [("dataloader_num_workers", 1), ("gradient_accumulation_steps", 2)])
def test_loader_settings_that_read_ahead_are_refused(field: str, value: int) -> None:
    run = trainer(toy_llama(1), online())
    setattr(run.args, field, value)
    with pytest.raises(ConfigError, match="one batch at a time"):
        run.train()


@pytest.mark.parametrize("tokens", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("budget", [1, 9, 100])
def test_the_budget_is_kept_and_no_row_comes_twice(budget: int, tokens: bool) -> None:
    chosen = online(Moody(), budget=budget + 8 * tokens, tokens=tokens, shuffle=True)
    run = trainer(toy_llama(1), chosen)
    seen = watch(run)
    run.train()
    flat = [i for batch in seen for i in batch]
    spent = sum(ROWS[i].num_trained if tokens else 1 for i in flat)
    assert len(set(flat)) == len(flat)
    assert spent == chosen.spent <= budget + 8 * tokens
    if not tokens:
        assert spent == min(budget, 14)
    assert 1 <= run.state.global_step <= chosen.pace.max_steps
    assert run.state.global_step == len(seen)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=14), st.integers(1, 60), st.integers(1, 3), st.data())
def test_the_bound_on_steps_holds_and_the_schedule_ends_with_the_budget(
    prices: list[int], budget: int, updates: int, data: st.DataObject
) -> None:
    """Played without training: the process alone."""
    cut = len(prices) // 2
    members = (tuple(range(cut)), tuple(range(cut, len(prices))))
    some = Table(members, np.array(prices), np.zeros((2, 1)), ("x",), np.array([False, True]))
    chosen = OnlineSelection(
        some, IDS[: len(prices)], First(), Terms(2 * updates, budget, np.array([0.1])), DEV, OnlineConfig(updates)
    )
    start = {"steps": 0, "start": {"target": 1.0, "protect": [1.0]}, "decisions": [], "open": None, "num_dropped": 0,
             "dev_cost": asdict(Cost()), "rescore_cost": asdict(Cost())}  # fmt: skip
    chosen.restore(start)
    chosen.policy.act = lambda seen: np.array([data.draw(st.sampled_from(np.flatnonzero(seen.mask[0]).tolist()))])
    while not chosen.over:
        chosen._settle(replace(chosen._decide(), target=1.0, protect=(1.0,)))
    num = len(chosen.batches)
    assert num <= chosen.pace.max_steps
    assert chosen.spent <= budget
    pace = [chosen.progress(s) for s in range(num)]
    assert pace == sorted(pace)
    assert not pace or (pace[0] == 0 and pace[-1] < chosen.pace.nominal_steps)


@pytest.mark.parametrize(("stop", "rescored"), [(1, False), (7, False), (2, True), (5, True)])
def test_a_stopped_run_goes_on_to_the_same_decisions_and_weights(stop: int, rescored: bool, tmp_path: Path) -> None:
    def make() -> OnlineSelection:
        more = {"refresh": rescorer(), "rescore_every": 2} if rescored else {}
        chosen = online(Moody(), shuffle=True, **more)
        return described(chosen, more) if rescored else chosen

    config = settings(save_steps=3)
    whole = trainer(toy_lora(1), make(), config)
    whole.train()
    count = []

    def tick(rows: int, tokens: int) -> None:
        count.append(rows)
        if len(count) == stop:
            raise Interrupted(15, "again")

    with pytest.raises(Interrupted):
        trainer(toy_lora(1), make(), config, folder=tmp_path, tick=tick).resume()
    again = trainer(toy_lora(1), make(), config, folder=tmp_path)
    seen = watch(again)
    found = again.resume()
    assert found.path is not None
    assert found.path.name == f"checkpoint-{stop}"
    assert again.online.decisions == whole.online.decisions
    assert [tuple(IDS[i] for i in batch) for batch in whole.online.batches[stop:]] == seen
    assert again.losses == whole.losses
    assert same(again.model, whole.model)
    for name in ("dev_cost", "rescore_cost"):
        assert getattr(again.online, name).flops == getattr(whole.online, name).flops
    assert again.online.num_rescored == whole.online.num_rescored
    assert (whole.online.num_rescored > 0) == rescored


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = settings(save_steps=100)
    first = trainer(toy_llama(1), online(), config, folder=tmp_path)
    first.resume()
    again = trainer(toy_llama(1), online(), config, folder=tmp_path)
    seen = watch(again)
    found = again.resume()
    assert found.path is not None
    assert found.path.name == "checkpoint-8"
    assert not seen
    assert again.online.decisions == first.online.decisions
    assert same(again.model, first.model)
    assert json.loads((found.path / "online.json").read_text())["steps"] == 8


def test_a_save_before_the_measurement_repeats_the_measurement() -> None:
    """Whoever saves at the end of a step may come before the decision is closed."""
    chosen = online(Moody())
    run = trainer(toy_llama(1), chosen)
    states: list[Any] = []
    close = chosen._close

    def spy() -> None:
        states.append(json.loads(json.dumps(chosen.state())))
        close()

    chosen._close = spy  # type: ignore[method-assign]
    run.train()
    open_ones = [state for state in states if state["open"] is not None]
    assert open_ones
    again = online(Moody())
    again.restore(open_ones[1])
    assert again._open is not None
    assert len(again.batches) == again._done
    again._model = toy_llama(1)
    assert again.batch(again._done) is not None
    assert len(again.decisions) == 2


def test_another_policy_or_other_terms_do_not_go_on(tmp_path: Path) -> None:
    config = settings(save_steps=2)
    trainer(toy_llama(1), online(), config, folder=tmp_path).resume()
    for other in (online(Moody()), online(budget=13), online(shuffle=True), online(policy_key="b"), online(seed=1)):
        with pytest.raises(ConfigError, match="other settings"):
            trainer(toy_llama(1), other, config, folder=tmp_path).resume()

    class Last(First):
        def act(self, observation: Observation) -> np.ndarray:
            return np.array([int(np.flatnonzero(observation.mask[0])[-1])])

    with pytest.raises(ConfigError, match="decides otherwise"):
        trainer(toy_llama(1), online(Last()), config, folder=tmp_path).resume()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trainer(toy_llama(1), online(), settings(steps=5)), "the budget of the policy ends training"),
        (lambda: trainer(toy_llama(1), online(), settings(batch_size=3)), "are not its batches"),
        (lambda: online(rescore_every=2), "an interval and something that rescores"),
        (lambda: online(refresh=lambda *_: Refreshed(np.zeros((3, 1)), Cost())), "an interval and something"),
        (lambda: online(rescore_every=-1), "out of range"),
        (lambda: online(updates=0), "at least 1|fewer rows|out of its range|out of range"),
    ],
)
def test_what_contradicts_itself_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_row_that_trains_nothing_is_refused_before_training() -> None:
    rows = {**ROWS, "r3": token_row("r3", [4, 5, 6], [True, False, False])}
    with pytest.raises(DataError, match="nothing to train on"):
        trainer(toy_llama(1), online(), rows=rows)


# Rescoring.


def rescorer(**changes: Any) -> Rescorer:
    anchors = {"general": tuple(lesson_rows(3, seed=5, prefix="a").values())}
    target = tuple(lesson_rows(3, seed=6, prefix="x").values())
    return Rescorer(list(ROWS.values()), anchors, target, RescoreConfig(parameters="lora", sketch_dim=67), 3, **changes)


def described(chosen: OnlineSelection, more: dict[str, Any], model: Any = None) -> OnlineSelection:
    """The same with the statistics of the starting weights."""
    scorer = rescorer()
    problem = rescore(model or toy_lora(1), scorer.pool, scorer.anchors, scorer.target,
                      replace(scorer.config, keep_sketch=True), pad_id=3).problem  # fmt: skip
    number = {i: n for n, i in enumerate(IDS)}
    owner = {i: k for k, some in enumerate(MEMBERS) for i in some}
    labels = np.array([owner[number[i]] for i in problem.ids])
    groups = Clusters(labels, np.zeros((3, 1), np.float32), np.bincount(labels).astype(np.int64))
    full = describe_clusters(problem, groups, labels == 2, stream(0, "members"))
    some = Table(MEMBERS, np.ones(14, dtype=np.int64), full.features, full.feature_names, np.arange(3) == 2)
    return OnlineSelection(some, IDS, chosen.policy, chosen.episodes.terms, DEV, chosen.config, refresh=more["refresh"])


def test_rescoring_of_all_rows_at_the_same_weights_changes_nothing() -> None:
    """The slow twin is the description of the whole pool at once; rows stand in another order there."""
    more = {"refresh": rescorer(), "rescore_every": 2}
    chosen = described(online(**more), more)
    fresh = rescorer()(toy_lora(1).train(), chosen.episodes.table, chosen.rows)
    np.testing.assert_allclose(fresh.features, chosen.episodes.table.features, rtol=0, atol=1e-6)
    assert fresh.num_dropped == 0
    assert fresh.cost.backward_tokens > 0


def test_rescoring_sees_the_model_in_training_and_is_counted_apart() -> None:
    more = {"refresh": rescorer(), "rescore_every": 2}
    chosen = described(online(**more), more)
    model = toy_lora(1)
    run = trainer(model, chosen)
    run.train()
    plain = trainer(toy_lora(1), online())
    plain.train()
    assert same(model, plain.model)  # measuring moves nothing
    fresh = [one.features is not None for one in chosen.decisions]
    # steps 2, 1, 2, 2, 1: due after 2, then after 3 more; nothing is rescored once nothing is left
    assert fresh == [True, False, True, True, False]
    assert chosen.num_rescored == 3
    assert chosen.rescore_cost.backward_tokens > 0
    assert run.cost.flops == plain.cost.flops
    assert chosen.dev_cost.flops == plain.online.dev_cost.flops
    before, names = chosen._table.features, chosen._table.feature_names
    after = np.array(chosen.decisions[-2].features)
    stays = [names.index("log_size"), names.index("is_general")]
    np.testing.assert_array_equal(after[:, stays], before[:, stays])
    np.testing.assert_array_equal(after[0], np.array(chosen.decisions[0].features)[0])  # used up since: as it was
    assert np.abs(after[2] - before[2]).max() > 0
    shown = chosen.policy.seen[1].clusters[0, :, :-1]
    first = np.array(chosen.decisions[0].features)
    spread = first.std(axis=0)
    np.testing.assert_allclose(shown, (first - first.mean(axis=0)) / np.where(spread > 1e-12, spread, 1), atol=1e-9)


def test_a_navigator_is_measured_in_place_of_the_model_in_training() -> None:
    more = {"refresh": rescorer(navigator=toy_lora(1)), "rescore_every": 2}
    chosen = described(online(**more), more)
    trainer(toy_lora(1), chosen).train()
    first = np.array(chosen.decisions[0].features)
    before = chosen._table.features
    np.testing.assert_allclose(first[2], before[2], atol=1e-6)  # no row of it was used, and the navigator stands still
