"""The sketch from folded factors: equal to the entry-by-entry map for every shape, fold, layout and kind of use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import TOYS, toy_gpt2, toy_llama
from tests.unit.gradients.test_engine import batch, chosen

from gradsift.errors import ConfigError
from gradsift.gradients import blocks, prefold, project
from gradsift.gradients.adam import bend
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.prefold import Cells, add_lookups_, add_outer_, add_rows_, fold_signed
from gradsift.gradients.project import Projector, cell_shape, fold_, signs, sketch_reference

SIZES = st.sampled_from([1, 2, 3, 6, 20, 10**6])  # cells; the last folds nothing


def cells_of(rows, cols, projector, dtype=torch.float64):
    row, col = (signs(projector.seed, "w", axis, n) for axis, n in (("row", rows), ("col", cols)))
    return Cells(torch.from_numpy(row).to(dtype), torch.from_numpy(col).to(dtype), projector.offset("w"))


@pytest.fixture
def few_cells(monkeypatch):
    """Toy parameters are smaller than the smallest matrix that folds; here they fold two to four times."""
    monkeypatch.setattr(project, "CELLS", 64)
    assert (cell_shape(48, 32), cell_shape(16, 32), cell_shape(260, 32)) == ((12, 32), (16, 16), (130, 32))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), SIZES, st.integers(0, 10**6), st.data())
def test_outer_products_equal_the_formed_gradient(rows, cols, padded, size, seed, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=7))
    projector, num, width = Projector(seed, data.draw(st.sampled_from([3, 7, 61]))), len(lengths), max(lengths)
    rng = np.random.default_rng(seed)
    x, g = rng.normal(size=(num, width, cols)), rng.normal(size=(num, width, rows))
    for b, n in enumerate(lengths):
        g[b, n:] = 0
    starts = None if padded else [int(s) for s in np.concatenate([[0], np.cumsum(lengths)[:-1]])]
    layout = [
        torch.from_numpy(v if padded else np.concatenate([v[b, :n] for b, n in enumerate(lengths)])) for v in (x, g)
    ]
    sketch = torch.zeros(num, projector.dim, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "CELLS", size)
        patch.setattr(prefold, "BUFFER", data.draw(st.sampled_from([1, 100, 1 << 18])))
        add_outer_(sketch, *layout, lengths, starts, cells_of(rows, cols, projector))
        wants = [sketch_reference(g[b].T @ x[b], projector, "w") for b in range(num)]
    np.testing.assert_allclose(sketch, np.array(wants), atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), SIZES, st.integers(0, 10**6), st.data())
def test_lookups_equal_the_scattered_gradient(rows, cols, size, seed, data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    projector, num, width = Projector(seed, data.draw(st.sampled_from([3, 7, 61]))), len(lengths), max(lengths) + 1
    rng = np.random.default_rng(seed)
    ids, g = rng.integers(0, rows, size=(num, width)), rng.normal(size=(num, width, cols))  # padding is not zero here
    sketch = torch.zeros(num, projector.dim, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "CELLS", size)
        add_lookups_(sketch, torch.from_numpy(ids), torch.from_numpy(g), lengths, cells_of(rows, cols, projector))
        for b, n in enumerate(lengths):
            table = np.zeros((rows, cols))
            for t in range(n):
                table[ids[b, t]] += g[b, t]
            np.testing.assert_allclose(sketch[b], sketch_reference(table, projector, "w"), atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), SIZES, st.integers(1, 12), st.integers(0, 10**6))
def test_strips_of_any_height_equal_the_whole(rows, cols, size, height, seed):
    projector = Projector(seed, 61)
    matrices = np.random.default_rng(seed).normal(size=(3, rows, cols))
    cells = cells_of(rows, cols, projector)
    formed = torch.from_numpy(matrices)
    sketch = torch.zeros(3, 61, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "CELLS", size)
        for low in range(0, rows, height):
            add_rows_(sketch, formed[:, low : low + height].reshape(3, -1), low, cells)
        wants = [sketch_reference(m, projector, "w") for m in matrices]
    np.testing.assert_allclose(sketch, np.array(wants), atol=1e-12)


@given(st.integers(1, 30), st.data())
def test_folding_an_axis_equals_its_twin(n, data):
    width = data.draw(st.integers(1, n))
    rng = np.random.default_rng(n)
    values, sign = rng.normal(size=(2, 3, n)), rng.choice([-1.0, 1.0], size=n)
    want = np.zeros((2, 3, width))
    for c in range(n):
        want[..., c % width] += values[..., c] * sign[c]
    got = fold_signed(torch.from_numpy(values), torch.from_numpy(sign), width)
    np.testing.assert_allclose(got, want, atol=1e-12)


@given(st.integers(1, 300_000), st.integers(1, 300_000))
def test_cells_fit_the_shape_and_fold_evenly(rows, cols):
    high, wide = cell_shape(rows, cols)
    assert 1 <= high <= rows
    assert 1 <= wide <= cols
    assert high * wide >= min(rows * cols, project.CELLS // 2)
    for count, cells in ((rows, high), (cols, wide)):
        folds = -(-count // cells)
        assert cells == -(-count // folds)
    if rows == 1 or rows * cols <= project.CELLS:
        assert (high, wide) == (rows, cols)


@pytest.mark.parametrize(
    ("shape", "cells"),
    [
        ((1, 50_000), (1, 50_000)),
        ((576, 576), (288, 576)),
        ((192, 576), (192, 288)),
        ((1536, 576), (256, 288)),
        ((576, 1536), (288, 256)),
        ((2048, 2048), (256, 2048)),
        ((49_152, 576), (2048, 576)),
        ((16, 2048), (16, 2048)),
        ((8, 8192), (8, 4096)),
        ((8192, 64), (2048, 64)),
    ],
)
def test_cells_of_usual_shapes_stay_what_stored_sketches_were_made_with(shape, cells):
    assert cell_shape(*shape) == cells


def test_half_precision_factors_are_summed_in_the_precision_of_the_signs(few_cells):
    projector = Projector(0, 61)
    rng = np.random.default_rng(0)
    x, g = (torch.from_numpy(rng.normal(size=(2, 5, n))).bfloat16() for n in (32, 48))
    narrow, wide = (torch.zeros(2, 61) for _ in range(2))
    cells = cells_of(48, 32, projector, torch.float32)
    assert cells.shape == (12, 32), "it folds"
    add_outer_(narrow, x, g, [5, 5], None, cells)
    add_outer_(wide, x.float(), g.float(), [5, 5], None, cells)
    assert torch.equal(narrow, wide)


# -- the engine that is asked for the sketch alone ---------------------------------------------------------------


@pytest.mark.parametrize("kind", TOYS)
def test_the_sketch_alone_equals_the_one_beside_norms_and_forms_no_gradient(kind, few_cells, monkeypatch):
    model = TOYS[kind](dtype=torch.float64)
    ids, labels, lengths = batch([9, 5, 12, 7])
    found = []
    for norms in (True, False):
        engine = GradientEngine(model, chosen(model), projector=Projector(7, 61), norms=norms)
        if not norms:
            for road in ("_tiles", "_as_dense", "_measure_dense", "measure_scatter"):
                monkeypatch.setattr(blocks.Block, road, None)
        with engine:
            found.append(engine.measure(ids, labels, lengths))
    both, alone = found
    scale = both.square.sqrt().max()
    assert float((both.sketch - alone.sketch).abs().max()) <= 1e-10 * float(scale)
    assert torch.equal(both.loss, alone.loss)
    for value in (alone.square, alone.emb_norm, alone.head_norm):
        assert value.isnan().all()


def test_norms_of_embedding_and_head_are_not_computed_either():
    engine = GradientEngine(toy_gpt2(), ["transformer.h.0.mlp.c_fc.weight"], projector=Projector(7, 61), norms=False)
    with engine:
        got = engine.measure(*batch([9, 5]))
    assert got.emb_norm.isnan().all()
    assert got.head_norm.isnan().all()
    assert got.sketch.isfinite().all()
    assert float(got.sketch.norm()) > 0


def test_dots_and_adam_directions_need_norms():
    model = toy_llama()
    engine = GradientEngine(model, chosen(model), projector=Projector(7, 61), norms=False)
    moments = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="norms"):
        bend(engine, moments, moments, "adam")
    engine.num_directions = 1
    with pytest.raises(ConfigError, match="norms"), engine:
        engine.measure(*batch([9, 5]))


def test_a_matrix_that_folds_nowhere_is_flipped_and_folded_flat():
    """Adapters keep every entry, so a sketch of theirs is as good as that of a random hash."""
    projector = Projector(1, 61)
    matrix = np.random.default_rng(1).normal(size=(16, 40))
    row, col = (signs(1, "w", axis, n).astype(float) for axis, n in (("row", 16), ("col", 40)))
    flat = torch.zeros(1, 61, dtype=torch.float64)
    fold_(flat, torch.from_numpy((matrix * row[:, None] * col).reshape(1, -1)), projector.offset("w"))
    np.testing.assert_allclose(flat[0], sketch_reference(matrix, projector, "w"), atol=1e-12)
