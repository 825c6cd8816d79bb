"""Loss of every row under a model, without training it: labels shifted once, dropout off, logits only where needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradsift.data.batches import IGNORED, plan_batches
from gradsift.errors import DataError, NumericsError
from gradsift.train.parts import Cost, TrainBatch, keeps_logits, make_batch
from gradsift.types import TokenRow

# Positions turned into float32 probabilities at once: 256 x 150,000 tokens of vocabulary are 150 MB.
POSITIONS_AT_ONCE = 256
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class RowLosses:
    """What a model thinks of some rows.

    Args:
        ids: n row ids, in the order given.
        loss: float64 [n] mean nats per trained token, >= 0.
        num_trained: int64 [n] trained tokens, >= 1.
        exact: bool [n], every trained token was the likeliest one given the true tokens before it.
        cost: of measuring them.
    """

    ids: tuple[str, ...]
    loss: Float[np.ndarray, " n"]
    num_trained: Int[np.ndarray, " n"]
    exact: Bool[np.ndarray, " n"]
    cost: Cost

    @property
    def token_mean(self) -> float:
        """Mean nats per trained token over all rows, as the trainer's loss counts them."""
        return float(self.loss @ self.num_trained / self.num_trained.sum())

    @property
    def row_mean(self) -> float:
        """Mean over rows of their mean nats per trained token; short rows count as much as long ones."""
        return float(self.loss.mean())

    @property
    def exact_share(self) -> float:
        """Share of rows that are exact, in [0, 1]."""
        return float(self.exact.mean())

    def take(self, positions: Sequence[int] | Int[np.ndarray, " k"]) -> RowLosses:
        """Keep some rows; the cost stays that of the whole measurement.

        Args:
            positions: k of 0..n-1.

        Returns:
            These rows.
        """
        where = np.asarray(positions, dtype=np.int64)
        ids = tuple(self.ids[i] for i in where)
        return RowLosses(ids, self.loss[where], self.num_trained[where], self.exact[where], self.cost)


def evaluate_rows(
    model: nn.Module, rows: Sequence[TokenRow], *, pad_id: int, tokens_per_batch: int, tick: Tick | None = None
) -> RowLosses:
    """Measure the loss of every row.

    Rows are batched by (length, id), so the result does not depend on their order. Nothing of the model changes: no
    gradients, every module's training flag is put back.

    Args:
        model: a causal language model, with or without an adapter.
        rows: n rows that train at least one token each.
        pad_id: padding token.
        tokens_per_batch: longest row times rows of a micro-batch never exceed this; a longer row goes alone.
        tick: told rows and tokens after every micro-batch; what it raises stops the measurement.

    Returns:
        One loss per row, in the order given.

    Raises:
        DataError: there are no rows, or a row trains no token.
        NumericsError: a loss is not finite; the row is named.
    """
    begun = time.perf_counter()
    seen = LossSums(len(rows))
    with evaluating(model):
        num_tokens = walk(model, rows, pad_id, tokens_per_batch, seen, tick)
    cost = Cost.of(num_parameters(model), forward=num_tokens, seconds=time.perf_counter() - begun)
    return seen.losses(rows, cost)


See = Callable[[TrainBatch, Tensor, "Places", Int[np.ndarray, " S"]], None]


def walk(
    model: nn.Module, rows: Sequence[TokenRow], pad_id: int, tokens_per_batch: int, see: See, tick: Tick | None = None
) -> int:
    """Run a model over rows once and show the logits of every micro-batch.

    Args:
        model: a causal language model, in evaluation mode.
        rows: rows that train at least one token each.
        pad_id: padding token.
        tokens_per_batch: the budget of a micro-batch.
        see: called with the batch, its logits [S, V] at the trained positions, where these stand, and the number of the
            row, int64 [S], that each belongs to.
        tick: told rows and tokens after every micro-batch.

    Returns:
        Tokens that went through the model.
    """
    num_tokens = 0
    for batch, indices in batches(model, rows, pad_id, tokens_per_batch):
        logits, places = supervised_logits(model, batch)
        see(batch, logits, places, np.asarray(indices)[places.row.cpu().numpy()])
        num_tokens += batch.num_tokens
        if tick is not None:
            tick(len(indices), batch.num_tokens)
    return num_tokens


class LossSums:
    """Adds up the nats and the likeliest tokens of each row.

    Args:
        count: number of rows.
    """

    def __init__(self, count: int) -> None:
        self._nats, self._correct = np.zeros(count), np.zeros(count, dtype=np.int64)

    def __call__(
        self, batch: TrainBatch, logits: Float[Tensor, "S V"], places: Places, owner: Int[np.ndarray, " S"]
    ) -> None:
        """Add a micro-batch."""
        labels = batch.labels[places.row, places.position + 1]
        for start in range(0, len(labels), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            some = logits[part].float()
            nats = nn.functional.cross_entropy(some, labels[part], reduction="none")
            np.add.at(self._nats, owner[part], nats.double().cpu().numpy())
            np.add.at(self._correct, owner[part], (some.argmax(-1) == labels[part]).long().cpu().numpy())

    def losses(self, rows: Sequence[TokenRow], cost: Cost) -> RowLosses:
        """Turn the sums into means; a NumericsError names the first row whose loss is not finite."""
        trained = np.array([row.num_trained for row in rows], dtype=np.int64)
        loss = self._nats / trained
        require_finite(loss, rows, "loss")
        return RowLosses(tuple(row.id for row in rows), loss, trained, self._correct == trained, cost)


def batches(
    model: nn.Module, rows: Sequence[TokenRow], pad_id: int, tokens_per_batch: int
) -> Iterator[tuple[TrainBatch, tuple[int, ...]]]:
    """Walk over rows in micro-batches that depend on the set of rows alone.

    Args:
        model: tells the device.
        rows: rows that train at least one token each.
        pad_id: padding token.
        tokens_per_batch: the budget of a micro-batch.

    Yields:
        tuple[TrainBatch, tuple[int, ...]]: the micro-batch, and which rows it holds.

    Raises:
        DataError: there are no rows, or a row trains no token.
    """
    idle = next((row for row in rows if row.num_trained == 0), None)
    if not rows or idle is not None:
        raise DataError(
            "there is nothing to measure" if idle is None else "a row trains no token, so it has no loss",
            where="rows" if idle is None else f"row {idle.id}",
            got=len(rows) if idle is None else idle.status.value,
            expected="rows with at least one trained token",
            do="leave out rows that are not usable",
        )
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: (rows[i].num_tokens, rows[i].id))
    for indices in plan_batches(rows, order, tokens_per_batch):
        yield make_batch([rows[i] for i in indices], pad_id, device), indices


@dataclass(frozen=True)
class Places:
    """Where loss is carried.

    Args:
        row: int64 [S], row of the batch.
        position: int64 [S], the position that predicts; its label stands at position + 1.
    """

    row: Int[Tensor, " S"]
    position: Int[Tensor, " S"]


def supervised_logits(model: nn.Module, batch: TrainBatch) -> tuple[Float[Tensor, "S V"], Places]:
    """Run the model and keep the logits that predict a trained token; the one shift of the labels is here.

    Models that take ``logits_to_keep`` compute the LM head only at positions some row of the batch needs.

    Args:
        model: a causal language model.
        batch: rows with unshifted labels.

    Returns:
        Logits [S, V] in the model's dtype, rows of the batch in order, and where they stand.
    """
    wanted = batch.labels[:, 1:] != IGNORED
    row, position = wanted.nonzero(as_tuple=True)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if not keeps_logits(model):
        return model(**given).logits[row, position], Places(row, position)
    columns = wanted.any(0).nonzero().squeeze(1)
    logits = model(**given, logits_to_keep=columns).logits
    return logits[row, torch.searchsorted(columns, position)], Places(row, position)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and gradients out, and put every module's own training flag back afterwards.

    Args:
        model: any model.

    Yields:
        None: nothing.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def num_parameters(model: nn.Module) -> int:
    """Count the parameters a forward pass goes through, tied ones once.

    Args:
        model: any model.

    Returns:
        Their number.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def require_finite(values: Float[np.ndarray, " n"], rows: Sequence[TokenRow], what: str) -> None:
    """Refuse figures that are not finite, naming the first row.

    Args:
        values: one per row.
        rows: the rows.
        what: the figure's name.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise NumericsError(
            f"the {what} of a row is not finite",
            where=f"row {rows[bad[0]].id} and {bad.size - 1} more of {len(rows)}",
            got=str(values[bad[0]]),
            expected="a finite number",
            do="the model has diverged or its dtype is too narrow: lower the learning rate, or --set dtype=float32",
        )
