"""benchmarks/scale.py at toy size: every step of a million rows works on three hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[3]


def test_every_step_of_the_script_works(tmp_path):
    words = ["--folder", "store", "--rows", "300", "--dim", "61", "--json", "out.json"]
    words += ["--steps", "write", "open", "ogs_dual", "cluster", "audit", "page"]
    subprocess.run([sys.executable, str(ROOT / "benchmarks/scale.py"), *words], cwd=tmp_path, check=True, timeout=300)
    steps = json.loads((tmp_path / "out.json").read_text())["sizes"]["300"]
    assert {name: one.get("error") for name, one in steps.items()} == dict.fromkeys(steps)
    assert steps["ogs_dual"]["num_chosen"] == 30
    table = pq.read_table(tmp_path / "store/n300/run/selection/audit.parquet")
    assert (table.num_rows, sum(table["selected"].to_pylist())) == (300, 30)
    assert table["loss"].null_count == 0
