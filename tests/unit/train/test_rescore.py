"""Signals of a model in training: those of the oracle, shared by copies, and the model left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.toy import VOCABULARY, toy_gpt2, toy_llama

from gradsift.gradients.loop import example_gradient
from gradsift.models.parameters import choose_parameters
from gradsift.train.parts import Cost
from gradsift.train.rescore import RescoreConfig, rescore, restrict
from gradsift.types import SIGNALS, RowStatus, TokenRow

CONFIG = RescoreConfig(tokens_per_batch=30)


def rows_of(prefix, lengths, seed):
    rng = np.random.default_rng(seed)
    made = []
    for k, n in enumerate(lengths):
        ids = rng.integers(4, VOCABULARY, size=n).astype(np.int32)
        made.append(TokenRow(f"{prefix}{(k * 3) % 7}", ids, np.arange(n) >= n // 2, n, RowStatus.OK))
    return made


POOL, TARGET = rows_of("p", [9, 5, 12, 7, 4, 11], 0), rows_of("t", [6, 10, 3], 1)
ANCHORS = {"math": rows_of("m", [8, 5, 9], 2), "chat": rows_of("c", [7, 7], 3)}
COPY = TokenRow("p9", POOL[0].input_ids, POOL[0].trained, 9, RowStatus.OK)


def measured(model, pool=POOL, config=CONFIG, **more):
    return rescore(model, pool, ANCHORS, TARGET, config, pad_id=3, **more)


def oracle(model, rows):
    """Loss and flat gradient of each row by one ordinary backward, float64 [n, P]."""
    model = model.eval()
    names = choose_parameters(model, "all").names
    losses, flat = [], []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        labels = torch.where(torch.from_numpy(row.trained), ids, -100)
        got = example_gradient(model, names, ids, labels)
        losses.append(got.loss)
        flat.append(torch.cat([got.by_name[n].flatten() for n in names]).numpy())
    return np.array(losses), np.array(flat), names


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("toy", [toy_llama, toy_gpt2])
def test_every_signal_is_the_oracles(toy, dtype, tolerance):
    problem = measured(toy(0, dtype).train()).problem
    model = toy(0, torch.float64)
    if dtype == torch.float32:  # the same weights, rounded
        model.load_state_dict({k: v.double() for k, v in toy(0, dtype).state_dict().items()})
    rows = sorted(POOL, key=lambda row: row.id)
    loss, flat, _ = oracle(model, rows)
    assert problem.ids == tuple(row.id for row in rows)
    norm = np.linalg.norm(flat, axis=1)
    means = [oracle(model, some)[1].mean(0) for some in (*ANCHORS.values(), TARGET)]
    units = np.array([mean / np.linalg.norm(mean) for mean in means])
    assert np.abs(problem.loss - loss).max() <= tolerance * 10
    assert np.abs(problem.grad_norm / norm - 1).max() <= tolerance
    assert np.abs(problem.anchor_dot / norm[:, None] - flat @ units[:2].T / norm[:, None]).max() <= tolerance
    assert np.abs(problem.target_dot / norm - flat @ units[2] / norm).max() <= tolerance
    assert np.abs(problem.gram - units @ units.T).max() <= tolerance
    facts = (*problem.anchors, problem.target)
    assert [d.norm for d in facts] == pytest.approx([np.linalg.norm(m) for m in means], rel=tolerance)
    assert [(d.name, d.role, d.num_rows, d.num_tokens) for d in facts] == [
        ("math", "protect", 3, 22), ("chat", "protect", 2, 14), ("target", "target", 3, 19),
    ]  # fmt: skip
    assert problem.num_trained.tolist() == [row.num_trained for row in rows]
    assert problem.num_tokens.tolist() == [row.num_tokens for row in rows]
    assert (problem.num_read, problem.num_trained_read) == (6, sum(row.num_trained for row in rows))


def test_the_order_of_the_pool_changes_no_bit():
    one, other = measured(toy_llama()).problem, measured(toy_llama(), POOL[::-1]).problem
    assert one.ids == other.ids
    for name in set(SIGNALS) - {"sketch", "lexical", "embedding"}:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_copies_share_signals_and_are_measured_once():
    plain = measured(toy_llama())
    got = measured(toy_llama(), [*POOL, COPY], copy_of={"p9": "p0"})
    problem = got.problem
    assert problem.ids == (*plain.problem.ids, "p9")
    assert restrict(problem, plain.problem.ids).loss.tolist() == plain.problem.loss.tolist()
    for name in ("loss", "grad_norm", "anchor_dot", "target_dot"):
        column = getattr(problem, name)
        assert np.array_equal(column[0], column[-1])
    assert got.cost.flops == plain.cost.flops
    assert problem.num_read == 7


def test_a_copy_stands_for_a_first_copy_that_is_not_in_this_pool():
    later = TokenRow("p91", COPY.input_ids, COPY.trained, 9, RowStatus.OK)
    got = measured(toy_llama(), [*POOL[1:], later, COPY], copy_of={"p9": "p0", "p91": "p0"})
    assert got.dropped == ()
    at = {name: k for k, name in enumerate(got.problem.ids)}
    want = measured(toy_llama()).problem
    assert got.problem.loss[at["p9"]] == got.problem.loss[at["p91"]] == pytest.approx(want.loss[0], rel=1e-5)
    assert got.problem.grad_norm[at["p91"]] == pytest.approx(want.grad_norm[0], rel=1e-5)


def test_the_cost_is_both_ways_over_everything_measured():
    model = toy_llama()
    size = sum(p.numel() for p in model.parameters())
    got = measured(model).cost
    tokens = sum(row.num_tokens for rows in (POOL, TARGET, *ANCHORS.values()) for row in rows)
    assert (got.forward_tokens, got.backward_tokens, got.flops) == (tokens, tokens, 6.0 * size * tokens)
    assert got.seconds > 0
    assert Cost.of(size, forward=tokens, backward=tokens).flops == got.flops


def state(model):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return flags, modes, hooks


def test_the_model_is_left_as_it_was():
    """Weights, gradients, flags, hooks, and the mode of every module, of a model half frozen and half in eval mode."""
    model = toy_gpt2().train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    measured(model)
    assert state(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(
        (p.grad is None) != p.requires_grad and (p.grad is None or (p.grad == 1).all()) for p in model.parameters()
    )
    assert torch.equal(torch.get_rng_state(), random)


def test_also_after_a_failure():
    model = toy_llama().train()
    before = state(model)
    model.forward = None  # the engine fails on its first row, with everything frozen
    with pytest.raises(TypeError):
        measured(model)
    assert state(model) == before


def test_rows_without_a_finite_signal_are_named_and_so_are_their_copies():
    model = toy_llama()
    hot = int(POOL[2].input_ids[0])
    assert sum(hot in row.input_ids for row in (*POOL, *TARGET, *ANCHORS["math"], *ANCHORS["chat"])) == 1
    with torch.no_grad():
        model.model.embed_tokens.weight[hot] = float("nan")
    copy = TokenRow("p9", POOL[2].input_ids, POOL[2].trained, 12, RowStatus.OK)
    got = measured(model, [*POOL, copy], copy_of={"p9": POOL[2].id})
    assert got.dropped == (POOL[2].id, "p9")
    assert got.problem.ids == tuple(sorted(row.id for row in POOL if row is not POOL[2]))
    assert got.problem.num_read == 7


@pytest.mark.parametrize("keep", [(), ("p0",), ("p0", "p5", "nowhere"), ("p6", "p1", "p3")])
def test_restricting_keeps_exactly_the_rows_asked_for(keep):
    problem = measured(
        toy_llama(),
        config=RescoreConfig(tokens_per_batch=30, keep_sketch=True, sketch_dim=17),
        sources={row.id: f"from {row.id}" for row in POOL},
        lexical={row.id: float(k) for k, row in enumerate(POOL)},
    ).problem
    some = restrict(problem, keep)
    at = [k for k, name in enumerate(problem.ids) if name in keep]
    assert some.ids == tuple(problem.ids[k] for k in at)
    assert some.sources == tuple(f"from {name}" for name in some.ids)
    for name in ("num_tokens", "num_trained", *SIGNALS):
        column = getattr(problem, name)
        assert (getattr(some, name) is None) == (column is None)
        assert column is None or np.array_equal(getattr(some, name), column[at])
    assert (some.anchors, some.target, some.num_read) == (problem.anchors, problem.target, problem.num_read)
