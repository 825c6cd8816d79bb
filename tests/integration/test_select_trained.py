"""grads and less from files to a chosen file: the warm-up in the run folder, its passes, resume and refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.rows import some_rows, world, write_jsonl

from gradsift import select
from gradsift.errors import ConfigError, DataError, SignalError
from gradsift.report.overhead import overhead
from gradsift.store.signals import open_store

SMALL = {"collect.rows_per_shard": 5, "collect.sketch_dim": 251, "warmup.batch_size": 4, "warmup.lr": 1e-3}


def run(files, out, navigator, method, budget="25%", target=True, **settings):
    return select(
        {"pool": files["pool"]}, method=method, budget=budget, out=out, anchors={"math": files["math"]},
        target=files["target"] if target else None, navigator=navigator, settings={**SMALL, **settings}, report=False,
    )  # fmt: skip


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_grads_trains_an_epoch_and_measures_there(tmp_path, navigator, parameters):
    files, out = world(tmp_path, 40), tmp_path / "run"
    selection = run(files, out, navigator, "grads", target=False, **{"navigator.parameters": parameters})
    said = manifest(out)
    assert len(selection.ids) == 10
    assert said["warmup"]["num_rows"] == said["rows"]["usable"]
    assert said["cost"]["tokens"]["warmup"] == said["warmup"]["tokens"] == said["rows"]["tokens"]
    assert said["cost"]["seconds"]["warmup"] > 0
    base = tmp_path / "base"
    cold = run(files, base, navigator, "grads", target=False, at_base=True, **{"navigator.parameters": parameters})
    where = "adapter_sha256" if parameters == "lora" else "model_sha256"
    assert said["spec"][where] != manifest(base)["spec"][where]
    assert not np.array_equal(selection.score, cold.score)
    assert manifest(base)["warmup"] is None
    assert "reconstruction" in [note.code for note in selection.notes]
    again = run(files, out, navigator, "grads", target=False, **{"navigator.parameters": parameters})
    np.testing.assert_array_equal(again.score, selection.score)
    assert "warmup" not in manifest(out)["cost"]["tokens"]  # read back, not trained again
    assert manifest(out)["warmup"]["tokens"] == said["warmup"]["tokens"]
    bills = [overhead(one, {}) for one in (said, manifest(out))]
    assert [next(p.tokens for p in bill.parts if p.name == "warmup") for bill in bills] == [
        said["warmup"]["tokens"]
    ] * 2


def test_less_measures_adam_directions_at_two_checkpoints(tmp_path, navigator):
    files, out = world(tmp_path, 30), tmp_path / "run"
    files["target"] = write_jsonl(
        tmp_path / "t.jsonl", [{**row, "subtask": "odd" if k % 2 else "even"} for k, row in enumerate(some_rows(6, 3))]
    )
    selection = run(files, out, navigator, "less", warmup_share=0.5)
    said = manifest(out)
    assert len(selection.ids) == 7
    assert [one["epoch"] for one in said["warmup"]["checkpoints"]] == [2, 4]
    assert said["warmup"]["checkpoints"][0]["lr"] > said["warmup"]["checkpoints"][1]["lr"] > 0
    assert said["spec"]["direction"].startswith("adam/")
    assert any("taken by even" in reason for reason in selection.reason)
    assert any("taken by odd" in reason for reason in selection.reason)
    stores = [open_store(next((out / name).iterdir())) for name in ("signals", "signals-epoch-2")]
    assert stores[0].spec.key != stores[1].spec.key
    assert stores[0].spec.adapter_sha256 != stores[1].spec.adapter_sha256
    assert stores[0].spec.direction != stores[1].spec.direction
    ids = [name for name, status in zip(stores[0].ids, stores[0].status) if status.usable]
    for store in stores:  # unit length, in what a float16 holds
        np.testing.assert_allclose(np.linalg.norm(store.unit_sketch(ids), axis=1), 1.0, atol=2e-3)
    table = pq.read_table(out / "selection" / "audit.parquet")
    assert table["selected"].to_pylist().count(True) == 7


def test_a_warm_up_that_lost_an_epoch_is_trained_again_to_the_same_choice(tmp_path, navigator):
    files, out = world(tmp_path, 30), tmp_path / "run"
    first = run(files, out, navigator, "less", warmup_share=0.5)
    kept = next((out / "warmup").iterdir())
    digest = manifest(out)["warmup"]["checkpoints"]
    weights = kept / "epoch-4" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for folder in ("signals", "signals-epoch-2"):
        shutil.rmtree(out / folder)
    second = run(files, out, navigator, "less", warmup_share=0.5)
    np.testing.assert_array_equal(first.score, second.score)
    assert manifest(out)["warmup"]["checkpoints"] == digest


def test_a_row_that_fails_at_one_checkpoint_is_left_out_and_counted(tmp_path, navigator, monkeypatch):
    from gradsift.gradients import collect
    from gradsift.types import RowStatus

    files, real = world(tmp_path, 30), collect._status
    seen = []

    def broken(values, k, row, gradients):
        if row.id == bad:
            seen.append(row.id)
            if len(seen) == 1:  # at the first checkpoint only
                return RowStatus.NONFINITE_GRAD, "its gradient norm is inf"
        return real(values, k, row, gradients)

    bad = run(files, tmp_path / "whole", navigator, "less", warmup_share=0.5).ids[0]
    monkeypatch.setattr(collect, "_status", broken)
    found = run(files, tmp_path / "run", navigator, "less", warmup_share=0.5)
    assert bad not in found.problem_ids
    assert next(note for note in found.notes if note.code == "lost_at_checkpoint").ids == (bad,)
    table = pq.read_table(tmp_path / "run" / "selection" / "audit.parquet").to_pylist()
    line = next(row for row in table if row["id"] == bad)
    assert line["reason"] == "at an earlier checkpoint its gradient norm is inf"
    assert line["status"] == "NONFINITE_GRAD"


def test_the_cold_form_measures_plain_gradients_at_the_start(tmp_path, navigator):
    files, out = world(tmp_path, 24), tmp_path / "run"
    selection = run(files, out, navigator, "less", allow_cold=True)
    assert manifest(out)["spec"]["direction"] == "raw"
    assert not (out / "warmup").exists()
    assert len(selection.ids) == 6


def test_refusals_come_before_a_model_loads(tmp_path, navigator):
    files = world(tmp_path, 24)
    with pytest.raises(ConfigError, match="less needs a target set"):
        run(files, tmp_path / "a", navigator, "less", target=False)
    with pytest.raises(ConfigError, match="trains the navigator itself"):
        run(files, tmp_path / "b", navigator, "less", **{"navigator.lora.warmup_share": 0.1})
    with pytest.raises(ConfigError, match="bfloat16"):
        run(files, tmp_path / "c", navigator, "grads", **{"navigator.parameters": "all", "navigator.dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="checkpoint after an epoch"):
        run(files, tmp_path / "d", navigator, "less", num_checkpoints=5)
    small = {
        "big": write_jsonl(tmp_path / "big.jsonl", some_rows(24, 0)),
        "few": write_jsonl(tmp_path / "few.jsonl", some_rows(9, 5)),
    }
    with pytest.raises(
        DataError, match="grads needs more rows of few"
    ) as refusal:  # and not after an epoch of training
        select(small, method="grads", budget="4", out=tmp_path / "e", navigator=navigator, settings=SMALL, report=False)
    assert "per_source=false" in refusal.value.do
    assert not any((tmp_path / name).exists() for name in "abcde")


def test_another_scale_of_the_adapter_or_another_arithmetic_is_trained_anew(tmp_path, navigator):
    files, out = world(tmp_path, 24), tmp_path / "run"
    for k, changed in enumerate(({}, {"navigator.lora.alpha": 64}, {"navigator.dtype": "bfloat16"}), start=1):
        for name in ("signals", "active"):
            shutil.rmtree(out / name, ignore_errors=True)
        run(files, out, navigator, "grads", target=False, **changed)
        assert manifest(out)["cost"]["tokens"]["warmup"] > 0
        assert len(list((out / "warmup").iterdir())) == k


def test_a_dry_run_counts_the_training_and_every_pass(tmp_path, navigator):
    from gradsift.pipeline.estimate import estimate
    from gradsift.pipeline.progress import Silent
    from gradsift.recipe import build_recipe

    files = world(tmp_path, 24)

    def plan(method, **settings):
        values = {
            "pool": [{"label": "pool", "path": str(files["pool"])}], "target": str(files["target"]), "budget": "25%",
            "navigator": {"model": str(navigator)}, "method": {"name": method, "settings": settings},
        }  # fmt: skip
        return estimate(build_recipe(values), Silent())

    cold, warm, whole = plan("grads", at_base=True), plan("less", warmup_share=0.5), plan("grads")
    assert (cold.warmup_tokens, cold.num_passes) == (0, 1)
    assert whole.warmup_tokens == whole.tokens["pool"]
    assert 4 * 0.3 * warm.tokens["pool"] < warm.warmup_tokens < 4 * 0.7 * warm.tokens["pool"]
    assert warm.num_passes == 2
    assert warm.disk_bytes > cold.disk_bytes
    assert any("and 2 passes" in text for part, text in warm.lines() if part == "warm-up")
    assert not any(part == "warm-up" for part, _ in cold.lines())


def test_needs_and_cost_say_that_the_navigator_is_trained():
    from gradsift.methods import make_method

    assert make_method("grads", {}).needs.cost_class == make_method("less", {}).needs.cost_class == "trained"
    assert make_method("grads", {"at_base": True}).needs.cost_class == "gradient"
    assert make_method("less", {"allow_cold": True}).needs.cost_class == "gradient"


def test_a_problem_without_checkpoints_is_refused(tmp_path):
    from dataclasses import replace

    from gradsift.methods import make_method
    from gradsift.seeds import stream
    from gradsift.types import Budget
    from planted import planted_world

    problem = replace(planted_world("influence").problem(), checkpoints=())
    with pytest.raises(SignalError, match="checkpoints"):
        make_method("less", {}).select(problem, Budget(rows=3), stream(1, "select/less"))
