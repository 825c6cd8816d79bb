"""The policy that online selection asks, and what rescores its clusters, from a finished run (ours)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradsift.pipeline.measure import measured_rows, with_adapter
from gradsift.pipeline.online_ready import Ready
from gradsift.pipeline.progress import Clock
from gradsift.policy.bandits import EpsilonGreedy, Exp3, Thompson
from gradsift.policy.episodes import Terms
from gradsift.policy.plan import program_of, solve
from gradsift.policy.planned import DualPlan, PricedRounds
from gradsift.policy.play import Policy
from gradsift.policy.simple import SizeProportional, Uniform
from gradsift.train.refresh import Rescorer
from gradsift.train.rescore import RescoreConfig

BANDITS = {"epsilon_greedy": EpsilonGreedy, "exp3": Exp3, "thompson": Thompson}


def make_policy(ready: Ready, terms: Terms) -> Policy:
    """Build the policy that was asked for, in the state it has before any decision.

    Bandits keep the linear program's prices as multipliers: within one episode they could not learn them.

    Args:
        ready: clusters and effects.
        terms: rows per decision, budget and limits.

    Returns:
        The policy.
    """
    name, effects, kept = ready.config.online.policy, ready.effects, ready.offer.kept
    if name in BANDITS:
        prices = solve(program_of(ready.table, terms, effects)).prices
        return BANDITS[name](multipliers=prices * np.abs(terms.limits))
    if name == "ogs_dual_clusters":
        return DualPlan(effects)
    if name == "ogs_dual_priced":
        return PricedRounds(effects)
    if name == "ppo_lagrangian":
        assert kept is not None
        assert kept.policy is not None
        return kept.policy
    return Uniform() if name == "uniform" else SizeProportional()


def make_refresh(ready: Ready, clock: Clock) -> Rescorer | None:
    """Make what measures the clusters' statistics anew.

    Args:
        ready: rows of the directions and of the pool.
        clock: timing and progress.

    Returns:
        The rescorer, or None where nothing is rescored.
    """
    config, offer, prepared = ready.config, ready.offer, ready.offer.prepared
    if not config.online.rescore_every:
        return None
    collect, seed = offer.recipe.collect, offer.recipe.seed
    copies = prepared.pool.pool.copies
    names = [source.name for source in prepared.anchors]

    def asked(parameters: str | tuple[str, ...]) -> RescoreConfig:
        return RescoreConfig(parameters, collect.sketch_dim, True, collect.tokens_per_batch, seed)

    if config.online.rescore_with == "model":
        return Rescorer(ready.rows, {n: ready.anchors[n] for n in names}, ready.anchors["target"],
                        asked("lora" if config.mode == "lora" else "all"), ready.material.pad_id, copies)  # fmt: skip
    from gradsift.models.load import load_navigator

    navigator = load_navigator(
        prepared.resolved, dtype=offer.recipe.navigator.dtype, device=offer.recipe.navigator.device
    )
    model: Any = navigator.model
    if offer.recipe.navigator.parameters == "lora":
        model, _ = with_adapter(prepared, navigator, measured_rows(prepared), offer.folder, clock)
    assert prepared.target is not None
    return Rescorer(offer.rows, {s.name: s.usable for s in prepared.anchors}, prepared.target.usable,
                    asked(offer.recipe.navigator.parameters), prepared.pad_id, copies, navigator=model)  # fmt: skip
