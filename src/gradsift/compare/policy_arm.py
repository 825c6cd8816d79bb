"""The arm ``ogs``: a policy over clusters of pool and replay rows, learned and confirmed on roll-outs of the world's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from jaxtyping import Int
from pydantic import Field

from gradsift.compare.world import World
from gradsift.errors import ConfigError
from gradsift.methods.base import make_method
from gradsift.policy.calibration import Rollout
from gradsift.seeds import stream
from gradsift.train.held_out import DevSets
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.parts import Cost
from gradsift.train.rescore import rescore
from gradsift.train.rollout import LoopDynamics, roll
from gradsift.types import Budget, TokenRow

if TYPE_CHECKING:
    from gradsift.compare.arms import ArmSpec, Choice, Desk

GENERAL = "general"
SKETCH_DIM = 1021


@dataclass(frozen=True)
class RolloutSettings:
    """How the world's model is trained in a roll-out.

    Args:
        lr: AdamW learning rate.
        updates: optimizer steps per decision.
        dev_share: share of every anchor's and the target's rows that rewards and costs are measured on; the others give
            the directions.
        dev_rows: at most so many of each.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-4
    updates: Annotated[int, Field(ge=1)] = 4
    dev_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    dev_rows: Annotated[int, Field(ge=2)] = 64


@dataclass
class WorldLearner:
    """:class:`gradsift.policy.schedule.Learner` in a world; what was played is kept for the cell.

    Args:
        world: starting weights.
        rows: the pool's and the general rows in id order.
        dev: held-out rows.
        settings: of the training.
    """

    world: World
    rows: tuple[TokenRow, ...]
    dev: DevSets
    settings: RolloutSettings
    done: dict[bytes, Rollout] = field(default_factory=dict)
    states: dict[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def start(self, rows_per_decision: int) -> None:
        """Make the learner.

        Args:
            rows_per_decision: rows of a full decision.
        """
        config = LoopConfig(lr=self.settings.lr, total_steps=1, seed=self.world.seed)
        loop = Loop(self.world.make_model(), config, self.world.pad_id)
        updates = min(self.settings.updates, rows_per_decision)
        self.dynamics = LoopDynamics(loop, self.rows, self.dev, rows_per_decision=rows_per_decision, updates=updates)

    def roll(self, rows: Int[np.ndarray, "T b"], name: str) -> Rollout:
        """Train on a schedule, once.

        Args:
            rows: row numbers, ``NO_ROW`` where there is none.
            name: what is played.

        Returns:
            The losses.
        """
        key = rows.tobytes()
        if key not in self.done:
            self.done[key] = roll(self.dynamics, rows, name).rollout
        return replace(self.done[key], name=name)

    def load(self, name: str) -> Mapping[str, np.ndarray] | None:
        """Give a state back.

        Args:
            name: of the state.

        Returns:
            Its arrays, or None.
        """
        return self.states.get(name)

    def save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a state.

        Args:
            name: of the state.
            arrays: what it consists of.
        """
        self.states[name] = arrays

    @property
    def cost(self) -> Cost:
        """Training and measuring of all roll-outs."""
        return self.dynamics.train_cost + self.dynamics.dev_cost


def choose_by_policy(desk: Desk, arm: ArmSpec, count: int) -> Choice:
    """Choose an arm's rows with ``ogs``; the world's replay rows stand in the pool as general rows.

    Args:
        desk: the seed's shared part.
        arm: the arm; ``settings.rollout`` holds the fields of :class:`RolloutSettings`, the others are the method's.
        count: how many rows.

    Returns:
        Rows in the list's order, and what choosing them cost.
    """
    from gradsift.compare.arms import Choice, build_settings, rescoring

    world = desk.world
    given = dict(arm.settings)
    settings = build_settings(RolloutSettings, given.pop("rollout", {}), f"arm {arm.name}, rollout")
    method = make_method(arm.method, given)
    if not world.replay:
        raise ConfigError("ogs in a comparison takes replay rows as general rows", where=world.name, got="none")
    anchors, held = {}, {}
    for name, rows in world.anchors.items():
        anchors[name], held[name] = _split(rows, settings, world.seed, name)
    target, held_target = _split(world.target, settings, world.seed, "target")
    model = world.make_model()
    got = rescore(
        model,
        (*world.pool, *world.replay),
        anchors,
        target,
        replace(rescoring(model, world.seed), keep_sketch=True, sketch_dim=SKETCH_DIM),
        pad_id=world.pad_id,
        copy_of=world.copy_of,
        sources={**world.sources, **{row.id: GENERAL for row in world.replay}},
    )
    rows = {row.id: row for row in (*world.pool, *world.replay)}
    learner = WorldLearner(
        world, tuple(rows[i] for i in got.problem.ids), DevSets(held_target, held, world.pad_id), settings
    )
    problem = replace(got.problem, general=(GENERAL,), learner=learner)
    selection = method.select(problem, Budget(rows=count), desk.stream("select/ogs"))
    lost = f"{len(got.dropped)} rows have no finite signal and cannot be chosen" if got.dropped else ""
    notes = tuple(note.text for note in selection.notes)
    return Choice(
        tuple(selection.ids),
        cost={"collect": got.cost, "rollouts": learner.cost},
        notes=((lost,) if lost else ()) + notes,
        extra=_figures(selection.details or {}),
    )


def _split(
    rows: tuple[TokenRow, ...] | Any, settings: RolloutSettings, seed: int, name: str
) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    """Rows that give a direction, and rows that are held out."""
    draws = stream(seed, f"compare/dev/{name}").uniform([row.id for row in rows])
    order = [rows[k] for k in np.argsort(draws, kind="stable")]
    count = min(settings.dev_rows, round(settings.dev_share * len(order)))
    if count < 2 or len(order) - count < 2:
        raise ConfigError(
            f"{name} has too few rows to hold some out", where="rollout.dev_share",
            got=f"{len(order)} rows, of which {count} would be held out",
            expected="at least 2 held out and 2 for the direction", do="give the world more rows of it",
        )  # fmt: skip
    return tuple(order[count:]), tuple(order[:count])


def _figures(details: Mapping[str, Any]) -> dict[str, float]:
    """What a cell keeps of the contest: per policy its real gain, and whether it was returned."""
    contest = details.get("contest", ())
    out = {f"gain_{one['policy']}": float(np.mean(one["gain"])) for one in contest if one["gain"]}
    simulator = details.get("simulator", {})
    return out | {
        "simulator_accepted": float(simulator.get("accepted", False)),
        "simulator_horizon": float(simulator.get("horizon", 0)),
        "policy_learned": float(details.get("policy") == "ppo_lagrangian"),
        "policy_feasible": float(details.get("feasible", False)),
    }
