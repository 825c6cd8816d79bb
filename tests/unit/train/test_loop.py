"""The plain loop: the schedule of transformers, one AdamW step written out, states that can be put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.lessons import lesson_config, lesson_plan, lesson_rows
from tests.toy import toy_gpt2, toy_llama
from transformers import get_scheduler

from gradsift.errors import NumericsError
from gradsift.train.loop import Loop, LoopConfig, schedule_factor

ROWS = lesson_rows()
PLAN = lesson_plan(ROWS)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedule_is_that_of_transformers(name: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    words = {"constant": "constant_with_warmup"}.get(name, name)
    theirs = get_scheduler(words, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    config = LoopConfig(1.0, 10, schedule=name, warmup_steps=warmup)
    for step in range(10):
        assert schedule_factor(config, step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_step_equals_the_weighted_token_mean_and_adamw_written_out() -> None:
    """The slow twin: one row at a time in float64, token by token, and the first AdamW step by its formula."""
    names, weights = list(ROWS)[:4], [1.0, 0.5, 2.0, 0.0]
    model, twin = toy_llama(1, torch.float64), toy_llama(1, torch.float64)
    config = LoopConfig(1e-3, 5, weight_decay=0.1, max_grad_norm=0.5, eps=1e-6)
    loss = Loop(model, config, 3).step([ROWS[n] for n in names], weights)
    total = torch.zeros((), dtype=torch.float64)
    count = 0.0
    for name, weight in zip(names, weights, strict=True):
        row = ROWS[name]
        logits = twin(input_ids=torch.tensor(row.input_ids[None].astype(np.int64))).logits[0]
        for t in range(1, row.num_tokens):
            if row.trained[t]:
                total = total - weight * torch.log_softmax(logits[t - 1], -1)[row.input_ids[t]]
                count += weight
    want = total / count
    assert loss == pytest.approx(float(want.detach()), abs=1e-6)
    want.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in twin.parameters()))  # type: ignore[arg-type, union-attr]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        g = q.grad * torch.clamp(0.5 / (norm + 1e-6), max=1.0)  # type: ignore[operator]
        moved = q * (1 - 1e-3 * 0.1) - 1e-3 * g / (g.abs() + 1e-6)
        torch.testing.assert_close(p, moved, rtol=0, atol=1e-6)


def test_going_back_to_a_state_gives_the_same_road_again() -> None:
    loop = Loop(toy_gpt2(1), lesson_config().loop(6), 3)
    loop.run(PLAN.steps[:2], ROWS.__getitem__, {})
    state = loop.state()
    loop.run(PLAN.steps[2:], ROWS.__getitem__, {})
    first, weights = list(loop.losses), [p.detach().clone() for p in loop.model.parameters()]
    loop.restore(state)
    assert len(loop.losses) == 2
    loop.run(PLAN.steps[2:], ROWS.__getitem__, {})
    assert loop.losses == first
    assert all(torch.equal(a, b) for a, b in zip(weights, loop.model.parameters(), strict=True))


def test_cost_counts_two_and_four_operations_per_weight_and_token() -> None:
    model = toy_llama(1)
    loop = Loop(model, LoopConfig(1e-3, 1), 3)
    rows = [ROWS["r0"], ROWS["r1"]]
    loop.step(rows)
    tokens, size = sum(row.num_tokens for row in rows), sum(p.numel() for p in model.parameters())
    assert (loop.cost.flops, loop.cost.forward_tokens, loop.cost.backward_tokens) == (6 * size * tokens, tokens, tokens)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = toy_llama(1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NumericsError, match="step 0"):
        Loop(model, LoopConfig(1e-3, 1), 3).step([ROWS["r0"]])
