"""The prompt held constant: against one float64 backward per row through a forward whose prompt states are cut off."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import toy
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from gradsift.errors import ConfigError
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.prefix import hold_prompts
from gradsift.gradients.project import Projector, sketch_reference
from gradsift.gradients.upper import choose_upper
from gradsift.models.parameters import choose_parameters

PROJECTOR = Projector(seed=7, dim=61)
# What holds a layer's queries, keys and values: with these cut before a position nothing before it has a gradient.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "c_attn", "q_norm", "k_norm")


SMALL = {**toy.COMMON, "num_key_value_heads": 2}


def mistral(seed=0, dtype=torch.float32):
    """A window of 4 tokens in every layer."""
    return toy._finish(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), seed, dtype)


def gemma3(seed=0, dtype=torch.float32):
    """A window in one layer of two."""
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=4, layer_types=kinds)
    return toy._finish(Gemma3ForCausalLM(config), seed, dtype)


def llama4(seed=0, dtype=torch.float32):
    """Chunks of 4 tokens in one layer of two."""
    config = Llama4TextConfig(
        **SMALL, head_dim=8, attention_chunk_size=4, intermediate_size_mlp=48, moe_layers=[], use_qk_norm=False,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    return toy._finish(Llama4ForCausalLM(config), seed, dtype)


WINDOWED = {f.__name__: f for f in (mistral, gemma3, llama4)}
MODELS = {**toy.TOYS, "upper": toy.toy_qwen2, **WINDOWED}


def some_batch(lengths, first, seed=0):
    """Rows whose first trained token is at ``first``; another one further on is not trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, toy.VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    labels = ids.clone()
    for b, (n, f) in enumerate(zip(lengths, first, strict=True)):
        ids[b, n:], labels[b, n:] = 3, -100
        labels[b, :f] = -100
        if f + 2 < n:
            labels[b, f + 1] = -100
    return ids, labels, torch.tensor(lengths)


def truth(model, names, ids, labels):
    """Cut keys, values and hidden states before the first predicting position off, in the ordinary forward of the row."""
    model = copy.deepcopy(model).double()
    start = int((labels[1:] != -100).nonzero()[0])

    def cut(_m, _i, out):
        axis = 1 if out.shape[1] == len(ids) else 2  # norms on heads stand before or behind the exchange of both axes
        before, after = out.tensor_split((start,), axis)
        return torch.cat([before.detach(), after], axis)

    def cut_layer(_m, _i, out):
        return (cut(None, None, out[0]), *out[1:]) if isinstance(out, tuple) else cut(None, None, out)

    for name, module in model.named_modules():
        if name.split(".")[-1] in PROJECTIONS:
            module.register_forward_hook(cut)
    from gradsift.gradients.taps import find_layers

    for layer in find_layers(model):
        layer.register_forward_hook(cut_layer)
    model.get_input_embeddings().register_forward_hook(cut)
    if hasattr(model, "transformer"):
        model.transformer.wpe.register_forward_hook(cut)
    # Inside a layer, what is computed from a prompt's state without attention goes to the prompt's output, which is cut.
    return example_gradient(model, names, ids, labels)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", MODELS)
def test_every_signal_equals_a_forward_with_the_prompt_cut_off(kind, dtype, limit):
    model = MODELS[kind](0, dtype)
    parameters = choose_parameters(model, "lora" if kind == "lora" else "all")
    first = None
    if kind == "upper":
        upper = choose_upper(model, choose_parameters(model, ("model.layers.*",)), "1")
        parameters, first = upper.parameters, upper.first
    engine = GradientEngine(model, parameters.names, projector=PROJECTOR, trained_only=True, first_layer=first)
    generator = torch.Generator().manual_seed(5)
    drawn = {n: torch.randn(b.rows, b.cols, generator=generator, dtype=torch.float64).to(dtype)
             for n, b in engine.blocks.items()}  # fmt: skip
    engine.num_directions = 1
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, [drawn[name]])
    ids, labels, lengths = some_batch([9, 6, 12, 7, 2], [4, 5, 10, 1, 1])
    with engine:
        got = engine.measure(ids, labels, lengths)
        whole = engine.forward_only(ids, labels, lengths).loss
    torch.testing.assert_close(got.loss, whole, rtol=0, atol=limit * 10)
    assert torch.isnan(got.emb_norm).all()
    for b, n in enumerate(lengths.tolist()):
        want = truth(model, list(parameters.names), ids[b, :n], labels[b, :n])
        matrices = {name: engine.matrix(name, g).double() for name, g in want.by_name.items()}
        norm = float(sum(m.square().sum() for m in matrices.values())) ** 0.5
        dot = float(sum((m * drawn[name].double()).sum() for name, m in matrices.items()))
        length = float(sum(d.double().square().sum() for d in drawn.values())) ** 0.5
        sketch = sum(sketch_reference(m.numpy(), PROJECTOR, name) for name, m in matrices.items())
        assert abs(want.loss - float(got.loss[b])) <= limit * 10
        assert abs(norm - float(got.square[b]) ** 0.5) <= limit * norm
        assert abs(dot - float(got.dots[b, 0])) <= limit * norm * length
        assert np.abs(sketch - got.sketch[b].double().numpy()).max() <= limit * norm


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rows_are_cut_before_the_position_that_predicts_the_first_trained_token(data):
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=5))
    first = [data.draw(st.integers(1, n - 1)) for n in lengths]
    ids, labels, sizes = some_batch(lengths, first)
    held = hold_prompts(ids, labels, sizes)
    assert held.starts.tolist() == [f - 1 for f in first]
    for b, (n, f) in enumerate(zip(lengths, first, strict=True)):
        together = torch.cat([held.prefix[b, : f - 1], held.input_ids[b, : held.lengths[b]]])
        assert together.tolist() == ids[b, :n].tolist()
        assert held.labels[b, : held.lengths[b]].tolist() == labels[b, f - 1 : n].tolist()
        assert (held.labels[b, held.lengths[b] :] == -100).all()
        assert held.positions[b, : held.lengths[b]].tolist() == list(range(f - 1, n))
        assert held.mask[b].tolist()[: held.prefix.shape[1]] == [int(k < f - 1) for k in range(held.prefix.shape[1])]


def test_rows_without_a_prompt_are_measured_as_ever():
    model = toy.TOYS["llama"](0, torch.float64)
    names = choose_parameters(model, "all").names
    ids, labels, lengths = some_batch([8, 5], [1, 1])
    with GradientEngine(model, names) as engine:
        want = engine.measure(ids, labels, lengths)
    with GradientEngine(model, names, trained_only=True) as engine:
        got = engine.measure(ids, labels, lengths)
    assert torch.equal(got.square, want.square)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_padding_stands_before_a_short_prefix_where_places_count(data):
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=5))
    first = [data.draw(st.integers(1, n - 1)) for n in lengths]
    ids, labels, sizes = some_batch(lengths, first)
    plain, held = hold_prompts(ids, labels, sizes), hold_prompts(ids, labels, sizes, adjacent=True)
    width = held.prefix.shape[1]
    assert width == max(first) - 1
    for b, f in enumerate(first):
        assert held.seen[b].tolist() == [k >= width - (f - 1) for k in range(width)]
        assert held.prefix[b][held.seen[b]].tolist() == ids[b, : f - 1].tolist()
        assert held.prefix_positions[b][held.seen[b]].tolist() == list(range(f - 1))
        assert held.mask[b].tolist() == [*held.seen[b].int().tolist(), *[1] * held.input_ids.shape[1]]
    for name in ("starts", "input_ids", "labels", "lengths", "positions"):
        assert torch.equal(getattr(held, name), getattr(plain, name))


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_row_in_a_batch_is_what_it_is_alone_in_front_of_a_window(kind):
    model = WINDOWED[kind](0, torch.float64)
    names = choose_parameters(model, "all").names
    ids, labels, lengths = some_batch([20, 16, 14, 15], [16, 3, 10, 14])
    with GradientEngine(model, names, trained_only=True) as engine:
        got = engine.measure(ids, labels, lengths)
        for b, n in enumerate(lengths.tolist()):
            alone = engine.measure(ids[b : b + 1, :n], labels[b : b + 1, :n], lengths[b : b + 1])
            torch.testing.assert_close(got.loss[b : b + 1], alone.loss, rtol=0, atol=1e-10)
            torch.testing.assert_close(got.square[b : b + 1], alone.square, rtol=1e-10, atol=0)


def lfm2():
    return Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))


def mamba2():
    size = {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=toy.VOCABULARY, hidden_size=32, num_hidden_layers=2, **size))


def qwen3_next():
    heads = {f"linear_{name}": n for name, n in
             (("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 8), ("value_head_dim", 8))}  # fmt: skip
    config = Qwen3NextConfig(
        **SMALL, **heads, num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


@pytest.mark.parametrize("make", [lfm2, mamba2, qwen3_next])
def test_layers_that_keep_a_state_are_refused_when_the_engine_is_made(make):
    model = make()
    names = choose_parameters(model, "all").names
    with pytest.raises(ConfigError, match="held constant") as refused:
        GradientEngine(model, names, trained_only=True)
    assert type(model).__name__ in refused.value.got
    assert refused.value.where == "collect.positions"
    GradientEngine(model, names)


def test_what_belongs_to_whole_rows_is_refused():
    model = toy.TOYS["llama"](0)
    with pytest.raises(ConfigError, match="embeddings"):
        GradientEngine(model, (), embedding=True, trained_only=True)
    ids, labels, lengths = some_batch([8], [4])
    with GradientEngine(model, ["model.norm.weight"], trained_only=True) as engine, pytest.raises(ConfigError):
        engine.measure(ids, labels, lengths, torch.zeros(1, 8, dtype=torch.bool))
