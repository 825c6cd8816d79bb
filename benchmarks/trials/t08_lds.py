"""T8, linear datamodeling score: do the summed scores of random halves rank the models trained on them?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
from gradsift.evaluate.lds import datamodeling_score, half_subsets, noise_ceiling, subset_bootstrap
from gradsift.evaluate.losses import evaluate_rows
from gradsift.seeds import stream
from gradsift.types import TokenRow

TRAINING = Training(lr=1e-3, num_steps=40, batch_size=32)
NUM_ROWS, NUM_TARGETS, NUM_SUBSETS, NUM_RUNS = 360, 59, 60, 3
DEFAULT = "cosine, start"  # what `gradsift select --method target_cosine` ranks by


def draw_rows(world: World, count: int) -> tuple[TokenRow, ...]:
    """Distinct pool rows at random, as the pool mixes their kinds."""
    rows = distinct(world)
    draws = stream(world.seed, "trials/t8/rows").uniform([row.id for row in rows])
    return tuple(sorted((rows[k] for k in np.argsort(draws)[:count]), key=lambda row: row.id))


def pair_scores(
    world: World, model: Any, rows: Sequence[TokenRow], targets: Sequence[TokenRow]
) -> dict[str, np.ndarray]:
    """Cosine and dot [N, T] of every row with every single target row, and the row's loss, in the order of rows."""
    problem = signals(world, model, rows, anchors={row.id: (row,) for row in targets}, target=())
    assert problem.ids == tuple(row.id for row in rows)
    assert problem.anchor_dot is not None
    assert problem.anchor_cos is not None
    lengths = np.array([direction.norm for direction in problem.anchors])
    repeated = np.repeat(problem.loss[:, None], len(targets), axis=1)  # type: ignore[index]
    return {"cosine": problem.anchor_cos, "dot": problem.anchor_dot * lengths, "NLL": repeated}


def retrain(
    world: World, rows: Sequence[TokenRow], members: np.ndarray, targets: Sequence[TokenRow], runs: int, how: Training
) -> np.ndarray:
    """Minus the loss [R, S, T] of every target after training on every subset, with R data orders."""
    outputs = np.zeros((runs, len(members), len(targets)))
    for r in range(runs):
        for s, member in enumerate(members):
            some = [row for row, inside in zip(rows, member, strict=True) if inside]
            model = train_on(world, some, how, stream(world.seed, f"trials/order/{r}/{s}"))
            outputs[r, s] = -evaluate_rows(model, targets, pad_id=world.pad_id, tokens_per_batch=8192).loss
    return outputs


def measure(
    seed: int,
    world: World | None = None,
    training: Training = TRAINING,
    sizes: tuple[int, int, int, int] = (NUM_ROWS, NUM_TARGETS, NUM_SUBSETS, NUM_RUNS),
) -> dict[str, Any]:
    """LDS of every score for targets of the domain (gain) and of the protected task (forgetting)."""
    world = world or world_of(seed)
    num_rows, num_targets, num_subsets, num_runs = sizes
    rows = draw_rows(world, num_rows)
    held_out = {s.name: sorted(s.rows, key=lambda row: row.id)[:num_targets] for s in world.evaluations}
    every = [row for some in held_out.values() for row in some]
    members = half_subsets([row.id for row in rows], num_subsets, stream(seed, "trials/t8/subsets"))
    outputs = retrain(world, rows, members, every, num_runs, training)
    models = {"start": world.make_model(), "trained": train_on(world, rows, training, stream(seed, "trials/t8/all"))}
    scores = {f"{k}, {at}": v for at, m in models.items() for k, v in pair_scores(world, m, rows, every).items()}
    noise = stream(seed, "trials/t8/random").numpy()
    scores["random"] = noise.normal(size=(len(rows), len(every)))
    scores["sign error"] = -scores[DEFAULT]
    figures: dict[str, Any] = {"num_rows": len(rows), "num_subsets": num_subsets, "num_runs": num_runs}
    for name, targets in held_out.items():
        ids = {row.id for row in targets}
        at = [k for k, row in enumerate(every) if row.id in ids]
        figures[name] = {"num_targets": len(at)} | tabulate(
            {k: v[:, at] for k, v in scores.items()}, members, outputs[:, :, at]
        )
    return figures


def tabulate(scores: Mapping[str, np.ndarray], members: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """LDS, both intervals and the ceiling for one set of targets."""
    mean = outputs.mean(0)
    table: dict[str, Any] = {}
    per_target = {name: datamodeling_score(score, members, mean) for name, score in scores.items()}
    for name, found in per_target.items():
        both = subset_bootstrap(scores[name], members, mean, stream(0, "trials/t8/bootstrap"), 200)
        table[name] = {
            "lds": found.interval.mean,
            "low": found.interval.low,
            "high": found.interval.high,
            "low_subsets_too": both.low,
            "high_subsets_too": both.high,
        }
    ceiling = noise_ceiling(outputs)
    against = over_seeds(list(per_target[DEFAULT].per_target), list(per_target["NLL, start"].per_target))
    return {
        "scores": table,
        "ceiling_single": ceiling.single,
        "ceiling_of_mean": ceiling.of_mean,
        "default_minus_nll": {"mean": against.mean, "low": against.low, "high": against.high},
    }


def judge(figures: Mapping[int, dict[str, Any]], name: str = "B") -> Outcome:
    """The sheet's four demands, on the domain's targets, in every world that was run."""
    tables = [f[name] for f in figures.values()]

    def said(score: str) -> str:
        return ", ".join("{lds:.3f} [{low:.3f}, {high:.3f}]".format(**t["scores"][score]) for t in tables)

    gaps = ", ".join("{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**t["default_minus_nll"]) for t in tables)
    ceilings = ", ".join(f"{t['ceiling_single']:.3f}/{t['ceiling_of_mean']:.3f}" for t in tables)
    lows = [t["scores"][DEFAULT]["low"] for t in tables]
    covered = [t["scores"]["random"]["low"] <= 0 <= t["scores"]["random"]["high"] for t in tables]
    wrong = [t["scores"]["sign error"]["high"] for t in tables]
    return Outcome(
        "T8",
        (
            Check("LDS of the default (cosine, start weights)", said(DEFAULT), "lower end > 0.10", min(lows) > 0.10),
            Check("default minus NLL", gaps, "lower end > 0", min(t["default_minus_nll"]["low"] for t in tables) > 0),
            Check("random", said("random"), "covers 0", all(covered)),
            Check("sign error", said("sign error"), "upper end < 0", max(wrong) < 0),
        ),
        (
            f"noise ceiling (one training / mean of the trainings) {ceilings}",
            f"cosine at trained weights {said('cosine, trained')}",
        ),
    )


TRIAL = Trial(
    "T8",
    range(3),
    measure,
    judge,
    {
        "training": vars(TRAINING),
        "rows": NUM_ROWS,
        "targets": NUM_TARGETS,
        "subsets": NUM_SUBSETS,
        "runs": NUM_RUNS,
        "default": DEFAULT,
        "decides": "targets of B, every seed",
    },
)

if __name__ == "__main__":
    sys.exit(main(TRIAL))
