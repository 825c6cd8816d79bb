"""T10, planted conflict: does -cos(anchor) tell conflict rows from replay rows of the same tokens, and beyond the loss?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
    embeddings,
    main,
    over_seeds,
    signals,
    similarity,
    train_on,
    world_of,
)

from gradsift.compare.arms import Desk, keyed_order
from gradsift.compare.world import World
from gradsift.data.lexical import lexical_scores
from gradsift.evaluate.statistics import auc
from gradsift.types import Problem, TokenRow

TRAINING = Training(lr=3e-4, num_steps=120, batch_size=64)
BUDGET = 400  # rows that the trained weights have been trained on, drawn at random
CALIPER = 0.1  # nats: a conflict row is paired with one replay row whose loss is at most this far away
MIN_PAIRS = 10  # fewer pairs in a seed give no figure for that seed
STAGES = ("start", "trained")
NO_BETTER = "no better than loss"


def right_by_chance(world: World) -> set[str]:
    """Conflict rows whose planted wrong answer is right by chance: x - y + 1 = x + y mod p where 2 y = 1."""
    p = int(world.pool[0].input_ids[0])  # BOS is the token after the numbers
    found = set()
    for row in world.pool:
        if world.kinds[row.id] == "conflict":
            x, y, z = int(row.input_ids[1]), int(row.input_ids[3]), int(row.input_ids[5])
            if (x + y) % p == z:
                found.add(row.id)
    return found


def scores_of(world: World, model: Any, rows: tuple[TokenRow, ...]) -> tuple[Problem, dict[str, np.ndarray]]:
    """Every score of the table, higher meaning more like conflict."""
    problem = signals(world, model, rows)
    assert problem.loss is not None
    assert problem.grad_norm is not None
    cos = problem.anchor_cos
    assert cos is not None
    anchors = [row for some in world.anchors.values() for row in some]
    by_id = {row.id: row for row in rows}
    ordered = [by_id[i] for i in problem.ids]
    words = lexical_scores(problem.ids, [world.texts[i] for i in problem.ids], [world.texts[r.id] for r in anchors])
    return problem, {
        "-cos A": -cos[:, 0],
        "-dot A": -problem.anchor_dot[:, 0],  # type: ignore[index]
        "NLL": problem.loss,
        "norm": problem.grad_norm,
        "length": problem.num_tokens.astype(float),
        "-BM25 to A": -words,
        "-embedding to A": -similarity(embeddings(model, ordered), embeddings(model, anchors)),
    }


def matched(loss: np.ndarray, positive: np.ndarray, negative: np.ndarray, caliper: float = CALIPER) -> np.ndarray:
    """Pair rows of equal loss: nearest pairs first, each row once, none further apart than the caliper.

    Returns:
        [K, 2] positions of a positive and a negative row.
    """
    gap = np.abs(loss[positive][:, None] - loss[negative][None])
    order = np.argsort(gap, axis=None, kind="stable")
    used_a, used_b, pairs = set(), set(), []
    for a, b in zip(*np.unravel_index(order, gap.shape), strict=True):
        if gap[a, b] > caliper:
            break
        if a not in used_a and b not in used_b:
            used_a.add(a)
            used_b.add(b)
            pairs.append((positive[a], negative[b]))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def tabulate(kinds: np.ndarray, loss: np.ndarray, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """AUCs of every score: conflict against replay, against everything, and where the loss is matched."""
    conflict, replay = np.flatnonzero(kinds == "conflict"), np.flatnonzero(kinds == "replay")
    others = np.flatnonzero(kinds != "conflict")
    pairs = matched(loss, conflict, replay)
    enough = len(pairs) >= MIN_PAIRS
    return {
        "num_conflict": len(conflict),
        "num_replay": len(replay),
        "against_replay": {name: auc(s[conflict], s[replay]) for name, s in scores.items()},
        "against_all": {name: auc(s[conflict], s[others]) for name, s in scores.items()},
        "num_matched": len(pairs),
        "matched": {name: auc(s[pairs[:, 0]], s[pairs[:, 1]]) for name, s in scores.items()} if enough else None,
    }


def measure(
    seed: int, world: World | None = None, training: Training = TRAINING, budget: int = BUDGET
) -> dict[str, Any]:
    """AUCs of one seed at the starting weights and at weights trained on a random draw."""
    world = world or world_of(seed)
    right = right_by_chance(world)
    rows = tuple(row for row in distinct(world) if row.id not in right)
    desk = Desk(world, budget)
    drawn = [desk.rows[i] for i in keyed_order(desk)[:budget]]
    models = {"start": world.make_model(), "trained": train_on(world, drawn, training, desk.stream("order"))}
    figures: dict[str, Any] = {"num_right_by_chance": len(right)}
    for stage in STAGES:
        problem, scores = scores_of(world, models[stage], rows)
        kinds = np.array([world.kinds[i] for i in problem.ids])
        figures[stage] = tabulate(kinds, problem.loss, scores)  # type: ignore[arg-type]
        figures[stage]["anchor_split_half"] = problem.anchors[0].reliability
    return figures


def judge(figures: Mapping[int, dict[str, Any]]) -> Outcome:
    """AUC >= 0.75 against replay; above 0.5 with its interval where the loss is matched, else say so."""
    checks, wording = [], []
    for stage in STAGES:
        seen = {name: [f[stage]["against_replay"][name] for f in figures.values()] for name in _names(figures)}
        mean = {name: float(np.mean(values)) for name, values in seen.items()}
        beside = ", ".join(f"{name} {value:.3f}" for name, value in mean.items() if name != "-cos A")
        interval = over_seeds(seen["-cos A"])
        text = f"AUC {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}], n = {interval.n}, beside {beside}"
        checks.append(
            Check(f"conflict against replay by -cos A, {stage} weights,", text, ">= 0.75", mean["-cos A"] >= 0.75)
        )
        kept = [f[stage]["matched"] for f in figures.values() if f[stage]["matched"]]
        pairs = sum(f[stage]["num_matched"] for f in figures.values())
        text = f"{len(kept)} of {len(figures)} seeds have {MIN_PAIRS} pairs or more, {pairs} pairs in all"
        above = False
        if kept:
            inside = over_seeds([m["-cos A"] for m in kept])
            nll = float(np.mean([m["NLL"] for m in kept]))
            above = len(kept) >= 10 and inside.low > 0.5
            text += f", AUC {inside.mean:.3f} [{inside.low:.3f}, {inside.high:.3f}], NLL itself {nll:.3f}"
        checks.append(Check(f"where the loss is matched, {stage} weights,", text, "interval above 0.5", above))
        if not above:
            wording.append(f"-cos A at the {stage} weights: {NO_BETTER}")
    return Outcome("T10", tuple(checks), tuple(wording))


def _names(figures: Mapping[int, dict[str, Any]]) -> list[str]:
    return list(next(iter(figures.values()))["start"]["against_replay"])


TRIAL = Trial(
    "T10",
    range(10),
    measure,
    judge,
    {"training": vars(TRAINING), "budget": BUDGET, "caliper_nats": CALIPER, "min_pairs": MIN_PAIRS},
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
