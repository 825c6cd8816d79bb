"""Float32 products on a CPU by oneDNN, where PyTorch's own BLAS leaves half of the vector unit idle (ours).

PyTorch multiplies float32 matrices by MKL, and MKL takes its AVX2 kernels on processors that are not Intel's, whatever they
can do. PyTorch also carries oneDNN, whose kernels are chosen by what the processor says of itself; on an AMD core with AVX-512
they take half the time. Both sum in float32, in another order. Where oneDNN has nothing to gain (Intel, no AVX-512, other types
and devices) everything here is what PyTorch does by itself.

Weights are frozen while gradients are collected, so a linear layer is two products: one forward, one back to its input.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

WORTH = 1 << 21  # multiplications of a product below which MKL is as fast
WHOLE = 16  # lengths of outer products are rounded up to this, so that few shapes are compiled
SLAB = 1 << 20  # entries that are formed beside the matrix they are added to
_LINEAR = functional.linear


@cache
def pays() -> bool:
    """Whether oneDNN is the faster one here: MKL, an AVX-512 processor and another vendor than Intel; asked once a process."""
    found = (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and vendor() not in ("", "GenuineIntel")
    )
    if found:
        # A kernel is compiled for every shape and kept, by default 1,024 in each of two caches: 0.8 GB and more with rows of many
        # lengths. These hold what one micro-batch needs, at most 0.2 GB.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "32")
    return found


def vendor() -> str:
    """Name the processor's vendor as Linux tells it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def takes(*tensors: Tensor) -> bool:
    """Whether a product of these may go to oneDNN.

    Args:
        *tensors: the factors.

    Returns:
        True for plain float32 tensors on a CPU where it pays and nothing is empty.
    """
    return pays() and all(
        type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0
        for t in tensors
    )


def worth(rows: int, cols: int, length: int) -> bool:
    """Whether a product is large enough for oneDNN to win.

    Args:
        rows: of the result.
        cols: of the result.
        length: of its sums.

    Returns:
        True from ``WORTH`` multiplications on.
    """
    return rows * cols * length >= WORTH


def rounded(length: int, most: int) -> int:
    """Round a length up where what lies beyond is zero, so that rows of like lengths have products of one shape.

    Args:
        length: tokens of a row.
        most: tokens that are there, zeros included.

    Returns:
        The length itself where oneDNN is not used.
    """
    return min(most, -(-length // WHOLE) * WHOLE) if pays() else length


def linear(
    x: Float[Tensor, "*lead k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "*lead n"]:
    """Multiply by the transpose of a weight; no gradient flows through this.

    Args:
        x: [..., k].
        weight: [n, k], in any layout.
        bias: [n], or None.

    Returns:
        [..., n].
    """
    if takes(x, weight, *([] if bias is None else [bias])) and worth(x.numel() // x.shape[-1], *weight.shape):
        if not (weight.is_contiguous() or weight.t().is_contiguous()):  # other layouts have no kernel, but a loop
            weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def outer_(out: Float[Tensor, "r c"], left: Float[Tensor, "L r"], right: Float[Tensor, "L c"]) -> None:
    """Write sum_t left_t right_t' to a matrix.

    Args:
        out: [r, c], overwritten.
        left: [L, r]; its transpose is best contiguous.
        right: [L, c].
    """
    if worth(out.shape[0], out.shape[1], left.shape[0]) and takes(left, right):
        out.copy_(linear(left.t(), right.t()))
    else:
        torch.mm(left.t(), right, out=out)


def add_product_(out: Float[Tensor, "r c"], left: Float[Tensor, "L r"], right: Float[Tensor, "L c"]) -> None:
    """Add sum_t left_t right_t' to a matrix, slab by slab of its rows.

    Args:
        out: [r, c], changed in place.
        left: [L, r].
        right: [L, c].
    """
    if not (worth(out.shape[0], out.shape[1], left.shape[0]) and takes(left, right)):
        out.addmm_(left.t(), right)
        return
    height = max(1, SLAB // out.shape[1])
    for low in range(0, out.shape[0], height):
        out[low : low + height] += linear(left[:, low : low + height].t(), right.t())


def turned(left: Float[Tensor, "L r"]) -> Float[Tensor, "L r"]:
    """Lay a left factor out as :func:`outer_` likes it, when it will be used in slices of its columns.

    Args:
        left: [L, r].

    Returns:
        The same numbers.
    """
    return left.t().contiguous().t() if takes(left) else left


class _Frozen(torch.autograd.Function):
    """A linear layer whose weight and bias need no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(grads[0], weight.t()), None, None


class FrozenProducts(TorchFunctionMode):
    """While it is entered, products of a model's tokens with frozen weights go the faster way, forward and backward.

    For a model in eval mode: a checkpointed layer would be computed again outside of it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take linear layers (``linear``) and GPT-2's (``addmm``); leave everything else as it is."""
        kwargs = kwargs or {}
        if func is _LINEAR:
            if (got := _frozen(*args, **kwargs)) is not None:
                return got
        elif func is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if bias.ndim == 1 and (got := _frozen(x, weight.t(), bias)) is not None:
                return got
        return func(*args, **kwargs)


def _frozen(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    odd = weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1])
    if trained or odd or not takes(input, weight) or torch.is_autocast_enabled("cpu"):
        return None
    if input.requires_grad and torch.is_grad_enabled():
        return _Frozen.apply(input, weight, bias)  # type: ignore[return-value]
    return linear(input, weight, bias)
