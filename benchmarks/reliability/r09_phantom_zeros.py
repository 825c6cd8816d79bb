"""R9: what is not committed is an error, never a row of zeros; also for readers that look while a writer writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.reliability.frame import Check, Outcome, Trial
from tests.unit.store.store_world import SPEC, fill, make_ids, memory_folder, snapshot, truth

from gradsift.errors import GradsiftError, StoreError
from gradsift.store.signals import SignalStore, open_store
from gradsift.store.writer import open_writer

ZEROS = "rows that are not there read as zeros"


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant what a memory map of the pool's size does: unwritten rows are zeros."""
    if not defect:
        yield
        return
    plain = SignalStore.unit_sketch

    def filled(self: SignalStore, ids: Any) -> np.ndarray:
        assert self.spec.projection is not None
        out = np.zeros((len(ids), self.spec.projection.dim), dtype=np.float32)
        for row, name in enumerate(ids):
            if name in self.ids:
                out[row] = plain(self, [name])[0]
        return out

    with patch.object(SignalStore, "unit_sketch", filled):
        yield


def absent_rows(store: SignalStore, ids: list[str], figures: dict[str, Any]) -> None:
    """Ask for rows that are not there, alone and among others."""
    there = [name for name, status in zip(store.ids, store.status) if status.usable][:1]
    for name in ids:
        for asked in ([name], [*there, name]):
            for ask in (store.unit_sketch, store.gather, store.take, store.positions):
                figures["asked"] += 1
                try:
                    got = ask(asked)
                except StoreError as error:
                    figures["refused"] += name in str(error)
                else:
                    zeros = isinstance(got, np.ndarray) and got.ndim == 2 and not got[-1].any()
                    figures["zero_rows"] += zeros


def reading_while_writing(room: Any, count: int, figures: dict[str, Any]) -> None:
    """Open and read again and again while a writer commits shard after shard."""
    ids, done = make_ids(count), threading.Event()
    good = truth(ids)
    open_writer(room / "live", SPEC).close()

    def write() -> None:
        fill(room / "live", ids, 8)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    sizes, last = [], False
    while not last:
        last = done.is_set()
        try:
            rows = snapshot(open_store(room / "live", SPEC))
        except GradsiftError as error:
            figures["faults"].append(error.what)
            continue
        sizes.append(len(rows))
        figures["looks"] += 1
        figures["wrong_rows"] += sum(rows[name] != good[name] for name in rows)
    writer.join()
    figures["partial_looks"] = sum(0 < size < count for size in sizes)
    figures["grew"] = sizes == sorted(sizes) and sizes[-1] == count


def run(full: bool, defect: str) -> dict[str, Any]:
    """Both halves."""
    figures: dict[str, Any] = {"asked": 0, "refused": 0, "zero_rows": 0, "looks": 0, "wrong_rows": 0, "faults": []}
    with memory_folder() as room, planted(defect):
        fill(room / "store", make_ids(20), 8)
        never = [f"row-{n:05}" for n in range(20, 220 if full else 40)]
        absent_rows(open_store(room / "store", SPEC), never, figures)
        reading_while_writing(room, 4000 if full else 400, figures)
    figures["faults"] = figures["faults"][:3]
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """No zero row, no wrong row, every absent row refused by name."""
    f = figures
    return Outcome(
        "R9",
        (
            Check("zero rows returned", f"{f['zero_rows']} of {f['asked']} questions", "0", f["zero_rows"] == 0),
            Check("refused by name", f"{f['refused']}/{f['asked']}", "all", f["refused"] == f["asked"] > 0),
            Check(
                "wrong rows seen while writing",
                f"{f['wrong_rows']} in {f['looks']} looks ({f['partial_looks']} at a part; faults {len(f['faults'])})",
                "0", f["wrong_rows"] == 0 < f["partial_looks"] and f["grew"] and not f["faults"],
            ),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R9", "ids that were never committed; reading during writing", "0 zero rows returned", run, judge, (ZEROS,),
    {"absent": 200, "rows_written": 4000}, shares_process=True,
)  # fmt: skip
