"""R6: one flipped bit anywhere in a store is found by ``verify``, never read, and costs its shard alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from tests.unit.store.store_world import SPEC, files_of, fill, make_ids, memory_folder, read, truth

from gradsift.errors import GradsiftError
from gradsift.seeds import stream
from gradsift.store import reading
from gradsift.store.ledger import read_ledger
from gradsift.store.signals import open_store
from gradsift.store.verify import repair_store, verify_store

UNCHECKED = "bytes are believed without their hash"


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a defect for a while."""
    with ExitStack() as stack:
        if defect == UNCHECKED:
            stack.enter_context(patch.object(reading, "sha256_bytes", Anything()))
        yield


class Anything:
    """A hash function whose values equal every recorded one."""

    def __call__(self, data: bytes) -> str:
        return Always("")


class Always(str):
    """A text that equals every other."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(bytes(data))


def raises(folder: Path, ids: tuple[str, ...]) -> bool:
    """Whether reading all rows is refused by an error of ours."""
    try:
        open_store(folder, SPEC).positions(ids)
        read(folder)
    except GradsiftError:
        return True
    except Exception:
        return False
    return False


def reports(folder: Path, path: Path) -> bool:
    """Whether ``verify`` names the file; a description from the future is refused by name."""
    try:
        report = verify_store(folder)
    except GradsiftError as error:
        return str(path) in error.where
    return path.relative_to(folder).as_posix() in {found.path for found in report.damage}


def run(full: bool, defect: str) -> dict[str, Any]:
    """Flip a bit, verify, read, flip it back; every few flips also repair and measure again."""
    num_flips, num_repairs, rows = (300, 60, 60) if full else (24, 4, 20)
    ids = make_ids(rows)
    figures = {"flips": 0, "found": 0, "refused": 0, "repairs": 0, "untouched_redone": 0, "not_equal_after_repair": 0}
    random = stream(6, "r6").numpy()
    with memory_folder() as room, planted(defect):
        folder = room / "store"
        fill(folder, ids, 8)
        good, files = truth(ids), files_of(folder)
        for n in range(num_flips):
            path = files[n % len(files)]  # every file has its share, however small it is
            at = int(random.integers(path.stat().st_size * 8))
            flip(path, at)
            figures["flips"] += 1
            figures["found"] += reports(folder, path)
            figures["refused"] += raises(folder, ids)
            flip(path, at)
        for _ in range(num_repairs):
            files = [path for path in files_of(folder) if path.name != "spec.json"]
            path = files[int(random.integers(len(files)))]
            unit = path.name.partition(".")[0].partition("-")[0]
            touched = next(r.num_rows for r in read_ledger(folder, SPEC.key).records if r.unit == unit)
            flip(path, int(random.integers(path.stat().st_size * 8)))
            repair_store(folder)
            again: list[str] = []
            try:
                fill(folder, ids, 8, measured=lambda result, done=again: done.extend(result.ids))
                figures["not_equal_after_repair"] += read(folder) != good
            except GradsiftError:
                figures["not_equal_after_repair"] += 1
            figures["repairs"] += 1
            figures["untouched_redone"] += max(0, len(again) - touched)
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """All flips found and refused; a repair redoes the shard it touched and nothing else."""
    flips, repairs = figures["flips"], figures["repairs"]
    return Outcome(
        "R6",
        (
            Check("found by verify", f"{figures['found']}/{flips}", "all", figures["found"] == flips > 0),
            Check("refused when read", f"{figures['refused']}/{flips}", "all", figures["refused"] == flips),
            Check(
                "rows of untouched shards redone", f"{figures['untouched_redone']} in {repairs} repairs", "0",
                figures["untouched_redone"] == 0 < repairs,
            ),
            Check(
                "stores that differ after repair", str(figures["not_equal_after_repair"]), "0",
                figures["not_equal_after_repair"] == 0,
            ),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R6", "one bit flipped at a random place of shards, records, description", "300/300 found; redo <= touched shards",
    run, judge, (UNCHECKED,), {"flips": 300, "repairs": 60, "rows": 60, "rows_per_shard": 8},
)  # fmt: skip
