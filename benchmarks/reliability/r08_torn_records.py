"""R8: a commit record cut at any byte is no record: the store opens without it, and never with half of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from tests.unit.store.store_world import SPEC, fill, make_ids, memory_folder, read, truth

from gradsift.errors import GradsiftError
from gradsift.store import ledger
from gradsift.store.ledger import read_ledger
from gradsift.store.writer import open_writer

IDS = make_ids(24)
LENIENT = "a record is mended as far as it can be read"


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a reader that closes the braces of a torn record, as some log readers do."""
    if not defect:
        yield
        return

    def lenient(data: bytes) -> dict[str, Any] | None:
        for closing in (b"", b"}", b'"}', b"}}", b'"}}'):
            try:
                value = json.loads(data.rstrip(b",\n ") + closing)
                value.pop("seal", None)
                return {"status": {}, "spec_key": SPEC.key, "unit": "", **value}
            except (ValueError, AttributeError, TypeError):
                continue
        return None

    with patch.object(ledger, "unseal", lenient):
        yield


def run(full: bool, defect: str) -> dict[str, Any]:
    """Cut each of the last three records at every byte; look, and now and then open, read and finish."""
    figures: dict[str, Any] = {"cuts": 0, "gone": 0, "opened": 0, "opened_right": 0, "finished": 0, "bad": []}
    every = 1 if full else 29
    with memory_folder() as room, planted(defect):
        folder = room / "store"
        fill(folder, IDS, 6)
        good = truth(IDS)
        for path in sorted((folder / "ledger").iterdir())[-3:]:
            whole = path.read_bytes()
            for cut in range(0, len(whole), every):
                path.write_bytes(whole[:cut])
                found = read_ledger(folder, SPEC.key)
                figures["cuts"] += 1
                gone = len(found.records) == 3 and found.damaged == (path.name,)
                figures["gone"] += gone
                if cut % (8 * every) == 0:
                    figures["opened"] += 1
                    figures["opened_right"] += _opens(folder, good)
                if not gone and len(figures["bad"]) < 3:
                    figures["bad"].append(f"cut at {cut} of {len(whole)}")
            with open_writer(folder, SPEC) as writer:  # the last cut is the writer's business
                moved = writer.cleaned.damaged_records == 1
            fill(folder, IDS, 6)
            figures["finished"] += moved and read(folder) == good
    return figures


def _opens(folder: Any, good: dict) -> bool:
    try:
        rows = read(folder)
    except GradsiftError:
        return False
    except Exception:
        return False
    return len(rows) == 18 and rows.items() <= good.items()


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Every cut leaves the other three shards and no part of the fourth."""
    f = figures
    bad = f" ({'; '.join(f['bad'])})" if f["bad"] else ""
    return Outcome(
        "R8",
        (
            Check("cuts after which the record is gone", f"{f['gone']}/{f['cuts']}{bad}", "all", f["gone"] == f["cuts"] > 0),
            Check(
                "of them opened and read", f"{f['opened_right']}/{f['opened']}", "all, without crash",
                f["opened_right"] == f["opened"] > 0,
            ),
            Check("records measured again", f"{f['finished']}/3", "3/3", f["finished"] == 3),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R8", "each of the last 3 commit records cut at every byte", "all cuts pass", run, judge, (LENIENT,), {"rows": 24}, shares_process=True,
)  # fmt: skip
