"""Which way gradients are measured on a device, and what may stay in half precision on it (ours)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from gradsift.errors import ConfigError
from gradsift.gradients import fused, products
from gradsift.gradients.blocks import Dense
from gradsift.gradients.layers import Seen, rule_for

Road = Literal["auto", "tiles", "torch", "fused"]
WORDS = {
    "tiles": "gradient tiles in cache (CPU)",
    "torch": "batched products of torch, which are slower; {why}",
    "fused": "fused Triton kernels",
}


def choose_road(asked: Road, device: torch.device, dtype: torch.dtype) -> Literal["tiles", "torch", "fused"]:
    """Choose how linear layers are measured.

    Args:
        asked: a road, or auto: tiles on anything that is not CUDA, else fused where the kernels can run, else torch.
        device: of the model.
        dtype: of its weights; float64 has no kernels.

    Returns:
        The road.

    Raises:
        ConfigError: there is no such road, or ``fused`` was asked for and cannot run.
    """
    if asked != "auto" and asked not in WORDS:
        raise ConfigError("there is no such road", where="road", got=asked, expected=f"auto, {', '.join(WORDS)}")
    why = missing(device, dtype)
    if asked == "fused" and why is not None:
        raise ConfigError(
            "the fused kernels cannot run", where="road", got=why, expected="triton, CUDA, float32 or a half precision",
            do="ask for auto",
        )  # fmt: skip
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "tiles"
    return "fused" if why is None else "torch"


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why the fused kernels cannot run on a device, or None.

    Args:
        device: of the model.
        dtype: of its weights.

    Returns:
        Words, or None.
    """
    if dtype == torch.float64:
        return "there are no kernels for float64"
    if device.type != "cuda" and not fused.interpreted():
        return f"the model is on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return fused.why_not(device if device.type == "cuda" else None)


def describe(road: str, device: torch.device, dtype: torch.dtype) -> str:
    """Name a road in words, for notes and reports.

    Args:
        road: ``tiles``, ``torch`` or ``fused``.
        device: of the model.
        dtype: of its weights.

    Returns:
        One line.
    """
    words = WORDS[road].format(why=missing(device, dtype) or "the fused kernels were not asked for")
    faster = road == "tiles" and device.type == "cpu" and dtype != torch.float64 and products.pays()
    return f"{words}, products by oneDNN" if faster else words


def keeps_narrow(module: nn.Module) -> bool:
    """Tell whether a layer's input and output gradient may stay in half precision: only products are taken of them.

    Args:
        module: a hooked module.

    Returns:
        True for linear layers.
    """
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def fast_norms(modules: Iterable[nn.Module], dtype: torch.dtype) -> dict[nn.Module, float]:
    """Find the RMS norms whose normalized input is what the kernel computes, by asking each on a few drawn rows.

    Args:
        modules: any modules.
        dtype: arithmetic of the measurement.

    Returns:
        Module -> its epsilon; norms of another formula are left to their rule.
    """
    found = {}
    for module in modules:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float):
            weight = module.get_parameter("weight")
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(1, 4, weight.shape[0], generator=generator).to(weight.device, weight.dtype)
            g = torch.ones_like(x)
            rule = rule_for(module)
            parts = {} if rule is None else dict(rule.parts(module, Seen(x, g.to(dtype), (4,))))
            mine, its = fused.rms_sums(x, g, (4,), eps), parts.get("weight")
            limit = 4 * 4 * torch.finfo(weight.dtype).eps  # four tokens, each some roundings off
            if isinstance(its, Dense) and list(parts) == ["weight"] and bool((mine - its.g).abs().max() <= limit):
                found[module] = eps
    return found
