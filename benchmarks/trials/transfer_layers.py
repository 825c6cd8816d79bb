"""How far do cosines of a smaller navigator rank as those of the model it stands for? SmolLM2-135M without layers 20 to 23 beside itself.

The demo's rows are measured on the model with four layers left out (not healed afterwards) and again, all of them, on the whole model;
adapter of rank 16 in both. Rank correlation, signs and overlap of the best and worst quarter come with 95% intervals over rows. One
draw of the rows, one adapter seed: it says how this navigator does here, and nothing of others.

    python benchmarks/trials/transfer_layers.py --out docs/results/trials/transfer_layers.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.trials.common import ROOT, hardware, plain

from gradsift.api import select
from gradsift.compare.real_world import layer_drop_navigator
from gradsift.data.exam_rows import write_demo_rows
from gradsift.manifest import git_sha, versions, write_json_atomic
from gradsift.models.load import load_navigator, resolve_navigator
from gradsift.pipeline.transfer import TransferConfig, audit_transfer

FIRST, LAST = 20, 23


def main() -> None:
    """Measure on both models, print the sentences and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, help="folder of the run, kept; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        small, rows, run = work / "navigator", work / "rows", work / "run"
        if not (small / "config.json").is_file():
            whole = load_navigator(resolve_navigator("auto"), device="cpu")
            layer_drop_navigator(whole.model, FIRST, LAST).save_pretrained(small)
            whole.tokenizer.save_pretrained(small)
        files = write_demo_rows(rows)
        select(
            files.pool,
            anchors=files.anchors,
            target=files.target,
            method="target_cosine",
            budget="25%",
            navigator=small,
            out=run,
        )
        report = audit_transfer(run, TransferConfig("auto", rows=10_000)).report
    for one in report["anchors"]:
        print(one["sentence"])
    if options.out:
        report["navigator"]["name"] = f"SmolLM2-135M without layers {FIRST} to {LAST}"  # not the folder it was saved in
        kept = {
            name: report[name] for name in ("navigator", "model", "anchors", "rows", "cost", "notes") if name in report
        }
        head = {"command": shlex.join(["python", *sys.argv]), "date": date.today().isoformat(), "commit": git_sha(ROOT),
                "hardware": hardware(), "versions": versions(), "left_out_layers": [FIRST, LAST]}  # fmt: skip
        write_json_atomic(options.out, plain({**head, **kept}))


if __name__ == "__main__":
    main()
