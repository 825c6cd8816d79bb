"""The speed table at a small size: it runs, its limits hold with room for noise, and a limit that is exceeded is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORDS = ["--quick", "--rows", "8", "--models", "Llama-10M"]
OWN = ["gradsift-sketch", "gradsift-body", "gradsift-all", "gradsift-lora"]


def run(*words):
    command = [sys.executable, str(BENCHMARKS / "collect.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode in (0, 1), done.stderr
    return done


def test_the_limits_hold_at_a_small_size(tmp_path):
    out = tmp_path / "speed.json"
    done = run(*WORDS, "--json", str(out), "--check", str(BENCHMARKS / "thresholds.json"))
    assert done.returncode == 0, done.stdout
    lines = {line["key"]: line for line in json.loads(out.read_text())["models"][0]["lines"]}
    assert set(OWN) <= set(json.loads((BENCHMARKS / "thresholds.json").read_text())["limits"])
    for key in OWN:
        assert len(lines[key]["ratios"]) == 3
        assert lines[key]["seconds"] == pytest.approx(
            [a * b for a, b in zip(lines[key]["ratios"], against(lines, key), strict=True)]
        )
    assert lines["plain"]["headless"] == lines["gradsift-all"]["headless"] == []  # both take the head's gradient
    assert lines["gradsift-body"]["headless_median"] > lines["gradsift-body"]["median"]
    for key, other in {"body": "plain-headless", "all": "plain", "lora": "lora-plain"}.items():
        same = [
            a / b
            for a, b in zip(lines[f"gradsift-{key}"]["seconds"], lines[f"{other}-products"]["seconds"], strict=True)
        ]
        assert lines[f"gradsift-{key}"]["same_products"] == same


def against(lines, key):
    return lines[lines[key]["against"]]["seconds"]


def test_a_limit_that_is_exceeded_is_told(tmp_path):
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps({"limits": {"gradsift-body": 0.01, "no-such-arm": 1}, "quick_allowance": 0.0}))
    done = run("--quick", "--rows", "2", "--rounds", "1", "--models", "Llama-10M", "--check", str(limits))
    assert done.returncode == 1
    assert "gradsift-body is" in done.stdout
    assert "no-such-arm was not measured" in done.stdout
