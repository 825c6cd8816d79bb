"""What sharing out costs beside measuring: stub units through commit, and through staging and adoption.

``python benchmarks/launch.py [--units 60] [--rows 100000] [--json docs/results/launch.json]`` prints seconds per unit of 64 rows
with 4,093-number sketches, bytes on the disk, and how long the plan of the rows and the claims of all its units take.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trials.outcome import machine

from gradsift.launch.bench import Bench
from gradsift.launch.board import Board
from gradsift.manifest import git_sha, write_json_atomic
from gradsift.store.shards import ShardResult
from gradsift.store.spec import GradientSpec, Projection
from gradsift.store.staging import adopt_staged, stage
from gradsift.store.writer import open_writer
from gradsift.types import RowStatus, TokenRow

PER_UNIT, DIM = 64, 4093
SPEC = GradientSpec(
    parameters="all", parameters_sha256="p" * 64, model_sha256="m" * 64, tokenizer_sha256="t" * 64, loss_on="all",
    max_length=1024, signals=("loss", "grad_norm", "sketch"), code_version="stub", anchors={},
    projection=Projection(DIM, 42, "stub"), adapter_sha256=None, template_sha256=None,
)  # fmt: skip


def unit(number: int) -> ShardResult:
    names = tuple(f"row-{number * PER_UNIT + i:09}" for i in range(PER_UNIT))
    random = np.random.default_rng(number)
    sketch = random.standard_normal((PER_UNIT, DIM)).astype(np.float32) / np.sqrt(DIM)
    nan = np.full(PER_UNIT, np.nan)
    return ShardResult(
        names, names, (RowStatus.OK,) * PER_UNIT, ("",) * PER_UNIT, np.full(PER_UNIT, 512), np.full(PER_UNIT, 256),
        np.ones(PER_UNIT), np.ones(PER_UNIT), nan, nan, np.zeros((PER_UNIT, 0)), (), sketch,
    )  # fmt: skip


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def per_unit(place: Path, num_units: int) -> dict[str, float]:
    """Commit by one process, and stage and adopt: seconds per unit, and bytes over the raw sketches."""
    results = [unit(n) for n in range(num_units)]
    begun = time.perf_counter()
    with open_writer(place / "one", SPEC) as writer:
        for result in results:
            writer.commit(result)
    commit = (time.perf_counter() - begun) / num_units
    begun = time.perf_counter()
    for result in results:
        stage(place / "two", SPEC, result, {})
    staged = (time.perf_counter() - begun) / num_units
    contents = {name: name for result in results for name in result.ids}
    begun = time.perf_counter()
    with open_writer(place / "two", SPEC) as writer:
        adopted = adopt_staged(writer, contents)
    adopt = (time.perf_counter() - begun) / num_units
    assert len(adopted.units) == num_units
    raw = num_units * PER_UNIT * DIM * 2
    return {"commit_seconds": commit, "stage_seconds": staged, "adopt_seconds": adopt,
            "bytes_over": num_bytes(place / "two") / raw - 1}  # fmt: skip


def planning(place: Path, num_rows: int) -> dict[str, float]:
    """Plan the units of some rows and claim them all: seconds."""
    ids, mask = np.arange(8, dtype=np.int32), np.ones(8, dtype=bool)
    rows = [TokenRow(f"row-{n:09}", ids, mask, 8, RowStatus.OK) for n in range(num_rows)]
    bench = Bench("signals", place / "three", SPEC, rows, PER_UNIT, unit, lambda *_: None, {})  # type: ignore[arg-type]
    begun = time.perf_counter()
    with open_writer(place / "three", SPEC) as writer:
        units = list(bench.plan(writer))
    plan = time.perf_counter() - begun
    board = Board(place / "launch", "run")
    board.open_pass("signals", SPEC.key, units)
    begun = time.perf_counter()
    for each in units:
        board.claim("signals", each.key, "me")
    return {"plan_seconds": plan, "claim_seconds": time.perf_counter() - begun, "planned_units": len(units)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=60)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="gradsift-launch-"))
    try:
        found = {"units": given.units, "rows_per_unit": PER_UNIT, "dim": DIM, **per_unit(place, given.units),
                 "planned_rows": given.rows, **planning(place, given.rows)}  # fmt: skip
    finally:
        shutil.rmtree(place)
    rate = PER_UNIT / found["adopt_seconds"]
    print(f"units of {PER_UNIT} rows x {DIM} float16: {given.units}")
    print(f"commit by one process   {1000 * found['commit_seconds']:8.1f} ms per unit")
    print(f"stage by a worker       {1000 * found['stage_seconds']:8.1f} ms per unit")
    print(
        f"verify and adopt        {1000 * found['adopt_seconds']:8.1f} ms per unit, so one committer takes {rate:.0f} rows/s"
    )
    print(f"bytes over raw sketches {100 * found['bytes_over']:8.2f} %")
    print(f"plan of {given.rows} rows     {found['plan_seconds']:8.1f} s")
    print(f"claims of {found['planned_units']} units   {found['claim_seconds']:8.2f} s, all by one process")
    if given.json is not None:
        command = shlex.join(["python", "benchmarks/launch.py", *sys.argv[1:]])
        record = {"command": command, "date": date.today().isoformat(), "commit": git_sha(ROOT),
                  "hardware": f"{machine()}, load {os.getloadavg()[0]:.1f}, no GPU used"}  # fmt: skip
        write_json_atomic(given.json, {**record, **found})


if __name__ == "__main__":
    main()
