"""The lesson of the real-data world: it teaches, once for all seeds, and what the cache gives back is what was taught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.real import SMALL, made_up

import gradsift.compare.real_base as real_base
from gradsift.compare import real_data as rd
from gradsift.compare.real_world import _set_aside, real_world
from gradsift.errors import ConfigError, StoreError
from gradsift.evaluate.losses import evaluate_rows
from gradsift.models.load import load_navigator, resolve_navigator


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def items():
    return rd.Items({source: made_up(source) for source in rd.SOURCES}, dict.fromkeys(rd.SOURCES, 0))


@pytest.fixture(scope="module")
def toy(navigator):
    return load_navigator(resolve_navigator(str(navigator)), device="cpu")


TAUGHT = replace(SMALL, lesson=3)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}


def test_the_lesson_is_learned_once_and_shared_by_all_seeds(toy, items, monkeypatch):
    before = weights(toy.model)
    taught = []
    plain = real_base._teach
    monkeypatch.setattr(real_base, "_teach", lambda *given: taught.append(1) or plain(*given))
    worlds = [real_world(seed, TAUGHT, toy, items) for seed in (0, 1)]
    assert len(taught) == 1
    first, second = (weights(world.make_model().get_base_model()) for world in worlds)
    assert all(torch.equal(first[name], second[name]) for name in first)
    after = weights(toy.model)
    assert all(torch.equal(before[name], after[name]) for name in before), "the navigator itself is left as it is"
    assert any(not torch.equal(a, b) for a, b in zip(first.values(), before.values(), strict=True))


def test_general_losses_fall_and_lesson_zero_changes_nothing(toy, items):
    plain = real_world(0, replace(SMALL, lesson=0), toy, items)
    taught = real_world(0, replace(SMALL, lesson=16, lesson_lr=1e-2), toy, items)
    assert _set_aside(replace(SMALL, lesson=0), items) == ((), items)

    def loss(world):
        rows = [row for e in world.evaluations if e.role == "general" for row in e.rows]
        return evaluate_rows(world.make_model(), rows, pad_id=world.pad_id, tokens_per_batch=512).token_mean

    assert loss(taught) < 0.9 * loss(plain)
    own, given = weights(plain.make_model().get_base_model()), weights(toy.model)
    assert all(torch.equal(a, b) for a, b in zip(own.values(), given.values(), strict=True))


def test_a_damaged_cache_is_named(toy, items, cache):
    real_world(0, TAUGHT, toy, items)
    (path,) = (cache / "worlds").glob("real-*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="cached weights are damaged"):
        real_world(1, TAUGHT, toy, items)


@pytest.mark.parametrize("change", [{"lesson": -1}, {"lesson_lr": 0.0}])
def test_a_lesson_out_of_range_is_refused(change):
    with pytest.raises(ConfigError, match="lesson"):
        replace(SMALL, **change)


def test_documents_of_the_lesson_serve_nothing_else(toy, items):
    lesson, left = _set_aside(TAUGHT, items)
    assert len(lesson) == 3 * len(rd.GENERAL)
    taught = {item.document for item in lesson}
    assert not taught & {item.document for some in left.by_source.values() for item in some}
    home = {item.id: item.document for some in items.by_source.values() for item in some}
    world = real_world(2, TAUGHT, toy, items)
    rows = [*world.target, *world.replay, *(row for some in world.anchors.values() for row in some)]
    rows += [row for e in world.evaluations for row in e.rows]
    assert not taught & {home[row.id.split("/", 1)[1]] for row in rows}
