"""BM25 against the formula written out word by word."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.data.lexical import K1, B, lexical_scores, words

LETTERS = st.text(alphabet="abc ", max_size=12)


def slow_bm25(texts, targets):
    documents = [words(t) for t in texts]
    average = sum(map(len, documents)) / len(documents)
    frequency = Counter(w for d in documents for w in set(d))

    def score(document, query):
        total = 0.0
        for word in query:
            tf = document.count(word)
            idf = math.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            total += idf * tf / (tf + K1 * (1 - B + B * len(document) / average)) if tf else 0.0
        return total

    return [sum(score(d, words(q)) for q in targets) / len(targets) for d in documents]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(texts=st.lists(LETTERS, min_size=1, max_size=8), targets=st.lists(LETTERS, min_size=1, max_size=4))
def test_scores_equal_the_formula(texts, targets):
    ids = [f"r{i}" for i in range(len(texts))]
    np.testing.assert_allclose(lexical_scores(ids, texts, targets), slow_bm25(texts, targets), rtol=1e-12, atol=1e-12)


def test_the_order_of_rows_and_targets_does_not_change_a_bit():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(vocabulary, size=rng.integers(0, 30))) for _ in range(50)]
    targets = [" ".join(rng.choice(vocabulary, size=12)) for _ in range(9)]
    ids = [f"r{i:02d}" for i in range(50)]
    scores = lexical_scores(ids, texts, targets)
    assert scores.dtype == np.float64
    order = rng.permutation(50)
    again = lexical_scores([ids[i] for i in order], [texts[i] for i in order], targets[::-1])
    assert again.tobytes() == scores[order].tobytes()


def test_a_row_that_shares_words_scores_above_one_that_does_not():
    texts = ["The patient has no fever today, and no pain.", "Solve for x: 2x = 4", "", "FEVER patient fever"]
    scores = lexical_scores(["a", "b", "c", "d"], texts, ["Which drug lowers a patient's fever?"])
    assert scores[3] > scores[0] > 0
    assert scores[1] == scores[2] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop_me, 3.5%!", ["don", "t", "stop", "me", "3", "5"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("\ufb01ne \uff37\uff49\uff44\uff45", ["fine", "wide"]),
        ("Привет, 世界", ["привет", "世界"]),
        (" \n\t--- ", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_pools_and_targets_without_words_score_zero():
    assert lexical_scores(["a", "b"], ["", "..."], ["word"]).tolist() == [0, 0]
    assert lexical_scores(["a"], ["word"], ["", "other"]).tolist() == [0]


def test_nothing_is_printed(capfd):
    lexical_scores(["a", "b"], ["x y", "y z"], ["y"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ids", "texts", "targets"), [(["a", "a"], ["x", "y"], ["x"]), (["a"], [], ["x"]), (["a"], ["x"], [])]
)
def test_our_own_mistakes_are_refused(ids, texts, targets):
    with pytest.raises(ValueError):
        lexical_scores(ids, texts, targets)


def test_jax_is_not_started_and_comes_back():
    """bm25s runs jax at import where it is installed, and jax takes most of a GPU's memory at once."""
    code = (
        "import sys, types\n"
        "mine = types.ModuleType('jax'); mine.__path__ = []; sys.modules['jax'] = mine\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name.partition('.')[0] != 'jax', 'jax was imported'\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from gradsift.data.lexical import lexical_scores\n"
        "scores = lexical_scores(['a', 'b'], ['one two', 'three'], ['two'])\n"
        "import bm25s.selection\n"
        "print(scores[0] > 0, bm25s.selection.JAX_IS_AVAILABLE, sys.modules['jax'] is mine)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "False", "True"]
