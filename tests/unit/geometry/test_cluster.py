"""Spherical k-means: planted groups, determinism, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from gradsift.errors import NumericsError
from gradsift.geometry.cluster import default_num_clusters, spherical_kmeans
from gradsift.seeds import stream


def planted(n=120, k=5, d=16, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(k, size=n)
    centers = np.linalg.qr(rng.normal(size=(d, d)))[0][:k]
    length = np.exp(rng.normal(size=(n, 1)))  # spherical: lengths must not matter
    return (length * (centers[truth] + 0.05 * rng.normal(size=(n, d)))).astype(np.float32), truth


def names(sketch):
    return tuple(f"r{i}" for i in range(len(sketch)))


def test_planted_groups_are_found():
    sketch, truth = planted()
    found = spherical_kmeans(sketch, stream(0, "c"), ids=names(sketch), num_clusters=5)
    pairs = set(zip(truth.tolist(), found.labels.tolist(), strict=True))
    assert len(pairs) == 5
    assert found.sizes.sum() == len(sketch)
    np.testing.assert_array_equal(found.sizes, np.bincount(found.labels))
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-5)


def test_every_row_belongs_to_the_centre_of_largest_cosine():
    sketch = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    found = spherical_kmeans(sketch, stream(3, "c"), ids=names(sketch))
    cosine = [[row @ c / np.linalg.norm(row) for c in found.centers.astype(np.float64)] for row in sketch]
    np.testing.assert_array_equal(found.labels, np.argmax(cosine, axis=1))


def test_lengths_do_not_matter_and_the_input_stays_as_it_is():
    sketch, _ = planted()
    before = sketch.copy()
    first = spherical_kmeans(sketch, stream(0, "c"), ids=names(sketch))
    scaled = sketch * np.float32(2.0) ** np.arange(-3, 3).repeat(20)[:, None].astype(np.float32)
    np.testing.assert_array_equal(first.labels, spherical_kmeans(scaled, stream(0, "c"), ids=names(sketch)).labels)
    np.testing.assert_array_equal(sketch, before)


def test_the_same_stream_gives_the_same_bits_and_labels_count_up():
    sketch = np.random.default_rng(2).normal(size=(200, 8)).astype(np.float32)
    first, again, other = (spherical_kmeans(sketch, stream(s, "c"), ids=names(sketch)) for s in (0, 0, 1))
    assert first.centers.tobytes() == again.centers.tobytes()
    assert first.labels.tobytes() == again.labels.tobytes()
    assert first.labels.tobytes() != other.labels.tobytes()
    seen = list(dict.fromkeys(first.labels.tolist()))
    assert seen == list(range(len(seen)))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 3), (19_999, 10), (20_000, 28), (40_000, 40), (1_000_000, 64)])
def test_the_number_of_clusters_follows_the_size_of_the_pool(n, k):
    assert default_num_clusters(n) == k


def test_there_are_never_more_clusters_than_rows_or_distinct_directions():
    sketch = np.eye(4, dtype=np.float32)[:3]
    assert len(spherical_kmeans(sketch, stream(0, "c"), ids=names(sketch), num_clusters=9).sizes) == 3
    same = np.ones((30, 4), dtype=np.float32)
    found = spherical_kmeans(same, stream(0, "c"), ids=names(same))
    assert found.sizes.tolist() == [30]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_sketch_without_a_direction_is_refused_by_row(bad):
    sketch, _ = planted()
    sketch[17] = bad
    with pytest.raises(NumericsError, match="r17"):
        spherical_kmeans(sketch, stream(0, "c"), ids=names(sketch))
