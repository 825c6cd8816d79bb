"""One probe: a short training in micro-batches, and the loss of rows under what came out (ours).

The step is that of :class:`gradsift.train.loop.Loop` with the gradient summed over micro-batches, so that long rows fit into
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from gradsift.data.batches import plan_batches
from gradsift.errors import NumericsError
from gradsift.seeds import key64
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.masking import measure_nats
from gradsift.train.parts import make_batch, token_nats, weighted_loss
from gradsift.types import TokenRow


@dataclass(frozen=True)
class ProbeRun:
    """How probes run.

    Args:
        lr: AdamW learning rate.
        seed: of dropout.
        pad_id: padding token.
        tokens_per_batch: longest row times rows of a micro-batch.
        tick: called after every micro-batch with rows and tokens done; raises to stop the run.
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
    loop = Loop(model, LoopConfig(lr=run.lr, total_steps=len(steps), seed=run.seed), run.pad_id)
    for ids in steps:
        _step(loop, [rows[i] for i in ids], run)
    model.eval()
    return tuple(loop.losses)


def _step(loop: Loop, rows: Sequence[TokenRow], run: ProbeRun) -> None:
    """Take one optimizer step: the twin of ``Loop.step`` in micro-batches, without weights, penalties and hooks."""
    at, device = len(loop.losses), loop.parameters[0].device
    loop.model.train()
    torch.manual_seed(key64(run.seed, "loop", at) % 2**63)
    order = sorted(range(len(rows)), key=lambda k: (rows[k].num_tokens, rows[k].id))
    total, loss = sum(row.num_trained for row in rows), 0.0
    loop.optimizer.zero_grad(set_to_none=True)
    for cut in plan_batches(rows, order, run.tokens_per_batch):
        batch = make_batch([rows[k] for k in cut], run.pad_id, device)
        logits = loop.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        part = weighted_loss(token_nats(logits, batch.labels), batch.labels, batch.weights, total)
        part.backward()
        loss += float(part.detach())
        run.tick(len(cut), batch.num_tokens)
    if not np.isfinite(loss):
        raise NumericsError(
            "the training loss of a probe is not finite",
            where=f"step {at}",
            got=str(loss),
            expected="a finite number",
            do="lower it: --set probe.lr=1e-4",
        )
    torch.nn.utils.clip_grad_norm_(loop.parameters, loop.config.max_grad_norm)
    loop.optimizer.step()
    loop.losses.append(loss)


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
