"""What a proxy run trains on: settings, rows dealt to rounds by keyed draws, and the reference run (ours)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import nn

from gradsift.errors import ConfigError, DataError
from gradsift.geometry.trajectory import Domains, Plan
from gradsift.seeds import Stream
from gradsift.store.spec import content_hash
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.masking import measure_nats
from gradsift.train.parts import Cost
from gradsift.types import TokenRow


@dataclass(frozen=True)
class ProxyConfig:
    """How the proxy is trained.

    Args:
        lr: peak learning rate of AdamW.
        batch_size: rows per optimizer step of a sampled round.
        schedule: ``constant``, ``linear`` or ``cosine`` to 0 over the whole run.
        tokens_per_batch: longest row times rows of a micro-batch.
        max_grad_norm: clipping of a step's gradient; 0 for none.
        seed: of the run.
    """

    lr: float = 5e-4
    batch_size: int = 8
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    tokens_per_batch: int = 2048
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class ProxyRows:
    """What a proxy run reads.

    Args:
        pool: N eligible rows in id order.
        probes: task -> rows that give its gradient.
        held: task -> rows that give its loss; none of them gives a gradient.
        pad_id: padding token.
    """

    pool: tuple[TokenRow, ...]
    probes: Mapping[str, tuple[TokenRow, ...]]
    held: Mapping[str, tuple[TokenRow, ...]]
    pad_id: int


@dataclass(frozen=True)
class Reference:
    """Token losses under the reference.

    Args:
        nats: row id -> float32 [T-1], 0 where a token carries no loss.
        cost: of training it and of the one forward pass.
    """

    nats: Mapping[str, Float[np.ndarray, " S"]]
    cost: Cost


def deal(ids: Sequence[str], first: int, count: int, stream: Stream) -> list[int]:
    """Take rows out of an endless sequence of epochs, each in a keyed order of its own.

    Args:
        ids: n ids, rising.
        first: position in the sequence.
        count: how many.
        stream: of the order.

    Returns:
        Row places, none twice within an epoch.
    """
    out: list[int] = []
    for epoch in range(first // len(ids), (first + count - 1) // len(ids) + 1 if count else 0):
        order = np.argsort(stream.child(f"epoch/{epoch}").uniform(ids), kind="stable")
        start = epoch * len(ids)
        out += order[max(first - start, 0) : first + count - start].tolist()
    return out


def make_loop(model: nn.Module, config: ProxyConfig, plan: Plan, pad_id: int) -> Loop:
    """Put a model into training for a whole proxy run.

    Args:
        model: at its starting weights.
        config: optimizer and schedule.
        plan: how many steps there will be.
        pad_id: padding token.

    Returns:
        The loop before its first step.
    """
    return Loop(
        model,
        LoopConfig(
            lr=config.lr,
            total_steps=plan.num_rounds * updates(config, plan),
            schedule=config.schedule,
            max_grad_norm=config.max_grad_norm,
            tokens_per_batch=config.tokens_per_batch,
            seed=config.seed,
        ),
        pad_id,
    )


def updates(config: ProxyConfig, plan: Plan) -> int:
    """Count the optimizer steps of a round."""
    return max(1, -(-plan.rows_per_round // config.batch_size)) if plan.training == "sampled" else 1


def train_reference(
    loop: Loop, rows: ProxyRows, plan: Plan, domains: Domains, stream: Stream, tick: Callable[[], None] = lambda: None
) -> Reference:
    """Train the reference on as many rows and steps as the proxy, drawn from the whole pool, and measure the proxy's rows.

    Args:
        loop: from :func:`make_loop`; its model is trained in place.
        rows: the pool.
        plan: of the proxy run.
        domains: the pool in domains.
        stream: of the draws.
        tick: called after every step; raises to stop.

    Returns:
        Token losses of every row that the proxy run will measure.
    """
    started, ids = time.perf_counter(), [row.id for row in rows.pool]
    before = loop.cost
    width = int(np.minimum(domains.sizes, plan.rows_per_domain).sum())
    for at in range(plan.num_rounds):
        loop.step([rows.pool[i] for i in deal(ids, at * width, width, stream.child("reference"))])
        tick()
    places = {i for at in range(plan.num_rounds) for some in round_rows(rows, plan, domains, stream, at) for i in some}
    found = measure_nats(
        loop.model, [rows.pool[i] for i in sorted(places)], rows.pad_id, loop.config.tokens_per_batch or 4096
    )
    trained = Cost(*(b - a for a, b in zip(asdict(before).values(), asdict(loop.cost).values(), strict=True)))
    return Reference(found.nats, replace(trained + found.cost, seconds=time.perf_counter() - started))


def round_rows(rows: ProxyRows, plan: Plan, domains: Domains, stream: Stream, at: int) -> list[list[int]]:
    """List the rows of each domain that a round measures.

    Args:
        rows: the pool.
        plan: how many of a domain.
        domains: the pool in domains.
        stream: of the draws; a domain's draw is keyed by its name.
        at: the round.

    Returns:
        k lists of row numbers.
    """
    out = []
    for d, name in enumerate(domains.names):
        mine = np.flatnonzero(domains.of_row == d)
        count = min(len(mine), plan.rows_per_domain)
        dealt = deal([rows.pool[i].id for i in mine], at * count, count, stream.child(f"probe/{name}"))
        out.append([int(mine[i]) for i in dealt])
    return out


def split_task(
    name: str, rows: Sequence[TokenRow], share: float, most: int, stream: Stream
) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    """Part a task's rows into those that give its gradient and those that give its loss.

    Args:
        name: of the task.
        rows: its rows; rows of equal tokens count once.
        share: of them that give the loss.
        most: rows that give the loss, at most.
        stream: of the draw, keyed by id.

    Returns:
        Gradient rows and loss rows in id order, no content in both.

    Raises:
        ConfigError: fewer than two rows would be left on either side.
    """
    by_content = {content_hash(row.input_ids, row.trained): row for row in sorted(rows, key=lambda row: row.id)}
    one_each = sorted(by_content.values(), key=lambda row: row.id)
    order = np.argsort(stream.child(name).uniform([row.id for row in one_each]), kind="stable")
    count = min(most, round(share * len(one_each)))
    if count < 2 or len(one_each) - count < 2:
        raise ConfigError(
            f"{name} has too few rows to hold some out",
            where="--target" if name == "target" else f"--anchor {name}",
            got=f"{len(one_each)} different rows, of which {count} would give the loss",
            expected="at least 2 for the loss and 2 for the gradient",
            do="give more rows (4 are the least), or --set proxy.held_share, which says how many give the loss",
        )
    held, probes = (
        sorted((one_each[i] for i in some), key=lambda row: row.id) for some in (order[:count], order[count:])
    )
    return tuple(probes), tuple(held)


def task_rows(
    tasks: Mapping[str, Sequence[TokenRow]], share: float, most: int, stream: Stream
) -> tuple[dict[str, tuple[TokenRow, ...]], dict[str, tuple[TokenRow, ...]]]:
    """Part every task's rows, refusing tasks that share content.

    Args:
        tasks: task -> rows.
        share: as for :func:`split_task`.
        most: as for :func:`split_task`.
        stream: of the draws.

    Returns:
        task -> gradient rows, and task -> loss rows.

    Raises:
        DataError: a row's content stands in two tasks.
    """
    owner: dict[str, tuple[str, str]] = {}
    shared = []
    for name, rows in tasks.items():
        for row in rows:
            first = owner.setdefault(content_hash(row.input_ids, row.trained), (name, row.id))
            if first[0] != name:
                shared.append((row.id, first[0], name))
    if shared:
        raise DataError(
            "tasks share rows, so that one's loss would be measured on another's gradient rows",
            where=f"{shared[0][1]} and {shared[0][2]}",
            got=f"{len(shared)} rows: {', '.join(one[0] for one in shared[:3])}",
            expected="rows of its own for every task",
            do="take them out of one of the files, or --set tasks=target",
        )
    split = {name: split_task(name, rows, share, most, stream) for name, rows in tasks.items()}
    return {name: one[0] for name, one in split.items()}, {name: one[1] for name, one in split.items()}
