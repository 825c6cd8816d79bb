"""What sharing out costs beside measuring: stub units through commit, and through staging and adoption.

``python benchmarks/launch.py [UNITS] [ROWS]`` prints seconds per unit of 64 rows with 4,093-number sketches, bytes on the
disk, and how long the plan of ROWS rows and the claims of all its units take.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gradsift.launch.bench import Bench
from gradsift.launch.board import Board
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


def main() -> None:
    given = [int(text) for text in sys.argv[1:3]]
    num_units, num_rows = [*given, *(60, 100_000)[len(given) :]]
    results = [unit(n) for n in range(num_units)]
    raw = num_units * PER_UNIT * DIM * 2
    place = Path(tempfile.mkdtemp(prefix="gradsift-launch-"))
    try:
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
        print(f"units of {PER_UNIT} rows x {DIM} float16: {num_units}")
        print(f"commit by one process   {1000 * commit:8.1f} ms per unit")
        print(f"stage by a worker       {1000 * staged:8.1f} ms per unit")
        print(
            f"verify and adopt        {1000 * adopt:8.1f} ms per unit, so one committer takes {PER_UNIT / adopt:.0f} rows/s"
        )
        print(f"bytes over raw sketches {100 * (num_bytes(place / 'two') / raw - 1):8.2f} %")
        ids, mask = np.arange(8, dtype=np.int32), np.ones(8, dtype=bool)
        rows = [TokenRow(f"row-{n:09}", ids, mask, 8, RowStatus.OK) for n in range(num_rows)]
        bench = Bench("signals", place / "three", SPEC, rows, PER_UNIT, unit, lambda *_: None, {})  # type: ignore[arg-type]
        begun = time.perf_counter()
        with open_writer(place / "three", SPEC) as writer:
            units = list(bench.plan(writer))
        print(f"plan of {num_rows} rows     {time.perf_counter() - begun:8.1f} s")
        board = Board(place / "launch", "run")
        board.open_pass("signals", SPEC.key, units)
        begun = time.perf_counter()
        for each in units:
            board.claim("signals", each.key, "me")
        print(f"claims of {len(units)} units   {time.perf_counter() - begun:8.2f} s, all by one process")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
