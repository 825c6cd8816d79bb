"""R25: the store's public interface against a dictionary, equal after every step of many random programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.store_machine import StoreAgainstDict, explore

from gradsift.store import writer
from gradsift.store.index import RowIndex

CHANGED = "a row with other content is taken for the old one"
FORGETS = "a writer that opens the store does not know its rows"


@contextmanager
def planted(defect: str) -> Iterator[None]:
    """Plant a defect."""
    if defect == CHANGED:
        with patch.object(writer, "refuse_changed", lambda *_: None):
            yield
    elif defect == FORGETS:
        with patch.object(RowIndex, "fill", lambda self, shards: [None for _ in shards][:0] or None):
            yield
    else:
        yield


def run(full: bool, defect: str) -> dict[str, Any]:
    """Explore: at full size 1,000 programs of 50 steps."""
    sequences, steps = (1000, 50) if full else (100, 20) if defect else (6, 12)
    with planted(defect):
        return explore(StoreAgainstDict, sequences, steps, 25)


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Nothing broken, and enough programs."""
    f = figures
    said = f"{int(bool(f['broken']))}{' ' * bool(f['broken'])}{f['broken']} in {f['sequences']} programs of {f['steps']} steps in all"
    return Outcome(
        "R25",
        (
            Check("programs", str(f["sequences"]), f">= {f['asked']}", f["sequences"] >= f["asked"]),
            Check("violations", said, "0", not f["broken"]),
        ),
    )


TRIAL = Trial(
    "R25", "random programs on the store's public interface against a dictionary", "1,000 x 50 steps, equal after each",
    run, judge, (CHANGED, FORGETS), {"programs": 1000, "steps": 50}, shares_process=True,
)  # fmt: skip
