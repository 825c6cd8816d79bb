"""What is added to the loss to stay near the base model: KL, L2-SP and elastic weight consolidation; costs are counted.

With an adapter, distances are those of the effective weights: of a layer W + s B A the difference is s B A, so a penalty
means the same whether an adapter or every weight is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.errors import ConfigError
from gradsift.seeds import stream
from gradsift.train.parts import Cost, Penalty, TrainBatch, make_batch, supervised_nats, trainable
from gradsift.types import TokenRow


def begin_step(penalties: Sequence[Penalty], step: int) -> None:
    """Tell the penalties that care that an optimizer step begins.

    Args:
        penalties: of a run.
        step: optimizer steps taken before.
    """
    for penalty in penalties:
        begin = getattr(penalty, "begin", None)
        if begin is not None:
            begin(step)


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """List the layers that carry a LoRA adapter.

    Args:
        model: any model.

    Returns:
        Names and peft layers, in model order; empty without an adapter.
    """
    return [(n, m) for n, m in model.named_modules() if getattr(m, "lora_A", None) and getattr(m, "lora_B", None)]


def _factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """Matrices A [r, in], B [out, r] and the scale of a layer's active adapter."""
    if len(layer.active_adapters) != 1:
        raise ConfigError("a layer has several active adapters", where="penalties", do="activate one")
    name = layer.active_adapters[0]
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def weight_delta(layer: Any) -> Tensor:
    """Give what an adapter adds to its layer's weight.

    Args:
        layer: a peft LoRA layer.

    Returns:
        s B A, shaped like the base weight; differentiable in A and B.
    """
    a, b, scale = _factors(layer)
    product = b @ a * scale
    return product.T if getattr(layer, "fan_in_fan_out", False) else product


class BaseKl:
    """KL(base || model), mean nats per token, on the trained tokens of the step or of general rows.

    The direction is that of SafeGrad's alignment loss and of Li & Hoiem's distillation (arXiv 1606.09282) at temperature 1.

    Args:
        model: before training; with an adapter the base is the model without it, otherwise a frozen copy is kept.
        weight: factor.
        general: rows to measure on; None takes the step's own.
        rows_per_step: general rows per optimizer step, drawn by id for each step.
        pad_id: padding token.
        seed: seed of the draws.
    """

    name = "kl"

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        *,
        general: Sequence[TokenRow] | None = None,
        rows_per_step: int = 4,
        pad_id: int = 0,
        seed: int = 0,
    ) -> None:
        self.weight, self.general, self.rows_per_step, self.pad_id, self.seed = (
            weight, general, rows_per_step, pad_id, seed,
        )  # fmt: skip
        self.cost, self._step, self._done = Cost(), 0, False
        self._frozen = None if adapted_layers(model) else copy.deepcopy(model).eval().requires_grad_(False)
        self.num_parameters = sum(p.numel() for p in model.parameters())

    def begin(self, step: int) -> None:
        """Note the step; general rows are measured once in it, whatever its micro-batches."""
        self._step, self._done = step, False

    def __call__(self, model: nn.Module, batch: TrainBatch, logits: Float[Tensor, "B T V"], share: float) -> Tensor:
        """Return ``weight`` times the mean KL, or this micro-batch's share of it."""
        if self.general is None:
            self.cost += Cost.of(self.num_parameters, forward=batch.num_tokens)
            return self.weight * share * self._mean(model, batch, logits)
        if self._done:
            return logits.new_zeros(())
        self._done = True
        ids = [row.id for row in self.general]
        draws = stream(self.seed, f"train/kl/{self._step}").uniform(ids)
        chosen = sorted(range(len(ids)), key=lambda i: (draws[i], ids[i]))[: self.rows_per_step]
        some = make_batch([self.general[i] for i in chosen], self.pad_id, logits.device)
        self.cost += Cost.of(self.num_parameters, forward=2 * some.num_tokens, backward=some.num_tokens)
        ours = model(input_ids=some.input_ids, attention_mask=some.attention_mask, use_cache=False).logits
        return self.weight * self._mean(model, some, ours)

    def _mean(self, model: nn.Module, batch: TrainBatch, logits: Tensor) -> Tensor:
        """Weighted mean of KL over the trained tokens."""
        with torch.no_grad(), self._base(model) as base:
            theirs = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        trained = batch.labels[:, 1:] != -100
        p = torch.log_softmax(theirs[:, :-1][trained].float(), -1)
        q = torch.log_softmax(logits[:, :-1][trained].float(), -1)
        weights = batch.weights[:, None].expand(trained.shape)[trained]
        each = (p.exp() * (p - q)).sum(-1)
        return (weights * each).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    @contextmanager
    def _base(self, model: nn.Module) -> Iterator[nn.Module]:
        if self._frozen is not None:
            yield self._frozen
            return
        training = model.training
        model.eval()  # the base speaks without dropout
        adapted: Any = model
        try:
            with adapted.disable_adapter():
                yield model
        finally:
            model.train(training)


class L2Sp:
    """Half the squared distance to the starting weights: L2-SP, Li et al., arXiv 1802.01483, eq. 2.

    Args:
        model: before training; with an adapter its starting point is the base model.
        weight: factor.
    """

    name = "l2sp"

    def __init__(self, model: nn.Module, weight: float) -> None:
        self.weight, self.cost = weight, Cost()
        self._start = {} if adapted_layers(model) else {n: p.detach().clone() for n, p in trainable(model)}

    def __call__(self, model: nn.Module, batch: TrainBatch, logits: Float[Tensor, "B T V"], share: float) -> Tensor:
        """Return this micro-batch's share of ``weight / 2 |theta - theta0|^2``."""
        del batch
        total = logits.new_zeros((), dtype=torch.float32)
        for name, p in trainable(model) if self._start else ():
            total = total + (p - self._start[name]).float().square().sum()
        for _, layer in adapted_layers(model) if not self._start else ():
            a, b, scale = _factors(layer)
            a, b = a.float(), b.float()
            # |s B A|^2 = s^2 sum of (B'B) * (AA'): r x r matrices instead of the whole weight
            total = total + scale**2 * ((b.T @ b) * (a @ a.T)).sum()
        return 0.5 * self.weight * share * total


@dataclass(frozen=True)
class Fisher:
    """Diagonal of the empirical Fisher information.

    Args:
        diagonal: name -> float32, shaped like the weight, >= 0; with an adapter, weights of the adapted layers.
        num_rows: rows it is the mean over.
        cost: what it took.
    """

    diagonal: Mapping[str, Tensor]
    num_rows: int
    cost: Cost


def estimate_fisher(model: nn.Module, rows: Sequence[TokenRow], pad_id: int = 0) -> Fisher:
    """Average the squared gradients of single rows, one backward per row, at the base model.

    Kirkpatrick et al., arXiv 1612.00796, with the rows' own labels in place of sampled ones (the empirical Fisher), and
    with the gradient of a row's mean nats per trained token (ours), so that long rows do not dominate.

    Args:
        model: before training; an adapter is switched off.
        rows: general rows, each with a trained token.
        pad_id: padding token.

    Returns:
        The diagonal.
    """
    layers = adapted_layers(model)
    named = [(n, m.get_base_layer().weight) for n, m in layers] if layers else trainable(model)
    parameters = [p for _, p in named]
    asked, training = [p.requires_grad for p in parameters], model.training
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    tokens, adapted = 0, model
    try:
        model.eval()
        for p in parameters:
            p.requires_grad_(True)
        with adapted.disable_adapter() if layers else _nothing():  # pyright: ignore[reportCallIssue]
            for row in sorted(rows, key=lambda row: row.id):
                one = make_batch([row], pad_id, parameters[0].device)
                loss = supervised_nats(model, one).sum() / row.num_trained
                for total, g in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if g is not None:
                        total += g.float().square()
                tokens += row.num_tokens
    finally:
        for p, was in zip(parameters, asked, strict=True):
            p.requires_grad_(was)
        model.train(training)
    size = sum(p.numel() for p in model.parameters())
    diagonal = {n: total / len(rows) for (n, _), total in zip(named, sums, strict=True)}
    return Fisher(diagonal, len(rows), Cost.of(size, forward=tokens, backward=tokens))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Ewc:
    """Elastic weight consolidation: weight / 2 sum_i F_i (theta_i - theta0_i)^2, arXiv 1612.00796, eq. 3.

    Args:
        model: before training.
        weight: lambda.
        fisher: from :func:`estimate_fisher` on the same model.
    """

    name = "ewc"

    def __init__(self, model: nn.Module, weight: float, fisher: Fisher) -> None:
        self.weight, self.fisher, self.cost = weight, fisher.diagonal, fisher.cost
        self._start = {} if adapted_layers(model) else {n: p.detach().clone() for n, p in trainable(model)}

    def __call__(self, model: nn.Module, batch: TrainBatch, logits: Float[Tensor, "B T V"], share: float) -> Tensor:
        """Return this micro-batch's share of the penalty."""
        del batch
        total = logits.new_zeros((), dtype=torch.float32)
        for name, p in trainable(model) if self._start else ():
            total = total + (self.fisher[name] * (p - self._start[name]).float().square()).sum()
        for name, layer in adapted_layers(model) if not self._start else ():
            total = total + (self.fisher[name] * weight_delta(layer).float().square()).sum()
        return 0.5 * self.weight * share * total
