"""The command line: speed of --help, exit codes, messages without tracebacks, dry run, inspect, doctor, report."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.rows import chat, world, write_jsonl

from gradsift.cli.app import run
from gradsift.cli.select import labelled

GRADSIFT = [sys.executable, "-m", "gradsift"]


def arguments(files, out, navigator, method="ogs_dual"):
    return [
        "select", "--pool", str(files["pool"]), "--anchor", f"math={files['math']}", "--anchor", f"chat={files['chat']}",
        "--target", str(files["target"]), "--navigator", str(navigator), "--method", method, "--budget", "25%",
        "--out", str(out), "--set", "collect.sketch_dim=251",
    ]  # fmt: skip


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys, gradsift.cli.app as app\nassert app.run(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    begun = time.process_time(), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "select" in done.stdout
    assert time.perf_counter() - begun[1] < 5  # half a second on a quiet machine; the imports above are the real check


def test_select_writes_a_report_and_says_what_it_did(tmp_path, navigator, capsys):
    files = world(tmp_path)
    assert run(arguments(files, tmp_path / "run", navigator)) == 0
    said = capsys.readouterr().out
    for words in ("kept 6 of 24 usable rows", "margin at the cut", "numerical bound", "sketch noise", "certificate"):
        assert words in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Content-Security-Policy" in page
    assert "<script" not in page
    assert run(["report", str(tmp_path / "run"), "--redact"]) == 0


def test_a_recipe_replays_the_run(tmp_path, navigator):
    files = world(tmp_path)
    run(arguments(files, tmp_path / "a", navigator))
    assert run(["select", "--recipe", str(tmp_path / "a" / "recipe.yaml"), "--out", str(tmp_path / "b")]) == 0
    chosen = [(tmp_path / n / "selection" / "selected.jsonl").read_bytes() for n in "ab"]
    assert chosen[0] == chosen[1]
    changed = ["select", "--recipe", str(tmp_path / "a" / "recipe.yaml"), "--budget", "2", "--out", str(tmp_path / "c")]
    assert run(changed) == 0
    assert (tmp_path / "c" / "selection" / "selected.jsonl").read_bytes().count(b"\n") == 2


def test_dry_run_spends_nothing(tmp_path, navigator, capsys):
    files = world(tmp_path)
    assert run([*arguments(files, tmp_path / "run", navigator), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("rows of pool", "memory", "disk", "time", "tokens to measure"):
        assert words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--method", "nosuch"], 2, "gradsift methods"),
        (["--general", "general.jsonl"], 2, "does not decide about replay"),
        (["--budget", "ten"], 2, "20000tok"),
        (["--budget", "100000"], 2, "at most 24 rows"),
        (["--set", "kappa"], 2, "KEY=VALUE"),
        (["--set", "nosuch=1"], 2, "no such setting"),
        (["--set", "x=2024-13-45"], 2, "not YAML"),
        (["--set", "x={[a]: 1}"], 2, "not YAML"),
        (["--set", "x=" + "[" * 5000], 2, "not YAML"),
        (["--set", "navigator.nosuch=1"], 2, "navigator.nosuch"),
        (["--pool", "/no/such/file.jsonl"], 2, "/no/such/file.jsonl"),
        (["--navigator", "/no/such/model"], 2, "/no/such/model"),
        (["--recipe", "/no/such/recipe.yaml"], 2, "recipe"),
        (["--anchor", "math.jsonl"], 2, "NAME=PATH"),
        (["--nosuch"], 2, "nosuch"),
    ],
)
def test_mistakes_are_told_in_words(tmp_path, navigator, capsys, change, code, words):
    files = world(tmp_path)
    assert run([*arguments(files, tmp_path / "run", navigator), *change]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_full_terminal_program_says_no_traceback(tmp_path):
    done = subprocess.run([*GRADSIFT, "select", "--pool", "x.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--budget" in done.stderr
    assert "Traceback" not in done.stderr


def test_escape_sequences_in_rows_do_not_reach_the_terminal(tmp_path, navigator, capsys):
    path = write_jsonl(tmp_path / "evil.jsonl", [chat("\x1b[2Jcleared \u202e", "ok", id="\x1b]0;title\x07")])
    assert run(["inspect", str(path), "--navigator", str(navigator)]) == 0
    said = capsys.readouterr().out
    assert "\x1b[2J" not in said
    assert "\x1b]0;" not in said
    assert "\u202e" not in said
    assert "cleared" in said


def test_inspect_shows_the_mask(tmp_path, navigator, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("why?", "because")])
    assert run(["inspect", str(path), "--navigator", str(navigator), "--tokens"]) == 0
    said = capsys.readouterr().out
    assert "status OK" in said
    assert "8 carry loss" in said  # seven letters and the end of the turn
    assert run(["inspect", str(path), "--navigator", str(navigator), "--row", "5"]) == 2
    assert run(["inspect", "", "--navigator", str(navigator)]) == 2


def test_what_looks_like_markup_is_shown_as_it_is(tmp_path, navigator, capsys, monkeypatch):
    from gradsift.data import show

    path = write_jsonl(tmp_path / "rows.jsonl", [chat("why?", "because")])
    # A tokenizer of Mistral's family has such tokens; the toy's are letters.
    monkeypatch.setattr(
        show, "token_table", lambda *_: [show.ShownToken(0, 5, "[/INST]", True), show.ShownToken(1, 6, "[red]", False)]
    )
    assert run(["inspect", str(path), "--navigator", str(navigator), "--tokens"]) == 0
    said = capsys.readouterr().out
    assert "'[/INST]'" in said
    assert "'[red]'" in said


def test_doctor_and_tables_show_what_looks_like_markup(tmp_path, capsys, monkeypatch):
    from rich.console import Console

    from gradsift import doctor
    from gradsift.cli import evaluate
    from gradsift.cli.screen import table

    rows = write_jsonl(tmp_path / "rows.jsonl", [chat("why?", "because")])
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: [doctor.Check("[/a]", "ok", "[/b]", "[red]c")])
    assert run(["doctor", "--pool", str(rows)]) == 0
    monkeypatch.setattr(evaluate, "lines", lambda _: [("[/d]",) * 8])
    manifest = {"transitions": [], "notes": []}
    evaluate.show(Console(), SimpleNamespace(skipped=False, manifest=manifest, out=tmp_path))
    Console().print(table("[/e]", "[/f]"))
    said = capsys.readouterr().out
    for words in ("[/a]", "[/b]", "[red]c", "[/d]", "[/e]", "[/f]"):
        assert words in said


def test_a_demo_in_this_folder_has_its_rows_beside_it(tmp_path, capsys, monkeypatch):
    from gradsift.cli import demo, select
    from gradsift.data import exam_rows

    asked = []

    def written(place):
        asked.append(place)
        return SimpleNamespace(
            notes=(), anchors={"math": place / "math.jsonl"}, pool=place / "m.jsonl", target=place / "t.jsonl"
        )

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    (tmp_path / "my run").mkdir()
    monkeypatch.chdir(tmp_path / "my run")
    monkeypatch.setattr(exam_rows, "write_demo_rows", written)
    monkeypatch.setattr(select, "run", stop)
    with pytest.raises(Stop):
        demo.command(out=Path("."), fetch=False, method="random", budget="5")
    assert asked == [tmp_path / "my run-rows"]
    same = capsys.readouterr().out.partition("the same as: ")[2]
    assert shlex.split(same)[:4] == ["gradsift", "select", "--pool", str(tmp_path / "my run-rows" / "m.jsonl")]
    assert shlex.split(same)[-2:] == ["--out", "."]


@pytest.mark.parametrize("rows", ["0", "-1"])
def test_doctor_takes_at_least_one_row(capsys, rows):
    assert run(["doctor", "--pool", "rows.jsonl", "--rows", rows]) == 2
    assert "--rows" in capsys.readouterr().err


def test_doctor_passes_a_sound_model_and_fails_a_wrong_tokenizer(tmp_path, navigator, capsys):
    files = world(tmp_path)
    command = ["doctor", "--pool", str(files["pool"]), "--navigator", str(navigator)]
    assert run([*command, "--set", "navigator.parameters=all"]) == 0
    said = capsys.readouterr().out
    for words in ("loss mask", "begin token", "vocabulary", "coverage", "oracle", "alone or in a batch"):
        assert words in said
    assert "fail" not in said

    import shutil

    from tests.toy import toy_llama

    small = shutil.copytree(navigator, tmp_path / "small")
    model = toy_llama()
    model.resize_token_embeddings(50)
    model.save_pretrained(small)
    assert run(["doctor", "--pool", str(files["pool"]), "--navigator", str(small)]) == 1
    said = capsys.readouterr().out
    assert "vocabulary" in said
    assert "fail" in said


def test_methods_lists_every_method(capsys):
    from gradsift.methods import methods

    assert run(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(name[:8] in said for name in methods())


def test_stop_signal_resumes(tmp_path, navigator):
    """SIGTERM in the middle: exit code 143, the resume line, and the same command finishes."""
    files = world(tmp_path)
    command = arguments(files, tmp_path / "run", navigator)
    slow = (
        "import time, sys, gradsift.gradients.collect as c, gradsift.pipeline.measure as m\nold = c.measure_shard\n"
        "def slow(*a):\n    print('shard', flush=True); time.sleep(0.5); return old(*a)\nm.measure_shard = slow\n"
        "from gradsift.cli import main\nmain()"
    )
    full = [sys.executable, "-c", slow, *command, "--set", "collect.rows_per_shard=3"]
    with subprocess.Popen(
        full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as p:
        seen = 0
        for line in p.stdout:
            seen += line.strip() == "shard"
            if seen == 2:
                break
        p.terminate()
        begun = time.perf_counter()
        _, said = p.communicate(timeout=30)
        assert time.perf_counter() - begun < 10
        assert p.returncode == 143, said
        assert "resume with: " in said
    assert run([*command, "--set", "collect.rows_per_shard=3"]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["selection"]["num_rows"] == 6


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("a/données.jsonl", "donnees"),
        ("日本.jsonl", "pool"),
        ("a b.v2.jsonl", "a_b"),
        ("org/name:train", "name"),
        ("https://host:8080/deep/rows.jsonl?download=true", "rows"),
        ("https://host:8080/", "pool"),
        ("http://[x/rows.jsonl", "rows"),
        ("s3://bucket/rows.parquet", "rows"),
        ("memory://rows.jsonl", "rows"),
    ],
)
def test_a_pool_is_named_after_its_file(path, label):
    assert labelled(path, "--pool") == {"label": label, "path": path}


def test_long_names_are_cut_and_stay_apart():
    labels = [labelled("x" * 70 + f"{n}.jsonl", "--pool")["label"] for n in range(2)]
    assert len(set(labels)) == 2
    assert [len(label) for label in labels] == [64, 64]


def test_select_reads_what_its_automatic_label_names(tmp_path, capsys):
    for name in ("données.jsonl", "x" * 70 + ".jsonl"):
        write_jsonl(tmp_path / name, [{"text": f"row {k}"} for k in range(4)])
        words = ["select", "--pool", str(tmp_path / name), "--method", "random", "--budget", "2", "--dry-run"]
        assert run(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("role", [["--pool"], ["--anchor"], ["--target"], ["--general"]])
def test_a_secret_in_a_url_is_neither_written_nor_said(tmp_path, capsys, role):
    url = "http://user:CANARY@127.0.0.1:9/rows.jsonl"
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "row"}])
    words = ["select", "--pool", str(rows), "--method", "random", "--budget", "1", "--out", str(tmp_path / "run")]
    assert run([*words, *role, url]) == 2
    said = "".join(capsys.readouterr())
    assert "secret" in said
    assert "CANARY" not in said
    assert not (tmp_path / "run").exists()
