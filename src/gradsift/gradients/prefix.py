"""The prompt held constant: what stands before a row's first trained token runs forward only (ours).

The keys and values of these tokens are constants, so the backward runs over the rest: the loss is the same, and the
gradient lacks what flows through the prompt's own states. With short answers the backward nearly vanishes from the cost,
while every layer still says something. The first predicted token's position is the first that is differentiated.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Held:
    """A micro-batch cut in two.

    Args:
        prefix: [B, P] what runs without a graph, the rows' first tokens; those at or beyond ``starts`` are not looked at.
        starts: [B] tokens of each row that are held constant, P at most and in one row.
        input_ids: [B, T] the rest, right-padded.
        labels: [B, T] with -100 where no loss is taken.
        lengths: [B] real tokens of the rest.
    """

    prefix: Int[Tensor, "B P"]
    starts: Int[Tensor, " B"]
    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]

    @property
    def positions(self) -> Int[Tensor, "B T"]:
        """[B, T] positions of the rest in their rows."""
        return self.starts[:, None] + torch.arange(self.input_ids.shape[1], device=self.starts.device)

    @property
    def mask(self) -> Int[Tensor, "B S"]:
        """[B, P + T] 1 where a token may be looked at: a short row's prefix is padded up to the longest one."""
        seen = torch.arange(self.prefix.shape[1], device=self.starts.device)[None] < self.starts[:, None]
        return torch.cat([seen.long(), torch.ones_like(self.input_ids)], dim=1)


def hold_prompts(input_ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> Held:
    """Cut every row before the token that predicts its first trained one.

    Args:
        input_ids: [B, T] right-padded tokens.
        labels: [B, T] with -100 where no loss is taken; every row trains at least one token.
        lengths: [B] real tokens per row.

    Returns:
        The two parts.
    """
    lengths = lengths.to(input_ids.device)
    starts = (labels[:, 1:] != -100).long().argmax(dim=1)
    left = lengths - starts
    at = starts[:, None] + torch.arange(int(left.max()), device=input_ids.device)
    real = at < lengths[:, None]
    at = at.clamp_max(input_ids.shape[1] - 1)
    rest = labels.gather(1, at).masked_fill(~real, -100)
    return Held(input_ids[:, : int(starts.max())], starts, input_ids.gather(1, at), rest, left)


def empty_cache(model: nn.Module) -> dict[str, Any]:
    """Make what keeps the prefix's keys and values, under the name that the model's forward calls it.

    Args:
        model: a causal language model, with or without an adapter.

    Returns:
        One keyword argument.
    """
    from transformers import DynamicCache

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = inspect.signature(inner.forward).parameters
    config: Any = inner.config
    return {"cache" if "cache" in names else "past_key_values": DynamicCache(config=config)}
