"""The sign-fold sketch: same bits everywhere, unbiased, as noisy as a random-sign hash and no more."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError
from gradsift.gradients.project import Projector, fold_, is_prime, signs, sketch_matrix, sketch_reference

# Committed vectors. If these change, every stored sketch becomes incomparable: raise project.VERSION instead.
FIRST = [1, -1, -1, 1, -1, 1, 1, -1, 1, -1, -1, -1, 1, 1, 1, 1]
OFFSET = 2507
DIGEST = "0a773e433f2929bc"


def test_signs_have_the_committed_bits():
    got = signs(42, "model.layers.0.self_attn.q_proj.weight", "row", 100_000)
    assert got[:16].tolist() == FIRST
    assert hashlib.blake2b(got.tobytes(), digest_size=8).hexdigest() == DIGEST
    assert Projector(42, 4093).offset("model.layers.0.self_attn.q_proj.weight") == OFFSET


def test_signs_are_balanced_and_differ_by_name_axis_and_seed():
    base = signs(1, "a", "row", 4096).astype(int)
    assert abs(base.sum()) < 5 * 64
    for other in (signs(2, "a", "row", 4096), signs(1, "b", "row", 4096), signs(1, "a", "col", 4096)):
        assert abs((base * other).sum()) < 5 * 64
    assert (signs(1, "a", "row", 10) == base[:10]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([3, 7, 31]), st.integers(0, 10**6))
def test_fast_sketches_equal_the_entry_by_entry_one(rows, cols, dim, seed):
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, cols)))
    projector = Projector(seed, dim)
    want = sketch_reference(matrix.numpy(), projector, "w")
    np.testing.assert_allclose(sketch_matrix(matrix, projector, "w"), want, atol=1e-12)
    row, col = (signs(seed, "w", axis, n) for axis, n in (("row", rows), ("col", cols)))
    flipped = matrix * torch.from_numpy(row[:, None] * col).double()
    sketch = torch.zeros(1, dim, dtype=torch.float64)
    fold_(sketch, flipped.reshape(1, -1).contiguous(), projector.offset("w"))
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


def test_a_size_that_is_no_prime_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="4099"):
        Projector(0, 4096)
    assert [n for n in range(20) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19]
