"""Losses of a micro-batch's rows and the slope of their sum at the logits, in one pass over the logits (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradsift.gradients import fused


@dataclass(frozen=True)
class Sloped:
    """What the logits say.

    Args:
        loss: float64 [B] mean nats per trained token.
        prompt_loss: float64 [B] mean nats per prompt token, or None.
        slope: [S, V] derivative of the sum of ``loss``, softmax minus one-hot over the row's trained tokens, or None.
    """

    loss: Float[Tensor, " B"]
    prompt_loss: Float[Tensor, " B"] | None
    slope: Float[Tensor, "S V"] | None


def losses_and_slopes(
    logits: Float[Tensor, "S V"],
    labels: Int[Tensor, "B T"],
    input_ids: Int[Tensor, "B T"],
    prompt: Bool[Tensor, "B T"] | None,
    places: tuple[Int[Tensor, " S"], Int[Tensor, " S"]],
    *,
    kernels: bool = False,
    slope: bool = True,
) -> Sloped:
    """Measure losses and, where asked, slopes.

    Args:
        logits: at the S positions that predict a trained or a prompt token.
        labels: -100 where no loss is taken.
        input_ids: tokens.
        prompt: tokens whose loss is measured apart, or None.
        places: row and column of each of the S positions, found before the forward so that no device is waited for.
        kernels: use the Triton kernels.
        slope: also the derivative.

    Returns:
        Losses and slopes.
    """
    supervised = labels[:, 1:] != -100
    counts = supervised.sum(1)
    seen = supervised if prompt is None else supervised | prompt[:, 1:]
    rows, columns = places
    targets = torch.where(supervised, labels[:, 1:], input_ids[:, 1:])[rows, columns]
    wide = logits.detach()
    log_norm = fused.log_norms(wide) if kernels else torch.zeros((), device=wide.device)
    if not kernels:  # one kernel, where a log of summed exponentials takes four passes
        wide = torch.log_softmax(wide if wide.dtype == torch.float64 else wide.float(), -1)
    nats = (log_norm - wide.gather(1, targets[:, None])[:, 0]).double()
    zeros = torch.zeros(labels.shape[0], dtype=torch.float64, device=nats.device)
    own = supervised[seen] if prompt is not None else torch.ones_like(rows, dtype=torch.bool)
    prompt_loss = None
    if prompt is None:
        loss = zeros.index_add(0, rows, nats) / counts
    else:
        loss = zeros.index_add(0, rows[own], nats[own]) / counts
        prompt_loss = zeros.index_add(0, rows[~own], nats[~own]) / (seen & ~supervised).sum(1).clamp_min(1)
    if not slope:
        return Sloped(loss, prompt_loss, None)
    # A row whose loss is not finite is reported by its loss; it must not poison its own status with NaN slopes.
    weight = torch.where(loss.isfinite(), 1.0 / counts.double(), torch.zeros_like(loss))[rows] * own
    if kernels:
        return Sloped(loss, prompt_loss, fused.slopes(wide, log_norm, targets, weight))
    steep = wide.exp_()
    steep[torch.arange(len(targets), device=targets.device), targets] -= 1
    if not nats.isfinite().all():
        steep.nan_to_num_()
    return Sloped(loss, prompt_loss, steep.mul_(weight[:, None].to(steep.dtype)))
