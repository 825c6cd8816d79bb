"""The stage and its command: files in, figures out, skipped when done, refused when something differs."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
from eval_toys import train_a_little
from tests.rows import some_rows, write_jsonl
from tests.toy import toy_llama, toy_tokenizer
from typer import Typer

from gradsift.cli import evaluate as cli
from gradsift.errors import ConfigError, DataError, GradsiftError, ModelError, SpecError
from gradsift.evaluate import run as stage
from gradsift.evaluate.config import EvaluateConfig
from gradsift.evaluate.run import evaluate
from gradsift.evaluate.table import read_table
from gradsift.models.adapter import attach_lora, save_adapter
from gradsift.recipe import LoraConfig

QUESTION = {"question": "cat?", "choices": ["dog", "bird", "sun moon"], "answer": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory, navigator):
    """Sets, a trained adapter, and the same model merged into one folder."""
    from gradsift.data.pool import read_pool
    from gradsift.data.tokenize import mask_rule, tokenize_rows
    from gradsift.recipe import SourceConfig

    place = tmp_path_factory.mktemp("evaluate")
    domain = [{**row, "topic": "ab"[n % 2]} for n, row in enumerate(some_rows(8, 3))]
    write_jsonl(place / "exam.jsonl", [*domain, domain[0], {"messages": []}])
    write_jsonl(place / "chat.jsonl", some_rows(6, 2, answer="good day to you"))
    write_jsonl(place / "quiz.jsonl", [{**QUESTION, "id": f"q{n}", "answer": n % 3} for n in range(9)])
    tokenizer = toy_tokenizer()
    pool = read_pool([SourceConfig(label="exam", path=str(place / "exam.jsonl"))])
    rows = tokenize_rows(pool.rows, tokenizer, mask_rule(tokenizer, None, {"messages"}), max_length=1024)
    tuned = attach_lora(toy_llama(seed=3), LoraConfig(rank=4), 0)
    train_a_little(tuned, [row for row in rows if row.status.usable], steps=4, lr=0.3)
    save_adapter(tuned, place / "train" / "model")
    tuned.merge_and_unload().save_pretrained(place / "merged")
    tokenizer.save_pretrained(place / "merged")
    return place


def config(world, navigator, **given):
    values = {
        "model": str(navigator),
        "tuned": str(world / "train"),
        "domain": [{"label": "exam", "path": str(world / "exam.jsonl")}],
        "general": [{"label": "chat", "path": str(world / "chat.jsonl")}],
        "choice": [{"label": "quiz", "path": str(world / "quiz.jsonl"), "role": "general"}],
    }
    return EvaluateConfig.model_validate({**values, **given})


def figures(table):
    return {(r.role, r.task, r.source, r.metric, r.phase): r.value for r in table.rows}


def test_adapter_and_merged_model_give_the_same_figures(world, navigator, tmp_path):
    done = evaluate(config(world, navigator), tmp_path / "a")
    merged = evaluate(config(world, navigator, tuned=str(world / "merged")), tmp_path / "b")
    for key, value in figures(done.table).items():
        assert figures(merged.table)[key] == pytest.approx(value, abs=2e-5)
    gain = {(c.task, c.metric): c.value for c in done.table.gain()}
    assert gain["exam", "loss"] > 0.1
    assert {c.task for c in done.table.forgetting()} == {"chat", "quiz"}
    assert figures(done.table)["domain", "exam", "exam", "kl_base", "after"] > 0.01
    assert done.manifest["tuned"]["kind"] == "adapter"
    assert merged.manifest["tuned"]["kind"] == "model"


def test_everything_is_counted_and_kept(world, navigator, tmp_path):
    done = evaluate(config(world, navigator, split_by="topic", general=[], choice=[]), tmp_path / "out")
    assert done.manifest["rows"] == {"domain exam": {"DUPLICATE": 1, "EMPTY": 1, "OK": 8}}
    assert [note["code"] for note in done.manifest["notes"]] == ["unusable"]
    assert {r.source for r in done.table.rows} == {"a", "b"}
    assert {r.n for r in done.table.rows} == {4}
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert len(items) == 16
    for phase in ("before", "after"):
        part = [i for i in items if i["phase"] == phase]
        mean = sum(i["loss"] * i["num_trained"] for i in part) / sum(i["num_trained"] for i in part)
        sums = [figures(done.table)["domain", "exam", s, "loss", phase] for s in "ab"]
        assert min(sums) <= mean <= max(sums)
    assert read_table(tmp_path / "out" / "eval.parquet") == done.table


def test_a_finished_folder_is_read_and_not_measured_again(world, navigator, tmp_path, monkeypatch):
    first = evaluate(config(world, navigator), tmp_path / "out")
    monkeypatch.setattr(stage, "load_navigator", lambda *_a, **_k: pytest.fail("a model was loaded"))
    again = evaluate(config(world, navigator), tmp_path / "out")
    assert again.skipped
    assert again.table == first.table
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(world / "exam.jsonl", moved)  # contents count, not paths
    assert evaluate(config(world, navigator, domain=[{"label": "exam", "path": str(moved)}]), tmp_path / "out").skipped
    with moved.open("a") as file:
        file.write(json.dumps(some_rows(1, 9)[0]) + "\n")
    with pytest.raises(SpecError, match="domain exam"):
        evaluate(config(world, navigator, domain=[{"label": "exam", "path": str(moved)}]), tmp_path / "out")
    with pytest.raises(SpecError, match="seed") as error:
        evaluate(config(world, navigator, seed=7), tmp_path / "out")
    assert (error.value.got, error.value.expected) == ("7", "42")


def test_two_sets_of_questions_of_one_name_are_two_parts_of_the_identity(world, navigator, tmp_path):
    questions = [{"question": f"What is {n}?", "choices": ["up", "down"], "answer": n % 2} for n in range(6)]
    paths = {
        role: write_jsonl(tmp_path / f"{role}.jsonl", questions[at:]) for at, role in enumerate(("general", "domain"))
    }
    choice = [{"role": role, "label": "exam", "path": str(path)} for role, path in paths.items()]
    for role, path in paths.items():
        before = path.read_text()
        evaluate(config(world, navigator, choice=choice), tmp_path / role)
        path.write_text(before + before.splitlines()[0].replace("What", "Which") + "\n")
        with pytest.raises(SpecError, match=f"choice {role} exam"):
            evaluate(config(world, navigator, choice=choice), tmp_path / role)
        path.write_text(before)


def test_a_style_of_asking_is_part_of_the_identity(world, navigator, tmp_path):
    chat = evaluate(config(world, navigator, choice_style="chat"), tmp_path / "out")
    assert evaluate(config(world, navigator), tmp_path / "out").skipped  # the toy tokenizer has a template
    with pytest.raises(SpecError, match="choice style"):
        evaluate(config(world, navigator, choice_style="plain"), tmp_path / "out")
    assert chat.manifest["identity"]["choice style"] == "chat"


def test_a_base_model_that_was_not_the_one_trained_is_refused(world, navigator, tmp_path):
    from gradsift.models.load import weights_key

    run = tmp_path / "run"
    shutil.copytree(world / "train", run / "train")
    for digest, fits in ((weights_key(navigator), True), ("0" * 32, False)):
        (run / "train" / "manifest.json").write_text(json.dumps({"base": {"weights_sha256": digest}}))
        for tuned in (run, run / "train", run / "train" / "model"):
            chosen = config(world, navigator, tuned=str(tuned), general=[], choice=[])
            if fits:
                assert evaluate(chosen, tmp_path / "out").manifest["tuned"]["kind"] == "adapter"
                continue
            with pytest.raises(ModelError, match="other weights"):
                evaluate(chosen, tmp_path / "refused")


def test_damage_and_foreign_folders_are_refused_and_a_crash_leaves_nothing(world, navigator, tmp_path, monkeypatch):
    done = evaluate(config(world, navigator, choice=[]), tmp_path / "out")
    bytes_ = (done.out / "eval.parquet").read_bytes()
    (done.out / "eval.parquet").write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))
    with pytest.raises(SpecError, match="damaged"):
        evaluate(config(world, navigator, choice=[]), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="something else"):
        evaluate(config(world, navigator), tmp_path / "mine")
    monkeypatch.setattr(stage, "_items", lambda _m: pytest.fail("crash while writing"))
    with pytest.raises(BaseException, match="crash"):
        evaluate(config(world, navigator, choice=[]), tmp_path / "crashed")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "mine"}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"tuned": "/no/such/folder"}, ModelError, "--tuned"),
        ({"model": "/no/such/model"}, ModelError, "--model"),
        ({"domain": [], "general": [], "choice": []}, ConfigError, "nothing to measure"),
        ({"split_by": "nosuch"}, DataError, "nosuch"),
        ({"data": {"format": "text"}}, DataError, "no usable row"),
    ],
)
def test_refusals_name_the_flag(world, navigator, tmp_path, change, kind, words):
    with pytest.raises(kind, match=words) as error:
        evaluate(config(world, navigator, **change), tmp_path / "out")
    assert "--navigator" not in str(error.value)
    assert not (tmp_path / "out").exists()


def command(*arguments):
    app = Typer(pretty_exceptions_enable=False)
    app.command("evaluate")(cli.command)
    app.command("other")(lambda: None)
    app(args=["evaluate", *map(str, arguments)], standalone_mode=False)


def test_the_command_prints_figures(world, navigator, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ["--model", navigator, "--tuned", world / "train" / "model", "--domain", f"exam={world / 'exam.jsonl'}",
             "--general", f"chat={world / 'chat.jsonl'}", "--choice", f"domain:quiz={world / 'quiz.jsonl'}",
             "--set", "data.max_length=512", "--seed", "5", "--out", tmp_path / "out"]  # fmt: skip
    command(*words)
    said = capsys.readouterr().out
    for text in ("Figures", "before", "after", "gain", "forgetting", "kl_base", "without guessing", "eval.parquet"):
        assert text in said
    table = read_table(tmp_path / "out" / "eval.parquet")
    assert {r.seed for r in table.rows} == {5}
    assert {r.role for r in table.rows if r.task == "quiz"} == {"domain"}
    moved = {c.metric: c.value for c in table.gain() if c.task == "exam"}
    assert f"{moved['loss']:+.4f}" in said
    command(*words)
    assert "nothing was measured again" in capsys.readouterr().out


def test_the_base_model_alone(world, navigator, tmp_path, capsys):
    command("--model", navigator, "--domain", f"exam={world / 'exam.jsonl'}", "--out", tmp_path / "out")
    table = read_table(tmp_path / "out" / "eval.parquet")
    assert {r.phase for r in table.rows} == {"before"}
    assert "exam" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--domain", "exam.jsonl"], "NAME=PATH"),
        (["--domain", "x=y", "--set", "nosuch=1"], "nosuch"),
        (["--domain", "x=y", "--set", "seed=1", "--set", "seed.x=1"], "no parts"),
        (["--domain", "x=y"], "--out"),
    ],
)
def test_usage_errors(arguments, words):
    with pytest.raises(GradsiftError, match=words) as error:
        command(*arguments)
    assert error.value.exit_code == 2


def test_the_help_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, gradsift.cli.evaluate\nassert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
