"""Checkpoints of planted problems: the rows' true directions, seen through two rotations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gradsift.geometry.checkpoints import CheckpointSignals, unit_rows

SUBTASKS = ("a", "a", "b", "b")


def planted_checkpoints(gradients: np.ndarray, target: np.ndarray | None) -> dict:
    """Fields of a problem: two checkpoints of [N, P] gradients, and target rows that scatter about one direction."""
    if target is None:
        return {}
    rng = np.random.default_rng(13)
    rows = target / np.linalg.norm(target) + 0.05 * rng.normal(size=(len(SUBTASKS), len(target)))
    turns = [np.linalg.qr(rng.normal(size=(len(target), len(target))))[0] for _ in range(2)]
    made = [CheckpointSignals(unit_rows(gradients @ t), unit_rows(rows @ t), lr) for t, lr in zip(turns, (3e-4, 1e-4))]
    return {"checkpoints": tuple(made), "subtasks": SUBTASKS}


def flat_checkpoints(angle: np.ndarray, noise: float) -> dict:
    """Directions in a plane, between two target rows of two subtasks."""
    one = CheckpointSignals(
        np.column_stack([np.cos(angle), np.sin(angle)]).astype(np.float32), np.eye(2, dtype=np.float32), 1e-4, noise
    )
    return {"checkpoints": (one, replace(one, lr=3e-4)), "subtasks": ("a", "b")}


def turned_checkpoints(checkpoints, rng) -> tuple[CheckpointSignals, ...]:
    """The same rows measured again: every direction turns by less than its bound."""

    def turn(one: CheckpointSignals) -> CheckpointSignals:
        x, y = one.features.astype(np.float64).T
        a = one.noise * rng.choice([-0.999, 0.0, 0.999, 0.5, -0.5], size=len(x))
        turned = np.column_stack([x * np.cos(a) - y * np.sin(a), x * np.sin(a) + y * np.cos(a)])
        return replace(one, features=turned.astype(np.float32))

    return tuple(turn(one) for one in checkpoints)
