"""doctor --layers: its ranks are those of two runs of select, its plain step is an ordinary one, its advice follows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr
from tests import toy
from tests.rows import world
from transformers import Lfm2Config, Lfm2ForCausalLM
from typer.testing import CliRunner

from gradsift import select
from gradsift.cli.app import app
from gradsift.data.batches import Tokens
from gradsift.errors import ConfigError
from gradsift.evaluate.ranks import Correlation
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.loop import example_gradient
from gradsift.pipeline import shares
from gradsift.pipeline.progress import Silent
from gradsift.pipeline.shares import (
    Ratio,
    ShareLine,
    ShareTable,
    Signals,
    _predicted,
    _without_adapter,
    measure_shares,
    plain_step,
)
from gradsift.recipe import build_recipe

SETTINGS = {"collect.sketch_dim": 61, "allow_weak_anchor": True}


def recipe(files, navigator, parameters, **changes):
    values = {
        "pool": [{"label": "pool", "path": str(files["pool"])}],
        "anchors": [{"label": "math", "path": str(files["math"])}],
        "target": str(files["target"]),
        "method": {"name": "random"},
        "budget": "1",
        "navigator": {"model": str(navigator), "parameters": parameters},
        "collect": {"sketch_dim": 61, "tokens_per_batch": 512},
        **changes,
    }
    return build_recipe({key: value for key, value in values.items() if value is not None})


@pytest.mark.parametrize("parameters", ["all", "lora"])
def test_ranks_are_those_of_select_with_and_without_layers(tmp_path, navigator, parameters):
    files = world(tmp_path)
    found = measure_shares(
        recipe(files, navigator, parameters), Silent(), shares=("50%", "100%", "trained", "screen"), num_rows=24
    )
    audits = {}
    parts = {"all": {}, "50%": {"collect.layers": "50%"}, "trained": {"collect.positions": "trained"},
             "screen": {"collect.positions": "trained", "collect.dots": "folded"}}  # fmt: skip
    for key, more in parts.items():
        out = tmp_path / key.strip("%")
        select({"pool": files["pool"]}, method="target_cosine", budget="5", out=out, anchors={"math": files["math"]},
               target=files["target"], navigator=navigator, report=False,
               settings={**SETTINGS, "navigator.parameters": parameters, **more})  # fmt: skip
        audits[key] = pq.read_table(out / "selection" / "audit.parquet").to_pydict()
    half, whole, trained, screen, everything = found.lines
    assert [line.share for line in found.lines] == ["50%", "100%", "trained", "screen", "all"]
    assert everything.ranks == {}
    for name, column in {"math": "cos_math", "target": "cos_target", "norm": "grad_norm"}.items():
        for one in (half, trained, screen):
            want = spearmanr(audits[one.share][column], audits["all"][column]).statistic
            # audit columns are float32: two rows of nearly equal numbers may change places
            assert one.ranks[name].rho == pytest.approx(want, abs=0.02)
            assert one.ranks[name].n == 24
    assert half.coverage < whole.coverage <= 1
    if parameters == "lora":  # no adapter stands below the layers: all of them are all there is
        assert whole.least == pytest.approx(1.0)
        assert found.plain_seconds != found.whole_seconds
    for line in found.lines:
        assert 0 < line.cost.low <= line.cost.median <= line.cost.high


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "lora"])
def test_the_plain_step_is_the_sum_of_ordinary_backwards(kind, monkeypatch):
    model = toy.TOYS[kind](0, torch.float64)
    names = [n for n, _ in model.named_parameters() if kind != "lora" or "lora_" in n]
    lengths = [9, 5, 12]
    ids = torch.randint(4, toy.VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for b, n in enumerate(lengths):
        labels[b, n:], labels[b, :3] = -100, -100
    seen = {}
    kept = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (kept(self), seen.update(
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})))  # fmt: skip
    loss = plain_step(model, names, Tokens(torch.arange(3), ids, labels, torch.tensor(lengths)))
    every = [example_gradient(model, names, ids[b, :n], labels[b, :n]) for b, n in enumerate(lengths)]
    assert loss == pytest.approx(sum(one.loss for one in every), rel=1e-6)  # the loss is float32, as a trainer's is
    assert set(seen) == set(names)
    for name in names:
        torch.testing.assert_close(seen[name], sum(one.by_name[name] for one in every), rtol=1e-4, atol=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_the_step_of_all_weights_leaves_the_adapter_frozen():
    """Else peft's autograd would run below the layers that a share measures, and be charged to the share."""
    model = toy.TOYS["lora"](0, torch.float64)
    model.requires_grad_(False)
    ids = torch.randint(4, toy.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    tokens = Tokens(torch.arange(2), ids, ids.clone(), torch.tensor([9, 9]))
    head = next(n for n, _ in model.named_parameters() if "lm_head" in n)
    with model.disable_adapter():
        want = sum(example_gradient(model, [head], row, row).loss for row in ids)
    assert _without_adapter(model, tokens) == pytest.approx(want, rel=1e-6)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    names = [n for n, _ in model.named_parameters() if "layers.1" in n and ".lora_" in n]
    with GradientEngine(model, names, first_layer=1) as engine:
        engine.measure(ids, ids.clone(), tokens.lengths)
    assert not any(p.grad is not None for p in model.parameters())


def line(share, cost, *rhos):
    ranks = {str(i): Correlation(r, r - 0.02, r + 0.02, 64) for i, r in enumerate(rhos)}
    return ShareLine(share, "", 0.5, Ratio(cost, cost, cost), Ratio(cost, cost, cost), ranks)


def test_the_cheapest_good_share_is_recommended_or_none():
    whole = line("all", 1.05)
    table = ShareTable((line("25%", 0.5, 0.95, 0.85), line("50%", 0.7, 0.9, 0.93), line("75%", 0.9, 0.97), whole),
                       64, 1, 5, 1.0, 1.0)  # fmt: skip
    assert table.recommended.share == "50%"
    assert "--layers 50%" in table.advice
    assert "0.90 [0.88, 0.92]" in table.advice
    assert line("trained", 0.4, 0.95).option == "--set collect.positions=trained"
    assert line("screen", 0.4, 0.95).option == "--screen trained"
    none = ShareTable((line("25%", 0.5, 0.7), line("50%", 0.7, 0.89, 0.99), whole), 64, 1, 5, 1.0, 1.0)
    assert none.recommended is None
    assert "no share" in none.advice
    assert "50%, reaches 0.89 at 0.70x" in none.advice


def test_the_command_prints_and_writes_what_was_measured(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "layers.json"
    command = ["doctor", "--layers", "--pool", files["pool"], "--target", files["target"], "--navigator", navigator,
               "--rows", "20", "--json", out, "--set", "collect.sketch_dim=61", "--set", "collect.tokens_per_batch=256"]  # fmt: skip
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    kept = json.loads(out.read_text())
    assert [one["share"] for one in kept["lines"]] == ["12.5%", "25%", "50%", "75%", "trained", "screen", "all"]
    assert kept["num_rows"] == 20
    told = " ".join(result.output.split())
    assert kept["advice"] in told
    rank = kept["lines"][2]["ranks"]["target"]
    assert np.isfinite(rank["rho"])


def test_the_screens_prediction_is_judged_on_rows_it_was_not_fitted_on(tmp_path, navigator, monkeypatch):
    class Memory:
        """Knows what it was fitted on by heart, and nothing of the rest."""

        def __init__(self, features, exact, ridge):
            self.known = {row.tobytes(): values for row, values in zip(features, exact, strict=True)}

        def predict(self, features):
            other = np.sin(np.arange(len(features)))[:, None] * np.ones((1, 3))
            return np.array([self.known.get(row.tobytes(), far) for row, far in zip(features, other, strict=True)])

    monkeypatch.setattr(shares, "fit_screen", Memory)
    found = measure_shares(
        recipe(world(tmp_path, pool=36), navigator, "all"), Silent(), shares=("screen",), num_rows=36
    )
    screen, predicted, _ = found.lines
    assert [line.share for line in found.lines] == ["screen", "predicted", "all"]
    assert predicted.cost == screen.cost
    assert {rank.n for rank in predicted.ranks.values()} == {12}  # two thirds are fitted on
    assert "24 rows" in predicted.layers
    assert all(rank.rho < 0.9 for rank in predicted.ranks.values())  # by heart it would be 1
    assert predicted.option == "--screen trained"


def test_a_fit_finds_what_is_linear_in_the_parts_and_wants_rows_enough():
    draw = np.random.default_rng(0)
    norm, parts = draw.uniform(1, 2, 80), draw.normal(size=(80, 3, 2))
    parts[:, :, 1] = 1 / 3 * norm[:, None] ** 2
    cheap = Signals(parts[:, :, :1].sum(1), norm, draw.normal(size=(80, 2)), parts)
    rows = [SimpleNamespace(num_tokens=int(n), num_trained=2) for n in draw.integers(5, 50, 80)]
    truth = np.stack(
        [parts[:, 0, 0] / norm - 2 * parts[:, 2, 0] / norm, np.log(norm)], 1
    )  # other weights than the sum's
    found = _predicted(cheap, truth, rows, np.arange(50))
    assert found is not None
    assert found.parts
    assert spearmanr(found.values[50:, 0], truth[50:, 0]).statistic > 0.99
    assert spearmanr(cheap.values[50:, 0], truth[50:, 0]).statistic < 0.5
    assert _predicted(cheap, truth, rows, np.arange(7)) is None
    assert _predicted(cheap, truth, rows, np.arange(75)) is None


def test_held_prompts_are_left_out_of_a_model_that_keeps_a_state_and_select_refuses_them(tmp_path):
    folder, files = tmp_path / "lfm2", world(tmp_path)
    kinds = ["conv", "full_attention"]
    config = Lfm2Config(**toy.COMMON, num_key_value_heads=2, layer_types=kinds)
    toy._finish(Lfm2ForCausalLM(config), 0, torch.float32).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    told = Silent()
    said: list[str] = []
    told.say = said.append
    found = measure_shares(recipe(files, folder, "all"), told, shares=("50%", "trained", "screen"), num_rows=12)
    assert [line.share for line in found.lines] == ["50%", "all"]
    assert any("held prompts are left out" in line and "conv" in line for line in said)
    for settings in ({"collect.positions": "trained"}, {"screen.by": "trained"}):
        with pytest.raises(ConfigError, match="cannot be held constant"):
            select({"pool": files["pool"]}, method="target_cosine", budget="5", out=tmp_path / "run", target=files["target"],
                   navigator=folder, report=False, settings={**SETTINGS, **settings})  # fmt: skip
        assert not (tmp_path / "run" / "signals").exists()


@pytest.mark.parametrize(("changes", "rows"), [({"target": None, "anchors": None}, 24), ({}, 5)])
def test_without_rows_or_directions_there_is_nothing_to_rank(tmp_path, navigator, changes, rows):
    with pytest.raises(ConfigError, match="cosines on some rows"):
        measure_shares(recipe(world(tmp_path), navigator, "all", **changes), Silent(), num_rows=rows)
