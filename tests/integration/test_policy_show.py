"""``gradsift policy show`` on a run with a tiny navigator and on invented ones; what is said while roll-outs go on."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from tests.policy_details import make_policy_run, some_details
from tests.report_fixture import write_run
from tests.rows import some_rows, world, write_jsonl

from gradsift.cli.app import run
from gradsift.pipeline.progress import Clock, Silent
from gradsift.report.policy_fields import parse_details

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, navigator):
    """A run of ogs: its folder, the words of the command, and what it said the first time."""
    folder = tmp_path_factory.mktemp("ogs")
    files = world(folder, 30)
    general = write_jsonl(folder / "general.jsonl", some_rows(10, 9, answer="good day to you"))
    command = [
        "select", "--pool", str(files["pool"]), "--anchor", f"math={files['math']}", "--target", str(files["target"]),
        "--general", f"replay={general}", "--navigator", str(navigator), "--method", "ogs", "--budget", "12",
        "--out", str(folder / "run"),
    ]  # fmt: skip
    settings = {
        "navigator.parameters": "all", "collect.sketch_dim": 251, "rollout.dev_rows": 2, "rollout.batch_size": 4,
        "rows_per_decision": 4, "num_clusters": 4, "num_epochs": 4, "num_episodes": 4, "num_confirmed": 1,
        "infeasible": "least",
    }  # fmt: skip
    return folder / "run", [*command, *(w for k, v in settings.items() for w in ("--set", f"{k}={v}"))]


def test_a_run_says_its_roll_outs_and_shows_its_policy(chosen, capsys):
    out, command = chosen
    assert run(command) == 0
    said = capsys.readouterr().out
    rolled = json.loads((out / "manifest.json").read_text())["rollouts"]["num_rollouts"]
    lines = [line for line in said.splitlines() if line.startswith("roll-out ")]
    assert [int(line.split(",")[0].removeprefix("roll-out ")) for line in lines] == list(range(1, rolled + 1))
    assert "roll: " not in said
    assert "training roll-outs" not in said
    assert run(command) == 0
    assert "roll-out 1," not in capsys.readouterr().out  # all were read back

    assert run(["policy", "show", str(out)]) == 0
    said = capsys.readouterr().out
    details = parse_details(json.loads((out / "selection" / "details.json").read_text()))
    assert f"the list of {details.policy}" in said
    for one in details.contest:
        assert one.policy in said
    for words in (
        "Limits, in nats",
        "Contest",
        "The returned list",
        "Clusters",
        "What choosing took",
        "navigator roll-outs",
    ):
        assert words in said
    assert "fine-tuning" not in said
    assert run(["policy", "show", str(out), "--json"]) == 0
    assert capsys.readouterr().out == (out / "selection" / "details.json").read_text()
    assert run(["report", str(out)]) == 0
    assert '<section id="policy">' in (out / "report.html").read_text()


def test_a_learned_policy_is_shown_over_its_training(tmp_path, capsys):
    at = make_policy_run(write_run(tmp_path / "run"), some_details(("math", "[red]x\x1b[31m")))
    assert run(["policy", "show", str(at)]) == 0
    said = capsys.readouterr().out
    assert "[red]x" in said
    assert "\x1b" not in said
    assert "Training, mean of an epoch's episodes" in said
    assert "note: no advantage of the learned policy over ogs_dual_clusters was measured" in said
    assert max(map(len, said.splitlines())) <= 80


def no_run(path):
    (path / "manifest.json").unlink()


def another_method(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["selection"]["method"] = "random"
    (path / "manifest.json").write_text(json.dumps(manifest))


def no_details(path):
    (path / "selection" / "details.json").unlink()


def no_json(path):
    (path / "selection" / "details.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (no_run, 2, "no finished run"),
        (another_method, 2, "this run has no policy"),
        (no_details, 1, "are gone"),
        (no_json, 1, "not JSON"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, capsys, damage, code, words):
    at = make_policy_run(write_run(tmp_path / "run"), some_details())
    damage(at)
    assert run(["policy", "show", str(at)]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "do this:" in said
    assert "Traceback" not in said


class Loud(Silent):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def start(self, stage: str, total_tokens: int) -> None:
        self.told.append(f"start {stage}")

    def finish(self, stage: str) -> None:
        self.told.append(f"finish {stage}")


def test_a_stage_that_is_not_told_is_timed_all_the_same():
    clock = Clock(Loud())
    with clock.stage("select"):
        for _ in range(2):
            with clock.stage("roll", told=False):
                pass
    assert clock.progress.told == ["start select", "finish select"]
    assert set(clock.seconds) == {"select", "roll"}


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_section_opens_clean(tmp_path):
    from gradsift.report.page import render_report

    page = render_report(make_policy_run(write_run(tmp_path / "run"), some_details()))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0"]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    assert done.stdout.split('id="policy"')[1].split("</section>")[0].count("<svg") == 7
    assert "CONSOLE" not in done.stderr, done.stderr
