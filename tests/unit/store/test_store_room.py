"""What a store will take, beside what it takes; refused beforehand where the disk has less."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_world import SPEC, WIDTH, embeddings, make_ids, make_spec, measure, memory_folder

from gradsift.errors import DiskFullError, StoreError
from gradsift.store.room import bytes_needed, refuse_if_it_does_not_fit
from gradsift.store.spec import Projection
from gradsift.store.writer import open_writer


def taken(folder, block: int) -> int:
    """Slow twin: write it and count, files rounded up to blocks."""
    files = [path for part in ("shards", "ledger") for path in (folder / part).iterdir()]
    return sum(-(-path.stat().st_size // block) * block for path in files)


@given(
    rows=st.integers(1, 150), per_shard=st.sampled_from([1, 7, 40, 64, 200]), dim=st.sampled_from([1, 64, 521]),
    more=st.sampled_from([(), ("embedding",), ("prompt_loss", "hidden_3")]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_estimate_is_within_five_percent(rows, per_shard, dim, more):
    spec = make_spec(projection=Projection(dim, 42, "signfold-1"), signals=(*SPEC.signals, *more))
    ids = make_ids(rows)
    with memory_folder() as folder, open_writer(folder / "s", spec) as writer:
        for start in range(0, rows, per_shard):
            some = ids[start : start + per_shard]
            result = measure(some, dim=dim)
            extra = {"prompt_loss": np.ones(len(some)), "hidden_3": np.ones((len(some), 5), np.float32)}
            result = dataclasses.replace(
                result,
                embedding=embeddings(some) if "embedding" in more else None,
                extra={name: array for name, array in extra.items() if name in more},
            )
            writer.commit(result)
        needed = bytes_needed(spec, ids, per_shard, widths={"embedding": WIDTH, "hidden_3": 5}, block=512)
        # a shard of rows that could not be measured compresses better, and the last shard is shorter than the others
        slack = 0.05 * taken(folder / "s", 512) + 1024 * (1 + rows // per_shard)
        assert abs(needed - taken(folder / "s", 512)) <= slack


def test_nothing_left_needs_nothing():
    assert bytes_needed(SPEC, [], 64) == 0


def test_a_long_shard_is_not_made_up_whole():
    ids = make_ids(20_000)
    short, long = (bytes_needed(SPEC, ids[:n], 50_000, block=1) for n in (512, 20_000))
    assert long == pytest.approx(short * 20_000 / 512, rel=0.05)


def test_a_disk_with_less_is_refused_with_both_numbers(room, monkeypatch):
    ids = make_ids(100)
    needed = refuse_if_it_does_not_fit(room, SPEC, ids, 10)
    asked = []

    def disk(folder):
        asked.append(folder)
        return SimpleNamespace(f_frsize=4096, f_bavail=needed // 4096 - spare)

    monkeypatch.setattr(os, "statvfs", disk)
    spare = 0
    assert refuse_if_it_does_not_fit(room, SPEC, ids, 10) == needed
    spare = 1
    with pytest.raises(DiskFullError, match="will not fit") as caught:
        refuse_if_it_does_not_fit(room, SPEC, ids, 10)
    assert caught.value.exit_code == 28
    assert str(needed) in caught.value.expected
    assert str(needed - 4096) in str(caught.value.got)
    assert "collect.check_disk=false" in caught.value.do
    assert refuse_if_it_does_not_fit(room, SPEC, ids[:50], 10) < needed, "what is committed needs no room again"
    assert asked == [room] * 3


def test_a_disk_that_cannot_be_asked_is_an_error(room):
    with pytest.raises(StoreError, match="cannot be read"):
        refuse_if_it_does_not_fit(room / "absent", SPEC, make_ids(1), 1)
