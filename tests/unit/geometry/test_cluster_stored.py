"""Clusters of sketches that stay on the disk: planted groups, the same whatever the blocks, rows named that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from gradsift.errors import NumericsError
from gradsift.geometry import cluster
from gradsift.geometry.cluster import spherical_kmeans
from gradsift.seeds import stream
from gradsift.types import StoredRows


class Shelf:
    """Stored rows over an array, with blocks in an order of their own; counts what is read."""

    def __init__(self, rows, order=None):
        self.rows, self.shape, self.largest = rows, rows.shape, 0
        self.order = np.arange(len(rows)) if order is None else order

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        found = self.rows[rows]
        self.largest = max(self.largest, len(found))
        return found

    def part(self, rows):
        return Shelf(self.rows[rows])

    def blocks(self, num_rows=4096):
        for start in range(0, len(self.order), num_rows):
            at = self.order[start : start + num_rows]
            yield at, self.rows[at]


def planted(n=6000, k=6, d=24, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(k, size=n)
    centers = np.linalg.qr(rng.normal(size=(d, d)))[0][:k]
    length = np.exp(rng.normal(size=(n, 1)))
    return (length * (centers[truth] + 0.05 * rng.normal(size=(n, d)))).astype(np.float32), truth


@pytest.fixture
def few(monkeypatch):
    """The fit holds 500 rows of 24 numbers."""
    monkeypatch.setattr(cluster, "FITTED_BYTES", 500 * 4 * 24)


def names(sketch):
    return tuple(f"r{i}" for i in range(len(sketch)))


def found(sketch, order=None, seed=0, k=6):
    return spherical_kmeans(Shelf(sketch, order), stream(seed, "c"), ids=names(sketch), num_clusters=k)


def test_planted_groups_are_found_without_reading_everything_at_once(few):
    sketch, truth = planted()
    shelf = Shelf(sketch)
    assert isinstance(shelf, StoredRows)
    groups = spherical_kmeans(shelf, stream(0, "c"), ids=names(sketch), num_clusters=6)
    assert len(set(zip(truth.tolist(), groups.labels.tolist(), strict=True))) == 6
    np.testing.assert_array_equal(groups.sizes, np.bincount(groups.labels))
    np.testing.assert_allclose(np.linalg.norm(groups.centers, axis=1), 1, atol=1e-5)
    assert shelf.largest == 500


def test_where_all_rows_fit_the_result_is_that_of_an_array_bit_for_bit():
    sketch, _ = planted(n=700)
    want = spherical_kmeans(sketch, stream(4, "c"), ids=names(sketch), num_clusters=6)
    got = found(sketch, np.random.default_rng(1).permutation(700), seed=4)
    assert got.centers.tobytes() == want.centers.tobytes()
    assert got.labels.tobytes() == want.labels.tobytes()


def test_the_rows_of_the_fit_are_drawn_by_id_and_never_fewer_than_the_clusters_need(monkeypatch):
    ids = tuple(f"r{i}" for i in range(1000))
    monkeypatch.setattr(cluster, "FITTED_BYTES", 100 * 4 * 8)
    rows = cluster._drawn((1000, 8), stream(0, "c"), ids, 2)
    assert len(rows) == 100
    turned = cluster._drawn((1000, 8), stream(0, "c"), ids[::-1], 2)
    assert {ids[i] for i in rows} == {ids[::-1][i] for i in turned}
    assert len(cluster._drawn((1000, 8), stream(0, "c"), ids, 10)) == 320
    assert len(cluster._drawn((50, 8), stream(0, "c"), ids[:50], 10)) == 50


def test_every_row_belongs_to_the_center_of_largest_cosine_and_labels_count_up():
    sketch = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32)
    groups = found(sketch, k=7)
    cosine = [[row @ c / np.linalg.norm(row) for c in groups.centers.astype(np.float64)] for row in sketch]
    np.testing.assert_array_equal(groups.labels, np.argmax(cosine, axis=1))
    assert list(dict.fromkeys(groups.labels.tolist())) == list(range(len(groups.sizes)))


def test_the_order_of_the_disk_and_the_lengths_of_rows_do_not_matter_but_the_seed_does():
    sketch = np.random.default_rng(2).normal(size=(3000, 8)).astype(np.float32)
    first = found(sketch)
    shuffled = np.random.default_rng(3).permutation(len(sketch))
    assert found(sketch, shuffled).labels.tobytes() == first.labels.tobytes()
    scaled = sketch * np.float32(2.0) ** (np.arange(len(sketch)) % 5 - 2)[:, None].astype(np.float32)
    assert found(scaled).labels.tobytes() == first.labels.tobytes()
    assert found(sketch, seed=1).labels.tobytes() != first.labels.tobytes()


def test_there_are_never_more_groups_than_rows_or_directions():
    assert len(found(np.eye(4, dtype=np.float32)[:3], k=9).sizes) == 3
    assert found(np.ones((30, 4), dtype=np.float32), k=5).sizes.tolist() == [30]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_sketch_without_a_direction_is_refused_by_row(bad):
    sketch, _ = planted(n=300)
    sketch[17] = bad
    with pytest.raises(NumericsError, match="r17"):
        found(sketch)


def test_a_row_that_was_not_drawn_is_refused_all_the_same(few):
    sketch, _ = planted()
    rows = cluster._drawn(sketch.shape, stream(0, "c"), names(sketch), 6)
    left = int(np.setdiff1d(np.arange(len(sketch)), rows)[0])
    sketch[left] = 0.0
    with pytest.raises(NumericsError, match=f"r{left}"):
        found(sketch)
