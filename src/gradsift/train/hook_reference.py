"""Reference gradients of protected sources at the current weights, measured in the middle of training without a trace.

The pass runs with dropout off and through ``torch.autograd.grad``: weights, ``.grad``, training flags and torch's generator
are left as they were. A source's gradient is that of the mean over rows of each row's mean loss per trained token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.data.batches import IGNORED, plan_batches
from gradsift.errors import ConfigError, DataError
from gradsift.seeds import stream
from gradsift.train.parts import Cost, TrainBatch, make_batch, supervised_nats, trainable, weighted_loss
from gradsift.types import TokenRow

# Nats (or any other quantity to be averaged) at every predicted token of a batch.
PerToken = Callable[[nn.Module, TrainBatch], Float[Tensor, "B S"]]


@dataclass(frozen=True)
class Sources:
    """Rows of what must not be lost, and how they are drawn.

    Args:
        rows: per source, its fixed rows in id order.
        num_reference: rows drawn from each source at a refresh.
        tokens_per_batch: longest row times rows of a micro-batch.
        pad_id: padding token.
        seed: of the draws.
    """

    rows: Mapping[str, tuple[TokenRow, ...]]
    num_reference: int
    tokens_per_batch: int
    pad_id: int
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources, in the given order."""
        return tuple(self.rows)

    def draw(self, source: str, step: int) -> tuple[TokenRow, ...]:
        """Draw a source's reference rows; keyed by (seed, source, step, id), so a resumed run draws the same.

        Args:
            source: its name.
            step: optimizer step of the refresh.

        Returns:
            Rows in id order; all of them where there are not more than ``num_reference``.
        """
        return _draw(self.rows[source], self.num_reference, self.seed, f"hook/{source}/{step}")


def fix_sources(
    sources: Mapping[str, Sequence[TokenRow]], *, num_pool: int, forbidden_ids: frozenset[str], **how: Any
) -> Sources:
    """Check the rows of every source and fix ``num_pool`` of them for the run.

    Args:
        sources: rows by source name.
        num_pool: rows kept per source.
        forbidden_ids: ids of development and test rows, which must not be protected.
        **how: the other fields of :class:`Sources`.

    Returns:
        The sources.

    Raises:
        ConfigError: there is no source.
        DataError: a source is empty, holds a row without a trained token, or a row that is used for evaluation.
    """
    if not sources:
        raise ConfigError(
            "a step hook needs reference rows", where="sources", got="none", do="give at least one protected source"
        )
    fixed = {}
    for name, rows in sources.items():
        leaked = sorted(row.id for row in rows if row.id in forbidden_ids)
        if leaked:
            raise DataError(
                "a step hook would protect with the evaluation set",
                where=f"source {name}",
                got=f"{len(leaked)} rows of the development or test set, the first is {leaked[0]}",
                expected="rows of the training split",
                do="take the reference rows from another split",
            )
        empty = sorted(row.id for row in rows if row.num_trained == 0)
        if empty or not rows:
            raise DataError(
                "a source of a step hook has unusable rows",
                where=f"source {name}",
                got=f"{len(empty)} of {len(rows)} rows without a trained token{f', first {empty[0]}' if empty else ''}",
                expected="at least one row, and a trained token in each",
                do="give eligible rows only",
            )
        fixed[name] = _draw(tuple(rows), num_pool, how["seed"], f"hook/{name}/pool")
    return Sources(rows=fixed, **how)


def _draw(rows: Sequence[TokenRow], count: int, seed: int, name: str) -> tuple[TokenRow, ...]:
    ids = np.array([row.id for row in rows])
    order = np.lexsort((ids, stream(seed, name).uniform(list(ids))))[:count]
    return tuple(sorted((rows[i] for i in order), key=lambda row: row.id))


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Switch dropout off with gradients on and autocast off, and put every module's flag back afterwards.

    Args:
        model: the model in training.

    Yields:
        None: nothing.
    """
    flags = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def loss_nats(model: nn.Module, batch: TrainBatch) -> Float[Tensor, "B S"]:
    """Cross-entropy of every trained token: the reference of all hooks but SafeGrad.

    Args:
        model: the model in training.
        batch: reference rows.

    Returns:
        Nats, 0 where a token carries no loss.
    """
    return supervised_nats(model, batch)


@dataclass
class BaseKL:
    """KL(p_0 || p) to the original model at every trained token (SafeGrad, arXiv 2508.07172, abstract).

    Args:
        original: a frozen copy of the original model; None where the model is a peft adapter that can be switched off.
        distance: mean total variation between p_0 and p over the positions seen since :meth:`reset`.
    """

    original: nn.Module | None
    distance: float = 0.0
    num_positions: int = 0

    def reset(self) -> None:
        """Start a new mean."""
        self.distance, self.num_positions = 0.0, 0

    def __call__(self, model: nn.Module, batch: TrainBatch) -> Float[Tensor, "B S"]:
        """Return nats per predicted token, 0 where a token carries no loss."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        trained = batch.labels[:, 1:] != IGNORED
        with torch.no_grad(), _original(model, self.original) as other:
            base = other(**inputs).logits[:, :-1][trained].float().log_softmax(-1)
        now = model(**inputs).logits[:, :-1][trained].float().log_softmax(-1)
        apart = 0.5 * (now.detach().exp() - base.exp()).abs().sum(-1)
        total = self.distance * self.num_positions + float(apart.sum())
        self.num_positions += len(apart)
        self.distance = total / self.num_positions
        divergence = torch.nn.functional.kl_div(now, base, reduction="none", log_target=True).sum(-1)
        return torch.zeros(trained.shape, device=now.device).masked_scatter(trained, divergence)


@contextmanager
def _original(model: nn.Module, frozen: nn.Module | None) -> Iterator[nn.Module]:
    """The original model: the frozen copy, or the model with its adapter switched off."""
    if frozen is not None:
        yield frozen
        return
    flags = [(p, p.requires_grad) for p in model.parameters()]
    with model.disable_adapter():  # pyright: ignore[reportCallIssue] - a peft model
        yield model
    for parameter, flag in flags:  # peft switches requires_grad with the adapter, and on for all of it
        parameter.requires_grad_(flag)


def mean_gradient(
    model: nn.Module, rows: Sequence[TokenRow], sources: Sources, per_token: PerToken = loss_nats
) -> Float[Tensor, " P"]:
    """Gradient of the mean over rows of the row's mean nats per trained token.

    Args:
        model: the model in training; see :func:`quiet`.
        rows: reference rows.
        sources: padding and micro-batches.
        per_token: the quantity to differentiate.

    Returns:
        Flat gradient over the trainable parameters in model order, float32 (float64 for float64 weights); zeros where
        the loss does not reach.
    """
    parameters = [p for _, p in trainable(model)]
    flat = flat_gradient(parameters, [None] * len(parameters))
    order = sorted(range(len(rows)), key=lambda i: (rows[i].num_tokens, rows[i].id))
    with quiet(model):
        for indices in plan_batches(rows, order, sources.tokens_per_batch):
            some = [rows[i] for i in indices]
            batch = make_batch(some, sources.pad_id, flat.device, [1.0 / row.num_trained for row in some])
            loss = weighted_loss(per_token(model, batch), batch.weights, float(len(rows)))
            flat_gradient(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), into=flat)
    return agree(flat)


def agree(values: Tensor) -> Tensor:
    """Make a reference the same bits on every process, so that no process branches alone.

    Every process measures the same rows, and rounding may still differ.

    Args:
        values: what this process measured; changed in place.

    Returns:
        The mean over processes; the values themselves in a single process.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def flat_gradient(
    parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None], into: Float[Tensor, " P"] | None = None
) -> Float[Tensor, " P"]:
    """Lay gradients side by side in one fixed order; a missing one counts as zeros.

    Args:
        parameters: the trainable parameters in model order.
        grads: their gradients.
        into: a vector to add to, in place; a new one of zeros by default.

    Returns:
        float32 [P], float64 for float64 weights.
    """
    kind = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    size = sum(p.numel() for p in parameters)
    flat = torch.zeros(size, dtype=kind, device=parameters[0].device) if into is None else into
    at = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            flat[at : at + parameter.numel()] += grad.reshape(-1).to(flat)
        at += parameter.numel()
    return flat


def reference_cost(model: nn.Module, rows: Sequence[TokenRow], *, forwards: int = 1, backwards: int = 1) -> Cost:
    """Count the passes over some reference rows.

    Args:
        model: the model.
        rows: the rows.
        forwards: times each row is sent forward.
        backwards: times it is sent backward.

    Returns:
        The cost, without seconds.
    """
    tokens = sum(row.num_tokens for row in rows)
    size = sum(p.numel() for p in model.parameters())
    return Cost.of(size, forward=forwards * tokens, backward=backwards * tokens)
