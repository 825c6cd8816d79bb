"""The CUDA road's functions on CPU tensors: batched products, lookups without a loop, folding by a product."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import TOYS, toy_gpt2, toy_llama
from tests.unit.gradients.test_engine import PROJECTOR, batch, chosen, random_directions, truth

from gradsift.errors import ConfigError
from gradsift.gradients import lookups, on_cuda, roads
from gradsift.gradients.adam import bend
from gradsift.gradients.blocks import Block, Dense, Outer, Scatter, Totals, make_block
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector, cell_shape, sketch_reference

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=5)
CPU = torch.device("cpu")


def outer_of(lengths, rows, cols, seed, *, flat, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    shape = (sum(lengths),) if flat else (len(lengths), max(lengths))
    x, g = (torch.from_numpy(rng.standard_normal((*shape, n))).to(dtype) for n in (cols, rows))
    starts = tuple(int(s) for s in np.cumsum([0, *lengths])[:-1]) if flat else None
    return Outer(x, g, tuple(lengths), starts)


def scatter_of(lengths, rows, cols, seed):
    """Few ids, so that most of them repeat; what stands behind a row's end is not zero."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, rows, (len(lengths), max(lengths) + 1)))
    g = torch.from_numpy(rng.standard_normal((*ids.shape, cols)))
    return Scatter(ids, g, tuple(lengths))


def whole(part, rows, cols):
    """Explicit gradients, entry by entry where ids repeat."""
    out = torch.zeros(len(part.lengths), rows, cols, dtype=torch.float64)
    for b, n in enumerate(part.lengths):
        if isinstance(part, Outer):
            x, g = part.row(b)
            out[b] = g.double().t() @ x.double()
        else:
            for t in range(n):
                out[b, part.ids[b, t]] += part.g[b, t]
    return out


def block_of(rows, cols, count, seed, projector=None, road="torch"):
    block = make_block("w", rows, cols, projector, dtype=torch.float64, device=CPU)
    block.road = road
    matrices = torch.from_numpy(np.random.default_rng(seed + 9).standard_normal((count, rows, cols)))
    block.directions = matrices.flatten(1) if count else None
    return block, matrices


def totals_of(num, count, dim=None):
    zeros = torch.zeros(num, dtype=torch.float64)
    return Totals(
        torch.zeros(num, count, dtype=torch.float64), zeros, None if dim is None else torch.zeros(num, dim).double()
    )


@settings(deadline=None)
@given(
    LENGTHS,
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 4),
    st.booleans(),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_formed_squares_and_dots_do_not_depend_on_the_strips(lengths, rows, cols, count, flat, entries, seed):
    outer = outer_of(lengths, rows, cols, seed, flat=flat)
    block, matrices = block_of(rows, cols, count, seed, PROJECTOR)
    square, dots = on_cuda.formed_squares_and_dots(block, outer, entries=entries)
    want = whole(outer, rows, cols)
    torch.testing.assert_close(square, want.square().sum((1, 2)))
    torch.testing.assert_close(dots, torch.einsum("brc,mrc->bm", want, matrices))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 90), st.integers(0, 99))
def test_lookups_equal_tables_filled_entry_by_entry(lengths, rows, cols, count, pairs, seed):
    parts = [scatter_of(lengths, rows, cols, seed), scatter_of(lengths, rows, cols, seed + 1)]
    block, matrices = block_of(rows, cols, count, seed, PROJECTOR)
    want = whole(parts[0], rows, cols) + whole(parts[1], rows, cols)
    torch.testing.assert_close(lookups.scatter_squares(parts, pairs=pairs), want.square().sum((1, 2)))
    got = lookups.scatter_dots(block, parts, pairs=pairs)
    torch.testing.assert_close(got, torch.einsum("brc,mrc->bm", want, matrices))


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 6), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_a_tied_table_counts_both_uses_and_what_they_share(lengths, rows, cols, flat, seed):
    outer, scatter = outer_of(lengths, rows, cols, seed, flat=flat), scatter_of(lengths, rows, cols, seed + 1)
    block, matrices = block_of(rows, cols, 2, seed, Projector(3, 61))
    totals = totals_of(len(lengths), 2, 61)
    squares = block.measure([outer, scatter], totals)
    one, other = whole(outer, rows, cols), whole(scatter, rows, cols)
    torch.testing.assert_close(squares.linear, one.square().sum((1, 2)))
    torch.testing.assert_close(squares.looked_up, other.square().sum((1, 2)))
    torch.testing.assert_close(totals.square, (one + other).square().sum((1, 2)))
    torch.testing.assert_close(totals.dots, torch.einsum("brc,mrc->bm", one + other, matrices))
    for b in range(len(lengths)):
        want = sketch_reference((one + other)[b].numpy(), Projector(3, 61), "w")
        assert np.abs(totals.sketch[b].numpy() - want).max() <= 1e-10
    assert cell_shape(rows, cols) == (rows, cols)


def test_large_matrices_fold_by_the_same_map_as_the_reference():
    rows, cols, projector = 700, 900, Projector(3, 61)
    assert cell_shape(rows, cols) < (rows, cols)
    outer, scatter = outer_of([3, 0, 2], rows, cols, 0, flat=True), scatter_of([3, 0, 2], rows, cols, 1)
    block, _ = block_of(rows, cols, 0, 0, projector)
    totals = totals_of(3, 0, 61)
    block.measure([outer, scatter], totals)
    both = whole(outer, rows, cols) + whole(scatter, rows, cols)
    for b in range(3):
        want = sketch_reference(both[b].numpy(), projector, "w")
        assert np.abs(totals.sketch[b].numpy() - want).max() <= 1e-9


def test_several_uses_of_one_layer_add_up_before_the_norm():
    parts = [outer_of([4, 2, 0], 5, 6, seed, flat=False) for seed in (0, 1)]
    block, _ = block_of(5, 6, 0, 0)
    totals = totals_of(3, 0)
    block.measure(parts, totals)
    want = whole(parts[0], 5, 6) + whole(parts[1], 5, 6)
    torch.testing.assert_close(totals.square, want.square().sum((1, 2)))


def test_mixed_uses_without_a_rule_are_refused():
    block, _ = block_of(5, 6, 0, 0)
    with pytest.raises(AssertionError, match="no rule"):
        block.measure([outer_of([2], 5, 6, 0, flat=False), Dense(torch.zeros(1, 30).double())], totals_of(1, 0))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", TOYS)
def test_every_signal_of_the_torch_road_equals_the_oracle(kind, dtype, limit):
    model = TOYS[kind](dtype=dtype)
    engine = GradientEngine(model, chosen(model), projector=PROJECTOR, road="torch")
    directions = random_directions(engine, 3, engine.dtype)
    engine.num_directions = 3
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, directions[name])
    ids, labels, lengths = batch([9, 5, 12])
    with engine:
        got = engine.measure(ids, labels, lengths)
    oracle = copy.deepcopy(model).double()
    for b, n in enumerate(lengths.tolist()):
        want = truth(engine, oracle, directions, ids[b], labels[b], n)
        assert abs(want["norm"] - float(got.square[b]) ** 0.5) <= limit * want["norm"]
        for i in range(3):
            assert abs(want["dots"][i] - float(got.dots[b, i])) <= limit * want["norm"] * want["lengths"][i]
        assert np.abs(want["sketch"] - got.sketch[b].double().numpy()).max() <= limit * want["norm"]


def measured(road, model, names, *, built=False, bent=False, **more):
    ids, labels, lengths = batch([9, 5, 12])
    engine = GradientEngine(model, names, projector=PROJECTOR, road=road, building=built, **more)
    if bent:
        generator = torch.Generator().manual_seed(0)
        moments = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters() if n in names}
        bend(engine, moments, {n: m.square() for n, m in moments.items()}, "adam")
    with engine:
        return engine, engine.measure(ids, labels, lengths)


def test_half_precision_factors_are_not_rounded_again():
    model = toy_llama(dtype=torch.bfloat16, tied=True)
    (_, tiles), (_, torch_road) = (measured(road, model, chosen(model)) for road in ("tiles", "torch"))
    torch.testing.assert_close(torch_road.square, tiles.square, rtol=1e-6, atol=0)
    assert float((torch_road.sketch - tiles.sketch).abs().max()) <= 1e-6 * float(tiles.square.max()) ** 0.5


@pytest.mark.parametrize("bent", [False, True])
def test_anchors_and_adam_directions_are_those_of_the_tiles(bent):
    model = toy_gpt2()
    (one, tiles), (other, got) = (
        measured(road, model, chosen(model), built=not bent, bent=bent) for road in ("tiles", "torch")
    )
    torch.testing.assert_close(got.square, tiles.square, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.sketch, tiles.sketch, rtol=1e-4, atol=1e-5)
    for name, block in () if bent else other.blocks.items():
        torch.testing.assert_close(block.mean, one.blocks[name].mean, rtol=1e-4, atol=1e-6)


def test_norms_where_neither_embedding_nor_head_is_measured_and_sketches_alone():
    model = toy_llama()
    (_, tiles), (_, got) = (measured(road, model, ["model.norm.weight"]) for road in ("tiles", "torch"))
    torch.testing.assert_close(got.emb_norm, tiles.emb_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.head_norm, tiles.head_norm, rtol=1e-5, atol=0)
    (_, tiles), (_, got) = (measured(road, model, chosen(model), norms=False) for road in ("tiles", "torch"))
    assert torch.isnan(got.square).all()
    assert torch.isnan(got.head_norm).all()
    torch.testing.assert_close(got.sketch, tiles.sketch, rtol=1e-4, atol=1e-5)


def test_the_road_is_chosen_by_device_and_said_in_words(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(roads.fused, "why_not", lambda device: None)
    assert roads.choose_road("auto", CPU, torch.float32) == "tiles"
    assert roads.choose_road("auto", cuda, torch.bfloat16) == "fused"
    assert roads.choose_road("auto", cuda, torch.float64) == "torch"
    monkeypatch.setattr(roads.fused, "why_not", lambda device: "triton is not installed")
    assert roads.choose_road("auto", cuda, torch.bfloat16) == "torch"
    assert "triton is not installed" in roads.describe("torch", cuda, torch.bfloat16)
    with pytest.raises(ConfigError, match="triton is not installed"):
        roads.choose_road("fused", cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert roads.choose_road("auto", cuda, torch.float32) == "torch"


def test_an_engine_on_a_cpu_walks_tiles():
    engine = GradientEngine(toy_llama(), ["lm_head.weight"])
    assert engine.road == "tiles"
    assert isinstance(engine.blocks["lm_head.weight"], Block)
    assert "CPU" in engine.description
