"""What a collection of a million and of a hundred million rows would take on 1, 8 and 64 GPUs, from what was measured.

``python benchmarks/projection.py [--tokens 512] [--write]`` reads docs/results/gpu.json (tokens per second of one H200, random
weights), docs/results/launch.json (what one committer takes, bytes per row, plan) and prints the table of docs/scale.md;
``--write`` puts it there between its two comments. Nothing of it was run at that size: every figure is a rate times a number.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs/results", ROOT / "docs/scale.md"
ARMS = ("sketch, body", "exact+sketch, every weight")
POOLS, GPUS = (1_000_000, 100_000_000), (1, 8, 64)
BLOCK = re.compile(r"(<!-- projection -->\n).*?(<!-- end of projection -->)", re.S)


@dataclass(frozen=True)
class Rates:
    """Measured rates.

    Args:
        committed: rows per second that one rank 0 verifies and adopts.
        planned: rows per second that it plans, claims included.
        row_bytes: bytes of a row in the store.
    """

    committed: float
    planned: float
    row_bytes: float


def rates(found: dict[str, Any]) -> Rates:
    """Take the rates out of benchmarks/launch.py's file."""
    return Rates(
        found["rows_per_unit"] / found["adopt_seconds"],
        found["planned_rows"] / (found["plan_seconds"] + found["claim_seconds"]),
        2 * found["dim"] * (1 + found["bytes_over"]),
    )


def clock(seconds: float) -> str:
    """Write seconds as people say them."""
    for name, size in (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * size or (size == 60.0 and seconds >= 60.0):
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def size(num: float) -> str:
    """Write bytes in decimal units."""
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num >= unit:
            return f"{num / unit:.1f} {name}"
    return f"{num:.0f} bytes"


def lines(gpu: dict[str, Any], base: Rates, tokens: int) -> Iterator[str]:
    """One row of the table per model, work, pool and number of GPUs."""
    yield (f"| model, {tokens} tokens a row | measured | GPUs | one million rows | a hundred million rows | limited by "
           "| rank 0 reads |")  # fmt: skip
    yield "|---|---|---|---|---|---|---|"
    for cell in gpu["cells"]:
        if cell["length"] != tokens:
            continue
        for arm in (arm for arm in cell["arms"] if arm["key"] in ARMS):
            each = arm["tokens_per_second"] / tokens
            for gpus in GPUS:
                rate = min(each * gpus, base.committed)
                bound = "the GPUs" if each * gpus <= base.committed else "rank 0, which verifies and adopts"
                times = [clock(pool / rate + pool / base.planned) for pool in POOLS]
                name = f"{cell['model']}, {arm['key']}" if gpus == GPUS[0] else ""
                shown = f"{each:.0f} rows/s per GPU" if gpus == GPUS[0] else ""
                yield f"| {name} | {shown} | {gpus} | {times[0]} | {times[1]} | {bound} | {size(rate * base.row_bytes)}/s |"


def table(tokens: int) -> str:
    """The whole text between the comments of docs/scale.md."""
    gpu = json.loads((RESULTS / "gpu.json").read_text("utf-8"))
    launch = json.loads((RESULTS / "launch.json").read_text("utf-8"))
    base = rates(launch)
    disk = " and ".join(f"{size(pool * base.row_bytes)} for {pool:,} rows" for pool in POOLS)
    said = (
        f"Printed by `python benchmarks/projection.py --tokens {tokens}`. Measured: tokens per second of one {gpu['hardware']['device']}\n"
        f"([gpu.json](results/gpu.json)); {base.committed:,.0f} rows/s through one rank 0, {base.planned:,.0f} planned rows/s and "
        f"{base.row_bytes:,.0f} bytes a\nrow ([launch.json](results/launch.json), {launch['hardware']}).\n"
        f"Projected: everything in the columns of the two pools, by rate times number. Disk: {disk};\nevery worker writes its share once "
        "and rank 0 reads all of it once. Reading and tokenizing the pool is not in it.\n"
    )
    return f"{said}\n" + "\n".join(lines(gpu, base, tokens)) + "\n"


def page(text: str, tokens: int) -> str:
    """docs/scale.md with the table of today."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(tokens)}{found[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    print(table(given.tokens))
    if given.write:
        PAGE.write_text(page(PAGE.read_text("utf-8"), given.tokens), "utf-8")


if __name__ == "__main__":
    main()
