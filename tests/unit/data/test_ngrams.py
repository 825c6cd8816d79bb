"""Hashed n-gram importance weights against a slow twin, and against the package of the paper's authors where it is there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.data.ngrams import NUM_BUCKETS, bucket, count_ngrams, importance_weights, pieces

TEXT = st.text(alphabet="ab .,\u00e9", max_size=20)
POOL = ["The court ruled.", "Cells divide, cells grow!", "the COURT of cells", "", "It's 42_x: 3.5%"]
TARGET = ["the court", "court ruled; the judge left"]


def slow(texts, targets):
    """By the definition: dictionaries of strings, hashed at the very end."""

    def grams(text):
        out, run, kind = [], "", ""
        for c in [*text.lower(), " "]:
            now = "" if c.isspace() else "w" if c.isalnum() or c == "_" else "p"
            if now != kind:
                out += [run] if run else []
                run, kind = "", now
            run += "" if c.isspace() else c
        return out + [f"{a} {b}" for a, b in pairwise(out)]

    def share(some):
        counts = Counter(int(hashlib.sha256(g.encode()).hexdigest(), 16) % 10_000 for t in some for g in grams(t))
        return {b: n / sum(counts.values()) for b, n in counts.items()}

    p, q = share(targets), share(texts)
    return [
        sum(
            math.log(p.get(b, 0.0) + 1e-8) - math.log(q[b] + 1e-8)
            for g in grams(t)
            for b in [int(hashlib.sha256(g.encode()).hexdigest(), 16) % 10_000]
        )
        for t in texts
    ]


def test_the_weights_are_those_of_the_slow_twin():
    assert np.allclose(importance_weights(POOL, TARGET), slow(POOL, TARGET), rtol=1e-12, atol=1e-12)


@given(texts=st.lists(TEXT, min_size=1, max_size=5), targets=st.lists(TEXT, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_weights_are_those_of_the_slow_twin(texts, targets):
    got = importance_weights(texts, targets)
    if sum(map(len, map(pieces, texts))) and sum(map(len, map(pieces, targets))):
        assert np.allclose(got, slow(texts, targets), rtol=1e-10, atol=1e-10)
    else:
        assert not got.any()
    turned = importance_weights(texts[::-1], targets[::-1])[::-1]
    assert turned.tolist() == got.tolist()  # to the last bit, whatever the order


def test_pieces_and_counts():
    assert pieces("It's 42_x: 3.5%") == ["it", "'", "s", "42_x", ":", "3", ".", "5", "%"]
    counts = count_ngrams("a b a b")
    assert sum(counts.values()) == 7  # four unigrams, three bigrams
    assert counts[bucket("a")] == counts[bucket("b")] == counts[bucket("a b")] == 2
    assert 0 <= bucket("court") < NUM_BUCKETS
    assert importance_weights(["", "x"], ["x"])[0] == 0.0


def test_a_row_that_repeats_the_target_weighs_more_than_one_that_shares_nothing():
    got = importance_weights(["court judge law", "cell gene enzyme"], ["court judge", "judge law"])
    assert got[0] > 0 > got[1]


def test_the_weights_are_those_of_the_authors_package(tmp_path):
    """In an interpreter of its own, so that the package's folder touches no other import."""
    folder = os.environ.get("GRADSIFT_DATA_SELECTION", "")
    code = """
import json, sys
if sys.argv[2]: sys.path.append(sys.argv[2])
try:
    from data_selection import HashedNgramDSIR
except ImportError as error:
    print(json.dumps({"absent": str(error)})); raise SystemExit
pool, target, cache = sys.argv[1] + "/pool.jsonl", sys.argv[1] + "/target.jsonl", sys.argv[1] + "/cache"
dsir = HashedNgramDSIR([pool], [target], cache, num_proc=1)
dsir.fit_importance_estimator(num_tokens_to_fit="all")
texts = [json.loads(line)["text"] for line in open(pool)]
print(json.dumps({"weights": [float(dsir.importance_estimator(dsir.featurizer(t))) for t in texts]}))
"""
    for name, texts in (("pool", [t for t in POOL if t]), ("target", TARGET)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if "absent" in found:
        pytest.skip(f"pip install data-selection, or set GRADSIFT_DATA_SELECTION to its folder ({found['absent']})")
    assert np.allclose(importance_weights([t for t in POOL if t], TARGET), found["weights"], rtol=1e-12)
    assert Path(tmp_path / "cache").exists()
