"""R13: the pool changes between two runs of one folder: new rows are added, an edited or missing one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import Stops, recipe_of, room, run, store_rows, world_in

from gradsift.errors import GradsiftError
from gradsift.pipeline import measure as measuring

WAVED = "rows that are gone are not missed"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding)


def append(path: Path) -> None:
    more = [
        {"id": f"new-{k}", **{k2: v for k2, v in row.items() if k2 != "id"}} for k, row in enumerate(lines(path)[:3])
    ]
    for row in more:
        row["messages"][0]["content"] += " once more"
    write(path, lines(path) + more)


def reorder(path: Path) -> None:
    write(path, lines(path)[::-1])


def edit(path: Path) -> None:
    rows = lines(path)
    rows[4]["messages"][1]["content"] += " or so"
    write(path, rows)


def delete(path: Path) -> None:
    write(path, lines(path)[1:])


def duplicate(path: Path) -> None:
    rows = lines(path)
    write(path, [*rows, {**rows[5], "id": rows[0]["id"]}])


def recode(path: Path) -> None:
    rows = lines(path)
    write(path, rows, "utf-16")


# What happens to the file -> what must follow; a copy of an id that stands there already must not replace or double it.
CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "three rows appended": ("only them", append),
    "other order": ("nothing measured", reorder),
    "a row edited": ("refused", edit),
    "a row deleted": ("refused", delete),
    "an id that stands there twice": ("refused or set aside", duplicate),
    "another encoding": ("refused", recode),
}


def once(base: Path, change: Callable[[Path], None], defect: str) -> dict[str, Any]:
    """Run, change the file, run again."""
    place = world_in(base / "world", 20)
    pool = place / "pool.jsonl"
    write(pool, [{"id": f"row-{k:03}", **row, "note": "caf\u00e9"} for k, row in enumerate(lines(pool))])
    recipe = recipe_of(place)
    run(recipe, base / "run")
    before = store_rows(base / "run")
    change(pool)
    progress, error = Stops(), ""
    with patch.object(measuring, "_refuse_removed", (lambda *_: None) if defect else measuring._refuse_removed):
        try:
            done = run(recipe, base / "run", progress)
            status = dict(done.manifest["rows"]["status"])
        except GradsiftError as refused:
            error, status = refused.what, {}
    after = store_rows(base / "run")
    kept = all(after.get(name) == row for name, row in before.items())
    return {
        "refused": error,
        "measured": progress.num_rows,
        "kept": kept,
        "new": len(after) - len(before),
        "status": status,
    }


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Every change by itself."""
    names = list(CHANGES) if full else ["three rows appended", "a row deleted"]
    found = {}
    for name in names:
        with room() as folder:
            found[name] = {"want": CHANGES[name][0], **once(folder, CHANGES[name][1], defect)}
    return {"changes": found}


def well(found: Mapping[str, Any]) -> bool:
    """Whether what followed is what must follow."""
    if not found["kept"]:
        return False
    if found["want"] == "only them":
        return not found["refused"] and found["measured"] == found["new"] == 3
    if found["want"] == "nothing measured":
        return not found["refused"] and found["measured"] == found["new"] == 0
    if found["want"] == "refused or set aside":
        aside = sum(n for status, n in found["status"].items() if status in ("DUPLICATE", "MALFORMED"))
        return bool(found["refused"]) or (found["new"] == 0 and aside == 1)
    return bool(found["refused"]) and found["new"] == 0


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Six of six."""
    found = figures["changes"]
    bad = [name for name, f in found.items() if not well(f)]
    seen = f"{len(found) - len(bad)}/{len(found)}" + (f", not: {', '.join(bad)}" if bad else "")
    return Outcome("R13", (Check("changes followed by what must follow", seen, "6/6", not bad),))


TRIAL = Trial(
    "R13", "append, reorder, edit, delete, repeat an id, change the encoding between two runs",
    "append = only new ids; reorder = same rows; the rest refused; 6/6", measure, judge, (WAVED,), {"rows": 20},
)  # fmt: skip
