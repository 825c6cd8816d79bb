from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.reliability.store_machine import StoreAgainstDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_world import (
    DIRECTIONS,
    EMBEDDING_SPEC,
    SPEC,
    content,
    fill,
    make_ids,
    make_spec,
    measure,
    read,
    truth,
)

from gradsift.errors import DataError, NumericsError, SpecError, StoreError
from gradsift.store.shards import unit_name
from gradsift.store.signals import open_store
from gradsift.store.verify import verify_store
from gradsift.store.writer import open_writer
from gradsift.types import RowStatus

UNIVERSE = make_ids(24)
FORMATS = sorted(Path(__file__).parent.glob("format_*"))


def test_everything_reads_back_bit_for_bit(filled):
    assert read(filled) == truth(make_ids(20))


@pytest.mark.parametrize("change", [{}, {"projection": None, "signals": ("loss", "grad_norm", "dots")}])
def test_no_rows_yet(room, change):
    spec = make_spec(**change)
    open_writer(room / "s", spec).close()
    store = open_store(room / "s", spec)
    assert store.size == 0
    assert store.dots(DIRECTIONS).shape == (0, 2)
    assert store.status_counts == {}


def test_a_store_of_losses_alone(room):
    spec = make_spec(signals=("loss",), anchors={}, projection=None, adapter_sha256=None)
    full = measure(UNIVERSE)
    none = np.full(len(UNIVERSE), np.nan)
    result = dataclasses.replace(
        full, directions=(), dots=np.zeros((24, 0)), sketch=None, grad_norm=none, emb_grad_norm=none
    )
    with open_writer(room / "s", spec) as writer:
        writer.commit(result)
    store = open_store(room / "s")
    assert np.array_equal(store.loss, full.loss, equal_nan=True)
    assert np.isnan(store.grad_norm).all()
    with pytest.raises(StoreError, match="no sketches"):
        store.unit_sketch(UNIVERSE[:1])
    with pytest.raises(StoreError, match="not measured"):
        store.dots(["math"])


def test_rows_come_in_id_order_and_statuses_add_up(filled):
    store = open_store(filled)
    assert list(store.ids) == sorted(store.ids)
    assert sum(store.status_counts.values()) == store.size == 20
    assert store.status_counts["TRUNCATED"] == 3
    assert store.num_tokens.dtype == np.int64
    with pytest.raises(ValueError):
        store.loss[0] = 1.0


@given(st.permutations(make_ids(20)), st.integers(1, 20))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_take_is_fancy_indexing(filled, order, count):
    store = open_store(filled)
    view = store.take(order[:count])
    assert list(view.ids) == list(order[:count])
    at = store.positions(order[:count])
    for name in ("loss", "grad_norm", "emb_grad_norm", "all_dots", "num_tokens"):
        assert np.array_equal(getattr(view, name), getattr(store, name)[at], equal_nan=True)
    usable = [name for name, s in zip(view.ids, view.status) if s.usable]
    assert np.array_equal(view.unit_sketch(usable), store.unit_sketch(usable))
    assert view.take(view.ids).ids == view.ids


def test_gather_is_the_sketch_up_to_half_precision(filled):
    store, ids = open_store(filled), [n for n in make_ids(20) if truth([n])[n][1].usable][::-1]
    want = measure(ids).sketch.astype(np.float64)
    norm = measure(ids).grad_norm
    assert norm.max() / norm.min() > 1e3, "norms far apart are the point of storing unit sketches"
    got = store.gather(ids)
    assert got.dtype == np.float32
    assert np.abs(got - want).max(axis=1) == pytest.approx(0 * norm, abs=2.0**-10 * norm.max())
    assert (np.abs(got - want) <= 2.0**-10 * np.abs(want) + 1e-7 * norm[:, None]).all()
    unit = store.unit_sketch(ids)
    assert np.array_equal(unit, (want / norm[:, None]).astype(np.float16).astype(np.float32))


def test_rows_without_a_gradient_have_no_sketch(filled):
    store = open_store(filled)
    bad = next(name for name, s in zip(store.ids, store.status) if s is RowStatus.ZERO_GRAD)
    with pytest.raises(StoreError, match=f"(?s){bad}.*ZERO_GRAD"):
        store.gather([bad])
    assert np.isnan(store.take([bad]).dots(["math"])).all()
    assert store.take([bad]).grad_norm[0] == 0.0


def test_dots_in_the_order_asked(filled):
    store = open_store(filled)
    assert np.array_equal(store.dots(["target", "math"]), store.all_dots[:, ::-1], equal_nan=True)
    with pytest.raises(StoreError, match="chat"):
        store.dots(["chat"])


def test_dots_follow_their_names_not_their_places(room):
    result = measure(UNIVERSE)
    turned = dataclasses.replace(result, directions=DIRECTIONS[::-1], dots=result.dots[:, ::-1])
    with open_writer(room / "s", SPEC) as writer:
        writer.commit(turned)
    assert read(room / "s") == truth(UNIVERSE)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "emb_grad_norm", "dots", "sketch"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_usable_row_with_a_bad_number_is_refused_and_nothing_written(room, name, value):
    result = measure(UNIVERSE)
    array = getattr(result, name).copy()
    array[2] = value
    with open_writer(room / "s", SPEC) as writer:
        with pytest.raises(NumericsError, match=f"(?s){name}.*row-00002"):
            writer.commit(dataclasses.replace(result, **{name: array}))
        assert list((room / "s" / "shards").iterdir()) == []
        writer.commit(result)
    assert read(room / "s") == truth(UNIVERSE)


def test_a_norm_of_zero_is_no_usable_norm(room):
    result = measure(UNIVERSE)
    norm = result.grad_norm.copy()
    norm[0] = 0.0
    with open_writer(room / "s", SPEC) as writer, pytest.raises(NumericsError, match="ZERO_GRAD"):
        writer.commit(dataclasses.replace(result, grad_norm=norm))


def test_a_sketch_too_long_for_half_precision_is_refused(room):
    result = measure(UNIVERSE)
    sketch = result.sketch.copy()
    sketch[0] = 7e4 * result.grad_norm[0]
    with open_writer(room / "s", SPEC) as writer, pytest.raises(NumericsError, match="longer"):
        writer.commit(dataclasses.replace(result, sketch=sketch))


def test_odd_text_in_ids_and_reasons(room):
    names = ("a/../b-0", "\u05d0\u0000-1", "=cmd()-2", "x" * 3000 + "-4")
    result = dataclasses.replace(measure(make_ids(4)), ids=names, reason=("lone \ud800", "", "\u202e", "\n"))
    with open_writer(room / "s", SPEC) as writer:
        writer.commit(result)
        with pytest.raises(DataError, match="ud800"):
            writer.commit(dataclasses.replace(measure(make_ids(1)), ids=("\ud800",)))
    store = open_store(room / "s").take(names)
    assert store.ids == names
    assert store.reason[0] == "lone \\ud800"
    assert {p.name for p in room.rglob("*") if p.is_dir()} == {"s", "shards", "ledger"}


def test_a_repeat_is_counted_and_changes_nothing(filled):
    before = read(filled)
    with open_writer(filled, SPEC) as writer:
        assert writer.commit(measure(make_ids(20)[3:9])).num_repeated == 6
        done = writer.commit(measure(make_ids(22)[15:]))
        assert (done.num_rows, done.num_repeated) == (2, 5)
    assert read(filled).items() > before.items()
    assert read(filled) == truth(make_ids(22))


def test_a_changed_row_is_refused_by_name(filled):
    changed = measure(["row-00007", "row-00999"], edition=1)
    with open_writer(filled, SPEC) as writer:
        for ask in (
            lambda: writer.commit(changed),
            lambda: writer.missing(changed.ids, changed.content_hashes),
        ):
            with pytest.raises(SpecError) as caught:
                ask()
            assert "row-00007" in caught.value.where
            assert content("row-00007") in caught.value.expected
            assert content("row-00007", 1) in caught.value.got
        assert "row-00999" not in writer.committed_ids()
    assert read(filled) == truth(make_ids(20))


def test_unit_names_follow_ids_contents_and_order():
    base = measure(UNIVERSE[:3])
    names = {
        base.unit,
        measure(UNIVERSE[:3], edition=1).unit,
        measure(UNIVERSE[:3][::-1]).unit,
        measure(UNIVERSE[:2]).unit,
        unit_name(("ab",), ("c",)),
        unit_name(("a",), ("bc",)),
    }
    assert len(names) == 6
    assert base.take(np.arange(3)).unit == base.unit


def test_modes_keep_others_out(filled):
    old = os.umask(0)
    try:
        fill(filled, make_ids(30), 5)
    finally:
        os.umask(old)
    for path in [filled, *filled.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_shape_error_is_our_own_mistake():
    good = measure(UNIVERSE)
    for bad in (
        {"ids": (UNIVERSE[0],) * 24},
        {"loss": good.loss[:3]},
        {"dots": good.dots[:, :1]},
        {"sketch": good.sketch[:3]},
        {"embedding": good.sketch[:3]},
        {"status": good.status[:1]},
    ):
        with pytest.raises(ValueError):
            dataclasses.replace(good, **bad)


def test_the_store_needs_no_torch():
    code = "import gradsift.store.verify, gradsift.store.signals, sys; print({'torch', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("folder", [p for p in FORMATS if p.name < "format_3"], ids=lambda p: p.name)
def test_every_released_format_still_opens(folder):
    """Stores of every format, written by ``fill(folder, make_ids(6), 4)``, from 2 on with embeddings; never change them."""
    embedding = folder.name != "format_1"
    assert verify_store(folder).ok
    assert read(folder, EMBEDDING_SPEC if embedding else SPEC) == truth(make_ids(6), embedding=embedding)


def test_a_store_is_written_in_the_oldest_format_that_holds_its_signals(room):
    for number, spec in enumerate([SPEC, EMBEDDING_SPEC], start=1):
        fill(room / str(number), make_ids(6), 4, spec=spec)
        for name in ("spec.json", *(f"ledger/{p.name}" for p in (room / str(number) / "ledger").iterdir())):
            assert json.loads((room / str(number) / name).read_bytes())["format"] == number
        kept = Path(__file__).parent / f"format_{number}"
        assert (room / str(number) / "spec.json").read_bytes() == (kept / "spec.json").read_bytes()


def test_there_is_a_store_of_this_format():
    from gradsift.store.spec import FORMAT

    assert f"format_{FORMAT}" in [p.name for p in FORMATS]


class Machine(StoreAgainstDict):
    """Deliver, repeat, reorder, change, crash, reopen: after every step the store equals a dictionary."""


TestStoreAgainstDict = Machine.TestCase
TestStoreAgainstDict.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(900)  # 500 examples; 120 s are not enough on a busy machine
def test_store_against_dict_at_length():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Machine, settings=settings(max_examples=500, stateful_step_count=40, deadline=None))
