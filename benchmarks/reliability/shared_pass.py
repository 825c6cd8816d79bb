"""One of two processes that collect a made-up pool together through gradsift's own launcher; made to be killed.

``python shared_pass.py RANK FOLDER ROWS ROWS_PER_SHARD SLOW DEFECT``: rank 0 commits and measures, rank 1 measures. Each
notes ``PID FIRST_ID`` in ``FOLDER/measured`` before it measures a unit and then takes SLOW seconds; rank 0 notes the rows
of every finished commit in ``FOLDER/acknowledged``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.launched import stub_bench, stub_rows
from tests.unit.store.store_world import SPEC, measure

from gradsift.launch.bench import Bench, Inline, Released
from gradsift.launch.board import LAUNCH, Board
from gradsift.launch.lead import leading
from gradsift.launch.seat import Seat
from gradsift.launch.worker import joined
from gradsift.store.spec import content_hash
from gradsift.store.staging import adopt_staged
from gradsift.store.writer import SignalWriter, open_writer

EARLY_ACK = "rows are acknowledged when their unit is begun"
NO_CLAIMS = "every process takes every unit"


def append(path: Path, text: str) -> None:
    """Add to a file in one write, which a kill cannot tear from the reader's view of whole lines."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(handle, text.encode())
    os.close(handle)


def bench_of(folder: Path, rows: int, per_shard: int, slow: float = 0.0, defect: str = "") -> Bench:
    """The pass: made-up numbers that follow from a row's id."""

    def before(first: str) -> None:
        append(folder / "measured", f"{os.getpid()} {first}\n")
        time.sleep(slow)

    plain = stub_bench(folder / "store", stub_rows(rows), per_shard)

    def measured(some):
        before(some[0].id)
        if defect == EARLY_ACK:
            append(folder / "acknowledged", "".join(f"{row.id}\n" for row in some))
        hashes = tuple(content_hash(row.input_ids, row.trained) for row in some)
        return dataclasses.replace(measure([row.id for row in some]), content_hashes=hashes)

    return dataclasses.replace(plain, measure=measured)


def alone(folder: Path, rows: int, per_shard: int) -> None:
    """What one process makes of it, undisturbed."""
    bench = bench_of(folder, rows, per_shard)
    with open_writer(folder / "store", SPEC) as writer:
        Inline().collect(bench, writer, lambda: None)


def acknowledging(writer: SignalWriter, folder: Path) -> None:
    """Let a writer note what it has committed, each time after it has."""
    commit, adopt = writer.commit, writer.adopt

    def committed(result):
        done = commit(result)
        append(folder / "acknowledged", "".join(f"{name}\n" for name in result.ids))
        return done

    def adopted(record, ids, put):
        adopt(record, ids, put)
        append(folder / "acknowledged", "".join(f"{name}\n" for name in ids))

    writer.commit, writer.adopt = committed, adopted


def main() -> None:
    """Be rank 0 or rank 1."""
    rank, folder, rows, per_shard, slow, defect = sys.argv[1:]
    place = Path(folder)
    bench = bench_of(place, int(rows), int(per_shard), float(slow), defect)
    seat = Seat("torchrun", int(rank), 2, int(rank), join_seconds=60, gone_seconds=20)
    if defect == NO_CLAIMS:
        Board.claim = lambda *_: True
    if seat.commits:
        with leading(place, seat) as lead, open_writer(place / "store", SPEC) as writer:
            acknowledging(writer, place)
            adopt_staged(writer, bench.contents(), opening=True)
            lead.collect(bench, writer, lambda: None)
        return
    try:
        with joined(place / LAUNCH, seat, lambda *_: None) as worker:
            worker.wait_open(bench.name, lambda *_: None)
            worker.serve(bench)
    except Released:
        pass


if __name__ == "__main__":
    main()
