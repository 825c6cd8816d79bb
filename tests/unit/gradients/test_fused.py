"""The Triton kernels, interpreted on the CPU, against float64 sums over explicit gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests import interpreted
from tests.toy import TOYS, toy_llama
from tests.unit.gradients.test_engine import PROJECTOR, batch, chosen, random_directions, truth

from gradsift.gradients import fused, roads
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.spans import Spans, launches, num_groups, pair_list, work_list

if not interpreted.HERE:
    pytest.skip("triton is not installed: the fused kernels cannot run here", allow_module_level=True)
if not fused.interpreted():
    pytest.skip("a GPU is here, and triton compiles for it: see tests/cuda", allow_module_level=True)
interpreted.prepare()

LENGTHS = st.lists(st.integers(0, 37), max_size=5)


def factors(lengths, rows, cols, dtype, seed, *, flat):
    """Random x and g; behind each row's tokens a padded layout holds NaN, which must not be read."""
    rng = np.random.default_rng(seed)
    num = sum(lengths) if flat else len(lengths) * max(lengths, default=0)
    x, g = (torch.from_numpy(rng.standard_normal((num, n))).to(dtype) for n in (cols, rows))
    starts = list(np.cumsum([0, *lengths])[:-1]) if flat else None
    spans = Spans.of(lengths, None if starts is None else [int(s) for s in starts], max(lengths, default=0))
    if not flat:
        real = torch.zeros(num, dtype=torch.bool)
        for first, length in zip(spans.firsts, spans.lengths, strict=True):
            real[first : first + length] = True
        x[~real], g[~real] = float("nan"), float("nan")
    return x, g, spans


def gradients(x, g, spans):
    return torch.stack(
        [g[f : f + n].double().t() @ x[f : f + n].double() for f, n in zip(spans.firsts, spans.lengths, strict=True)]
        or [torch.zeros(g.shape[1], x.shape[1], dtype=torch.float64)]
    )[: len(spans.lengths)]


@settings(max_examples=12, deadline=None)
@given(
    LENGTHS, st.integers(1, 40), st.integers(1, 70), st.integers(0, 6), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
)  # fmt: skip
@example([], 5, 7, 3, False, torch.bfloat16, 0)
@example([0, 0], 5, 7, 2, True, torch.float32, 0)
@example([1], 1, 1, 1, False, torch.bfloat16, 1)
@example([17, 0, 33, 16], 33, 65, 6, True, torch.bfloat16, 2)
def test_squares_and_dots_equal_those_of_explicit_gradients(lengths, rows, cols, count, flat, dtype, seed):
    x, g, spans = factors(lengths, rows, cols, dtype, seed, flat=flat)
    rng = np.random.default_rng(seed + 1)
    matrices = torch.from_numpy(rng.standard_normal((count, rows, cols))).float()
    square, dots = fused.squares_and_dots(x, g, spans, matrices.flatten(1) if count else None)
    whole = gradients(x, g, spans)
    want = whole.square().sum((1, 2))
    lengths_of = torch.einsum("mrc->m", matrices.double().square()).sqrt()
    assert square.dtype == dots.dtype == torch.float64
    assert tuple(dots.shape) == (len(lengths), count)
    torch.testing.assert_close(square, want, rtol=2e-6, atol=1e-12)
    gap = (dots - torch.einsum("brc,mrc->bm", whole, matrices.double())).abs()
    assert bool((gap <= 2e-6 * want.sqrt()[:, None] * lengths_of + 1e-12).all())


@settings(max_examples=10, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_gram_squares_equal_those_of_explicit_gradients(lengths, rows, cols, flat, seed):
    x, g, spans = factors(lengths, rows, cols, torch.bfloat16, seed, flat=flat)
    got = fused.gram_squares(x, g, spans)
    want = gradients(x, g, spans).square().sum((1, 2))
    # A Gram matrix sums numbers of the size of |x|^2 |g|^2, whatever cancels.
    scale = torch.stack([
        x[f : f + n].double().square().sum() * g[f : f + n].double().square().sum()
        for f, n in zip(spans.firsts, spans.lengths, strict=True)
    ]) if lengths else want  # fmt: skip
    assert bool(((got - want).abs() <= 2e-6 * scale).all())


def test_a_planted_direction_is_found_and_another_one_is_not():
    x, g, spans = factors([9, 9], 20, 30, torch.float32, 4, flat=True)
    whole = gradients(x, g, spans).float()
    square, dots = fused.squares_and_dots(x, g, spans, torch.stack([whole[0], whole[1]]).flatten(1))
    assert torch.allclose(dots.diagonal(), square, rtol=1e-5)
    assert abs(float(dots[0, 1])) < 0.5 * float(square.min())


def test_a_token_that_is_not_finite_stays_in_its_own_row():
    x, g, spans = factors([6, 6, 6], 20, 30, torch.float32, 4, flat=True)
    clean = fused.squares_and_dots(x, g, spans)[0]
    x[8] = float("nan")
    broken = fused.squares_and_dots(x, g, spans)[0]
    assert torch.isnan(broken[1])
    assert torch.equal(broken[[0, 2]], clean[[0, 2]])


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.sampled_from([16, 64]), st.integers(1, 20))
def test_the_work_list_has_every_token_once_and_cuts_between_examples(lengths, tokens, groups):
    groups = min(groups, len(lengths))
    firsts = tuple(int(v) for v in np.cumsum([0, *lengths])[:-1])
    work, edges = work_list(Spans(tuple(lengths), firsts), tokens, groups)
    seen = [int(f) + k for f, count, _ in work for k in range(count)]
    assert seen == list(range(sum(lengths)))
    assert [int(e) for e in work[:, 2] if e >= 0] == list(range(len(lengths)))
    assert (edges[0], edges[-1]) == (0, len(work))
    assert (np.diff(edges) >= 0).all()
    assert all(edge == 0 or work[edge - 1, 2] >= 0 for edge in edges)


@given(st.lists(st.integers(0, 100), max_size=6), st.sampled_from([16, 64]))
def test_the_pair_list_has_every_pair_of_blocks_once(lengths, tokens):
    firsts = tuple(int(v) for v in np.cumsum([0, *lengths])[:-1])
    pairs, width = pair_list(Spans(tuple(lengths), firsts), tokens)
    assert len(set(pairs[:, 4].tolist())) == len(pairs)
    total = np.zeros(len(lengths), dtype=int)
    for low, n, high, m, slot in pairs:
        total[slot // width] += n * m * (1 if low == high else 2)
    assert total.tolist() == [n * n for n in lengths]


@given(st.integers(0, 40))
def test_launches_take_every_direction_once_and_few_at_a_time(count):
    parts = launches(count)
    assert [m for part in parts for m in part] == list(range(count))
    assert all(len(part) <= (4 if len(parts) == 1 else 3) for part in parts)
    assert len(parts) >= 1


@given(st.integers(1, 9000), st.integers(0, 300), st.integers(1, 512))
def test_groups_are_no_more_than_examples_and_fill_the_device_where_they_can(tiles, num, length):
    groups = num_groups(tiles, num, num * length)
    assert 1 <= groups <= max(1, num)
    if num >= 128 and length >= 128:
        assert tiles * groups >= min(tiles * 128, 66)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 5), st.integers(1, 200), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99))
def test_losses_and_slopes_equal_those_of_float64(num, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num, width, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, width, (num,), generator=generator)
    weight = torch.rand(num, generator=generator)
    log_norm = fused.log_norms(logits)
    got = fused.slopes(logits, log_norm, targets, weight)
    wide = logits.double()
    torch.testing.assert_close(log_norm.double(), torch.logsumexp(wide, -1), rtol=1e-6, atol=1e-6)
    want = (torch.softmax(wide, -1) - torch.nn.functional.one_hot(targets, width)) * weight[:, None]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=2e-6)


def test_a_row_of_weight_zero_has_zero_slopes_whatever_it_holds():
    logits = torch.tensor([[1.0, float("nan")], [float("-inf"), 2.0]])
    log_norm = fused.log_norms(logits)
    got = fused.slopes(logits, log_norm, torch.tensor([0, 1]), torch.tensor([0.0, 1.0]))
    assert torch.isnan(log_norm[0])
    assert float(log_norm[1]) == pytest.approx(2.0)
    assert got.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 99))
def test_rms_sums_equal_those_of_float64(lengths, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(len(lengths), 9, width, generator=generator) for _ in range(2))
    got = fused.rms_sums(x, g, lengths, 1e-5)
    normalized = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    want = torch.stack([(normalized[b, :n] * g[b, :n]).sum(0) for b, n in enumerate(lengths)])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TOYS)
def test_every_signal_of_the_fused_road_equals_the_oracle(kind):
    model = TOYS[kind](dtype=torch.float32)
    engine = GradientEngine(model, chosen(model), projector=PROJECTOR, road="fused")
    directions = random_directions(engine, 3, torch.float32)
    engine.num_directions = 3
    for name, block in engine.blocks.items():
        block.directions = engine.flatten(name, directions[name])
    ids, labels, lengths = batch([9, 5, 12])
    with engine:
        got = engine.measure(ids, labels, lengths)
    oracle = copy.deepcopy(model).double()
    for b, n in enumerate(lengths.tolist()):
        want = truth(engine, oracle, directions, ids[b], labels[b], n)
        assert abs(want["loss"] - float(got.loss[b])) <= 1e-5
        assert abs(want["norm"] - float(got.square[b]) ** 0.5) <= 1e-5 * want["norm"]
        for i in range(3):
            assert abs(want["dots"][i] - float(got.dots[b, i])) <= 1e-5 * want["norm"] * want["lengths"][i]
        assert np.abs(want["sketch"] - got.sketch[b].double().numpy()).max() <= 1e-5 * want["norm"]


def test_norms_of_embedding_and_head_are_those_of_the_tiles_where_neither_is_measured():
    model = toy_llama()
    ids, labels, lengths = batch([9, 5, 12])
    got = []
    for road in ("tiles", "fused"):
        with GradientEngine(model, ["model.norm.weight"], road=road) as engine:
            got.append(engine.measure(ids, labels, lengths))
    torch.testing.assert_close(got[1].emb_norm, got[0].emb_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].head_norm, got[0].head_norm, rtol=1e-5, atol=0)


def test_prompt_tokens_have_a_loss_and_no_part_in_any_gradient():
    model = toy_llama()
    ids, labels, lengths = batch([9, 5, 12])
    prompt = torch.zeros_like(ids, dtype=torch.bool)
    prompt[:, 1:3] = True
    prompt &= labels == -100
    got, alone = [], []
    for road in ("tiles", "fused"):
        with GradientEngine(model, ["model.norm.weight", "lm_head.weight"], road=road) as engine:
            got.append(engine.measure(ids, labels, lengths, prompt))
            alone.append(engine.forward_only(ids, labels, lengths, prompt))
    for figure in ("loss", "prompt_loss"):
        torch.testing.assert_close(getattr(got[1], figure), getattr(got[0], figure), rtol=1e-6, atol=1e-6)
        assert torch.equal(getattr(got[1], figure), getattr(alone[1], figure))
    torch.testing.assert_close(got[1].square, got[0].square, rtol=1e-5, atol=0)


def test_only_norms_of_the_known_formula_take_the_kernel():
    class TwiceRMSNorm(torch.nn.RMSNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    known, other = torch.nn.RMSNorm(8, eps=1e-6), TwiceRMSNorm(8, eps=1e-6)
    assert roads.fast_norms([known, other, torch.nn.Linear(2, 2)], torch.float32) == {known: 1e-6}
