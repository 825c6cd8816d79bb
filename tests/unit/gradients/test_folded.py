"""Dots by folded factors: against cells filled one by one, without bias, and exact where nothing folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.toy import TOYS, VOCABULARY, toy_llama
from tests.unit.gradients.test_experts import expert_names, made

from gradsift.errors import ConfigError
from gradsift.gradients import project
from gradsift.gradients.folded import fold_directions, fold_matrix, keep_parts
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.prefold import Cells
from gradsift.gradients.project import Projector, cell_shape, signs
from gradsift.gradients.taps import find_layers

F64 = torch.float64


def rows(lengths=(9, 5, 12)):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    labels = ids.clone()
    for b, n in enumerate(lengths):
        ids[b, n:], labels[b, n:], labels[b, : n - 3] = 3, -100, -100
        ids[b, n // 2] = ids[b, 0]
    return ids, labels, torch.tensor(lengths)


def engines(model, seed=7, **settings):
    """The exact collector and the folded one, with the same directions."""
    made = []
    for _ in range(2):
        engine = GradientEngine(
            model, [n for n, _ in model.named_parameters()], projector=Projector(seed, 61), **settings
        )
        generator = torch.Generator().manual_seed(5)
        engine.num_directions = 2
        for name, block in engine.blocks.items():
            drawn = [torch.randn(block.rows, block.cols, generator=generator, dtype=F64) for _ in range(2)]
            block.directions = engine.flatten(name, [d.to(engine.dtype) for d in drawn])
        made.append(engine)
    kept = {name: block.directions.clone() for name, block in made[1].blocks.items()}
    fold_directions(made[1])
    return (*made, kept)


def cells_by_hand(matrix, name, seed):
    """Every entry put into its cell, one by one."""
    high, wide = cell_shape(*matrix.shape)
    row, col = (signs(seed, name, axis, n) for axis, n in zip(("row", "col"), matrix.shape, strict=True))
    out = np.zeros((high, wide))
    for r in range(matrix.shape[0]):
        for c in range(matrix.shape[1]):
            out[r % high, c % wide] += float(row[r]) * float(col[c]) * float(matrix[r, c])
    return out


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("held", [False, True])
def test_dots_are_those_of_the_cells_and_everything_else_is_exact(kind, held, monkeypatch):
    monkeypatch.setattr(project, "CELLS", 64)
    model = TOYS[kind](dtype=F64)
    exact, folded, directions = engines(model, trained_only=held)
    names = [n for n, block in folded.blocks.items() if block.road == "folded"]
    assert len(names) > 4
    assert all(
        block.directions is None or block is folded._embedding_block for n, block in folded.blocks.items() if n in names
    )
    ids, labels, lengths = rows()
    with exact:
        want = exact.measure(ids, labels, lengths)
    with folded:
        got = folded.measure(ids, labels, lengths)
    for name in ("loss", "square", "sketch"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-10, atol=1e-11)
    assert not torch.allclose(got.dots, want.dots, rtol=1e-3)
    if held or folded._embedding_block is folded._head_block is not None:
        return  # gradients of the rest alone are not autograd's, and a tied table's lookups are exact
    for b, n in enumerate(lengths.tolist()):
        by_name = example_gradient(model, list(folded.blocks), ids[b, :n], labels[b, :n]).by_name
        for i in range(2):
            total = 0.0
            for name, block in folded.blocks.items():
                g = folded.matrix(name, by_name[name])
                d = directions[name][i].view(block.rows, block.cols)
                pair = [cells_by_hand(one, name, 7) for one in (g, d)] if name in names else [g.numpy(), d.numpy()]
                total += float((pair[0] * pair[1]).sum())
            assert total == pytest.approx(float(got.dots[b, i]), rel=1e-9)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("held", [False, True])
def test_fused_experts_keep_exact_dots(name, held, monkeypatch):
    monkeypatch.setattr(project, "CELLS", 64)
    model = made(name)
    experts = set(expert_names(model))
    exact, folded, directions = engines(model, trained_only=held)
    for engine in (exact, folded):
        for key, block in engine.blocks.items():
            if key not in experts:  # directions of the experts alone
                block.directions, block.folds = torch.zeros_like(directions[key]), {}
    assert any(block.road == "folded" for block in folded.blocks.values())
    ids, labels, lengths = rows()
    with exact:
        want = exact.measure(ids, labels, lengths)
    with folded:
        got = folded.measure(ids, labels, lengths)
    assert (got.dots.abs() > 1e-3).any(0).all()
    for signal in ("dots", "square", "sketch"):
        torch.testing.assert_close(getattr(got, signal), getattr(want, signal), rtol=1e-6, atol=1e-6)
    if held:
        return  # gradients of the rest alone are not autograd's
    for b, n in enumerate(lengths.tolist()):
        by_name = example_gradient(model, list(experts), ids[b, :n], labels[b, :n]).by_name
        for i in range(2):
            total = sum(float((folded.matrix(e, by_name[e]).flatten() * directions[e][i]).sum()) for e in experts)
            assert total == pytest.approx(float(got.dots[b, i]), rel=1e-5, abs=1e-5)


def test_a_matrix_folds_to_its_cells(monkeypatch):
    monkeypatch.setattr(project, "CELLS", 64)
    matrix = torch.randn(37, 23, dtype=F64)
    row, col = (torch.from_numpy(signs(3, "w", axis, n)).to(F64) for axis, n in (("row", 37), ("col", 23)))
    assert cell_shape(37, 23) != (37, 23)
    want = cells_by_hand(matrix, "w", 3)
    assert np.abs(fold_matrix(matrix, Cells(row, col, 0)).numpy() - want).max() <= 1e-12


def test_dots_have_no_bias_and_the_spread_that_is_said(monkeypatch):
    """Over many seeds; the variance of one matrix of many directions is near 2/(R C) |U|^2 |V|^2."""
    monkeypatch.setattr(project, "CELLS", 512)
    u, v = torch.randn(2, 128, 96, dtype=F64, generator=torch.Generator().manual_seed(0))
    high, wide = cell_shape(128, 96)
    assert high * wide < 128 * 96 / 2
    found = []
    for seed in range(600):
        cells = Cells(*(torch.from_numpy(signs(seed, "w", a, n)).to(F64) for a, n in (("row", 128), ("col", 96))), 0)
        found.append(float((fold_matrix(u, cells) * fold_matrix(v, cells)).sum()))
    found = np.array(found)
    assert abs(found.mean() - float((u * v).sum())) <= 4 * found.std() / len(found) ** 0.5
    scale = float(u.norm() * v.norm())
    unfolded = 2 * (1 / high - 1 / 128) * float((u @ v.t()).square().sum()) + 2 * (1 / wide - 1 / 96) * float(
        (u.t() @ v).square().sum()
    )
    assert found.var() <= 1.3 * (2 / (high * wide) * scale**2 + unfolded)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("kind", ["llama", "lora", "gpt2"])
def test_parts_add_up_and_each_is_that_of_its_layers(kind, fold):
    model = TOYS[kind](dtype=F64)
    ids, labels, lengths = rows()
    apart, exact = engines(model)[0], engines(model)[0]
    num = keep_parts(apart)
    assert num == 3  # two layers, and what belongs to none
    if fold:
        fold_directions(apart)
    with exact:
        want = exact.measure(ids, labels, lengths)
    with apart:
        got = apart.measure(ids, labels, lengths)
    assert got.parts.shape == (3, num, 3)
    torch.testing.assert_close(got.parts.sum(1)[:, :2], got.dots)
    torch.testing.assert_close(got.parts.sum(1)[:, 2], want.square)
    if not fold:
        torch.testing.assert_close(got.dots, want.dots)
    for part, layer in enumerate(find_layers(model)):
        inside = {id(p) for p in layer.parameters()}
        names = [n for n, p in model.named_parameters() if id(p) in inside]
        alone = GradientEngine(model, names)
        with alone:
            torch.testing.assert_close(got.parts[:, part, 2], alone.measure(ids, labels, lengths).square)
    assert want.parts is None


def test_an_engine_without_a_sketch_is_refused():
    with pytest.raises(ConfigError, match="folded dots need a sketch"):
        fold_directions(GradientEngine(toy_llama(), ["model.norm.weight"]))
