"""Rows with held prompts are packed by what is differentiated, and come back as they were given."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.toy import VOCABULARY, toy_llama

from gradsift.gradients import collect
from gradsift.gradients.collect import Pass, measure_shard, packing_order
from gradsift.gradients.hooks import GradientEngine
from gradsift.types import RowStatus, TokenRow


def row(number, prompt, answer):
    generator = np.random.default_rng(number)
    trained = np.array([False] * prompt + [True] * answer)
    ids = generator.integers(4, VOCABULARY, prompt + answer)
    return TokenRow(f"r{number}", ids, trained, len(ids), RowStatus.OK)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_order_is_a_permutation_by_what_follows_the_prompt(shapes):
    rows = [row(i, *shape) for i, shape in enumerate(shapes)]
    order = packing_order(rows)
    assert sorted(order) == list(range(len(rows)))
    tails = [shapes[i][1] + 1 for i in order]  # the token before the first trained one predicts it
    assert tails == sorted(tails)


def test_signals_stand_where_their_rows_stood(monkeypatch):
    shapes = [(8, 2), (3, 7), (7, 3), (4, 6), (8, 2), (1, 9)]
    rows = [row(i, *shape) for i, shape in enumerate(shapes)]
    model = toy_llama(dtype=torch.float64)
    engine = GradientEngine(model, ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"], trained_only=True)
    run = Pass(engine, (), 20, 3)
    with engine:
        packed = measure_shard(run, rows)
        monkeypatch.setattr(collect, "packing_order", lambda some: list(range(len(some))))
        plain = measure_shard(run, rows)
    assert packing_order(rows) != list(range(len(rows)))
    assert packed.ids == plain.ids == tuple(one.id for one in rows)
    np.testing.assert_allclose(packed.grad_norm, plain.grad_norm, rtol=1e-9)
    np.testing.assert_allclose(packed.loss, plain.loss, rtol=1e-9)
    assert packed.unit == plain.unit
    assert len(set(np.round(plain.grad_norm, 9))) == len(rows)
    whole = dataclasses.replace(run, gradients=False)
    with engine:
        assert measure_shard(whole, rows).ids == plain.ids
