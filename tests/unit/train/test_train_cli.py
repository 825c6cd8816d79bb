"""``gradsift train``: words into settings, exit codes, dry run, what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.rows import some_rows, write_jsonl

from gradsift.cli import train
from gradsift.cli.app import app, run
from gradsift.errors import ConfigError


@pytest.fixture(autouse=True)
def _registered() -> None:
    if "train" not in {command.name for command in app.registered_commands}:
        app.command("train")(train.command)


@pytest.fixture
def words(tmp_path: Path, navigator: Path) -> list[str]:
    rows = write_jsonl(tmp_path / "rows.jsonl", some_rows(8, 1))
    return ["train", "--selection", str(rows), "--model", str(navigator), "--set", "steps=2", "--set", "batch_size=4",
            "--set", "rank=2"]  # fmt: skip


def test_words_become_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "train.yaml"
    recipe.write_text("lr: 0.001\nkl: {weight: 0.5}\nsteps: 3\n")
    config = train.build(
        recipe, ["kl.rows=2", "replay_share=0.25", "lr=1.0e-4", "tau=2.5"], [("general", ["g.jsonl"]), ("seed", 7)]
    )
    assert (config.lr, config.kl.weight, config.kl.rows, config.replay.share) == (1e-4, 0.5, 2, 0.25)
    assert (config.stm.tau, config.general, config.seed, config.steps) == (2.5, ("g.jsonl",), 7, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lrr=1"], "lrr"),
        (["replay_share=0.25"], "needs general rows"),
        (["lr.x=1"], "lr"),
        (["lr=1", "lr.x=1"], "no parts"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train.build(None, settings, [])


def test_a_run_prints_what_it_did_and_a_second_one_that_it_is_done(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "--out", str(tmp_path / "out")]
    assert run(words) == 0
    said = capsys.readouterr().out
    for text in ("training: ", "trained lora on 8 rows", "for 2 steps", "loss ", "tokens backward", "manifest.json"):
        assert text in said
    assert run(words) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert run([*words, "--set", "lr=0.5"]) == 2
    assert "use another --out" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert run([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    for text in ("2 of 4 rows", "carry loss", "lora", "time"):
        assert text in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("gone", ["--selection", "--out"])
def test_missing_words_exit_with_two(gone: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if gone == "--selection":
        del words[1:3]
    assert run(words) == 2
    assert f"{gone} is missing" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_called_the_model(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words[4] = str(tmp_path / "no-model")
    assert run([*words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "--model" in said
    assert "navigator" not in said
