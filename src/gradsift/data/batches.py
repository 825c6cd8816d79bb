"""Rows of like length side by side: shards that do not depend on input order, micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from gradsift.data.token_rows import TokenRows
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """A right-padded micro-batch.

    Args:
        rows: int64 [B], which rows these are.
        input_ids: int64 [B, T].
        labels: int64 [B, T], the token itself where it carries loss and -100 elsewhere.
        lengths: int64 [B], real tokens per row.
    """

    rows: Int[Tensor, " B"]
    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]


def plan_shards(tokens: Sequence[TokenRow], indices: Sequence[int], rows_per_shard: int) -> tuple[tuple[int, ...], ...]:
    """Sort rows by (length, id) and cut them into shards; the cut does not depend on the order of the input.

    Args:
        tokens: all rows.
        indices: which of them.
        rows_per_shard: rows per shard; the last has the rest.

    Returns:
        Indices per shard.
    """
    ordered = sorted(indices, key=lambda i: (tokens[i].num_tokens, tokens[i].id))
    return tuple(tuple(ordered[s : s + rows_per_shard]) for s in range(0, len(ordered), rows_per_shard))


def plan_order(tokens: Sequence[TokenRow]) -> Int[np.ndarray, " N"]:
    """Sort all rows as :func:`plan_shards` does; of rows that are not held, lengths and ids alone are looked at.

    Args:
        tokens: N rows.

    Returns:
        int64 [N] their indices; every ``rows_per_shard`` of them are a shard.
    """
    if isinstance(tokens, TokenRows):
        return tokens.by_length()
    (shard,) = plan_shards(tokens, range(len(tokens)), max(1, len(tokens))) or ((),)
    return np.array(shard, dtype=np.int64)


def plan_batches(
    tokens: Sequence[TokenRow], indices: Sequence[int], tokens_per_batch: int
) -> tuple[tuple[int, ...], ...]:
    """Pack consecutive rows so that the longest row times their number stays within the budget.

    Args:
        tokens: all rows.
        indices: which of them, in the order to pack; best sorted by length.
        tokens_per_batch: the budget; a longer row goes alone.

    Returns:
        Indices per micro-batch, none lost.
    """
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    longest = 0
    for i in indices:
        longest_with = max(longest, tokens[i].num_tokens)
        if current and longest_with * (len(current) + 1) > tokens_per_batch:
            batches.append(tuple(current))
            current, longest_with = [], tokens[i].num_tokens
        current.append(i)
        longest = longest_with
    if current:
        batches.append(tuple(current))
    return tuple(batches)


def collate(tokens: Sequence[TokenRow], indices: Sequence[int], pad_id: int) -> Tokens:
    """Pad some rows on the right into one micro-batch.

    Args:
        tokens: all rows.
        indices: which of them.
        pad_id: padding token; it never carries loss.

    Returns:
        The micro-batch.
    """
    import torch

    some = [tokens[i] for i in indices]
    width = max(row.num_tokens for row in some)
    ids = np.full((len(some), width), pad_id, dtype=np.int64)
    labels = np.full((len(some), width), IGNORED, dtype=np.int64)
    for b, row in enumerate(some):
        ids[b, : row.num_tokens] = row.input_ids
        labels[b, : row.num_tokens] = np.where(row.trained, row.input_ids, IGNORED)
    return Tokens(
        torch.tensor(list(indices)),
        torch.from_numpy(ids),
        torch.from_numpy(labels),
        torch.tensor([row.num_tokens for row in some]),
    )
