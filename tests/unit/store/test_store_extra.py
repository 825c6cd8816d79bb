"""Extra signals in the store: bit for bit as measured, refused where they are not, one file each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from store_world import SPEC, content, make_ids, make_spec, measure

from gradsift.errors import NumericsError, SpecError, StoreError
from gradsift.store.signals import open_store
from gradsift.store.spec import GradientSpec, store_folder
from gradsift.store.verify import repair_store, verify_store
from gradsift.store.writer import open_writer

NAMES = ("alone_loss", "hidden_0", "hidden_12", "prompt_loss")
EXTRA_SPEC = make_spec(signals=(*SPEC.signals, *NAMES))
KEPT = Path(__file__).parent / "format_3"


def with_extra(result):
    numbers = [int(name.rpartition("-")[2]) for name in result.ids]
    usable = result.usable
    extra = {
        "prompt_loss": np.where(usable, np.sqrt(numbers), np.nan),
        "alone_loss": np.where(usable, np.log1p(numbers), np.nan),
        "hidden_0": np.where(usable[:, None], np.outer(numbers, [0.1, 0.2, 0.3]), np.nan).astype(np.float32),
        "hidden_12": np.where(usable[:, None], np.outer(numbers, [-0.1, 1 / 3, 0.0]), np.nan).astype(np.float32),
    }
    return dataclasses.replace(result, extra=extra)


def fill(folder, ids, rows_per_shard=4, spec=EXTRA_SPEC):
    with open_writer(folder, spec) as writer:
        todo = writer.missing(ids, [content(name) for name in ids])
        for start in range(0, len(todo), rows_per_shard):
            writer.commit(with_extra(measure([ids[i] for i in todo[start : start + rows_per_shard]])))


def check(folder, ids):
    store, whole = open_store(folder, EXTRA_SPEC), with_extra(measure(ids))
    usable = [name for name, ok in zip(ids, whole.usable, strict=True) if ok][::-1]
    at = [ids.index(name) for name in usable]
    for name in NAMES:
        got = store.extra(name, usable)
        assert got.dtype == (np.float32 if name.startswith("hidden") else np.float64)
        assert got.tobytes() == whole.extra[name][at].tobytes()


def test_what_is_read_is_what_was_measured_also_after_a_stop(tmp_path):
    ids = make_ids(23)
    fill(tmp_path / "store", ids[:9])
    fill(tmp_path / "store", ids, 5)
    check(tmp_path / "store", ids)
    assert verify_store(tmp_path / "store").ok


def test_the_kept_store_of_format_3_still_opens():
    """Written by ``fill(folder, make_ids(6), 4)``; never change it."""
    assert verify_store(KEPT).ok
    check(KEPT, make_ids(6))


def test_only_stores_with_extra_signals_have_the_new_format(tmp_path):
    fill(tmp_path / "s", make_ids(6))
    assert json.loads((tmp_path / "s" / "spec.json").read_bytes())["format"] == 3
    assert (tmp_path / "s" / "spec.json").read_bytes() == (KEPT / "spec.json").read_bytes()
    assert SPEC.format == 1
    assert SPEC.extras == ()
    assert EXTRA_SPEC.extras == NAMES
    assert GradientSpec.from_fields(EXTRA_SPEC.fields()) == EXTRA_SPEC


@pytest.mark.parametrize("name", ["hidden", "hidden_", "hidden_x", "prompt", "xprompt_loss", "hidden_3 "])
def test_an_unknown_name_is_our_own_mistake(name):
    with pytest.raises(ValueError, match="unknown signals"):
        make_spec(signals=(*SPEC.signals, name))


def test_a_store_without_them_is_refused(tmp_path):
    from store_world import fill as plain_fill

    plain_fill(tmp_path / "signals" / SPEC.key, make_ids(6), 4)
    with pytest.raises(SpecError, match="signals"):
        store_folder(tmp_path / "signals", EXTRA_SPEC)
    with pytest.raises(StoreError, match="prompt_loss was not measured"):
        open_store(tmp_path / "signals" / SPEC.key).extra("prompt_loss", [])


def test_a_row_that_is_not_usable_has_none(tmp_path):
    ids = make_ids(23)
    fill(tmp_path / "store", ids)
    bad = next(name for name, ok in zip(ids, measure(ids).usable, strict=True) if not ok)
    with pytest.raises(StoreError, match="has no hidden_0"):
        open_store(tmp_path / "store").extra("hidden_0", [bad])
    assert open_store(tmp_path / "store").extra("hidden_0", []).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_that_is_not_finite_is_refused_before_anything_is_written(name, tmp_path):
    result = with_extra(measure(make_ids(3)))
    result.extra[name][1] = np.nan
    with open_writer(tmp_path / "s", EXTRA_SPEC) as writer, pytest.raises(NumericsError, match=name):
        writer.commit(result)


def test_signals_that_the_spec_does_not_name_are_our_own_mistake(tmp_path):
    with open_writer(tmp_path / "s", SPEC) as writer, pytest.raises(ValueError, match="extra signals"):
        writer.commit(with_extra(measure(make_ids(3))))
    with open_writer(tmp_path / "t", EXTRA_SPEC) as writer, pytest.raises(ValueError, match="extra signals"):
        writer.commit(measure(make_ids(3)))
    with pytest.raises(ValueError, match=r"extra\['prompt_loss'\]"):
        dataclasses.replace(measure(make_ids(3)), extra={"prompt_loss": np.zeros(2)})


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_found_and_the_shard_measured_again(name, tmp_path):
    ids = make_ids(8)
    fill(tmp_path / "s", ids)
    path = next((tmp_path / "s" / "shards").glob(f"*-{name}.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert [d.path.endswith(f"-{name}.npy") for d in verify_store(tmp_path / "s").damage] == [True]
    usable = [
        n for n, s in zip(open_store(tmp_path / "s").ids, open_store(tmp_path / "s").status, strict=True) if s.usable
    ]
    with pytest.raises(StoreError):
        open_store(tmp_path / "s").extra(name, usable)
    assert any(moved.endswith(f"-{name}.npy") for moved in repair_store(tmp_path / "s").moved)
    fill(tmp_path / "s", ids)
    check(tmp_path / "s", ids)
