"""One vector per row: hidden states pooled with weights that grow with the position (arXiv 2503.01807, RDS+)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradsift.data.token_rows import content_of
from gradsift.types import TokenRow


def pool_positions(hidden: Float[Tensor, "B T d"], lengths: Sequence[int]) -> Float[Tensor, "B d"]:
    """Average hidden states with weights proportional to the position, prompt and completion alike.

    e = sum_t t h_t / sum_t t, t = 1 .. n: in a causal model later positions have read more of the row (arXiv 2503.01807;
    the weights are those of Muennighoff, SGPT, arXiv 2202.08904).

    Args:
        hidden: [B, T, d] states of a right-padded batch.
        lengths: B numbers of real tokens, each in [1, T].

    Returns:
        [B, d] in the dtype of ``hidden``; padding has no part in it, whatever it holds.
    """
    place = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=torch.float64)
    count = torch.tensor(list(lengths), device=hidden.device, dtype=torch.float64)[:, None]
    real = place <= count
    weight = torch.where(real, place / (count * (count + 1) / 2), torch.zeros_like(place))
    # Masked and not only weighted by 0: a padding state that is not finite would poison the row.
    states = hidden.masked_fill(~real[:, :, None], 0)
    return torch.bmm(weight.to(hidden.dtype)[:, None, :], states)[:, 0]


def content_order(rows: Sequence[TokenRow]) -> tuple[str, ...]:
    """Order in which the embeddings of a set of rows are kept: by content, so that renamed rows find theirs.

    Args:
        rows: n token rows.

    Returns:
        n row ids by (content hash, id).
    """
    return tuple(row.id for row in sorted(rows, key=lambda row: (content_of(row), row.id)))


def reorder(embeddings: Float[np.ndarray, "n d"], have: Sequence[str], want: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Put embeddings into another order of the same rows.

    Args:
        embeddings: [n, d].
        have: n ids in the order of ``embeddings``.
        want: the same ids in the order wanted.

    Returns:
        [n, d], a copy.
    """
    place = {name: k for k, name in enumerate(have)}
    return embeddings[[place[name] for name in want]]


def unit_distance(a: Float[np.ndarray, " d"], b: Float[np.ndarray, " d"]) -> float:
    """Distance of two unit vectors: how far any cosine with one of them can differ from that with the other.

    Args:
        a: [d], not zero.
        b: [d], not zero.

    Returns:
        |a / |a| - b / |b||, in [0, 2].
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(x / np.linalg.norm(x) - y / np.linalg.norm(y)))
