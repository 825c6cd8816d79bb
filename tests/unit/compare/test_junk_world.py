"""The real-data world with rows that do harm: what their answers are, on a toy model and made-up items."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.compare.test_real_world import SMALL, item_of, made_up

from gradsift.compare import real_data as rd
from gradsift.compare.config import WorldConfig
from gradsift.compare.junk_world import ECHO_CHARACTERS, REFUSALS, JunkSettings, echo, junk_world, salad
from gradsift.compare.real_world import real_world
from gradsift.compare.worlds import place
from gradsift.errors import DataError
from gradsift.models.load import load_navigator, resolve_navigator

BAD = {"wrong": 2, "echo": 2, "refusal": 3, "salad": 2}
JUNK = JunkSettings(**{**vars(SMALL), "duplicate": 0, "clean": 3, **BAD})


@pytest.fixture(scope="module")
def items():
    return rd.Items({source: made_up(source) for source in rd.SOURCES}, dict.fromkeys(rd.SOURCES, 0))


@pytest.fixture(scope="module")
def toy(navigator):
    return load_navigator(resolve_navigator(str(navigator)), device="cpu")


@pytest.fixture(scope="module")
def world(toy, items):
    return junk_world(5, JUNK, toy, items)


def answer(world, row: str) -> str:
    return world.texts[row].rpartition("Answer: ")[2]


def test_every_kind_is_there_and_what_it_says(world, items):
    assert world.name == "junk-medical"
    assert Counter(world.kinds.values()) == {"clean": 3, "replay": JUNK.replay, "other": JUNK.other, **BAD}
    for row, kind in world.kinds.items():
        if kind in ("replay", "other"):
            continue
        (item,) = item_of(world, row, items)
        assert item.source == "medmcqa"
        said = answer(world, row)
        assert (said == item.answer) == (kind == "clean")
        if kind == "echo":
            assert said == item.prompt.split("\n")[0].removeprefix("Question: ")
        if kind == "refusal":
            assert said in REFUSALS
        if kind == "salad":
            assert said == salad(item, 5)
            assert sorted(said.split()) in (sorted(item.answer.split()), sorted(echo(item).split()))
        if kind == "wrong":
            assert said in item.choices


def test_bad_rows_are_other_rows_than_the_clean_ones_and_a_seed_gives_the_same_world(world, toy, items):
    prompts = [
        world.texts[row].rpartition("Answer: ")[0] for row, kind in world.kinds.items() if kind not in ("replay",)
    ]
    assert len(set(prompts)) == len(prompts)
    again, other = junk_world(5, JUNK, toy, items), junk_world(6, JUNK, toy, items)
    assert [(r.id, r.input_ids.tolist()) for r in again.pool] == [(r.id, r.input_ids.tolist()) for r in world.pool]
    assert not {r.id for r in other.pool} & {r.id for r in world.pool}


def test_without_its_kinds_it_is_the_world_of_real_data(toy, items):
    plain = replace(JUNK, echo=0, refusal=0, salad=0)
    one = junk_world(5, plain, toy, items)
    two = real_world(5, replace(SMALL, duplicate=0, clean=3, wrong=2), toy, items)
    assert [(r.id, r.input_ids.tolist()) for r in one.pool] == [(r.id, r.input_ids.tolist()) for r in two.pool]
    assert one.kinds == two.kinds


def test_a_gpu_is_taken_unasked_as_in_the_world_of_real_data(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert place(WorldConfig(name="arithmetic"), "auto") == "cpu"
    assert place(WorldConfig(name="junk"), "auto") == place(WorldConfig(name="real"), "auto")


words = st.lists(st.sampled_from(["a", "the", "tax", "bond", "rate"]), min_size=1, max_size=60).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(words, words, st.integers(0, 5))
def test_echo_and_salad_say_what_they_must(question, right, seed):
    item = rd.Item("x", "fiqa", "d", f"Question: {question}\nAnswer:", right)
    said = echo(item)
    assert question.startswith(said)
    assert said
    assert len(said) <= ECHO_CHARACTERS
    assert said == question or not question[len(said)].strip()
    if len(set(right.split())) > 1 or len(set(said.split())) > 1:
        mixed = salad(item, seed)
        source = right if len(set(right.split())) > 1 else said
        assert sorted(mixed.split()) == sorted(source.split())
        assert mixed != " ".join(source.split())
        assert mixed == salad(item, seed)
    else:
        with pytest.raises(DataError, match="one order only"):
            salad(item, seed)


def test_a_question_of_one_endless_word_is_cut_all_the_same():
    assert len(echo(rd.Item("x", "fiqa", "d", "Question: " + "y" * 400, "z"))) == ECHO_CHARACTERS
