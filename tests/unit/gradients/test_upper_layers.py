"""The upper part of a model: every signal against one float64 backward per example, and that the rest is not run."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import toy

from gradsift.errors import ConfigError
from gradsift.gradients.directions import build_direction
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.project import Projector, sketch_reference
from gradsift.gradients.taps import find_layers
from gradsift.gradients.upper import choose_upper, first_layer
from gradsift.models.parameters import choose_parameters
from gradsift.types import RowStatus, TokenRow

PROJECTOR = Projector(seed=7, dim=61)
KINDS = [*toy.TOYS, "llama_tied"]


@pytest.fixture(autouse=True)
def _four_layers(monkeypatch):
    monkeypatch.setitem(toy.COMMON, "num_hidden_layers", 4)


def make(kind, dtype=torch.float64):
    return toy.toy_llama(0, dtype, tied=True) if kind == "llama_tied" else toy.TOYS[kind](0, dtype)


def parameters_of(model, kind):
    return choose_parameters(model, "lora" if kind == "lora" else "all")


def some_batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, toy.VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    labels = ids.clone()
    for b, n in enumerate(lengths):
        ids[b, n:], labels[b, n:] = 3, -100
        labels[b, : min(3, n - 1)] = -100
    return ids, labels, torch.tensor(lengths)


def untied(model):
    """The same function, the head's weight a parameter of its own where it was the embedding's."""
    out = copy.deepcopy(model)
    head = out.get_output_embeddings()
    if head.weight is out.get_input_embeddings().weight:
        out.config.tie_word_embeddings = False
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return out


def truth(model, names, ids, labels):
    """The plain per-example gradient of the whole model, of the head alone where a tied weight counts in part."""
    apart = untied(model)
    own = {name for name, _ in apart.named_parameters()}
    table = next(n for n, p in apart.named_parameters() if p is apart.get_input_embeddings().weight)
    there = {n: "lm_head.weight" if n == table and "lm_head.weight" in own else n for n in names}
    gradient = example_gradient(apart.double(), list(there.values()), ids, labels)
    return gradient.loss, {name: gradient.by_name[other] for name, other in there.items()}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("share", ["1", "50%", "100%"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_signal_equals_the_whole_gradient_restricted_to_these_parameters(kind, share, dtype, limit):
    model = make(kind, dtype)
    upper = choose_upper(model, parameters_of(model, kind), share)
    engine = GradientEngine(model, upper.parameters.names, projector=PROJECTOR, first_layer=upper.first)
    generator = torch.Generator().manual_seed(5)
    drawn = {n: torch.randn(b.rows, b.cols, generator=generator, dtype=torch.float64).to(dtype)
             for n, b in engine.blocks.items()}  # fmt: skip
    engine.num_directions = 1
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, [drawn[name]])
    ids, labels, lengths = some_batch([9, 5, 12, 7])
    with engine:
        got = engine.measure(ids, labels, lengths)
    assert engine.uncovered == ()
    assert torch.isnan(got.emb_norm).all()
    for b, n in enumerate(lengths.tolist()):
        loss, gradient = truth(model, list(upper.parameters.names), ids[b, :n], labels[b, :n])
        matrices = {name: engine.matrix(name, g).double() for name, g in gradient.items()}
        norm = float(sum(m.square().sum() for m in matrices.values())) ** 0.5
        dot = float(sum((m * drawn[name].double()).sum() for name, m in matrices.items()))
        length = float(sum(d.double().square().sum() for d in drawn.values())) ** 0.5
        sketch = sum(sketch_reference(m.numpy(), PROJECTOR, name) for name, m in matrices.items())
        assert abs(loss - float(got.loss[b])) <= limit * 10
        assert abs(norm - float(got.square[b]) ** 0.5) <= limit * norm
        assert abs(dot - float(got.dots[b, 0])) <= limit * norm * length
        assert np.abs(sketch - got.sketch[b].double().numpy()).max() <= limit * norm


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_stops_where_the_hooks_stop(kind):
    model = make(kind, torch.float32)
    upper = choose_upper(model, parameters_of(model, kind), "2" if kind != "gpt2" else "1")
    graded = []
    layers = find_layers(model)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _m, _i, out, n=number: graded.append((n, (out[0] if isinstance(out, tuple) else out).requires_grad))
        )
    engine = GradientEngine(model, upper.parameters.names, first_layer=upper.first)
    ids, labels, lengths = some_batch([6, 4])
    with engine:
        engine.measure(ids, labels, lengths)
    assert graded == [(n, n >= upper.first) for n in range(len(layers))]  # below, nothing is kept for a backward


def test_whole_passes_before_and_after_are_as_they_were():
    model = make("qwen2")
    ids, labels, lengths = some_batch([9, 5])
    whole = choose_parameters(model, "all")
    upper = choose_upper(model, whole, "1")
    with GradientEngine(model, whole.names) as engine:
        before = engine.measure(ids, labels, lengths)
    with GradientEngine(model, upper.parameters.names, first_layer=upper.first) as engine:
        part = engine.measure(ids, labels, lengths)
        assert torch.equal(part.square, engine.measure(ids, labels, lengths).square)  # the mark is taken back each time
    with GradientEngine(model, whole.names) as engine:
        assert torch.equal(before.square, engine.measure(ids, labels, lengths).square)
    assert (part.square < before.square).all()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_layers_and_what_follows(kind):
    model = make(kind)
    chosen = parameters_of(model, kind)
    upper = choose_upper(model, chosen, "1")
    num = len(find_layers(model))
    assert (upper.first, upper.num_layers, upper.text) == (num - 1, num, f"{num} to {num} of {num}")
    below = [n for n in chosen.names if any(f".{k}." in n for k in range(num - 1))]
    assert not set(below) & set(upper.parameters.names)
    last = [n for n in chosen.names if f".{num - 1}." in n]
    assert set(last) <= set(upper.parameters.names)
    untied = dict.fromkeys(("llama", "lora", "qwen3"))
    tied = {"gpt2": "transformer.wte.weight", **untied}.get(kind, "model.embed_tokens.weight")
    assert upper.in_part == (() if tied is None else (tied,))
    rest = set(upper.parameters.names) - set(last)
    ends = {**{k: {"model.norm.weight", "lm_head.weight"} for k in ("llama", "qwen3")}, "lora": set(),
            "gpt2": {"transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}}  # fmt: skip
    assert rest == ends.get(kind, {"model.embed_tokens.weight", "model.norm.weight"})
    assert list(upper.parameters.names) == [n for n in chosen.names if n in set(upper.parameters.names)]


@given(num=st.integers(1, 80), count=st.integers(1, 80), percent=st.floats(0.01, 100))
def test_shares_round_up_and_counts_are_counts(num, count, percent):
    first = first_layer(f"{percent:.6f}%", num)
    assert 0 <= first < num
    assert num - first == pytest.approx(percent / 100 * num, abs=1.001)
    assert num - first >= percent / 100 * num - 1e-6
    if count <= num:
        assert first_layer(str(count), num) == num - count
    else:
        with pytest.raises(ConfigError, match="upper layers"):
            first_layer(str(count), num)


def test_ten_percent_of_thirty_layers_are_three():
    assert [first_layer(t, 30) for t in ("10%", "12.5%", "25%", "50%", "100%", "30", "1")] == [27, 26, 22, 15, 0, 0, 29]
    with pytest.raises(ConfigError, match="upper layers"):
        first_layer("0%", 30)


def test_parameters_that_are_all_further_down_are_refused():
    model = make("llama")
    low = choose_parameters(model, ("model.layers.0.*",))
    with pytest.raises(ConfigError, match="no chosen parameter"):
        choose_upper(model, low, "1")


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), share=st.sampled_from(["1", "2", "75%"]))
def test_a_direction_is_the_mean_of_the_rows_upper_gradients(seed, share):
    model = make("qwen2")
    ids, labels, lengths = some_batch([8, 5, 6], seed)
    rows = [
        TokenRow(f"r{b}", ids[b, :n].numpy().astype(np.int32), (labels[b, :n] != -100).numpy(), n, RowStatus.OK)
        for b, n in enumerate(lengths.tolist())
    ]
    upper = choose_upper(model, choose_parameters(model, "all"), share)
    built = build_direction(
        "math", model, upper.parameters.names, rows, PROJECTOR, tokens_per_batch=64, pad_id=3, first_layer=upper.first
    )
    every = [
        truth(model, list(upper.parameters.names), ids[b, :n], labels[b, :n])[1] for b, n in enumerate(lengths.tolist())
    ]
    mean = {name: sum(g[name] for g in every) / 3 for name in upper.parameters.names}
    norm = float(sum(m.double().square().sum() for m in mean.values())) ** 0.5
    assert built.norm == pytest.approx(norm, rel=1e-9)
    for name, matrix in built.matrices.items():
        want = mean[name] if mean[name].ndim == 2 else mean[name][None]
        torch.testing.assert_close(matrix, want / norm, atol=1e-9, rtol=1e-7)
