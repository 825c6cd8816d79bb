"""Clusters of domain and general rows, made apart, and the fixed statistics a policy sees of them (ogs.md 2.6, 2.7)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from gradsift.errors import ConfigError, SignalError
from gradsift.geometry.cluster import Clusters, default_num_clusters, spherical_kmeans
from gradsift.geometry.rows import part_of
from gradsift.geometry.similarity import orthogonality
from gradsift.policy.episodes import Table
from gradsift.policy.plan import Effects
from gradsift.seeds import Stream
from gradsift.types import Problem

CHUNK_ROWS = 4096


def make_clusters(
    problem: Problem, general: Bool[np.ndarray, " N"], stream: Stream, num_clusters: int | None = None
) -> Clusters:
    """Group domain rows and general rows apart, so that a choice of cluster is a choice between learning and replay.

    Args:
        problem: the pool, with sketches.
        general: bool [N] general rows.
        stream: of the clustering.
        num_clusters: K over both kinds; by :func:`default_num_clusters` when None. General rows get their share of it,
            at least one cluster, and leave at least one to domain rows.

    Returns:
        Labels, centres and sizes over all rows; there may be fewer clusters than asked where directions coincide.

    Raises:
        SignalError: the sketch was not measured.
        ConfigError: fewer clusters than kinds of rows.
    """
    if problem.sketch is None:
        raise _missing("sketch")
    wanted = default_num_clusters(problem.size) if num_clusters is None else num_clusters
    kinds = [(name, np.flatnonzero(rows)) for name, rows in (("domain", ~general), ("general", general))]
    kinds = [(name, rows) for name, rows in kinds if len(rows)]
    if wanted < len(kinds):
        raise ConfigError(
            "too few clusters to keep domain and general rows apart",
            where="policy: number of clusters",
            got=wanted,
            expected=f"at least {len(kinds)}",
            do="ask for more clusters",
        )
    share = round(wanted * float(general.mean()))
    num_general = min(max(share, 1), wanted - 1) if len(kinds) == 2 else wanted
    labels, centers = np.zeros(problem.size, dtype=np.int64), []
    for name, rows in kinds:
        num = num_general if name == "general" else wanted - num_general * (len(kinds) - 1)
        ids = tuple(problem.ids[i] for i in rows)
        found = spherical_kmeans(part_of(problem.sketch, rows), stream.child(name), ids=ids, num_clusters=num)
        labels[rows] = found.labels + sum(map(len, centers))
        centers.append(found.centers)
    # numbered by first row, as everywhere
    used, first = np.unique(labels, return_index=True)
    number = np.empty(len(used), dtype=np.int32)
    number[np.argsort(first)] = np.arange(len(used), dtype=np.int32)
    labels = number[labels]
    return Clusters(labels, np.concatenate(centers)[np.argsort(first)], np.bincount(labels).astype(np.int64))


def describe_clusters(
    problem: Problem,
    clusters: Clusters,
    general: Bool[np.ndarray, " N"],
    stream: Stream,
    *,
    unit: Literal["rows", "tokens"] = "rows",
    tau: float = 0.0,
) -> Table:
    """Measure what stays fixed about each cluster.

    Per anchor: mean Orth, mean cosine, cosine of the cluster's mean gradient (exact dots over the length of the mean
    sketch), standard deviation of the cosine, share of rows with cosine < -tau. For the target: mean cosine and cosine of
    the mean gradient. And mean loss, log size, whether it is general.

    Args:
        problem: the pool: loss, norms, anchor dots, target dots, sketches.
        clusters: groups of its rows, none of which mixes domain and general rows.
        general: bool [N] general rows.
        stream: of the order of rows within a cluster: by the draw of their ids, so that a list cut anywhere is a random
            draw of the cluster.
        unit: what a row takes from the budget: 1, or its trained tokens.
        tau: cosines below -tau count as conflicting, at least 0.

    Returns:
        The table of clusters.

    Raises:
        SignalError: a signal was not measured.
        ValueError: a cluster mixes domain and general rows.
    """
    labels, k = clusters.labels, len(clusters.sizes)
    num_general = np.bincount(labels, general, minlength=k)
    if ((num_general > 0) & (num_general < clusters.sizes)).any():
        raise ValueError("a cluster mixes domain and general rows; make_clusters keeps them apart")
    columns: list[tuple[str, Float[np.ndarray, " K"]]] = []
    cos, target_cos, loss = _need(problem, "anchor_cos"), _need(problem, "target_cos"), _need(problem, "loss")
    length = _mean_lengths(problem, clusters)
    for m, anchor in enumerate(problem.anchors):
        mean = _mean(cos[:, m], clusters)
        columns += [
            (f"orth_{anchor.name}", _mean(orthogonality(cos[:, m]), clusters)),
            (f"cos_{anchor.name}", mean),
            (f"mean_gradient_cos_{anchor.name}", _over(_mean(_need(problem, "anchor_dot")[:, m], clusters), length)),
            (f"cos_sd_{anchor.name}", np.sqrt(_mean((cos[:, m] - mean[labels]) ** 2, clusters))),
            (f"conflicting_{anchor.name}", _mean((cos[:, m] < -tau).astype(np.float64), clusters)),
        ]
    columns += [
        ("cos_target", _mean(target_cos, clusters)),
        ("mean_gradient_cos_target", _over(_mean(_need(problem, "target_dot"), clusters), length)),
        ("loss", _mean(loss, clusters)),
        ("log_size", np.log(clusters.sizes)),
        ("is_general", (num_general > 0).astype(np.float64)),
    ]
    order = np.argsort(stream.uniform(problem.ids), kind="stable")
    members = tuple(tuple(int(i) for i in order[labels[order] == c]) for c in range(k))
    price = np.ones(problem.size, dtype=np.int64) if unit == "rows" else problem.num_trained.astype(np.int64)
    features = np.column_stack([values for _, values in columns])
    return Table(members, price, features, tuple(name for name, _ in columns), num_general > 0)


def first_order_effects(problem: Problem, clusters: Clusters, step_size: float = 1.0) -> Effects:
    """What a step on a mean of a cluster's rows does to the losses to first order (ogs.md 2.2).

    Args:
        problem: the pool, with dots and directions.
        clusters: groups of its rows.
        step_size: length of the step per unit of gradient, eta times the updates of a decision.

    Returns:
        [K] gains and [K, M] harms, in nats at the true step size.

    Raises:
        SignalError: a signal was not measured.
    """
    if problem.target is None:
        raise _missing("target")
    anchors = np.array([anchor.norm for anchor in problem.anchors])
    gain = _mean(_need(problem, "target_dot"), clusters) * problem.target.norm
    dots = _need(problem, "anchor_dot")
    means = np.array([_mean(dots[:, m], clusters) for m in range(len(anchors))]).reshape(len(anchors), -1).T
    return Effects(step_size * gain, -step_size * means * anchors)


def _mean(values: Float[np.ndarray, " N"], clusters: Clusters) -> Float[np.ndarray, " K"]:
    return np.bincount(clusters.labels, values, minlength=len(clusters.sizes)) / clusters.sizes


def _mean_lengths(problem: Problem, clusters: Clusters) -> Float[np.ndarray, " K"]:
    """Length of each cluster's mean gradient, estimated from the sketches."""
    sketch = _need(problem, "sketch")
    total = np.zeros((len(clusters.sizes), sketch.shape[1]))
    for start in range(0, len(sketch), CHUNK_ROWS):  # sketches may be memory-mapped and larger than memory
        rows = slice(start, start + CHUNK_ROWS)
        np.add.at(total, clusters.labels[rows], np.asarray(sketch[rows], dtype=np.float64))
    return np.linalg.norm(total, axis=1) / clusters.sizes


def _over(dots: Float[np.ndarray, " K"], length: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """Cosines; 0 for a mean gradient of length 0, and within [-1, 1] because the length is an estimate."""
    return np.clip(dots / np.where(length > 0, length, np.inf), -1.0, 1.0)


def _need(problem: Problem, name: str) -> np.ndarray:
    values = getattr(problem, name)
    if values is None:
        raise _missing(name)
    return values


def _missing(name: str) -> SignalError:
    return SignalError(
        f"signal {name} was not measured",
        where="policy: statistics of the clusters",
        expected="loss, gradient norms, dots with anchors and target, sketches",
        do="collect the signals with anchors and a target",
    )
