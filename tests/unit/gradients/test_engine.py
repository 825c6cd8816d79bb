"""The engine against the oracle: every layer kind, every signal, float64 and float32, alone and in batches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import TOYS, VOCABULARY, toy_gpt2, toy_llama

from gradsift.errors import ConfigError
from gradsift.gradients import project
from gradsift.gradients.blocks import Block, Dense, Outer, Totals
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient, finite_difference
from gradsift.gradients.project import Projector, sketch_reference
from gradsift.models.parameters import choose_parameters

PROJECTOR = Projector(seed=7, dim=61)


def chosen(model):
    names = [name for name, _ in model.named_parameters()]
    lora = [name for name in names if "lora_" in name]
    return lora or names


def batch(lengths, seed=0, first_trained=3):
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(4, VOCABULARY, (len(lengths), width), generator=generator)
    labels = ids.clone()
    for b, n in enumerate(lengths):
        ids[b, n:], labels[b, n:] = 3, -100
        labels[b, : min(first_trained, n - 1)] = -100
        ids[b, n // 2] = ids[b, 0]  # a repeated token: its embedding gradients must be summed before the norm
    return ids, torch.where(labels == -100, labels, ids), torch.tensor(lengths)


def random_directions(engine, count, dtype):
    generator = torch.Generator().manual_seed(5)
    return {
        name: [torch.randn(b.rows, b.cols, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
        for name, b in engine.blocks.items()
    }


def engine_with_directions(model, count=3):
    names = chosen(model)
    engine = GradientEngine(model, names, projector=PROJECTOR)
    directions = random_directions(engine, count, engine.dtype)
    engine.num_directions = count
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, directions[name])
    return engine, directions


def truth(engine, oracle, directions, ids, labels, n):
    gradient = example_gradient(oracle, list(engine.blocks), ids[:n], labels[:n])
    matrices = {name: engine.matrix(name, g).double() for name, g in gradient.by_name.items()}
    count = len(next(iter(directions.values())))
    return {
        "loss": gradient.loss,
        "norm": float(sum(m.square().sum() for m in matrices.values())) ** 0.5,
        "dots": [float(sum((m * directions[k][i].double()).sum() for k, m in matrices.items())) for i in range(count)],
        "lengths": [float(sum(d[i].double().square().sum() for d in directions.values())) ** 0.5 for i in range(count)],
        "sketch": sum(sketch_reference(m.numpy(), PROJECTOR, name) for name, m in matrices.items()),
        "by_name": gradient.by_name,
    }


@pytest.mark.parametrize("cells", [1 << 15, 64])  # toys fold only where cells are few
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", TOYS)
def test_every_signal_equals_the_oracle(kind, dtype, limit, cells, monkeypatch):
    monkeypatch.setattr(project, "CELLS", cells)
    model = TOYS[kind](dtype=dtype)
    engine, directions = engine_with_directions(model)
    ids, labels, lengths = batch([9, 5, 12, 7])
    with engine:
        got = engine.measure(ids, labels, lengths)
    assert engine.uncovered == ()
    oracle = copy.deepcopy(model).double()
    for b, n in enumerate(lengths.tolist()):
        want = truth(engine, oracle, directions, ids[b], labels[b], n)
        assert abs(want["loss"] - float(got.loss[b])) <= limit
        assert abs(want["norm"] - float(got.square[b]) ** 0.5) <= limit * want["norm"]
        for i in range(3):
            assert abs(want["dots"][i] - float(got.dots[b, i])) <= limit * want["norm"] * want["lengths"][i]
        assert np.abs(want["sketch"] - got.sketch[b].double().numpy()).max() <= limit * want["norm"]


@pytest.mark.parametrize("kind", TOYS)
def test_a_row_alone_and_in_any_batch_agree(kind):
    model = TOYS[kind]()
    engine, _ = engine_with_directions(model)
    ids, labels, lengths = batch([9, 5, 12, 7, 3, 12])
    with engine:
        together = engine.measure(ids, labels, lengths)
        shuffled = engine.measure(ids.flip(0), labels.flip(0), lengths.flip(0))
        for b, n in enumerate(lengths.tolist()):
            alone = engine.measure(ids[b : b + 1, :n], labels[b : b + 1, :n], lengths[b : b + 1])
            norm = float(alone.square[0]) ** 0.5
            for other in (together.sketch[b], shuffled.sketch[len(lengths) - 1 - b]):
                assert float((alone.sketch[0] - other).norm()) <= 1e-5 * norm
            assert abs(float(together.square[b]) ** 0.5 - norm) <= 1e-5 * norm
            assert float((together.dots[b] - alone.dots[0]).abs().max()) <= 1e-5 * norm * 200


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_norms_are_kept_apart(tied):
    model = toy_llama(dtype=torch.float64, tied=tied)
    ids, labels, lengths = batch([9, 6])
    untied = copy.deepcopy(model)
    if tied:
        untied.config.tie_word_embeddings = False
        untied.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for names in (chosen(model), ["model.norm.weight"]):  # measured by the block, and by the closed form
        engine = GradientEngine(model, names)
        with engine:
            got = engine.measure(ids, labels, lengths)
        for b, n in enumerate(lengths.tolist()):
            want = example_gradient(
                untied, ["model.embed_tokens.weight", "lm_head.weight"], ids[b, :n], labels[b, :n]
            ).by_name
            assert float(got.emb_norm[b]) == pytest.approx(float(want["model.embed_tokens.weight"].norm()), rel=1e-10)
            assert float(got.head_norm[b]) == pytest.approx(float(want["lm_head.weight"].norm()), rel=1e-10)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma"])
def test_dots_equal_finite_differences(kind):
    model = TOYS[kind](dtype=torch.float64)
    engine, directions = engine_with_directions(model, count=2)
    ids, labels, lengths = batch([8, 11], seed=3)
    with engine:
        got = engine.measure(ids, labels, lengths)
    parameters = dict(model.named_parameters())
    for i in range(2):
        step = {}
        for name, d in directions.items():
            shape = parameters[name].shape
            step[name] = (d[i].t() if d[i].shape != shape and d[i].t().shape == shape else d[i]).reshape(shape)
            if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                step[name] = d[i].t().contiguous()
        length = float(sum(d.square().sum() for d in step.values())) ** 0.5
        for b, n in enumerate(lengths.tolist()):
            slope = float(finite_difference(model, step, ids[b, :n], labels[b, :n], step=1e-6 / length))
            scale = float(got.square[b]) ** 0.5 * length
            assert abs(slope - float(got.dots[b, i])) <= 1e-5 * scale


def test_sum_of_rows_is_the_batch_gradient():
    """Linearity: the built mean equals the gradient of the mean of the losses."""
    model = toy_gpt2(dtype=torch.float64)
    names = chosen(model)
    engine = GradientEngine(model, names, building=True)
    ids, labels, lengths = batch([9, 5, 12])
    with engine:
        engine.measure(ids, labels, lengths)
    total = {name: torch.zeros(b.rows, b.cols, dtype=torch.float64) for name, b in engine.blocks.items()}
    for b, n in enumerate(lengths.tolist()):
        for name, g in example_gradient(model, names, ids[b, :n], labels[b, :n]).by_name.items():
            total[name] += engine.matrix(name, g)
    for name, block in engine.blocks.items():
        torch.testing.assert_close(block.mean, total[name], rtol=1e-10, atol=1e-12)


def test_tokens_without_loss_have_no_effect_behind_the_last_trained_one():
    model = toy_llama(dtype=torch.float64)
    engine = GradientEngine(model, chosen(model), projector=PROJECTOR)
    ids, labels, lengths = batch([12])
    labels[0, 8:] = -100
    changed = ids.clone()
    changed[0, 9:] = 5
    with engine:
        a, b = engine.measure(ids, labels, lengths), engine.measure(changed, labels, lengths)
        short = engine.measure(ids[:, :9], labels[:, :9], torch.tensor([9]))
    torch.testing.assert_close(a.sketch, b.sketch, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.sketch, short.sketch, rtol=0, atol=1e-12)


def test_a_row_that_is_not_finite_leaves_its_neighbors_bitwise_alone():
    model = toy_llama()
    model.model.embed_tokens.weight.data[250] = float("nan")
    engine, _ = engine_with_directions(model)
    ids, labels, lengths = batch([9, 9, 9])
    ids, labels = ids.clamp(max=200), torch.where(labels == -100, labels, ids.clamp(max=200))
    with engine:
        clean = engine.measure(ids, labels, lengths)
        poisoned_ids = ids.clone()
        poisoned_ids[1, 2] = 250
        poisoned = engine.measure(poisoned_ids, labels, lengths)
    assert not np.isfinite(float(poisoned.loss[1]))
    for b in (0, 2):
        assert torch.equal(clean.sketch[b], poisoned.sketch[b])
        assert torch.equal(clean.dots[b], poisoned.dots[b])
        assert float(clean.loss[b]) == float(poisoned.loss[b])


def test_losses_alone_equal_the_measured_ones():
    model = toy_llama()
    engine, _ = engine_with_directions(model)
    ids, labels, lengths = batch([9, 5])
    with engine:
        torch.testing.assert_close(
            engine.forward_only(ids, labels, lengths).loss, engine.measure(ids, labels, lengths).loss
        )


def test_hooks_are_gone_afterwards():
    model = toy_llama()
    engine, _ = engine_with_directions(model)
    before = model(torch.arange(4, 12)[None]).logits
    with engine:
        engine.measure(*batch([9, 5]))
    assert torch.equal(model(torch.arange(4, 12)[None]).logits, before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_block_equals_plain_arithmetic(data):
    """Any shape, tile border and length: dots, squares and sketches of a sum of outer products."""
    draw = data.draw
    rows, cols, num = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 11))
    lengths = tuple(draw(st.lists(st.integers(0, 5), min_size=num, max_size=num)))
    dim = draw(st.sampled_from([3, 7, 61]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    starts = tuple(int(s) for s in np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    x = torch.randn(sum(lengths), cols, generator=generator, dtype=torch.float64)
    g = torch.randn(sum(lengths), rows, generator=generator, dtype=torch.float64)
    directions = torch.randn(2, rows * cols, generator=generator, dtype=torch.float64)
    projector = Projector(3, dim)
    from gradsift.gradients import blocks

    block = blocks.make_block("w", rows, cols, projector, dtype=torch.float64, device=torch.device("cpu"))
    block.directions = directions
    totals = Totals(torch.zeros(num, 2).double(), torch.zeros(num).double(), torch.zeros(num, dim).double())
    tile, chunk = draw(st.sampled_from([(4, 1), (16, 2), (1 << 16, 8)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", tile)
        patch.setattr(blocks, "CHUNK", chunk)
        patch.setattr(blocks, "FOLDS_FAR", draw(st.sampled_from([1, 4, 1000])))
        patch.setattr(project, "CELLS", draw(st.sampled_from([1, 6, 1 << 15])))
        block.measure([Outer(x, g, lengths, starts)], totals)
        wants = [
            sketch_reference((g[s : s + n].t() @ x[s : s + n]).numpy(), projector, "w")
            for s, n in zip(starts, lengths, strict=True)
        ]
    for b in range(num):
        matrix = g[starts[b] : starts[b] + lengths[b]].t() @ x[starts[b] : starts[b] + lengths[b]]
        torch.testing.assert_close(totals.square[b], matrix.square().sum())
        torch.testing.assert_close(totals.dots[b], directions @ matrix.flatten())
        np.testing.assert_allclose(totals.sketch[b].numpy(), wants[b], atol=1e-10)


def test_mixed_uses_without_a_rule_are_refused():
    block = Block("w", 2, 2)
    totals = Totals(torch.zeros(1, 0), torch.zeros(1), None)
    flat = Outer(torch.ones(1, 2), torch.ones(1, 2), (1,), (0,))
    with pytest.raises(AssertionError, match="w"):
        block.measure([flat, Dense(torch.ones(1, 4))], totals)


@pytest.mark.parametrize("edges", [True, False])
def test_parameters_that_no_rule_reads_are_refused_where_nothing_else_is_chosen(edges):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 260, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=3))
    names = choose_parameters(model, ("*embed_positions*",)).names
    with pytest.raises(ConfigError, match="no layer rule") as refused:
        GradientEngine(model, names, edges=edges)
    assert refused.value.got == "model.decoder.embed_positions.weight"
    assert refused.value.where == "navigator.parameters"
    more = choose_parameters(model, ("*embed_positions*", "*fc1*")).names
    assert GradientEngine(model, more, edges=edges).uncovered == names
