"""T11, planted duplicates: do copies take more of a selection than of the pool, and do their gradients give them away?"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from benchmarks.trials.common import Check, Outcome, Trial, distinct, main, over_seeds, signals, world_of

from gradsift.compare.world import World
from gradsift.data.pool import read_pool
from gradsift.geometry.feasible import NoChoiceError
from gradsift.methods.base import make_method
from gradsift.recipe import SourceConfig
from gradsift.seeds import stream
from gradsift.types import Budget, RowStatus, TokenRow

KINDS = ("exact", "filler", "swap")
SHARES = (0.05, 0.10, 0.20)
NUM_ROWS, COPIES = 300, 4  # originals, and copies of each copied row
SKETCH = 4093
FALSE_POSITIVES = 0.01
METHODS = {"target_cosine": {}, "ogs_dual": {"scale": "unit"}, "hybrid": {}}
FRACTION = 25.0


@dataclass(frozen=True)
class Planted:
    """A pool with copies: token rows by id, which copy stands for what (kind and original), and each row's text."""

    rows: dict[str, TokenRow]
    copies: dict[str, tuple[str, str]]
    texts: dict[str, str]


def plant(world: World, share: float, num_rows: int = NUM_ROWS) -> Planted:
    """Add copies until they are about a share of the pool: exact, with a filler token, with x and y swapped."""
    rows = [
        row for row in distinct(world) if world.kinds[row.id] != "conflict" and row.input_ids[1] != row.input_ids[3]
    ]
    rows = [rows[k] for k in np.argsort(stream(world.seed, "trials/t11/rows").uniform([r.id for r in rows]))[:num_rows]]
    num_copies = round(share / (1 - share) * len(rows))
    groups = max(len(KINDS), round(num_copies / COPIES))
    out = {row.id: row for row in rows}
    copies, texts = {}, {row.id: " ".join(f"w{t}" for t in row.input_ids) for row in rows}
    for g, row in enumerate(rows[:groups]):
        kind = KINDS[g % len(KINDS)]
        for c in range(COPIES):
            name = f"{row.id}-{c}"
            out[name], copies[name] = _copy(row, kind, name), (kind, row.id)
            texts[name] = {"exact": texts[row.id], "filler": "  " * (c + 1) + texts[row.id]}.get(
                kind, " ".join(f"w{t}" for t in out[name].input_ids) + " " * c
            )
    return Planted(out, copies, texts)


def _copy(row: TokenRow, kind: str, name: str) -> TokenRow:
    ids, trained = row.input_ids.copy(), row.trained
    if kind == "swap":
        ids[1], ids[3] = ids[3], ids[1]
    if kind == "filler":  # a second beginning stands for white space: more tokens, the same question
        ids, trained = np.concatenate([ids[:1], ids]), np.concatenate([[False], trained])
    return replace(row, id=name, input_ids=ids, trained=trained, num_untruncated=len(ids))


def usable(planted: Planted, dedup: Literal["drop", "keep"] = "drop") -> list[TokenRow]:
    """What the product's own reading of the pool leaves: ids in the order of the file, exact copies dropped."""
    names = sorted(planted.rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pool.jsonl"
        path.write_text("".join(json.dumps({"text": planted.texts[name]}) + "\n" for name in names))
        pool = read_pool([SourceConfig(label="pool", path=str(path))], dedup=dedup)
        statuses = [row.status for row in pool.rows]  # rows stay in the file
    return [planted.rows[n] for n, status in zip(names, statuses, strict=True) if status != RowStatus.DUPLICATE]


def recall(sketch: np.ndarray, ids: tuple[str, ...], planted: Planted, seed: int) -> dict[str, Any]:
    """Share of planted pairs whose sketches are closer than all but 1% of pairs of different questions."""
    unit = sketch / np.linalg.norm(sketch, axis=1, keepdims=True)
    at = {name: k for k, name in enumerate(ids)}
    question = [tuple(sorted(planted.rows[i].input_ids[-6:].tolist())) for i in ids]
    draws = stream(seed, "trials/t11/pairs").numpy().integers(len(ids), size=(20_000, 2))
    negative = np.array([float(unit[a] @ unit[b]) for a, b in draws if question[a] != question[b]])
    threshold = float(np.quantile(negative, 1 - FALSE_POSITIVES))
    out: dict[str, Any] = {"threshold": threshold}
    for kind in KINDS:
        pairs = [(c, o) for c, (k, o) in planted.copies.items() if k == kind and c in at and o in at]
        cos = np.array([float(unit[at[c]] @ unit[at[o]]) for c, o in pairs])
        out[kind] = {"num_pairs": len(cos)}
        if len(cos):
            out[kind] |= {"cosine": float(cos.mean()), "recall": float((cos > threshold).mean())}
    return out


def measure(
    seed: int,
    world: World | None = None,
    shares: tuple[float, ...] = SHARES,
    num_rows: int = NUM_ROWS,
    dedup: Literal["drop", "keep"] = "drop",
) -> dict[str, Any]:
    """Shares of copies in pool and selections, and recall of copies by their gradients."""
    world = world or world_of(seed)
    model, figures = world.make_model(), {}
    for share in shares:
        planted = plant(world, share, num_rows)
        rows = usable(planted, dedup)
        problem = signals(world, model, rows, keep_sketch=True, sketch_dim=SKETCH)
        cell: dict[str, Any] = {
            "num_read": len(planted.rows),
            "num_usable": len(rows),
            "planted": len(planted.copies) / len(planted.rows),
            "planted_by_kind": _by_kind(planted, list(planted.rows)),
            "usable_by_kind": _by_kind(planted, [row.id for row in rows]),
            "selected_by_kind": {},
        }
        for name, settings in METHODS.items():
            method = make_method(name, settings)
            try:
                chosen = method.select(problem, Budget(percent=FRACTION), stream(seed, "trials/t11/select")).ids
            except NoChoiceError:
                cell["selected_by_kind"][name] = None  # the anchors allow no choice of this size; judge counts it
                continue
            cell["selected_by_kind"][name] = _by_kind(planted, list(chosen))
        assert problem.sketch is not None
        cell["gradients"] = recall(np.asarray(problem.sketch, dtype=np.float64), problem.ids, planted, seed)
        figures[f"{share:.2f}"] = cell
    return figures


def _by_kind(planted: Planted, ids: list[str]) -> dict[str, float]:
    kinds = [planted.copies[i][0] if i in planted.copies else "" for i in ids]
    return {kind: kinds.count(kind) / len(ids) for kind in KINDS}


def judge(figures: Mapping[int, dict[str, Any]]) -> Outcome:
    """Copies take no larger share of the selection than of the pool; exact copies take none."""
    checks, wording = [], []
    for share in next(iter(figures.values())):
        cells = [f[share] for f in figures.values()]
        made = {name: [c for c in cells if c["selected_by_kind"][name]] for name in METHODS}
        exact = max(c["selected_by_kind"][name]["exact"] for name, some in made.items() for c in some)
        checks.append(
            Check(f"{float(share):.0%} copies: exact copies selected", f"at most {exact:.3f}", "0", exact == 0)
        )
        for name, some in made.items():
            if len(some) < len(cells):
                wording.append(
                    f"{float(share):.0%} copies, {name}: refused in {len(cells) - len(some)} of {len(cells)}"
                )
            if not some:
                checks.append(Check(f"{float(share):.0%} copies, {name}", "no choice in any seed", "<= planted", False))
                continue
            planted = float(np.mean([c["planted"] for c in some]))
            shares = [c["selected_by_kind"][name] for c in some]
            chosen = [sum(by_kind.values()) for by_kind in shares]
            gap = over_seeds(chosen, [c["planted"] for c in some])
            near = float(np.mean([by_kind["filler"] + by_kind["swap"] for by_kind in shares]))
            text = f"{np.mean(chosen):.3f} of {planted:.3f}, near copies {near:.3f}, difference {gap}"
            checks.append(
                Check(f"{float(share):.0%} copies, {name}: share selected", text, "<= planted", gap.mean <= 0)
            )
        for kind in KINDS:
            seen = [c["gradients"][kind] for c in cells if "recall" in c["gradients"][kind]]
            if seen:
                found, cos = (float(np.mean([s[key] for s in seen])) for key in ("recall", "cosine"))
                wording.append(f"{float(share):.0%} {kind}: recall {found:.2f} at 1% FPR, cosine {cos:.2f}")
    return Outcome("T11", tuple(checks), tuple(wording))


TRIAL = Trial(
    "T11",
    range(10),
    measure,
    judge,
    {
        "shares": SHARES,
        "originals": NUM_ROWS,
        "copies": COPIES,
        "sketch_dim": SKETCH,
        "methods": METHODS,
        "percent": FRACTION,
    },
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
