"""The memory model: what a forward keeps, counted on shapes alone, against the same model with weights."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.toy import TOYS, toy_llama

from gradsift.data.batches import plan_batches
from gradsift.errors import ConfigError
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.outline import trace_kept
from gradsift.gradients.taps import Extras
from gradsift.pipeline import memory
from gradsift.pipeline.memory import PassMemory, available, fitting_budget, largest_batch, resident, with_budget
from gradsift.recipe import AUTO, CollectConfig, apply_overrides, build_recipe, dump_recipe
from gradsift.types import RowStatus, TokenRow


def really_kept(model, names, rows, length, positions):
    """The slow twin: a real forward, and every storage that autograd or a hook holds when it is over."""
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            alive[storage.data_ptr()] = storage
        return tensor

    head, owners = model.get_output_embeddings(), {name.rpartition(".")[0] for name in names}

    def after(module, given, output):
        note(given[0])

    hooks = [m.register_forward_hook(after) for n, m in model.named_modules() if n in owners and m is not head]
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_(True)))
    at = torch.arange(positions)
    hooks.append(head.register_forward_pre_hook(lambda _, x: (note(x[0].reshape(-1, x[0].shape[-1])[at][None]),)))
    ids = torch.randint(4, 200, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in alive.values()), logits.untyped_storage().nbytes()


@pytest.mark.parametrize("toy", [*TOYS, "adapter alone"])
def test_what_is_kept_is_what_a_real_forward_keeps(toy):
    model = TOYS["lora" if toy == "adapter alone" else toy]()
    model.requires_grad_(False)
    names = [name for name, _ in model.named_parameters() if toy != "adapter alone" or "lora_" in name]
    want, logits = really_kept(model, names, 3, 40, 50)
    got = trace_kept(model.to("meta"), names, num_rows=3, length=40, num_positions=50)
    assert got.logits == logits
    assert got.activations == pytest.approx(want, rel=0.02)  # tables of positions are made in other sizes


def test_it_grows_with_tokens_and_positions_and_not_with_how_they_are_dealt():
    model = toy_llama().requires_grad_(False).to("meta")
    names = [name for name, _ in model.named_parameters()]

    def kept(rows, length, positions):
        got = trace_kept(model, names, num_rows=rows, length=length, num_positions=positions)
        return got.activations + got.logits

    one, two, four = (kept(n, 64, 10) for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-9)
    assert kept(1, 128, 10) == pytest.approx(kept(2, 64, 10), rel=0.02)
    assert kept(1, 64, 30) - kept(1, 64, 20) == 10 * (260 + 32) * 4


def rows_of(lengths):
    return [TokenRow(f"r{i:03}", np.zeros(n, dtype=np.int32), np.ones(n, dtype=bool), n, RowStatus.OK)
            for i, n in enumerate(lengths)]  # fmt: skip


def test_the_largest_batch_is_one_that_is_planned():
    rows = rows_of([3, 50, 7, 50, 50, 9, 4])
    got = largest_batch(rows, 100, 64, 1000)
    ordered = sorted(rows, key=lambda row: (row.num_tokens, row.id))
    shapes = [(len(b), max(ordered[i].num_tokens for i in b)) for b in plan_batches(ordered, range(7), 100)]
    assert (got.num_rows, got.length) in shapes
    assert (got.num_rows, got.length, got.num_positions) == (2, 50, 98)
    assert largest_batch(rows, 100, 1, 1000).num_rows == 1
    assert largest_batch(rows, 10_000, 64, 1000).num_rows == 7


@pytest.mark.parametrize("template", [None, 5])
def test_positions_are_those_at_which_logits_are_made_prompts_included(template):
    generator = np.random.default_rng(0)
    rows = []
    for i in range(8):
        frame = None if template is None else np.arange(50) < template
        ids = generator.integers(4, 200, 50)
        rows.append(TokenRow(f"r{i}", ids, np.arange(50) >= 46, 50, RowStatus.OK, template=frame))
    model = toy_llama()
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    for prompts in (True, False):
        with GradientEngine(model, ()) as engine:
            measure_shard(Pass(engine, (), 200, 3, gradients=False, extras=Extras(prompt=prompts)), rows)
        assert largest_batch(rows, 200, 64, 260, prompts=prompts).num_positions == max(seen)
        seen.clear()
    assert largest_batch(rows, 200, 64, 260).num_positions == 16


@pytest.mark.parametrize("pays", [True, False])
def test_the_peak_is_the_larger_of_loading_and_the_pass(pays, monkeypatch):
    monkeypatch.setattr(memory.products, "pays", lambda: pays)
    part = PassMemory(held=100, weights=10, loading=0, directions=4, activations=50, logits=5)
    rest = memory.TILES + memory.FIRST_USE + pays * memory.COMPILED
    assert part.peak == 100 + 10 + 4 + 50 + 5 + rest
    assert dataclasses.replace(part, loading=10**9).peak == 110 + 10**9
    assert dataclasses.replace(part, chosen=10**9).peak == 114 + 10**9
    assert dataclasses.replace(part, allocator=3).peak == part.peak + 3
    assert dict(part.lines()) == {"held": 100, "weights": 10, "directions": 4, "activations": 50, "logits": 5}


def test_the_machine_is_asked():
    before = resident()
    held = np.ones(64 << 20, dtype=np.uint8)
    assert 60 << 20 < resident() - before < 90 << 20
    assert held.sum() == 64 << 20
    free = available("cpu")
    assert free is None or free > 1 << 20


@pytest.mark.parametrize("room", [0, 200 << 20, 1 << 40, None])
def test_auto_takes_the_largest_budget_that_fits(monkeypatch, room):
    class Linear:
        def memory(self, prepared, rows, _):
            tokens = prepared.recipe.collect.tokens_per_batch
            return PassMemory(
                held=7 << 30, weights=10 << 20, loading=0, directions=0, activations=tokens << 14, logits=0
            )

    recipe = build_recipe({"pool": [{"label": "a", "path": "a.jsonl"}], "method": {"name": "norm"}, "budget": "5",
                           "collect": {"tokens_per_batch": "auto"}, "navigator": {"device": "cpu"}})  # fmt: skip
    monkeypatch.setattr(memory._Outline, "of", classmethod(lambda cls, prepared, gradients, prompts: Linear()))
    monkeypatch.setattr(memory, "available", lambda device: room)
    monkeypatch.setattr(memory.products, "pays", lambda: False)

    @dataclasses.dataclass(frozen=True)
    class Inputs:
        recipe: object
        notes: tuple = ()

    rows = rows_of([500] * 50)
    got = fitting_budget(Inputs(recipe), rows, gradients=True)
    want = {0: 256, 200 << 20: 4096, 1 << 40: 16_384, None: 1024}[room]
    assert got == want
    fixed = 66 << 20  # weights, tiles and first use
    if room:
        assert fixed + (got << 14) <= memory.SHARE * room
        assert got == 16_384 or fixed + (2 * got << 14) > memory.SHARE * room
    settled = with_budget(Inputs(recipe), rows, gradients=True)
    assert settled.recipe.collect.tokens_per_batch == want
    assert f"{want:,} tokens" in settled.notes[0].text
    assert with_budget(settled, rows, gradients=True) is settled


def test_a_small_pool_needs_no_large_batch(monkeypatch):
    monkeypatch.setattr(memory._Outline, "of", classmethod(lambda *_: SimpleNamespace(
        memory=lambda *_: PassMemory(0, 0, 0, 0, 0, 0))))  # fmt: skip
    monkeypatch.setattr(memory, "available", lambda device: 1 << 40)
    recipe = build_recipe({"pool": [{"label": "a", "path": "a.jsonl"}], "method": {"name": "norm"}, "budget": "5",
                           "navigator": {"device": "cpu"}})  # fmt: skip

    @dataclasses.dataclass(frozen=True)
    class Inputs:
        recipe: object

    assert fitting_budget(Inputs(recipe), rows_of([100] * 9), gradients=True) == 1024


def test_auto_is_written_and_read_as_auto_and_nothing_else_is():
    recipe = build_recipe(apply_overrides(
        {"pool": [{"label": "a", "path": "a.jsonl"}], "method": {"name": "norm"}, "budget": "5"},
        [("collect.tokens_per_batch", "auto")],
    ))  # fmt: skip
    assert recipe.collect.tokens_per_batch == AUTO
    assert "tokens_per_batch: auto" in dump_recipe(recipe)
    assert "tokens_per_batch: 1024" in dump_recipe(recipe.model_copy(update={"collect": CollectConfig()}))
    for wrong in ("many", -1):
        with pytest.raises(ConfigError):
            build_recipe({"pool": [{"label": "a", "path": "a.jsonl"}], "method": {"name": "norm"}, "budget": "5",
                          "collect": {"tokens_per_batch": wrong}})  # fmt: skip
