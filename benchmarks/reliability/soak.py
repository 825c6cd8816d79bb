"""A collector of made-up rows, 1,024 numbers each, for the soak trial: fast, deterministic, and made to be killed.

``python soak.py FOLDER ROWS ROWS_PER_SHARD DEFECT`` collects what is missing and appends one line of JSON per shard to
``FOLDER/log``: rows committed, memory in kB (at most; now and then also what is resident), seconds spent in measuring, committing and fsync.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from gradsift.manifest import hash_parts
from gradsift.store.shards import ShardResult
from gradsift.store.spec import GradientSpec, Projection
from gradsift.store.writer import SignalWriter, open_writer
from gradsift.types import RowStatus

DIM = 1024
SPEC = GradientSpec(
    parameters="all", parameters_sha256="p" * 64, model_sha256="m" * 64, tokenizer_sha256="t" * 64, loss_on="all",
    max_length=1024, signals=("loss", "grad_norm", "sketch"), code_version="stub", anchors={},
    projection=Projection(DIM, 42, "stub"),
)  # fmt: skip
KEEPS = "a writer keeps every row it has committed in memory"
UNSYNCED = "nothing is fsynced"


def ids_of(start: int, count: int) -> tuple[str, ...]:
    """Name some rows."""
    return tuple(f"row-{n:09}" for n in range(start, start + count))


def contents_of(ids: tuple[str, ...]) -> tuple[str, ...]:
    """Their content hashes."""
    return tuple(hash_parts([name.encode()]) for name in ids)


def measure(start: int, count: int) -> ShardResult:
    """Make the rows of a shard up; the first row's number is the seed."""
    ids, random = ids_of(start, count), np.random.default_rng(start)
    none = np.full(count, np.nan)
    norm = np.exp(random.standard_normal(count))
    return ShardResult(
        ids, contents_of(ids), (RowStatus.OK,) * count, ("",) * count, np.full(count, 512), np.full(count, 256),
        random.random(count) * 4, norm, none, none, np.zeros((count, 0)), (),
        random.standard_normal((count, DIM), dtype=np.float32) * (norm[:, None] / 32).astype(np.float32),
    )  # fmt: skip


def resident_kb() -> int:
    """Resident memory of this process in kB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * (os.sysconf("SC_PAGE_SIZE") // 1024)


def settled_kb() -> int:
    """Resident memory in kB once the pages that the allocators keep for later are given back."""
    pyarrow.default_memory_pool().release_unused()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return resident_kb()


def timed(times: dict[str, float], name: str, act: Callable[..., Any]) -> Callable[..., Any]:
    """Add up the time of a function's calls."""

    def call(*args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return act(*args, **options)
        finally:
            times[name] = times.get(name, 0.0) + time.perf_counter() - begun

    return call


def missing(writer: SignalWriter, rows: int, per_shard: int) -> list[int]:
    """First rows of the shards that are not committed whole, as a plan finds them."""
    left = []
    for start in range(0, rows, per_shard):
        ids = ids_of(start, min(per_shard, rows - start))
        if writer.missing(ids, contents_of(ids)).size:
            left.append(start)
    return left


def collect(folder: Path, rows: int, per_shard: int, defect: str = "") -> None:
    """Collect what is missing."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    times: dict[str, float] = {}
    sync = os.fsync
    os.fsync = timed(times, "fsync", (lambda handle: None) if defect == UNSYNCED else sync)
    begun, cpu = time.perf_counter(), time.process_time()
    kept: list[Any] = []

    def tell(**values: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        line = {"pid": os.getpid(), **values, **{k: round(v, 4) for k, v in times.items()}, "peak": peak}
        os.write(log, f"{json.dumps(line)}\n".encode())

    with open_writer(folder / "store", SPEC) as writer:
        opened = time.perf_counter() - begun
        left = missing(writer, rows, per_shard)
        done = len(writer.committed_ids())
        planned, planned_cpu = time.perf_counter() - begun, time.process_time() - cpu
        tell(start=done, opened=round(opened, 3), planned=round(planned, 3), planned_cpu=round(planned_cpu, 3))
        measured, commit = timed(times, "measure", measure), timed(times, "commit", writer.commit)
        every = max(1, 4096 // per_shard)
        for number, start in enumerate(left):
            result = measured(start, min(per_shard, rows - start))
            done += commit(result).num_rows
            if defect == KEEPS:
                kept.extend(zip(result.ids, result.content_hashes))
            del result
            tell(done=done, **({"rss": settled_kb()} if number % every == 0 else {}))


if __name__ == "__main__":
    collect(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
