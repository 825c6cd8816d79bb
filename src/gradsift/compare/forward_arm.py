"""Signals of a world beside those of the shared pass: prompts, answers alone, hidden states, n-grams (ours).

Prompt losses and hidden states ride on the forward of the shared pass and cost nothing more; answers alone are texts of
their own and are charged.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.data.batches import plan_shards
from gradsift.data.ngrams import importance_weights
from gradsift.data.prompts import prompt_mask
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.taps import Extras, alone_row, hidden_name, start_token
from gradsift.store.shards import ShardResult
from gradsift.train.parts import Cost
from gradsift.train.rescore import frozen, restrict
from gradsift.types import Problem, TokenRow

if TYPE_CHECKING:
    from gradsift.compare.arms import Desk
    from gradsift.methods.base import Method, Needs

TOKENS_PER_BATCH = 2048


def with_forward(desk: Desk, method: Method, problem: Problem) -> tuple[Problem, dict[str, Cost]]:
    """Give a problem the forward and text signals that a method needs beside those of the shared pass.

    Args:
        desk: the shared part; what is measured here is kept there.
        method: the arm's method.
        problem: signals of the shared pass, or none of them.

    Returns:
        The problem, without rows whose signals are not finite, and what measuring cost by part.
    """
    needs, world = method.needs, desk.world
    fields: dict[str, Any] = {}
    if "importance" in needs.signals:
        fields["importance"] = _importance(desk, problem)
    extras = _extras(needs)
    if not extras.names:
        return _replaced(problem, fields), {}
    if extras not in desk.forward:
        desk.forward[extras] = _measure(desk, extras)
    values, cost = desk.forward[extras]
    problem = _replaced(problem, fields)
    lost = [name for name in problem.ids if world.copy_of.get(name, name) not in values]
    problem = restrict(problem, [name for name in problem.ids if name not in set(lost)]) if lost else problem
    rows = [values[world.copy_of.get(name, name)] for name in problem.ids]
    more: dict[str, Any] = {
        name: np.array([row[name] for row in rows]) for name in extras.names if not name.startswith("hidden")
    }
    if extras.prompt:
        counts = {row.id: int(prompt_mask(row).sum()) for row in world.pool}
        more["num_prompt"] = np.array([counts[name] for name in problem.ids], dtype=np.int64)
    if extras.layers:
        states = [np.stack([row[hidden_name(layer)] for row in rows]) for layer in extras.layers]
        more |= {"hidden": np.stack(states, axis=1), "hidden_layers": extras.layers}
    return _replaced(problem, more), {"alone": cost} if extras.alone else {}


def _extras(needs: Needs) -> Extras:
    return Extras("prompt_loss" in needs.signals, "alone_loss" in needs.signals, needs.layers)


def _replaced(problem: Problem, fields: dict[str, Any]) -> Problem:
    from dataclasses import replace

    return replace(problem, **fields) if fields else problem


def _importance(desk: Desk, problem: Problem) -> np.ndarray:
    world = desk.world
    ids = [row.id for row in world.pool]
    if "importance" not in desk.forward:
        found = importance_weights([world.texts[i] for i in ids], [world.texts[row.id] for row in world.target])
        desk.forward["importance"] = dict(zip(ids, found.tolist(), strict=True))
    return np.array([desk.forward["importance"][name] for name in problem.ids])


def _measure(desk: Desk, extras: Extras) -> tuple[dict[str, dict[str, Any]], Cost]:
    """Signals by row id, copies measured once, and the cost of the answers alone."""
    from dataclasses import replace

    world, model = desk.world, desk.world.make_model()
    extras = replace(extras, start_id=start_token(model, world.pad_id))
    rows = [row for row in world.pool if world.copy_of.get(row.id, row.id) == row.id]
    started = time.perf_counter()
    with frozen(model):
        engine = GradientEngine(model, ())
        run = Pass(engine, (), TOKENS_PER_BATCH, world.pad_id, gradients=False, extras=extras)
        with engine:
            shards = [measure_shard(run, [rows[i] for i in part]) for part in plan_shards(rows, range(len(rows)), 512)]
    seconds = time.perf_counter() - started
    own, alone = (sum(n) for n in ([r.num_tokens for r in rows], _alone_tokens(rows, extras)))
    size = sum(p.numel() for p in model.parameters())
    return _by_row(shards), Cost.of(size, forward=alone, backward=0, seconds=seconds * alone / max(1, own + alone))


def _alone_tokens(rows: list[TokenRow], extras: Extras) -> list[int]:
    return [alone_row(row, extras.start_id).num_tokens for row in rows] if extras.alone else []


def _by_row(shards: list[ShardResult]) -> dict[str, dict[str, Any]]:
    return {
        name: {signal: array[k] for signal, array in shard.extra.items()}
        for shard in shards
        for k, name in enumerate(shard.ids)
        if shard.status[k].usable
    }
