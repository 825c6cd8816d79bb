"""Memory levels: the golden numbers of memory_level.md, draws balanced over relations, splits by subject."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.geometry.recall import (
    balanced_places,
    count_levels,
    level_of_share,
    recall_level,
    recalls,
    split_by_subject,
    wilson,
)
from gradsift.seeds import stream


@pytest.mark.parametrize(
    ("count", "level"), [(0, 0), (1, 1), (52, 1), (53, 2), (105, 2), (106, 3), (157, 3), (158, 4), (210, 4)]
)
def test_golden_bins(count, level):
    assert recall_level(count, 210) == level


@given(total=st.integers(1, 500), data=st.data())
@settings(derandomize=True, database=None)
def test_levels_are_those_of_exact_fractions_and_never_fall(total, data):
    count = data.draw(st.integers(0, total))
    share = Fraction(count, total)
    want = 0 if share == 0 else next(i for i in range(1, 5) if share <= Fraction(i, 4))
    assert recall_level(count, total) == want
    if count < total:
        assert recall_level(count + 1, total) >= want


def test_edges_are_closed_above_and_nonsense_is_refused():
    assert [recall_level(k, 4) for k in range(5)] == [0, 1, 2, 3, 4]
    for count, total in ((-1, 4), (5, 4), (0, 0)):
        with pytest.raises(ValueError, match="recall"):
            recall_level(count, total)
    assert count_levels(np.array([2, 2, 4])).tolist() == [0, 0, 2, 0, 1]


def test_golden_matches():
    outputs = ["It is Paris.", "Parisian food", "PARIS", "the capital of France"]
    assert [recalls(output, ["Paris"]) for output in outputs] == [True, False, True, False]
    assert recalls("S\u00e3o Paulo", ["sao paulo"])
    assert recalls("la ville lumi\u00e8re", ["Paris", "ville lumiere"])
    assert not recalls("anything", ["", "  "])
    assert recalls("in C++ of course", ["C++"])


@pytest.mark.parametrize(
    ("output", "name", "held"),
    [
        ("我在北京工作", "北京", True),
        ("中国的首都北京在哪个国家", "北京", True),
        ("東京に住んでいます", "東京", True),
        ("カナダから来た", "カナダ", True),
        ("서울에서 왔어요", "서울", True),
        ("한국", "하", False),  # a part of a syllable
        ("ฉันอยู่ที่กรุงเทพมหานคร", "กรุงเทพ", True),
        ("ในปารีสมี", "ปารีส", True),
        ("กิน", "ก", False),  # a letter without its vowel sign
        ("我爱Paris和London", "Paris", True),
        ("我爱Parisian食物", "Paris", False),
        ("iPhone手机很好", "手机", True),
        ("它有11月", "1月", False),
        ("रामायण पढ़ो", "राम", False),
        ("यह राम है", "राम", True),
        ("सीताराम", "राम", False),
        ("சென்னைக்கு", "சென்னை", False),
        ("சென்னை நகரம்", "சென்னை", True),
    ],
)
def test_words_end_where_their_script_ends_them(output, name, held):
    assert recalls(output, [name]) is held


@given(text=st.text("ab1_ .\u00e9", max_size=12), name=st.text("ab1_.\u00e9", min_size=1, max_size=3))
@settings(derandomize=True, database=None)
def test_scripts_with_spaces_have_word_boundaries(text, name):
    where, word = (re.sub("\u00e9", "e", s) for s in (text, name))
    assert recalls(text, [name]) == bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", where))


@given(text=st.text("北京人工a ", max_size=12), name=st.text("北京人工", min_size=1, max_size=3))
@settings(derandomize=True, database=None)
def test_scripts_without_spaces_have_none(text, name):
    assert recalls(text, [name]) == (name in text)


@given(text=st.text(max_size=20), names=st.lists(st.text(min_size=1, max_size=5), max_size=3), more=st.text(max_size=5))
@settings(derandomize=True, database=None)
def test_an_alias_more_never_loses_a_hit(text, names, more):
    assert recalls(text, [*names, more]) >= recalls(text, names)


def test_golden_intervals():
    assert wilson(53, 210) == pytest.approx((0.198, 0.315), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((0.237, 0.763), abs=1e-3)
    assert [level_of_share(s) for s in wilson(53, 210)] == [1, 2]
    assert [level_of_share(s) for s in wilson(5, 10)] == [1, 4]
    assert wilson(0, 210)[0] == 0.0
    assert wilson(210, 210)[1] == pytest.approx(1.0)


@given(groups=st.lists(st.sampled_from("abc"), min_size=1, max_size=30), seed=st.integers(0, 9))
@settings(derandomize=True, database=None)
def test_every_beginning_of_the_order_is_balanced_where_supply_allows(groups, seed):
    n = len(groups)
    candidates = np.arange(n) % 5 != 4
    place = balanced_places(stream(seed, "x").uniform([str(i) for i in range(n)]), groups, candidates)
    order = np.argsort(place)[: candidates.sum()]
    assert np.isinf(place[~candidates]).all()
    assert sorted(place[candidates]) == list(range(int(candidates.sum())))
    supply = Counter(groups[i] for i in np.flatnonzero(candidates))
    for k in range(1, len(order) + 1):
        taken = Counter(groups[i] for i in order[:k])
        for a in supply:
            for b in supply:
                assert taken[a] - taken[b] <= 1 or taken[b] == supply[b]


@given(names=st.lists(st.sampled_from(["Ada", "ada ", "Bo", "C\u00e9", "ce", "D"]), max_size=20), share=st.floats(0, 1))
@settings(derandomize=True, database=None)
def test_no_subject_stands_on_both_sides(names, share):
    held = split_by_subject(names, share, stream(1, "split"))
    key = {"Ada": 0, "ada ": 0, "Bo": 1, "C\u00e9": 2, "ce": 2, "D": 3}
    assert not {key[n] for n, h in zip(names, held, strict=True) if h} & {
        key[n] for n, h in zip(names, held, strict=True) if not h
    }
    assert held.tolist() == split_by_subject(names[::-1], share, stream(1, "split"))[::-1].tolist()
