"""The LM head at trained columns only, and steps in micro-batches: the same numbers as the long way, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lessons import lesson_rows, token_row
from tests.toy import TOYS, toy_gpt2, toy_llama, toy_lora

from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.parts import (
    Cost,
    TrainBatch,
    forward_nats,
    keeps_logits,
    make_batch,
    supervised_nats,
    token_nats,
    trainable,
)
from gradsift.train.penalties import L2Sp
from gradsift.types import TokenRow

ROWS = lesson_rows()
CPU = torch.device("cpu")
MAKES = {"llama": toy_llama, "tied": lambda *a: toy_llama(*a, tied=True), "lora": toy_lora, "gpt2": toy_gpt2}


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are taken in float32 whatever the model's dtype; here every cast to it goes to float64 instead."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def sparse_rows() -> list[TokenRow]:
    """Rows of unequal lengths that train the first predicted, the last, one or two tokens, or none."""
    draw = np.random.default_rng(1)
    spots = ([1], [8], [3, 4], [], [12], [0, 2])  # token 0 has nothing before it and never counts
    rows = []
    for n, some in enumerate(spots):
        length = 9 + 2 * n
        rows.append(token_row(f"s{n}", draw.integers(4, 250, length), np.isin(np.arange(length), some)))
    return rows


def batch_of(rows: list[TokenRow], weights: list[float] | None = None) -> TrainBatch:
    return make_batch(rows, 3, CPU, weights)


def logits_of(model: Any, batch: TrainBatch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def slow_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Token by token."""
    out = torch.zeros(labels.shape[0], labels.shape[1] - 1, dtype=torch.float64)
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                out[b, t - 1] = -torch.log_softmax(logits[b, t - 1].double(), -1)[labels[b, t]]
    return out


@pytest.mark.parametrize("rows", [sparse_rows(), list(ROWS.values())[:4]], ids=["few tokens", "most tokens"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_nats_and_gradients_are_those_of_all_logits(make: Any, rows: list[TokenRow]) -> None:
    model, batch = make(1, torch.float64), batch_of(rows)
    nats = supervised_nats(model, batch)
    assert nats.shape == (len(rows), batch.labels.shape[1] - 1)
    slow = slow_nats(logits_of(model, batch), batch.labels)
    torch.testing.assert_close(nats, slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(token_nats(logits_of(model, batch), batch.labels), slow, rtol=0, atol=1e-12)
    assert torch.equal(nats == 0, batch.labels[:, 1:] == -100)
    names, weights = zip(*trainable(model), strict=True)
    mix = torch.rand(nats.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast, twin = (torch.autograd.grad((mix * some).sum(), weights) for some in (nats, slow))
    assert max(float(g.abs().max()) for g in fast) > 1e-3
    for name, one, two in zip(names, fast, twin, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11, msg=name)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=9), min_size=1, max_size=4))
def test_any_pattern_of_trained_tokens(masks: list[list[bool]]) -> None:
    draw = np.random.default_rng(2)
    model = _LLAMA
    batch = batch_of([token_row(f"r{k}", draw.integers(4, 250, len(mask)), mask) for k, mask in enumerate(masks)])
    if not bool((batch.labels[:, 1:] != -100).any()):
        return  # nothing is trained: such rows do not reach a step
    with torch.no_grad():
        nats, slow = supervised_nats(model, batch), slow_nats(logits_of(model, batch), batch.labels)
    torch.testing.assert_close(nats, slow, rtol=0, atol=1e-12)


_LLAMA = toy_llama(1, torch.float64)


class WithoutColumns(torch.nn.Module):
    """A model whose forward knows no ``logits_to_keep``."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_a_model_that_cannot_keep_some_columns_is_asked_for_all() -> None:
    bare, batch = WithoutColumns(_LLAMA), batch_of(sparse_rows())
    assert not keeps_logits(bare)
    torch.testing.assert_close(supervised_nats(bare, batch), supervised_nats(_LLAMA, batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS)
def test_the_head_runs_at_the_trained_columns_alone(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make(1), batch_of(sparse_rows())
    assert keeps_logits(model)
    head, widths = model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    with torch.no_grad():
        supervised_nats(model, batch)
        nats, logits = forward_nats(model, batch, whole=False)
        assert logits.numel() == 0
        every, logits = forward_nats(model, batch, whole=True)
    assert logits.shape[:2] == batch.labels.shape
    columns = int((batch.labels[:, 1:] != -100).any(0).sum())
    assert widths == [columns, columns, batch.labels.shape[1]]
    assert columns < batch.labels.shape[1] / 2
    torch.testing.assert_close(nats, every, rtol=0, atol=1e-5)


WEIGHTS = [1.0, 0.5, 2.0, 0.0, 1.0, 0.25]


class Pulling:
    """A penalty of the weights and of the micro-batch's logits, so that both ways of sharing out are seen."""

    name = "pulling"

    def __init__(self) -> None:
        self.cost, self.shares, self.rows = Cost(), [], []

    def __call__(self, model: Any, batch: TrainBatch, logits: torch.Tensor, share: float) -> torch.Tensor:
        self.shares.append(share)
        self.rows.append(batch.ids)
        trained = (batch.labels[:, 1:] != -100) * batch.weights[:, None]
        mean = (logits[:, :-1].square().mean(-1) * trained).sum() / trained.sum().clamp(min=1e-9)
        return 0.1 * share * mean


def trained(make: Any, size: int | None, *, weights: Any = None, penalty: Any = None, order: int = 1) -> Loop:
    model = make(1, torch.float64).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # draws follow the shape of what they fall on, so that micro-batches draw others
    # eps is large: what Adam makes of gradients next to 0 would blow up their rounding
    config = LoopConfig(1e-2, 4, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5, tokens_per_batch=size)
    loop = Loop(model, config, 3, penalties=[penalty(model)] if penalty else ())
    rows = list(ROWS.values())
    for some in (rows[:6], rows[4:10]):
        loop.step(some[::order], None if weights is None else weights[::order])
    return loop


def assert_same(one: Loop, two: Loop, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(one.losses, two.losses, rtol=0, atol=atol)
    assert abs(one.losses[0] - one.losses[1]) > 1e-3
    start = dict(trainable(toy_llama(1, torch.float64)))
    for (name, p), (_, q) in zip(trainable(one.model), trainable(two.model), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=name)
        assert name not in start or float((p - start[name]).detach().abs().max()) > 1e-4
    assert one.cost.flops == two.cost.flops
    assert one.cost.forward_tokens == two.cost.forward_tokens


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_micro_batches_give_the_same_losses_and_weights(make: Any, weights: Any) -> None:
    whole = trained(make, None, weights=weights)
    assert_same(whole, trained(make, 25, weights=weights))
    assert_same(whole, trained(make, 1, weights=weights))  # one row at a time
    assert_same(whole, trained(make, 25, weights=weights, order=-1))


def test_weights_stay_with_their_rows_whatever_the_order_of_lengths() -> None:
    """A row of weight 0 could as well be away, and a weight is not handed to the row that takes its place by length."""
    rows = list(ROWS.values())[:6]
    kept = [row for row, weight in zip(rows, WEIGHTS, strict=True) if weight]
    losses = []
    for some, weights in ((rows, WEIGHTS), (kept, [w for w in WEIGHTS if w])):
        loop = Loop(toy_llama(1, torch.float64), LoopConfig(1e-2, 4, tokens_per_batch=30), 3)
        losses.append(loop.step(some, weights))
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)
    model, total, count = toy_llama(1, torch.float64), 0.0, 0.0
    for row, weight in zip(rows, WEIGHTS, strict=True):
        batch = batch_of([row])
        total += weight * float(slow_nats(logits_of(model, batch), batch.labels).sum().detach())
        count += weight * int(row.trained[1:].sum())
    assert losses[0] == pytest.approx(total / count, abs=1e-12)


@pytest.mark.parametrize("penalty", [lambda model: Pulling(), lambda model: L2Sp(model, 3.0)], ids=["logits", "l2sp"])
def test_penalties_of_micro_batches_add_up(penalty: Any) -> None:
    whole = trained(toy_llama, None, weights=WEIGHTS, penalty=penalty)
    small = trained(toy_llama, 25, weights=WEIGHTS, penalty=penalty)
    assert_same(whole, small, 1e-8)  # a share is a quotient of float32 weights
    bare = trained(toy_llama, None, weights=WEIGHTS)
    moved = max(float((p - q).detach().abs().max()) for p, q in zip(whole.parameters, bare.parameters, strict=True))
    assert moved > 1e-5, "the penalty does something"
    if isinstance(small.penalties[0], Pulling):
        shares, rows = small.penalties[0].shares, small.penalties[0].rows
        assert len(shares) > 4
        assert whole.penalties[0].shares == [1.0, 1.0]
        first = next(k for k in range(1, len(rows) + 1) if sum(map(len, rows[:k])) == 6)
        assert sum(shares[:first]) == pytest.approx(1.0, abs=1e-6)
        assert sum(shares[first:]) == pytest.approx(1.0, abs=1e-6)


def test_a_micro_batch_of_weight_0_changes_nothing() -> None:
    """Its penalty has share 0 and its loss adds nothing."""
    rows = list(ROWS.values())[:3]
    seen = []
    for size in (None, 1):
        loop = Loop(toy_llama(1, torch.float64), LoopConfig(1e-2, 4, tokens_per_batch=size), 3, penalties=[Pulling()])
        seen.append(loop.step(rows, [1.0, 0.0, 1.0]))
        assert all(bool(torch.isfinite(p).all()) for p in loop.parameters)
    assert seen[0] == pytest.approx(seen[1], abs=1e-12)
