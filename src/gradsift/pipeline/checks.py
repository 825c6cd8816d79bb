"""Figures about a finished choice: conflict of its batches, noise of the sketch, example rows to look at."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradsift.data.show import segments
from gradsift.data.token_rows import among
from gradsift.geometry.batch import batch_conflict
from gradsift.geometry.rows import part_of, row_sum
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared
from gradsift.seeds import stream
from gradsift.types import Problem, Selection

BATCH_SIZE = 64
NUM_SHOWN = 12


def batch_checks(problem: Problem, selection: Selection, seed: int) -> dict[str, Any]:
    """Measure the conflict of random batches of the chosen rows, and of the whole set against the whole pool.

    Args:
        problem: the eligible rows.
        selection: the choice.
        seed: the run's seed.

    Returns:
        The manifest's ``batch_check`` and ``set_conflict`` sections, None where not measured.
    """
    if problem.anchor_dot is None or problem.sketch is None or problem.grad_norm is None or not selection.ids:
        return {"batch_check": None, "set_conflict": None}
    place = {row: i for i, row in enumerate(problem.ids)}
    rows = np.array([place[row] for row in selection.ids])
    names = [d.name for d in problem.anchors]
    dots = problem.anchor_dot
    if problem.target_dot is not None:
        names, dots = [*names, "target"], np.column_stack([dots, problem.target_dot])
    table = []
    for size in (BATCH_SIZE, 4 * BATCH_SIZE):
        if size > len(rows):
            continue
        generator = stream(seed, f"batch_check/{size}").numpy()
        got = batch_conflict(dots[rows], problem.grad_norm[rows], part_of(problem.sketch, rows), size, generator)
        for m, name in enumerate(names):
            low, middle, high = map(_known, got.random[:, m])
            table.append(
                {"anchor": name, "batch_size": size, "num_batches": got.num_batches, "p05": low, "p50": middle,
                 "p95": high, "predicted": _known(got.predicted[m])}
            )  # fmt: skip

    def whole(some: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        if weights is not None and (weights != 1).any():
            each = weights.astype(np.float64)
            total = row_sum(part_of(problem.sketch, some), each)
            return each @ dots[some] / max(float(np.linalg.norm(total)), 1e-300)
        total = row_sum(part_of(problem.sketch, some))
        return dots[some].sum(0) / max(float(np.linalg.norm(total)), 1e-300)

    chosen, every = whole(rows, selection.weights), whole(np.arange(problem.size))
    sets = [{"anchor": n, "selected": float(chosen[m]), "pool": float(every[m])} for m, n in enumerate(names)]
    return {"batch_check": table, "set_conflict": sets}


def _known(value: float) -> float | None:
    """NaN where a sum vanishes, or where noise in the sketches leaves the formula without an answer, is nothing in JSON."""
    return float(value) if np.isfinite(value) else None


def sketch_noise(problem: Problem) -> dict[str, Any] | None:
    """Compare the sketch's noise with the spread of the exact cosines: 1/sqrt(D) / sd(cos).

    Above 1/3 a ranking by sketched cosines would be blurred, above 1 it would be noise. Dots with anchors are exact,
    so this figure concerns what is computed from sketches: clusters, batch norms, split halves.

    Args:
        problem: the eligible rows.

    Returns:
        The manifest's ``sketch`` section, or None without sketches.
    """
    if problem.sketch is None:
        return None
    dim = problem.sketch.shape[1]
    ratios: dict[str, float] = {}
    cosines = (
        {}
        if problem.anchor_cos is None
        else {d.name: c for d, c in zip(problem.anchors, problem.anchor_cos.T, strict=True)}
    )
    if problem.target_cos is not None:
        cosines["target"] = problem.target_cos
    for name, cos in cosines.items():
        spread = float(np.std(cos))
        if spread > 0:
            ratios[name] = dim**-0.5 / spread
    return {"dim": dim, "noise_ratio": ratios}


def example_rows(
    prepared: Prepared, measured: Measurement | None, problem: Problem, selection: Selection
) -> list[dict[str, Any]]:
    """Pick rows for a person to read: the first chosen, and the dropped ones nearest to and farthest from the cut.

    Args:
        prepared: the run's inputs.
        measured: the signals, or None.
        problem: the eligible rows.
        selection: the choice.

    Returns:
        The content of ``examples.json``.
    """
    chosen = set(selection.ids)
    place = np.where(selection.rank < 0, np.iinfo(np.int32).max, selection.rank)
    ranked = np.argsort(place, kind="stable").tolist()
    kept = [i for i in ranked if problem.ids[i] in chosen][:NUM_SHOWN]
    dropped = [i for i in ranked if problem.ids[i] not in chosen]
    half = NUM_SHOWN // 2
    dropped = dropped if len(dropped) <= NUM_SHOWN else dropped[:half] + dropped[-half:]
    shown = {problem.ids[i] for i in (*kept, *dropped)}
    tokens = {row.id: row for row in among(prepared.pool.tokens, shown)}
    cosines = problem.anchor_cos
    out = []
    for i in [*kept, *dropped]:
        cos = {} if cosines is None else {d.name: float(c) for d, c in zip(problem.anchors, cosines[i], strict=True)}
        if problem.target_cos is not None:
            cos["target"] = float(problem.target_cos[i])
        row = tokens[problem.ids[i]]
        score = float(selection.score[i])
        out.append(
            {
                "id": problem.ids[i],
                "source": problem.sources[i],
                "selected": problem.ids[i] in chosen,
                "status": row.status.value,
                "score": None if np.isnan(score) else score,
                "rank": None if selection.rank[i] < 0 else int(selection.rank[i]),
                "reason": selection.reason[i],
                "loss": None if problem.loss is None else float(problem.loss[i]),
                "cos": cos,
                "segments": [[part.text, part.trained] for part in segments(row, prepared.tokenizer)],
            }
        )
    return out
