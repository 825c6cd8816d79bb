"""``gradsift transfer`` on a finished run: the same model agrees, another does not, refusals, cost, notes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.rows import some_rows, world, write_jsonl
from tests.toy import toy_gpt2, toy_llama, toy_tokenizer

from gradsift.cli.app import run
from gradsift.errors import ConfigError, DataError
from gradsift.geometry.similarity import cosines
from gradsift.methods.base import Needs
from gradsift.pipeline.prepare import prepare
from gradsift.pipeline.progress import Clock, Silent
from gradsift.pipeline.transfer import TransferConfig, _prepare, audit_transfer
from gradsift.recipe import build_recipe, load_recipe
from gradsift.store.signals import open_store


def model_folder(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def select_arguments(files, out, navigator, *more):
    return [
        "select", "--pool", str(files["pool"]), "--anchor", f"math={files['math']}", "--anchor", f"chat={files['chat']}",
        "--target", str(files["target"]), "--navigator", str(navigator), "--method", "ogs_dual", "--budget", "25%",
        "--out", str(out), "--set", "collect.sketch_dim=251", "--set", "allow_weak_anchor=true", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return world(tmp_path_factory.mktemp("rows"), pool=60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, files, navigator):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(select_arguments(files, out, navigator)) == 0
    return out


@pytest.fixture
def done(tmp_path, finished):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_same_model_agrees_in_full_and_the_cost_is_counted(done, navigator, capsys):
    assert run(["transfer", str(done), "--model", str(navigator), "--rows", "40"]) == 0
    said = capsys.readouterr().out
    report = json.loads((done / "transfer.json").read_text())
    assert [entry["name"] for entry in report["anchors"]] == ["math", "chat", "target"]
    for entry in report["anchors"]:
        assert entry["spearman"]["value"] == pytest.approx(1, abs=1e-3)
        assert entry["signs"]["value"] == 1
        assert entry["overlap"]["value"] == 1
        assert entry["sentence"] in " ".join(said.split())
    assert not report["warns"]
    assert report["rows"] == {"asked": 40, "usable_on_both": 60, "drawn": 40, "compared": 40, "k": 10}
    assert report["cost"]["tokens"]["collect"] > 0
    assert (
        report["cost"]["total"]["tokens"] >= report["cost"]["tokens"]["collect"] + report["cost"]["tokens"]["anchors"]
    )
    assert not any("tokenizer" in note or "template" in note or "family" in note for note in report["notes"])
    assert "compared 40 rows" in said
    assert "transfer.json" in said


def test_the_cosines_are_those_of_selecting_with_the_target_model(tmp_path, files, done):
    """The slow twin: a whole select run with the target model as navigator."""
    other = model_folder(tmp_path / "other", toy_llama(seed=11))
    audit_transfer(done, TransferConfig(str(other), 30))
    assert run(select_arguments(files, tmp_path / "twin", other)) == 0
    pair = []
    for place in (next(done.glob("transfer/*/signals")), tmp_path / "twin" / "signals"):
        pair.append(open_store(next(p for p in place.iterdir() if p.is_dir())))
    ids = list(pair[0].ids)
    assert len(ids) == 30
    names = ("math", "chat", "target")
    got, want = (cosines(s.take(ids).dots(names), s.take(ids).grad_norm) for s in pair)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert pair[0].spec.adapter_sha256 == pair[1].spec.adapter_sha256  # the adapter is seeded the same way


def test_another_seed_warns(tmp_path, done, capsys):
    other = model_folder(tmp_path / "other", toy_llama(seed=11))
    assert run(["transfer", str(done), "--model", str(other)]) == 0
    said = capsys.readouterr().out
    report = json.loads((done / "transfer.json").read_text())
    assert report["warns"]
    assert all(abs(entry["spearman"]["value"]) < 0.5 for entry in report["anchors"])
    assert "warning: " in said
    assert "only 60 rows can be used on both models" in said.replace("\n", " ")


def test_another_family_and_template_are_said(tmp_path, done):
    other = model_folder(tmp_path / "other", toy_gpt2(seed=1))
    config = other / "tokenizer_config.json"
    jinja = other / "chat_template.jinja"
    if jinja.is_file():
        jinja.write_text(jinja.read_text() + "\n")
    else:
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "chat_template": values["chat_template"] + "\n"}))
    found = audit_transfer(done, TransferConfig(str(other), 20, (("navigator.lora.rank", 4),)))
    notes = " ".join(found.report["notes"])
    assert "another family" in notes
    assert "templates" in notes
    assert found.report["settings"] == {"navigator.lora.rank": 4}


def test_the_same_call_measures_nothing_again_and_says_so(done, navigator):
    first = audit_transfer(done, TransferConfig(str(navigator), 20))
    second = audit_transfer(done, TransferConfig(str(navigator), 20))
    assert first.found == second.found
    assert second.report["cost"]["tokens"].get("collect", 0) == 0
    assert any("an earlier call" in note for note in second.report["notes"])


def test_more_rows_hold_the_fewer_ones_and_the_order_of_the_file_does_not_matter(tmp_path, files, navigator):
    rows = [json.loads(line) | {"id": f"r{n}"} for n, line in enumerate(files["pool"].read_text().splitlines())]
    drawn = []
    for n, order in enumerate((rows, rows[::-1])):
        place = tmp_path / str(n)
        place.mkdir()
        write_jsonl(place / "pool.jsonl", order)
        assert run(select_arguments({**files, "pool": place / "pool.jsonl"}, place / "run", navigator)) == 0
        for count in (10, 20)[n:]:
            audit_transfer(place / "run", TransferConfig(str(navigator), count))
        stores = [open_store(next(p for p in s.iterdir() if p.is_dir())) for s in place.glob("run/transfer/*/signals")]
        drawn.append([set(s.ids) for s in sorted(stores, key=lambda s: s.size)])
    assert drawn[0][1] == drawn[1][0]
    assert drawn[0][0] < drawn[0][1]


def test_refusals(tmp_path, files, done, navigator):
    with pytest.raises(DataError, match="not a finished run"):
        audit_transfer(tmp_path / "nothing", TransferConfig(str(navigator)))
    with pytest.raises(ConfigError, match="too few rows"):
        audit_transfer(done, TransferConfig(str(navigator), 3))
    with pytest.raises(ConfigError, match="same on both models"):
        audit_transfer(done, TransferConfig(str(navigator), 20, (("data.max_length", 16),)))
    assert run(["transfer", str(done)]) == 2
    assert run(["transfer", str(done), "--model", str(tmp_path / "no-model")]) == 2
    blind = tmp_path / "blind"
    assert run(["select", "--pool", str(files["pool"]), "--method", "random", "--budget", "5", "--out", str(blind),
                "--navigator", str(navigator)]) == 0  # fmt: skip
    with pytest.raises(ConfigError, match="no cosines"):
        audit_transfer(blind, TransferConfig(str(navigator)))


def test_a_changed_file_is_refused(tmp_path, navigator):
    files = world(tmp_path)
    assert run(select_arguments(files, tmp_path / "run", navigator)) == 0
    write_jsonl(files["math"], some_rows(10, 99))
    with pytest.raises(DataError, match="has changed"):
        audit_transfer(tmp_path / "run", TransferConfig(str(navigator), 20))


def test_a_recipe_of_another_run_is_refused(done, navigator):
    text = (done / "recipe.yaml").read_text()
    (done / "recipe.yaml").write_text(text.replace("max_length: 1024", "max_length: 54"))
    with pytest.raises(DataError, match="not finished"):
        audit_transfer(done, TransferConfig(str(navigator), 20))


def test_a_warmed_adapter_is_warmed_on_as_many_rows(tmp_path, files, navigator):
    out = tmp_path / "run"
    assert run(select_arguments(files, out, navigator, "--set", "navigator.lora.warmup_share=0.1")) == 0
    found = audit_transfer(out, TransferConfig(str(navigator), 30))
    assert any("trained on 6 pool rows" in note for note in found.report["notes"])


def test_directions_are_made_of_the_rows_of_the_run_though_rows_are_held_out_by_their_tokens(done, monkeypatch):
    """A method with roll-outs holds anchor rows out; other tokens would draw others."""
    before = build_recipe(load_recipe(done / "recipe.yaml"))
    other = before.model_copy(update={"data": before.data.model_copy(update={"loss_on": "all"})})
    stub = SimpleNamespace(name="stub", needs=Needs(signals=frozenset({"grad_norm"}), rollouts=True))
    monkeypatch.setattr("gradsift.pipeline.transfer.make_method", lambda name, settings: stub)
    then, plain, found = (
        [{row.id for row in source.usable} for source in prepared.directions]
        for prepared in (
            prepare(before, stub, Clock(Silent())),
            prepare(other, stub, Clock(Silent())),
            _prepare(before, other, Clock(Silent())),
        )
    )
    assert then != plain, "the tokenizations must hold other rows out, or the test shows nothing"
    assert found == then
    assert 0 < len(found[0]) < 10
