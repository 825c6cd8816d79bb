"""Prompt losses, losses of answers alone and hidden states against their slow twin: one row alone, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import TOYS, VOCABULARY, toy_llama

from gradsift.data.prompts import prompt_mask
from gradsift.errors import ConfigError
from gradsift.gradients.collect import Pass, measure_noise, measure_shard
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.gradients.taps import Extras, alone_row, hidden_name, mean_states, start_token
from gradsift.seeds import stream
from gradsift.types import RowStatus, TokenRow

LENGTHS = [9, 5, 12, 7, 2, 12]
ALL = Extras(prompt=True, alone=True, layers=(0, 1, 2), start_id=1)


def rows_of(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for k, n in enumerate(lengths):
        ids, trained = rng.integers(4, VOCABULARY, size=n).astype(np.int32), np.arange(n) >= n // 2
        template = np.isin(np.arange(n), (1, 3)) if k % 2 else None
        rows.append(TokenRow(f"row{k}", ids, trained, n, RowStatus.OK, template=template))
    # two answers with a question between them
    two = np.array([False, False, True, True, False, False, True, False])
    return [*rows, TokenRow("two", rng.integers(4, VOCABULARY, size=8).astype(np.int32), two, 8, RowStatus.OK)]


def run_of(model, extras=ALL, *, gradients=True, tokens=64):
    names = [name for name, _ in model.named_parameters()] if gradients else []
    engine = GradientEngine(model, names, projector=Projector(7, 61) if gradients else None)
    return Pass(engine, (), tokens, 3, gradients, extras=extras)


def measured(model, rows, **options):
    run = run_of(model, **options)
    with run.engine:
        return measure_shard(run, rows)


@torch.no_grad()
def truth(oracle, row, start=1):
    """Every signal of a row by the definition, token by token, hidden states from the model's own output."""

    def nats(ids, t):
        return -float(oracle(input_ids=ids[None, :t]).logits[0, -1].log_softmax(-1)[ids[t]])

    ids = torch.from_numpy(row.input_ids).long()
    prompt = [t for t in range(1, len(ids)) if not row.trained[t] and t < np.flatnonzero(row.trained)[-1]]
    prompt = [t for t in prompt if row.template is None or not row.template[t]]
    left = torch.tensor([start, *(int(ids[t]) for t in range(1, len(ids)) if row.trained[t])])
    if len(left) == len(ids):  # nothing but the first token stands before the answer
        left = ids
    states = oracle(input_ids=ids[None], output_hidden_states=True).hidden_states
    out = {
        "prompt_loss": np.mean([nats(ids, t) for t in prompt]) if prompt else 0.0,
        "alone_loss": np.mean([nats(left, t) for t in range(1, len(left))]),
    }
    # The library's last state is behind the final norm, ours before it: it is compared elsewhere.
    return out | {hidden_name(k): states[k][0].mean(0).numpy() for k in (0, 1)}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", TOYS)
def test_every_signal_equals_its_slow_twin(kind, gradients, dtype, limit):
    model, rows = TOYS[kind](dtype=dtype), rows_of()
    got = measured(model, rows, gradients=gradients)
    oracle = copy.deepcopy(model).double()
    assert set(got.extra) == {"prompt_loss", "alone_loss", "hidden_0", "hidden_1", "hidden_2"}
    for k, row in enumerate(rows):
        for name, want in truth(oracle, row).items():
            if dtype == torch.float32 or not name.startswith("hidden"):
                assert np.abs(got.extra[name][k] - want).max() <= limit * max(1, np.abs(want).max()), (name, row.id)
            else:  # kept in float32
                assert np.abs(got.extra[name][k] - want).max() <= 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("kind", TOYS)
def test_the_last_layer_is_tapped_before_the_final_norm(kind):
    model, row = TOYS[kind](dtype=torch.float64), rows_of()[0]
    seen = []
    norm = next(m for n, m in reversed(list(model.named_modules())) if n.split(".")[-1] in ("norm", "ln_f"))
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()[0].mean(0).numpy()))
    got = measured(model, [row], gradients=False)
    handle.remove()
    assert np.allclose(got.extra["hidden_2"][0], seen[0], rtol=1e-6)


def test_the_other_signals_are_those_measured_without_them():
    model, rows = toy_llama(), rows_of()
    plain, more = measured(model, rows, extras=Extras()), measured(model, rows)
    assert plain.extra == {}
    assert np.abs(plain.loss - more.loss).max() < 1e-6  # more rows in the head's product: the same up to rounding
    assert np.abs(plain.grad_norm / more.grad_norm - 1).max() < 1e-5
    assert np.abs(plain.head_grad_norm / more.head_grad_norm - 1).max() < 1e-5
    assert np.abs(plain.sketch - more.sketch).max() < 1e-5 * np.abs(plain.sketch).max()
    untouched = measured(model, rows, extras=replace(ALL, prompt=False))
    for name in ("loss", "grad_norm", "emb_grad_norm", "head_grad_norm", "sketch"):
        assert np.array_equal(getattr(plain, name), getattr(untouched, name))


@given(
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    tokens=st.integers(1, 80),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_neither_neighbors_nor_padding_nor_order_move_a_signal(lengths, tokens, seed):
    model, rows = toy_llama(), rows_of(lengths, seed)
    together, turned = measured(model, rows, tokens=tokens), measured(model, rows[::-1], tokens=400)
    for k, row in enumerate(rows):
        alone = measured(model, [row])
        for name, array in together.extra.items():
            assert np.abs(array[k] - alone.extra[name][0]).max() < 2e-5
            assert np.abs(turned.extra[name][len(rows) - 1 - k] - alone.extra[name][0]).max() < 2e-5


def test_a_changed_answer_changes_no_prompt_loss_and_a_changed_prompt_no_answer_alone():
    model, row = toy_llama(), rows_of()[2]
    ids = row.input_ids.copy()
    other_answer = replace(row, input_ids=np.where(row.trained, (ids + 5) % VOCABULARY, ids).astype(np.int32))
    other_prompt = replace(row, input_ids=np.where(row.trained, ids, (ids + 5) % VOCABULARY).astype(np.int32))
    base, answer, prompt = (measured(model, [r]).extra for r in (row, other_answer, other_prompt))
    assert abs(base["prompt_loss"][0] - answer["prompt_loss"][0]) < 1e-6
    assert abs(base["prompt_loss"][0] - prompt["prompt_loss"][0]) > 1e-3
    assert base["alone_loss"][0] == prompt["alone_loss"][0] != answer["alone_loss"][0]


def test_the_prompt_is_what_carries_no_loss_before_the_last_answer_and_is_nobodys_template():
    two = rows_of()[-1]
    assert prompt_mask(two).tolist() == [False, True, False, False, True, True, False, False]
    masked = replace(two, template=np.arange(8) == 4)
    assert prompt_mask(masked).tolist() == [False, True, False, False, False, True, False, False]
    assert not prompt_mask(replace(two, trained=np.ones(8, dtype=bool))).any()


def test_a_row_without_a_prompt_has_prompt_loss_zero_and_is_itself_alone():
    row = replace(rows_of()[0], trained=np.ones(9, dtype=bool))
    got = measured(toy_llama(), [row])
    assert got.extra["prompt_loss"][0] == 0.0
    assert got.extra["alone_loss"][0] == got.loss[0]
    assert alone_row(row, 1) is row


def test_the_answer_alone_keeps_the_trained_tokens():
    two = rows_of()[-1]
    short = alone_row(two, 1)
    assert short.input_ids.tolist() == [1, *two.input_ids[[2, 3, 6]].tolist()]
    assert short.num_trained == two.num_trained == 3


def test_the_mean_of_real_tokens_is_the_golden_one():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [float("nan"), 0.0], [0.0, 0.0]]])
    assert mean_states(states, [2]).tolist() == [[2.0, 3.0]]  # daar.md 8: with the pads it would be (1, 1.5)


def test_a_layer_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="no such layer") as refusal:
        measured(toy_llama(), rows_of(), extras=Extras(layers=(0, 3)))
    assert refusal.value.expected == "0 to 2"


def test_a_row_whose_prompt_breaks_gets_its_own_status():
    model = toy_llama()
    model.model.embed_tokens.weight.data[7] = float("inf")
    rows = rows_of()
    bad = replace(rows[0], input_ids=np.array([9, 7, 9, 9, 9, 9, 9, 9, 9], dtype=np.int32))
    got = measured(model, [bad, *rows[1:]], gradients=False)
    assert got.status[0] is RowStatus.NONFINITE_LOSS
    assert np.isnan(got.extra["prompt_loss"][0])
    assert np.isnan(got.extra["hidden_0"][0]).all()


def test_a_row_that_does_not_fit_has_none_of_them(monkeypatch):
    run, rows = run_of(toy_llama(), gradients=False), rows_of()
    real = run.engine.forward_only

    def narrow(ids, labels, lengths, *rest):
        if ids.shape[1] >= 12:
            raise MemoryError
        return real(ids, labels, lengths, *rest)

    monkeypatch.setattr(run.engine, "forward_only", narrow)
    with run.engine:
        got = measure_shard(run, rows)
    assert [s is RowStatus.OOM_AT_1 for s in got.status] == [row.num_tokens == 12 for row in rows]
    assert np.isnan(got.extra["hidden_1"][2]).all()
    assert np.isfinite(got.extra["hidden_1"][1]).all()


def test_the_noise_bound_of_losses_covers_the_new_ones():
    model, rows = toy_llama(), rows_of()
    run = run_of(model, gradients=False)
    stored = {row.id: measured(model, [row], gradients=False) for row in rows}
    for name, off in (("prompt_loss", 0.5), ("alone_loss", 0.25)):
        wrong = {k: replace(v, extra={**v.extra, name: v.extra[name] + off}) for k, v in stored.items()}
        with run.engine:
            assert measure_noise(run, rows, wrong.__getitem__, stream(1, "noise")).loss >= 4 * off


def test_the_start_token_is_the_models_begin_else_its_end_else_padding():
    model = toy_llama()
    model.config.bos_token_id, model.config.eos_token_id = 5, [6, 7]
    assert start_token(model, 3) == 5
    model.config.bos_token_id = None
    assert start_token(model, 3) == 6
    model.config.eos_token_id = None
    assert start_token(model, 3) == 3
