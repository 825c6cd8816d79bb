"""A foreign implementation agrees: dattri-llm's captured gradients against the engine, on the body's linear layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.toy import VOCABULARY, toy_gpt2, toy_llama, toy_qwen2

from gradsift.gradients.hooks import GradientEngine

LINEAR = ("Linear", "Conv1D")


def body_layers(model):
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module).__name__ in LINEAR and module is not head]


def rows():
    generator = torch.Generator().manual_seed(4)
    lengths = [11, 7, 9]
    ids = torch.randint(4, VOCABULARY, (3, 11), generator=generator)
    labels = ids.clone()
    for b, n in enumerate(lengths):
        ids[b, n:], labels[b, n:], labels[b, :2] = 3, -100, -100
    return ids, labels, torch.tensor(lengths)


def theirs(model, ids, labels, directions):
    """Dots and squared norms by dattri-llm's hooks and contractions, through the model's ordinary padded forward."""
    from dattri_llm import HookManager, HookManagerConfig
    from dattri_llm.gradient import ops

    layers = body_layers(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    config = HookManagerConfig(hook_types=dict.fromkeys(layers, "linear_io"), capture_style="factorized")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager = HookManager(model, config)
        with manager.collect(deregister_on_exit=True):
            logits = model(input_ids=ids, use_cache=False).logits
            nats = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
            )
            (nats.sum(1) / (labels[:, 1:] != -100).sum(1)).sum().backward()
            gradient = manager.get_gradient()
    dots, square = 0, 0
    for name, value in gradient.data.items():
        kind = gradient.layer_types[name]
        dense = ops.materialize(value, kind, include_bias=False)
        dots = dots + ops.cross_dot(dense, directions[name].flatten()[None], kind)[:, 0]
        square = square + ops.grad_norm_sq(dense, kind)
    return dots, square


@pytest.mark.parametrize("make", [toy_llama, toy_gpt2, toy_qwen2])
@pytest.mark.filterwarnings("ignore")
def test_dattri_llm_gives_the_same_dots_and_norms(make):
    model = make(seed=2)
    layers = body_layers(model)
    engine = GradientEngine(model, [f"{name}.weight" for name in layers])
    generator = torch.Generator().manual_seed(9)
    matrices = {name: torch.randn(block.rows, block.cols, generator=generator) for name, block in engine.blocks.items()}
    engine.num_directions = 1
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, [matrices[name]])
    ids, labels, lengths = rows()
    with engine:
        ours = engine.measure(ids, labels, lengths)
    dots, square = theirs(model, ids, labels, {name.removesuffix(".weight"): m for name, m in matrices.items()})
    length = sum(float(m.square().sum()) for m in matrices.values()) ** 0.5
    for b in range(3):
        norm = float(ours.square[b]) ** 0.5
        assert abs(float(square[b]) ** 0.5 - norm) <= 1e-5 * norm
        assert abs(float(dots[b]) - float(ours.dots[b, 0])) <= 1e-5 * norm * length
