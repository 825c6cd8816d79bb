"""Entropy, seeds, quotas and the probe of daar: golden numbers, the slow twin of the gradients, planted mixtures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import DataError
from gradsift.geometry.entropy import (
    closeness,
    domain_quotas,
    entropy,
    keep_apart,
    least_probe_rows,
    num_probe_rows,
    pseudo_labels,
    seed_centroids,
    softmax,
)
from gradsift.geometry.probe import (
    ProbeConfig,
    _cross_entropy,
    _forward,
    fit_temperature,
    gradients,
    train_probe,
    widths,
)
from gradsift.seeds import stream


def test_golden_entropies():
    rows = np.array([[0.25] * 4, [0.5, 0.5, 0, 0], [0.7, 0.1, 0.1, 0.1], [0.97, 0.01, 0.01, 0.01]])
    assert entropy(rows) == pytest.approx([1.386294, 0.693147, 0.940448, 0.167701], abs=1e-6)


@given(logits=st.lists(st.floats(-30, 30), min_size=3, max_size=3), shift=st.floats(-50, 50))
@settings(derandomize=True, database=None)
def test_entropy_is_within_bounds_whatever_the_order_or_a_constant(logits, shift):
    row = np.array([logits])
    h = float(entropy(softmax(row))[0])
    assert 0 <= h <= np.log(3) + 1e-12
    assert entropy(softmax(row[:, ::-1]))[0] == pytest.approx(h, abs=1e-12)
    assert entropy(softmax(row + shift))[0] == pytest.approx(h, abs=1e-9)
    assert softmax(row, 1.0).tolist() == softmax(row).tolist()


def test_golden_geometry():
    centroids = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert closeness(np.array([0.8, 0.6]), centroids, 0) == pytest.approx((0.8, -0.2))


def test_golden_filter_is_strict():
    first = [1.0, 0.0]
    rows = {c: np.array([first, [c, np.sqrt(1 - c * c)]]) for c in (0.8, 0.88)}
    exact = np.array([first, [0.9, 0.435890]])
    assert keep_apart(rows[0.8], 0.85) == [0, 1]
    assert keep_apart(rows[0.88], 0.85) == [0]
    assert keep_apart(rows[0.88], 0.90) == [0, 1]
    assert keep_apart(exact, 0.85) == [0]
    cosine = float(exact[1] @ exact[0] / np.linalg.norm(exact[1]))
    assert keep_apart(exact, cosine) == [0]  # equal to the limit is not below it


def test_golden_quotas():
    assert domain_quotas([10] * 4, 0) == (5, 1, 1, 1)
    assert domain_quotas([20, 10, 5, 5], 0) == (10, 1, 1, 1)
    assert domain_quotas([0, 3], 0) == (0, 1)


def test_how_many_rows_the_probe_learns_from():
    assert num_probe_rows(5004, 4, 0.2, 50) == 5000
    assert num_probe_rows(5003, 4, 0.2, 50) == 1000
    assert num_probe_rows(600, 4, 0.2, 50) == 200
    assert num_probe_rows(150, 4, 0.2, 50) == 200  # more than there are: the caller refuses


@given(num=st.integers(1, 6000), domains=st.integers(2, 9), per=st.integers(1, 900))
@settings(derandomize=True, database=None)
def test_the_least_pool_is_the_smallest_that_has_as_many_rows_as_the_probe_asks_for(num, domains, per):
    enough = max(2, num_probe_rows(num, domains, 0.2, per)) <= num
    assert enough == (num >= least_probe_rows(domains, per))


def test_seeds_make_centroids_or_are_refused():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6))
    rows = np.array([a + 0.6 * rng.normal(size=6) for _ in range(4)] + [b + 0.6 * rng.normal(size=6) for _ in range(4)])
    got = seed_centroids(rows, ["x"] * 4 + ["y"] * 4, 1.0)
    assert list(got) == ["x", "y"]
    assert np.allclose(got["x"], rows[:4].mean(axis=0))
    with pytest.raises(DataError, match="domain y has too few"):
        seed_centroids(np.vstack([rows[:4], rows[4:5], rows[4:5], rows[4:5]]), ["x"] * 4 + ["y"] * 3, 0.999)
    with pytest.raises(DataError, match="domains x and y can hardly"):
        seed_centroids(np.vstack([rows[:4], rows[:4] * 1.01]), ["x"] * 4 + ["y"] * 4, 1.1)


def test_k_means_begins_at_the_centroids():
    rows = np.concatenate([np.random.default_rng(0).normal(loc=c, scale=0.1, size=(20, 2)) for c in ((0, 5), (5, 0))])
    for start, want in (([[0, 5], [5, 0]], [0] * 20 + [1] * 20), ([[5, 0], [0, 5]], [1] * 20 + [0] * 20)):
        assert pseudo_labels(rows, rows, np.array(start, dtype=float), stream(1, "k")).tolist() == want
    drawn = [pseudo_labels(rows, rows, 2, stream(1, "k")).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_gradients_equal_finite_differences():
    rng = np.random.default_rng(0)
    weights = tuple((rng.normal(size=(a, b)), rng.normal(size=b)) for a, b in ((3, 5), (5, 4), (4, 3)))
    x, labels = rng.normal(size=(7, 3)), rng.integers(3, size=7)
    got, h = gradients(weights, x, labels), 1e-6
    for k, (matrix, offset) in enumerate(weights):
        for which, array in ((2 * k, matrix), (2 * k + 1, offset)):
            for place in np.ndindex(array.shape):
                kept = array[place]
                array[place] = kept + h
                up = _cross_entropy(_forward(weights, x)[-1], labels)
                array[place] = kept - h
                down = _cross_entropy(_forward(weights, x)[-1], labels)
                array[place] = kept
                assert got[which][place] == pytest.approx((up - down) / (2 * h), abs=1e-7)


def test_the_widths_are_the_papers():
    assert widths(4096, 4) == (4096, 8192, 4096, 2048, 256, 4)
    assert widths(8, 3) == (8, 64, 64, 64, 256, 3)


def test_the_temperature_softens_and_never_sharpens():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(4000, 3))
    labels = np.array([rng.choice(3, p=p) for p in softmax(logits)])
    assert fit_temperature(logits, labels) == pytest.approx(1.0, abs=0.1)
    assert fit_temperature(logits * 4, labels) == pytest.approx(4.0, rel=0.1)
    assert fit_temperature(logits / 4, labels) == 1.0


def planted(seed, n=1600, d=12):
    """Four generators and one row in ten that is a mixture of two of them."""
    rng = np.random.default_rng(seed)
    centers = 3 * rng.normal(size=(4, d))
    domain, mixed = rng.integers(4, size=n), np.arange(n) % 10 == 0
    other = (domain + rng.integers(1, 4, size=n)) % 4
    middle = np.where(mixed[:, None], (centers[domain] + centers[other]) / 2, centers[domain])
    return middle + 0.3 * rng.normal(size=(n, d)), middle + 0.3 * rng.normal(size=(n, d)), mixed, centers


@pytest.mark.parametrize("seed", range(3))
def test_planted_mixtures_are_where_the_probe_is_unsure(seed):
    vectors, states, mixed, centers = planted(seed)
    labels = pseudo_labels(vectors, vectors, centers, stream(seed, "k"))
    probe = train_probe(states[:800], labels[:800], 4, ProbeConfig(), np.random.default_rng(seed))
    h = entropy(probe.probabilities(states))
    top = np.argsort(-h)[: mixed.sum()]
    assert probe.accuracy >= 0.8
    assert mixed[top].mean() >= 0.7  # 0.1 by chance


def test_shuffled_labels_cannot_be_learned():
    vectors, states, _, centers = planted(0)
    labels = pseudo_labels(vectors, vectors, centers, stream(0, "k"))
    rng = np.random.default_rng(0)
    assert train_probe(states[:400], rng.permutation(labels)[:400], 4, ProbeConfig(steps=100), rng).accuracy < 0.8
