"""Random draws: fair, and matched to what was asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.methods.random_ import Random, length_deciles, place_in_group
from gradsift.seeds import stream
from gradsift.types import SIGNALS, Budget
from planted import planted_world

PROBLEM = planted_world("long", n=200).problem()


def draw(match, budget, seed=0, problem=PROBLEM):
    return Random(match).select(problem, budget, stream(seed, "select/random"))


def test_every_row_is_drawn_equally_often():
    problem = replace(planted_world("long", n=50).problem(), sources=("a", "b") * 25)
    for match in ("none", "length", "source"):
        counts = Counter(i for seed in range(200) for i in draw(match, Budget(rows=10), seed, problem).ids)
        times = np.array([counts[i] for i in problem.ids])
        assert times.sum() == 200 * 10
        # binomial(200, 0.2): mean 40, sd 5.7; 50 rows stay within 4.5 sd
        assert abs(times - 40).max() < 26, match


def test_deciles_of_unequal_size_do_not_favour_the_rows_of_the_small_ones():
    problem = planted_world("long", n=15).problem()  # five deciles hold two rows, five hold one
    counts = Counter(i for seed in range(300) for i in draw("length", Budget(rows=5), seed, problem).ids)
    # binomial(300, 1/3): mean 100, sd 8.2; the small ones would come 150 times
    assert all(abs(counts[i] - 100) < 37 for i in problem.ids)


def test_a_draw_belongs_to_an_id():
    each = ("ids", "sources", "num_tokens", "num_trained", "texts", *SIGNALS)
    columns = {name: column[100:] for name, column in PROBLEM.external.items()}
    few = replace(PROBLEM, external=columns, **{name: getattr(PROBLEM, name)[100:] for name in each})
    everyone = [i for i in draw("none", Budget(rows=200)).ids if i in set(few.ids)]
    assert list(draw("none", Budget(rows=100), problem=few).ids) == everyone


@pytest.mark.parametrize("budget", [Budget(rows=10), Budget(rows=37), Budget(rows=120)], ids=str)
def test_length_keeps_every_decile_in_its_share(budget):
    group = dict(zip(PROBLEM.ids, length_deciles(PROBLEM.num_trained), strict=True))
    for seed in range(5):
        counts = Counter(group[i] for i in draw("length", budget, seed).ids)
        assert all(abs(counts[d] - budget.rows / 10) <= 1 for d in range(10))


def test_source_takes_equally_many_and_shares_what_a_small_source_lacks():
    sources = tuple("small" if i < 5 else ("b" if i % 2 else "c") for i in range(200))
    problem = replace(PROBLEM, sources=sources)
    label = dict(zip(problem.ids, sources, strict=True))
    even = draw("source", Budget(rows=12), problem=problem)
    assert Counter(label[i] for i in even.ids) == {"small": 4, "b": 4, "c": 4}
    assert even.notes == ()
    short = draw("source", Budget(rows=45), problem=problem)
    counts = Counter(label[i] for i in short.ids)
    assert counts == {"small": 5, "b": 20, "c": 20}
    assert [n.code for n in short.notes] == ["source_exhausted"]
    assert "small (5 rows)" in short.notes[0].text


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=30))
def test_places_count_up_in_every_group(rows):
    group = np.unique([g for g, _ in rows], return_inverse=True)[1]
    draws = np.array([d for _, d in rows])
    place = place_in_group(draws, group)
    for i in range(len(rows)):
        before = [(draws[j], j) for j in range(len(rows)) if group[j] == group[i]]
        assert place[i] == sorted(before).index((draws[i], i))


@pytest.mark.parametrize("n", [1, 3, 10, 11, 29])
def test_deciles_are_even_and_ordered(n):
    tokens = np.random.default_rng(n).integers(1, 50, size=n)
    group = length_deciles(tokens)
    sizes = np.bincount(group)
    assert len(sizes) == min(10, n)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(group[np.argsort(tokens, kind="stable")]) >= 0).all()
