"""One probe: a short training in micro-batches, and the loss of rows under what came out (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import nn

from gradsift.data.batches import plan_batches
from gradsift.errors import NumericsError
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.masking import measure_nats
from gradsift.types import TokenRow


@dataclass(frozen=True)
class ProbeRun:
    """How probes run.

    Args:
        lr: AdamW learning rate.
        seed: of dropout.
        pad_id: padding token.
        tokens_per_batch: longest row times rows of a micro-batch.
        tick: called after every step, and every micro-batch of judging, with rows and tokens done; raises to stop the run.
    """

    lr: float
    seed: int
    pad_id: int
    tokens_per_batch: int
    tick: Callable[[int, int], None] = lambda rows, tokens: None


def train_probe(
    model: nn.Module, steps: Sequence[Sequence[str]], rows: Mapping[str, TokenRow], run: ProbeRun
) -> tuple[float, ...]:
    """Train a model in place; parameters with ``requires_grad`` move.

    Args:
        model: at its starting weights.
        steps: row ids per optimizer step.
        rows: id -> token row.
        run: learning rate, seed and micro-batches.

    Returns:
        Token-mean loss of each step, before it.
    """
    config = LoopConfig(lr=run.lr, total_steps=len(steps), seed=run.seed, tokens_per_batch=run.tokens_per_batch)
    loop = Loop(model, config, run.pad_id)
    for ids in steps:
        some = [rows[i] for i in ids]
        try:
            loop.step(some)
        except NumericsError as error:
            raise NumericsError(
                "the training loss of a probe is not finite", where=error.where, got=error.got,
                expected="a finite number", do="lower it: --set probe.lr=1e-4",
            ) from None  # fmt: skip
        run.tick(len(some), sum(row.num_tokens for row in some))
    model.eval()
    return tuple(loop.losses)


def row_losses(model: nn.Module, rows: Sequence[TokenRow], run: ProbeRun) -> Float[np.ndarray, " n"]:
    """Measure rows by one forward, dropout off, in batches of like length that do not depend on the rows' order.

    Args:
        model: a trained probe.
        rows: n rows of unique ids.
        run: micro-batches.

    Returns:
        float64 [n] mean nats per trained token, in the order given.

    Raises:
        NumericsError: a loss is not finite; the row is named.
    """
    order = sorted(range(len(rows)), key=lambda k: (rows[k].num_tokens, rows[k].id))
    out = np.empty(len(rows))
    for cut in plan_batches(rows, order, run.tokens_per_batch):
        some = [rows[k] for k in cut]
        try:
            nats = measure_nats(model, some, run.pad_id, run.tokens_per_batch).nats
        except NumericsError as error:
            raise NumericsError(
                "the loss of a row under a probe is not finite", where=error.where, expected="a finite number",
                do="lower it: --set probe.lr=1e-4",
            ) from None  # fmt: skip
        for k in cut:
            out[k] = float(nats[rows[k].id].sum()) / rows[k].num_trained
        run.tick(len(some), sum(row.num_tokens for row in some))
    return out
