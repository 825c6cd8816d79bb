"""Runs of several processes for the launcher tests: as a script the command line with a log of what each process measured.

``python tests/launched.py select ...`` appends ``PID KEY`` to the file ``$MEASURED`` before it measures a unit, then waits
``$SLOW`` seconds, so that a kill from outside finds it at work. Rows of ``$POISON`` end the process by a segmentation fault
and the row of ``$HANG`` stops it for ever, the latter once; ``$STUB`` puts made-up numbers in place of a model, and
``$DEFECT`` plants a defect. As a module: stub passes, and stores compared row by row.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--set", "collect.rows_per_shard=5", "--set", "collect.sketch_dim=251"]


def log_measuring() -> None:
    """Let this process log every unit it begins, and take its time."""
    import gradsift.pipeline.measure as module

    plain = module.measure_shard

    def logged(run, some):
        with open(os.environ["MEASURED"], "a") as log:
            log.write(f"{os.getpid()} {some[0].id}\n")
        time.sleep(float(os.environ.get("SLOW", "0")))
        return plain(run, some)

    module.measure_shard = logged
    if os.environ.get("STUB"):
        plain = made_up
    trap()
    if os.environ.get("DEFECT") == "everyone has every unit":
        from gradsift.launch.board import Board

        Board.claim = lambda *_: True


def trap() -> None:
    """Let micro-batches with the rows of ``$POISON`` or ``$HANG`` end, or stop, this process."""
    import ctypes

    import gradsift.gradients.collect as module

    poison, hang = (set(os.environ.get(name, "").split()) for name in ("POISON", "HANG"))
    plain = module.collate

    def trapped(rows, *more):
        ids = {row.id for row in rows}
        if ids & poison:
            ctypes.string_at(0)
        marker = Path(os.environ["MEASURED"]).with_suffix(".hung")
        if ids & hang and not marker.exists():
            marker.touch()
            time.sleep(10_000)
        return plain(rows, *more)

    if poison or hang:
        module.collate = trapped


def made_up(run, rows):
    """Signals that are a function of the row's id, in the shapes that the pass asks for."""
    from gradsift.gradients.collect import _result as result
    from gradsift.gradients.collect import _status, _Values

    run.before(rows)
    draws = np.stack(
        [np.random.default_rng(list(row.id.encode())).standard_normal(8 + run.engine.projector.dim) for row in rows]
    )
    norm = np.exp(draws[:, 0])
    values = _Values(
        np.abs(draws[:, 1]), norm, norm / 3, norm / 5, norm[:, None] * draws[:, 2 : 2 + len(run.directions)] / 4,
        norm[:, None] * draws[:, 8:] / np.sqrt(run.engine.projector.dim), None, {},
    )  # fmt: skip
    run.tick(len(rows), sum(row.num_tokens for row in rows))
    return result(run, rows, [values], [_status(values, k, row, True) for k, row in enumerate(rows)])


def act(*arguments):
    """What a Ray actor does here: log, then serve."""
    from gradsift.pipeline import serve

    log_measuring()
    return serve.act(*arguments)


def main() -> None:
    from tests import launched  # by its name, so that an actor finds the function

    from gradsift.cli.app import run
    from gradsift.pipeline import serve

    plain = serve.act
    assert plain is not launched.act
    log_measuring()
    if "ray" in sys.argv:
        actors = serve.Actors
        serve.Actors = lambda seat, _, *more, **options: actors(seat, launched.act, *more, **options)
    sys.exit(run(sys.argv[1:]))


def words(folder: Path, navigator: Path, out: Path, *more: str) -> list[str]:
    """A select command over the rows of :func:`tests.rows.world`."""
    return [
        "select", "--pool", str(folder / "pool.jsonl"), "--anchor", f"math={folder / 'math.jsonl'}",
        "--anchor", f"chat={folder / 'chat.jsonl'}", "--target", str(folder / "target.jsonl"),
        "--navigator", str(navigator), "--method", "ogs_dual", "--budget", "25%", "--out", str(out), *SMALL, *more,
    ]  # fmt: skip


def start(command: Sequence[str], log: Path, *, slow: float = 0.0, **variables: str) -> subprocess.Popen:
    """Start a process with the log switched on and no rank's variables but those given."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    environment = {**kept, "MEASURED": str(log), "SLOW": str(slow), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **variables}  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=log.parent
    )


def script(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "launched.py"), *arguments]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *runner, str(ROOT / "tests" / "launched.py"), *arguments]


def measured(log: Path) -> list[tuple[int, str]]:
    """What was begun: (process, unit), in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(pid), key) for pid, key in (line.split(" ", 1) for line in lines)]


def wait_for(condition: Callable[[], object], seconds: float = 90.0, *, process: subprocess.Popen | None = None):
    """Wait until something is there, and give it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode}:\n{process.communicate()[0]}")
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def finish(process: subprocess.Popen, code: int | None = 0, seconds: float = 100.0) -> str:
    """Wait for the end; the exit code must be ``code`` (None: any but 0)."""
    text = process.communicate(timeout=seconds)[0]
    assert (process.returncode == code) if code is not None else (process.returncode != 0), text
    return text


def store_rows(out: Path, name: str = "signals") -> dict[str, tuple]:
    """Every number of a run's store by row id, bit for bit."""
    from gradsift.store.signals import open_store
    from gradsift.store.spec import read_spec
    from gradsift.store.verify import verify_store

    (folder,) = (place for place in (out / name).iterdir())
    spec = read_spec(folder)
    assert spec is not None
    report = verify_store(folder)
    assert report.ok, report.damage
    assert report.num_rows == sum(report.status.values())
    store = open_store(folder, spec)
    assert len(set(store.ids)) == len(store.ids) == report.num_rows
    usable = [name for name, status in zip(store.ids, store.status, strict=True) if status.usable]
    sketch = np.full((len(store.ids), store.unit_sketch(usable[:1]).shape[1]), np.nan, dtype=np.float32)
    sketch[store.positions(usable)] = store.unit_sketch(usable)
    columns = (store.loss, store.grad_norm, store.emb_grad_norm, store.head_grad_norm, store.all_dots, sketch)
    return {
        name: (store.content_hashes[i], str(store.status[i]), *(np.asarray(c[i]).tobytes() for c in columns))
        for i, name in enumerate(store.ids)
    }


def check_equal(out: Path, whole: Path, name: str = "signals") -> None:
    """The stores are equal row by row and the chosen rows are the same file."""
    got, want = store_rows(out, name), store_rows(whole, name)
    assert set(got) == set(want), "rows were lost or added"
    assert [name for name in want if got[name] != want[name]] == []
    chosen = Path("selection") / "selected.jsonl"
    assert (out / chosen).read_bytes() == (whole / chosen).read_bytes()


def check_redone(log: Path, num_units: int, num_workers: int, at_least: int = 0) -> None:
    """Every unit was begun, and no more than one per worker twice."""
    begun = [key for _, key in measured(log)]
    assert len(set(begun)) == num_units
    assert at_least <= len(begun) - len(set(begun)) <= num_workers


def stub_rows(count: int, edition: int = 0) -> list:
    """Token rows without a tokenizer."""
    from gradsift.types import RowStatus, TokenRow

    rows = []
    for n in range(count):
        ids = np.full(3 + n % 7, n + 1000 * edition, dtype=np.int32)
        rows.append(TokenRow(f"row-{n:04}", ids, np.ones(len(ids), dtype=bool), len(ids), RowStatus.OK))
    return rows


def stub_bench(
    folder: Path,
    rows: Sequence,
    per_shard: int = 4,
    before: Callable[[str], None] = lambda _: None,
    kills: Callable[[Sequence[str]], None] = lambda _: None,
):
    """A pass whose numbers are known; ``before`` is called with the first id of what is measured, ``kills`` with all."""
    from tests.unit.store.store_world import SPEC, measure

    from gradsift.launch.bench import Bench
    from gradsift.launch.flight import Flight
    from gradsift.store.spec import content_hash

    flight = Flight(folder)

    def measure_rows(some):
        flight.write(some)
        before(some[0].id)
        kills([row.id for row in some])
        hashes = tuple(content_hash(row.input_ids, row.trained) for row in some)
        return dataclasses.replace(measure([row.id for row in some]), content_hashes=hashes)

    def lost(some, why):
        from gradsift.types import RowStatus

        nan = np.full(len(some), np.nan)
        plain = measure([row.id for row in some])
        hashes = tuple(content_hash(row.input_ids, row.trained) for row in some)
        gone = dict.fromkeys(("loss", "grad_norm", "emb_grad_norm", "head_grad_norm"), nan)
        return dataclasses.replace(
            plain, content_hashes=hashes, status=(RowStatus.WORKER_CRASH,) * len(some), reason=tuple(why), **gone,
            dots=np.full_like(plain.dots, np.nan), sketch=np.full_like(plain.sketch, np.nan),
        )  # fmt: skip

    return Bench(
        "signals", folder, SPEC, rows, per_shard, measure_rows, lambda n, tokens: None, {}, lost=lost, flight=flight
    )


if __name__ == "__main__":
    main()
