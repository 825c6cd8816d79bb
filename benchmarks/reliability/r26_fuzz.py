"""R26: whatever bytes stand in a record, a row table, an array, a description or a recipe: a typed error, soon, in little memory.

Where Atheris is installed it drives the readers by coverage; elsewhere the same mutations of valid files are drawn at
random, and the outcome says so. Bytes that pass are not a crash: a record whose seal fits is a record.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.reliability.frame import Check, Outcome, Trial

SLOW_SECONDS = 1.0
TARGETS = ("record", "description", "rows", "sketch", "recipe")
LEAKS = "the reader of row tables lets Arrow's errors through"
STALLS = "a recipe that holds an ampersand takes a second more"


def valid(target: str, folder: Path) -> list[bytes]:
    """Files as they should be."""
    from tests.unit.store.store_world import fill, make_ids

    if target == "recipe":
        return [
            b"pool:\n- {label: a, path: a.jsonl}\nmethod: {name: ogs_dual}\nbudget: 10%\nseed: 3\n",
            b"pool: [&x {label: b, path: b}]\nanchors: [*x]\nmethod: {name: dsir}\nbudget: '5'\ncollect: {sketch_dim: 251}\n",
        ]
    if not (folder / "spec.json").exists():
        fill(folder, make_ids(12), 6)
    pattern = {"record": "ledger/*", "description": "spec.json", "rows": "shards/*.parquet", "sketch": "shards/*.npy"}
    return [path.read_bytes() for path in sorted(folder.glob(pattern[target]))]


def reader(target: str, folder: Path) -> Callable[[bytes], None]:
    """One reader: takes the bytes of a file, as it would find them on the disk, hash and all."""
    from dataclasses import replace
    from unittest.mock import patch

    from tests.unit.store.store_world import SPEC

    from gradsift.manifest import sha256_bytes
    from gradsift.recipe import build_recipe, load_recipe
    from gradsift.store import ledger, reading
    from gradsift.store.ledger import FileMark, read_ledger
    from gradsift.store.shards import rows_file, sketch_file
    from gradsift.store.spec import read_spec

    record = read_ledger(folder, SPEC.key).records[0] if target != "recipe" else None

    def as_committed(name: str, data: bytes) -> Any:
        """The record of a hostile writer: its hash fits the bytes, so that the bytes themselves are looked at."""
        assert record is not None
        (folder / "shards" / name).write_bytes(data)
        return replace(record, files={**record.files, name: FileMark(len(data), sha256_bytes(data))})

    def read_record(data: bytes) -> None:
        # twice: as it stands, and with the seal taken for right, so that what lies behind it is reached
        ledger.decode_record(data)
        with patch.object(ledger, "unseal", _unsealed):
            ledger.decode_record(data)
        path = folder / "ledger" / "aa.json"
        path.write_bytes(data)
        read_ledger(folder, SPEC.key)
        path.unlink()

    def read_description(data: bytes) -> None:
        place = folder / "description"
        place.mkdir(exist_ok=True)
        (place / "spec.json").write_bytes(data)
        read_spec(place)

    def read_rows(data: bytes) -> None:
        assert record is not None
        reading.decode_rows(folder, as_committed(rows_file(record.unit), data), SPEC)

    def read_ids(data: bytes) -> None:
        assert record is not None
        reading.read_ids(folder, as_committed(rows_file(record.unit), data))

    def read_sketch(data: bytes) -> None:
        assert record is not None
        reading.map_sketch(folder, as_committed(sketch_file(record.unit), data), SPEC)

    def read_recipe(data: bytes) -> None:
        path = folder / "recipe.yaml"
        path.write_bytes(data)
        build_recipe(load_recipe(path))

    def both(data: bytes) -> None:
        from gradsift.errors import GradsiftError

        with suppress(GradsiftError):
            read_rows(data)
        read_ids(data)

    readers = {"record": read_record, "description": read_description, "rows": both, "sketch": read_sketch}
    return {**readers, "recipe": read_recipe}[target]


def _unsealed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
        value.pop("seal", None)
        return value
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


class Watch:
    """Give a reader bytes and judge what it does."""

    def __init__(self, read: Callable[[bytes], None], defect: str) -> None:
        self.read, self.defect = read, defect
        self.count = self.untyped = self.slow = 0
        self.slowest = 0.0
        self.kinds: Counter[str] = Counter()
        self.first = ""

    def __call__(self, data: bytes) -> None:
        from gradsift.errors import GradsiftError

        self.count += 1
        begun = time.perf_counter()
        try:
            if self.defect == STALLS and b"&" in data:
                time.sleep(SLOW_SECONDS * 1.05)
            self.read(data)
            self.kinds["read"] += 1
        except GradsiftError as error:
            self.kinds[type(error).__name__] += 1
        except Exception as error:
            self.untyped += 1
            self.first = self.first or f"{type(error).__name__}: {error}"[:200]
        seconds = time.perf_counter() - begun
        self.slowest = max(self.slowest, seconds)
        self.slow += seconds > SLOW_SECONDS

    def told(self) -> dict[str, Any]:
        """The figures."""
        return {
            "executions": self.count, "untyped": self.untyped, "slow": self.slow, "slowest": self.slowest,
            "kinds": dict(self.kinds), "first": self.first,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }  # fmt: skip


def mutate(random: Any, seeds: list[bytes]) -> bytes:
    """Change a valid file in one to eight places, or splice two."""
    data = bytearray(seeds[int(random.integers(len(seeds)))])
    for _ in range(int(random.integers(1, 9))):
        kind, at = int(random.integers(7)), int(random.integers(len(data) + 1))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << int(random.integers(8))
        elif kind == 1 and data:
            data[at % len(data)] = int(random.choice([0, 1, 127, 128, 255, 34, 44, 58, 91, 123, 38, 42]))
        elif kind == 2:
            del data[at : at + int(random.integers(1, 64))]
        elif kind == 3:
            data[at:at] = random.bytes(int(random.integers(1, 16)))
        elif kind == 4:
            other = seeds[int(random.integers(len(seeds)))]
            cut = int(random.integers(len(other) + 1))
            data[at:] = other[cut:]
        elif kind == 5:
            data[at:at] = data[at : at + int(random.integers(1, 40))] * int(random.integers(1, 200))
        else:
            data = data[:at]
    return bytes(data[: 1 << 20])


def by_mutation(watch: Watch, seeds: list[bytes], seconds: float, number: int) -> None:
    """Draw for so long."""
    from gradsift.seeds import stream

    random, end = stream(26, f"r26/{number}").numpy(), time.monotonic() + seconds
    for data in seeds:
        watch(data)
    while time.monotonic() < end:
        watch(mutate(random, seeds))


def by_atheris(watch: Watch, seeds: list[bytes], seconds: float, room: Path) -> None:
    """Let libFuzzer draw, led by the branches that our own modules take."""
    import atheris

    corpus = room / "corpus"
    corpus.mkdir()
    for n, data in enumerate(seeds):
        (corpus / f"{n}").write_bytes(data)
    arguments = [sys.argv[0], f"-max_total_time={int(seconds)}", "-rss_limit_mb=2048", "-max_len=65536", "-verbosity=0",
                 f"-artifact_prefix={room}/", "-print_final_stats=0", "-timeout=60", str(corpus)]  # fmt: skip
    atheris.Setup(arguments, watch)
    atheris.Fuzz()


def child(target: str, seconds: float, defect: str, out: Path) -> None:
    """Fuzz one reader and leave the figures; libFuzzer ends the process itself, so they are written as they come."""
    driven = importlib.util.find_spec("atheris") is not None
    if driven:
        import atheris

        with atheris.instrument_imports(include=["gradsift.store", "gradsift.manifest", "gradsift.recipe"]):
            pass
    with tempfile.TemporaryDirectory(prefix="gradsift-fuzz-", dir=out.parent) as name:
        room = Path(name)
        seeds = valid(target, room / "store")
        (room / "store").mkdir(exist_ok=True)
        if defect == LEAKS:
            _let_through()
        watch = Watch(reader(target, room / "store"), defect)

        def leave() -> None:
            out.write_text(json.dumps({**watch.told(), "driver": "atheris" if driven else "mutation"}))

        import atexit

        atexit.register(leave)
        if driven:
            plain, last = watch.__call__, [0.0]

            def call(data: bytes) -> None:
                plain(data)
                if time.monotonic() - last[0] > 1:
                    last[0] = time.monotonic()
                    leave()

            by_atheris(call, seeds, seconds, room)  # type: ignore[arg-type]
        else:
            by_mutation(watch, seeds, seconds, TARGETS.index(target))
        leave()


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _let_through() -> None:
    """Planted: an error of Arrow is not turned into ours."""
    from gradsift.store import reading

    def raw(folder: Path, record: Any, spec: Any) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = reading.read_checked(folder, record, reading.rows_file(record.unit))
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)

    reading.decode_rows = raw


def run(full: bool, defect: str) -> dict[str, Any]:
    """Fuzz every reader in a process of its own: five minutes in all."""
    targets = {LEAKS: ("rows",), STALLS: ("recipe",)}.get(defect, TARGETS)
    seconds = (60.0 if full else 1.5) if not defect else 4.0
    found = {}
    with tempfile.TemporaryDirectory(prefix="gradsift-r26-", dir=_memory()) as name:
        for target in targets:
            out = Path(name) / f"{target}.json"
            command = [sys.executable, "-m", "benchmarks.reliability.r26_fuzz", target, str(seconds), defect, str(out)]
            root = Path(__file__).resolve().parents[2]
            done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=seconds * 5 + 300)
            figures = json.loads(out.read_text()) if out.is_file() else {}
            found[target] = {**figures, "exit": done.returncode}
            if not figures or done.returncode:
                found[target]["said"] = done.stderr[-300:]
    return {"seconds": seconds, "targets": found}


def judge(figures: Mapping[str, Any]) -> Outcome:
    """No crash, no untyped error, none slow, little memory."""
    targets = figures["targets"]
    crashed = [name for name, f in targets.items() if f["exit"] != 0 or not f.get("executions")]
    whole = [f for f in targets.values() if f.get("executions")]
    count = sum(f["executions"] for f in whole)
    untyped = sum(f["untyped"] for f in whole)
    first = next((f"{name}: {f['first']}" for name, f in targets.items() if f.get("first")), "")
    slowest = max((f["slowest"] for f in whole), default=0.0)
    peak = max((f["peak_mb"] for f in whole), default=0.0)
    drivers = sorted({f["driver"] for f in whole})
    each = ", ".join(f"{name} {f.get('executions', 0):,}" for name, f in targets.items())
    return Outcome(
        "R26",
        (
            Check(
                "crashes",
                f"{len(crashed)} in {count:,} executions ({each}; by {', '.join(drivers)})",
                "0",
                not crashed and count > 0,
            ),
            Check("errors that are not ours", f"{untyped}{' (' + first + ')' if first else ''}", "0", untyped == 0),
            Check("slowest input", f"{slowest:.2f} s", "<= 1 s", slowest <= SLOW_SECONDS),
            Check("memory at most", f"{peak:.0f} MB", "< 512 MB", peak < 512),
        ),
    )


TRIAL = Trial(
    "R26", "fuzzed records, descriptions, row tables, arrays, recipes", "5 min: 0 crashes, typed errors only", run, judge,
    (LEAKS, STALLS), {"seconds_per_reader": 60}, slow=True,
)  # fmt: skip

if __name__ == "__main__":
    child(sys.argv[1], float(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
