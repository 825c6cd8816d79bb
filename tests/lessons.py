"""Small seeded token rows, plans and settings for the trainer's tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradsift.seeds import stream
from gradsift.train.config import TrainConfig
from gradsift.train.plan import TrainPlan, plan_steps
from gradsift.types import RowStatus, TokenRow


def token_row(name: str, ids: list[int] | np.ndarray, trained: Any = None) -> TokenRow:
    ids = np.asarray(ids, np.int32)
    mask = np.ones(ids.size, bool) if trained is None else np.asarray(trained, bool)
    return TokenRow(name, ids, mask, ids.size, RowStatus.OK)


def lesson_rows(count: int = 10, seed: int = 0, prefix: str = "r", longest: int = 20) -> dict[str, TokenRow]:
    """Rows of random bytes and lengths; the last token of each carries loss."""
    draw = np.random.default_rng(seed)
    rows = {}
    for n in range(count):
        length = int(draw.integers(4, longest))
        trained = draw.random(length) < 0.6
        trained[-1] = True
        rows[f"{prefix}{n}"] = token_row(f"{prefix}{n}", draw.integers(4, 250, length), trained)
    return rows


def lesson_plan(rows: dict[str, TokenRow], steps: int = 6, batch: int = 4) -> TrainPlan:
    return plan_steps(list(rows), batch_size=batch, num_steps=steps, stream=stream(0, "order"))


def lesson_config(**changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {"lr": 1e-3, "batch_size": 4, "steps": 6, "mode": "full", "save_steps": 0, "device": "cpu",
                             "schedule": "cosine", "warmup_steps": 2}  # fmt: skip
    return TrainConfig.model_validate({**plain, **changes})
