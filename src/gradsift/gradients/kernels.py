"""Triton kernels of the CUDA road: sums over per-example gradients that are never written (ours).

This module imports triton at its top, so only :mod:`gradsift.gradients.fused` imports it, and only when it is there. Shapes
of tiles come from there too. Nothing here is newer than triton 3.6, and every kernel runs in interpreter mode on a CPU.
"""

# pyright: basic, reportMissingImports=false
# ruff: noqa: ANN001, ANN201, ANN202

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _sum_parts(tile, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum a tile to one number for each warp: no number crosses warps, so no barrier is needed."""
    return tl.sum(tl.sum(tl.reshape(tile, (PARTS, ROWS // PARTS, COLS)), 2), 1)


@triton.jit
@no_type_check
def _direction(d_ptr, place, ok):
    return tl.load(d_ptr + place, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num"])
@no_type_check
def outer_kernel(
    x_ptr, g_ptr, d_ptr, work_ptr, group_ptr, out_ptr, rows, cols, num, d_stride,
    M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Own one tile of the matrix, walk a group of examples: squares and dots of each example's tile.

    The direction tiles stay in registers. Work is a flat list of token blocks (first token, tokens, example or -1 where
    the example goes on), one loop over which lets the loads of the next example run during the sums of this one.
    """
    col_tiles = tl.cdiv(cols, BN)
    tiles = tl.cdiv(rows, BM) * col_tiles
    tile = tl.program_id(0) % tiles  # neighbors share a group, so its tokens are read from L2
    group = tl.program_id(0) // tiles
    row = (tile // col_tiles) * BM + tl.arange(0, BM)
    col = (tile % col_tiles) * BN + tl.arange(0, BN)
    row_ok = row < rows
    col_ok = col < cols
    place = row[:, None].to(tl.int64) * cols + col[None, :]
    ok = row_ok[:, None] & col_ok[None, :]
    if M > 0:
        d0 = _direction(d_ptr, place, ok)
    if M > 1:
        d_ptr += d_stride  # step by step: a multiple of the stride of a large table does not fit 32 bits
        d1 = _direction(d_ptr, place, ok)
    if M > 2:
        d_ptr += d_stride
        d2 = _direction(d_ptr, place, ok)
    if M > 3:
        d_ptr += d_stride
        d3 = _direction(d_ptr, place, ok)
    step = tl.arange(0, BK)
    part = tl.arange(0, PARTS)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(tl.load(group_ptr + group), tl.load(group_ptr + group + 1)):
        first = tl.load(work_ptr + 3 * i)
        count = tl.load(work_ptr + 3 * i + 1)
        example = tl.load(work_ptr + 3 * i + 2)
        token = (first + step).to(tl.int64)[:, None]
        live = (step < count)[:, None]
        if EVEN:
            g = tl.load(g_ptr + token * rows + row[None, :], mask=live, other=0.0)
            x = tl.load(x_ptr + token * cols + col[None, :], mask=live, other=0.0)
        else:
            g = tl.load(g_ptr + token * rows + row[None, :], mask=live & row_ok[None, :], other=0.0)
            x = tl.load(x_ptr + token * cols + col[None, :], mask=live & col_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
        if example >= 0:
            at = out_ptr + ((tile.to(tl.int64) * num + example) * (M + 1)) * PARTS + part
            tl.store(at, _sum_parts(acc * acc, PARTS, BM, BN))
            if M > 0:
                tl.store(at + PARTS, _sum_parts(acc * d0, PARTS, BM, BN))
            if M > 1:
                tl.store(at + 2 * PARTS, _sum_parts(acc * d1, PARTS, BM, BN))
            if M > 2:
                tl.store(at + 3 * PARTS, _sum_parts(acc * d2, PARTS, BM, BN))
            if M > 3:
                tl.store(at + 4 * PARTS, _sum_parts(acc * d3, PARTS, BM, BN))
            acc = tl.zeros((BM, BN), dtype=tl.float32)


@triton.jit
@no_type_check
def _product(values_ptr, width, i, j, i_ok, j_ok, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    acc = tl.zeros((BT, BT), dtype=tl.float32)
    step = tl.arange(0, BK)
    for k in range(0, width, BK):
        live = (step < width - k)[None, :]
        a = tl.load(values_ptr + i[:, None] * width + (k + step)[None, :], mask=i_ok[:, None] & live, other=0.0)
        b = tl.load(values_ptr + j[:, None] * width + (k + step)[None, :], mask=j_ok[:, None] & live, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
@no_type_check
def gram_kernel(
    x_ptr, g_ptr, work_ptr, out_ptr, rows, cols,
    BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum (g_t . g_u)(x_t . x_u) over one pair of token blocks of one example; pairs off the diagonal count twice."""
    work = work_ptr + 5 * tl.program_id(0)
    low, num_low = tl.load(work), tl.load(work + 1)
    high, num_high = tl.load(work + 2), tl.load(work + 3)
    step = tl.arange(0, BT)
    i = (low + step).to(tl.int64)
    j = (high + step).to(tl.int64)
    i_ok = step < num_low
    j_ok = step < num_high
    of_x = _product(x_ptr, cols, i, j, i_ok, j_ok, BT, BK, PRECISION)
    of_g = _product(g_ptr, rows, i, j, i_ok, j_ok, BT, BK, PRECISION)
    twice = tl.where(low == high, 1.0, 2.0)
    tl.store(out_ptr + tl.load(work + 4), twice * tl.sum(of_x * of_g))


@triton.jit
@no_type_check
def log_norm_kernel(logits_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Log of the sum of exponentials of one row, in one read."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, BLOCK)
    high = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(0, width, BLOCK):
        value = tl.load(logits_ptr + row * width + k + step, mask=step < width - k, other=float("-inf")).to(tl.float32)
        top = tl.maximum(high, value)
        # A lane that has seen -inf only must not subtract it from itself.
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(high - base) + tl.exp(value - base)
        high = top
    top = tl.max(high, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(out_ptr + row, tl.log(tl.sum(total * tl.exp(high - base), 0)) + base)


@triton.jit
@no_type_check
def slope_kernel(logits_ptr, log_norm_ptr, target_ptr, weight_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Softmax minus one-hot, times the row's weight; a row of weight 0 gives zeros whatever it holds."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = step < width
    value = tl.load(logits_ptr + row * width + step, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + row)
    slope = tl.exp(value - tl.load(log_norm_ptr + row))
    slope = tl.where(step == tl.load(target_ptr + row), slope - 1.0, slope) * weight
    slope = tl.where(weight == 0.0, 0.0, slope)
    tl.store(out_ptr + row * width + step, slope.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
@no_type_check
def rms_kernel(x_ptr, g_ptr, length_ptr, out_ptr, width, tokens, eps, BK: tl.constexpr, BN: tl.constexpr):
    """Sum g_t x_t / rms(x_t) over a few tokens of one example; the quotient is rounded to the dtype of x, as the layer does."""
    example = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    col = tl.arange(0, BN)
    ok = col < width
    total = tl.zeros((BN,), dtype=tl.float32)
    length = tl.load(length_ptr + example)
    for t in range(chunk * BK, tl.minimum(chunk * BK + BK, length)):
        at = (example * tokens + t) * width + col
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=ok, other=0.0).to(tl.float32)
        normalized = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        total += g * normalized.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + (example * tl.num_programs(1) + chunk) * width + col, total, mask=ok)
