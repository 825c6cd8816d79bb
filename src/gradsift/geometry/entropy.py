"""Domains found from a few seeds, and how unsure a row's domain is (daar.md; Ling et al. 2025, arXiv 2502.04380)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import DataError
from gradsift.seeds import Stream

MOST_ROWS = 5000  # rows that the probe learns from where the pool is large enough, as in the paper


def entropy(probability: Float[np.ndarray, "N K"]) -> Float[np.ndarray, " N"]:
    """Measure how unsure distributions are: H = -sum_k p_k log p_k.

    Args:
        probability: float64 [N, K], rows that sum to 1.

    Returns:
        float64 [N] nats in [0, log K]; 0 log 0 is 0.
    """
    safe = np.where(probability > 0, probability, 1.0)
    return np.maximum(0.0, -(probability * np.log(safe)).sum(axis=1))


def softmax(logits: Float[np.ndarray, "N K"], temperature: float = 1.0) -> Float[np.ndarray, "N K"]:
    """Turn logits into probabilities.

    Args:
        logits: float64 [N, K]; a constant added to a row changes nothing.
        temperature: above 0; 1 leaves them as they are.

    Returns:
        float64 [N, K].
    """
    scaled = logits / temperature
    power = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)


def keep_apart(vectors: Float[np.ndarray, "n d"], limit: float) -> list[int]:
    """Keep each vector whose largest cosine with all kept before it is below a limit.

    Args:
        vectors: [n, d] in the order of precedence, none zero.
        limit: tau; a cosine equal to it is not below it.

    Returns:
        Places kept.
    """
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kept: list[int] = []
    for k in range(len(unit)):
        if not kept or float((unit[kept] @ unit[k]).max()) < limit:
            kept.append(k)
    return kept


def closeness(row: Float[np.ndarray, " d"], centroids: Float[np.ndarray, "K d"], domain: int) -> tuple[float, float]:
    """Compare a row with its domain and with the others (phi_intra and phi_inter of the paper).

    Args:
        row: [d].
        centroids: [K, d].
        domain: the row's own.

    Returns:
        Cosine with its centroid, and the sum of the cosines with the others.
    """
    length = np.linalg.norm(centroids, axis=1) * np.linalg.norm(row)
    cosines = centroids @ row / length
    return float(cosines[domain]), float(np.delete(cosines, domain).sum())


def seed_centroids(
    vectors: Float[np.ndarray, "n d"], names: Sequence[str], limit: float, *, least: int = 3, apart: float = 0.98
) -> Mapping[str, Float[np.ndarray, " d"]]:
    """Average the seed rows of every domain, near copies left out.

    Args:
        vectors: [n, d] embedding-layer means of the seed rows, in id order.
        names: n domains.
        limit: largest cosine with another seed row of any domain, to be undercut.
        least: seed rows that a domain must keep.
        apart: largest cosine that two centroids may have.

    Returns:
        Domain -> centroid, domains in sorted order.

    Raises:
        DataError: a domain keeps too few rows, or two domains can hardly be told apart; they are named.
    """
    kept = keep_apart(vectors, limit)
    out = {}
    for name in sorted(set(names)):
        own = [k for k in kept if names[k] == name]
        if len(own) < least:
            raise DataError(
                f"domain {name} has too few seed rows that differ",
                got=f"{len(own)} of {sum(n == name for n in names)} with cosines below {limit}",
                expected=f"at least {least}",
                do="raise --set tau, or mark more seed rows",
            )
        out[name] = vectors[own].mean(axis=0)
    _refuse_near(out, apart)
    return out


def _refuse_near(centroids: Mapping[str, Float[np.ndarray, " d"]], apart: float) -> None:
    names = list(centroids)
    for k, a in enumerate(names):
        for b in names[:k]:
            x, y = centroids[a], centroids[b]
            cosine = float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
            if cosine > apart:
                raise DataError(
                    f"the seeds of domains {b} and {a} can hardly be told apart",
                    got=f"cosine {cosine:.4f} of their centroids",
                    expected=f"at most {apart}",
                    do="merge the two domains, or choose seed rows that differ more",
                )


def pseudo_labels(
    fit_rows: Float[np.ndarray, "n d"],
    rows: Float[np.ndarray, "N d"],
    start: Float[np.ndarray, "K d"] | int,
    stream: Stream,
) -> Int[np.ndarray, " N"]:
    """Give every row the domain of its nearest centre, by K-means from the seeds' centroids.

    Args:
        fit_rows: [n, d] rows that the centres are fitted on, in id order.
        rows: [N, d] rows to label.
        start: the first centres, or a number of domains, whose first centres are drawn (k-means++, best of 10).
        stream: of the draw.

    Returns:
        int64 [N] domains in [0, K).
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    drawn = isinstance(start, int)
    fit = KMeans(
        n_clusters=start if drawn else len(start),
        init="k-means++" if drawn else np.asarray(start, dtype=np.float64),  # pyright: ignore[reportArgumentType]
        n_init=10 if drawn else 1,  # pyright: ignore[reportArgumentType] - its stubs know only "auto"
        random_state=int(stream.numpy().integers(2**32)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than domains: the others stay empty
        fit.fit(np.asarray(fit_rows, dtype=np.float64))
    return np.asarray(fit.predict(np.asarray(rows, dtype=np.float64)), dtype=np.int64)


def domain_quotas(sizes: Sequence[int], target: int, *, own: float = 0.5, other: float = 0.1) -> tuple[int, ...]:
    """Say how many rows each domain may give when one of them is the target.

    Args:
        sizes: rows per domain.
        target: the domain that is wanted most.
        own: its share.
        other: the others' share.

    Returns:
        Rows per domain: half up, at least 1 where the domain has a row.
    """
    shares = [own if k == target else other for k in range(len(sizes))]
    return tuple(min(n, max(1, int(np.floor(share * n + 0.5)))) for n, share in zip(sizes, shares, strict=True))


def num_probe_rows(num_rows: int, num_domains: int, share: float, per_domain: int, most: int = MOST_ROWS) -> int:
    """Choose how many rows the pseudo-labels and the probe are fitted on.

    Args:
        num_rows: rows of the pool.
        num_domains: K.
        share: of a pool too small for ``most`` rows.
        per_domain: least rows per domain.
        most: rows where the pool is large enough.

    Returns:
        The number; above ``num_rows`` where the pool is too small.
    """
    if num_rows >= most + num_domains:
        return most
    return max(int(np.floor(share * num_rows + 1e-9)), per_domain * num_domains)


def least_probe_rows(num_domains: int, per_domain: int, most: int = MOST_ROWS) -> int:
    """Say below which size :func:`num_probe_rows` asks for more rows than a pool has.

    Args:
        num_domains: K.
        per_domain: least rows per domain.
        most: rows where the pool is large enough.

    Returns:
        The least size, at least 2.
    """
    return max(2, min(per_domain * num_domains, most + num_domains))
