"""How many words a pool row shares with the target set: BM25 (no model, nothing downloaded).

Robertson and Zaragoza 2009; Lucene's variant as computed by the bm25s package (Lu 2024, arXiv 2407.03618):

    idf(w) = ln(1 + (N - df_w + 0.5) / (df_w + 0.5))
    s(row, query) = sum over the query's words w of idf(w) tf / (tf + k1 (1 - b + b |row| / mean |row|))
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float

K1 = 1.5
B = 0.75
_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Cut a text into words: runs of letters and digits of any script, compatibility-folded and lower-cased.

    Args:
        text: any text.

    Returns:
        The words in order, repeats included. Scripts written without spaces come out in runs.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def lexical_scores(ids: Sequence[str], texts: Sequence[str], target_texts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Score every pool row by its mean BM25 over the target rows.

    Document frequencies and lengths are fitted on the pool rows, read in id order; the order of either input cannot
    change a bit of the result.

    Args:
        ids: N unique row ids.
        texts: N texts, the rendered rows.
        target_texts: texts of the target rows, each one query; at least one.

    Returns:
        float64 [N] >= 0, aligned with ``ids``; 0 for a row without words or without any word of the target.

    Raises:
        ValueError: lengths differ, ids repeat or there is no target row (our own mistake).
    """
    if len(ids) != len(texts) or len(set(ids)) != len(ids) or not target_texts:
        raise ValueError("lexical_scores needs one text per unique id and at least one target text")
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    documents = [words(texts[i]) for i in order]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(w for d in documents for w in d))}
    scores = np.zeros(len(ids), dtype=np.float64)
    if not vocabulary:
        return scores
    index = _index(documents, vocabulary)
    total = np.zeros(len(ids), dtype=np.float64)
    for query in sorted(target_texts):  # sorted: a sum in float64 depends on its order
        numbers = [vocabulary[word] for word in words(query) if word in vocabulary]
        if numbers:
            total += index.get_scores_from_ids(numbers)
    scores[order] = total / len(target_texts)
    return scores


def _index(documents: list[list[str]], vocabulary: dict[str, int]):  # noqa: ANN202 - bm25s is imported lazily
    with _without_jax():
        import bm25s

    index = bm25s.BM25(k1=K1, b=B, method="lucene", dtype="float64", backend="numpy", csc_backend="numpy")
    numbers = [[vocabulary[word] for word in document] for document in documents]
    index.index((numbers, dict(vocabulary)), create_empty_token=False, show_progress=False)
    return index


@contextmanager
def _without_jax() -> Iterator[None]:
    """Hide jax from an import: bm25s runs it once to see whether it is there, and jax then takes 75% of the GPU's memory."""
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "jax"}
    for name in hidden:
        del sys.modules[name]
    sys.modules["jax"] = None  # type: ignore[assignment] - the import system's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules["jax"]
        sys.modules.update(hidden)
