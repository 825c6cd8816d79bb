"""The whole road on a toy navigator: resume, refusals, invariance, files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from tests.rows import chat, some_rows, world, write_jsonl

from gradsift import select
from gradsift.errors import BudgetError, ConfigError, DataError, DiskFullError, GradsiftError, SpecError
from gradsift.recipe import build_recipe
from gradsift.train.material import find_selection
from gradsift.types import RowStatus

SMALL = {"collect.rows_per_shard": 5, "collect.sketch_dim": 251}


def run(files, out, navigator, method="ogs_dual", budget="25%", **options):
    settings = {**SMALL, **options.pop("settings", {})}
    pool = options.pop("pool", {"pool": files["pool"]})
    return select(
        pool,
        method=method,
        budget=budget,
        out=out,
        anchors={"math": files["math"], "chat": files["chat"]},
        target=files["target"],
        navigator=navigator,
        settings=settings,
        report=False,
        **options,
    )


def audit(out):
    return pq.read_table(out / "selection" / "audit.parquet")


def test_a_run_leaves_every_file_and_a_full_audit(tmp_path, navigator):
    files = world(tmp_path)
    out = tmp_path / "run"
    selection = run(files, out, navigator)
    table = audit(out)
    assert table.column_names == [
        "id", "source", "file", "row", "status", "num_tokens", "num_trained", "loss", "grad_norm", "cos_math",
        "cos_chat", "cos_target", "score", "rank", "cluster", "selected", "order",
        "weight", "undecided", "reason_code", "reason",
    ]  # fmt: skip
    assert table["row"].to_pylist() == list(range(24))
    assert sum(table["selected"].to_pylist()) == len(selection.ids) == 6
    assert all(table["reason"].to_pylist())
    raw = files["pool"].read_bytes().split(b"\n")
    ids = table["id"].to_pylist()
    assert (out / "selection" / "selected.jsonl").read_bytes() == b"".join(
        raw[ids.index(i)] + b"\n" for i in selection.ids
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert sum(manifest["rows"]["status"].values()) == manifest["rows"]["read"] == 24
    assert manifest["selection"]["certificate"]["value"] <= manifest["selection"]["certificate"]["upper_bound"] + 1e-9
    assert set(manifest["sketch"]["noise_ratio"]) == {"math", "chat", "target"}
    assert build_recipe(yaml.safe_load((out / "recipe.yaml").read_text())).seed == 42
    assert (out / "selection" / "README.md").is_file()


def test_the_same_command_twice_is_bit_identical_and_measures_nothing(tmp_path, navigator):
    files = world(tmp_path)
    first = run(files, tmp_path / "a", navigator)
    second = run(files, tmp_path / "b", navigator)
    assert first.ids == second.ids
    np.testing.assert_array_equal(first.score, second.score)
    before = (tmp_path / "a" / "selection" / "audit.parquet").read_bytes()
    again = run(files, tmp_path / "a", navigator)
    np.testing.assert_array_equal(first.score, again.score)
    assert (tmp_path / "a" / "selection" / "audit.parquet").read_bytes() == before
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["cost"]["tokens"].get("collect", 0) == 0


@pytest.mark.parametrize("method", ["ogs_dual", "target_cosine", "conflict", "hybrid", "norm", "loss", "rds"])
def test_row_order_and_batch_size_do_not_move_the_selection(tmp_path, navigator, method):
    files = world(tmp_path)
    base = run(files, tmp_path / "a", navigator, method)
    lines = files["pool"].read_text().splitlines()
    random.Random(5).shuffle(lines)
    files["pool"].write_text("\n".join(lines) + "\n")
    for n, (tokens, shard) in enumerate([(40, 3), (4000, 64)]):
        settings = {"collect.tokens_per_batch": tokens, "collect.rows_per_shard": shard}
        other = run(files, tmp_path / f"b{n}", navigator, method, settings=settings)
        bound = max(base.cut.bound, other.cut.bound)
        assert min(base.cut.margin, other.cut.margin) > bound, "this world must be decided, or the test shows nothing"
        assert set(base.ids) == set(other.ids)
        np.testing.assert_allclose(base.score, other.score, rtol=1e-4, atol=1e-5)


def test_killed_anywhere_and_resumed_gives_the_same_selection(tmp_path, navigator):
    """kill -9 at growing delays until the run finishes; then the stores and selections must agree."""
    files = world(tmp_path)
    want = run(files, tmp_path / "whole", navigator)
    script = (
        "import sys, time\nfrom tests.rows import world\nfrom pathlib import Path\nimport gradsift.gradients.collect as c\n"
        "old = c.measure_shard\n"
        "def slow(*a):\n    r = old(*a); print('shard', flush=True); time.sleep(0.3); return r\n"
        "import gradsift.pipeline.measure as m\nm.measure_shard = slow\n"
        "from tests.integration.test_select import run\n"
        "f = {n: Path(sys.argv[1]) / f'{n}.jsonl' for n in ('pool', 'math', 'chat', 'target')}\n"
        "run(f, Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", script, str(tmp_path), str(out), str(navigator)]
    for shards in (1, 2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
            for _ in range(shards):
                assert process.stdout.readline().strip() == "shard"
            os.kill(process.pid, signal.SIGKILL)
    committed = len(list(out.glob("signals/*/ledger/*.json")))
    assert committed >= 1, "a kill must come after something was committed, or the test shows nothing"
    got = run(files, out, navigator)
    assert got.ids == want.ids
    np.testing.assert_array_equal(got.score, want.score)


def test_a_changed_setting_is_refused_by_name_and_a_changed_budget_is_not(tmp_path, navigator):
    files = world(tmp_path)
    out = tmp_path / "run"
    run(files, out, navigator)
    for key, value in (("data.max_length", 50), ("navigator.dtype", "float64"), ("collect.sketch_dim", 509)):
        with pytest.raises(SpecError, match=key.split(".")[-1].replace("sketch_dim", "projection.dim")):
            run(files, out, navigator, settings={key: value})
    with pytest.raises(SpecError, match=r"seed|adapter"):
        run(files, out, navigator, seed=43)
    smaller = run(files, out, navigator, budget=3)
    assert len(smaller.ids) == 3
    other = run(files, out, navigator, method="target_cosine")
    assert other.method == "target_cosine"


def test_rows_may_be_added_but_not_taken_away(tmp_path, navigator):
    files = world(tmp_path)
    out = tmp_path / "run"
    run(files, out, navigator)
    with files["pool"].open("a") as file:
        file.write(json.dumps(chat("new?", "yes new")) + "\n")
    run(files, out, navigator)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"]["read"] == 25
    assert 0 < manifest["cost"]["tokens"]["collect"] < 100
    files["pool"].write_text("".join(files["pool"].read_text().splitlines(keepends=True)[3:]))
    with pytest.raises(DataError, match="no longer in the pool"):
        run(files, out, navigator)


def test_copies_are_dropped_or_share_the_signals_of_the_first(tmp_path, navigator):
    files = world(tmp_path)
    rows = some_rows(10, 0)
    write_jsonl(files["pool"], [*rows, rows[2], rows[2]])
    run(files, tmp_path / "drop", navigator)
    status = audit(tmp_path / "drop")["status"].to_pylist()
    assert status == ["OK"] * 10 + ["DUPLICATE"] * 2
    run(files, tmp_path / "keep", navigator, dedup="keep")
    table = audit(tmp_path / "keep")
    assert table["status"].to_pylist() == ["OK"] * 12
    ids, loss = table["id"].to_pylist(), table["loss"].to_pylist()
    assert ids[10:] == [f"{ids[2]}-2", f"{ids[2]}-3"]
    assert loss[2] == loss[10] == loss[11]


def test_a_disk_without_room_is_refused_before_anything_is_measured(tmp_path, navigator, monkeypatch):
    files = world(tmp_path)
    real = os.statvfs

    def small(folder):
        found = real(folder)
        return SimpleNamespace(f_frsize=found.f_frsize, f_bavail=3)

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(DiskFullError, match="24 rows") as caught:
        run(files, tmp_path / "run", navigator)
    assert caught.value.exit_code == 28
    assert list(tmp_path.glob("run/signals/*/ledger/*")) == []
    assert run(files, tmp_path / "run", navigator, settings={"collect.check_disk": False}).ids


def test_a_bad_row_costs_itself_alone(tmp_path, navigator):
    files = world(tmp_path)
    lines = files["pool"].read_bytes().split(b"\n")
    lines[3], lines[5] = b"{not json", json.dumps(chat("only a question?", "")).encode()
    files["pool"].write_bytes(b"\n".join(lines))
    run(files, tmp_path / "run", navigator)
    status = audit(tmp_path / "run")["status"].to_pylist()
    assert status[3] == "MALFORMED"
    assert status.count("OK") >= 22
    assert all(RowStatus(s) for s in status)


def test_methods_without_a_model_load_none(tmp_path, navigator, monkeypatch):
    files = world(tmp_path)
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))
    for method in ("random", "length", "full", "bm25"):
        selection = run(files, tmp_path / method, navigator, method)
        assert selection.ids
    assert audit(tmp_path / "random")["loss"].null_count == 24


def test_a_forward_only_method_runs_no_backward(tmp_path, navigator, monkeypatch):
    import torch

    files = world(tmp_path)
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("a backward was run"))
    run(files, tmp_path / "loss", navigator, "loss", settings={"band": "low"})
    table = audit(tmp_path / "loss")
    assert table["loss"].null_count == 0
    assert table["grad_norm"].null_count == 24


def test_missing_anchor_or_target_is_refused_before_a_model_loads(tmp_path, navigator, monkeypatch):
    files = world(tmp_path)
    monkeypatch.setattr("gradsift.pipeline.prepare.resolve_navigator", lambda *a: pytest.fail("a model was looked for"))
    with pytest.raises(ConfigError, match="--anchor NAME=PATH"):
        select(files["pool"], method="conflict", budget=2, out=tmp_path / "r", navigator=navigator)
    with pytest.raises(ConfigError, match="--target PATH"):
        select(files["pool"], method="bm25", budget=2, out=tmp_path / "r", navigator=navigator)
    with pytest.raises(ConfigError, match="--anchor NAME=PATH"):
        select(files["pool"], method="ogs", budget=2, out=tmp_path / "r", navigator=navigator)


def test_a_weak_anchor_needs_insistence(tmp_path, navigator):
    files = world(tmp_path)
    generator = np.random.default_rng(0)
    letters = [chr(c) for c in range(97, 123)]
    noise = [chat("".join(generator.choice(letters, 12)), "".join(generator.choice(letters, 3))) for _ in range(4)]
    write_jsonl(files["chat"], noise)
    with pytest.raises(ConfigError, match=r"(?s)chat has no reliable direction.*allow_weak_anchor=true"):
        run(files, tmp_path / "run", navigator)
    selection = run(files, tmp_path / "run", navigator, settings={"allow_weak_anchor": True})
    assert any(note.code == "no_reliable_direction" for note in selection.notes)


def test_several_pools_keep_their_labels(tmp_path, navigator):
    files = world(tmp_path)
    other = write_jsonl(tmp_path / "other.jsonl", some_rows(6, 9))
    run(files, tmp_path / "run", navigator, pool={"first": files["pool"], "second": other})
    sources = audit(tmp_path / "run")["source"].to_pylist()
    assert sources == ["first"] * 24 + ["second"] * 6


def test_token_budgets_are_never_exceeded(tmp_path, navigator):
    files = world(tmp_path)
    for method in ("ogs_dual", "target_cosine", "random"):
        selection = run(files, tmp_path / method, navigator, method, budget="100tok")
        assert 0 < selection.num_trained <= 100


@pytest.mark.parametrize("parameters", ["all", ["*.mlp.*"]])
def test_all_weights_or_named_blocks(tmp_path, navigator, parameters):
    files = world(tmp_path)
    selection = run(files, tmp_path / "run", navigator, settings={"navigator.parameters": parameters})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["navigator"]["coverage"] == 1.0
    assert selection.certificate is not None


def test_a_warmed_adapter_is_kept_and_read_back(tmp_path, navigator):
    files = world(tmp_path)
    settings = {"navigator.lora.warmup_share": 0.5, "navigator.lora.rank": 2}
    first = run(files, tmp_path / "run", navigator, settings=settings)
    begun = time.perf_counter()
    second = run(files, tmp_path / "run", navigator, settings=settings)
    assert time.perf_counter() - begun < 60
    np.testing.assert_array_equal(first.score, second.score)
    assert any(note.code == "lora_warmed" for note in first.notes)


def test_a_folder_that_is_something_else_is_not_written_to(tmp_path, navigator):
    files = world(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="holds something else"):
        run(files, tmp_path / "mine", navigator)


def test_a_refused_run_leaves_a_finished_one_as_it_was(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "run"
    other = {"data.loss_on": "all", "data.max_length": 54}
    with pytest.raises(BudgetError):
        run(files, out, navigator, "random", budget=1000, settings=other)
    run(files, out, navigator, "random")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BudgetError):
        run(files, out, navigator, "random", budget=1000, settings=other)
    assert all(path.read_bytes() == data for path, data in before.items())
    assert find_selection(out).recipe.data.max_length == 1024
    run(files, out, navigator, "random", settings=other)
    assert find_selection(out).recipe.data.max_length == 54
    assert not (out / "recipe.next.yaml").exists()


def test_a_run_that_died_while_writing_is_not_finished(tmp_path, navigator, monkeypatch):
    files, out = world(tmp_path), tmp_path / "run"
    run(files, out, navigator, "random")

    def die(*_):
        raise KeyboardInterrupt

    for stopped in ("write_selected", "write_audit", "render_card"):
        with monkeypatch.context() as patch:
            patch.setattr(f"gradsift.pipeline.run.{stopped}", die)
            with pytest.raises(KeyboardInterrupt):
                run(files, out, navigator, "random", settings={"data.max_length": 54})
        for place in (out, out / "selection"):
            with pytest.raises(DataError, match="not finished") as refusal:
                find_selection(place)
            assert refusal.value.do
    run(files, out, navigator, "random", settings={"data.max_length": 54})
    assert find_selection(out).recipe.data.max_length == 54


@pytest.mark.parametrize("name", ["recipe.yaml", "selection/selected.jsonl", "manifest.json"])
def test_files_of_a_run_that_do_not_belong_together_are_refused(tmp_path, navigator, name):
    files, out = world(tmp_path), tmp_path / "run"
    run(files, out, navigator, "random")
    before = (out / name).read_bytes()
    (out / name).write_bytes(before + b" x")
    with pytest.raises(DataError, match="not finished") as refusal:
        find_selection(out)
    assert name in str(refusal.value)
    assert find_selection(out / "selection" / "selected.jsonl").recipe is None  # a file of rows is what it is
    (out / name).write_bytes(before)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"]  # runs of before it named them
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "recipe.yaml").write_bytes((out / "recipe.yaml").read_bytes() + b"\n")
    assert find_selection(out).recipe is not None


def test_what_a_killed_write_left_is_removed(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "run"
    run(files, out, navigator, "random")
    left = [out / "manifest.json.0123456789ab.tmp", out / "selection" / "selected.jsonl.0123456789ab.tmp"]
    for path in (*left, out / "selection" / "mine.tmp"):
        path.write_text("x")
    run(files, out, navigator, "random")
    assert not any(path.exists() for path in left)
    assert (out / "selection" / "mine.tmp").exists()


def test_every_refusal_says_what_to_do(tmp_path, navigator):
    files = world(tmp_path)
    wrong = [
        {"budget": "10x"},
        {"budget": 1000},
        {"method": "ogs_duel"},
        {"settings": {"kapa": 1}},
        {"settings": {"navigator.dtype": "float8"}},
        {"settings": {"collect.sketch_dim": 4096}},
        {"loss_on": "completion"},
        {"format": "alpaca"},
    ]
    for n, options in enumerate(wrong):
        with pytest.raises(GradsiftError) as caught:
            run(files, tmp_path / f"r{n}", navigator, **options)
        assert caught.value.exit_code == 2, options
        assert caught.value.do or caught.value.expected, options


def test_a_given_id_whose_text_was_edited_is_refused_by_name(tmp_path, navigator):
    files = world(tmp_path)
    rows = [dict(row, id=f"row-{n}") for n, row in enumerate(some_rows(8, 0))]
    write_jsonl(files["pool"], rows)
    run(files, tmp_path / "run", navigator)
    rows[3] = chat("something else?", "entirely", id="row-3")
    write_jsonl(files["pool"], rows)
    with pytest.raises(SpecError, match="row-3"):
        run(files, tmp_path / "run", navigator)


def test_edge_norms_are_measured_where_they_are_asked_for(tmp_path, navigator):
    files = world(tmp_path)
    edges = {"emb_grad_norm", "head_grad_norm"}
    run(files, tmp_path / "all", navigator, "norm", settings={"collect.signals": "all"})
    assert edges <= set(audit(tmp_path / "all").column_names)
    run(files, tmp_path / "all", navigator, "target_cosine")  # a folder keeps what it measures
    assert edges <= set(audit(tmp_path / "all").column_names)
    run(files, tmp_path / "few", navigator, "norm")
    assert not edges & set(audit(tmp_path / "few").column_names)
    with pytest.raises(SpecError, match="signals"):
        run(files, tmp_path / "few", navigator, "grads")
    run(files, tmp_path / "few", navigator, "norm")
