"""The navigator as an environment: train a model on the rows of each decision and measure the held-out losses (ours).

It is the truth that the simulator of ``policy`` is calibrated and judged on. Every roll-out starts at the same weights and
optimizer state, so equal schedules give equal losses, on the CPU to the last bit.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from gradsift.errors import ConfigError
from gradsift.manifest import canonical_json, hash_parts
from gradsift.policy.calibration import Rollout
from gradsift.policy.episodes import NO_ROW, Losses
from gradsift.store.records import RecordStore
from gradsift.store.spec import content_hash
from gradsift.train.held_out import DevLosses, DevSets, measure_dev
from gradsift.train.loop import Loop
from gradsift.train.parts import Cost, trainable
from gradsift.types import TokenRow

VERSION = 1


def split_rows(rows: Sequence[int], updates: int, rows_per_decision: int) -> tuple[tuple[int, ...], ...]:
    """Deal the rows of a decision to optimizer steps, in order and as evenly as can be.

    A short decision takes fewer steps in proportion, rounded up, so that its steps are not smaller than they must be.

    Args:
        rows: at most ``rows_per_decision`` rows.
        updates: steps of a full decision.
        rows_per_decision: rows of a full decision.

    Returns:
        Rows per step, none empty; nothing for no rows.
    """
    num = math.ceil(len(rows) * updates / rows_per_decision)
    if not num:
        return ()
    return tuple(tuple(int(i) for i in part) for part in np.array_split(np.asarray(rows, dtype=np.int64), num))


@dataclass(frozen=True)
class Rolled:
    """A finished roll-out of the navigator.

    Args:
        rollout: rows and losses of T decisions.
        train: cost of training.
        dev: cost of the measurements.
    """

    rollout: Rollout
    train: Cost
    dev: Cost


@dataclass(frozen=True)
class _Place:
    """What a later step of a copy depends on."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    losses: list[float]


class LoopDynamics:
    """``policy.episodes.Dynamics`` on a model in training; copies are trained one after the other, each from where it was.

    Args:
        loop: at the weights and optimizer state that every roll-out starts from; without penalties and hook.
        pool: rows by their number.
        dev: held-out rows.
        rows_per_decision: rows of a full decision.
        updates: optimizer steps of a full decision; a short one takes fewer (:func:`split_rows`).

    Raises:
        ConfigError: a decision has fewer rows than steps.
    """

    def __init__(
        self, loop: Loop, pool: Sequence[TokenRow], dev: DevSets, *, rows_per_decision: int, updates: int = 1
    ) -> None:
        if loop.penalties or loop.hook is not None:
            raise ValueError("a roll-out keeps no state of penalties and hooks")
        check_split(updates, rows_per_decision)
        self.loop, self.pool, self.dev = loop, tuple(pool), dev
        self.updates, self.rows_per_decision = updates, rows_per_decision
        self.sources = tuple(dev.protect)
        self.train_cost, self.dev_cost = Cost(), Cost()
        self.tick: Callable[[], None] = lambda: None  # called after every decision; raises to stop
        self._start = self._leave()
        self._copies: list[_Place] = []
        self._at: int | None = None

    def reset(self, num: int = 1) -> Losses:
        """Put ``num`` copies to the start.

        Args:
            num: E; with more than one, weights are exchanged between their steps.

        Returns:
            The losses there.
        """
        self._copies, self._at = [self._start] * num, None
        self._enter(0)
        start = self._measure()
        self._now = [start] * num
        return start.losses(num)

    def step(self, rows: Int[np.ndarray, "E b"]) -> Losses:
        """Train each copy on its rows and measure it.

        Args:
            rows: row numbers; ``NO_ROW`` fills up, and a copy without any row stays as it is and is not measured anew.

        Returns:
            The losses after it.
        """
        for e, line in enumerate(rows):
            some = [int(i) for i in line if i != NO_ROW]
            if not some:
                continue
            self._enter(e)
            before = self.loop.cost
            for part in split_rows(some, self.updates, self.rows_per_decision):
                self.loop.step([self.pool[i] for i in part])
            self.train_cost += _since(before, self.loop.cost)
            self._now[e] = self._measure()
        self.tick()
        return Losses(np.array([one.target for one in self._now]),
                      np.array([one.protect for one in self._now], dtype=np.float64).reshape(len(self._now), -1))  # fmt: skip

    def fields(self) -> dict[str, Any]:
        """Name everything that the losses of a schedule depend on.

        Returns:
            JSON values: weights and optimizer at the start, settings, content of the pool and of the held-out rows.
        """
        p = self.loop.parameters[0]
        moments = {str(k): _hash_tensors(_tensors(v)) for k, v in self._start.optimizer["state"].items()}
        frozen = {
            name: q.detach() for name, q in self.loop.model.state_dict().items() if name not in self._start.weights
        }
        return {
            "version": VERSION,
            "weights": _hash_tensors(self._start.weights),
            "frozen": _hash_tensors(frozen),
            "optimizer": moments,
            "num_steps": len(self._start.losses),
            "loop": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.loop.config).items()},
            "device": p.device.type,
            "pad_id": self.loop.pad_id,
            "rows_per_decision": self.rows_per_decision,
            "updates": self.updates,
            "pool": [content_hash(row.input_ids, row.trained) for row in self.pool],
            "dev": self.dev.hashes(),
        }

    def _measure(self) -> DevLosses:
        found = measure_dev(self.loop.model, self.dev)
        self.dev_cost += found.cost
        return found

    def _enter(self, e: int) -> None:
        """Bring copy ``e`` into the loop, and keep the one that was in it."""
        if self._at == e:
            return
        if self._at is not None:
            self._copies[self._at] = self._leave()
        place, self._at = self._copies[e], e
        with torch.no_grad():
            for name, p in trainable(self.loop.model):
                p.copy_(place.weights[name])
        # load_state_dict keeps the tensors it is given, so the next step would write into what is kept
        self.loop.optimizer.load_state_dict(copy.deepcopy(place.optimizer))
        self.loop.losses = list(place.losses)

    def _leave(self) -> _Place:
        weights = {name: p.detach().clone() for name, p in trainable(self.loop.model)}
        return _Place(weights, copy.deepcopy(self.loop.optimizer.state_dict()), list(self.loop.losses))


def check_split(updates: int, rows_per_decision: int) -> None:
    """Refuse decisions that have fewer rows than optimizer steps.

    Args:
        updates: steps of a full decision.
        rows_per_decision: its rows.

    Raises:
        ConfigError: there are not so many.
    """
    if not 1 <= updates <= rows_per_decision:
        raise ConfigError(
            "a decision has fewer rows than optimizer steps", where="updates",
            got=f"{updates} steps, {rows_per_decision} rows", expected="1 <= steps <= rows",
            do="lower the steps or raise the rows of a decision",
        )  # fmt: skip


def roll(dynamics: LoopDynamics, rows: Int[np.ndarray, "T b"], name: str = "") -> Rolled:
    """Train one copy on a schedule.

    Args:
        dynamics: the navigator.
        rows: row numbers of T >= 1 decisions; ``NO_ROW`` fills up.
        name: what is played.

    Returns:
        The losses at the start and after every decision.
    """
    train, dev = dynamics.train_cost, dynamics.dev_cost
    seen = [dynamics.reset(1), *(dynamics.step(line[None]) for line in rows)]
    target = np.concatenate([one.target for one in seen])
    protect = np.concatenate([one.protect for one in seen])
    return _rolled(name, rows, (target, protect), (_since(train, dynamics.train_cost), _since(dev, dynamics.dev_cost)))


def _rolled(
    name: str, rows: Int[np.ndarray, "T b"], losses: tuple[np.ndarray, np.ndarray], costs: tuple[Cost, Cost]
) -> Rolled:
    train, dev = costs
    rollout = Rollout(name, rows, *losses, tokens=train.backward_tokens, seconds=train.seconds + dev.seconds)
    return Rolled(rollout, train, dev)


class RolloutStore:
    """Finished roll-outs on disk: a killed run repeats at most the one it was in.

    Args:
        root: parent folder; the roll-outs stand in a folder named by the key of :meth:`LoopDynamics.fields`.
        dynamics: the navigator.
    """

    def __init__(self, root: Path, dynamics: LoopDynamics) -> None:
        self.dynamics = dynamics
        self.records = RecordStore.of(root, dynamics.fields(), "roll-out")
        self.num_rolled = self.num_read = 0

    def roll(self, rows: Int[np.ndarray, "T b"], name: str = "") -> Rolled:
        """Read a roll-out back, or train it and keep it.

        Args:
            rows: row numbers of T >= 1 decisions; ``NO_ROW`` fills up.
            name: what is played; the file is found by its rows.

        Returns:
            The roll-out; its costs are those of when it was trained.

        Raises:
            StoreError: the bytes on disk are not those that were written.
        """
        plan = [[int(i) for i in line if i != NO_ROW] for line in rows]
        place = f"rollout-{hash_parts([canonical_json(plan).encode('ascii')], digest_size=8)}"
        kept = self.records.read(place)
        if kept is not None:
            self.num_read += 1
            protect = np.array(kept["protect"], dtype=np.float64).reshape(len(plan) + 1, len(self.dynamics.sources))
            costs = Cost(**kept["train"]), Cost(**kept["dev"])
            return _rolled(name, rows, (np.array(kept["target"], dtype=np.float64), protect), costs)
        done = roll(self.dynamics, rows, name)
        self.num_rolled += 1
        self.records.write(place, {"rows": plan, "target": done.rollout.target.tolist(),
                                   "protect": done.rollout.protect.tolist(),
                                   "train": asdict(done.train), "dev": asdict(done.dev)})  # fmt: skip
        return done


def _since(before: Cost, after: Cost) -> Cost:
    return Cost(*(b - a for a, b in zip(asdict(before).values(), asdict(after).values(), strict=True)))


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(value) for name, value in state.items()}


def _hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\x1e".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
