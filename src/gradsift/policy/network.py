"""The networks of the learned policy as free functions of flat parameter vectors: one actor, a critic per quantity.

The actor is one MLP applied to every cluster's row [its features; common features], so permuting clusters permutes the
logits and any number of clusters fits; critics read mean and maximum over clusters (ogs.md 2.11, "ours").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradsift.seeds import Stream

# Bounded logits leave every cluster a chance of at least exp(-7) of the likeliest: a policy that has become sure of
# itself while the price was low must still see what the others cost when the price has risen (measured: it did not).
LARGEST_LOGIT = 3.5
MASKED = -1e30  # finite, so that 0 * log(0) is 0 and gradients stay numbers


@dataclass(frozen=True)
class Shape:
    """Sizes of the networks.

    Args:
        features: F, numbers per cluster.
        common: G, numbers common to all clusters.
        sources: M, protected sources; there are 1 + M critics.
        hidden: H, width of both hidden layers.
    """

    features: int
    common: int
    sources: int
    hidden: int = 64

    @property
    def actor(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the actor's parameters; the first layer is cut into the clusters' and the common part."""
        f, g, h = self.features, self.common, self.hidden
        return ((f, h), (g, h), (h,), (h, h), (h,), (h,))

    @property
    def critic(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the critics' parameters, stacked."""
        a, p, h = 1 + self.sources, 2 * self.features + self.common, self.hidden
        return ((a, p, h), (a, 1, h), (a, h, h), (a, 1, h), (a, h, 1), (a, 1, 1))


def tanh(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Hyperbolic tangent as 2 sigmoid(2x) - 1, within 4e-7: torch's own takes 5 times as long in float32 (measured).

    Args:
        x: any numbers.

    Returns:
        Numbers in [-1, 1].
    """
    return torch.sigmoid(2 * x).mul(2).sub(1)


def unpack(flat: Float[Tensor, " P"], shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Cut a parameter vector into its parts.

    Args:
        flat: all parameters.
        shapes: of the parts.

    Returns:
        Views.
    """
    return [part.view(shape) for part, shape in zip(flat.split([prod(s) for s in shapes]), shapes, strict=True)]


def orthogonal(rows: int, columns: int, gain: float, random: np.random.Generator) -> Float[np.ndarray, "m n"]:
    """Random matrix with orthonormal rows or columns, whichever are fewer, times a gain (Saxe et al. 1312.6120).

    Args:
        rows: m.
        columns: n.
        gain: factor.
        random: source of the draws.

    Returns:
        The matrix.
    """
    tall = random.normal(size=(max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(tall)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return gain * (q if rows >= columns else q.T)


def start_actor(shape: Shape, stream: Stream) -> Float[np.ndarray, " P"]:
    """Draw the actor's first parameters; its last layer is small, so that all clusters start about equally likely.

    Args:
        shape: sizes.
        stream: source of the draws.

    Returns:
        float32 [P].
    """
    random, f, g, h = stream.numpy(), shape.features, shape.common, shape.hidden
    first = orthogonal(f + g, h, np.sqrt(2), random)
    second, last = orthogonal(h, h, np.sqrt(2), random), orthogonal(h, 1, 0.01, random)
    parts = [first[:f], first[f:], np.zeros(h), second, np.zeros(h), last]
    return np.concatenate([part.ravel() for part in parts]).astype(np.float32)


def start_critic(shape: Shape, stream: Stream) -> Float[np.ndarray, " Q"]:
    """Draw the critics' first parameters.

    Args:
        shape: sizes.
        stream: source of the draws.

    Returns:
        float32 [Q].
    """
    random, (many, pooled, h) = stream.numpy(), shape.critic[0]
    drawn = []
    for size_in, size_out, gain in ((pooled, h, np.sqrt(2)), (h, h, np.sqrt(2)), (h, 1, 0.1)):
        drawn += [
            np.stack([orthogonal(size_in, size_out, gain, random) for _ in range(many)]),
            np.zeros((many, size_out)),
        ]
    return np.concatenate([part.ravel() for part in drawn]).astype(np.float32)


def actor_logits(
    flat: Float[Tensor, " P"], shape: Shape, clusters: Float[Tensor, "B K F"], common: Float[Tensor, "B G"]
) -> Float[Tensor, "B K"]:
    """Preference for each cluster.

    Args:
        flat: the actor's parameters.
        shape: sizes.
        clusters: features of each cluster.
        common: features of the whole.

    Returns:
        Logits before masking, within +-LARGEST_LOGIT.
    """
    of_cluster, of_common, bias, second, bias_2, last = unpack(flat, shape.actor)
    whole = torch.addmm(bias, common, of_common)
    hidden = tanh(clusters @ of_cluster + whole[:, None, :])
    hidden = tanh(torch.addmm(bias_2, hidden.flatten(0, 1), second))
    return LARGEST_LOGIT * tanh((hidden @ last).view(clusters.shape[:2]) / LARGEST_LOGIT)


def masked_log_softmax(logits: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Log-probabilities over the clusters that may be chosen.

    Args:
        logits: preferences.
        mask: clusters that may be chosen; at least one per row, or the row means nothing.

    Returns:
        About -1e30 where masked.
    """
    return torch.log_softmax(logits.masked_fill(~mask, MASKED), dim=1)


def pool(clusters: Float[Tensor, "B K F"], common: Float[Tensor, "B G"]) -> Float[Tensor, "B P"]:
    """What the critics read: mean and maximum over clusters, and the common features.

    Args:
        clusters: features of each cluster.
        common: features of the whole.

    Returns:
        P = 2 F + G numbers per row, the same for any order of clusters up to rounding.
    """
    return torch.cat([clusters.mean(1), clusters.amax(1), common], dim=1)


def critic_values(flat: Float[Tensor, " Q"], shape: Shape, pooled: Float[Tensor, "B P"]) -> Float[Tensor, "B A"]:
    """Estimated return of reward and of each cost, by separate networks run as one.

    Args:
        flat: the critics' parameters.
        shape: sizes.
        pooled: what :func:`pool` gives.

    Returns:
        A = 1 + M values per row, in the units the critics were trained in.
    """
    first, bias, second, bias_2, last, bias_3 = unpack(flat, shape.critic)
    hidden = tanh(torch.baddbmm(bias, pooled.expand(len(first), *pooled.shape), first))
    hidden = tanh(torch.baddbmm(bias_2, hidden, second))
    return torch.baddbmm(bias_3, hidden, last).squeeze(2).T
