from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_world import DIM, SPEC, fill, make_ids, make_spec, read, truth

from gradsift.errors import SpecError, StoreError
from gradsift.gradients.project import VERSION
from gradsift.manifest import seal
from gradsift.store.signals import open_store
from gradsift.store.spec import FORMAT, GradientSpec, Projection, compare, content_hash, set_hash, store_folder
from gradsift.store.writer import open_writer

CHANGES = {
    "parameters": "all",
    "parameters_sha256": "q" * 64,
    "model_sha256": "n" * 64,
    "tokenizer_sha256": "u" * 64,
    "loss_on": "all",
    "max_length": 1024,
    "signals": ("grad_norm", "dots", "sketch", "emb_grad_norm"),
    "code_version": "engine-2",
    "adapter_sha256": None,
    "template_sha256": "d" * 64,
    "dtype": "bfloat16",
    "reduction": "sum",
    "direction": "sign",
    "truncation": "keep_end",
    "layers": "23 to 30 of 30",
    "positions": "trained",
    "dots": "folded",
    "projection.dim": Projection(13, 42, "signfold-1"),
    "projection.seed": Projection(DIM, 43, "signfold-1"),
    "projection.version": Projection(DIM, 42, "signfold-2"),
    "projection.kind": Projection(DIM, 42, "signfold-1", kind="gauss"),
    "anchors.math": {"math": "edited", "target": "hash of target"},
    "anchors.chat": {**SPEC.anchors, "chat": "new"},
    "anchors.target": {"math": "hash of math"},
}


def test_the_matrix_covers_every_field():
    changed = {name.partition(".")[0] for name in CHANGES}
    assert changed == {field.name for field in dataclasses.fields(GradientSpec)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_refused_by_name_with_old_and_new_value(filled, name):
    other = make_spec(**{name.partition(".")[0]: CHANGES[name]})
    assert other.key != SPEC.key
    before = read(filled)
    for opening in (
        lambda: open_writer(filled, other),
        lambda: open_store(filled, other),
        lambda: compare(SPEC, other),
    ):
        with pytest.raises(SpecError) as caught:
            opening()
        error = caught.value
        assert error.exit_code == 2
        assert error.what.startswith(f"{name} ")
        old, new = SPEC.fields().get(name, "absent"), other.fields().get(name, "absent")
        for value, line in ((old, error.expected), (new, str(error.got))):
            assert f"{name}: {', '.join(value) if isinstance(value, list) else value}" in line
        assert "another --out" in error.do
        assert name in error.do
    assert read(filled) == before


def test_sketches_of_an_older_map_are_read_but_not_continued(filled):
    """signfold-1 had another map; its stores name it, so that the two never meet in one store."""
    newer = make_spec(projection=Projection(DIM, 42, VERSION))
    assert SPEC.projection.version == "signfold-1" != VERSION
    before = read(filled)
    with pytest.raises(SpecError, match=r"projection\.version") as caught:
        open_writer(filled, newer)
    assert caught.value.expected == "projection.version: signfold-1"
    assert caught.value.got == f"projection.version: {VERSION}"
    assert "stay readable" in caught.value.do
    with pytest.raises(SpecError, match=r"projection\.version"):
        store_folder(filled.parent, newer)
    assert open_store(filled).spec == SPEC
    assert read(filled) == before


def test_a_run_folder_with_another_store_is_refused(room):
    fill(store_folder(room, SPEC), make_ids(3), 2)
    assert store_folder(room, SPEC) == room / SPEC.key
    with pytest.raises(SpecError, match="max_length"):
        store_folder(room, make_spec(max_length=7))


@pytest.mark.parametrize("rows_per_shard", [1, 5, 100])
@pytest.mark.parametrize("order", ["as is", "reversed", "shuffled"])
def test_what_does_not_change_the_meaning_resumes(filled, rows_per_shard, order):
    ids = list(make_ids(27))
    if order != "as is":
        ids = ids[::-1] if order == "reversed" else [str(i) for i in np.random.default_rng(3).permutation(ids)]
    measured = []
    fill(filled, ids, rows_per_shard, measured=lambda result: measured.extend(result.ids))
    assert sorted(measured) == list(make_ids(27)[20:])
    assert read(filled) == truth(make_ids(27))


def test_spec_reads_back_and_hashes():
    again = GradientSpec.from_fields(json.loads(json.dumps(SPEC.fields())))
    assert again == SPEC
    assert again.key == SPEC.key
    assert hash(again) == hash(SPEC)
    compare(SPEC, again)


def test_key_ignores_the_order_signals_and_anchors_are_listed_in():
    turned = make_spec(signals=SPEC.signals[::-1], anchors=dict(reversed(SPEC.anchors.items())))
    assert turned.key == SPEC.key


@pytest.mark.parametrize(
    "bad",
    [
        {"signals": ("loss", "flavour")},
        {"projection": None},
        {"anchors": {}},
        {"signals": ("loss", "dots", "sketch")},
    ],
)
def test_impossible_specs(bad):
    with pytest.raises(ValueError):
        make_spec(**bad)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8), st.data())
def test_content_hash_sees_every_token_and_label(ids, data):
    tokens = np.array(ids, dtype=np.int32)
    trained = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    at = data.draw(st.integers(0, len(ids) - 1))
    base = content_hash(tokens, trained)
    assert base == content_hash(tokens.astype(np.int64), trained)
    other, mask = tokens.copy(), trained.copy()
    other[at] ^= 1
    mask[at] ^= True
    assert len({base, content_hash(other, trained), content_hash(tokens, mask), content_hash(tokens[1:], trained)}) == 4


@given(st.lists(st.sampled_from(["aa", "bb", "cc"]), max_size=5), st.randoms())
def test_set_hash_forgets_the_order_and_keeps_the_number(hashes, random):
    turned = list(hashes)
    random.shuffle(turned)
    assert set_hash(turned) == set_hash(hashes)
    assert set_hash([*hashes, "aa"]) != set_hash(hashes)


def test_a_store_from_the_future_is_refused_in_plain_words(filled):
    future = seal({"format": FORMAT + 1, "key": SPEC.key, "fields": SPEC.fields()})
    (filled / "spec.json").write_bytes(future)
    for opening in (lambda: open_store(filled), lambda: open_writer(filled, SPEC)):
        with pytest.raises(StoreError, match="newer gradsift") as caught:
            opening()
        assert caught.value.got == f"format {FORMAT + 1}"
        assert "upgrade" in caught.value.do


def test_a_record_from_the_future_is_refused(filled):
    path = next((filled / "ledger").iterdir())
    value = json.loads(path.read_bytes())
    del value["seal"]
    for extra in ({}, {"a new field": 1}):
        path.write_bytes(seal({**value, **extra, "format": FORMAT + 1}))
        with pytest.raises(StoreError, match="newer gradsift"):
            open_store(filled)


def test_a_lost_description_is_rewritten_only_by_the_run_it_belongs_to(filled):
    before = read(filled)
    (filled / "spec.json").unlink()
    with pytest.raises(StoreError, match="no signal store"):
        open_store(filled)
    with pytest.raises(SpecError, match="do not belong"):
        open_writer(filled, make_spec(max_length=3))
    open_writer(filled, SPEC).close()
    assert read(filled) == before
