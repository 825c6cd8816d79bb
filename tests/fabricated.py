"""Comparisons without training: cells with the figures a test wants, and a miniature world for those that train."""

from __future__ import annotations

import numpy as np

from gradsift.compare.cell import Cell, Point
from gradsift.compare.config import CompareConfig, build_config
from gradsift.compare.store import Filed, Origin
from gradsift.compare.worlds import resolve
from gradsift.train.parts import Cost

ROLES = {"B": "domain", "A": "general"}
MINI = {
    "modulus": 7, "clean": 20, "replay": 12, "conflict": 12, "noise": 12, "duplicate": 6, "irrelevant": 6, "num_eval": 10,
    "num_anchor": 8, "num_target": 6, "num_replay": 6, "pretrain_steps": 4, "hidden": 16, "layers": 1,
}  # fmt: skip
GRID = {"lrs": [1e-3, 1e-2], "num_steps": 2, "batch_size": 8, "budget": 12}
ARMS = [
    {"name": "random", "method": "random"},
    {"name": "cheap", "method": "bm25", "replay": 0.25},
    {"name": "ours", "method": "target_cosine", "family": "gradsift"},
    {"name": "oracle", "method": "oracle", "family": "bound"},
]


def values(**changes):
    return {
        "world": {"name": "arithmetic", "settings": dict(MINI)},
        "arms": [dict(arm) for arm in ARMS],
        "grid": dict(GRID),
        "seeds": "0-9",
        "metric": "accuracy",
        "num_variants": 3,
        "cheap": ["random", "cheap"],
        "claims": [{"arm": "ours", "baseline": "random"}, {"arm": "ours", "baseline": "best_cheap"}],
        **changes,
    }


def config(**changes) -> CompareConfig:
    return resolve(build_config(values(**changes)))


def cell(name, seed, points, *, cost=None, notes=(), shares=None) -> Cell:
    """``points``: (general accuracy or loss rise, domain accuracy or loss fall) per learning rate."""
    made = []
    for k, (general, domain) in enumerate(points):
        sets = {}
        for which, value in (("A", general), ("B", domain)):
            sets[which] = {
                "loss_before": 2.0,
                "loss_after": 2.0 - value if which == "B" else 2.0 + value,
                "exact_before": 0.5,
                "exact_after": value,
                "kl": 0.25,
                "num_rows": 20.0,
                "lost": 4.0,
                "won": 2.0,
            }
        made.append(Point((1e-3, 1e-2, 1e-1)[k], sets, 2, {"train": Cost(100.0, 1, 1, 0.5)}, {}))
    return Cell("arithmetic", seed, name, tuple(made), cost or {}, shares or {"clean": 0.75, "replay": 0.25}, 12, 10,
                tuple(notes), 1.5)  # fmt: skip


def filed(one: Cell, commit="c" * 40) -> Filed:
    return Filed(one, Origin("2026-01-01T00:00:00+00:00", commit, "a machine, 2 cores"), ROLES)


def table(config: CompareConfig, means: dict[str, float], noise=0.01, seeds=None) -> dict:
    """One cell per arm and seed whose hypervolume is about the given mean (both coordinates its root)."""
    rng, out = np.random.default_rng(7), {}
    for seed in config.seeds if seeds is None else seeds:
        shared = rng.normal(0, 0.05)
        for name, mean in means.items():
            side = float(np.clip(np.sqrt(max(0.0, mean + shared + rng.normal(0, noise))), 0, 1))
            out[name, seed] = filed(cell(name, seed, [(side, side), (side / 2, side / 2)]))
    return out
