"""Scores of the funnel of thtb: the golden numbers of its specification."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import DataError
from gradsift.geometry.hardness import (
    bloom_share,
    effort,
    funnel_shares,
    mean_distance,
    min_max,
    num_clusters,
    quality,
    silhouette_share,
    stage_size,
    text_silhouettes,
)
from gradsift.seeds import stream


def test_golden_quality_and_levels():
    assert quality(np.array([-7.0, -5, 0, 2.5, 5, 8])).tolist() == [0, 0, 0.5, 0.75, 1, 1]
    assert bloom_share(np.array([1.0, 6, 11, 21])).tolist() == [0, 0.25, 0.5, 1]


def test_golden_distance_of_disciplines():
    assert mean_distance([(1, 0), (0.6, 0.8), (0, 1)]) == pytest.approx(0.533333, abs=1e-6)
    assert (3 - 1) / (5 - 1) + mean_distance([(1, 0), (0.6, 0.8), (0, 1)]) == pytest.approx(1.033333, abs=1e-6)
    assert mean_distance([(3, 1)]) == mean_distance([]) == 0
    assert mean_distance([(1, 0), (-2, 0)]) == 2


def test_golden_effort():
    prompt, response = np.array([10.0, 20, 30, 50]), np.array([100.0, 40, 300, 50])
    assert min_max(prompt + response) == pytest.approx([0.185185, 0, 1, 0.148148], abs=1e-6)
    assert min_max(response / prompt) == pytest.approx([1, 0.111111, 1, 0], abs=1e-6)
    assert effort(prompt, response) == pytest.approx([0.592593, 0.055556, 1, 0.074074], abs=1e-6)
    unbounded = min_max(prompt + response) + response / prompt  # the README's form: the ratio decides alone
    assert unbounded == pytest.approx([10.185185, 2, 11, 1.148148], abs=1e-6)


def test_golden_silhouettes_clusters_and_funnel():
    assert silhouette_share(0.8, 0.4) == pytest.approx(0.75)
    assert silhouette_share(0.3, 0.6) == pytest.approx(0.25)
    assert silhouette_share(0.0, 0.0) == 0.5
    assert num_clusters(52_002) == 161
    assert num_clusters(1) == 2
    for fraction, sizes in ((0.05, [200, 100, 50]), (0.1, [400, 200, 100])):
        left, got = 1000, []
        for share in funnel_shares(fraction):
            left = stage_size(share, left)
            got.append(left)
        assert got == sizes
    assert funnel_shares(0.49) == pytest.approx((1.0, 0.7, 0.7))
    assert stage_size(0.001, 5) == 1


@given(fraction=st.floats(0.001, 1), rows=st.integers(1, 500))
@settings(derandomize=True, database=None)
def test_the_stage_before_the_last_is_never_smaller_than_the_budget(fraction, rows):
    budget = max(1, int(fraction * rows))
    shares = funnel_shares(budget / rows)
    assert stage_size(shares[1], stage_size(shares[0], rows)) >= budget


def slow_silhouettes(rows, labels):
    out = []
    for i in range(len(rows)):

        def distance(j, i=i):
            a, b = rows[i], rows[j]
            size = np.linalg.norm(a) * np.linalg.norm(b)
            return 1 - (a @ b / size if size else 0.0)

        own = [distance(j) for j in range(len(rows)) if labels[j] == labels[i] and j != i]
        others = [np.mean([distance(j) for j in range(len(rows)) if labels[j] == k]) for k in set(labels) - {labels[i]}]
        out.append(silhouette_share(min(others), float(np.mean(own))))
    return out


TEXTS = ["court judge law", "judge law court", "law judge", "cell gene", "gene cell cell", "gene protein cell", "team goal",
         "goal team team", "team referee goal"]  # fmt: skip


def test_scores_of_texts_are_those_of_the_slow_twin():
    from sklearn.feature_extraction.text import TfidfVectorizer

    got = text_silhouettes(TEXTS, 100, stream(1, "x"))
    rows = TfidfVectorizer(max_features=100).fit_transform(TEXTS).toarray()
    assert got.defined
    assert got.score == pytest.approx(slow_silhouettes(rows, got.labels.tolist()), abs=1e-9)
    assert text_silhouettes(TEXTS, 100, stream(1, "x")).labels.tolist() == got.labels.tolist()


def test_prompts_without_a_counted_word_are_no_farther_from_each_other_than_from_the_rest():
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [*TEXTS, "1 2", "a b", "x"]  # pieces of one sign: no word of the usual tokenizer, so a vector of zeros
    got = text_silhouettes(texts, 100, stream(1, "x"))
    rows = TfidfVectorizer(max_features=100).fit_transform(texts).toarray()
    assert len(set(got.labels[9:].tolist())) == 1
    assert got.score == pytest.approx(slow_silhouettes(rows, got.labels.tolist()), abs=1e-9)


def test_silhouettes_take_no_table_of_all_pairs():
    import tracemalloc

    some = [f"{TEXTS[k % 9]} word{k % 40}" for k in range(3000)]
    tracemalloc.start()
    text_silhouettes(some, 20, stream(1, "x"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 3000**2 / 2


def test_copies_get_equal_scores_and_lone_clusters_join_a_neighbor():
    got = text_silhouettes([*TEXTS, *TEXTS[:2]], 100, stream(1, "x"))
    assert got.score[0] == pytest.approx(got.score[9])
    lone = text_silhouettes([*TEXTS[:6] * 3, "zebra xylophone quartz"], 100, stream(1, "x"))
    assert lone.merged >= 1
    assert np.bincount(lone.labels).max() >= 2
    assert 1 not in np.bincount(lone.labels)[np.bincount(lone.labels) > 0]


def test_what_gives_no_two_clusters_scores_nothing():
    for texts in (TEXTS[:3], ["law law"] * 8):
        got = text_silhouettes(texts, 100, stream(1, "x"))
        assert not got.defined
        assert not got.score.any()


def test_texts_without_words_are_refused():
    with pytest.raises(DataError, match="no prompt holds a word"):
        text_silhouettes(["?", "!", "a", "1"], 100, stream(1, "x"))
