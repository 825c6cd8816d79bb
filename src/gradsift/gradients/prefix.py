"""The prompt held constant: what stands before a row's first trained token runs forward only (ours).

The keys and values of these tokens are constants, so the backward runs over the rest: the loss is the same, and the
gradient lacks what flows through the prompt's own states. With short answers the backward nearly vanishes from the cost,
while every layer still says something. The first predicted token's position is the first that is differentiated.

A micro-batch's prefixes have several lengths. Where every layer attends to all that is before a token, padding stands behind
a short one and is never attended to. Windows and chunks count places in the cache instead: there padding stands before a
short prefix, so that what precedes the rest of a row is next to it. A layer that keeps a state (recurrent, convolutional)
would take the padding in, so such models are refused.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gradsift.errors import ConfigError

ATTENDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})  # layers without a state


@dataclass(frozen=True)
class Held:
    """A micro-batch cut in two.

    Args:
        prefix: [B, P] what runs without a graph, the rows' first ``starts`` tokens and padding.
        seen: [B, P] False for padding.
        starts: [B] tokens of each row that are held constant, P at most and in one row.
        input_ids: [B, T] the rest, right-padded.
        labels: [B, T] with -100 where no loss is taken.
        lengths: [B] real tokens of the rest.
    """

    prefix: Int[Tensor, "B P"]
    seen: Bool[Tensor, "B P"]
    starts: Int[Tensor, " B"]
    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]

    @property
    def positions(self) -> Int[Tensor, "B T"]:
        """[B, T] positions of the rest in their rows."""
        return self.starts[:, None] + torch.arange(self.input_ids.shape[1], device=self.starts.device)

    @property
    def prefix_positions(self) -> Int[Tensor, "B P"]:
        """[B, P] positions of the prefix in its rows; any for padding."""
        return (self.seen.long().cumsum(1) - 1).clamp_min(0)

    @property
    def mask(self) -> Int[Tensor, "B S"]:
        """[B, P + T] 1 where a token may be looked at: a short row's prefix is padded up to the longest one."""
        return torch.cat([self.seen.long(), torch.ones_like(self.input_ids)], dim=1)


def hold_prompts(
    input_ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"], lengths: Int[Tensor, " B"], *, adjacent: bool = False
) -> Held:
    """Cut every row before the token that predicts its first trained one.

    Args:
        input_ids: [B, T] right-padded tokens.
        labels: [B, T] with -100 where no loss is taken; every row trains at least one token.
        lengths: [B] real tokens per row.
        adjacent: padding stands before a short prefix, and no longer between it and the rest.

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
    place = torch.arange(int(starts.max()), device=input_ids.device)[None]
    if adjacent:
        place = place - (place.shape[1] - starts)[:, None]
        prefix, seen = input_ids.gather(1, place.clamp_min(0)), place >= 0
    else:
        prefix, seen = input_ids[:, : place.shape[1]], place < starts[:, None]
    return Held(prefix, seen, starts, input_ids.gather(1, at), rest, left)


def refuse_states(model: nn.Module) -> None:
    """Refuse a model whose layers keep more of a prefix than keys and values.

    Args:
        model: a causal language model, with or without an adapter.

    Raises:
        ConfigError: a layer keeps a state, or is of a kind that is not known.
    """
    kinds = set(getattr(_config(model), "layer_types", None) or ()) - ATTENDS
    inner = _bare(model)
    if kinds or getattr(inner, "_is_stateful", False):
        raise ConfigError(
            "prompts cannot be held constant: padding would go into what the model's layers keep of a prompt",
            where="collect.positions",
            got=f"trained, with {type(inner).__name__} ({', '.join(sorted(kinds)) or 'recurrent layers'})",
            expected=f"a model whose layers are all of {', '.join(sorted(ATTENDS))}",
            do="leave collect.positions out, screen by upper layers (--screen 25%), or choose another --navigator",
        )


def needs_adjacent(model: nn.Module) -> bool:
    """Tell whether what a layer attends to depends on places in the cache.

    Args:
        model: a causal language model, with or without an adapter.

    Returns:
        True where a layer has a window or chunks.
    """
    (cache,) = empty_cache(model).values()
    return any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def empty_cache(model: nn.Module) -> dict[str, Any]:
    """Make what keeps the prefix's keys and values, under the name that the model's forward calls it.

    Args:
        model: a causal language model, with or without an adapter.

    Returns:
        One keyword argument.
    """
    from transformers import DynamicCache

    names = inspect.signature(_bare(model).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": DynamicCache(config=_config(model))}


def _bare(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _config(model: nn.Module) -> Any:
    return _bare(model).config.get_text_config()
