"""Rules of gradient surgery: golden numbers, properties, and slow twins in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import NumericsError
from gradsift.train.surgery import agem, dot, dots, gem, gem_dual, gram_matrix, ogpsa, pcgrad, pcgrad_coefficients
from gradsift.train.surgery_subspace import compress, empty_basis, energy_rank, extend, gpm, input_subspace, ogd

TIGHT = {"rtol": 0, "atol": 1e-6}


def vec(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def same(got: torch.Tensor, *expected: float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got, vec(*expected), rtol=0, atol=atol)


G = torch.tensor([[1.0, 0, 0], [-0.6, 0.8, 0]], dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn, most: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient and M < P references of all lengths, in float32 or float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    m, p = draw(st.integers(1, most)), draw(st.integers(most + 2, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    lengths = 10.0 ** rng.uniform(-4, 4, size=(m, 1))
    references = rng.normal(size=(m, p)) * lengths
    g = rng.normal(size=p) - draw(st.floats(0, 3)) * (references / lengths).sum(0)
    return torch.tensor(g, dtype=dtype), torch.tensor(references, dtype=dtype)


def norm(a: torch.Tensor) -> float:
    return math.sqrt(dot(a, a))


def keeps(z: torch.Tensor, references: torch.Tensor) -> bool:
    return all(dot(z, r) >= -1e-6 * norm(z) * norm(r) for r in references)


def slow_nearest(g: torch.Tensor, references: torch.Tensor) -> np.ndarray:
    """The nearest feasible point by trying every set of active references: the obvious twin of the dual."""
    x, rows = g.double().numpy(), references.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    best, least = np.zeros_like(x), np.inf
    for size in range(len(rows) + 1):
        for active in itertools.combinations(range(len(rows)), size):
            a = rows[list(active)]
            z = x - a.T @ np.linalg.lstsq(a.T, x, rcond=None)[0] if size else x
            if (rows @ z >= -1e-9 * np.linalg.norm(x)).all() and np.linalg.norm(z - x) < least:
                best, least = z, float(np.linalg.norm(z - x))
    return best


# Golden numbers


def test_golden_agem() -> None:
    same(agem(vec(1, -2), vec(0, 1)), 1, 0)
    g = vec(1, 2)
    assert agem(g, vec(0, 1)) is g
    z = agem(vec(-1, -2, 3), vec(2, 1, 1))
    same(z, -0.666667, -1.833333, 3.166667)
    assert dot(z, vec(2, 1, 1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_golden_gem(margin: float) -> None:
    g = vec(-1, -2, 2)
    v = gem_dual(gram_matrix(G), dots(G, g), eps=1e-6, lower=margin)
    np.testing.assert_allclose(v, [2.5, 2.5], atol=1e-5)
    z = gem(g, G, margin=margin)
    same(z, 0, 0, 2, atol=1e-9)


def test_golden_gem_absolute_eps_violates_and_ours_does_not() -> None:
    g = vec(-1, -2, 2)
    v = gem_dual(gram_matrix(G), dots(G, g), eps=1e-3)
    np.testing.assert_allclose(v, [2.493766, 2.493766], atol=1e-6)
    z = g + G.T @ torch.from_numpy(v)
    same(z, -0.002494, -0.004988, 2)
    same(G @ z, -0.002494, -0.002494)
    assert not keeps(z, G)
    assert keeps(gem(g, G), G)


def test_golden_sequential_agem_violates() -> None:
    g = vec(-1, -2, 2)
    one = agem(agem(g, G[0]), G[1])
    same(one, -0.96, -0.72, 2)
    same(G @ one, -0.96, 0)
    two = agem(agem(g, G[1]), G[0])
    same(two, 0, -1.2, 2)
    same(G @ two, 0, -0.96)
    same(agem(g, G.mean(0)), 0, 0, 2)


def test_golden_gem_margin_binds() -> None:
    """With a margin above the free multiplier the step is pushed beyond the constraint, by the margin itself."""
    g, r = vec(-1, 0), vec(1, 0)[None]
    same(gem(g, r, margin=3.0), 2, 0, atol=1e-9)
    same(gem(g, 10 * r, margin=0.05), 0, 0, atol=1e-9)
    same(gem(g, 10 * r, margin=0.5), 4, 0, atol=1e-9)


def test_golden_pcgrad() -> None:
    tasks = torch.stack([vec(1, 0), vec(-1, 1)])
    coefficients = pcgrad_coefficients(gram_matrix(tasks), [[1], [0]])
    np.testing.assert_allclose(coefficients @ tasks.numpy(), [[0.5, 0.5], [0, 1]], atol=1e-12)
    same(pcgrad(tasks, coefficients), 0.5, 1.5)
    same(pcgrad(tasks, coefficients, combine="mean"), 0.25, 0.75)
    three = torch.stack([vec(1, 0, 0), vec(-1, 1, 0), vec(-0.5, -1, 1)])
    gram = gram_matrix(three)
    rest = [[0, 2], [0, 1]]
    first = (pcgrad_coefficients(gram, [[1, 2], *rest]) @ three.numpy())[0]
    np.testing.assert_allclose(first, [0.333333, 0.166667, 0.333333], atol=1e-6)
    first = (pcgrad_coefficients(gram, [[2, 1], *rest]) @ three.numpy())[0]
    np.testing.assert_allclose(first, [0.333333, 0.333333, 0.222222], atol=1e-6)


def test_golden_ogd() -> None:
    basis = extend(extend(empty_basis(3, G), G[0]), G[1])
    same(ogd(vec(-1, -2, 2), basis), 0, 0, 2)
    same(ogd(vec(1, 1, 1), basis), 0, 0, 1)
    g = vec(1, 1, 1)
    np.testing.assert_allclose(dots(G, g), [1, 0.2])
    assert gem(g, G) is g


def test_golden_ogpsa() -> None:
    g, r = vec(1, -1, -1, 2), vec(0.5, 0.5, 0.5, 0.5)
    assert dot(g, r) == pytest.approx(0.5)
    halves = [slice(0, 2), slice(2, 4)]
    assert [dot(g[h], r[h]) for h in halves] == pytest.approx([0, 0.5])
    for h in halves:
        piece = g[h]
        assert ogpsa(piece, r[h][None], mode="threshold") is piece
    same(torch.cat([ogpsa(g[h], r[h][None]) for h in halves]), 1, -1, -1.5, 1.5)
    same(ogpsa(g, r[None]), 0.75, -1.25, -1.25, 1.75)


def test_ogpsa_threshold_scales_and_projects() -> None:
    r = vec(1, 0)[None]
    same(ogpsa(vec(2, 1), r, mode="threshold", base_scale=0.5), 1, 0.5)
    same(ogpsa(vec(-2, 1), r, mode="threshold", base_scale=0.5), 0, 1)
    g = vec(-2, 1)
    assert ogpsa(g, torch.zeros(2, 2, dtype=torch.float64), mode="threshold", base_scale=0.5) is g
    assert ogpsa(g, torch.zeros(1, 2, dtype=torch.float64)) is g


def test_golden_gpm_energy() -> None:
    values = np.array([3, 2, 1, 0.5])
    share = np.cumsum(values**2) / (values**2).sum()
    np.testing.assert_allclose(share, [0.631579, 0.912281, 0.982456, 1], atol=1e-6)
    assert energy_rank(values, 0.97) == 3
    assert energy_rank(values, 0.9) == 2
    assert energy_rank(values, 1.0) == 4


# Properties


@given(problems())
@settings(deadline=None, max_examples=150)
def test_agem_and_gem_oppose_nothing(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, references = problem
    assert keeps(agem(g, references[0]), references[:1])
    z = gem(g, references)
    assert keeps(z, references)
    if (dots(references, g) >= 0).all():
        assert z is g


@given(problems())
@settings(deadline=None, max_examples=60)
def test_gem_is_the_nearest_point(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, references = problem
    z = gem(g, references)
    atol = (1e-4 if g.dtype == torch.float32 else 1e-7) * norm(g)
    np.testing.assert_allclose(z.double().numpy(), slow_nearest(g, references), atol=atol)


@given(problems(), st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_no_feasible_point_is_nearer(problem: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
    g, references = problem[0].double(), problem[1].double()
    rng, units = np.random.default_rng(seed), references / references.norm(dim=1, keepdim=True)
    z = gem(g, references)
    feasible = 0
    for _ in range(200):
        near = z + torch.from_numpy(rng.normal(size=len(g))) * float(rng.choice([0.01, 0.1, 1.0])) * norm(g)
        other = torch.from_numpy(slow_nearest(near, references))
        if bool((units @ other >= -1e-9 * norm(other)).all()):
            feasible += 1
            assert norm(other - g) >= norm(z - g) * (1 - 1e-7)
    assert feasible > 150


@given(problems(most=1))
@settings(deadline=None, max_examples=60)
def test_gem_of_one_reference_is_agem(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, references = problem
    atol = (1e-5 if g.dtype == torch.float32 else 1e-12) * norm(g)
    torch.testing.assert_close(gem(g, references), agem(g, references[0]), rtol=0, atol=atol)


@given(problems())
@settings(deadline=None, max_examples=60)
def test_rules_are_idempotent(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, references = problem
    atol = (1e-5 if g.dtype == torch.float32 else 1e-9) * norm(g)
    basis = empty_basis(len(g), g)
    for r in references:
        basis = extend(basis, r)
    for rule in (
        lambda x: agem(x, references[0]),
        lambda x: gem(x, references),
        lambda x: ogd(x, basis),
        lambda x: ogpsa(x, references),
    ):
        torch.testing.assert_close(rule(rule(g)), rule(g), rtol=0, atol=atol)


@given(problems(), st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=60)
def test_length_of_a_reference_does_not_matter(problem: tuple[torch.Tensor, torch.Tensor], scale: float) -> None:
    g, references = problem[0].double(), problem[1].double()
    longer = references.clone()
    longer[0] *= scale
    close = {"rtol": 0, "atol": 1e-8 * norm(g)}
    torch.testing.assert_close(agem(g, longer[0]), agem(g, references[0]), **close)
    torch.testing.assert_close(gem(g, longer), gem(g, references), **close)
    torch.testing.assert_close(ogpsa(g, longer), ogpsa(g, references), **close)
    bases = []
    for rows in (references, longer):
        basis = empty_basis(len(g), g)
        for r in rows:
            basis = extend(basis, r)
        bases.append(basis)
    torch.testing.assert_close(ogd(g, bases[0]), ogd(g, bases[1]), **close)


def test_length_of_a_source_does_matter_for_the_mean() -> None:
    g = vec(-1, -2, 2)
    longer = G * torch.tensor([[10.0], [1.0]], dtype=torch.float64)
    assert not torch.allclose(agem(g, G.mean(0)), agem(g, longer.mean(0)))


@given(problems())
@settings(deadline=None, max_examples=60)
def test_pcgrad_against_the_slow_twin(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, references = problem
    units = references / references.norm(dim=1, keepdim=True)
    tasks = torch.cat([g[None], units])
    rng = np.random.default_rng(0)
    orders = [[int(j) for j in rng.permutation(len(tasks)) if j != i] for i in range(len(tasks))]
    total = torch.zeros(len(g), dtype=torch.float64)
    wide = tasks.double()
    for i, order in enumerate(orders):
        part = wide[i].clone()
        for j in order:
            if part @ wide[j] < 0:
                part -= (part @ wide[j]) / (wide[j] @ wide[j]) * wide[j]
        total += part
    atol = (1e-4 if g.dtype == torch.float32 else 1e-10) * (norm(g) + len(units))
    torch.testing.assert_close(
        pcgrad(tasks, pcgrad_coefficients(gram_matrix(tasks), orders)).double(), total, rtol=0, atol=atol
    )


@given(problems(most=1))
@settings(deadline=None, max_examples=60)
def test_pcgrad_leaves_friends_alone(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, references = problem
    r = references[0] * (1 if dot(g, references[0]) >= 0 else -1)
    tasks = torch.stack([g, r])
    coefficients = pcgrad_coefficients(gram_matrix(tasks), [[1], [0]])
    np.testing.assert_array_equal(coefficients, np.eye(2))
    assert torch.equal(pcgrad(tasks, coefficients), g + r)


@given(problems(most=4))
@settings(deadline=None, max_examples=60)
def test_ogd_removes_the_span_whatever_the_order(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    g, references = problem
    forward, backward = empty_basis(len(g), g), empty_basis(len(g), g)
    for r in references:
        forward = extend(forward, r)
    for r in references.flip(0):
        backward = extend(backward, r)
    z = ogd(g, forward)
    eps = 1e-6 if g.dtype == torch.float32 else 1e-12
    assert float((forward.vectors @ z).abs().max()) <= 4 * eps * norm(z)
    assert norm(z) <= norm(g) * (1 + eps)
    torch.testing.assert_close(z, ogd(g, backward), rtol=0, atol=100 * eps * norm(g))
    rebuilt = torch.from_numpy(forward.coordinates).to(g) @ forward.vectors
    torch.testing.assert_close(rebuilt, references, rtol=1e-4, atol=1e-5 * float(references.abs().max()))


def test_basis_takes_no_dependent_direction() -> None:
    basis = extend(extend(empty_basis(3, G), G[0]), G[1])
    again = extend(basis, G[0] - 2 * G[1])
    assert again.size == 2
    assert again.coordinates.shape == (3, 2)


def test_compress_keeps_the_leading_singular_vectors() -> None:
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.normal(size=(6, 20)) * np.array([[9], [1], [5], [0.1], [3], [1]]))
    basis = empty_basis(20, rows)
    for row in rows:
        basis = extend(basis, row)
    small = compress(basis, 3)
    right = np.linalg.svd(rows.numpy(), full_matrices=False)[2][:3]
    np.testing.assert_allclose(small.vectors.T @ small.vectors, right.T @ right, atol=1e-10)
    oldest = compress(basis, 3, "oldest")
    torch.testing.assert_close(oldest.vectors, basis.vectors[-3:])
    assert compress(basis, 6) is basis
    # What was compressed can be taken further, and is then as good as the directions it stands for.
    assert compress(extend(small, rows[0]), 3).size == 3


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.9, 0.97, 1.0]))
@settings(deadline=None, max_examples=40)
def test_gpm_removes_the_input_subspace(seed: int, energy: float) -> None:
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.normal(size=(30, 7)) @ np.diag([5, 3, 2, 1, 0.5, 0.1, 0.01]))
    subspace = input_subspace(inputs.T @ inputs, energy)
    _, values, right = np.linalg.svd(inputs.numpy())
    rank = energy_rank(values, energy)
    assert subspace.shape == (7, rank)
    np.testing.assert_allclose(subspace @ subspace.T, right[:rank].T @ right[:rank], atol=1e-8)
    g = torch.from_numpy(rng.normal(size=(4, 7))).float()
    z = gpm(g, subspace)
    assert float((z.double() @ subspace).abs().max()) <= 1e-6 * float(g.norm())
    assert gpm(g, input_subspace(torch.zeros(7, 7, dtype=torch.float64), energy)) is g


def test_opposite_gradient_leaves_exact_zeros() -> None:
    rng = np.random.default_rng(0)
    r = torch.from_numpy(rng.normal(size=1000)).float()
    for z in (
        agem(-3 * r, r),
        gem(-3 * r, r[None]),
        ogpsa(-3 * r, r[None]),
        ogd(-3 * r, extend(empty_basis(1000, r), r)),
    ):
        assert not z.any()


def test_nearly_parallel_and_repeated_references() -> None:
    rng = np.random.default_rng(0)
    r = torch.from_numpy(rng.normal(size=50)).float()
    other = r + 1e-4 * torch.from_numpy(rng.normal(size=50)).float()
    g = torch.from_numpy(rng.normal(size=50)).float() - r
    references = torch.stack([r, r, other])
    assert keeps(gem(g, references), references)


def test_gem_dual_says_what_it_was_given() -> None:
    with pytest.raises(NumericsError, match="dual problem of GEM"):
        gem_dual(-np.eye(2), np.array([-1.0, 1.0]), eps=0.0)


def test_dot_does_not_lose_small_terms() -> None:
    a = torch.ones(3, dtype=torch.float32) * torch.tensor([1e8, 1.0, -1e8])
    assert dot(a, torch.ones(3)) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_nearly_opposite_gradient_in_float32(seed: int) -> None:
    """What is left is a thousandth of g, so rounding of g's size would show."""
    rng = np.random.default_rng(seed)
    r, other = torch.from_numpy(rng.normal(size=(2, 3000))).float()
    g = -r + 1e-4 * other
    for z in (agem(g, r), gem(g, r[None])):
        assert norm(z) < 1e-3 * norm(g)
        assert keeps(z, r[None])
    z = ogpsa(g, r[None])
    assert abs(dot(z, r)) <= 1e-6 * norm(z) * norm(r)
