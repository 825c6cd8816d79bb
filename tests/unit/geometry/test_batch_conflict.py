"""Conflict of batches: golden values, formula against simulation, exact sums, serpentine dealing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.geometry.batch import batch_conflict, predicted_conflict, serpentine

GOLDEN = [
    (-0.05, 0.0, 1, -0.0500), (-0.05, 0.0, 16, -0.1964), (-0.05, 0.0, 64, -0.3718), (-0.05, 0.0, 256, -0.6252),
    (-0.05, 0.0, 1024, -0.8483), (-0.02, 0.0, 64, -0.1580), (-0.02, 0.0, 256, -0.3048),
    (-0.05, 0.05, 64, -0.1927), (-0.05, 0.05, 256, -0.2109), (-0.05, 0.05, 10**12, -0.2182),
]  # fmt: skip


@pytest.mark.parametrize(("c", "rho", "size", "want"), GOLDEN)
def test_golden_formula(c, rho, size, want):
    assert predicted_conflict(c, rho, size) == pytest.approx(want, abs=5e-5)


def measure(g, anchors, size, seed=0, num_batches=200):
    return batch_conflict(
        g @ anchors.T, np.linalg.norm(g, axis=1), g, size, np.random.default_rng(seed), num_batches=num_batches
    )


def test_golden_pair_is_exact():
    g = np.array([[-0.6, 0.8, 0.0], [-0.6, 0.0, 0.8]])
    found = measure(g, np.array([[1.0, 0.0, 0.0]]), 2)
    for value in (found.whole[0], found.random[1, 0], found.ordered[1, 0], found.predicted[0]):
        assert value == pytest.approx(-0.7276, abs=5e-5)
    assert found.mean_cos[0] == pytest.approx(-0.6)
    assert found.shared[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("c", "rho"), [(-0.05, 0.0), (-0.05, 0.05), (-0.2, 0.02)])
def test_formula_agrees_with_simulation(c, rho):
    """Unit rows c u + sqrt(rho) v + rest, the rest orthogonal to both and (nearly) to each other."""
    rng, dim, k = np.random.default_rng(3), 4096, 512
    rest = rng.normal(size=(k, dim)) / np.sqrt(dim)
    rest[:, :2] = 0
    rest *= np.sqrt(1 - c * c - rho) / np.linalg.norm(rest, axis=1, keepdims=True)
    rest[:, 0], rest[:, 1] = c, np.sqrt(rho)
    anchor = np.eye(dim)[:1]
    found = measure(rest, anchor, 64)
    assert found.predicted[0] == pytest.approx(predicted_conflict(c, rho, 64), abs=0.005)
    assert found.random[1, 0] == pytest.approx(found.predicted[0], abs=0.005)
    assert found.whole[0] == pytest.approx(predicted_conflict(c, found.shared[0], k), abs=0.005)


def test_sums_are_those_of_the_batches_themselves():
    rng = np.random.default_rng(0)
    g, anchors = rng.normal(size=(23, 8)), np.linalg.qr(rng.normal(size=(8, 2)))[0].T
    found = measure(g, anchors, 5)
    batches = [g[s : s + 5].sum(axis=0) for s in (0, 5, 10, 15)]  # the short last batch is no batch of 5
    cos = np.array([anchors @ b / np.linalg.norm(b) for b in batches])
    np.testing.assert_allclose(found.ordered, np.percentile(cos, (5, 50, 95), axis=0))
    np.testing.assert_allclose(found.whole, anchors @ g.sum(axis=0) / np.linalg.norm(g.sum(axis=0)))
    pairs = [(i, j) for i in range(23) for j in range(23) if i != j]
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    outside = [unit - np.outer(unit @ a, a) for a in anchors]
    np.testing.assert_allclose(found.shared, [np.mean([e[i] @ e[j] for i, j in pairs]) for e in outside], atol=1e-12)
    again = measure(g, anchors, 5)
    np.testing.assert_array_equal(found.random, again.random)


def test_length_from_sketches_is_unbiased_in_the_square():
    rng = np.random.default_rng(1)
    g = rng.normal(size=(30, 50))
    squares = []
    for _ in range(400):
        signs = rng.choice([-1.0, 1.0], size=(50, 64)) / 8.0
        squares.append(((g @ signs).sum(axis=0) ** 2).sum())
    true = float((g.sum(axis=0) ** 2).sum())
    assert abs(np.mean(squares) - true) < 4 * np.std(squares) / 20


def test_few_rows_and_bad_calls():
    one = measure(np.array([[3.0, -4.0]]), np.array([[0.0, 1.0]]), 64)
    assert one.batch_size == 1
    assert one.whole[0] == pytest.approx(-0.8)
    cancel = measure(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([[0.0, 1.0]]), 2)
    assert np.isnan(cancel.whole).all()  # a vanishing sum has no direction
    with pytest.raises(ValueError, match="0 rows"):
        measure(np.zeros((0, 2)), np.array([[0.0, 1.0]]), 2)
    assert np.isnan(predicted_conflict(0.0, -0.5, 64))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_serpentine_deals_every_row_once_and_evenly(k, size, seed):
    rng = np.random.default_rng(seed)
    order, binding = rng.permutation(k), rng.normal(size=k)
    dealt = serpentine(order, binding, size)
    assert sorted(dealt) == list(range(k))
    np.testing.assert_array_equal(dealt, serpentine(order, binding, size))
    place = {int(row): i for i, row in enumerate(order)}
    value = dict(zip(order.tolist(), binding.tolist(), strict=True))
    full = [dealt[s : s + size] for s in range(0, k - size + 1, size)]
    for batch in full:
        assert [place[int(r)] for r in batch] == sorted(place[int(r)] for r in batch)
    if len(full) > 1:
        means = [np.mean([value[int(r)] for r in batch]) for batch in full]
        spread = max(value.values()) - min(value.values())
        assert max(means) - min(means) <= spread / size + 1e-12


def test_serpentine_balances_where_score_order_does_not():
    binding = np.linspace(-1, 1, 256)
    order = np.arange(256)
    dealt = serpentine(order, binding, 64)
    assert np.abs(binding[dealt].reshape(4, 64).mean(axis=1)).max() < 0.01
    assert np.abs(binding.reshape(4, 64).mean(axis=1)).max() > 0.7
