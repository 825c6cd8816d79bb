"""Out of memory: only the micro-batch that failed is redone, in halves, and every row comes out as it would have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.toy import VOCABULARY, toy_llama

from gradsift.data.batches import plan_batches
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.types import RowStatus, TokenRow

LENGTHS = [4, 4, 4, 4, 6, 6, 6, 6, 9, 9]
TOKENS = 24  # batches of 4, 4 and 2 rows


def rows_of():
    rng = np.random.default_rng(0)
    return [
        TokenRow(f"row{k}", rng.integers(4, VOCABULARY, size=n).astype(np.int32), np.arange(n) >= 1, n, RowStatus.OK)
        for k, n in enumerate(LENGTHS)
    ]


def measured(fails=lambda lengths: None):
    """Measure the rows; tell which micro-batches were tried, as tuples of lengths."""
    model = toy_llama(dtype=torch.float64)
    engine = GradientEngine(model, [name for name, _ in model.named_parameters()], projector=Projector(7, 61))
    tried, ticks, real = [], [], engine.measure

    def watched(ids, labels, lengths, *rest):
        tried.append(tuple(lengths.tolist()))
        fails(tried[-1])
        return real(ids, labels, lengths, *rest)

    engine.measure = watched
    run = Pass(engine, (), TOKENS, 3, tick=lambda rows, tokens: ticks.append((rows, tokens)))
    with engine:
        return measure_shard(run, rows_of()), tried, ticks


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_only_the_failed_micro_batch_is_redone(error):
    def fails(lengths):
        if lengths == (6, 6, 6, 6):
            raise error

    whole, first, ticks = measured()
    got, tried, told = measured(fails)
    rows = rows_of()
    assert first == [tuple(LENGTHS[i] for i in batch) for batch in plan_batches(rows, range(10), TOKENS)]
    assert first == [(4, 4, 4, 4), (6, 6, 6, 6), (9, 9)]
    assert tried == [(4, 4, 4, 4), (6, 6, 6, 6), (6, 6), (6, 6), (9, 9)]
    assert told == ticks == [(4, 16), (4, 24), (2, 18)]
    assert got.ids == whole.ids
    assert got.status == whole.status == (RowStatus.OK,) * 10
    for name in ("loss", "grad_norm", "sketch"):
        np.testing.assert_allclose(getattr(got, name), getattr(whole, name), rtol=1e-6, atol=1e-7)
    untouched = [0, 1, 2, 3, 8, 9]
    assert got.sketch[untouched].tobytes() == whole.sketch[untouched].tobytes()


def test_halves_that_fail_are_halved_again_and_a_row_that_never_fits_costs_itself_alone():
    seen = []

    def fails(lengths):
        seen.append(lengths)
        if (lengths == (6,) and seen.count((6,)) == 1) or (len(lengths) > 1 and lengths[0] == 6):
            raise MemoryError

    got, tried, _ = measured(fails)
    assert tried == [(4,) * 4, (6,) * 4, (6, 6), (6,), (6,), (6, 6), (6,), (6,), (9, 9)]
    assert [status is RowStatus.OOM_AT_1 for status in got.status] == [k == 4 for k in range(10)]
    assert "do not fit in memory alone" in got.reason[4]
    assert np.isnan(got.grad_norm[4])
    assert np.isfinite(np.delete(got.grad_norm, 4)).all()


def test_another_error_is_no_memory_error():
    def fails(lengths):
        if len(lengths) == 2:
            raise RuntimeError("the shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        measured(fails)
