"""Scores of the funnel of ``thtb``: quality, intrinsic and extrinsic hardness (thtb.md 2, in the code's bounded forms)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import DataError
from gradsift.seeds import Stream

LEAST_ROWS = 4  # silhouettes of fewer rows say nothing


def quality(reward: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Map reward scores: clip((r + 5)/10, 0, 1).

    Args:
        reward: float64 [N] scores of a reward model.

    Returns:
        float64 [N] in [0, 1].
    """
    return np.clip((reward + 5.0) / 10.0, 0.0, 1.0)


def bloom_share(level: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Map thinking levels: (b - 1)/20.

    Args:
        level: float64 [N] in [1, 21].

    Returns:
        float64 [N] in [0, 1].
    """
    return (level - 1.0) / 20.0


def min_max(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Stretch values to [0, 1]; constant values give 0.

    Args:
        values: float64 [n].

    Returns:
        float64 [n].
    """
    low, high = float(values.min()), float(values.max())
    return np.zeros(len(values)) if high == low else (values - low) / (high - low)


def mean_distance(vectors: Sequence[Sequence[float]]) -> float:
    """Average 1 - cosine over all pairs of vectors.

    Args:
        vectors: any number of vectors of one length, none zero.

    Returns:
        In [0, 2]; 0 for fewer than two vectors.
    """
    if len(vectors) < 2:
        return 0.0
    rows = np.array(vectors, dtype=np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows.T
    upper = np.triu_indices(len(rows), 1)
    return float(np.clip(1.0 - cosines[upper], 0.0, 2.0).mean())


def effort(prompt: Float[np.ndarray, " n"], response: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Score lengths: the mean of minmax(prompt + response) and minmax(response / prompt) (IREI, the code's form).

    Args:
        prompt: float64 [n] lengths, above 0.
        response: float64 [n] lengths in the same unit.

    Returns:
        float64 [n] in [0, 1].
    """
    return (min_max(prompt + response) + min_max(response / prompt)) / 2.0


def silhouette_share(nearest: float, inside: float) -> float:
    """Rescale a silhouette to [0, 1]: ((a - b)/max(a, b) + 1)/2, 1/2 where both are 0.

    Args:
        nearest: a, least mean distance to another cluster.
        inside: b, mean distance inside the own cluster.

    Returns:
        In [0, 1].
    """
    larger = max(nearest, inside)
    return 0.5 if larger == 0 else ((nearest - inside) / larger + 1.0) / 2.0


def num_clusters(num_rows: int) -> int:
    """Choose the number of clusters: floor(sqrt(n/2)), at least 2 (the rule that gives the code's 161 on Alpaca).

    Args:
        num_rows: n.

    Returns:
        K.
    """
    return max(2, int(np.floor(np.sqrt(num_rows / 2))))


def funnel_shares(fraction: float) -> tuple[float, float, float]:
    """Say which share each stage keeps, so that the last leaves the fraction of the pool that is asked for.

    Args:
        fraction: in (0, 1].

    Returns:
        4 f, 1/2 and 1/2 up to a quarter (20%, 50%, 50% at 5%, as released), then 1, sqrt(f) and sqrt(f) (ours).
    """
    if fraction <= 0.25:
        return 4.0 * fraction, 0.5, 0.5
    return 1.0, float(np.sqrt(fraction)), float(np.sqrt(fraction))


def stage_size(share: float, num_rows: int) -> int:
    """Round a stage's size down, at least 1.

    Args:
        share: in (0, 1].
        num_rows: rows that reach the stage.

    Returns:
        Rows that it keeps.
    """
    return min(num_rows, max(1, int(np.floor(share * num_rows + 1e-9))))


@dataclass(frozen=True)
class Silhouettes:
    """How each text sits in its cluster.

    Args:
        score: float64 [n] rescaled silhouettes in [0, 1]; 0 for all where there are no two clusters.
        labels: int64 [n] clusters.
        merged: clusters of one text that went to their neighbor.
        defined: False where the texts gave no two clusters, so that every score is 0.
    """

    score: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    merged: int
    defined: bool


def text_silhouettes(texts: Sequence[str], max_features: int, stream: Stream) -> Silhouettes:
    """Cluster texts by their TF-IDF vectors and score how each sits in its cluster.

    Lower case, the most frequent words, K-means with a seeded start, cosine distances. A cluster of one text goes to the
    nearest other (the released code then sets every score to 0).

    Args:
        texts: n texts in id order.
        max_features: words that count.
        stream: seeds the first centers.

    Returns:
        The scores.

    Raises:
        DataError: no text holds a word of the usual tokenizer.
    """
    n = len(texts)
    nothing = Silhouettes(np.zeros(n), np.zeros(n, dtype=np.int64), 0, defined=False)
    if n < LEAST_ROWS:
        return nothing
    rows = _tfidf(texts, max_features)
    labels, merged = _clusters(rows, stream)
    if len(np.unique(labels)) < 2:
        return nothing
    return Silhouettes(_silhouettes(rows, labels), labels, merged, defined=True)


def _tfidf(texts: Sequence[str], max_features: int) -> Float[np.ndarray, "n w"]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(max_features=max_features).fit_transform(texts).toarray()
    except ValueError as error:
        raise DataError(
            "no prompt holds a word of two letters or more, so prompts cannot be clustered",
            where=f"{len(texts)} prompts",
            got=str(error),
            expected="texts with words",
            do="choose another method for texts without words",
        ) from None


def _clusters(rows: Float[np.ndarray, "n w"], stream: Stream) -> tuple[Int[np.ndarray, " n"], int]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    distinct = len(np.unique(rows, axis=0))
    count = min(num_clusters(len(rows)), distinct)
    if count < 2:
        return np.zeros(len(rows), dtype=np.int64), 0
    seed = int(stream.numpy().integers(2**32))
    fit = KMeans(n_clusters=count, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = fit.fit_predict(rows).astype(np.int64)
    sizes = np.bincount(labels, minlength=count)
    lone, kept = np.flatnonzero(sizes == 1), np.flatnonzero(sizes > 1)
    if not len(kept):
        return np.zeros(len(rows), dtype=np.int64), len(lone)
    for k in lone.tolist():
        gap = np.linalg.norm(fit.cluster_centers_[kept] - fit.cluster_centers_[k], axis=1)
        labels[labels == k] = kept[int(np.argmin(gap))]
    return labels, len(lone)


def _silhouettes(rows: Float[np.ndarray, "n w"], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Rescaled silhouettes; distances are linear in unit vectors, so a cluster's sum stands for its rows."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(length > 0, length, 1.0)
    groups, own = np.unique(labels, return_inverse=True)
    member = own[:, None] == np.arange(len(groups))
    sizes, every = member.sum(axis=0), np.arange(len(labels))
    sums = sizes - unit @ (member.T.astype(np.float64) @ unit).T
    itself = 1.0 - np.square(unit).sum(axis=1)  # 1 for a text without a counted word, which has no direction
    inside = np.maximum(sums[every, own] - itself, 0.0) / np.maximum(sizes[own] - 1, 1)
    others = np.where(member, np.inf, np.maximum(sums, 0.0) / sizes)
    return np.array([silhouette_share(a, b) for a, b in zip(others.min(axis=1), inside, strict=True)])
