"""A small classifier on hidden states, in numpy: AdamW, early stop, temperature (daar.md 3, steps 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from gradsift.geometry.entropy import softmax

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01


@dataclass(frozen=True)
class ProbeConfig:
    """How the probe is trained.

    Args:
        lr: AdamW learning rate.
        batch: rows per step.
        steps: most optimizer steps.
        every: steps between two looks at the validation loss.
        patience: looks without a better one before it stops.
        held_out: share of the rows that is validated on.
    """

    lr: float = 1e-3
    batch: int = 32
    steps: int = 600
    every: int = 20
    patience: int = 5
    held_out: float = 0.03


@dataclass(frozen=True)
class Probe:
    """A trained classifier.

    Args:
        weights: matrix and offset of every layer.
        mean: float64 [d] of the training rows.
        scale: float64 [d] their spread, 1 where there is none.
        temperature: divides the logits.
        accuracy: share of the validation rows that it labels right.
        num_held_out: validation rows.
    """

    weights: tuple[tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, " _"]], ...]
    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]
    temperature: float
    accuracy: float
    num_held_out: int

    def logits(self, rows: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N K"]:
        """Compute the logits of some rows.

        Args:
            rows: [N, d] hidden states.

        Returns:
            float64 [N, K].
        """
        return _forward(self.weights, (rows - self.mean) / self.scale)[-1]

    def probabilities(self, rows: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N K"]:
        """Compute calibrated probabilities of the domains.

        Args:
            rows: [N, d] hidden states.

        Returns:
            float64 [N, K].
        """
        return softmax(self.logits(rows), self.temperature)


def widths(dim: int, num_domains: int) -> tuple[int, ...]:
    """Name the layers' widths: d, 2d, d, d/2, 256, K, as in the paper; at least 64 inside (a narrow one can die out).

    Args:
        dim: d.
        num_domains: K.

    Returns:
        Six widths.
    """
    return (dim, *(max(64, width) for width in (2 * dim, dim, dim // 2)), 256, num_domains)


def train_probe(
    rows: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_domains: int,
    config: ProbeConfig,
    generator: np.random.Generator,
) -> Probe:
    """Train a probe with cross-entropy, keep its best state, and fit its temperature on the rows held out.

    Args:
        rows: [n, d] hidden states in id order, n >= 2.
        labels: int64 [n] domains in [0, K).
        num_domains: K.
        config: how it is trained.
        generator: of the first weights, the split and the order of the rows.

    Returns:
        The probe.
    """
    n = len(rows)
    count = min(n - 1, max(int(np.ceil(config.held_out * n)), min(50, n // 5), 1))
    order = generator.permutation(n)
    held, train = np.sort(order[:count]), np.sort(order[count:])
    wide = rows.astype(np.float64)
    mean, spread = wide[train].mean(axis=0), wide[train].std(axis=0)
    scale = np.where(spread > 1e-12, spread, 1.0)
    x = (wide - mean) / scale
    best = _fit(x, labels, train, held, widths(rows.shape[1], num_domains), config, generator)
    logits = _forward(best, x[held])[-1]
    accuracy = float((logits.argmax(axis=1) == labels[held]).mean())
    return Probe(best, mean, scale, fit_temperature(logits, labels[held]), accuracy, count)


def fit_temperature(logits: Float[np.ndarray, "n K"], labels: Int[np.ndarray, " n"], most: float = 20.0) -> float:
    """Find the temperature of least cross-entropy, at least 1 (ours, after Guo et al. 2017, arXiv 1706.04599).

    Below 1 a probe that labels every held-out row right would be sharpened without end.

    Args:
        logits: float64 [n, K].
        labels: int64 [n].
        most: largest temperature.

    Returns:
        In [1, most].
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda t: _cross_entropy(logits / t, labels), bounds=(1.0, most), method="bounded")
    return 1.0 if _cross_entropy(logits, labels) <= float(found.fun) else float(found.x)  # pyright: ignore[reportAttributeAccessIssue]


def _cross_entropy(logits: Float[np.ndarray, "n K"], labels: Int[np.ndarray, " n"]) -> float:
    top = logits.max(axis=1, keepdims=True)
    log_norm = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    return float((log_norm - logits[np.arange(len(labels)), labels]).mean())


_Layers = tuple[tuple[np.ndarray, np.ndarray], ...]


def _forward(weights: _Layers, x: Float[np.ndarray, "n d"]) -> list[np.ndarray]:
    """Inputs of every layer, and the logits last."""
    seen = [x]
    for k, (matrix, offset) in enumerate(weights):
        y = seen[-1] @ matrix + offset
        seen.append(y if k == len(weights) - 1 else np.maximum(y, 0.0))
    return seen


def gradients(weights: _Layers, x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> list[np.ndarray]:
    """Differentiate the mean cross-entropy.

    Args:
        weights: matrix and offset of every layer.
        x: [n, d] inputs.
        labels: int64 [n].

    Returns:
        Matrix and offset gradients of every layer, flat: m1, o1, m2, o2 and so on.
    """
    seen = _forward(weights, x)
    slope = softmax(seen[-1])
    slope[np.arange(len(labels)), labels] -= 1.0
    slope /= len(labels)
    out: list[np.ndarray] = []
    for k in range(len(weights) - 1, -1, -1):
        out = [seen[k].T @ slope, slope.sum(axis=0), *out]
        if k:
            slope = (slope @ weights[k][0].T) * (seen[k] > 0)
    return out


def _fit(
    x: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    train: Int[np.ndarray, " t"],
    held: Int[np.ndarray, " h"],
    sizes: Sequence[int],
    config: ProbeConfig,
    generator: np.random.Generator,
) -> _Layers:
    flat: list[np.ndarray] = []
    for a, b in pairwise(sizes):
        flat += [generator.normal(size=(a, b)) * np.sqrt(2.0 / a), np.zeros(b)]
    first, second = [np.zeros_like(w) for w in flat], [np.zeros_like(w) for w in flat]
    best, least, waited, queue = _pairs(flat), np.inf, 0, train[:0]
    for step in range(1, config.steps + 1):
        if len(queue) < config.batch:  # the next pass over the rows, in another order
            queue = np.concatenate([queue, train[generator.permutation(len(train))]])
        some, queue = queue[: config.batch], queue[config.batch :]
        for w, g, m, v in zip(flat, gradients(_pairs(flat), x[some], labels[some]), first, second, strict=True):
            _adamw(w, g, m, v, step, config.lr)
        if step % config.every and step < config.steps:
            continue
        loss = _cross_entropy(_forward(_pairs(flat), x[held])[-1], labels[held])
        if loss < least:
            best, least, waited = _pairs([w.copy() for w in flat]), loss, 0
        else:
            waited += 1
        if waited >= config.patience:
            break
    return best


def _pairs(flat: list[np.ndarray]) -> _Layers:
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _adamw(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, step: int, lr: float) -> None:
    """One step of AdamW, in place (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    m += (1 - BETAS[0]) * (g - m)
    v += (1 - BETAS[1]) * (g * g - v)
    w *= 1 - lr * DECAY
    w -= lr * (m / (1 - BETAS[0] ** step)) / (np.sqrt(v / (1 - BETAS[1] ** step)) + EPS)
