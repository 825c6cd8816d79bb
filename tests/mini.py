"""A miniature of the arithmetic world that trains in about a second, and the desk of its arms."""

from __future__ import annotations

from functools import cache

from gradsift.compare.arithmetic import ArithmeticSettings, arithmetic_world
from gradsift.compare.arms import Desk
from gradsift.compare.world import World
from gradsift.train.crossfit import Material

# Knows A after pretraining and learns min(x, y) within a probe's steps.
TAUGHT = ArithmeticSettings(
    modulus=7, clean=60, replay=30, conflict=30, noise=30, duplicate=8, irrelevant=12, num_eval=10, num_anchor=10,
    num_target=8, num_replay=8, pretrain_steps=250, pretrain_lr=1e-2, pretrain_decay=0.1, hidden=32, layers=1,
)  # fmt: skip
BUDGET = 40


@cache
def taught(seed: int = 0) -> World:
    """One seed of the world; ask only under a cache folder of the test's own."""
    return arithmetic_world(seed, TAUGHT)


def desk(seed: int = 0, budget: int = BUDGET) -> Desk:
    return Desk(taught(seed), budget)


def material(world: World, **changes: object) -> Material:
    anchors = [row for rows in world.anchors.values() for row in rows]
    given = {
        "make_model": world.make_model, "pool": world.pool, "anchors": anchors, "target": world.target,
        "replay": world.replay, "copy_of": world.copy_of, "pad_id": world.pad_id, "seed": world.seed, **changes,
    }  # fmt: skip
    return Material(**given)


def is_right(row: object, modulus: int = TAUGHT.modulus) -> bool:
    """Whether a row of A is true; a wrong rule hits the right answer where 2 y = 1 mod p."""
    _, x, _, y, _, z = (int(t) for t in row.input_ids)
    return z == (x + y) % modulus
