"""KL(base || tuned) per trained token: how far fine-tuning moved the model on given rows.

Forward KL from base to tuned on the new task's prompts is the best single predictor of forgetting known (RL's Razor,
arXiv 2509.04259). Here it is measured at the trained positions of the rows given, teacher-forced, over the whole
vocabulary in float32: no sampling, no estimate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradsift.errors import ConfigError, DataError, ModelError
from gradsift.evaluate.losses import (
    POSITIONS_AT_ONCE,
    LossSums,
    Places,
    RowLosses,
    Tick,
    batches,
    evaluating,
    num_parameters,
    require_finite,
    supervised_logits,
    walk,
)
from gradsift.train.parts import Cost, TrainBatch
from gradsift.types import TokenRow

MAX_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class RowDivergence:
    """How far a tuned model is from its base on some rows.

    Args:
        ids: n row ids, in the order given.
        kl: float64 [n] mean nats per trained token, >= 0 up to float32 rounding (about 1e-8).
        num_trained: int64 [n] trained tokens.
        cost: of both models' passes.
    """

    ids: tuple[str, ...]
    kl: Float[np.ndarray, " n"]
    num_trained: Int[np.ndarray, " n"]
    cost: Cost

    @property
    def token_mean(self) -> float:
        """Mean nats per trained token over all rows."""
        return float(self.kl @ self.num_trained / self.num_trained.sum())


@dataclass(frozen=True)
class BaseLogProbs:
    """Log-probabilities of the base model, kept so that it need not stay in memory.

    Args:
        by_row: float32 [S, V] on the CPU per row id, S its trained tokens.
    """

    by_row: Mapping[str, Float[Tensor, "S V"]]


def cache_base(base: nn.Module, rows: Sequence[TokenRow], *, pad_id: int, tokens_per_batch: int) -> BaseLogProbs:
    """Keep the base model's log-probabilities at every trained position.

    Args:
        base: the model before fine-tuning; an adapter on it is switched off.
        rows: rows that train at least one token each, with different ids.
        pad_id: padding token.
        tokens_per_batch: the budget of a micro-batch.

    Returns:
        The log-probabilities.

    Raises:
        ConfigError: they would take more than 4 GiB.
    """
    size = sum(row.num_trained for row in rows) * int(getattr(base.config, "vocab_size", 0)) * 4  # pyright: ignore
    if size > MAX_CACHE_BYTES:
        raise ConfigError(
            "the base model's log-probabilities are too large to keep",
            where="divergence",
            got=f"{size} bytes",
            expected=f"at most {MAX_CACHE_BYTES}",
            do="use fewer rows, or keep the base model loaded",
        )
    kept: dict[str, Tensor] = {}
    with evaluating(base), without_adapter(base):
        for batch, indices in batches(base, rows, pad_id, tokens_per_batch):
            logits, places = supervised_logits(base, batch)
            for b, i in enumerate(indices):
                kept[rows[i].id] = logits[places.row == b].float().log_softmax(-1).cpu()
    return BaseLogProbs(kept)


def kl_rows(
    tuned: nn.Module,
    rows: Sequence[TokenRow],
    *,
    base: nn.Module | BaseLogProbs | None,
    pad_id: int,
    tokens_per_batch: int,
    tick: Tick | None = None,
) -> RowDivergence:
    """Measure KL(base || tuned) on every row.

    Args:
        tuned: the model after fine-tuning.
        rows: n rows that train at least one token each.
        base: the model before; its cached log-probabilities; or None to switch the adapter of ``tuned`` off instead.
        pad_id: padding token.
        tokens_per_batch: the budget of a micro-batch.
        tick: told rows and tokens after every micro-batch.

    Returns:
        One divergence per row, in the order given.

    Raises:
        DataError: there are no rows, a row trains no token, or a row is not in the cache.
        ModelError: ``base`` is None and the adapter cannot be switched off, or both are one and the same model.
        NumericsError: a divergence is not finite.
    """
    if base is tuned:
        raise ModelError(
            "base and tuned model are the same object, so their divergence says nothing",
            where="divergence",
            do="give the base model loaded apart, or base=None for a model with an adapter",
        )
    if base is None:
        require_adapter(tuned)
    begun = time.perf_counter()
    seen = _DivergenceSums(len(rows), tuned, base)
    with evaluating(tuned), evaluating(base) if isinstance(base, nn.Module) else nullcontext():
        num_tokens = walk(tuned, rows, pad_id, tokens_per_batch, seen, tick)
    passes = [tuned] if isinstance(base, BaseLogProbs) else [tuned, tuned if base is None else base]
    cost = sum((Cost.of(num_parameters(model), forward=num_tokens) for model in passes), Cost())
    cost += Cost(seconds=time.perf_counter() - begun)
    return seen.divergence(rows, cost)


def losses_and_kl(
    tuned: nn.Module, rows: Sequence[TokenRow], *, base: BaseLogProbs, pad_id: int, tokens_per_batch: int
) -> tuple[RowLosses, RowDivergence]:
    """Measure the losses of rows and their KL from the base's cached log-probabilities in one pass.

    Args:
        tuned: the model after fine-tuning.
        rows: n rows that train at least one token each.
        base: log-probabilities of the model before.
        pad_id: padding token.
        tokens_per_batch: the budget of a micro-batch.

    Returns:
        What :func:`gradsift.evaluate.losses.evaluate_rows` and :func:`kl_rows` return; the pass is charged to the first.
    """
    begun = time.perf_counter()
    losses, divergence = LossSums(len(rows)), _DivergenceSums(len(rows), tuned, base)

    def both(batch: TrainBatch, logits: Tensor, places: Places, owner: Int[np.ndarray, " S"]) -> None:
        losses(batch, logits, places, owner)
        divergence(batch, logits, places, owner)

    with evaluating(tuned):
        num_tokens = walk(tuned, rows, pad_id, tokens_per_batch, both)
    cost = Cost.of(num_parameters(tuned), forward=num_tokens, seconds=time.perf_counter() - begun)
    return losses.losses(rows, cost), divergence.divergence(rows, Cost())


class _DivergenceSums:
    """Adds up each row's divergence from the base.

    Args:
        count: number of rows.
        tuned: the model after fine-tuning.
        base: as :func:`kl_rows` takes it.
    """

    def __init__(self, count: int, tuned: nn.Module, base: nn.Module | BaseLogProbs | None) -> None:
        self._sums, self._tuned, self._base = np.zeros(count), tuned, base

    def __call__(
        self, batch: TrainBatch, logits: Float[Tensor, "S V"], places: Places, owner: Int[np.ndarray, " S"]
    ) -> None:
        """Add a micro-batch."""
        reference = _reference(self._tuned, self._base, batch)
        for start in range(0, len(logits), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            nats = kl_nats(reference[part].to(logits.device), logits[part])
            np.add.at(self._sums, owner[part], nats.cpu().numpy())

    def divergence(self, rows: Sequence[TokenRow], cost: Cost) -> RowDivergence:
        """Turn the sums into means; a NumericsError names the first row whose divergence is not finite."""
        require_finite(self._sums, rows, "divergence")
        trained = np.array([row.num_trained for row in rows], dtype=np.int64)
        return RowDivergence(tuple(row.id for row in rows), self._sums / trained, trained, cost)


def _reference(tuned: nn.Module, base: nn.Module | BaseLogProbs | None, batch: TrainBatch) -> Float[Tensor, "S V"]:
    """Logits or log-probabilities of the base model at the trained positions of a batch."""
    if isinstance(base, BaseLogProbs):
        lost = [name for name in batch.ids if name not in base.by_row]
        if lost:
            raise DataError("a row is not in the cache of the base model", where=f"row {lost[0]}", do="cache it again")
        return torch.cat([base.by_row[name] for name in batch.ids])
    with without_adapter(tuned if base is None else base):
        return supervised_logits(tuned if base is None else base, batch)[0]


def kl_nats(base: Float[Tensor, "S V"], tuned: Float[Tensor, "S V"]) -> Float[Tensor, " S"]:
    """KL divergence of two distributions given by logits, sum p (log p - log q) written as sum (q - p + p (log p - log q)).

    The added terms sum to zero, and every exact summand is >= 0: the rounding of the two normalizers cancels to first
    order, so what is left of float32 rounding is about 1e-8 nats and not 1e-7 times the size of the logits.

    Args:
        base: logits or log-probabilities of p.
        tuned: logits of q.

    Returns:
        float64 [S] nats.
    """
    log_p, log_q = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    # A token that the base model rules out adds q alone; 0 * inf would be NaN.
    gap = torch.where(log_p.isneginf(), 0.0, log_p - log_q)
    return (q - p + p * gap).double().sum(-1)


def has_adapter(model: nn.Module) -> bool:
    """Tell whether peft has put layers of its own into a model, whatever object it is reached through.

    Args:
        model: any model.

    Returns:
        True also for the bare model inside a PeftModel: peft changes it in place.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def require_adapter(model: nn.Module) -> None:
    """Refuse a model whose adapter cannot be switched off to give the base model back.

    Args:
        model: a PeftModel.

    Raises:
        ModelError: it is none, or its adapter also trained biases, which stay when it is off.
    """
    configs = getattr(model, "peft_config", None)
    biases = sorted({str(getattr(c, "bias", "none")) for c in configs.values()}) if isinstance(configs, dict) else []
    if not hasattr(model, "disable_adapter") or set(biases) - {"none"}:
        raise ModelError(
            "the base model cannot be had by switching the adapter off",
            where=type(model).__name__,
            got=f"bias={', '.join(biases)}" if biases else "layers of an adapter without its PeftModel, or no adapter",
            expected="a PeftModel whose biases were not trained",
            do="load the base model apart, before any adapter is attached",
        )


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Compute what the base model computes; for a model without an adapter nothing is done.

    peft changes the base model in place, so the object that was loaded first computes the tuned function once an
    adapter is on it. Such an object is refused instead of measured as the base.

    Args:
        model: a plain model, or a PeftModel.

    Yields:
        None: nothing.

    Raises:
        ModelError: it holds layers of an adapter that cannot be switched off from here.
    """
    if not has_adapter(model):
        yield
        return
    require_adapter(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():  # pyright: ignore[reportCallIssue]
            yield
    finally:
        for parameter, flag in flags:  # on leaving, peft makes the adapter trainable whether it was or not
            parameter.requires_grad_(flag)
