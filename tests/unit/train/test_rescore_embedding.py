"""Embeddings measured during training: in the same pass, equal to the slow twin, off unless asked for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.toy import VOCABULARY, toy_llama

from gradsift.methods import make_method
from gradsift.seeds import stream
from gradsift.train.rescore import RescoreConfig, rescore, restrict
from gradsift.types import SIGNALS, Budget, RowStatus, TokenRow


def rows_of(prefix, lengths, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for k, n in enumerate(lengths):
        trained = np.arange(n) >= n // 2
        ids = rng.integers(4, VOCABULARY, size=n).astype(np.int32)
        rows.append(TokenRow(f"{prefix}{(k * 3) % 7}", ids, trained, n, RowStatus.OK))
    return rows


POOL, TARGET = rows_of("p", [9, 5, 12, 7, 4, 11], 0), rows_of("t", [6, 10, 3], 1)
ANCHORS = {"math": rows_of("m", [8, 5, 9], 2)}


def measured(model, target=TARGET, **settings):
    config = RescoreConfig(tokens_per_batch=30, **settings)
    return rescore(model, POOL, ANCHORS, target, config, pad_id=3)


@torch.no_grad()
def truth(model, row):
    oracle = copy.deepcopy(model).double()
    hidden = oracle(input_ids=torch.from_numpy(row.input_ids).long()[None], output_hidden_states=True).hidden_states[
        -1
    ][0]
    weight = torch.arange(1, len(hidden) + 1, dtype=torch.float64)
    return ((weight[:, None] * hidden).sum(0) / weight.sum()).numpy()


def test_embeddings_are_those_of_the_rows_at_these_weights():
    model = toy_llama()
    problem = measured(model, embedding=True).problem
    pool, target = {row.id: row for row in POOL}, {row.id: row for row in TARGET}
    assert problem.target_ids == tuple(sorted(target))
    for ids, got, rows in (
        (problem.ids, problem.embedding, pool),
        (problem.target_ids, problem.target_embedding, target),
    ):
        assert got.dtype == np.float32
        for name, vector in zip(ids, got, strict=True):
            want = truth(model, rows[name])
            assert np.linalg.norm(vector - want) <= 1e-5 * np.linalg.norm(want)


def test_they_cost_no_token_and_change_no_other_signal():
    with_, without = measured(toy_llama(), embedding=True), measured(toy_llama())
    assert without.problem.embedding is None
    assert without.problem.target_embedding is None
    assert (with_.cost.flops, with_.dropped) == (without.cost.flops, without.dropped)
    for name in set(SIGNALS) - {"embedding", "sketch", "lexical"}:
        assert np.array_equal(getattr(with_.problem, name), getattr(without.problem, name))


def test_rds_chooses_on_rescored_and_restricted_rows():
    problem = measured(toy_llama(), embedding=True).problem
    some = restrict(problem, problem.ids[1:])
    assert np.array_equal(some.embedding, problem.embedding[1:])
    assert some.target_ids == problem.target_ids
    assert len(make_method("rds", {}).select(some, Budget(rows=3), stream(0, "rds")).ids) == 3


@pytest.mark.parametrize("embedding", [True, False])
def test_without_a_target_there_is_no_target_embedding(embedding):
    problem = measured(toy_llama(), target=[], embedding=embedding).problem
    assert (problem.embedding is not None) == embedding
    assert problem.target_embedding is None
    assert problem.target_ids == ()
