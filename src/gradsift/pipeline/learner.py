"""The navigator in training, for methods that ask what a schedule of rows would do (the stage ``roll``).

Roll-outs start at the weights that measured the pool. Every finished one stands in the run folder, and so does the state of
a policy in training: a stopped run goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.pipeline.kept_state import load_state, save_state
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.progress import Clock
from gradsift.pipeline.trainable import trainable_navigator
from gradsift.policy.calibration import Rollout
from gradsift.train.held_out import DevSets
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.parts import Cost
from gradsift.train.rollout import LoopDynamics, Rolled, RolloutStore
from gradsift.types import TokenRow

COST = "learner/cost"


class NavigatorLearner:
    """:class:`gradsift.policy.schedule.Learner` of a run.

    Args:
        prepared: the run's inputs, with held-out rows.
        measured: the pass over the pool.
        rows: the eligible rows in id order; their places are the row numbers of schedules.
        out: the run folder.
        clock: timing and progress.
    """

    def __init__(
        self, prepared: Prepared, measured: Measurement, rows: Sequence[TokenRow], out: Path, clock: Clock
    ) -> None:
        self.prepared, self.measured, self.rows, self.out, self.clock = prepared, measured, tuple(rows), out, clock
        self.rolled: dict[bytes, Rolled] = {}
        self._batch_rows = prepared.recipe.rollout.batch_size
        self._width = 0
        self._rolled_now = self._earlier = np.zeros((2, len(fields(Cost))))  # training, measuring

    def start(self, rows_per_decision: int) -> None:
        """Say how many rows a decision has, before the first roll-out.

        Args:
            rows_per_decision: at least 1.
        """
        self._width = rows_per_decision

    @cached_property
    def dynamics(self) -> LoopDynamics:
        """The navigator as an environment."""
        recipe, prepared = self.prepared.recipe, self.prepared
        model = trainable_navigator(prepared, self.measured, (self.out, self.clock))
        config = LoopConfig(
            lr=recipe.rollout.lr, total_steps=1, seed=recipe.seed, tokens_per_batch=recipe.collect.tokens_per_batch
        )
        sets = {source.name: tuple(source.tokens) for source in prepared.dev}
        target = sets.pop("target")
        dev = DevSets(target, sets, prepared.pad_id, recipe.collect.tokens_per_batch)
        updates = max(1, -(-self._width // self._batch_rows))
        made = LoopDynamics(
            Loop(model, config, prepared.pad_id), self.rows, dev, rows_per_decision=self._width, updates=updates
        )
        made.tick = lambda: self.clock.progress.advance(0, 0)  # a stop signal is noticed after every decision
        return made

    @cached_property
    def _store(self) -> RolloutStore:
        return RolloutStore(self.out / "rollouts", self.dynamics)

    def roll(self, rows: Int[np.ndarray, "T b"], name: str) -> Rollout:
        """Train on a schedule, or read the roll-out back.

        Args:
            rows: row numbers, ``NO_ROW`` where there is none.
            name: what is played.

        Returns:
            The losses.
        """
        before = self._store.num_rolled
        with self.clock.stage("roll", told=False):
            done = self._store.roll(rows, name)
        self.rolled[rows.tobytes()] = done
        if self._store.num_rolled > before:  # one that was read back cost nothing now
            self._rolled_now = self._rolled_now + _numbers(done.train, done.dev)
            tokens = done.train.forward_tokens + done.dev.forward_tokens
            self.clock.tokens["roll"] = self.clock.tokens.get("roll", 0) + tokens
            self.clock.progress.say(f"roll-out {len(self.rolled)}, {_told(done.rollout, self.dynamics.sources)}")
        self.clock.progress.advance(0, 0)  # the stage is not announced, so this is where a stop signal is noticed
        return done.rollout

    def load(self, name: str) -> Mapping[str, np.ndarray] | None:
        """Read the state of a training back.

        Args:
            name: of the state.

        Returns:
            Its arrays, those of the save before where the last one is damaged, or None where there is none.
        """
        arrays, remark = load_state(self._place(name))
        if remark:
            self.clock.progress.say(
                f"{remark}; the training goes on from {'its start' if arrays is None else 'before'}"
            )
        if arrays is None:
            return None
        self._earlier = arrays.pop(COST)
        return arrays

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the state of a training, whole or not at all.

        Args:
            name: of the state.
            arrays: what it consists of.
        """
        save_state(self._place(name), {**arrays, COST: self._beside()})

    def _place(self, name: str) -> Path:
        return self._store.records.folder / f"{name}.npz"

    def _beside(self) -> Float[np.ndarray, "2 F"]:
        """What training a policy on the navigator itself took, in a stopped run as well: no roll-out is kept of it."""
        return self._earlier + _numbers(self.dynamics.train_cost, self.dynamics.dev_cost) - self._rolled_now

    def summary(self) -> dict[str, Any]:
        """What the roll-outs took, those read back and a policy's training on the navigator included.

        Returns:
            The manifest's ``rollouts`` section.
        """
        runs = list(self.rolled.values())
        beside = [_cost(line) for line in self._beside()]
        train = sum((one.train for one in runs), beside[0])
        dev = sum((one.dev for one in runs), beside[1])
        return {
            "folder": f"rollouts/{self._store.records.folder.name}",
            "num_rollouts": len(runs),
            "num_decisions": sum(len(one.rollout.rows) for one in runs),
            "train_tokens": train.forward_tokens,
            "dev_tokens": dev.forward_tokens,
            "policy_tokens": sum(cost.forward_tokens for cost in beside),
            "flops": train.flops + dev.flops,
            "seconds": train.seconds + dev.seconds,
            "dev_rows": {source.name: len(source.tokens) for source in self.prepared.dev},
        }


def _numbers(*costs: Cost) -> Float[np.ndarray, "n F"]:
    return np.array([astuple(cost) for cost in costs], dtype=np.float64)


def _cost(line: Float[np.ndarray, " F"]) -> Cost:
    flops, forward, backward, seconds = line.tolist()
    return Cost(flops, round(forward), round(backward), seconds)


def _told(done: Rollout, sources: Sequence[str]) -> str:
    """What a roll-out did, in a line."""
    change = done.losses[-1] - done.losses[0]
    parts = [
        f"{name} {value:+.3f}" for name, value in zip(("target", *sources), (change[-1], *change[:-1]), strict=True)
    ]
    return f"{done.name}: {done.seconds:.1f} s, {', '.join(parts)} nats"
