"""How a batch is laid out for the kernels: spans of tokens, lists of token blocks, tiles and groups (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

PROGRAMS = 132  # streaming multiprocessors of an H100: what a launch should come out even to
FIXED = 512  # a program costs this many tokens before its first one, mostly for loading its direction tiles
MOST = 4  # directions of one launch


@dataclass(frozen=True)
class Spans:
    """Where the tokens of each example lie in the flat [S, .] view of a batch.

    Args:
        lengths: B numbers of tokens.
        firsts: B numbers of first tokens.
    """

    lengths: tuple[int, ...]
    firsts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], starts: Sequence[int] | None, width: int) -> Spans:
        """Make spans of a flat layout (``starts``) or of right-padded rows of ``width`` tokens."""
        return cls(
            tuple(lengths), tuple(starts) if starts is not None else tuple(b * width for b in range(len(lengths)))
        )


@dataclass(frozen=True)
class Shape:
    """Tile of one launch.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        tokens: of one step.
        warps: of a program.
        stages: of the pipeline that loads tokens; the work list takes two of them.
    """

    rows: int
    cols: int
    tokens: int
    warps: int
    stages: int


def launches(num_directions: int) -> list[range]:
    """Split directions over launches, evenly and at most three each, or four at once.

    Args:
        num_directions: M >= 0.

    Returns:
        Which directions each launch takes; one empty range for norms alone.
    """
    count = 1 if num_directions <= MOST else -(-num_directions // (MOST - 1))
    cuts = [num_directions * k // count for k in range(count + 1)]
    return [range(a, b) for a, b in pairwise(cuts)]


def num_groups(num_tiles: int, num_examples: int, num_tokens: int) -> int:
    """Choose into how many groups examples go, so that programs come out even to the device.

    Args:
        num_tiles: tiles of the matrix.
        num_examples: B.
        num_tokens: of the batch.

    Returns:
        1 to max(1, B).
    """

    def cost(groups: int) -> float:
        return -(-num_tiles * groups // PROGRAMS) * (num_tokens / groups + FIXED)

    tried = [n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128) if n <= max(1, num_examples)]
    return min(tried, key=cost)


def work_list(spans: Spans, tokens: int, groups: int) -> tuple[Int[np.ndarray, "n 3"], Int[np.ndarray, " edges"]]:
    """List the token blocks of all examples, and where each group of examples begins.

    Args:
        spans: the batch.
        tokens: of one block.
        groups: how many; cut between examples, as even in blocks as that allows.

    Returns:
        int32 (first token, tokens, example at its last block or -1), and int32 positions of the groups' first blocks
        with the end behind them. An example without tokens has one block of none, so that its zeros are written.
    """
    lengths, firsts = np.asarray(spans.lengths, dtype=np.int64), np.asarray(spans.firsts, dtype=np.int64)
    blocks = np.maximum(1, -(-lengths // tokens))
    ends = np.cumsum(blocks)
    example = np.repeat(np.arange(len(lengths)), blocks)
    within = np.arange(len(example)) - np.repeat(ends - blocks, blocks)
    work = np.empty((len(example), 3), dtype=np.int32)
    work[:, 0] = firsts[example] + within * tokens
    work[:, 1] = np.minimum(tokens, lengths[example] - within * tokens)
    work[:, 2] = np.where(within == blocks[example] - 1, example, -1)
    edges = np.concatenate([[0], ends])
    wanted = np.linspace(0, len(example), groups + 1)
    return work, edges[np.abs(edges[:, None] - wanted).argmin(0)].astype(np.int32)


def pair_list(spans: Spans, tokens: int) -> tuple[Int[np.ndarray, "n 5"], int]:
    """List the pairs of token blocks of each example, each pair once.

    Args:
        spans: the batch.
        tokens: of one block.

    Returns:
        int32 (first token, tokens, first token of the other block, its tokens, slot), and slots of each example.
    """
    most = max((-(-n // tokens) for n in spans.lengths), default=0)
    width, out = most * (most + 1) // 2, []
    for b, (length, first) in enumerate(zip(spans.lengths, spans.firsts, strict=True)):
        lows = range(0, length, tokens)
        pairs = [(low, high) for low in lows for high in lows if low <= high]
        out += [
            (first + low, min(tokens, length - low), first + high, min(tokens, length - high), b * width + slot)
            for slot, (low, high) in enumerate(pairs)
        ]
    return np.array(out, dtype=np.int32).reshape(-1, 5), width


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a small array without waiting for the device.

    Args:
        array: any shape.
        device: where it goes.

    Returns:
        A tensor there.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@lru_cache(maxsize=64)
def work_on(spans: Spans, tokens: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Put a :func:`work_list` on a device, once for each batch and cut.

    Args:
        spans: the batch.
        tokens: of one block.
        groups: of examples.
        device: where it goes.

    Returns:
        int32 [n, 3] and int32 [groups + 1].
    """
    work, edges = work_list(spans, tokens, groups)
    return to_device(work, device), to_device(edges, device)


@lru_cache(maxsize=16)
def pairs_on(spans: Spans, tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """Put a :func:`pair_list` on a device, once for each batch.

    Args:
        spans: the batch.
        tokens: of one block.
        device: where it goes.

    Returns:
        int32 [n, 5], and slots of each example.
    """
    work, width = pair_list(spans, tokens)
    return to_device(work, device), width


@lru_cache(maxsize=16)
def lengths_on(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " B"]:
    """Copy a batch's lengths or starts to a device once.

    Args:
        lengths: B integers below 2^31.
        device: where they go.

    Returns:
        int32 [B].
    """
    return to_device(np.asarray(lengths, dtype=np.int32), device)
