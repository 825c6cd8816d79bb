"""The trainer against its plain twin and plain SFTTrainer; resumption; what a killed save leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.lessons import lesson_config, lesson_plan, lesson_rows
from tests.toy import toy_gpt2, toy_llama, toy_lora, toy_tokenizer

from gradsift.errors import ConfigError, DataError, Interrupted, NumericsError
from gradsift.train.loop import Loop
from gradsift.train.parts import Cost, trainable
from gradsift.train.plan import TrainPlan
from gradsift.train.trainer import SelectionTrainer, TrainData

ROWS = lesson_rows()
PLAN = lesson_plan(ROWS)
WEIGHTS = {name: 0.25 * n for n, name in enumerate(ROWS)}


class Halving:
    """A hook with memory: halves the gradient of every other parameter, adds the gradient of the step before."""

    name = "halving"

    def __init__(self, seconds: float = 0.0) -> None:
        self.cost, self.before, self.steps, self.seconds = Cost(), {}, [], seconds

    def __call__(self, model: torch.nn.Module, step: int) -> None:
        self.steps.append(step)
        for n, (name, p) in enumerate(trainable(model)):
            assert p.grad is not None
            fresh = p.grad.clone()
            p.grad.mul_(0.5 if n % 2 else 1.0).add_(self.before.get(name, torch.zeros_like(p)))
            self.before[name] = fresh
        self.cost += Cost(flops=1.0, seconds=self.seconds)

    def summary(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        return self.before

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.before = dict(state)


class Pull:
    """A penalty: share times the mean square of all weights."""

    name = "pull"

    def __init__(self) -> None:
        self.cost, self.begun = Cost(), []

    def begin(self, step: int) -> None:
        self.begun.append(step)

    def __call__(self, model: torch.nn.Module, batch: Any, logits: Any, share: float) -> torch.Tensor:
        return share * sum(p.square().mean() for _, p in trainable(model))  # type: ignore[return-value]


def train(model: torch.nn.Module, config: Any, **options: Any) -> SelectionTrainer:
    data = TrainData(options.pop("plan", PLAN), ROWS, options.pop("weights", {}))
    return SelectionTrainer(model, toy_tokenizer(), config, data, **options)


def gap(one: torch.nn.Module, two: torch.nn.Module) -> float:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "weights, hook and penalty"])
@pytest.mark.parametrize("make", [toy_llama, toy_lora, toy_gpt2], ids=["full", "lora", "dropout"])
def test_equals_the_plain_loop_bit_for_bit(make: Any, extras: bool) -> None:
    config = lesson_config(weight_decay=0.1)
    one, two = make(1), make(1)
    weights = WEIGHTS if extras else {}
    options = [{"penalties": (Pull(),), "hook": Halving()} if extras else {} for _ in range(2)]
    loop = Loop(one, config.loop(PLAN.num_steps), 3, **options[0])
    loop.run(PLAN.steps, ROWS.__getitem__, weights)
    trainer = train(two, config, weights=weights, **options[1])
    trainer.train()
    assert trainer.losses == loop.losses
    assert gap(one, two) == 0
    assert (trainer.cost.flops, trainer.cost.forward_tokens) == (loop.cost.flops, loop.cost.forward_tokens)
    if extras:
        assert options[1]["hook"].steps == options[1]["penalties"][0].begun == list(range(6))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("budget", [1, 40])
def test_accumulation_changes_nothing_but_the_last_bits(budget: int, extras: bool) -> None:
    one, two = toy_llama(1), toy_llama(1)
    weights = WEIGHTS if extras else {}
    options = [{"penalties": (Pull(),), "hook": Halving()} if extras else {} for _ in range(2)]
    loop = Loop(one, lesson_config().loop(PLAN.num_steps), 3, **options[0])
    loop.run(PLAN.steps, ROWS.__getitem__, weights)
    trainer = train(two, lesson_config(tokens_per_micro_batch=budget), weights=weights, **options[1])
    trainer.train()
    np.testing.assert_allclose(trainer.losses, loop.losses, rtol=0, atol=2e-6)
    assert gap(one, two) < 2e-6


def test_equals_plain_sft_trainer_at_equal_weights(tmp_path: Path) -> None:
    """The trainer that users know, on the same rows in the same order, with its own fused loss."""
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from gradsift.train.dataset import make_dataset

    ordered = TrainPlan(tuple(tuple(list(ROWS)[s : s + 5]) for s in (0, 5)))
    losses: list[float] = []

    class Note(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=5, learning_rate=1e-3, use_cpu=True, bf16=False,
        logging_steps=1, report_to="none", save_strategy="no", max_length=None, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", optim="adamw_torch", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    rows = make_dataset(ordered, ROWS, {}).select_columns(["input_ids", "labels"])
    one = toy_llama(1)
    SFTTrainer(one, args=arguments, train_dataset=rows, processing_class=toy_tokenizer(), callbacks=[Note()]).train()
    two = toy_llama(1)
    trainer = train(two, lesson_config(batch_size=5, steps=2, schedule="constant", warmup_steps=0), plan=ordered)
    trainer.train()
    np.testing.assert_allclose(trainer.losses, losses, rtol=0, atol=2e-5)  # it rounds what it logs
    assert gap(one, two) < 1e-6


def test_a_doubled_weight_equals_a_row_that_stands_twice() -> None:
    ids = list(ROWS)[:3]
    once, twice = TrainPlan((tuple(ids),)), TrainPlan(((*ids, ids[0]),))
    one = train(toy_llama(1), lesson_config(batch_size=3), plan=once, weights={ids[0]: 2.0})
    two = train(toy_llama(1), lesson_config(batch_size=4), plan=twice)
    one.train()
    two.train()
    assert abs(one.losses[0] - two.losses[0]) < 1e-6


@pytest.mark.parametrize(("stop", "budget"), [(1, 40), (2, 4096), (3, 40), (4, 4096), (5, 40)])
def test_a_resumed_run_has_the_same_trajectory(stop: int, budget: int, tmp_path: Path) -> None:
    config = lesson_config(save_steps=2, tokens_per_micro_batch=budget)
    whole = train(toy_lora(1), config, hook=Halving())
    whole.train()
    seen = []

    def tick(rows: int, tokens: int) -> None:
        seen.append(tokens)
        if len(seen) == stop:
            raise Interrupted(15, "again")

    with pytest.raises(Interrupted):
        train(toy_lora(1), config, hook=Halving(), folder=tmp_path, tick=tick).resume()
    again = train(toy_lora(1), config, hook=Halving(), folder=tmp_path)
    found = again.resume()
    assert found.path is not None
    assert found.path.name == f"checkpoint-{stop}"
    residuals = np.subtract(again.losses, whole.losses)
    assert np.abs(residuals).max() < 1e-6
    assert abs(residuals.mean()) < 1e-7
    assert gap(again.model, whole.model) < 1e-7
    assert again.cost.flops == whole.cost.flops
    assert again.hook.cost == whole.hook.cost  # type: ignore[union-attr]


def test_a_save_that_was_killed_or_damaged_falls_back_with_a_remark(tmp_path: Path) -> None:
    config = lesson_config(save_steps=2)
    whole = train(toy_llama(1), config, folder=tmp_path)
    whole.resume()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    file = tmp_path / "checkpoint-6" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00" if file.read_bytes()[-1] else file.read_bytes()[:-1] + b"\x01")
    (tmp_path / ".checkpoint-8.abc").mkdir()
    again = train(toy_llama(1), config, folder=tmp_path)
    found = again.resume()
    assert found.path is not None
    assert found.path.name == "checkpoint-4"
    assert "checkpoint-8 was being saved" in found.remarks[0]
    assert "checkpoint-6 is damaged (weights.safetensors" in found.remarks[1]
    assert again.losses == whole.losses
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_a_save_killed_in_the_middle_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsift.train import trainer as module

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    config = lesson_config(save_steps=4)
    monkeypatch.setattr(module, "save_moments", die)
    with pytest.raises(KeyboardInterrupt):
        train(toy_llama(1), config, folder=tmp_path).resume()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = lesson_config(save_steps=4)
    first = train(toy_llama(1), config, folder=tmp_path)
    first.resume()
    again = train(toy_llama(1), config, folder=tmp_path)
    again.resume()
    assert again.losses == first.losses
    assert gap(again.model, first.model) == 0


def test_checkpoints_hold_no_pickle(tmp_path: Path) -> None:
    train(toy_llama(1), lesson_config(save_steps=3), folder=tmp_path).resume()
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert {name.rpartition(".")[2] for name in names} == {"json", "safetensors"}
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"seed": 1}])
def test_a_checkpoint_of_other_settings_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    train(toy_llama(1), lesson_config(save_steps=3), folder=tmp_path).resume()
    with pytest.raises(ConfigError, match="other settings"):
        train(toy_llama(1), lesson_config(save_steps=3, **change), folder=tmp_path).resume()
    with pytest.raises(ConfigError, match="other settings"):
        train(toy_llama(1), lesson_config(save_steps=3), folder=tmp_path, weights=WEIGHTS).resume()
    shutil.rmtree(tmp_path)


def test_a_loss_that_is_not_finite_names_the_step_and_its_rows() -> None:
    model = toy_llama(1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match=f"step 0: rows {PLAN.steps[0][0]}"):
        train(model, lesson_config()).train()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"r0": -1.0}, "negative"),
        ({"r0": float("nan")}, "not finite"),
        (dict.fromkeys(ROWS, 0.0), "nothing to train on"),
    ],
)
def test_weights_that_cannot_be_trained_with_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(toy_llama(1), lesson_config(), weights=weights)


def test_the_model_has_its_own_forward_back() -> None:
    model = toy_llama(1)
    train(model, lesson_config())
    assert "forward" not in vars(model)


def test_the_seconds_of_a_hook_are_counted_once() -> None:
    """A hook that says it took a thousand seconds: a step's own time is the rest."""
    config = lesson_config()
    loop = Loop(toy_lora(1), config.loop(PLAN.num_steps), 3, hook=Halving(1000.0))
    loop.run(PLAN.steps, ROWS.__getitem__, {})
    trainer = train(toy_lora(1), config, hook=Halving(1000.0))
    trainer.train()
    for one in (loop, trainer):
        assert -1000.0 * PLAN.num_steps < one.cost.seconds < -1000.0 * PLAN.num_steps + 600
