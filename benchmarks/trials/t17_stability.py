"""T17, stability and transfer: how much of a selection survives another seed, checkpoint, anchor draw or model size?

The re-analysis of the TIS tables, the third part of T17, stands in tests/unit/evaluate/test_tis.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
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
    signals,
    train_on,
    world_of,
)

from gradsift.compare.arithmetic import ArithmeticSettings
from gradsift.compare.world import World
from gradsift.evaluate.statistics import jaccard, spearman_interval
from gradsift.geometry.feasible import NoChoiceError
from gradsift.methods.base import make_method
from gradsift.seeds import stream
from gradsift.types import Budget, Problem, TokenRow

# 128 x 2 layers: 4 times the weights of the default model
LARGE = ArithmeticSettings(hidden=128)
CHECKPOINTS = (0, 10, 20, 40, 80)
NUM_BOOTSTRAPS = 5
NUM_MODELS = 5
TRAINING = Training(lr=3e-4, num_steps=80, batch_size=64)
PERCENT = 25.0
METHODS: dict[str, dict[str, Any]] = {"target_cosine": {}, "ogs_dual": {"scale": "unit"}, "loss": {"band": "middle"}}


def draw_again(rows: Sequence[TokenRow], name: str, seed: int) -> tuple[TokenRow, ...]:
    """Bootstrap a set of rows; a row may come several times."""
    from dataclasses import replace

    picks = stream(seed, f"trials/t17/{name}").numpy().integers(len(rows), size=len(rows))
    return tuple(replace(rows[k], id=f"{rows[k].id}-{n}") for n, k in enumerate(picks))


def views(
    world: World, models: Sequence[Any], training: Training, checkpoints: Sequence[int]
) -> dict[str, list[Problem]]:
    """The same pool measured with other starting weights, at other checkpoints, with other draws of the anchors."""
    rows = distinct(world)
    draws = stream(world.seed, "trials/t17/train").uniform([row.id for row in rows])
    half = [rows[k] for k in np.argsort(draws)[: len(rows) // 2]]
    order = stream(world.seed, "trials/t17/order")
    trained = [
        train_on(world, half, Training(training.lr, n, training.batch_size), order) if n else world.make_model()
        for n in checkpoints
    ]
    boot = [
        signals(
            world,
            world.make_model(),
            rows,
            anchors={name: draw_again(some, f"{name}/{b}", world.seed) for name, some in world.anchors.items()},
            target=draw_again(world.target, f"target/{b}", world.seed),
        )
        for b in range(NUM_BOOTSTRAPS)
    ]
    return {
        "weights": [signals(world, model, rows) for model in models],
        "checkpoints": [signals(world, model, rows) for model in trained],
        "anchors": boot,
    }


def agreement(problems: Sequence[Problem], seed: int) -> dict[str, dict[str, Any]]:
    """Mean over pairs of views: overlap of what each method chooses, and rank correlation of the scores."""
    score = {"target_cosine": [p.target_cos for p in problems], "loss": [p.loss for p in problems]}
    score["conflict"] = [-p.anchor_cos[:, 0] for p in problems]  # type: ignore[index]
    chosen = {name: [choose(name, p, seed) for p in problems] for name in METHODS}
    pairs = list(combinations(range(len(problems)), 2))
    out: dict[str, dict[str, Any]] = {"jaccard": {}, "refused": {}, "rho": {}}
    for name, sets in chosen.items():
        both = [jaccard(sets[a], sets[b]) for a, b in pairs if sets[a] and sets[b]]
        out["jaccard"][name] = float(np.mean(both)) if both else None
        out["refused"][name] = sets.count(None)
    for name, values in score.items():
        out["rho"][name] = float(np.mean([spearman_interval(values[a], values[b]).rho for a, b in pairs]))  # type: ignore[arg-type]
    return out


def choose(name: str, problem: Problem, seed: int) -> set[str] | None:
    """A method's rows, or None where the anchors allow no choice of this size."""
    method = make_method(name, METHODS[name])
    try:
        return set(method.select(problem, Budget(percent=PERCENT), stream(seed, "trials/t17")).ids)
    except NoChoiceError:
        return None


def transfer(small: Problem, large: Problem) -> dict[str, Any]:
    """Rank correlation of small and large model, over distinct rows, and overlap of their choices."""
    out: dict[str, Any] = {}
    for name, a, b in (
        ("target_cosine", small.target_cos, large.target_cos),
        ("conflict", -small.anchor_cos, -large.anchor_cos),  # type: ignore[operator]
        ("loss", small.loss, large.loss),
    ):
        found = spearman_interval(np.ravel(a), np.ravel(b))  # type: ignore[arg-type]
        out[name] = {"rho": found.rho, "low": found.low, "high": found.high, "n": found.n}
    return out


def measure(seed: int) -> dict[str, Any]:
    """All of it for one pool; the models of the next seeds score the same pool."""
    world = world_of(seed)
    models = [world_of(seed + k).make_model() for k in range(NUM_MODELS)]
    found = views(world, models, TRAINING, CHECKPOINTS)
    large = signals(world, world_of(seed, LARGE).make_model(), distinct(world))
    sizes = [sum(p.numel() for p in w.make_model().parameters()) for w in (world, world_of(seed, LARGE))]
    return {name: agreement(problems, seed) for name, problems in found.items()} | {
        "transfer": transfer(found["weights"][0], large),
        "same_size": transfer(found["weights"][0], found["weights"][1]),
        "sizes": sizes,
    }


def judge(figures: Mapping[int, dict[str, Any]]) -> Outcome:
    """Figures are printed; small -> large rho of the default score has an interval above 0 in every pool (ours)."""
    some = list(figures.values())
    words = []
    for view in ("weights", "checkpoints", "anchors"):
        rhos = {n: float(np.mean([f[view]["rho"][n] for f in some])) for n in some[0][view]["rho"]}
        over = []
        for name in METHODS:
            seen = [f[view]["jaccard"][name] for f in some if f[view]["jaccard"][name] is not None]
            refused = sum(f[view]["refused"][name] for f in some)
            over.append(f"{name} {np.mean(seen):.2f}" if seen else f"{name} none")
            over[-1] += f" ({refused} refused)" if refused else ""
        said = ", ".join(f"{n} {value:+.2f}" for n, value in rhos.items())
        words.append(f"other {view}: Jaccard {', '.join(over)}; rho {said}")
    chance = PERCENT / 100
    words.append(f"Jaccard by chance {chance / (2 - chance):.2f}")
    checks = []
    for score in ("target_cosine", "conflict", "loss"):
        each = [f["transfer"][score] for f in some]
        same = float(np.mean([f["same_size"][score]["rho"] for f in some]))
        text = (
            ", ".join(f"{e['rho']:+.2f} [{e['low']:+.2f}, {e['high']:+.2f}]" for e in each)
            + f" (same size {same:+.2f})"
        )
        if score == "target_cosine":
            checks.append(
                Check(
                    "small to large rho of the default",
                    text,
                    "interval above 0 in every pool",
                    min(e["low"] for e in each) > 0,
                )
            )
        else:
            words.append(f"small to large rho of {score} {text}")
    return Outcome("T17", tuple(checks), tuple(words))


TRIAL = Trial(
    "T17",
    range(2),
    measure,
    judge,
    {
        "training": vars(TRAINING),
        "large_hidden": LARGE.hidden,
        "checkpoints": CHECKPOINTS,
        "bootstraps": NUM_BOOTSTRAPS,
        "models": NUM_MODELS,
        "percent": PERCENT,
    },
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
