"""Host side of the Triton kernels: norms and dots of per-example gradients from their factors, without the gradients.

Each program owns one tile of a matrix and walks a group of examples; the direction tiles stay in registers, the products
run on tensor cores with float32 sums, and what is written is a few float32 partial sums for each tile and example. They are
added in float64 in a fixed order: no atomics, so a repeated run has the same bits. bfloat16 factors are multiplied
as they are (their products are exact in float32); directions are float32 in registers whatever they are stored as.
triton is optional and imported on first use; :func:`why_not` says what is missing.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsift.gradients.spans import MOST, Shape, Spans, launches, lengths_on, num_groups, pairs_on, work_on

GRAM_AT_MOST = 0.7  # of the direct product's work; its tiles are read more often


def _launched(name: str, grid: tuple[int, ...], on: Tensor, *given: Any, **options: Any) -> None:
    """Launch a kernel where a tensor lives: triton takes torch's current device, which need not be the model's."""
    kernel = getattr(import_module("gradsift.gradients.kernels"), name)
    with torch.cuda.device(on.device) if on.device.type == "cuda" else nullcontext():
        kernel[grid](*given, **options)


def why_not(device: torch.device | None = None) -> str | None:
    """Say why the kernels cannot run here.

    Args:
        device: a GPU to build and run the smallest kernel on, once; None only looks whether triton is there.

    Returns:
        None where they can.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if device is None else _trial(device)


@cache
def _trial(device: torch.device) -> str | None:
    try:
        got = float(log_norms(torch.zeros(1, 4, device=device))[0])
    except Exception as error:  # no compiler, a driver too old, ...: whatever it is, the reason is reported
        return f"triton cannot build a kernel here ({type(error).__name__}: {str(error)[:120]})"
    return None if abs(got - math.log(4)) < 1e-4 else f"triton's kernels give {got} for log 4 here"


def interpreted() -> bool:
    """Tell whether triton was told to run kernels on a CPU (TRITON_INTERPRET=1), as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes(x: Tensor, g: Tensor) -> bool:
    """Tell whether the kernels have an arithmetic for these factors.

    Args:
        x: layer inputs.
        g: output gradients.

    Returns:
        True for float32, bfloat16 and float16 of one kind.
    """
    return x.dtype == g.dtype and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def tile_shape(dtype: torch.dtype, num_directions: int, longest: int) -> Shape:
    """Choose the tile: a fixed table, made by reading the registers that ptxas gives each for an H100.

    128 x 128 with three float32 direction tiles fills the register file (255 a thread, 27 reloads an example); norms
    alone leave room for 128 x 256, which reads a third less from L2.

    Args:
        dtype: of the factors.
        num_directions: M of this launch, 0 to 4.
        longest: tokens of the longest example.

    Returns:
        The tile.
    """
    if interpreted():
        return Shape(32, 64, 16, 4, 2)
    if dtype == torch.float32:  # three tensor-core products for each one; registers hold half as much
        return Shape(64, 64, 32, 4, 4)
    tokens = 64 if longest > 32 else 32
    if num_directions == 0:
        return Shape(128, 256, tokens, 8, 5)
    return Shape(64 if num_directions == MOST else 128, 128, tokens, 8, 5)


def squares_and_dots(
    x: Float[Tensor, "S cols"],
    g: Float[Tensor, "S rows"],
    spans: Spans,
    directions: Float[Tensor, "M n"] | None = None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B M"]]:
    """Squared norm of each example's sum of outer products g_t x_t', and its dots with directions.

    Norms alone are taken by two Gram matrices, sum_tu (g_t . g_u)(x_t . x_u), where that is less work.

    Args:
        x: layer inputs, float32, bfloat16 or float16.
        g: output gradients of the same dtype.
        spans: where the examples lie.
        directions: [M, rows * cols], any float dtype.

    Returns:
        float64 [B] and float64 [B, M].
    """
    num, longest = len(spans.lengths), max(spans.lengths, default=0)
    num_directions = 0 if directions is None else directions.shape[0]
    if not longest:
        square = torch.zeros(num, dtype=torch.float64, device=x.device)
        return square, square.new_zeros(num, num_directions)
    if not num_directions and gram_pays(spans, g.shape[1], x.shape[1]):
        square = gram_squares(x, g, spans)
        return square, square.new_empty(num, 0)
    x, g, sums = x.contiguous(), g.contiguous(), []
    for some in launches(num_directions):
        part = None if directions is None else directions[some.start : some.stop]
        sums.append(_launch(x, g, spans, part if some else None))
    dots = [part[:, 1:] for part in sums]
    return sums[0][:, 0], dots[0] if len(dots) == 1 else torch.cat(dots, 1)


def _launch(x: Tensor, g: Tensor, spans: Spans, directions: Tensor | None) -> Float[Tensor, "B k"]:
    rows, cols, num = g.shape[1], x.shape[1], len(spans.lengths)
    num_directions = 0 if directions is None else directions.shape[0]
    shape = tile_shape(x.dtype, num_directions, max(spans.lengths))
    tiles = -(-rows // shape.rows) * -(-cols // shape.cols)
    groups = num_groups(tiles, num, sum(spans.lengths))
    work, edges = work_on(spans, shape.tokens, groups, x.device)
    out = torch.empty(tiles, num, num_directions + 1, shape.warps, dtype=torch.float32, device=x.device)
    _launched(
        "outer_kernel", (tiles * groups,), x,
        x, g, x if directions is None else directions.contiguous(), work, edges, out,
        rows, cols, num, rows * cols,
        M=num_directions, BM=shape.rows, BN=shape.cols, BK=shape.tokens,
        EVEN=rows % shape.rows == 0 and cols % shape.cols == 0,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee", PARTS=shape.warps,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out.sum((0, 3), dtype=torch.float64)


def gram_pays(spans: Spans, rows: int, cols: int) -> bool:
    """Tell whether two Gram matrices are clearly less work than the gradient's tiles.

    Args:
        spans: the batch.
        rows: outputs.
        cols: inputs.

    Returns:
        The decision; it depends on shapes alone.
    """
    tokens = _gram_tokens()
    blocks = [-(-n // tokens) for n in spans.lengths]
    pairs = sum(n * (n + 1) // 2 for n in blocks)
    return pairs * tokens**2 * (rows + cols) < GRAM_AT_MOST * sum(spans.lengths) * rows * cols


def _gram_tokens() -> int:
    return 16 if interpreted() else 128


def gram_squares(x: Float[Tensor, "S cols"], g: Float[Tensor, "S rows"], spans: Spans) -> Float[Tensor, " B"]:
    """Squared norms by sum_tu (g_t . g_u)(x_t . x_u), a block of t and one of u for each program.

    Args:
        x: layer inputs.
        g: output gradients of the same dtype.
        spans: where the examples lie.

    Returns:
        float64 [B].
    """
    num, tokens = len(spans.lengths), _gram_tokens()
    work, width = pairs_on(spans, tokens, x.device)
    if not len(work):
        return torch.zeros(num, dtype=torch.float64, device=x.device)
    out = torch.zeros(num * width, dtype=torch.float32, device=x.device)
    full = x.dtype == torch.float32
    _launched(
        "gram_kernel", (len(work),), x,
        x.contiguous(), g.contiguous(), work, out, g.shape[1], x.shape[1],
        BT=tokens, BK=16 if interpreted() else (32 if full else 64), PRECISION="tf32x3" if full else "ieee",
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return out.view(num, width).sum(1, dtype=torch.float64)


def log_norms(logits: Float[Tensor, "S V"]) -> Float[Tensor, " S"]:
    """Log of the sum of exponentials of each row, in one read and without a float32 copy of the logits.

    Args:
        logits: float32, bfloat16 or float16, contiguous.

    Returns:
        float32 [S].
    """
    logits = logits.contiguous()
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if len(out):
        block = 64 if interpreted() else 4096
        _launched("log_norm_kernel", (len(out),), out, logits, out, logits.shape[1], BLOCK=block, num_warps=8)
    return out


def slopes(
    logits: Float[Tensor, "S V"],
    log_norm: Float[Tensor, " S"],
    targets: Int[Tensor, " S"],
    weight: Float[Tensor, " S"],
) -> Float[Tensor, "S V"]:
    """Slope of the weighted sum of losses at the logits: (softmax - one-hot) times weight.

    Args:
        logits: [S, V], contiguous.
        log_norm: float32 [S] of :func:`log_norms`.
        targets: int64 [S].
        weight: [S]; 0 gives zeros whatever the row holds.

    Returns:
        [S, V] in the dtype of the logits, computed in float32 and rounded once.
    """
    logits = logits.contiguous()
    out, block = torch.empty_like(logits), 64 if interpreted() else 4096
    if len(out):
        grid = (logits.shape[0], -(-logits.shape[1] // block))
        given = (logits, log_norm, targets, weight.float(), out, logits.shape[1])
        _launched("slope_kernel", grid, out, *given, BLOCK=block, num_warps=8)
    return out


def rms_sums(
    x: Float[Tensor, "B T d"], g: Float[Tensor, "B T d"], lengths: Sequence[int], eps: float
) -> Float[Tensor, "B d"]:
    """Sum g_t x_t / rms(x_t) over each example's tokens: the gradient of an RMS norm's weight.

    Args:
        x: the layer's input.
        g: gradient of its output.
        lengths: B numbers of tokens.
        eps: added to the mean square.

    Returns:
        float32 [B, d]. The quotient is rounded to the dtype of x before it is multiplied, as transformers does.
    """
    (num, tokens, width), step = x.shape, 4 if interpreted() else 64
    chunks = max(1, -(-tokens // step))
    out = torch.empty(num, chunks, width, dtype=torch.float32, device=x.device)
    if out.numel():
        block = 1 << max(4, (width - 1).bit_length())
        _launched(
            "rms_kernel", (num, chunks), x,
            x.contiguous(), g.contiguous(), lengths_on(tuple(lengths), x.device), out, width, tokens, eps,
            BK=step, BN=block, num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
    return out.sum(1)
