"""Embeddings against their slow twin: hidden states of one row alone, in float64, pooled by a loop over positions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import TOYS, VOCABULARY, toy_llama

from gradsift.errors import NumericsError
from gradsift.gradients.collect import Pass, embed_rows, measure_noise, measure_shard
from gradsift.gradients.directions import (
    build_direction,
    load_direction,
    load_embeddings,
    save_direction,
    save_embeddings,
)
from gradsift.gradients.embed import content_order, pool_positions, reorder, unit_distance
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.seeds import stream
from gradsift.types import RowStatus, TokenRow

LENGTHS = [9, 5, 12, 7, 1 + 1, 12]


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    labels = ids.clone()
    for b, n in enumerate(lengths):
        ids[b, n:], labels[b, n:] = 3, -100
        labels[b, : n // 2] = -100
    return ids, labels, torch.tensor(lengths)


def token_rows(lengths, seed=0):
    ids, labels, _ = batch(lengths, seed)
    return [
        TokenRow(
            f"row{(7 * b) % 10}",
            ids[b, :n].numpy().astype(np.int32),
            labels[b, :n].numpy() != -100,
            n,
            RowStatus.OK,
        )
        for b, n in enumerate(lengths)
    ]


@torch.no_grad()
def truth(oracle, ids):
    """Position-weighted mean of ``hidden_states[-1]`` of one row, in float64, one position after the other."""
    hidden = oracle(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
    total, weight = np.zeros(hidden.shape[1]), 0
    for t in range(len(ids)):
        total += (t + 1) * hidden[t].double().numpy()
        weight += t + 1
    return total / weight


def run_of(model, *, gradients=True, tokens=64):
    names = [name for name, _ in model.named_parameters()] if gradients else []
    engine = GradientEngine(model, names, projector=Projector(7, 61) if gradients else None, embedding=True)
    return Pass(engine, (), tokens, 3, gradients)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", TOYS)
def test_the_embedding_equals_the_pooled_hidden_states_of_the_row_alone(kind, dtype, limit):
    model = TOYS[kind](dtype=dtype)
    engine = GradientEngine(model, [name for name, _ in model.named_parameters()], embedding=True)
    ids, labels, lengths = batch(LENGTHS)
    with engine:
        both, alone = engine.measure(ids, labels, lengths), engine.forward_only(ids, labels, lengths)
    assert torch.equal(both.embedding, alone.embedding)  # with and without a backward: the same forward
    oracle = copy.deepcopy(model).double()
    for b, n in enumerate(LENGTHS):
        want = truth(oracle, ids[b, :n])
        got = both.embedding[b].double().numpy()
        assert np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


@pytest.mark.parametrize("kind", TOYS)
def test_neither_neighbors_nor_padding_move_an_embedding(kind):
    model = TOYS[kind]()
    engine = GradientEngine(model, (), embedding=True)
    ids, labels, lengths = batch(LENGTHS)
    wide = torch.nn.functional.pad(ids, (0, 9), value=3), torch.nn.functional.pad(labels, (0, 9), value=-100)
    with engine:
        together = engine.forward_only(ids, labels, lengths).embedding
        padded = engine.forward_only(*wide, lengths).embedding
        turned = engine.forward_only(ids.flip(0), labels.flip(0), lengths.flip(0)).embedding.flip(0)
        for b, n in enumerate(LENGTHS):
            alone = engine.forward_only(ids[b : b + 1, :n], labels[b : b + 1, :n], lengths[b : b + 1]).embedding[0]
            for other in (together[b], padded[b], turned[b]):
                assert float((alone - other).norm()) <= 1e-5 * float(alone.norm())


def test_the_gradients_are_those_measured_without_embeddings():
    model = toy_llama()
    names = [name for name, _ in model.named_parameters()]
    got = []
    for embedding in (False, True):
        engine = GradientEngine(model, names, projector=Projector(7, 61), embedding=embedding)
        with engine:
            got.append(engine.measure(*batch(LENGTHS)))
    assert got[0].embedding is None
    for name in ("loss", "square", "sketch", "emb_norm", "head_norm"):
        assert torch.equal(getattr(got[0], name), getattr(got[1], name))


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    extra=st.integers(0, 4),
    poison=st.sampled_from([0.0, float("nan"), float("inf"), 1e30]),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_pooling_is_a_weighted_mean_of_real_positions_only(lengths, extra, poison):
    generator = torch.Generator().manual_seed(sum(lengths))
    hidden = torch.randn(len(lengths), max(lengths) + extra, 5, generator=generator, dtype=torch.float64)
    for b, n in enumerate(lengths):
        hidden[b, n:] = poison
    got = pool_positions(hidden, lengths)
    for b, n in enumerate(lengths):
        want = sum((t + 1) * hidden[b, t] for t in range(n)) / sum(range(1, n + 1))
        torch.testing.assert_close(got[b], want)
    # The mean of equal states is that state: the weights add up to 1.
    same = torch.ones_like(hidden)
    torch.testing.assert_close(pool_positions(same, lengths), torch.ones_like(got))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_shard_keeps_embeddings_beside_its_other_signals(gradients):
    model, rows = toy_llama(), sorted(token_rows(LENGTHS), key=lambda row: (row.num_tokens, row.id))
    run = run_of(model, gradients=gradients)
    with run.engine:
        got = measure_shard(run, rows)
    assert got.embedding.dtype == np.float32
    assert (got.sketch is not None) == gradients
    assert np.isnan(got.grad_norm).all() != gradients
    oracle = copy.deepcopy(model).double()
    for k, row in enumerate(rows):
        want = truth(oracle, torch.from_numpy(row.input_ids).long())
        assert np.linalg.norm(got.embedding[k] - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("gradients", [True, False])
def test_hidden_states_that_are_not_finite_are_a_status_though_the_loss_is(gradients, monkeypatch):
    # Attention kernels that skip masked positions let a broken last token pass: no loss is taken behind it.
    def broken(hidden, lengths):
        pooled = pool_positions(hidden, lengths)
        pooled[torch.tensor(lengths) == 7, 2] = float("inf")
        return pooled

    monkeypatch.setattr("gradsift.gradients.hooks.pool_positions", broken)
    rows, run = sorted(token_rows([6, 7, 8]), key=lambda row: row.num_tokens), run_of(toy_llama(), gradients=gradients)
    with run.engine:
        got = measure_shard(run, rows)
    assert got.status == (RowStatus.OK, RowStatus.NONFINITE_LOSS, RowStatus.OK)
    assert "hidden states are not finite" in got.reason[1]
    assert np.isnan(got.embedding[1]).all()
    assert np.isfinite(got.embedding[[0, 2]]).all()


def test_a_row_that_does_not_fit_has_no_embedding(monkeypatch):
    run, rows = run_of(toy_llama(), gradients=False), token_rows([6, 6])
    honest = run.engine.forward_only

    def narrow(input_ids, labels, lengths):
        if len(lengths) > 1 or int(input_ids[0, 0]) == int(rows[1].input_ids[0]):
            raise MemoryError
        return honest(input_ids, labels, lengths)

    monkeypatch.setattr(run.engine, "forward_only", narrow)
    with run.engine:
        got = measure_shard(run, rows)
    assert got.status == (RowStatus.OK, RowStatus.OOM_AT_1)
    assert np.isfinite(got.embedding[0]).all()
    assert np.isnan(got.embedding[1]).all()


def test_a_target_is_embedded_alike_by_its_direction_and_by_a_forward_and_reads_back_bit_for_bit(tmp_path):
    model, rows = toy_llama(), token_rows(LENGTHS)
    names = [name for name, _ in model.named_parameters()]
    built = build_direction(
        "target", model, names, rows, Projector(7, 61), tokens_per_batch=30, pad_id=3, embedding=True
    )
    forward = embed_rows(run_of(model, gradients=True, tokens=40), rows[::-1])
    np.testing.assert_allclose(built.embeddings, forward, rtol=1e-5, atol=1e-6)
    ids = sorted(row.id for row in rows)
    oracle, by_id = copy.deepcopy(model).double(), {row.id: row for row in rows}
    for name, vector in zip(ids, reorder(forward, content_order(rows), ids), strict=True):
        want = truth(oracle, torch.from_numpy(by_id[name].input_ids).long())
        assert np.linalg.norm(vector - want) <= 1e-5 * np.linalg.norm(want)
    save_direction(built, tmp_path, "d")
    again = load_direction("target", tmp_path, "d", torch.device("cpu"))
    assert np.array_equal(again.embeddings, built.embeddings)
    assert set(again.matrices) == set(built.matrices)
    plain = build_direction("math", model, names, rows, Projector(7, 61), tokens_per_batch=30, pad_id=3)
    save_direction(plain, tmp_path, "p")
    assert load_direction("math", tmp_path, "p", torch.device("cpu")).embeddings is None
    save_embeddings(forward, tmp_path, "e")
    assert np.array_equal(load_embeddings(tmp_path, "e"), forward)
    assert load_embeddings(tmp_path, "another") is None


def test_a_target_row_that_cannot_be_embedded_is_refused_by_name():
    model, rows = toy_llama(), token_rows([6, 6])
    with torch.no_grad():
        model.get_input_embeddings().weight[int(rows[1].input_ids[2])] = float("nan")
    with pytest.raises(NumericsError, match="cannot be embedded") as caught:
        embed_rows(run_of(model, gradients=False), rows)
    assert "row" in caught.value.where


def test_the_noise_bounds_every_cosine():
    model = toy_llama()
    run, rows = (
        run_of(model, gradients=False, tokens=200),
        sorted(token_rows(LENGTHS * 2, 4), key=lambda r: r.num_tokens),
    )
    rows = [TokenRow(f"r{k:02d}", r.input_ids, r.trained, r.num_untruncated, r.status) for k, r in enumerate(rows)]
    with run.engine:
        stored = measure_shard(run, rows)
        place = {name: k for k, name in enumerate(stored.ids)}
        noise = measure_noise(
            run, rows, lambda name: stored.take(np.array([place[name]])), stream(1, "noise"), count=12
        )
        alone = np.concatenate([measure_shard(run, [row]).embedding for row in rows])
    assert 0 < noise.embedding < 1e-4

    def table(a):
        unit = a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True)
        return unit @ unit.T

    assert np.abs(table(alone) - table(stored.embedding)).max() <= noise.embedding


def test_unit_distance_bounds_cosines():
    a, b, c = np.random.default_rng(0).normal(size=(3, 7))
    cos = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    assert abs(cos(a, c) - cos(b, c)) <= unit_distance(a, b)
    assert unit_distance(a, 3 * a) < 1e-12
    assert abs(unit_distance(a, -a) - 2) < 1e-12
