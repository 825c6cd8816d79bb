"""Mean gradients of rows, their Gram matrix in a diagonal metric, and a loop's state as a value (ours)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsift.data.batches import plan_batches
from gradsift.errors import NumericsError
from gradsift.train.loop import Loop
from gradsift.train.masking import measure_nats
from gradsift.train.parts import Cost, make_batch, supervised_nats, trained_weight, weighted_loss
from gradsift.types import TokenRow

Leaves = list[Tensor]  # one gradient per trained parameter, in the loop's order
CHUNK = 1 << 22  # numbers of a parameter that are widened to float64 at once, per gradient


def domain_gradient(
    loop: Loop, rows: Sequence[TokenRow], *, clip: float = 0.0, name: str = "rows"
) -> tuple[Leaves, float, Cost]:
    """Take the gradient of the token mean loss of some rows, dropout off; model and optimizer stay as they are.

    Args:
        loop: whose parameters count, at its current weights.
        rows: at least one.
        clip: norm to clip to; 0 for none.
        name: of the domain or task, for a refusal.

    Returns:
        The gradient, the loss in nats per trained token, and what it cost.

    Raises:
        NumericsError: loss or gradient is not finite, or the gradient is zero.
    """
    started, device, training = time.perf_counter(), loop.parameters[0].device, loop.model.training
    size = loop.config.tokens_per_batch or 4096
    order = sorted(range(len(rows)), key=lambda k: (rows[k].num_tokens, rows[k].id))
    batches = [make_batch([rows[k] for k in cut], loop.pad_id, device) for cut in plan_batches(rows, order, size)]
    whole = torch.stack([trained_weight(batch.labels, batch.weights) for batch in batches]).sum()
    loop.optimizer.zero_grad(set_to_none=True)
    loop.model.eval()
    loss = 0.0
    for batch in batches:
        part = weighted_loss(supervised_nats(loop.model, batch), batch.weights, whole)
        part.backward()
        loss += float(part.detach())
    loop.model.train(training)
    leaves = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in loop.parameters]
    loop.optimizer.zero_grad(set_to_none=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in leaves))
    if not math.isfinite(loss) or not math.isfinite(norm) or norm == 0:
        raise NumericsError(
            "the mean gradient of a domain or task is zero or not finite",
            where=f"{name}, optimizer step {len(loop.losses)}",
            got=f"loss {loss:.4g}, gradient norm {norm:.4g}",
            expected="a finite loss and a gradient with a direction",
            do="lower it: --set proxy.lr=1e-4; look at these rows with gradsift inspect",
        )
    if clip and norm > clip:
        leaves = [g * (clip / norm) for g in leaves]
    tokens = sum(row.num_tokens for row in rows)
    return (
        leaves,
        loss,
        Cost.of(loop.num_parameters, forward=tokens, backward=tokens, seconds=time.perf_counter() - started),
    )


def gram_of(gradients: Sequence[Leaves], metric: Leaves | None = None) -> Float[np.ndarray, "a a"]:
    """Take all inner products g_i' diag(f) g_j in float64.

    Args:
        gradients: a gradients over the same parameters.
        metric: diagonal f >= 0 over them; 1 when None.

    Returns:
        float64 [a, a], symmetric.
    """
    out = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients[0][0].device)
    for at in range(len(gradients[0])):
        flat = [one[at].reshape(-1) for one in gradients]
        f = None if metric is None else metric[at].reshape(-1)
        for low in range(0, flat[0].numel(), CHUNK):
            part = torch.stack([g[low : low + CHUNK].double() for g in flat])
            out += part @ (part if f is None else part * f[low : low + CHUNK].double()).T
    whole = out.cpu().numpy()
    return 0.5 * (whole + whole.T)


def second_moment(loop: Loop) -> Leaves | None:
    """Read Adam's second moment, without its bias, as a Fisher diagonal.

    Args:
        loop: in training.

    Returns:
        One tensor per parameter, or None before the first step.
    """
    beta, out = loop.config.betas[1], []
    for p in loop.parameters:
        state = loop.optimizer.state.get(p)
        if not state:
            return None
        out.append(state["exp_avg_sq"] / (1 - beta ** float(state["step"])))
    return out


def token_mean(model: nn.Module, rows: Sequence[TokenRow], pad_id: int, tokens_per_batch: int) -> tuple[float, Cost]:
    """Measure the mean nats per trained token of some rows, dropout off.

    Args:
        model: in training or not.
        rows: at least one.
        pad_id: padding token.
        tokens_per_batch: longest row times rows of a forward pass.

    Returns:
        The loss and what it cost.
    """
    found = measure_nats(model, rows, pad_id, tokens_per_batch)
    total = sum(float(found.nats[row.id].sum(dtype=np.float64)) for row in rows)
    return total / sum(row.num_trained for row in rows), found.cost


@dataclass(frozen=True)
class Place:
    """What a later step depends on.

    Args:
        weights: of the trained parameters, in the loop's order.
        optimizer: its state.
        losses: of the steps so far.
    """

    weights: Leaves
    optimizer: dict[str, Any]
    losses: list[float]


def leave(loop: Loop) -> Place:
    """Copy a loop's state out.

    Args:
        loop: in training.

    Returns:
        A copy that later steps do not touch.
    """
    weights = [p.detach().clone() for p in loop.parameters]
    return Place(weights, copy.deepcopy(loop.optimizer.state_dict()), list(loop.losses))


def return_to(loop: Loop, place: Place) -> None:
    """Go back to a state, bit for bit.

    Args:
        loop: in training.
        place: from :func:`leave` on the same loop.
    """
    with torch.no_grad():
        for p, kept in zip(loop.parameters, place.weights, strict=True):
            p.copy_(kept)
    # load_state_dict keeps the tensors it is given, so the next step would write into what is kept
    loop.optimizer.load_state_dict(copy.deepcopy(place.optimizer))
    loop.losses = list(place.losses)
