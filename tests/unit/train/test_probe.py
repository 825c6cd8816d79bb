"""A probe in micro-batches is the plain loop, and its losses are those of rows measured alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.toy import toy_gpt2, toy_llama

from gradsift.errors import NumericsError
from gradsift.seeds import stream
from gradsift.train.crossfit import CrossfitConfig, plan_probes
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.probe import ProbeRun, row_losses, train_probe
from gradsift.types import RowStatus, TokenRow


def some(count, seed=0):
    rng, rows = np.random.default_rng(seed), {}
    for k in range(count):
        size = int(rng.integers(3, 14))
        trained = rng.random(size) < 0.7
        trained[-1] = True
        ids = rng.integers(4, 250, size).astype(np.int32)
        rows[f"r{k:02d}"] = TokenRow(f"r{k:02d}", ids, trained, size, RowStatus.OK)
    return rows


ROWS = some(12)
STEPS = [list(ROWS)[:5], list(ROWS)[5:10], [*list(ROWS)[8:], "r00", "r00"]]


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 10_000])
def test_micro_batches_give_the_step_of_the_plain_loop(tokens_per_batch):
    slow, fast = (toy_llama(1, torch.float64).requires_grad_(True) for _ in range(2))
    loop = Loop(slow, LoopConfig(lr=1e-3, total_steps=3, seed=7), 3)
    loop.run(STEPS, ROWS.__getitem__, {})
    losses = train_probe(fast, STEPS, ROWS, ProbeRun(1e-3, 7, 3, tokens_per_batch))
    # token_nats works in float32, so sums over other batches agree to its precision.
    assert losses == pytest.approx(loop.losses, rel=1e-6)
    for (name, a), (_, b) in zip(slow.named_parameters(), fast.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name
    assert not fast.training


def test_dropout_is_seeded_by_the_step_alone():
    runs = []
    for _ in range(2):
        torch.rand(3)  # moves the global generator
        model = toy_gpt2(1).requires_grad_(True)
        runs.append(train_probe(model, STEPS, ROWS, ProbeRun(1e-3, 7, 3, 30)))
    assert runs[0] == runs[1]
    assert runs[0] != train_probe(toy_gpt2(1).requires_grad_(True), STEPS, ROWS, ProbeRun(1e-3, 8, 3, 30))


def test_only_what_requires_a_gradient_moves():
    model = toy_llama(1)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    train_probe(model, STEPS, ROWS, ProbeRun(1e-3, 7, 3, 30))
    moved = {name for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {"lm_head.weight"}


def test_losses_are_those_of_each_row_alone_in_any_order():
    model, rows = toy_llama(2), list(ROWS.values())
    ticked = []
    run = ProbeRun(1e-3, 0, 3, 25, lambda n, tokens: ticked.append((n, tokens)))
    got = row_losses(model, rows, run)
    assert [sum(part) for part in zip(*ticked, strict=True)] == [len(rows), sum(r.num_tokens for r in rows)]
    for row, value in zip(rows, got, strict=True):
        ids = torch.tensor(row.input_ids[None].astype(np.int64))
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].double().log_softmax(-1)
        want = -logp[torch.arange(row.num_tokens - 1), ids[0, 1:]].numpy()[row.trained[1:]].mean()
        assert value == pytest.approx(want, rel=1e-5)
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(row_losses(model, [rows[k] for k in order], run), got[order])


def test_a_probe_that_diverges_is_refused_with_the_setting_to_lower():
    model = toy_llama(1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    for broken in (lambda: row_losses(model, list(ROWS.values()), ProbeRun(1e-3, 0, 3, 99)),
                   lambda: train_probe(model.requires_grad_(True), STEPS, ROWS, ProbeRun(1e-3, 0, 3, 99))):  # fmt: skip
        with pytest.raises(NumericsError, match="not finite") as refusal:
            broken()
        assert "probe.lr" in refusal.value.do


def test_plans_keep_copies_together_and_do_not_depend_on_order():
    ids = [f"i{k:02d}" for k in range(40)]
    first = {i: ids[k - k % 3] for k, i in enumerate(ids)}
    config = CrossfitConfig(num_repeats=2, num_steps=5, batch_size=4)
    plans = plan_probes(ids, first, ["g1", "g0"], config, 5)
    assert [(p.repeat, p.fold) for p in plans] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    again = plan_probes(ids[::-1], first, ["g0", "g1"], config, 5)
    for plan, other in zip(plans, again, strict=True):
        assert (plan.train, plan.steps, set(plan.test)) == (other.train, other.steps, set(other.test))
        own = [i for i in plan.train if i in first]
        assert not {first[i] for i in own} & {first[i] for i in plan.test}
        assert sorted([*own, *plan.test]) == ids
        assert len(plan.train) - len(own) == round(len(own) / 3)
        assert all(len(step) == 4 for step in plan.steps)
        side = stream(5, f"crossfit/fold/{plan.repeat}").uniform([first[i] for i in plan.test]) < 0.5
        assert set(side.tolist()) == {bool(plan.fold)}
