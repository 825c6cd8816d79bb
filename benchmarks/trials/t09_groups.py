"""T9, leave a group out: do summed scores of planted groups rank what training without each of them does?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from benchmarks.trials.common import Check, Outcome, Training, Trial, main, over_seeds, signals, train_on, world_of

from gradsift.compare.world import World
from gradsift.evaluate.losses import evaluate_rows
from gradsift.evaluate.statistics import spearman_interval
from gradsift.seeds import stream
from gradsift.types import TokenRow

TRAINING = Training(lr=1e-3, num_steps=40, batch_size=32)
SIZE, NUM_RUNS = 20, 5
GROUPS = {"clean": 3, "replay": 2, "conflict": 2, "noise": 2, "irrelevant": 2, "duplicate": 1}
SCORES = ("cosine, start", "dot, start", "cosine, trained", "dot, trained", "NLL, start")
DEFAULT = SCORES[0]


def planted_groups(world: World, size: int = SIZE) -> dict[str, tuple[TokenRow, ...]]:
    """Twelve groups of one kind each, rows drawn without repetition; the duplicate group is one row many times."""
    rows = {kind: [row for row in world.pool if world.kinds[row.id] == kind] for kind in GROUPS}
    groups = {}
    for kind, count in GROUPS.items():
        if kind != "duplicate":
            first: dict[bytes, TokenRow] = {}
            for row in rows[kind]:
                first.setdefault(row.input_ids.tobytes(), row)
            rows[kind] = list(first.values())
        draws = stream(world.seed, f"trials/t9/{kind}").uniform([row.id for row in rows[kind]])
        order = np.argsort(draws)
        for g in range(count):
            groups[f"{kind} {g}"] = tuple(rows[kind][k] for k in order[g * size : (g + 1) * size])
    if any(len(group) != size for group in groups.values()):
        raise RuntimeError("the world has too few rows for the planted groups")
    return groups


def measure(
    seed: int, world: World | None = None, training: Training = TRAINING, size: int = SIZE, runs: int = NUM_RUNS
) -> dict[str, Any]:
    """Group scores and the rise of the domain's held-out loss when a group is left out."""
    world = world or world_of(seed)
    groups = planted_groups(world, size)
    every = [row for group in groups.values() for row in group]
    held_out = next(s.rows for s in world.evaluations if s.role == "domain")

    def loss_without(left_out: str, run: int) -> float:
        rows = [row for name, group in groups.items() if name != left_out for row in group]
        model = train_on(world, rows, training, stream(seed, f"trials/t9/order/{run}"))
        return evaluate_rows(model, held_out, pad_id=world.pad_id, tokens_per_batch=8192).row_mean

    base = np.array([loss_without("", run) for run in range(runs)])
    rise = {name: np.array([loss_without(name, run) for run in range(runs)]) - base for name in groups}
    sums: dict[str, dict[str, float]] = {}
    trained = train_on(world, every, training, stream(seed, "trials/t9/all"))
    for stage, model in (("start", world.make_model()), ("trained", trained)):
        problem = signals(world, model, every)
        at = {name: k for k, name in enumerate(problem.ids)}
        for name, column in (("cosine", problem.target_cos), ("dot", problem.target_dot), ("NLL", problem.loss)):
            assert column is not None
            sums[f"{name}, {stage}"] = {g: float(column[[at[r.id] for r in some]].sum()) for g, some in groups.items()}
    return {
        "rise": {g: float(r.mean()) for g, r in rise.items()},
        "rise_sd": {g: float(r.std(ddof=1)) for g, r in rise.items()},
        "scores": {name: sums[name] for name in SCORES},
    }


def correlations(figures: dict[str, Any]) -> dict[str, Any]:
    """Spearman of each score with the rise over the groups of one seed."""
    names = list(figures["rise"])
    rise = [figures["rise"][g] for g in names]
    return {s: spearman_interval([figures["scores"][s][g] for g in names], rise) for s in figures["scores"]}


def wrong_sign(figures: dict[str, Any]) -> list[str]:
    """Groups whose default score, against the mean group, points the other way than their measured rise does."""
    score, rise = figures["scores"][DEFAULT], figures["rise"]
    middle = (float(np.mean(list(score.values()))), float(np.mean(list(rise.values()))))
    return [g for g in rise if (score[g] - middle[0]) * (rise[g] - middle[1]) < 0]


def judge(figures: Mapping[int, dict[str, Any]]) -> Outcome:
    """The first seed's interval excludes 0 (the sheet's trial), and so does the t interval over all seeds' rho."""
    found = {seed: correlations(f) for seed, f in figures.items()}
    first = next(iter(found.values()))[DEFAULT]
    over = over_seeds([f[DEFAULT].rho for f in found.values()])
    single = sum(f[DEFAULT].low > 0 for f in found.values())
    beside = ", ".join(f"{s} {np.mean([f[s].rho for f in found.values()]):+.2f}" for s in SCORES if s != DEFAULT)
    wrong = {seed: wrong_sign(f) for seed, f in figures.items()}
    said = ", ".join(f"seed {seed}: {'/'.join(names) or 'none'}" for seed, names in list(wrong.items())[:3])
    text = f"{first.rho:+.2f} [{first.low:+.2f}, {first.high:+.2f}] over {first.n} groups"
    return Outcome(
        "T9",
        (
            Check("rho of the default (cosine, start weights), first seed,", text, "interval above 0", first.low > 0),
            Check(
                "mean rho over seeds",
                f"{over}, {single} of {over.n} seeds alone exclude 0",
                "interval above 0",
                over.low > 0,
            ),
        ),
        (f"beside {beside}", f"groups of the wrong sign against the mean: {said}"),
    )


TRIAL = Trial(
    "T9",
    range(10),
    measure,
    judge,
    {"training": vars(TRAINING), "groups": GROUPS, "group_size": SIZE, "runs": NUM_RUNS},
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
