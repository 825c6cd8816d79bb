"""Arms of mixture methods: the world's model is the proxy, trained in rounds and charged in full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from gradsift.compare.world import World
from gradsift.geometry.trajectory import Domains, Plan, Rule, Trajectory, play
from gradsift.methods.base import make_method, methods
from gradsift.seeds import stream
from gradsift.train.parts import Cost
from gradsift.train.proxy import ModelBench
from gradsift.train.proxy_rows import ProxyConfig, ProxyRows, Reference, make_loop, task_rows, train_reference
from gradsift.types import Budget, TokenRow

if TYPE_CHECKING:
    from gradsift.compare.arms import ArmSpec, Choice, Desk


@dataclass(frozen=True)
class ProxySettings:
    """How the world's model is trained as a proxy.

    Args:
        lr: peak learning rate of AdamW.
        batch_size: rows per optimizer step of a sampled round.
        schedule: over the whole run.
        held_share: share of every task's rows that gives its loss and no gradient.
        held_rows: at most so many.
    """

    lr: Annotated[float, Field(gt=0)] = 5e-4
    batch_size: Annotated[int, Field(ge=1)] = 16
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    held_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    held_rows: Annotated[int, Field(ge=2)] = 200


@dataclass
class WorldProxy:
    """:class:`gradsift.geometry.trajectory.Proxy` in a world.

    Args:
        world: starting weights, anchors and target.
        rows: the eligible rows in id order.
        settings: of the training.
    """

    world: World
    rows: tuple[TokenRow, ...]
    settings: ProxySettings
    cost: Cost = field(default_factory=Cost)
    references: dict[Plan, Reference] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The target and every anchor."""
        return ("target", *self.world.anchors)

    def run(self, rule: Rule, plan: Plan, domains: Domains, name: str) -> Trajectory:
        """Train a fresh copy of the world's model, steered by a rule.

        Args:
            rule: whose weights it follows.
            plan: rounds and rows.
            domains: the eligible rows by domain.
            name: of the run.

        Returns:
            All rounds.
        """
        world, s = self.world, self.settings
        config = ProxyConfig(s.lr, s.batch_size, s.schedule, seed=world.seed)
        sets = {"target": world.target, **world.anchors}
        draws = stream(world.seed, "proxy")
        probes, held = task_rows({t: sets[t] for t in domains.tasks}, s.held_share, s.held_rows, draws.child("held"))
        rows = ProxyRows(self.rows, probes, held, world.pad_id)
        if "excess" in plan.measures and plan not in self.references:
            loop = make_loop(world.make_model(), config, plan, world.pad_id)
            self.references[plan] = train_reference(loop, rows, plan, domains, draws)
            self.cost += self.references[plan].cost
        bench = ModelBench(
            lambda: make_loop(world.make_model(), config, plan, world.pad_id), rows, config, plan, domains, draws,
            reference=self.references.get(plan),
        )  # fmt: skip
        try:
            return play(rule, plan, domains, bench)
        finally:
            self.cost += bench.cost["train"] + bench.cost["probe"]


def is_proxied(arm: ArmSpec) -> bool:
    """Tell whether an arm's method steers a proxy run.

    Args:
        arm: any arm.

    Returns:
        Whether its method is registered and needs one.
    """
    kind = methods().get(arm.method)
    return kind is not None and bool(kind().needs.proxy)


def choose_by_proxy(desk: Desk, arm: ArmSpec, count: int) -> Choice:
    """Choose an arm's rows with a mixture method.

    Args:
        desk: the seed's shared part.
        arm: the arm; ``settings.proxy`` holds the fields of :class:`ProxySettings`, the others are the method's.
        count: how many rows.

    Returns:
        Rows in the mixture's shares, and what the pass and all proxy runs cost.
    """
    from gradsift.compare.arms import Choice, build_settings

    given = dict(arm.settings)
    settings = build_settings(ProxySettings, given.pop("proxy", {}), f"arm {arm.name}, proxy")
    method = make_method(arm.method, given)
    problem, cost = desk.start
    if method.needs.cost_class != "gradient":
        cost = Cost(cost.flops / 3, cost.forward_tokens, 0, cost.seconds / 3)
    proxy = WorldProxy(desk.world, tuple(desk.rows[i] for i in problem.ids), settings)
    selection = method.select(replace(problem, proxy=proxy), Budget(rows=count), desk.stream(f"select/{arm.method}"))
    lost = len(desk.world.pool) - problem.size
    said = (f"{lost} rows have no finite signal and cannot be chosen",) if lost else ()
    return Choice(
        tuple(selection.ids),
        cost={"collect": cost, "proxy": proxy.cost},
        notes=said + tuple(note.text for note in selection.notes),
        extra=_figures(selection.mixture or {}),
    )


def _figures(mixture: Mapping[str, float]) -> dict[str, float]:
    """What a cell keeps of the mixture."""
    return {f"weight_{name}": float(w) for name, w in mixture.items()} | {
        "largest_weight": float(np.max([*mixture.values()]))
    }
