"""``gradsift compare`` from the words typed to the files left, on the miniature world."""

from __future__ import annotations

import json

import pytest
import typer
import yaml
from tests.fabricated import cell, config, values

import gradsift.compare.runner as runner
from gradsift.cli import compare
from gradsift.compare.store import read_manifest
from gradsift.errors import ConfigError, GradsiftError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(values(seeds="0-1")))
    return path


def call(*words):
    app = typer.Typer()
    app.command()(compare.command)
    try:
        app(args=[str(word) for word in words])
    except GradsiftError as error:
        return error.exit_code, error.render()
    except SystemExit as done:
        return done.code or 0, ""
    raise AssertionError("typer always exits")


def test_a_comparison_leaves_manifest_cells_results_and_page(tmp_path, recipe, capsys):
    out = tmp_path / "run"
    assert call("--recipe", recipe, "--out", out) == (0, "")
    text = capsys.readouterr().out
    assert "8 of 8: oracle, seed 1" in text
    assert "no advantage over random was measured" in text
    assert "20,000 null draws" in " ".join(text.split())
    assert {p.name for p in out.iterdir()} >= {"manifest.json", "cells", "results.json", "results.md", "report.html"}
    results = json.loads((out / "results.json").read_text())
    assert len(results["arms"]) == 4
    assert results["config"]["num_variants"] == 3
    assert {"command", "date", "commit", "hardware", "null_t", "passed", "claims"} <= set(results)
    first = (out / "report.html").read_bytes()
    assert call("--recipe", recipe, "--out", out) == (0, "")
    assert "8 cells, 8 of them finished" in capsys.readouterr().out
    assert (out / "report.html").read_bytes() == first


def test_a_dry_run_leaves_nothing(tmp_path, recipe, capsys):
    assert call("--recipe", recipe, "--out", tmp_path / "run", "--dry-run") == (0, "")
    assert "8 cells, 0 of them finished" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_part_is_run_and_the_rest_is_told_as_not_run(tmp_path, recipe, capsys):
    out = tmp_path / "run"
    assert call("--recipe", recipe, "--out", out, "--arms", "random,ours") == (0, "")
    assert "4 of 8 declared cells were not run" in capsys.readouterr().out
    assert "not started" in (out / "report.html").read_text("utf-8")
    assert call("--recipe", recipe, "--out", out, "--seeds", "1", "--arms", "oracle") == (0, "")
    assert len(list((out / "cells").iterdir())) == 5


def test_changed_settings_and_bad_words_are_refused(tmp_path, recipe):
    out = tmp_path / "run"
    assert call("--recipe", recipe, "--out", out, "--arms", "oracle", "--seeds", "0")[0] == 0
    assert read_manifest(out)["config"]["seeds"] == [0]
    code, text = call("--recipe", recipe, "--out", out)
    assert code == 2
    assert "seeds: declared 0, now 0-1" in text
    code, text = call("--recipe", recipe, "--out", out, "--seeds", "0", "--set", "arms.ours.replay=0.25")
    assert code == 2
    assert "arms.ours.replay" in text
    assert call("--recipe", recipe, "--out", tmp_path / "new", "--arms", "nobody")[0] == 2
    assert call("--out", out)[0] == 2
    assert call("--preset", "quick", "--recipe", recipe, "--out", out)[0] == 2
    assert call("--preset", "nothing", "--out", out)[0] == 2
    assert call("--recipe", recipe)[0] == 2


def test_a_failed_cell_or_check_ends_with_1(tmp_path, recipe, monkeypatch, capsys):
    def fails(desk, arm, grid, total=None):
        if arm.name == "ours":
            raise ConfigError("planted failure")
        return cell(arm.name, desk.world.seed, [(0.5, 0.5), (0.4, 0.4)])

    monkeypatch.setattr(runner, "run_cell", fails)
    assert call("--recipe", recipe, "--out", tmp_path / "a")[0] == 1
    assert "not run: ours, seed 0: planted failure" in capsys.readouterr().out

    def leaks(desk, arm, grid, total=None):
        side = 0.9 if arm.name == "null" else 0.3
        return cell(arm.name, desk.world.seed, [(side + desk.world.seed / 1000, side), (0.1, 0.1)])

    monkeypatch.setattr(runner, "run_cell", leaks)
    leaky = tmp_path / "leaky.yaml"
    arms = [*values()["arms"], {"name": "null", "method": "ogs_dual", "placebo": "permuted_scores"}]
    leaky.write_text(yaml.safe_dump(values(seeds="0-2", arms=arms)))
    assert call("--recipe", leaky, "--out", tmp_path / "b")[0] == 1
    assert "THE CHECK FAILS" in " ".join(capsys.readouterr().out.split())


def test_the_words_of_the_recipe_are_what_is_declared(tmp_path, recipe):
    found = compare.build(None, recipe, ["grid.num_steps=3", "num_variants=5"], "0-3")
    assert (found.grid.num_steps, found.num_variants, found.seeds) == (3, 5, (0, 1, 2, 3))
    assert config().arm("ours").family == "gradsift"
