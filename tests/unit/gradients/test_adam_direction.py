"""LESS's Adam direction: the specification's figures, the engine against one backward per row, and what it is not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import TOYS, toy_llama, toy_lora
from tests.unit.gradients.test_engine import PROJECTOR, batch, chosen

from gradsift.errors import StoreError
from gradsift.gradients import project
from gradsift.gradients.adam import bend, gamma, gamma_diag
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.gradients.project import sketch_reference

G, M, V = ([0.1, -0.2, 0.3], [0.05, 0.0, -0.1], [0.01, 0.04, 0.0001])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_figures_of_the_specification():
    got = gamma(tensor(G), tensor(M), tensor(V))
    np.testing.assert_allclose(got, [0.5500, -0.1000, -4.353889], atol=5e-5)
    np.testing.assert_allclose(got / got.norm(), [0.125295, -0.022781, -0.991858], atol=1e-6)
    zero = gamma(torch.zeros(3, dtype=torch.float64), tensor(M), tensor(V))
    np.testing.assert_allclose(zero, [0.450225, 0, -9.004053], atol=1e-6)
    assert float(torch.nn.functional.cosine_similarity(zero, got, dim=0)) == pytest.approx(0.996878, abs=1e-6)
    tenfold = gamma(10 * tensor(G), tensor(M), tensor(V))
    np.testing.assert_allclose(tenfold / tenfold.norm(), [0.499452, -0.344449, 0.794923], atol=1e-6)


def test_eps_stands_inside_the_root():
    outside = (0.9 * -0.1 + 0.1 * 0.3) / ((0.999 * 0.0001 + 0.001 * 0.09) ** 0.5 + 1e-8)
    got = float(gamma(tensor(G), tensor(M), tensor(V))[2])
    assert got == pytest.approx(-4.353889, abs=5e-7)
    assert outside == pytest.approx(-4.3540, abs=5e-5)
    assert abs(got - outside) > 1e-4


def twin(g, m, v):
    out = np.empty_like(g)
    for i in range(g.size):
        first, second = 0.9 * m[i] + 0.1 * g[i], 0.999 * v[i] + 0.001 * g[i] ** 2
        out[i] = first / (second + 1e-8) ** 0.5
    return out


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1))
def test_it_equals_its_twin_and_with_fresh_moments_points_along_the_gradient(seed):
    rng = np.random.default_rng(seed)
    g, m, v = rng.normal(size=40), rng.normal(size=40), rng.exponential(size=40)
    np.testing.assert_allclose(gamma(*map(torch.from_numpy, (g, m, v))).numpy(), twin(g, m, v), rtol=1e-12)
    small = torch.from_numpy(0.01 * g)
    got = gamma(small, torch.zeros(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64))
    assert float(torch.nn.functional.cosine_similarity(got, small, dim=0)) > 1 - 1e-3
    a, b = (
        gamma_diag(torch.from_numpy(g + m), torch.from_numpy(v)),
        gamma_diag(torch.from_numpy(g), torch.from_numpy(v)),
    )
    np.testing.assert_allclose(a - b, gamma_diag(torch.from_numpy(m), torch.from_numpy(v)), atol=1e-9)  # linear


def moments(model, names, dtype, scale=0.01):
    generator = torch.Generator().manual_seed(9)
    by_name = dict(model.named_parameters())
    first = {
        n: (scale * torch.randn(by_name[n].shape, generator=generator, dtype=torch.float64)).to(dtype) for n in names
    }
    second = {
        n: (scale**2 * torch.rand(by_name[n].shape, generator=generator, dtype=torch.float64)).to(dtype) for n in names
    }
    return first, second


@pytest.mark.parametrize("form", ["adam", "adam_diag"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("cells", [1 << 15, 64])  # toys fold only where cells are few
def test_the_engine_equals_one_backward_per_row(kind, dtype, limit, form, cells, monkeypatch):
    monkeypatch.setattr(project, "CELLS", cells)
    model = TOYS[kind](dtype=dtype)
    names = chosen(model)
    first, second = moments(model, names, dtype)
    engine = GradientEngine(model, names, projector=PROJECTOR)
    plain = GradientEngine(model, names, projector=PROJECTOR)
    bend(engine, first, second, form)
    ids, labels, lengths = batch([9, 5, 12, 7])
    with engine:
        got = engine.measure(ids, labels, lengths)
    with plain:
        ordinary = plain.measure(ids, labels, lengths)
    for name in ("loss", "square", "emb_norm", "head_norm"):
        np.testing.assert_allclose(getattr(got, name), getattr(ordinary, name), rtol=limit)
    oracle = copy.deepcopy(model).double()
    for b, n in enumerate(lengths.tolist()):
        gradient = example_gradient(oracle, list(engine.blocks), ids[b, :n], labels[b, :n]).by_name
        want = 0
        for name, g in gradient.items():
            m, v = first[name].double(), second[name].double()
            bent = gamma(g, m, v) if form == "adam" else gamma_diag(g, v)
            want = want + sketch_reference(engine.matrix(name, bent).numpy(), PROJECTOR, name)
        norm = float(got.square[b]) ** 0.5
        want = want / np.linalg.norm(want) * norm
        assert np.abs(want - got.sketch[b].double().numpy()).max() <= limit * norm


def test_tables_too_large_for_one_tile_are_walked_in_strips(monkeypatch):
    from gradsift.gradients import adam

    model = toy_llama(dtype=torch.float64, tied=True)
    names = chosen(model)
    ids, labels, lengths = batch([9, 5])
    monkeypatch.setattr(project, "CELLS", 64)
    found = []
    for tile, chunk in ((1 << 16, 8), (100, 1)):
        monkeypatch.setattr(adam, "TILE", tile)
        monkeypatch.setattr(adam, "CHUNK", chunk)
        engine = GradientEngine(model, names, projector=PROJECTOR)
        bend(engine, *moments(model, names, torch.float64), "adam")
        with engine:
            found.append(engine.measure(ids, labels, lengths).sketch)
    np.testing.assert_allclose(found[0], found[1], atol=1e-12)


def test_a_row_alone_and_in_a_batch_agree():
    model = toy_lora(dtype=torch.float64)
    names = chosen(model)
    engine = GradientEngine(model, names, projector=PROJECTOR)
    bend(engine, *moments(model, names, torch.float64), "adam")
    ids, labels, lengths = batch([9, 5, 12])
    with engine:
        together = engine.measure(ids, labels, lengths).sketch
        for b, n in enumerate(lengths.tolist()):
            alone = engine.measure(ids[b : b + 1, :n], labels[b : b + 1, :n], lengths[b : b + 1]).sketch
            np.testing.assert_allclose(alone[0], together[b], atol=1e-10 * float(alone[0].norm()))


def test_moments_that_do_not_fit_are_refused_by_name():
    model = toy_lora()
    names = chosen(model)
    first, second = moments(model, names, torch.float32)
    engine = GradientEngine(model, names, projector=PROJECTOR)
    with pytest.raises(StoreError, match="no Adam state") as refusal:
        bend(engine, {n: first[n] for n in names[1:]}, second, "adam")
    assert names[0] in str(refusal.value)
    with pytest.raises(StoreError, match="does not fit"):
        bend(engine, {**first, names[0]: torch.zeros(3, 3)}, second, "adam")
