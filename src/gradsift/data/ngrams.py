"""How much likelier a row's words are in the target set than in the pool: hashed unigrams and bigrams (no model).

Xie et al. 2023, arXiv 2302.03169, section 3 (DSIR), with c(x) the counts of a text's n-grams in 10,000 hash buckets:

    p(b) = sum_x c_b(x) / sum_x sum_b' c_b'(x)
    log w(x) = sum_b c_b(x) [log(p_target(b) + 1e-8) - log(p_pool(b) + 1e-8)]
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

NUM_BUCKETS = 10_000
TINY = 1e-8
_PIECE = re.compile(r"\w+|[^\w\s]+")


def pieces(text: str) -> list[str]:
    """Cut a text into runs of letters, digits and underscores, and runs of other signs; lower case.

    Args:
        text: any text.

    Returns:
        The pieces in order.
    """
    return _PIECE.findall(text.lower())


@functools.lru_cache(maxsize=1 << 18)
def bucket(gram: str) -> int:
    """Hash an n-gram: SHA-256 of its UTF-8 bytes, modulo the number of buckets.

    Args:
        gram: pieces joined by spaces.

    Returns:
        A number in [0, ``NUM_BUCKETS``).
    """
    digest = hashlib.sha256(gram.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % NUM_BUCKETS


def count_ngrams(text: str) -> Counter[int]:
    """Count a text's unigrams and bigrams by bucket.

    Args:
        text: any text.

    Returns:
        Bucket -> how many n-grams fall into it; n pieces give 2 n - 1 n-grams.
    """
    some = pieces(text)
    counts = Counter(bucket(gram) for gram in some)
    counts.update(bucket(f"{a} {b}") for a, b in pairwise(some))
    return counts


def total(counts: Iterable[Counter[int]]) -> Int[np.ndarray, " B"]:
    """Add counts up.

    Args:
        counts: of any texts.

    Returns:
        int64 [``NUM_BUCKETS``].
    """
    out = np.zeros(NUM_BUCKETS, dtype=np.int64)
    for some in counts:
        for b, n in some.items():
            out[b] += n
    return out


def importance_weights(texts: Sequence[str], target_texts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Compute the log importance weight of every text.

    Args:
        texts: N texts of the pool; the pool's distribution is that of these.
        target_texts: texts of the target set, at least one.

    Returns:
        float64 [N] in nats; 0 for a text without n-grams. Longer texts have larger weights, whatever their sign.

    Raises:
        ValueError: there is no target text (our own mistake).
    """
    if not target_texts:
        raise ValueError("importance_weights needs at least one target text")
    counts = [count_ngrams(text) for text in texts]
    pool, target = total(counts), total(count_ngrams(text) for text in target_texts)
    if not pool.sum() or not target.sum():
        return np.zeros(len(texts))
    ratio = np.log(target / target.sum() + TINY) - np.log(pool / pool.sum() + TINY)
    # By bucket and not as they come, so that the order of a text's words cannot change the last bit.
    return np.array([sum(n * float(ratio[b]) for b, n in sorted(some.items())) for some in counts], dtype=np.float64)
