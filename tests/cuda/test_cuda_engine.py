"""The engine on a GPU: kernels as they are compiled for it, and both roads against the float64 loop."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.toy import TOYS, toy_llama
from tests.unit.gradients.test_engine import PROJECTOR, batch, chosen, random_directions, truth

from gradsift.gradients import fused, roads
from gradsift.gradients.blocks import Outer, Scatter, Totals, make_block
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector, sketch_matrix
from gradsift.gradients.spans import Spans

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
LENGTHS = (70, 0, 1, 64, 129, 33)
ROADS = ["torch", pytest.param("fused", marks=pytest.mark.skipif(fused.why_not() is not None, reason="no triton"))]
needs_triton = pytest.mark.skipif(fused.why_not() is not None, reason=f"{fused.why_not()}")


def factors(rows, cols, dtype, *, flat):
    """Ragged rows; what stands behind a row's end in a padded layout is NaN and must not be read."""
    generator = torch.Generator("cuda").manual_seed(rows + cols)
    num = sum(LENGTHS) if flat else len(LENGTHS) * max(LENGTHS)
    x, g = (torch.randn(num, n, device="cuda", generator=generator).to(dtype) for n in (cols, rows))
    starts = tuple(int(s) for s in np.cumsum([0, *LENGTHS])[:-1]) if flat else None
    spans = Spans.of(LENGTHS, starts, max(LENGTHS))
    real = torch.zeros(num, dtype=torch.bool, device="cuda")
    for first, length in zip(spans.firsts, LENGTHS, strict=True):
        real[first : first + length] = True
    x[~real], g[~real] = float("nan"), float("nan")
    return x, g, spans


def gradients(x, g, spans):
    pairs = zip(spans.firsts, spans.lengths, strict=True)
    return torch.stack([g[f : f + n].double().t() @ x[f : f + n].double() for f, n in pairs])


@needs_triton
@pytest.mark.parametrize(
    ("rows", "cols", "dtype", "count", "flat"),
    [
        (256, 512, torch.bfloat16, 0, False), (256, 512, torch.bfloat16, 1, False), (256, 512, torch.bfloat16, 3, True),
        (256, 512, torch.bfloat16, 4, False), (256, 512, torch.bfloat16, 8, False), (37, 70, torch.bfloat16, 3, True),
        (300, 272, torch.bfloat16, 2, False), (256, 128, torch.float32, 3, False), (37, 70, torch.float32, 1, True),
    ],
)  # fmt: skip
def test_compiled_squares_and_dots_equal_float64(rows, cols, dtype, count, flat):
    x, g, spans = factors(rows, cols, dtype, flat=flat)
    generator = torch.Generator("cuda").manual_seed(1)
    matrices = torch.randn(count, rows, cols, device="cuda", generator=generator)
    stored = matrices.flatten(1) if count else None
    square, dots = fused.squares_and_dots(x, g, spans, stored)
    again = fused.squares_and_dots(x, g, spans, stored)
    assert torch.equal(square, again[0])
    assert torch.equal(dots, again[1])
    whole = gradients(x, g, spans)
    want = whole.square().sum((1, 2))
    limit = 5e-6 if dtype != torch.float32 else 2e-5  # three tensor-float products stand for one of float32
    torch.testing.assert_close(square, want, rtol=limit, atol=1e-12)
    gap = (dots - torch.einsum("brc,mrc->bm", whole, matrices.double())).abs()
    assert bool((gap <= limit * want.sqrt()[:, None] * (rows * cols) ** 0.5 + 1e-9).all())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_gram_squares_equal_float64(dtype):
    x, g, spans = factors(300, 520, dtype, flat=True)
    want = gradients(x, g, spans).square().sum((1, 2))
    torch.testing.assert_close(fused.gram_squares(x, g, spans), want, rtol=2e-5, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_losses_slopes_and_norms_equal_float64(dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    logits = (torch.randn(33, 5003, device="cuda", generator=generator) * 4).to(dtype)
    logits[2, 7] = float("-inf")
    targets = torch.randint(8, 5003, (33,), device="cuda", generator=generator)
    weight = torch.rand(33, device="cuda", generator=generator)
    weight[4] = 0
    log_norm = fused.log_norms(logits)
    torch.testing.assert_close(log_norm.double(), torch.logsumexp(logits.double(), -1), rtol=1e-6, atol=1e-6)
    want = (torch.softmax(logits.double(), -1) - torch.nn.functional.one_hot(targets, 5003)) * weight[:, None]
    got = fused.slopes(logits, log_norm, targets, weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=5e-3 if dtype == torch.bfloat16 else 3e-5, atol=1e-6)
    x, g = (torch.randn(3, 70, 896, device="cuda", generator=generator).to(dtype) for _ in range(2))
    normalized = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(dtype).double()
    want = torch.stack([(normalized[b, :n] * g[b, :n].double()).sum(0) for b, n in enumerate((70, 0, 13))])
    # One rounding of the quotient may fall the other way.
    torch.testing.assert_close(fused.rms_sums(x, g, (70, 0, 13), 1e-5).double(), want, rtol=1e-3, atol=5e-2)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("flat", [False, True])
def test_a_tied_table_in_bfloat16_equals_float64(road, flat):
    rows, cols, projector = 640, 256, Projector(3, 1021)
    x, g, spans = factors(rows, cols, torch.bfloat16, flat=flat)
    width = max(LENGTHS)
    outer = (
        Outer(x, g, LENGTHS, spans.firsts) if flat else Outer(x.view(-1, width, cols), g.view(-1, width, rows), LENGTHS)
    )
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, 40, (len(LENGTHS), width), device="cuda", generator=generator)
    scatter = Scatter(ids, torch.randn(*ids.shape, cols, device="cuda", generator=generator), LENGTHS)
    block = make_block("w", rows, cols, projector, dtype=torch.float32, device=torch.device("cuda"))
    block.road = road
    matrices = torch.randn(3, rows, cols, device="cuda", generator=generator)
    block.directions = matrices.flatten(1)
    zeros = torch.zeros(len(LENGTHS), dtype=torch.float64, device="cuda")
    totals = Totals(zeros[:, None].repeat(1, 3), zeros.clone(), torch.zeros(len(LENGTHS), 1021, device="cuda"))
    squares = block.measure([outer, scatter], totals)
    want, table = gradients(x, g, spans), torch.zeros(len(LENGTHS), rows, cols, dtype=torch.float64, device="cuda")
    for b, n in enumerate(LENGTHS):
        table[b].index_add_(0, ids[b, :n], scatter.g[b, :n].double())
    both, scale = want + table, (want + table).square().sum((1, 2)).sqrt()
    torch.testing.assert_close(squares.linear, want.square().sum((1, 2)), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(squares.looked_up, table.square().sum((1, 2)), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(totals.square, both.square().sum((1, 2)), rtol=1e-5, atol=1e-9)
    gap = (totals.dots - torch.einsum("brc,mrc->bm", both, matrices.double())).abs()
    assert bool((gap <= 1e-5 * scale[:, None] * (rows * cols) ** 0.5).all())
    for b in range(len(LENGTHS)):
        sketch = sketch_matrix(both[b], projector, "w")
        assert np.abs(sketch - totals.sketch[b].double().cpu().numpy()).max() <= 1e-5 * float(scale[b])


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", TOYS)
def test_every_signal_of_a_float32_model_equals_the_oracle(road, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    check(TOYS[kind](dtype=torch.float32), road, 2e-5)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_signal_of_a_bfloat16_model_is_near_the_oracle(road, tied):
    check(toy_llama(dtype=torch.bfloat16, tied=tied), road, 8e-2)  # the model's own rounding


def check(model, road, limit):
    oracle = copy.deepcopy(model).double()
    model = model.cuda()
    engine = GradientEngine(model, chosen(model), projector=PROJECTOR, road=road)
    assert engine.road == road
    directions = random_directions(engine, 3, torch.float32)
    engine.num_directions = 3
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, [d.cuda() for d in directions[name]])
    ids, labels, lengths = batch([9, 5, 12, 7])
    with engine:
        got = engine.measure(ids.cuda(), labels.cuda(), lengths)
    on_cpu = GradientEngine(oracle, chosen(oracle), projector=PROJECTOR)
    with on_cpu:
        norms = on_cpu.measure(ids, labels, lengths)
    torch.testing.assert_close(got.emb_norm, norms.emb_norm, rtol=limit, atol=0)
    torch.testing.assert_close(got.head_norm, norms.head_norm, rtol=limit, atol=0)
    for b, n in enumerate(lengths.tolist()):
        want = truth(on_cpu, oracle, directions, ids[b], labels[b], n)
        assert abs(want["loss"] - float(got.loss[b])) <= limit
        assert abs(want["norm"] - float(got.square[b]) ** 0.5) <= limit * want["norm"]
        for i in range(3):
            assert abs(want["dots"][i] - float(got.dots[b, i])) <= limit * want["norm"] * want["lengths"][i]
        assert np.abs(want["sketch"] - got.sketch[b].double().numpy()).max() <= limit * want["norm"]


@pytest.mark.parametrize("road", ROADS)
def test_norms_of_embedding_and_head_without_their_blocks(road):
    model = toy_llama()
    ids, labels, lengths = batch([9, 5, 12])
    with GradientEngine(model, ["model.norm.weight"]) as engine:
        want = engine.measure(ids, labels, lengths)
    with GradientEngine(model.cuda(), ["model.norm.weight"], road=road) as engine:
        got = engine.measure(ids.cuda(), labels.cuda(), lengths)
    torch.testing.assert_close(got.emb_norm, want.emb_norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.head_norm, want.head_norm, rtol=1e-4, atol=0)


def test_auto_takes_the_kernels_where_they_can_run():
    engine = GradientEngine(toy_llama(dtype=torch.bfloat16).cuda(), ["lm_head.weight"])
    assert engine.road == ("fused" if roads.missing(engine.device, torch.bfloat16) is None else "torch")
    assert engine.description
