"""select with the upper layers only: what is shown of it, that stores are not mixed, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests import toy
from tests.rows import world
from transformers import MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from gradsift import select
from gradsift.cli.app import app
from gradsift.errors import ConfigError, SpecError
from gradsift.store.spec import kept_specs

SMALL = {"collect.rows_per_shard": 5, "collect.sketch_dim": 251, "allow_weak_anchor": True}


def run(files, out, navigator, method="target_cosine", **settings):
    return select(
        {"pool": files["pool"]}, method=method, budget="25%", out=out,
        anchors={"math": files["math"], "chat": files["chat"]}, target=files["target"], navigator=navigator,
        settings={**SMALL, **settings}, report=False,
    )  # fmt: skip


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_the_upper_layer_is_measured_and_said_everywhere(tmp_path, navigator, parameters):
    files, out = world(tmp_path), tmp_path / "run"
    whole = run(files, tmp_path / "whole", navigator, **{"navigator.parameters": parameters})
    part = run(files, out, navigator, **{"navigator.parameters": parameters, "collect.layers": "50%"})
    found = manifest(out)
    assert found["spec"]["layers"] == "2 to 2 of 2"
    assert "layers" not in manifest(tmp_path / "whole")["spec"]
    (note,) = [n for n in part.notes if n.code == "coverage_layers"]
    assert "layers 2 to 2 of 2" in note.text
    assert f"{found['navigator']['coverage']:.1%}" in note.text
    assert 0.2 < found["navigator"]["coverage"] < 0.8
    assert found["navigator"]["uncovered"] == []
    table = pq.read_table(out / "selection" / "audit.parquet")
    assert "emb_grad_norm" not in table.column_names
    assert "emb_grad_norm" not in found["spec"]["signals"]
    assert not np.allclose(part.score, whole.score)
    (spec,) = kept_specs(out / "signals")
    assert spec.layers == "2 to 2 of 2"


def test_stores_of_other_layers_are_not_mixed(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "run"
    run(files, out, navigator, **{"collect.layers": "1"})
    for other in ({}, {"collect.layers": "2"}):
        with pytest.raises(SpecError, match="layers"):
            run(files, out, navigator, **other)
    again = run(files, out, navigator, **{"collect.layers": "50%"})  # the same layers by another name
    assert manifest(out)["cost"]["tokens"].get("collect", 0) == 0
    assert len(again.ids) == 6


def test_the_command_takes_the_share(tmp_path, navigator):
    files = world(tmp_path)
    command = ["select", "--pool", files["pool"], "--target", files["target"], "--method", "target_cosine", "--budget",
               "25%", "--navigator", navigator, "--layers", "50%", "--out", tmp_path / "run"]  # fmt: skip
    result = CliRunner().invoke(app, [str(word) for word in [*command, "--set", "collect.sketch_dim=251"]])
    assert result.exit_code == 0, result.output
    assert "only layers 2 to 2 of 2" in " ".join(result.output.split())
    assert "layers: 50%" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize(("layers", "method", "word"), [
    ("3", "target_cosine", "no such number"), ("half", "target_cosine", "not valid"), ("0%", "target_cosine", "no such"),
    ("1", "grads", "embedding's gradient"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, navigator, layers, method, word):
    with pytest.raises(ConfigError, match=word):
        run(world(tmp_path), tmp_path / "run", navigator, method, **{"collect.layers": layers})


def test_prompts_held_constant_are_said_and_not_mixed(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "run"
    whole = run(files, tmp_path / "whole", navigator)
    part = run(files, out, navigator, **{"collect.positions": "trained"})
    assert manifest(out)["spec"]["positions"] == "trained"
    assert "emb_grad_norm" not in manifest(out)["spec"]["signals"]
    (note,) = [n for n in part.notes if n.code == "held_prompts"]
    assert note.count == 24
    assert not np.allclose(part.score, whole.score)
    with pytest.raises(SpecError, match="positions"):
        run(files, out, navigator)
    for method, settings in (("rds", {}), ("target_cosine", {"collect.signals": "all"})):
        with pytest.raises(ConfigError, match="whole rows"):
            run(files, tmp_path / "refused", navigator, method, **{"collect.positions": "trained", **settings})


def test_a_window_and_experts_are_told_in_the_fingerprint(tmp_path):
    folder, files, out = tmp_path / "mixtral", world(tmp_path), tmp_path / "run"
    size = {**toy.COMMON, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    toy._finish(MixtralForCausalLM(MixtralConfig(**size, sliding_window=8)), 0, torch.float32).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    held = run(
        files, out, folder, **{"collect.positions": "trained", "collect.dots": "folded", "navigator.parameters": "all"}
    )
    spec = manifest(out)["spec"]
    assert (spec["positions"], spec["dots"]) == ("trained, padding first", "folded, experts exact")
    assert held.ids
