"""Losses against the slow twin, and the two published bugs as planted defects (peft#2925, peft#3419)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from eval_toys import slow_loss, token_rows, train_a_little
from tests.toy import TOYS, toy_gpt2, toy_llama

from gradsift.errors import DataError, ModelError, NumericsError
from gradsift.evaluate import losses
from gradsift.evaluate.losses import evaluate_rows, supervised_logits
from gradsift.evaluate.phases import How, RowSet, Sets, evaluate_model, measure_pair
from gradsift.models.adapter import attach_lora
from gradsift.recipe import LoraConfig
from gradsift.train.parts import make_batch

HOW = How(pad_id=3, tokens_per_batch=64)


def measure(model, rows, tokens_per_batch=64):
    return evaluate_rows(model, rows, pad_id=3, tokens_per_batch=tokens_per_batch)


@pytest.mark.parametrize("family", TOYS)
def test_losses_equal_the_slow_twin(family):
    model = TOYS[family](seed=1, dtype=torch.float64)
    rows = [*token_rows(9, 0), *(replace(r, id=f"x{r.id}") for r in token_rows(3, 1, first_trained=True))]
    got = measure(model, rows)
    expected = [slow_loss(model, row) for row in rows]
    # Probabilities are float32, sums float64.
    np.testing.assert_allclose(got.loss, [loss for loss, _ in expected], rtol=2e-6)
    assert got.ids == tuple(row.id for row in rows)
    assert got.exact.tolist() == [exact for _, exact in expected]
    assert got.num_trained.tolist() == [int(row.trained[1:].sum()) for row in rows]
    assert got.loss.dtype == np.float64


def test_token_mean_weights_by_tokens_and_row_mean_does_not():
    got = measure(toy_llama(1), token_rows(7, 3))
    total = sum(loss * n for loss, n in zip(got.loss, got.num_trained, strict=True))
    assert got.token_mean == pytest.approx(total / sum(got.num_trained), rel=1e-12)
    assert got.row_mean == pytest.approx(sum(got.loss) / 7, rel=1e-12)
    assert got.token_mean != pytest.approx(got.row_mean, rel=1e-6)


def test_the_models_own_loss_is_the_token_mean():
    model, rows = toy_llama(1), token_rows(6, 4)
    batch = make_batch(rows, 3, torch.device("cpu"))
    with torch.no_grad():
        own = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert measure(model, rows).token_mean == pytest.approx(float(own), rel=1e-5)


def test_neither_the_order_nor_the_batches_matter():
    model, rows = toy_llama(2), token_rows(12, 5)
    got = measure(model, rows)
    backwards = measure(model, rows[::-1])
    assert np.array_equal(got.loss, backwards.loss[::-1])
    alone = measure(model, rows, tokens_per_batch=1)
    np.testing.assert_allclose(got.loss, alone.loss, atol=2e-6)
    assert got.cost.forward_tokens == sum(row.num_tokens for row in rows)
    assert got.cost.flops == 2 * sum(p.numel() for p in model.parameters()) * got.cost.forward_tokens


def test_exact_rows_are_found():
    model, rows = toy_llama(1), token_rows(8, 6)
    with torch.no_grad():
        for i in (1, 4):  # write what the model would say, token after token
            ids = rows[i].input_ids.copy()
            for t in range(1, len(ids)):
                ids[t] = int(model(input_ids=torch.tensor(ids[None, :t].astype(np.int64))).logits[0, -1].argmax())
            rows[i] = replace(rows[i], input_ids=ids)
    got = measure(model, rows)
    assert got.exact[[1, 4]].all()
    assert got.exact_share == got.exact.sum() / 8
    broken = rows[1].input_ids.copy()
    broken[-1] = (broken[-1] + 1) % 256
    assert not measure(model, [replace(rows[1], input_ids=broken)]).exact[0]


def test_logits_are_only_made_where_a_row_needs_them():
    model, rows = toy_llama(1), token_rows(3, 7)
    rows = [replace(r, trained=np.arange(r.num_tokens) == r.num_tokens - 1) for r in rows]
    seen = []
    model.lm_head.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
    batch = make_batch(rows, 3, torch.device("cpu"))
    logits, places = supervised_logits(model, batch)
    assert seen == [len({r.num_tokens for r in rows})]
    full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(logits, full[places.row, places.position], rtol=0, atol=1e-6)


def test_dropout_is_off_and_every_flag_is_put_back():
    model, rows = toy_gpt2(1), token_rows(6, 8)
    model.train()
    model.transformer.h[0].eval()  # a part that somebody froze
    flags = [module.training for module in model.modules()]
    first, second = measure(model, rows), measure(model, rows)
    assert np.array_equal(first.loss, second.loss)
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="stop"):
        evaluate_rows(
            model, rows, pad_id=3, tokens_per_batch=9, tick=lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
        )
    assert [module.training for module in model.modules()] == flags


def test_rows_that_cannot_be_measured_are_refused_by_name():
    model, rows = toy_llama(1), token_rows(4, 9)
    with pytest.raises(DataError, match="nothing to measure"):
        measure(model, [])
    with pytest.raises(DataError, match="row2"):
        measure(model, [*rows[:2], replace(rows[2], trained=np.zeros(rows[2].num_tokens, bool))])
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(NumericsError, match="row0"):
        measure(model, rows)


# peft#2925: labels that are not shifted. The mutant reads the token itself at its own position.


def unshifted(model, batch):
    wanted = batch.labels != -100
    row, position = wanted.nonzero(as_tuple=True)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[row, position], losses.Places(row, position - 1)


def test_labels_that_are_not_shifted_are_caught(monkeypatch):
    model, rows = toy_llama(1, torch.float64), token_rows(6, 10)
    right = measure(model, rows).loss
    monkeypatch.setattr(losses, "supervised_logits", unshifted)
    wrong = measure(model, rows).loss
    expected = [slow_loss(model, row)[0] for row in rows]
    np.testing.assert_allclose(right, expected, rtol=2e-6)
    assert np.abs(wrong - expected).min() > 1e-3  # every row tells


def test_an_embedding_that_copies_its_input_is_no_good_model():
    """Without the shift a model that only repeats its input would look perfect."""
    model, rows = toy_llama(1), token_rows(6, 11)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(50 * model.model.embed_tokens.weight)
    assert measure(model, rows).token_mean > 5


# peft#3419: a baseline taken after the adapter was attached and trained.


def adapted(model, rows, steps=3):
    tuned = attach_lora(model, LoraConfig(rank=4), 0)
    train_a_little(tuned, rows, steps=steps, lr=0.5)
    return tuned


def sets(rows):
    return Sets((RowSet("exam", "domain", tuple(rows), ("exam",) * len(rows)),))


def test_the_base_is_measured_before_the_adapter_is_made():
    rows = token_rows(8, 12)
    expected = measure(toy_llama(3), rows).token_mean
    model = toy_llama(3)
    table = evaluate_model(model, lambda: adapted(model, rows), sets(rows), HOW)
    figures = {(r.metric, r.phase): r.value for r in table.rows}
    assert figures["loss", "before"] == expected
    assert figures["loss", "before"] - figures["loss", "after"] > 0.01
    assert [c.value for c in table.gain() if c.metric == "loss"] == [
        figures["loss", "before"] - figures["loss", "after"]
    ]


def test_a_base_that_carries_a_trained_adapter_is_refused_and_a_peft_model_is_switched_off():
    rows = token_rows(8, 12)
    expected = measure(toy_llama(3), rows).token_mean
    model = toy_llama(3)
    tuned = adapted(model, rows)
    assert measure(model, rows).token_mean < expected - 0.01  # the trap: the old object now computes the tuned function
    with pytest.raises(ModelError, match="switching the adapter off"):
        evaluate_model(model, tuned, sets(rows), HOW)
    done = measure_pair(tuned, tuned, sets(rows), HOW)
    figures = {(r.metric, r.phase): r.value for r in done.table.rows}
    assert figures["loss", "before"] == expected
    assert figures["loss", "after"] < expected - 0.01
    assert figures["kl_base", "after"] > 1e-3


def test_the_planted_baseline_bug_shows_no_gain(monkeypatch):
    """The mutant without the guard: it reports that fine-tuning did nothing, and the test above goes red."""
    from contextlib import nullcontext

    from gradsift.evaluate import phases

    rows = token_rows(8, 12)
    model = toy_llama(3)
    tuned = adapted(model, rows)
    monkeypatch.setattr(phases, "without_adapter", lambda _model: nullcontext())
    table = evaluate_model(model, tuned, sets(rows), replace(HOW, divergence=False))
    assert [c.value for c in table.gain() if c.metric == "loss"] == [0.0]


def test_one_model_twice_is_refused():
    model, rows = toy_llama(3), token_rows(4, 1)
    with pytest.raises(ModelError, match="same object"):
        evaluate_model(model, model, sets(rows), HOW)
    with pytest.raises(ModelError, match="same object"):
        evaluate_model(model, lambda: model, sets(rows), HOW)
