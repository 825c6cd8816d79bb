"""Conflict-aware replay: the weight, the mix, what is drawn, counted and refused, and resuming."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.toy import toy_gpt2, toy_llama, toy_lora
from torch import nn

from gradsift.errors import ConfigError, DataError
from gradsift.train.conflict_replay import REPLAY, ConflictReplayHook, replay_weight
from gradsift.train.hook_reference import flat_gradient, mean_gradient
from gradsift.train.hooks import make_hook, step_hooks
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.parts import trainable
from gradsift.types import RowStatus, TokenRow

PAD = 3


def some_rows(prefix: str, count: int, seed: int) -> list[TokenRow]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        tokens = rng.integers(4, 260, size=int(rng.integers(4, 11))).astype(np.int32)
        found.append(TokenRow(f"{prefix}{i}", tokens, np.arange(len(tokens)) >= 2, len(tokens), RowStatus.OK))
    return found


SOURCES = {"math": some_rows("m", 6, 1), "chat": some_rows("c", 5, 2)}
GENERAL = some_rows("g", 9, 3)


def hook_of(model: nn.Module, **settings: Any) -> ConflictReplayHook:
    kind = {"refresh": 1, "num_replay": 4, **settings}
    rows = {"sources": SOURCES, "replay": GENERAL, "pad_id": PAD, "seed": 0}
    found = make_hook("conflict_replay", kind, model=model, **rows)
    assert isinstance(found, ConflictReplayHook)
    return found


def flat(model: nn.Module) -> torch.Tensor:
    parameters = [p for _, p in trainable(model)]
    return flat_gradient(parameters, [p.grad for p in parameters])


def put(model: nn.Module, g: torch.Tensor) -> None:
    at = 0
    for _, p in trainable(model):
        p.grad = g[at : at + p.numel()].view_as(p).to(p.dtype).clone()
        at += p.numel()


def references(model: nn.Module, hook: ConflictReplayHook, step: int) -> list[torch.Tensor]:
    names = hook.sources.names
    return [mean_gradient(model, hook.sources.draw(name, step), hook.sources) for name in names]


@given(st.floats(-1, 1), st.floats(0.01, 10), st.floats(0.01, 1))
def test_the_weight_is_the_clipped_conflict(cosine: float, kappa: float, w_max: float) -> None:
    weight = replay_weight(cosine, kappa=kappa, w_max=w_max)
    assert weight == float(np.clip(kappa * max(0.0, -cosine), 0, w_max))
    assert 0 <= weight <= w_max
    assert (weight == 0) == (kappa * max(0.0, -cosine) == 0)


def test_it_is_registered() -> None:
    assert "conflict_replay" in step_hooks()


@pytest.mark.parametrize("make", [toy_llama, toy_lora])
@pytest.mark.parametrize("push", [0.5, 5.0])
def test_the_step_is_mixed_as_the_formula_says(make: Any, push: float) -> None:
    """The slow twin in float64, from the definition."""
    model = make(seed=1, dtype=torch.float64)
    hook = hook_of(model, kappa=0.7, w_max=0.4)
    sources = references(model, hook, 5)
    unit = [r / r.norm() for r in sources]
    noise = torch.randn(unit[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    g = noise / noise.norm() - push * unit[0]
    cosine = min(float(u @ g / g.norm()) for u in unit)
    assert cosine < 0
    weight = min(0.7 * -cosine, 0.4)
    replay = mean_gradient(model, hook.replay.draw(REPLAY, 5), hook.replay)
    put(model, g)
    hook(model, 5)
    want = (1 - weight) * g + weight * replay
    torch.testing.assert_close(flat(model), want, rtol=0, atol=1e-10 * float(want.norm()))
    figures = hook.summary()
    assert figures["replay_weight"] == pytest.approx(weight)
    assert figures["num_replayed"] == 1
    assert figures["num_capped"] == (weight == 0.4)


def test_a_step_that_opposes_nothing_is_untouched_and_reads_no_replay_row() -> None:
    model = toy_llama(seed=1)
    hook = hook_of(model)
    sources = references(model, hook, 0)
    g = sum(r / r.norm() for r in sources)
    assert all(float(r @ g) > 0 for r in sources), "this world must have an agreeing step, or the test shows nothing"
    put(model, g)
    before = flat(model)
    hook(model, 0)
    assert torch.equal(flat(model), before)
    reference_tokens = sum(r.num_tokens for rows in SOURCES.values() for r in rows)
    assert hook.cost.forward_tokens == reference_tokens
    assert hook.summary()["replay_tokens"] == 0
    assert hook.summary()["replayed_share"] == 0


def test_the_source_opposed_most_decides_where_the_mean_would_hide_it() -> None:
    model = toy_llama(seed=1, dtype=torch.float64)
    hook = hook_of(model, w_max=1.0)
    one, two = (r / r.norm() for r in references(model, hook, 0))
    g = two - (0.3 + float(one @ two)) * one  # opposes the first by 0.3, agrees with the mean
    assert float(g @ (one + two)) > 0 > float(g @ one)
    put(model, g)
    hook(model, 0)
    assert hook.summary()["replay_weight"] == pytest.approx(0.3 / float(g.norm()))


def test_replay_tokens_and_both_passes_are_counted() -> None:
    model = toy_llama(seed=1)
    hook = hook_of(model, refresh=0)
    put(model, -references(model, hook, 0)[0])
    hook(model, 0)
    replayed = sum(r.num_tokens for r in hook.replay.draw(REPLAY, 0))
    reference_tokens = sum(r.num_tokens for rows in SOURCES.values() for r in rows)
    assert hook.summary()["replay_tokens"] == replayed
    assert hook.cost.forward_tokens == hook.cost.backward_tokens == reference_tokens + replayed
    size = sum(p.numel() for p in model.parameters())
    assert hook.cost.flops == 6.0 * size * (reference_tokens + replayed)
    assert hook.cost.seconds > 0


def test_a_replay_leaves_no_trace_but_the_gradient() -> None:
    model = toy_gpt2(seed=1).train()  # it has dropout
    hook = hook_of(model)
    put(model, -references(model, hook, 0)[0])
    weights = [p.detach().clone() for p in model.parameters()]
    drawn = torch.get_rng_state()
    hook(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(drawn, torch.get_rng_state())
    assert model.training


def test_draws_are_keyed_by_step_and_id_and_not_by_the_order_of_the_file() -> None:
    model = toy_llama(seed=1)
    hook, other = hook_of(model), hook_of(model)
    other.replay = type(other.replay)(**{**other.replay.__dict__, "rows": {REPLAY: tuple(GENERAL[::-1])}})
    draws = [[r.id for r in h.replay.draw(REPLAY, 3)] for h in (hook, other)]
    assert draws[0] == draws[1]
    assert len(draws[0]) == 4
    assert draws[0] != [r.id for r in hook.replay.draw(REPLAY, 4)]


@pytest.mark.parametrize("refresh", [1, 2])
def test_stopped_and_resumed_is_the_same_run(refresh: int) -> None:
    def loop(model: nn.Module, hook: ConflictReplayHook) -> Loop:
        return Loop(model, LoopConfig(lr=3e-2, total_steps=6), PAD, hook=hook)

    steps = [some_rows(f"t{s}", 3, 100 + s) for s in range(6)]
    whole = toy_llama(seed=1)
    hook = hook_of(whole, refresh=refresh, kappa=5.0)
    run = loop(whole, hook)
    kept: Any = None
    for at, rows in enumerate(steps):
        if at == 3:
            kept = run.state(), hook.state()
        run.step(rows)
    assert hook.summary()["num_replayed"] > 0, "no step of this world replays, so the test shows nothing"
    again = toy_llama(seed=1)
    fresh = hook_of(again, refresh=refresh, kappa=5.0)
    rest = loop(again, fresh)
    rest.restore(kept[0])
    fresh.restore(kept[1])
    for rows in steps[3:]:
        rest.step(rows)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    same = {n: v for n, v in hook.summary().items() if n != "seconds" and not math.isnan(v)}
    assert same == {n: v for n, v in fresh.summary().items() if n != "seconds" and not math.isnan(v)}


def test_an_unusable_replay_gradient_passes_the_step_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_llama(seed=1)
    hook = hook_of(model)
    put(model, -references(model, hook, 0)[0])
    before = flat(model)
    monkeypatch.setattr("gradsift.train.conflict_replay.mean_gradient", lambda *a: torch.zeros_like(before))
    hook(model, 0)
    assert torch.equal(flat(model), before)
    assert hook.summary()["num_bad_replays"] == 1
    assert hook.summary()["num_replayed"] == 0
    assert any(note.code == "bad_replays" for note in hook.notes())


def test_rows_that_are_measured_with_are_refused() -> None:
    model, kind = toy_llama(seed=1), {"sources": SOURCES, "pad_id": PAD, "seed": 0}
    same = SOURCES["math"][0]
    copy = TokenRow("other name", same.input_ids, same.trained, same.num_tokens, RowStatus.OK)
    with pytest.raises(DataError, match="measured with"):
        make_hook("conflict_replay", {}, model=model, replay=[*GENERAL, copy], **kind)
    with pytest.raises(DataError, match="evaluation set"):
        make_hook("conflict_replay", {}, model=model, replay=GENERAL, forbidden_ids={"g1"}, **kind)
    with pytest.raises(ConfigError, match="no rows to replay"):
        make_hook("conflict_replay", {}, model=model, **kind)


@pytest.mark.parametrize(
    "settings", [{"kappa": 0}, {"kappa": math.inf}, {"w_max": 0}, {"w_max": 1.1}, {"num_replay": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="wrong value"):
        hook_of(toy_llama(seed=1), **settings)


def test_few_replay_rows_are_said() -> None:
    hook = hook_of(toy_llama(seed=1), num_replay=50)
    assert any(note.code == "few_replay_rows" and note.count == len(GENERAL) for note in hook.notes())
