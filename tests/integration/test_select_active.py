"""Active anchors from files to a chosen file: the rows that oppose the target most, whatever the order, found once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.rows import world, write_jsonl

from gradsift.errors import ConfigError
from gradsift.methods import make_method
from gradsift.models.load import load_navigator
from gradsift.pipeline.prepare import prepare
from gradsift.pipeline.progress import Clock, Silent
from gradsift.pipeline.run import select
from gradsift.recipe import build_recipe

COUNT = 4


def recipe(files, model, **changes):
    values = {
        "pool": [{"label": "pool", "path": str(files["pool"])}],
        "anchors": [{"label": name, "path": str(files[name])} for name in ("math", "chat")],
        "target": str(files["target"]),
        "method": {"name": "ogs_dual", "settings": {"kappa": 0.5}},
        "budget": "6",
        "collect": {"rows_per_shard": 7, "sketch_dim": 251},
        "navigator": {"model": str(model), "parameters": "all"},
        "allow_weak_anchor": True,
        "active_anchors": COUNT,
        **changes,
    }
    return build_recipe({key: value for key, value in values.items() if value is not None})


def chosen(out: Path) -> dict[str, list[str]]:
    (path,) = (out / "active").glob("*.json")
    return {name: found["kept"] for name, found in json.loads(path.read_text()).items()}


def slow_gradients(prepared, source):
    """One ordinary backward per row, in id order."""
    model = load_navigator(prepared.resolved, dtype="float32", device="cpu").model.double()
    model.requires_grad_(True)
    out = {}
    for row in sorted(source.usable, key=lambda row: row.id):
        labels = torch.where(torch.tensor(row.trained), torch.tensor(row.input_ids, dtype=torch.long), -100)
        model.zero_grad()
        logits = model(torch.tensor(row.input_ids, dtype=torch.long)[None]).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], labels[1:], ignore_index=-100).backward()
        out[row.id] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()
    return out


def test_the_rows_are_those_that_oppose_the_target_most(tmp_path, navigator):
    files = world(tmp_path)
    asked = recipe(files, navigator)
    outcome = select(asked, tmp_path / "run")
    prepared = prepare(asked, make_method("ogs_dual", asked.method.settings), Clock(Silent()))
    target = torch.stack(list(slow_gradients(prepared, prepared.target).values())).mean(0)
    for source in prepared.anchors:
        rows = slow_gradients(prepared, source)
        cos = {i: float(torch.nn.functional.cosine_similarity(g, target, 0)) for i, g in rows.items()}
        want = sorted(sorted(cos, key=lambda i: (cos[i], i))[:COUNT])
        assert sorted(chosen(tmp_path / "run")[source.name]) == want
        # The direction is the mean over these rows only: its norm says so.
        mean = torch.stack([rows[i] for i in want]).mean(0)
        fact = next(d for d in outcome.manifest["directions"] if d["name"] == source.name)
        assert fact["num_rows"] == COUNT
        assert fact["norm"] == pytest.approx(float(mean.norm()), rel=1e-4)
    notes = [note for note in outcome.selection.notes if note.code == "active_anchor"]
    assert [note.count for note in notes] == [COUNT, COUNT]
    assert outcome.manifest["cost"]["tokens"]["active"] > 0


def test_row_order_does_not_matter_and_a_second_run_chooses_nothing(tmp_path, navigator, monkeypatch):
    files = world(tmp_path)
    first = select(recipe(files, navigator), tmp_path / "one")
    again = select(recipe(files, navigator), tmp_path / "one")
    assert again.selection.ids == first.selection.ids
    assert "active" not in again.manifest["cost"]["tokens"]
    rows = [json.loads(line) for line in files["math"].read_text().splitlines()]
    write_jsonl(files["math"], rows[::-1])
    other = select(recipe(files, navigator), tmp_path / "two")
    assert chosen(tmp_path / "two") == chosen(tmp_path / "one")
    assert other.selection.ids == first.selection.ids


def test_a_method_of_several_checkpoints_has_active_anchors_at_the_last(tmp_path, navigator):
    settings = {"warmup_share": 0.5, "epochs": 2}
    asked = recipe(world(tmp_path), navigator, method={"name": "less", "settings": settings})
    found = select(asked, tmp_path / "run")
    assert [d["num_rows"] for d in found.manifest["directions"]][:2] == [COUNT, COUNT]
    assert len(list((tmp_path / "run" / "active").iterdir())) == 1


def test_rows_that_were_renamed_are_chosen_anew(tmp_path, navigator):
    files = world(tmp_path)
    first = select(recipe(files, navigator), tmp_path / "one")
    rows = [json.loads(line) for line in files["math"].read_text().splitlines()]
    write_jsonl(files["math"], [{**row, "id": f"renamed{k}"} for k, row in enumerate(rows)])
    again = select(recipe(files, navigator), tmp_path / "one")
    assert again.selection.ids == first.selection.ids
    kept = [note.ids for note in again.selection.notes if note.code == "active_anchor"]
    assert all(name.startswith("renamed") for name in kept[0])


def test_signals_against_other_anchor_rows_are_other_signals(tmp_path, navigator):
    files = world(tmp_path)
    some = select(recipe(files, navigator), tmp_path / "some").manifest
    everything = select(recipe(files, navigator, active_anchors=None), tmp_path / "all").manifest
    as_many = select(recipe(files, navigator, active_anchors=10), tmp_path / "ten").manifest
    assert some["spec_key"] != everything["spec_key"] == as_many["spec_key"]
    np.testing.assert_array_equal(as_many["direction_cos"]["matrix"], everything["direction_cos"]["matrix"])


def test_without_a_target_it_is_refused_before_a_model_loads(tmp_path, navigator):
    with pytest.raises(ConfigError, match="active anchors are chosen by their cosine with the target"):
        select(recipe(world(tmp_path), "nowhere", target=None, method={"name": "conflict"}), tmp_path / "run")
