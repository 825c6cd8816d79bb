"""T12, planted label noise: does -cos(target) find random answers better than the loss does? (OpenDataVal's protocol)"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from benchmarks.trials.common import (
    Check,
    Outcome,
    Training,
    Trial,
    distinct,
    main,
    over_seeds,
    signals,
    train_on,
    world_of,
)

from gradsift.compare.world import World
from gradsift.evaluate.statistics import auc
from gradsift.seeds import stream
from gradsift.types import TokenRow

TRAINING = Training(lr=3e-4, num_steps=120, batch_size=64)
RATES = (0.05, 0.20, 0.40)
COPIES = 2  # every pair occurs twice, each with its own chance of a wrong answer
INSPECTED = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75)
STAGES = ("start", "trained")


def noisy_rows(world: World, rate: float) -> tuple[tuple[TokenRow, ...], np.ndarray]:
    """Rows of B of which a share has another answer than min(x, y).

    Returns:
        The rows in id order and bool [n], which of them are wrong.
    """
    clean = [row for row in distinct(world) if world.kinds[row.id] in ("clean", "duplicate")]
    rows = sorted((replace(row, id=f"{row.id}-{c}") for row in clean for c in range(COPIES)), key=lambda row: row.id)
    unique = {row.input_ids.tobytes() for row in clean}
    if len(unique) != len(clean):
        raise RuntimeError("the clean rows hold copies")
    draw = stream(world.seed, f"trials/t12/{rate}")
    wrong = np.zeros(len(rows), dtype=bool)
    wrong[np.argsort(draw.uniform([row.id for row in rows]))[: round(rate * len(rows))]] = True
    modulus = int(world.pool[0].input_ids[0])  # BOS is the token after the numbers
    shift = 1 + np.floor(draw.child("answer").uniform([row.id for row in rows]) * (modulus - 1)).astype(int)
    return tuple(
        _shifted(row, int(s), modulus) if w else row for row, s, w in zip(rows, shift, wrong, strict=True)
    ), wrong


def _shifted(row: TokenRow, by: int, modulus: int) -> TokenRow:
    ids = row.input_ids.copy()
    ids[-1] = (ids[-1] + by) % modulus
    return replace(row, input_ids=ids)


def discovery(score: np.ndarray, wrong: np.ndarray) -> list[float]:
    """Share of the wrong rows found when the rows of highest score are inspected, at each share of INSPECTED."""
    order = np.argsort(-score, kind="stable")
    return [float(wrong[order[: round(share * len(order))]].sum() / wrong.sum()) for share in INSPECTED]


def measure(
    seed: int, world: World | None = None, training: Training = TRAINING, rates: tuple[float, ...] = RATES
) -> dict[str, Any]:
    """AUCs and discovery curves of one seed; higher score means more likely wrong."""
    world = world or world_of(seed)
    figures: dict[str, Any] = {}
    for rate in rates:
        rows, wrong = noisy_rows(world, rate)
        order = stream(seed, f"trials/t12/order/{rate}")
        models = {"start": world.make_model(), "trained": train_on(world, rows, training, order)}
        cell: dict[str, Any] = {"num_rows": len(rows), "num_wrong": int(wrong.sum())}
        for stage in STAGES:
            problem = signals(world, models[stage], rows)
            assert problem.ids == tuple(row.id for row in rows)
            assert problem.target_cos is not None
            scores = {
                "-cos B": -problem.target_cos,
                "-dot B": -problem.target_dot,  # type: ignore[operator]
                "NLL": problem.loss,
                "norm": problem.grad_norm,
            }
            cell[stage] = {name: auc(s[wrong], s[~wrong]) for name, s in scores.items()}  # type: ignore[index]
            cell[f"{stage}_discovery"] = {name: discovery(scores[name], wrong) for name in ("-cos B", "NLL")}  # type: ignore[arg-type]
        figures[f"{rate:.2f}"] = cell
    return figures


def judge(figures: Mapping[int, dict[str, Any]]) -> Outcome:
    """AUC of -cos B above that of the loss: the paired interval over seeds lies above 0, at every rate."""
    checks, wording = [], []
    for rate in next(iter(figures.values())):
        for stage in STAGES:
            cos = [f[rate][stage]["-cos B"] for f in figures.values()]
            nll = [f[rate][stage]["NLL"] for f in figures.values()]
            gap = over_seeds(cos, nll)
            text = f"AUC {np.mean(cos):.3f} against NLL {np.mean(nll):.3f}, difference {gap}"
            above = gap.n >= 10 and gap.low > 0
            checks.append(
                Check(f"{float(rate):.0%} wrong, {stage} weights,", text, "interval of the difference above 0", above)
            )
            if not above:
                wording.append(f"{float(rate):.0%} wrong, {stage} weights: no better than loss")
    return Outcome("T12", tuple(checks), tuple(wording))


TRIAL = Trial(
    "T12",
    range(10),
    measure,
    judge,
    {"training": vars(TRAINING), "rates": RATES, "copies": COPIES, "inspected": INSPECTED},
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
