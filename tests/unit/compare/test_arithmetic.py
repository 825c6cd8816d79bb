"""The arithmetic world: disjoint splits, planted counts, nothing that gives the planted kinds away, a base that knows A."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.compare.arithmetic import KINDS, ArithmeticSettings, arithmetic_world
from gradsift.data.lexical import lexical_scores
from gradsift.errors import ConfigError, StoreError
from gradsift.evaluate.losses import evaluate_rows

FULL = ArithmeticSettings(pretrain_steps=1, hidden=16, layers=1)  # the real rows under a model that learned nothing
SMALL = replace(FULL, modulus=7, clean=20, replay=40, conflict=40, noise=12, duplicate=6, irrelevant=60, num_eval=10,
                num_anchor=8, num_target=6, num_replay=6)  # fmt: skip
OPERATORS = {"A": 3, "B": 4, "C": 5}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def world(_own_cache):
    return arithmetic_world(3, FULL)


def pairs(rows, task=None, modulus=17):
    found = set()
    for row in rows:
        bos, x, op, y, equals, _ = row.input_ids.tolist()
        assert (bos, equals) == (modulus, modulus + 1)
        assert row.trained.tolist() == [False] * 5 + [True]
        if task is None or op == modulus + OPERATORS[task]:
            found.add((x, y))
    return found


def right(row, task, modulus=17):
    _, x, _, y, _, z = row.input_ids.tolist()
    return z == {"A": (x + y) % modulus, "B": min(x, y), "C": x * y % modulus, "wrong": (x - y + 1) % modulus}[task]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_no_pair_stands_on_two_sides_and_no_id_twice(seed):
    world = arithmetic_world(seed, SMALL)
    evaluations = {held.name: held.rows for held in world.evaluations}
    sides = {
        "A": [evaluations["A"], world.anchors["A"], world.replay, world.pool],
        "B": [evaluations["B"], world.target, world.pool],
    }
    for task, some in sides.items():
        found = [pairs(rows, task, 7) for rows in some]
        assert all(found)
        assert sum(map(len, found)) == len(set.union(*found)), task
    rows = [row.id for some in (*sides["A"], evaluations["B"], world.target) for row in some]
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(world.texts)


def test_counts_and_answers_are_those_that_were_planted(world):
    want = {kind: getattr(FULL, kind) for kind in KINDS}
    assert Counter(world.kinds.values()) == want
    assert {row.id for row in world.pool} == set(world.kinds)
    sizes = [len(rows) for rows in (world.anchors["A"], world.target, world.replay)]
    assert sizes == [FULL.num_anchor, FULL.num_target, FULL.num_replay]
    assert [(held.name, held.role, len(held.rows)) for held in world.evaluations] == [
        ("B", "domain", FULL.num_eval), ("A", "general", FULL.num_eval),
    ]  # fmt: skip
    rule = {"clean": "B", "duplicate": "B", "replay": "A", "conflict": "wrong", "irrelevant": "C"}
    for row in world.pool:
        kind = world.kinds[row.id]
        assert kind == "noise" or right(row, rule[kind]), kind
    noise = [row for row in world.pool if world.kinds[row.id] == "noise"]
    assert np.mean([right(row, "B") for row in noise]) < 3 / 17
    for task, some in (("A", world.anchors["A"]), ("A", world.replay), ("B", world.target)):
        assert all(right(row, task) for row in some)
    for held in world.evaluations:
        assert all(right(row, held.name) for row in held.rows)
    looks = {i for i, kind in world.kinds.items() if kind in ("clean", "noise", "duplicate")}
    assert world.looks_domain == looks


def test_copies_point_to_the_first_of_the_same_content(world):
    by_id = {row.id: row for row in world.pool}
    groups = Counter(row.input_ids.tobytes() for row in world.pool)
    assert len(world.copy_of) == sum(n - 1 for n in groups.values())
    for i, first in world.copy_of.items():
        assert first < i
        assert first not in world.copy_of
        assert np.array_equal(by_id[i].input_ids, by_id[first].input_ids)
    duplicates = {by_id[i].input_ids.tobytes() for i, kind in world.kinds.items() if kind == "duplicate"}
    assert len(duplicates) == 1


def test_no_word_tells_conflict_from_replay(world):
    """The same questions, at most one more of one of them; one operator; the same BM25 but for the answer's word."""
    of = {kind: [row for row in world.pool if world.kinds[row.id] == kind] for kind in ("conflict", "replay")}
    asked = {kind: Counter(tuple(row.input_ids[:5].tolist()) for row in rows) for kind, rows in of.items()}
    assert set(asked["conflict"]) == set(asked["replay"])
    assert all(abs(asked["conflict"][q] - asked["replay"][q]) <= 1 for q in asked["replay"])
    questions = {row.id: " ".join(world.texts[row.id].split()[:5]) for rows in of.values() for row in rows}
    assert all(len(world.texts[i].split()) == 6 for i in questions)
    targets = [world.texts[row.id] for row in world.target]
    ids = sorted(questions)
    scores = dict(zip(ids, lexical_scores(ids, [world.texts[i] for i in ids], targets), strict=True))
    a, b = (np.array([scores[row.id] for row in of[kind]]) for kind in ("conflict", "replay"))
    assert abs(a.mean() - b.mean()) < 0.25 * np.hypot(a.std(), b.std())


def test_the_wrong_rule_is_right_for_one_second_number_only(world):
    """2 y = 1 (mod p): such conflict rows are true, 1 in p of the pairs, and a reader of the shares must know."""
    accidental = [row for row in world.pool if world.kinds[row.id] == "conflict" and right(row, "A")]
    assert {int(row.input_ids[3]) for row in accidental} <= {9}
    assert len(accidental) / FULL.conflict < 3 / 17


def test_ids_tell_nothing_of_the_kinds(world):
    ids = [row.id for row in world.pool]
    assert ids == sorted(ids)
    assert {len(i) for i in ids} == {16}
    assert all(set(i) <= set("0123456789abcdef") for i in ids)
    place = {i: k / len(ids) for k, i in enumerate(ids)}
    for kind in KINDS:  # places of a kind are like a uniform draw: mean 1/2, standard error 0.29 / sqrt(n)
        at = [place[i] for i, k in world.kinds.items() if k == kind]
        assert abs(np.mean(at) - 0.5) < 4 * 0.29 / len(at) ** 0.5, kind
    assert set(world.sources.values()) == {"pool"}


def test_a_seed_gives_one_world_and_another_seed_another(world, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path))  # nothing out of the cache
    again = arithmetic_world(3, FULL)
    assert [(r.id, r.input_ids.tolist()) for r in again.pool] == [(r.id, r.input_ids.tolist()) for r in world.pool]
    for a, b in zip(again.make_model().parameters(), world.make_model().parameters(), strict=True):
        assert torch.equal(a, b)
    other = arithmetic_world(4, FULL)
    assert not {r.id for r in other.pool} & {r.id for r in world.pool}
    assert {r.id for r in other.anchors["A"]} != {r.id for r in world.anchors["A"]}
    assert other.make_model().lm_head.weight.ne(world.make_model().lm_head.weight).any()


def test_every_model_is_a_fresh_copy(world):
    one, other = world.make_model(), world.make_model()
    with torch.no_grad():
        one.lm_head.weight.zero_()
    assert other.lm_head.weight.abs().sum() > 0
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize(
    "bad", [{"num_eval": 289}, {"num_anchor": 200, "num_eval": 60, "num_replay": 29}, {"modulus": 5}]
)
def test_splits_that_leave_no_pair_for_the_pool_are_refused(bad):
    with pytest.raises(ConfigError, match="leave none for the pool"):
        ArithmeticSettings(**bad)


def test_damaged_weights_in_the_cache_are_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path))
    arithmetic_world(0, SMALL)
    (file,) = (tmp_path / "worlds").iterdir()
    file.write_bytes(b"not weights")
    with pytest.raises(StoreError, match=file.name):
        arithmetic_world(0, SMALL)


@pytest.mark.slow
def test_after_real_pretraining_the_base_knows_a_and_little_of_b():
    """A to 100% is the aim, not the fact: 600 steps leave 55 of 60 on seed 0, and less than all on 8 of seeds 100-119."""
    world = arithmetic_world(0)
    model = world.make_model()
    found = {
        held.name: evaluate_rows(model, held.rows, pad_id=world.pad_id, tokens_per_batch=4096).exact_share
        for held in world.evaluations
    }
    assert found["A"] >= 0.9
    assert found["B"] < 0.3
    known = [row for row in world.pool if world.kinds[row.id] == "replay"]
    assert evaluate_rows(model, known, pad_id=world.pad_id, tokens_per_batch=4096).exact_share >= 0.9
