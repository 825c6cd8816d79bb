"""Rows that cannot be measured: what they leave behind, and when there are too many of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.toy import toy_llama
from tests.unit.gradients.test_taps import rows_of, run_of

from gradsift.errors import NumericsError
from gradsift.gradients.collect import measure_noise, measure_shard, refuse_if_mostly_bad, unmeasured
from gradsift.seeds import stream
from gradsift.store.shards import join_shards
from gradsift.types import RowStatus


def test_a_row_that_was_not_measured_has_its_tokens_a_reason_and_no_number():
    rows, run = rows_of(), run_of(toy_llama())
    got = unmeasured(run, rows[:2], RowStatus.WORKER_CRASH, ["why", "why not"])
    assert got.status == (RowStatus.WORKER_CRASH,) * 2
    assert got.reason == ("why", "why not")
    assert got.num_tokens.tolist() == [row.num_tokens for row in rows[:2]]
    assert all(np.isnan(a).all() for a in (got.loss, got.grad_norm, got.dots, got.sketch, *got.extra.values()))
    with run.engine:
        both = join_shards([got, measure_shard(run, rows[2:])])
    assert both.ids == tuple(row.id for row in rows)
    assert both.usable.tolist() == [False] * 2 + [True] * (len(rows) - 2)
    assert set(both.extra) == set(run.extras.names)


def test_every_micro_batch_is_announced_before_it_is_measured_also_the_halves(monkeypatch):
    import dataclasses

    import gradsift.gradients.collect as module

    rows, seen = sorted(rows_of(), key=lambda row: row.num_tokens), []
    run = dataclasses.replace(run_of(toy_llama(), tokens=1000), before=lambda some: seen.append([r.id for r in some]))
    plain = module.collate

    def full(some, *more):
        if len(some) > 2:
            raise MemoryError
        return plain(some, *more)

    monkeypatch.setattr(module, "collate", full)
    with run.engine:
        measure_shard(run, rows)
    names = [row.id for row in rows]
    assert seen == [names, names[:3], names[:1], names[1:3], names[3:], names[3:5], names[5:]]


def test_a_row_that_killed_is_not_touched_again_by_the_noise_probe():
    rows, run = rows_of(), run_of(toy_llama())
    measured = []
    with run.engine:
        whole = measure_shard(run, rows)
        import dataclasses

        lost = unmeasured(run, rows[:1], RowStatus.WORKER_CRASH, ["it killed"])
        stored = {row.id: whole.take(np.array([k])) for k, row in enumerate(rows)} | {rows[0].id: lost}
        run = dataclasses.replace(run, before=lambda some: measured.extend(row.id for row in some))
        measure_noise(run, rows, stored.__getitem__, stream(1, "noise"))
    assert set(measured) == {row.id for row in rows[1:]}


BAD = (RowStatus.NONFINITE_LOSS, RowStatus.NONFINITE_GRAD, RowStatus.OOM_AT_1, RowStatus.WORKER_CRASH)


@given(st.integers(20, 400), st.integers(0, 400), st.integers(0, 400), st.floats(0, 1), st.sampled_from(BAD))
def test_the_share_is_that_of_the_whole_pool(total, done, bad, share, status):
    """The slow twin: it must stop exactly when nothing that can still come brings the share down, or most rows are bad."""
    done, bad = min(done, total), min(bad, done, total)
    counts = {RowStatus.OK: done - bad, status: bad}
    certain = bad / total > share if share < 1 else False
    hopeless = done >= 20 and bad > max(0.5, share) * done
    stops = done >= 20 and (bad > share * total or hopeless)
    if stops:
        with pytest.raises(NumericsError, match="too many rows") as raised:
            refuse_if_mostly_bad(counts, share, total)
        assert f"{status.value} {bad}" in str(raised.value)
        assert certain or hopeless
    else:
        refuse_if_mostly_bad(counts, share, total)


def test_a_cluster_of_bad_rows_at_the_start_does_not_stop_a_sound_pool():
    refuse_if_mostly_bad({RowStatus.OK: 18, RowStatus.NONFINITE_GRAD: 2}, 0.05, 1000)
    with pytest.raises(NumericsError):
        refuse_if_mostly_bad({RowStatus.OK: 60, RowStatus.NONFINITE_GRAD: 51}, 0.05, 1000)
    with pytest.raises(NumericsError, match="11 of 20 rows so far"):
        refuse_if_mostly_bad({RowStatus.OK: 9, RowStatus.NONFINITE_GRAD: 11}, 0.05, 1000)
