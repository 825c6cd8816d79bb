"""The plain loop: the slow, obvious twin of the trainer, and the learner of planted worlds and roll-outs (ours).

It takes the same plan, weights, penalties and hooks as the trainer and gives the same losses (tested), holds its state as
a value that can be copied and put back, and costs nothing but the steps themselves.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradsift.data.batches import plan_batches
from gradsift.errors import ConfigError, DivergedError
from gradsift.seeds import key64
from gradsift.train.parts import (
    Cost,
    Penalty,
    StepHook,
    call_hook,
    forward_nats,
    make_batch,
    trainable,
    trained_weight,
    weighted_loss,
)
from gradsift.train.penalties import begin_step
from gradsift.types import TokenRow

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class LoopConfig:
    """Optimizer and schedule of the plain loop.

    Args:
        lr: peak learning rate.
        schedule: ``constant``, ``linear`` or ``cosine`` to 0 over ``total_steps``.
        warmup_steps: linear warm-up.
        total_steps: length of the schedule.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled.
        max_grad_norm: clipping; 0 for none.
        tokens_per_batch: longest row times rows of a micro-batch; None sends a step's rows through at once.
        seed: of dropout and nothing else.
    """

    lr: float
    total_steps: int
    schedule: str = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    tokens_per_batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                "there is no such schedule", where="schedule", got=self.schedule, expected=", ".join(SCHEDULES)
            )


@dataclass
class Loop:
    """A model in training; :meth:`step` moves it by one optimizer step.

    Args:
        model: its trainable parameters have ``requires_grad``.
        config: optimizer and schedule.
        pad_id: padding token.
        penalties: added to the loss.
        hook: rewrites gradients before clipping.
    """

    model: nn.Module
    config: LoopConfig
    pad_id: int
    penalties: Sequence[Penalty] = ()
    hook: StepHook | None = None
    losses: list[float] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.parameters = [p for _, p in trainable(self.model)]
        c = self.config
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )
        self.num_parameters = sum(p.numel() for p in self.model.parameters())

    def step(self, rows: Sequence[TokenRow], weights: Sequence[float] | None = None) -> float:
        """Take one optimizer step on one batch.

        Args:
            rows: its rows.
            weights: one per row; 1 by default.

        Returns:
            The weighted token-mean loss before the step, without penalties.

        Raises:
            DivergedError: the loss is not finite.
        """
        started, at = time.perf_counter(), len(self.losses)
        self.model.train()
        torch.manual_seed(key64(self.config.seed, "loop", at) % 2**63)
        begin_step(self.penalties, at)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(rows, [1.0] * len(rows) if weights is None else list(weights), at)
        if self.hook is not None:
            started += call_hook(self.hook, self.model, at)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * schedule_factor(self.config, at)
        self.optimizer.step()
        self.losses.append(loss)
        tokens = sum(row.num_tokens for row in rows)
        used = Cost.of(self.num_parameters, forward=tokens, backward=tokens)
        self.cost += used + Cost(seconds=time.perf_counter() - started)
        return loss

    def _accumulate(self, rows: Sequence[TokenRow], weights: Sequence[float], at: int) -> float:
        """Sum the gradient over micro-batches; the weighted token-mean loss of the step without penalties."""
        size, order = self.config.tokens_per_batch, range(len(rows))
        cuts = [tuple(order)]
        if size is not None:
            by_length = sorted(order, key=lambda k: (rows[k].num_tokens, rows[k].id))
            cuts = plan_batches(rows, by_length, size)
        device = self.parameters[0].device
        batches = [make_batch([rows[k] for k in cut], self.pad_id, device, [weights[k] for k in cut]) for cut in cuts]
        shares = [trained_weight(batch.labels, batch.weights) for batch in batches]
        whole = torch.stack(shares).sum()
        loss = 0.0
        for batch, share in zip(batches, shares, strict=True):
            nats, logits = forward_nats(self.model, batch, whole=bool(self.penalties))
            part = weighted_loss(nats, batch.weights, whole)
            loss += float(part.detach())
            if not math.isfinite(loss):
                raise DivergedError(
                    "the training loss is not finite",
                    where=f"step {at}",
                    got=str(loss),
                    expected="a finite number",
                    do="lower the learning rate",
                )
            for penalty in self.penalties:
                part = part + penalty(self.model, batch, logits, float(share / whole))
            part.backward()
        return loss

    def run(
        self, steps: Sequence[Sequence[str]], rows: Callable[[str], TokenRow], weights: Mapping[str, float]
    ) -> None:
        """Train on a plan.

        Args:
            steps: row ids per optimizer step.
            rows: id -> token row.
            weights: id -> weight; 1 where absent.
        """
        for ids in steps:
            self.step([rows(i) for i in ids], [weights.get(i, 1.0) for i in ids])

    def state(self) -> dict[str, Any]:
        """Copy everything that a later step depends on.

        Returns:
            Weights, optimizer state and step count; independent of the loop.
        """
        weights = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        return {"model": weights, "optimizer": copy.deepcopy(self.optimizer.state_dict()), "losses": list(self.losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state, bit for bit.

        Args:
            state: from :meth:`state`.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.losses = list(state["losses"])


def schedule_factor(config: LoopConfig, step: int) -> float:
    """Learning-rate factor of a step, as transformers' get_scheduler gives it.

    Args:
        config: schedule, warm-up and length.
        step: 0-based optimizer step.

    Returns:
        A factor in [0, 1].
    """
    if step < config.warmup_steps:
        return step / max(1, config.warmup_steps)
    progress = (step - config.warmup_steps) / max(1, config.total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return max(0.0, 1.0 - progress)
    if config.schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0
