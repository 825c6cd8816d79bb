"""The proxy on a model: gradients, Gram matrix, real steps, the reference, and rounds beside their slow twins."""

from __future__ import annotations

import copy
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lessons import lesson_rows, token_row
from tests.toy import toy_gpt2, toy_llama, toy_lora

from gradsift.errors import ConfigError, DataError, NumericsError
from gradsift.geometry.trajectory import Domains, Plan, State, play
from gradsift.methods.doge import Doge
from gradsift.methods.doremi import Doremi
from gradsift.seeds import stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.masking import measure_nats
from gradsift.train.parts import make_batch, trainable, weighted_loss
from gradsift.train.proxy import ModelBench
from gradsift.train.proxy_measure import domain_gradient, gram_of, leave, return_to, second_moment
from gradsift.train.proxy_rows import (
    ProxyConfig,
    ProxyRows,
    deal,
    make_loop,
    round_rows,
    split_task,
    task_rows,
    train_reference,
)

POOL = tuple(sorted(lesson_rows(14).values(), key=lambda row: row.id))
TARGET = tuple(lesson_rows(9, seed=1, prefix="t").values())
OF_ROW = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
DOMAINS = Domains(("a", "b", "c"), OF_ROW, np.bincount(OF_ROW), ("target",))
ROWS = ProxyRows(POOL, {"target": TARGET[:5]}, {"target": TARGET[5:]}, 3)
CONFIG = ProxyConfig(lr=1e-3, batch_size=4, tokens_per_batch=60)
DRAWS = stream(0, "proxy")


def loop_of(make=toy_llama, dtype=torch.float32, tokens_per_batch=None, lr=1e-3):
    return Loop(make(1, dtype), LoopConfig(lr=lr, total_steps=9, tokens_per_batch=tokens_per_batch), 3)


def slow_gradient(model, rows):
    """Token-weighted sum of every row's own gradient, one row at a time, over all trained tokens."""
    model = model.eval()
    total = sum(row.num_trained for row in rows)
    out = [torch.zeros_like(p) for _, p in trainable(model)]
    for row in rows:
        batch = make_batch([row], 3, torch.device("cpu"))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0]
        nats = torch.stack([
            torch.logsumexp(logits[t], 0) - logits[t, int(row.input_ids[t + 1])]
            for t in range(row.num_tokens - 1) if row.trained[t + 1]
        ])  # fmt: skip
        grads = torch.autograd.grad(nats.sum() / total, [p for _, p in trainable(model)], allow_unused=True)
        out = [o + (0 if g is None else g) for o, g in zip(out, grads, strict=True)]
    return out


@pytest.mark.parametrize("make", [toy_llama, toy_lora, toy_gpt2], ids=["full", "lora", "dropout"])
@pytest.mark.parametrize("size", [None, 30])
def test_the_gradient_of_a_domain_is_the_sum_over_its_rows_whatever_the_batches(make, size):
    loop = loop_of(make, torch.float64, size)
    loop.model.train()
    rows = POOL[:6]
    got, loss, cost = domain_gradient(loop, rows)
    assert loop.model.training
    assert all(p.grad is None for p in loop.parameters)
    # float32 is the least that the loss itself is taken in
    for mine, slow in zip(got, slow_gradient(copy.deepcopy(loop.model), rows), strict=True):
        torch.testing.assert_close(mine, slow, rtol=2e-4, atol=2e-6)
    nats = measure_nats(loop.model, rows, 3).nats
    assert loss == pytest.approx(
        sum(float(n.sum()) for n in nats.values()) / sum(r.num_trained for r in rows), rel=1e-5
    )
    assert cost.backward_tokens == cost.forward_tokens == sum(row.num_tokens for row in rows)


def test_a_gradient_is_clipped_to_its_norm_and_a_zero_one_refused():
    loop = loop_of()
    full, *_ = domain_gradient(loop, POOL[:3])
    short, *_ = domain_gradient(loop, POOL[:3], clip=0.01)
    norm = float(torch.cat([g.flatten() for g in full]).norm())
    assert norm > 0.01
    for a, b in zip(full, short, strict=True):
        torch.testing.assert_close(b, a * (0.01 / norm))
    for p in loop.parameters:
        p.requires_grad_(False)
    loop.parameters = [next(loop.model.parameters()).requires_grad_(True)]
    with torch.no_grad():
        loop.model.lm_head.weight.zero_()
    with pytest.raises(NumericsError, match="zero or not finite") as refusal:
        domain_gradient(loop, POOL[:2], name="b")
    assert refusal.value.where.startswith("b,")


def test_the_gram_matrix_is_that_of_the_long_vectors_in_any_metric(monkeypatch):
    loop = loop_of()
    parts = [domain_gradient(loop, [POOL[i] for i in range(len(POOL)) if OF_ROW[i] == d])[0] for d in range(3)]
    flat = np.stack([torch.cat([g.flatten() for g in one]).double().numpy() for one in parts])
    assert np.allclose(gram_of(parts), flat @ flat.T, rtol=1e-10)
    monkeypatch.setattr("gradsift.train.proxy_measure.CHUNK", 7)
    assert np.allclose(gram_of(parts), flat @ flat.T, rtol=1e-10)
    assert second_moment(loop) is None
    for _ in range(2):
        loop.step(POOL[:4])
    v = second_moment(loop)
    f = torch.cat([t.flatten() for t in v]).double().numpy()
    assert np.allclose(gram_of(parts, v), (flat * f) @ flat.T, rtol=1e-6)
    state = loop.optimizer.state[loop.parameters[0]]
    torch.testing.assert_close(v[0], state["exp_avg_sq"] / (1 - 0.999**2))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 20))
def test_dealing_goes_through_epochs_and_does_not_care_where_it_is_cut(n, first, count):
    ids = [f"r{i}" for i in range(n)]
    whole = deal(ids, 0, first + count, DRAWS)
    assert deal(ids, first, count, DRAWS) == whole[first:]
    for epoch in range(0, len(whole), n):
        part = whole[epoch : epoch + n]
        assert len(set(part)) == len(part)


def test_a_domains_rows_do_not_depend_on_the_other_domains():
    plan = Plan(3, 2, "combined", measures=("gram",))
    other = Domains(("b", "rest"), np.where(OF_ROW == 1, 0, 1), np.array([5, 9]), ("target",))
    for at in range(4):
        assert round_rows(ROWS, plan, DOMAINS, DRAWS, at)[1] == round_rows(ROWS, plan, other, DRAWS, at)[0]
    seen = [i for at in range(2) for i in round_rows(ROWS, plan, DOMAINS, DRAWS, at)[1]]
    assert len(set(seen)) == 4


def bench_of(plan, make=toy_llama, config=CONFIG, **given):
    return ModelBench(lambda: make_loop(make(1), config, plan, 3), ROWS, config, plan, DOMAINS, DRAWS, **given)


def test_a_combined_step_is_the_step_on_the_weighted_sum_of_the_gradients():
    plan = Plan(3, 4, "combined", measures=("gram",), clip=0.5)
    bench = bench_of(plan)
    weights = np.array([0.5, 0.2, 0.3])
    found = bench.probe(0, weights)
    twin = make_loop(toy_llama(1), CONFIG, plan, 3)
    lines = round_rows(ROWS, plan, DOMAINS, DRAWS, 0)
    grads = [domain_gradient(twin, [POOL[i] for i in line], clip=0.5)[0] for line in lines]
    bench.train(0, weights, weights, None)
    for i, p in enumerate(twin.parameters):
        p.grad = sum(w * g[i] for w, g in zip(weights.tolist(), grads, strict=True))
    twin.optimizer.step()
    for (_, a), b in zip(trainable(bench.loop.model), twin.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert bench.loop.losses == pytest.approx([float(weights @ found.losses)])
    assert found.lr == CONFIG.lr
    assert bench.probe(1, weights).lr == pytest.approx(CONFIG.lr * 2 / 3)  # one schedule over all rounds


def test_measured_falls_are_real_steps_and_leave_no_trace():
    plan = Plan(4, 3, "sampled", 8, ("gram", "fisher"), test_every=2)
    bench = bench_of(plan)
    bench.loop.step(POOL[:4])  # so that Adam has moments
    before = leave(bench.loop)
    found = bench.probe(0, np.full(3, 1 / 3))
    after = leave(bench.loop)
    assert all(torch.equal(a, b) for a, b in zip(before.weights, after.weights, strict=True))
    for k, state in before.optimizer["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(after.optimizer["state"][k][n])) for n, v in state.items()
        )
    assert before.losses == after.losses
    for d, line in enumerate(round_rows(ROWS, plan, DOMAINS, DRAWS, 0)):
        bench.loop.step([POOL[i] for i in line])
        drop = found.task_losses - bench._task_losses()
        assert drop == pytest.approx(found.drops[d], abs=1e-12)
        return_to(bench.loop, before)
    assert found.fisher.shape == found.gram.shape == (4, 4)
    assert np.abs(found.drops).max() > 0


def test_without_a_test_nothing_is_stepped_and_tokens_are_counted():
    plan = Plan(2, 2, "sampled", 8, ("gram",))
    started, bench = time.perf_counter(), bench_of(plan)
    found = bench.probe(0, np.full(3, 1 / 3))
    assert found.drops is None
    assert bench.loop.losses == []
    lines = round_rows(ROWS, plan, DOMAINS, DRAWS, 0)
    tokens = sum(POOL[i].num_tokens for line in lines for i in line) + sum(
        r.num_tokens for r in bench._task_rows("target", 0)
    )
    held = sum(r.num_tokens for r in ROWS.held["target"])
    assert bench.cost["probe"].backward_tokens == tokens
    assert bench.cost["probe"].forward_tokens == tokens + held
    assert 0 < bench.cost["probe"].seconds <= time.perf_counter() - started  # nothing is timed twice
    bench.train(0, np.full(3, 1 / 3), np.full(3, 1 / 3), np.array([4, 2, 2]))
    assert len(bench.loop.losses) == 2  # two steps of four rows
    assert bench.cost["train"].backward_tokens > 0


def test_task_losses_are_token_means_of_rows_that_give_no_gradient():
    plan = Plan(2, 9, "sampled", 8, ("gram",))
    bench = bench_of(plan)
    found = bench.probe(0, np.full(3, 1 / 3)).task_losses
    nats = measure_nats(toy_llama(1), ROWS.held["target"], 3).nats
    slow = sum(float(n.sum()) for n in nats.values()) / sum(r.num_trained for r in ROWS.held["target"])
    assert found == pytest.approx([slow], rel=1e-6)
    assert {r.id for r in bench._task_rows("target", 0)} == {r.id for r in ROWS.probes["target"]}


DRO = Plan(4, 3, "weighted", measures=("excess",))
NO_TASK = Domains(DOMAINS.names, OF_ROW, DOMAINS.sizes)


def test_cached_reference_losses_equal_those_of_the_reference_itself():
    loop = make_loop(toy_llama(1), CONFIG, DRO, 3)
    found = train_reference(loop, ROWS, DRO, NO_TASK, DRAWS)
    assert len(loop.losses) == DRO.num_rounds
    for at in range(DRO.num_rounds):
        for line in round_rows(ROWS, DRO, NO_TASK, DRAWS, at):
            for i in line:
                now = measure_nats(loop.model, [POOL[i]], 3).nats[POOL[i].id]
                assert np.abs(found.nats[POOL[i].id] - now).max() < 1e-4
    assert found.cost.backward_tokens > 0


def test_excess_is_clipped_per_token_and_the_step_uses_the_weights_of_the_round_before():
    reference = train_reference(make_loop(toy_llama(2), CONFIG, DRO, 3), ROWS, DRO, NO_TASK, DRAWS)
    bench = ModelBench(
        lambda: make_loop(toy_llama(1), CONFIG, DRO, 3), ROWS, CONFIG, DRO, NO_TASK, DRAWS, reference=reference
    )
    found = bench.probe(0, np.full(3, 1 / 3))
    lines = round_rows(ROWS, DRO, NO_TASK, DRAWS, 0)
    for d, line in enumerate(lines):
        pairs = [
            (float(mine), float(ref))
            for i in line
            for t, (mine, ref) in enumerate(zip(measure_nats(toy_llama(1), [POOL[i]], 3).nats[POOL[i].id], reference.nats[POOL[i].id], strict=True))
            if POOL[i].trained[t + 1]
        ]  # fmt: skip
        assert found.excess[d] == pytest.approx(np.mean([max(0.0, a - b) for a, b in pairs]), rel=1e-4)
        assert found.positive[d] == pytest.approx(np.mean([a > b for a, b in pairs]))
    before, after = np.array([0.52, 0.28, 0.2]), np.array([0.9, 0.05, 0.05])
    twin = make_loop(toy_llama(1), CONFIG, DRO, 3)
    per_row = [3 * before[d] for d, line in enumerate(lines) for _ in line]
    twin.step([POOL[i] for line in lines for i in line], per_row)
    bench.train(0, after, before, None)
    for (_, a), b in zip(trainable(bench.loop.model), twin.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_doremis_golden_weighted_loss():
    nats = torch.tensor([[2.0, 3, 1], [1.5, 1.5, 0]], dtype=torch.float64)
    weights = torch.tensor([0.52 / 0.5, 0.48 / 0.5], dtype=torch.float64)
    total = float(weights @ torch.tensor([3.0, 2], dtype=torch.float64))
    assert float(weighted_loss(nats.float(), weights.float(), total)) == pytest.approx(1.809524, abs=1e-6)
    plain = float(weighted_loss(nats.float(), torch.ones(2), 5.0))
    assert plain == pytest.approx(9 / 5)  # a = s: the plain mean


@pytest.mark.parametrize("rule", [Doremi(num_rounds=3), Doge(num_rounds=3)], ids=["doremi", "doge"])
def test_micro_batches_change_nothing(rule):
    found = []
    for size in (30, 10**6):
        config = ProxyConfig(lr=1e-3, tokens_per_batch=size)
        weighted = isinstance(rule, Doremi)
        plan = Plan(3, 3, "weighted" if weighted else "combined", measures=("excess",) if weighted else ("gram",))
        domains = NO_TASK if weighted else DOMAINS

        def make(config=config, plan=plan):
            return make_loop(toy_llama(1, torch.float64), config, plan, 3)

        reference = train_reference(make(), ROWS, plan, domains, DRAWS) if weighted else None
        bench = ModelBench(make, ROWS, config, plan, domains, DRAWS, reference=reference)
        found.append(play(rule, plan, domains, bench).weights)
    # token losses are kept in float32
    assert np.abs(found[0] - found[1]).max() < 1e-6
    assert np.abs(found[0] - 1 / 3).max() > 1e-6


class Fixed:
    """A rule without opinion."""

    def start(self, domains):
        return State(np.full(len(domains.names), 1 / len(domains.names)), np.zeros(len(domains.names)))

    def step(self, state, feedback):
        return state


def test_sampled_rounds_go_on_where_a_domain_stopped():
    plan = Plan(3, 2, "sampled", 6, ("gram",), max_epochs=3)
    seen, bench = [], bench_of(plan)
    real = bench.loop.step
    bench.loop.step = lambda rows: (seen.append([row.id for row in rows]), real(rows))[1]
    done = play(Fixed(), plan, DOMAINS, bench)
    for d in range(3):
        mine = {POOL[i].id for i in np.flatnonzero(d == OF_ROW)}
        rows = Counter(i for step in seen for i in step if i in mine)
        assert rows.total() == sum(r.counts[d] for r in done.rounds)
        assert max(rows.values()) - min(rows[i] for i in mine) <= 1  # no row twice before every row once
    assert max(len(step) for step in seen) <= 4


def test_a_tasks_rows_are_parted_by_content_and_tasks_share_none():
    copies = [*TARGET, token_row("copy", TARGET[0].input_ids, TARGET[0].trained)]
    probes, held = split_task("target", copies, 0.5, 200, DRAWS)
    assert len(probes) + len(held) == len(TARGET)
    assert not {r.id for r in probes} & {r.id for r in held}
    assert split_task("target", copies[::-1], 0.5, 200, DRAWS) == (probes, held)
    assert len(split_task("target", copies, 0.5, 2, DRAWS)[1]) == 2
    with pytest.raises(ConfigError, match="too few rows"):
        split_task("target", copies[:3], 0.5, 200, DRAWS)
    with pytest.raises(DataError, match="share rows"):
        task_rows({"target": TARGET, "math": (*POOL[:4], copies[-1])}, 0.5, 200, DRAWS)


def test_on_a_toy_model_the_domain_of_the_targets_kind_gains_and_another_loses():
    rng = np.random.default_rng(5)

    def kind(prefix, answer, count):
        out = []
        for n in range(count):
            ids = [*rng.integers(4, 250, 6).tolist(), *answer]
            out.append(token_row(f"{prefix}{n:02d}", ids, [False] * 6 + [True] * len(answer)))
        return tuple(out)

    rows = (*kind("a", (50, 60, 70), 12), *kind("b", (90, 15, 33), 12), *kind("c", (50, 60, 70), 12))
    pool, target = rows[:36], kind("t", (50, 60, 70), 10)
    of_row = np.repeat([0, 1, 2], 12)
    domains = Domains(("a", "b", "c"), of_row, np.bincount(of_row), ("target",))
    config, plan = ProxyConfig(lr=2e-3, tokens_per_batch=600), Plan(30, 6, "combined", measures=("gram",), clip=1.0)
    bench = ModelBench(
        lambda: make_loop(toy_llama(1), config, plan, 3),
        ProxyRows(pool, {"target": target[:5]}, {"target": target[5:]}, 3), config, plan, domains, DRAWS,
    )  # fmt: skip
    found = play(Doge(), plan, domains, bench)
    last = found.weights[-1]
    assert last[1] < 0.2
    assert last[0] + last[2] > 0.7
    assert found.task_losses[0] < found.rounds[0].feedback.task_losses[0]
