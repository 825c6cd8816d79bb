"""An adapted layer as one step against peft's own arithmetic, and what is left to peft."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.toy import VOCABULARY, toy_gpt2, toy_llama

from gradsift.errors import ModelError
from gradsift.gradients import adapters
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.models.parameters import choose_parameters


def adapted(kind, dtype=torch.float64, *, scaling=2.0, **settings):
    model = {"llama": toy_llama, "gpt2": toy_gpt2}[kind](0, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft corrects fan_in_fan_out for GPT-2 by itself and warns about it
        config = LoraConfig(r=4, lora_alpha=4 * scaling, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)
    return model.eval()


def layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def engine_of(model, keep=lambda name: True, **settings):
    names = [n for n, _ in model.named_parameters() if "lora_" in n and keep(n)]
    engine = GradientEngine(model, names, projector=Projector(3, 61), **settings)
    generator = torch.Generator().manual_seed(5)
    engine.num_directions = 2
    for name, block in engine.blocks.items():
        drawn = [torch.randn(block.rows, block.cols, generator=generator, dtype=torch.float64) for _ in range(2)]
        block.directions = engine.flatten(name, [d.to(engine.dtype) for d in drawn])
    return engine


def rows(lengths=(9, 5, 12)):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    labels = ids.clone()
    for b, n in enumerate(lengths):
        ids[b, n:], labels[b, n:], labels[b, :2] = 3, -100, -100
    return ids, labels, torch.tensor(lengths)


@pytest.mark.parametrize("edges", [False, True])  # without, the lowest adapted layer's input needs no gradient
@pytest.mark.parametrize("keep", ["", "lora_A", "lora_B", "1"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_signals_equal_those_through_peft(kind, keep, edges, monkeypatch):
    model = adapted(kind)
    keep = keep.replace("1", "layers.1" if kind == "llama" else "h.1")  # the upper layer alone
    engine = engine_of(model, lambda name: keep in name, edges=edges)
    calls, apply = [], adapters._Step.apply
    monkeypatch.setattr(adapters._Step, "apply", lambda *args: calls.append(1) or apply(*args))
    with engine:
        stepped = [engine.measure(*rows()) for _ in range(2)][-1]
        losses = engine.forward_only(*rows()).loss
    touched = [m for m in layers(model) if {m.lora_A["default"], m.lora_B["default"]} & set(engine._uses)]
    assert len(calls) == 2 * len(touched) > 0
    monkeypatch.setattr(adapters, "read", lambda module: None)
    with engine:
        plain = engine.measure(*rows())
    assert len(calls) == 2 * len(touched)
    torch.testing.assert_close(losses, plain.loss, rtol=1e-12, atol=0)
    for name in ("loss", "square", "dots", "sketch", "emb_norm", "head_norm"):
        one, other = getattr(stepped, name), getattr(plain, name)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11, equal_nan=not edges)
    assert float(plain.square.min()) > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_layer_computes_what_peft_does_and_hands_on_the_same_gradient(kind):
    for module in layers(adapted(kind)):
        layer = adapters.read(module)
        assert layer is not None
        x = torch.randn(2, 5, layer.weight.shape[1], dtype=torch.float64, requires_grad=True)
        g = torch.randn(2, 5, layer.weight.shape[0], dtype=torch.float64)
        y = module(x)
        (want,) = torch.autograd.grad(y, x, g)
        arrived = {}
        keep = partial(lambda into, one, *rest: into.update({one: rest}), arrived)
        with adapters.stepping(module, layer, lambda _: True, keep):
            mine = module(x)
            (down,) = torch.autograd.grad(mine, x, g)
        torch.testing.assert_close(mine, y)
        torch.testing.assert_close(down, want)
        weights = [layer.a.weight, layer.b.weight]
        for weight, one in zip(weights, (layer.a, layer.b), strict=True):
            weight.requires_grad_(True)
            own, slope = arrived[one]
            torch.testing.assert_close(
                slope.flatten(0, 1).t() @ own.flatten(0, 1), torch.autograd.grad(module(x), weight, g)[0]
            )
        assert "forward" not in vars(module)


def test_what_is_no_plain_adapter_is_left_to_peft():
    def first(model):
        return layers(model)[0]

    assert adapters.read(first(adapted("llama"))) is not None
    assert adapters.read(toy_llama()) is None
    assert adapters.read(first(adapted("llama", use_dora=True))) is None
    assert adapters.read(first(adapted("llama", lora_bias=True))) is None
    assert adapters.read(first(adapted("llama", torch.bfloat16))) is None
    assert adapters.read(first(adapted("llama", lora_dropout=0.5).train())) is None
    assert adapters.read(first(adapted("llama", lora_dropout=0.5))) is not None
    mixed = adapted("llama", torch.float32)
    first(mixed).lora_A["default"].double()
    assert adapters.read(first(mixed)) is None
    two = adapted("llama")
    two.add_adapter("other", LoraConfig(r=4, target_modules="all-linear"))
    two.base_model.set_adapter(["default", "other"])
    assert adapters.read(first(two)) is None
    watched = adapted("llama")
    first(watched).lora_A["default"].register_forward_hook(lambda *_: None)
    assert adapters.read(first(watched)) is None
    merged = adapted("llama")
    merged.merge_adapter()
    assert adapters.read(first(merged)) is None


def test_an_adapter_switched_off_meanwhile_is_off():
    model = adapted("llama")
    ids, labels, lengths = rows()
    with model.disable_adapter(), engine_of(model) as engine:
        want = engine.forward_only(ids, labels, lengths).loss
    with engine_of(model) as engine:
        on = engine.forward_only(ids, labels, lengths).loss
        with model.disable_adapter():
            off = engine.forward_only(ids, labels, lengths).loss
    assert torch.equal(off, want)
    assert not torch.allclose(on, off)


def test_layers_are_as_before_after_an_error():
    model = adapted("llama")

    def broken():
        with engine_of(model):
            assert all("forward" in vars(module) for module in layers(model))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    assert not any("forward" in vars(module) for module in layers(model))


def test_dora_is_refused_by_name():
    settings = {"r": 4, "target_modules": "all-linear", "use_dora": True, "task_type": "CAUSAL_LM"}
    model = get_peft_model(toy_llama(), LoraConfig(**settings))
    with pytest.raises(ModelError, match="DoRA") as refused:
        GradientEngine(model, choose_parameters(model, "lora").names)
    assert "q_proj" in refused.value.where
    GradientEngine(model, ())  # a forward alone is the model's own
