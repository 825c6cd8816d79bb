"""KL(base || tuned) against the slow twin, whichever way the base model is had."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_toys import slow_kl, token_rows, train_a_little
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import toy_llama

from gradsift.errors import ConfigError, DataError, ModelError, NumericsError
from gradsift.evaluate import divergence
from gradsift.evaluate.divergence import (
    BaseLogProbs,
    cache_base,
    has_adapter,
    kl_nats,
    kl_rows,
    losses_and_kl,
    without_adapter,
)
from gradsift.evaluate.losses import evaluate_rows
from gradsift.models.adapter import attach_lora
from gradsift.recipe import LoraConfig

ROWS = token_rows(9, 0)
PASSES = {"pad_id": 3, "tokens_per_batch": 64}


def tuned_lora(seed=3, dtype=torch.float32):
    model = attach_lora(toy_llama(seed, dtype), LoraConfig(rank=4), 0)
    train_a_little(model, ROWS, steps=2, lr=0.2)
    return model


def test_divergence_equals_the_slow_twin():
    base, tuned = toy_llama(3, torch.float64), tuned_lora(3, torch.float64)
    expected = [slow_kl(base, tuned, row) for row in ROWS]
    got = kl_rows(tuned, ROWS, base=base, **PASSES)
    np.testing.assert_allclose(got.kl, expected, rtol=1e-4, atol=1e-7)
    trained = np.array([row.num_trained for row in ROWS])
    assert got.token_mean == pytest.approx(float(np.average(expected, weights=trained)), rel=1e-4)


def test_three_ways_to_the_base_agree():
    base, tuned = toy_llama(3), tuned_lora()
    apart = kl_rows(tuned, ROWS, base=base, **PASSES)
    cached = kl_rows(tuned, ROWS, base=cache_base(base, ROWS, **PASSES), **PASSES)
    off = kl_rows(tuned, ROWS, base=None, **PASSES)
    np.testing.assert_allclose(cached.kl, apart.kl, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(off.kl, apart.kl, rtol=1e-5, atol=1e-8)
    assert np.array_equal(kl_rows(tuned, ROWS[::-1], base=None, **PASSES).kl[::-1], off.kl)
    tokens = sum(row.num_tokens for row in ROWS)
    assert (cached.cost.forward_tokens, off.cost.forward_tokens, apart.cost.forward_tokens) == (
        tokens,
        2 * tokens,
        2 * tokens,
    )


def test_one_pass_gives_what_two_give():
    tuned, calls = tuned_lora(), []
    cached = cache_base(toy_llama(3), ROWS, **PASSES)
    apart = evaluate_rows(tuned, ROWS, **PASSES), kl_rows(tuned, ROWS, base=cached, **PASSES)
    handle = tuned.register_forward_pre_hook(lambda *_: calls.append(1))
    losses, kl = losses_and_kl(tuned, ROWS, base=cached, **PASSES)
    once = len(calls)
    evaluate_rows(tuned, ROWS, **PASSES)
    handle.remove()
    assert len(calls) == 2 * once > 0
    assert np.array_equal(losses.loss, apart[0].loss)
    assert np.array_equal(losses.exact, apart[0].exact)
    assert np.array_equal(kl.kl, apart[1].kl)
    assert losses.cost.forward_tokens == apart[0].cost.forward_tokens
    assert kl.cost.forward_tokens == 0


def test_the_direction_is_base_to_tuned():
    base, tuned = toy_llama(3), tuned_lora()
    forward = kl_rows(tuned, ROWS, base=base, **PASSES).token_mean
    backward = kl_rows(base, ROWS, base=tuned.merge_and_unload(), **PASSES).token_mean
    assert abs(forward - backward) > 1e-3 * forward


def test_a_fresh_adapter_is_no_divergence_and_training_flags_survive():
    model = attach_lora(toy_llama(3), LoraConfig(rank=4), 0)
    model.train()
    for p in list(model.parameters())[:6]:
        p.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    assert kl_rows(model, ROWS, base=None, **PASSES).kl.max() == 0
    assert flags == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 30), st.floats(1e-6, 30))
def test_never_below_zero_and_zero_only_for_equals(seed, sharp, moved):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(3, 40, generator=generator) * sharp
    tuned = base + torch.randn(3, 40, generator=generator) * moved
    got = kl_nats(base, tuned)
    p, q = base.double().log_softmax(-1), tuned.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert (got >= -1e-7).all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert (kl_nats(base, base + 5.0).abs() < 1e-7).all()  # a constant on every logit is no change


def test_ruled_out_tokens():
    base, tuned = torch.zeros(1, 4), torch.zeros(1, 4)
    base[0, 0] = -torch.inf
    assert kl_nats(base, tuned).item() == pytest.approx(np.log(4 / 3), rel=1e-5)
    assert kl_nats(base, base).item() == 0
    assert kl_nats(tuned, base).item() == np.inf


def test_refusals():
    base, tuned = toy_llama(3), tuned_lora()
    with pytest.raises(ModelError, match="same object"):
        kl_rows(base, ROWS, base=base, **PASSES)
    with pytest.raises(ModelError, match="switching the adapter off"):
        kl_rows(base, ROWS, base=None, **PASSES)
    with pytest.raises(ModelError, match="switching the adapter off"), without_adapter(tuned.get_base_model()):
        pass
    with pytest.raises(DataError, match="not in the cache"):
        kl_rows(tuned, ROWS, base=BaseLogProbs({}), **PASSES)
    tuned.peft_config["default"].bias = "all"
    with pytest.raises(ModelError, match="bias=all"):
        kl_rows(tuned, ROWS, base=None, **PASSES)
    assert has_adapter(tuned.get_base_model())
    assert not has_adapter(base)


def test_too_large_a_cache_and_an_infinite_divergence_are_refused(monkeypatch):
    base, tuned = toy_llama(3), toy_llama(4)
    monkeypatch.setattr(divergence, "MAX_CACHE_BYTES", 1000)
    with pytest.raises(ConfigError, match="too large"):
        cache_base(base, ROWS, **PASSES)
    with torch.no_grad():
        tuned.lm_head.weight.mul_(torch.inf)
    with pytest.raises(NumericsError, match="divergence"):
        kl_rows(tuned, ROWS, base=base, **PASSES)
