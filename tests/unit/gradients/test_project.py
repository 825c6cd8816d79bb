"""The sign-fold sketch: same bits everywhere, unbiased, as noisy as a random-sign hash and no more."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError
from gradsift.gradients import project
from gradsift.gradients.project import Projector, cell_shape, fold_, is_prime, signs, sketch_matrix, sketch_reference

# Committed vectors: version -> first signs, offset, digest of 100,000 signs. If one changes, every stored sketch becomes
# incomparable: raise project.VERSION instead. signfold-1 had no cells, but the same generator.
NAME = "model.layers.0.self_attn.q_proj.weight"
BITS = {
    "signfold-1": ([1, -1, -1, 1, -1, 1, 1, -1, 1, -1, -1, -1, 1, 1, 1, 1], 2507, "0a773e433f2929bc"),
    "signfold-2": ([-1, 1, -1, -1, 1, 1, 1, 1, -1, 1, 1, -1, 1, -1, 1, -1], 2186, "a56bffa8152dc765"),
}


@pytest.mark.parametrize("version", BITS)
def test_signs_have_the_committed_bits(version, monkeypatch):
    assert list(BITS)[-1] == project.VERSION
    monkeypatch.setattr(project, "VERSION", version)
    first, offset, digest = BITS[version]
    got = signs(42, NAME, "row", 100_000)
    assert got[:16].tolist() == first
    assert hashlib.blake2b(got.tobytes(), digest_size=8).hexdigest() == digest
    assert Projector(42, 4093).offset(NAME) == offset


def test_signs_are_balanced_and_differ_by_name_axis_and_seed():
    base = signs(1, "a", "row", 4096).astype(int)
    assert abs(base.sum()) < 5 * 64
    for other in (signs(2, "a", "row", 4096), signs(1, "b", "row", 4096), signs(1, "a", "col", 4096)):
        assert abs((base * other).sum()) < 5 * 64
    assert (signs(1, "a", "row", 10) == base[:10]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([3, 7, 31]), st.integers(0, 10**6), st.data())
def test_fast_sketches_equal_the_entry_by_entry_one(rows, cols, dim, seed, data):
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, cols)))
    projector = Projector(seed, dim)
    row, col = (signs(seed, "w", axis, n) for axis, n in (("row", rows), ("col", cols)))
    flipped = (matrix * torch.from_numpy(row[:, None] * col).double()).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "CELLS", data.draw(st.sampled_from([1, 5, 50, 10**6])))
        high, wide = cell_shape(rows, cols)
        want = sketch_reference(matrix.numpy(), projector, "w")
        np.testing.assert_allclose(sketch_matrix(matrix, projector, "w"), want, atol=1e-12)
    cells = np.zeros((high, wide))
    for low in range(0, rows, high):
        for left in range(0, cols, wide):
            block = flipped[low : low + high, left : left + wide]
            cells[: block.shape[0], : block.shape[1]] += block
    sketch = torch.zeros(1, dim, dtype=torch.float64)
    fold_(sketch, torch.from_numpy(cells.reshape(1, -1)), projector.offset("w"))
    np.testing.assert_allclose(sketch[0].numpy(), want, atol=1e-12)


@pytest.mark.parametrize("cosine", [0.0, 0.5])
def test_products_are_unbiased_with_the_noise_of_a_random_hash(cosine):
    """600 seeds: mean within 4 standard errors, rmse within 15% of sqrt((1 + c^2) / D)."""
    generator = np.random.default_rng(0)
    shape, dim, seeds = (24, 40), 61, 600
    u = generator.standard_normal(shape)
    v = generator.standard_normal(shape)
    u /= np.linalg.norm(u)
    v -= (v * u).sum() * u
    v = cosine * u + np.sqrt(1 - cosine**2) * v / np.linalg.norm(v)
    products = []
    for seed in range(seeds):
        projector = Projector(seed, dim)
        a, b = (sketch_matrix(torch.from_numpy(m), projector, "w") for m in (u, v))
        products.append(a @ b)
    errors = np.array(products) - cosine
    expected = np.sqrt((1 + cosine**2) / dim)
    assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(seeds)
    assert np.sqrt((errors**2).mean()) == pytest.approx(expected, rel=0.15)


def test_a_rank_one_structure_is_not_noisier():
    """Outer products are what gradients are made of: crossed entries must not collide together."""
    generator = np.random.default_rng(1)
    dim, errors = 61, []
    for seed in range(400):
        a, b, c, d = (generator.standard_normal(n) for n in (30, 25, 30, 25))
        u, v = np.outer(a, b), np.outer(c, d)
        u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
        projector = Projector(seed, dim)
        x, y = (sketch_matrix(torch.from_numpy(m), projector, "w") for m in (u, v))
        errors.append(x @ y - (u * v).sum())
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(dim**-0.5, rel=0.2)


def bound(u, v, dim, high, wide):
    """The docstring's bound on the variance of an inner product."""
    rows, cols = u.shape
    own = (u * u).sum() * (v * v).sum() + (u * v).sum() ** 2
    across = 2 * (1 / high - 1 / rows) * ((u @ v.T) ** 2).sum() + 2 * (1 / wide - 1 / cols) * ((u.T @ v) ** 2).sum()
    return own * (1 / dim + 2 / (high * wide)) + across


def exact_variance(u, v, dim, high, wide):
    """Sum, over what the signs of two entries multiply to, of the squared sum of products that share a bucket."""
    rows, cols = u.shape
    r, c = (a.ravel() for a in np.indices(u.shape))
    bucket = (r % high * wide + c % wide) % dim
    i, j = np.nonzero((bucket[:, None] == bucket) & ~np.eye(u.size, dtype=bool))
    low, top, left, right = (
        np.minimum(r[i], r[j]),
        np.maximum(r[i], r[j]),
        np.minimum(c[i], c[j]),
        np.maximum(c[i], c[j]),
    )
    same_row, same_col = low == top, left == right  # their sign is squared away, whichever row or column it is
    low, top, left, right = (
        np.where(m, 0, a) for m, a in zip((same_row,) * 2 + (same_col,) * 2, (low, top, left, right))
    )
    _, group = np.unique(((low * rows + top) * cols + left) * cols + right, return_inverse=True)
    return float((np.bincount(group, weights=u.ravel()[i] * v.ravel()[j]) ** 2).sum())


@pytest.mark.parametrize("kind", ["many directions", "one outer product", "outer products of one input"])
@pytest.mark.parametrize("size", [32, 10**6])
def test_folded_products_are_unbiased_and_no_noisier_than_promised(kind, size, monkeypatch):
    """800 seeds: mean within 4 standard errors, variance as enumerated, and that below the docstring's bound."""
    monkeypatch.setattr(project, "CELLS", size)
    rng = np.random.default_rng(2)
    rows, cols, dim = 24, 48, 31
    high, wide = cell_shape(rows, cols)
    assert (high, wide) == ((8, 8) if size == 32 else (rows, cols))
    x, g = rng.normal(size=(2, cols)), rng.normal(size=(2, rows))
    u, v = {
        "many directions": rng.normal(size=(2, rows, cols)),
        "one outer product": np.stack([np.outer(g[0], x[0])] * 2),
        "outer products of one input": np.stack([np.outer(g[k], x[0]) for k in range(2)]),
    }[kind]
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    errors = []
    for seed in range(800):
        a, b = (sketch_matrix(torch.from_numpy(m), Projector(seed, dim), "w") for m in (u, v))
        errors.append(a @ b - (u * v).sum())
    exact = exact_variance(u, v, dim, high, wide)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors))
    assert np.mean(np.square(errors)) == pytest.approx(exact, rel=0.25)
    assert exact < 1.1 * bound(u, v, dim, high, wide)


def test_a_size_that_is_no_prime_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="4099"):
        Projector(0, 4096)
    assert [n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]
