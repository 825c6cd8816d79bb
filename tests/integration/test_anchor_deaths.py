"""A process that dies over rows of an anchor or the target: the next run names them, and is the run that nothing happened to."""

from __future__ import annotations

import subprocess
import sys

from tests.rows import world

from gradsift.cli.app import run
from gradsift.launch.flight import FLIGHTS

DIES = """
import os, sys
from gradsift.gradients import directions
from gradsift.gradients.hooks import GradientEngine
real, calls = GradientEngine.measure, []

def measure(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os._exit(9)
    return real(self, *args, **kwargs)

GradientEngine.measure = measure
from gradsift.cli.app import run
sys.exit(run(sys.argv[2:]))
"""


def test_rows_of_an_anchor_that_kill_are_named(tmp_path, navigator, capsys):
    files = world(tmp_path)
    words = ["select", "--pool", f"pool={files['pool']}", "--anchor", f"math={files['math']}", "--target", str(files["target"]),
             "--navigator", str(navigator), "--method", "conflict", "--budget", "25%", "--out", str(tmp_path / "run"),
             "--set", "collect.sketch_dim=251", "--set", "collect.tokens_per_batch=64"]  # fmt: skip
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", DIES, "2", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 9, done.stderr
    assert "an earlier process died while measuring these rows of math: " in done.stderr + done.stdout

    assert run(words) == 0
    assert "2 earlier processes died while measuring these rows of math: " in "".join(capsys.readouterr())
    assert run([*words[:-6], "--out", str(tmp_path / "whole"), *words[-4:]]) == 0
    assert "died" not in "".join(capsys.readouterr())
    chosen = [(tmp_path / name / "selection" / "selected.jsonl").read_bytes() for name in ("run", "whole")]
    assert chosen[0] == chosen[1]
    assert not list((tmp_path / "run" / "signals").rglob(FLIGHTS))
