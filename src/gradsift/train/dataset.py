"""Token rows as the trainer's data set, and one source of order: a sampler that yields the plan's steps and nothing else.

One batch of the data loader is one optimizer step; the trainer cuts it into micro-batches itself, so that the weighted
mean is taken over the whole step and no setting of accumulation can change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Sampler

from gradsift.errors import DataError
from gradsift.manifest import canonical_json, hash_parts
from gradsift.store.spec import content_hash
from gradsift.train.config import TrainConfig
from gradsift.train.plan import TrainPlan
from gradsift.types import RowStatus, TokenRow

if TYPE_CHECKING:
    from datasets import Dataset


# What changes neither the weights nor the losses may change between a run and its resumption.
_FREE = {"save_steps", "save_moments", "wise_ft", "device"}


@dataclass(frozen=True)
class TrainData:
    """What is trained on, and in which order.

    Args:
        plan: row ids per optimizer step.
        rows: id -> token row.
        weights: id -> weight, finite and >= 0; 1 where absent.
    """

    plan: TrainPlan
    rows: Mapping[str, TokenRow]
    weights: Mapping[str, float] = field(default_factory=dict)

    def key(self, config: TrainConfig, base: str = "") -> str:
        """Hash everything that decides the trajectory.

        Args:
            config: settings of the run.
            base: hash of the model that is trained.

        Returns:
            32 hex digits.
        """
        ids = sorted({i for step in self.plan.steps for i in step})
        rows = [(i, content_hash(self.rows[i].input_ids, self.rows[i].trained), self.weights.get(i, 1.0)) for i in ids]
        parts = [config.model_dump(mode="json", exclude=_FREE), base, rows, self.plan.steps]
        return hash_parts(canonical_json(part).encode() for part in parts)


def step_weights(plan: TrainPlan, rows: Mapping[str, TokenRow], weights: Mapping[str, float]) -> None:
    """Check that every step of a plan can be trained on.

    Args:
        plan: row ids per step.
        rows: id -> token row.
        weights: id -> weight; 1 where absent.

    Raises:
        DataError: a row is unknown, a weight is negative or not finite, or a step has no weighted trained token.
    """
    for at, ids in enumerate(plan.steps):
        missing = [i for i in ids if i not in rows]
        if missing:
            raise DataError("the plan names a row that is not there", where=f"step {at}", got=repr(missing[0]))
        given = [float(weights.get(i, 1.0)) for i in ids]
        if not all(np.isfinite(w) and w >= 0 for w in given):
            raise DataError(
                "a row's weight is negative or not finite", where=f"step {at}", got=str(given), expected=">= 0"
            )
        if sum(w * rows[i].num_trained for i, w in zip(ids, given, strict=True)) <= 0:
            raise DataError(
                "an optimizer step has nothing to train on",
                where=f"step {at}: rows {', '.join(ids)[:200]}",
                expected="a trained token with a positive weight",
                do="drop rows without weight, or use a larger batch_size",
            )


def make_dataset(plan: TrainPlan, rows: Mapping[str, TokenRow], weights: Mapping[str, float]) -> Dataset:
    """Put the plan's rows, each once, into the data set that the trainer is given.

    Args:
        plan: row ids per step.
        rows: id -> token row.
        weights: id -> weight; 1 where absent.

    Returns:
        Columns ``id``, ``input_ids``, ``labels`` (-100 where no loss is carried) and ``weight``.
    """
    from datasets import Dataset

    step_weights(plan, rows, weights)
    ids = list(dict.fromkeys(i for step in plan.steps for i in step))
    some = [rows[i] for i in ids]
    return Dataset.from_dict(
        {
            "id": ids,
            "input_ids": [row.input_ids.tolist() for row in some],
            "labels": [np.where(row.trained, row.input_ids, -100).tolist() for row in some],
            "weight": [float(weights.get(i, 1.0)) for i in ids],
        }
    )


class PlanSampler(Sampler[list[int]]):
    """Yields the positions of each step's rows, in the plan's order.

    Args:
        plan: row ids per step.
        ids: ids of the data set, in its order.
    """

    def __init__(self, plan: TrainPlan, ids: Sequence[str]) -> None:
        position = {i: n for n, i in enumerate(ids)}
        self.steps = [[position[i] for i in step] for step in plan.steps]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.steps

    def __len__(self) -> int:
        return len(self.steps)


def gather_rows(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate one step: rows stay rows, tensors are made per micro-batch.

    Args:
        features: rows of the data set.

    Returns:
        ``rows`` (token rows) and ``weights``.
    """
    rows = []
    for feature in features:
        ids = np.asarray(feature["input_ids"], np.int32)
        trained = np.asarray(feature["labels"]) != -100
        rows.append(TokenRow(feature["id"], ids, trained, ids.size, RowStatus.OK))
    return {"rows": rows, "weights": [float(feature["weight"]) for feature in features]}


def cut_step(rows: Sequence[TokenRow], tokens_per_micro_batch: int) -> tuple[tuple[int, ...], ...]:
    """Cut a step into micro-batches in the order given.

    Args:
        rows: rows of one step.
        tokens_per_micro_batch: longest row times rows; a longer row goes alone.

    Returns:
        Positions per micro-batch, none lost, consecutive.
    """
    from gradsift.data.batches import plan_batches

    return plan_batches(rows, range(len(rows)), tokens_per_micro_batch)
