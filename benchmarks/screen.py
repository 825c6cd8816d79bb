"""What a screen costs and how well it ranks: ``gradsift doctor --layers`` on the demo's rows (SmolLM2-135M, every weight).

The demo's rows are written to a folder that is thrown away, so that one command prints the figures of docs/cost.md.

    python benchmarks/screen.py --rows 240 --json docs/results/layers_cost.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarks.trials.common import hardware
from rich.console import Console

from gradsift.cli.doctor import show_shares
from gradsift.data.exam_rows import DemoCounts, write_demo_rows
from gradsift.manifest import write_json_atomic
from gradsift.recipe import build_recipe


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", choices=("all", "lora"), default="all")
    parser.add_argument("--rows", type=int, default=240, help="rows of the pool that are ranked")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = write_demo_rows(Path(folder), DemoCounts(pool=360))
        recipe = build_recipe({
            "pool": [{"label": "medical", "path": str(files.pool)}], "target": str(files.target), "budget": "25%",
            "anchors": [{"label": name, "path": str(path)} for name, path in files.anchors.items()],
            "method": {"name": "target_cosine"},
            "navigator": {"parameters": options.parameters, "device": "cpu"},
        })  # fmt: skip
        show_shares(Console(width=160), recipe, options.rows, options.json)
    if options.json:
        told = {"command": shlex.join(["python", *sys.argv]), "hardware": hardware()}
        write_json_atomic(options.json, {**json.loads(options.json.read_text("utf-8")), **told})


if __name__ == "__main__":
    main()
