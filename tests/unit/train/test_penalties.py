"""Penalties against slow twins in float64, at the base model, and with micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.lessons import lesson_config, lesson_plan, lesson_rows
from tests.toy import toy_gpt2, toy_llama, toy_lora, toy_tokenizer

from gradsift.errors import ConfigError
from gradsift.train.parts import TrainBatch, make_batch, trainable
from gradsift.train.penalties import BaseKl, Ewc, L2Sp, adapted_layers, begin_step, estimate_fisher, weight_delta
from gradsift.train.trainer import SelectionTrainer, TrainData

ROWS = lesson_rows()
GENERAL = list(lesson_rows(6, seed=9, prefix="g").values())


def lora(seed: int = 0) -> Any:
    return toy_lora(seed, torch.float64)


def full(seed: int = 0) -> Any:
    return toy_llama(seed, torch.float64)


def batch_of(names: list[str], weights: list[float] | None = None) -> TrainBatch:
    return make_batch([ROWS[n] for n in names], 3, torch.device("cpu"), weights)


def logits_of(model: Any, batch: TrainBatch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def move(model: Any, seed: int = 5, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in trainable(model):
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def distance(model: Any, base: Any) -> dict[str, torch.Tensor]:
    """Differences of effective weights: the slow twin merges the adapter."""
    merged = model.merge_and_unload() if adapted_layers(model) else model
    before = dict(base.named_parameters())
    return {n: p.detach() - before[n].detach() for n, p in merged.named_parameters()}


@pytest.mark.parametrize("make", [full, lora], ids=["full", "lora"])
def test_l2sp_is_half_the_squared_distance_of_the_effective_weights(make: Any) -> None:
    model, batch = make(), batch_of(["r0"])
    penalty = L2Sp(model, 3.0)
    move(model)
    got = float(penalty(model, batch, logits_of(model, batch), 0.25).detach())
    want = sum(float(d.square().sum()) for d in distance(model, full()).values())
    assert got == pytest.approx(0.25 * 3.0 / 2 * want, rel=1e-5)
    assert want > 0


@pytest.mark.parametrize("make", [full, lora], ids=["full", "lora"])
def test_fisher_and_ewc_equal_the_slow_twin(make: Any) -> None:
    """The twin differentiates the bare base model, one row at a time, and merges adapters to get the distance."""
    model, bare = make(), full()
    fisher = estimate_fisher(model, GENERAL, 3)
    named = dict(bare.named_parameters())
    squares = {n: torch.zeros_like(p) for n, p in named.items()}
    for row in GENERAL:
        ids = torch.tensor(row.input_ids[None].astype(np.int64))
        logp = torch.log_softmax(bare(input_ids=ids).logits[0], -1)
        spots = [t for t in range(1, row.num_tokens) if row.trained[t]]
        loss = -sum(logp[t - 1, row.input_ids[t]] for t in spots) / len(spots)
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):  # type: ignore[arg-type]
            squares[name] += g.square() / len(GENERAL)
    names = {n: n.removeprefix("base_model.model.") + ("" if make is full else ".weight") for n in fisher.diagonal}
    assert len(names) == (len(named) if make is full else 14)
    for n, diagonal in fisher.diagonal.items():
        torch.testing.assert_close(diagonal.double(), squares[names[n]], rtol=2e-4, atol=1e-9)
    assert fisher.cost.backward_tokens == sum(row.num_tokens for row in GENERAL)
    penalty, batch = Ewc(model, 2.0, fisher), batch_of(["r0"])
    move(model)
    got = float(penalty(model, batch, logits_of(model, batch), 0.5).detach())
    far = distance(model, bare)
    want = sum(float((squares[names[n]] * far[names[n]].square()).sum()) for n in fisher.diagonal)
    assert got == pytest.approx(0.5 * 2.0 / 2 * want, rel=1e-4)


def test_fisher_leaves_the_model_as_it_was() -> None:
    model = lora().train()
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    estimate_fisher(model, GENERAL[:1], 3)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asked
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def slow_kl(model: Any, base: Any, rows: list[Any], weights: list[float]) -> float:
    total = norm = 0.0
    with torch.no_grad():
        for row, weight in zip(rows, weights, strict=True):
            ids = torch.tensor(row.input_ids[None].astype(np.int64))
            p, q = (torch.log_softmax(m(input_ids=ids).logits[0].double(), -1) for m in (base, model))
            for t in range(1, row.num_tokens):
                if row.trained[t]:
                    total += weight * float((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum())
                    norm += weight
    return total / norm


@pytest.mark.parametrize("make", [full, lora], ids=["full", "lora"])
def test_kl_equals_the_slow_twin_and_adds_up_over_micro_batches(make: Any) -> None:
    model, base, names, weights = make(), full(), ["r0", "r1", "r2"], [1.0, 0.5, 2.0]
    penalty = BaseKl(model, 1.5)
    move(model)
    batch = batch_of(names, weights)
    want = 1.5 * slow_kl(model, base, [ROWS[n] for n in names], weights)
    assert float(penalty(model, batch, logits_of(model, batch), 1.0).detach()) == pytest.approx(want, rel=1e-4)
    assert penalty.cost.forward_tokens == batch.num_tokens
    masses = [w * ROWS[n].num_trained for n, w in zip(names, weights, strict=True)]
    parts = 0.0
    for name, weight, mass in zip(names, weights, masses, strict=True):
        one = batch_of([name], [weight])
        parts += float(penalty(model, one, logits_of(model, one), mass / sum(masses)).detach())
    assert parts == pytest.approx(want, rel=1e-4)


def test_kl_has_a_gradient_into_the_adapter_and_none_into_the_base() -> None:
    model, batch = lora(), batch_of(["r0", "r1"])
    model.train()
    penalty = BaseKl(model, 1.0)
    penalty(model, batch, logits_of(model, batch), 1.0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in trainable(model))
    assert all(p.grad is None for _, p in model.named_parameters() if not p.requires_grad)
    assert len(trainable(model)) == 28
    assert model.training


def test_kl_on_general_rows_is_measured_once_per_step_on_rows_drawn_by_id() -> None:
    model, base = lora(), full()
    penalty = BaseKl(model, 1.0, general=GENERAL, rows_per_step=2, pad_id=3, seed=1)
    mirrored = BaseKl(model, 1.0, general=GENERAL[::-1], rows_per_step=2, pad_id=3, seed=1)
    batch = batch_of(["r0"])
    logits = logits_of(model, batch)
    values = []
    for step in range(4):
        begin_step([penalty, mirrored], step)
        first = float(penalty(model, batch, logits, 0.3).detach())
        assert float(penalty(model, batch, logits, 0.7).detach()) == 0.0
        assert first == float(mirrored(model, batch, logits, 1.0).detach())
        values.append(first)
    pairs = {slow_kl(model, base, [a, b], [1.0, 1.0]) for a in GENERAL for b in GENERAL if a.id < b.id}
    assert all(min(abs(v - pair) for pair in pairs) < 1e-6 for v in values)
    assert len(set(values)) > 1


@pytest.mark.parametrize("make", [full, lambda: toy_gpt2(0, torch.float64)], ids=["llama", "gpt2"])
def test_penalties_are_zero_before_the_first_step(make: Any) -> None:
    model, batch = make(), batch_of(["r0", "r1"])
    fisher = estimate_fisher(model, GENERAL[:2], 3)
    for penalty in (L2Sp(model, 1.0), Ewc(model, 1.0, fisher), BaseKl(model, 1.0)):
        assert float(penalty(model, batch, logits_of(model, batch), 1.0).detach()) == pytest.approx(0, abs=1e-12)


def test_conv1d_deltas_have_the_shape_of_the_weight() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(toy_gpt2(), LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True))
    assert len(adapted_layers(model)) == 8
    for _, layer in adapted_layers(model):
        assert weight_delta(layer).shape == layer.get_base_layer().weight.shape
        torch.testing.assert_close(weight_delta(layer), layer.get_delta_weight("default"))


@pytest.mark.parametrize("kind", ["l2sp", "ewc", "kl"])
def test_a_strong_penalty_keeps_the_trained_model_near_its_base(kind: str) -> None:
    def run(weight: float) -> float:
        model = toy_lora(1).float()
        for _, layer in adapted_layers(model):
            torch.nn.init.zeros_(layer.lora_B["default"].weight)
        penalty: Any = {
            "l2sp": lambda: L2Sp(model, weight),
            "ewc": lambda: Ewc(model, weight * 30, estimate_fisher(model, GENERAL, 3)),
            "kl": lambda: BaseKl(model, weight),
        }[kind]()
        config = lesson_config(lr=1e-2, schedule="constant", warmup_steps=0, tokens_per_micro_batch=30)
        data = TrainData(lesson_plan(ROWS, 12), ROWS)
        SelectionTrainer(model, toy_tokenizer(), config, data, penalties=(penalty,)).train()
        with torch.no_grad():
            return float(sum(weight_delta(layer).square().sum() for _, layer in adapted_layers(model)))

    assert run(30.0) < 0.6 * run(0.0)


def test_two_active_adapters_are_refused() -> None:
    model = lora()
    for _, layer in adapted_layers(model):
        layer._active_adapter = ["default", "other"]
    with pytest.raises(ConfigError, match="several active"):
        L2Sp(model, 1.0)(model, batch_of(["r0"]), torch.zeros(1), 1.0)
