"""Signals at the weights that training has reached: the same pass, in memory, on a model in training (ours).

A converged anchor says little at the starting weights; at the weights that training has reached it says what is being
lost (trials.md, section 13). Exact copies are measured once and share their signals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from gradsift.data.batches import plan_shards
from gradsift.geometry.anchors import split_half
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.directions import BuiltDirection, attach, build_direction, gram, sketch_directions
from gradsift.gradients.embed import content_order, reorder
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.models.parameters import choose_parameters
from gradsift.seeds import stream
from gradsift.store.shards import ShardResult
from gradsift.train.parts import Cost
from gradsift.types import SIGNALS, Direction, Problem, TokenRow

TARGET = "target"


@dataclass(frozen=True)
class RescoreConfig:
    """How signals are measured during training.

    Args:
        parameters: which weights a gradient is taken over (``all``, ``lora`` or name patterns).
        sketch_dim: size of the sketches, used for the reliability of the directions only unless ``keep_sketch``.
        keep_sketch: also sketch the pool rows.
        tokens_per_batch: longest row times rows of a micro-batch.
        seed: of sketches and splits.
        embedding: also pool the hidden states of the pool's and the target's rows, in the same pass.
    """

    parameters: str | tuple[str, ...] = "all"
    sketch_dim: int = 257
    keep_sketch: bool = False
    tokens_per_batch: int = 2048
    seed: int = 0
    embedding: bool = False


@dataclass(frozen=True)
class Rescored:
    """Signals of the pool at some weights.

    Args:
        problem: rows whose signals are finite, in id order.
        cost: of the pass, anchors included.
        dropped: ids of rows whose loss or gradient was not finite or zero at these weights.
        target_sketch: float32 [n_t, D] sketches of the target rows' gradients in id order, or None without a target.
    """

    problem: Problem
    cost: Cost
    dropped: tuple[str, ...]
    target_sketch: Float[np.ndarray, "n_t D"] | None = None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let the engine freeze a model and put it back as it was: trainable flags and every module's train or eval mode.

    Args:
        model: a model in training.

    Yields:
        Nothing.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:  # model.train(mode) would also switch modules that the caller had set apart
            module.training = mode


def rescore(
    model: nn.Module,
    pool: Sequence[TokenRow],
    anchors: Mapping[str, Sequence[TokenRow]],
    target: Sequence[TokenRow],
    config: RescoreConfig,
    *,
    pad_id: int,
    copy_of: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
    lexical: Mapping[str, float] | None = None,
    shape: Callable[[GradientEngine], None] = lambda engine: None,
) -> Rescored:
    """Measure loss, norm and exact dots of every pool row at the model's current weights.

    Args:
        model: in training or not; left as it was.
        pool: usable token rows.
        anchors: rows of each protected source.
        target: rows of what is to be learned; empty for none.
        config: what is measured.
        pad_id: padding token.
        copy_of: row id -> id of the first exact copy.
        sources: row id -> source label.
        lexical: row id -> BM25 score, when it is known.
        shape: called with the pool's engine before its pass, such as to sketch Adam directions.

    Returns:
        The problem at these weights and what measuring it cost.
    """
    started, copies = time.perf_counter(), _within(pool, copy_of or {})
    measured = {row.id: row for row in pool if copies.get(row.id, row.id) == row.id}
    with frozen(model):
        names = choose_parameters(model, config.parameters).names
        projector = Projector(config.seed, config.sketch_dim)
        sets = {**anchors, **({TARGET: target} if target else {})}
        built = [
            build_direction(
                name,
                model,
                names,
                rows,
                projector,
                tokens_per_batch=config.tokens_per_batch,
                pad_id=pad_id,
                embedding=config.embedding and name == TARGET,
            )
            for name, rows in sets.items()
        ]
        engine = GradientEngine(
            model, names, projector=projector if config.keep_sketch else None, embedding=config.embedding
        )
        attach(engine, built)
        shape(engine)
        run = Pass(engine, tuple(d.name for d in built), config.tokens_per_batch, pad_id)
        rows = list(measured.values())
        with engine:
            shards = [
                measure_shard(run, [rows[i] for i in shard]) for shard in plan_shards(rows, range(len(rows)), 512)
            ]
    at = {name: (s, k) for s, shard in enumerate(shards) for k, name in enumerate(shard.ids)}
    ok = {i for shard in shards for i, status in zip(shard.ids, shard.status, strict=True) if status.usable}
    kept = sorted((row for row in pool if copies.get(row.id, row.id) in ok), key=lambda row: row.id)
    place = [at[copies.get(row.id, row.id)] for row in kept]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(shards[s], name)[k] for s, k in place], dtype=np.float64)

    dots = column("dots").reshape(len(kept), len(built))
    num = len(anchors)
    facts = tuple(_facts(d, config.seed) for d in built)
    problem = Problem(
        ids=tuple(row.id for row in kept),
        sources=tuple((sources or {}).get(row.id, "pool") for row in kept),
        num_tokens=np.array([row.num_tokens for row in kept], dtype=np.int64),
        num_trained=np.array([row.num_trained for row in kept], dtype=np.int64),
        num_read=len(pool),
        num_trained_read=sum(row.num_trained for row in pool),
        loss=column("loss"),
        grad_norm=column("grad_norm"),
        anchor_dot=dots[:, :num].copy() if num else None,
        target_dot=dots[:, num].copy() if target else None,
        sketch=np.stack([shards[s].sketch[k] for s, k in place]) if config.keep_sketch else None,  # type: ignore[index]
        emb_grad_norm=column("emb_grad_norm"),
        head_grad_norm=column("head_grad_norm"),
        lexical=None if lexical is None else np.array([lexical[row.id] for row in kept]),
        **_embeddings(config, shards, place, built, target),
        anchors=facts[:num],
        target=facts[num] if target else None,
        gram=gram(built) if built else None,
        direction_sketch=sketch_directions(built) if built and config.keep_sketch else None,
    )
    tokens = sum(r.num_tokens for r in rows) + sum(d.num_tokens for d in built)
    size = sum(p.numel() for p in model.parameters())
    cost = Cost.of(size, forward=tokens, backward=tokens, seconds=time.perf_counter() - started)
    dropped = tuple(sorted(row.id for row in pool if copies.get(row.id, row.id) not in ok))
    return Rescored(problem, cost, dropped, _target_sketches(built, target))


def _target_sketches(built: Sequence[BuiltDirection], target: Sequence[TokenRow]) -> Float[np.ndarray, "n_t D"] | None:
    found = next((d.sketches for d in built if d.name == TARGET), None)
    if found is None:
        return None
    place = {row.id: k for k, row in enumerate(sorted(target, key=lambda row: (row.num_tokens, row.id)))}
    return found[[place[name] for name in sorted(place)]]  # measured by length, given by id


def _within(pool: Sequence[TokenRow], copy_of: Mapping[str, str]) -> dict[str, str]:
    """Copies within the rows at hand: where the first copy is not among them, the smallest id that is stands for it."""
    ids = {row.id for row in pool}
    stand_in: dict[str, str] = {}
    for i in sorted(ids & copy_of.keys()):
        if copy_of[i] not in ids:
            stand_in.setdefault(copy_of[i], i)
    return {i: stand_in.get(copy_of[i], copy_of[i]) for i in ids & copy_of.keys()}


def _embeddings(
    config: RescoreConfig,
    shards: Sequence[ShardResult],
    place: Sequence[tuple[int, int]],
    built: Sequence[BuiltDirection],
    target: Sequence[TokenRow],
) -> dict[str, Any]:
    """The problem's embedding fields; none of them unless they were asked for."""
    if not config.embedding:
        return {}
    rows = [shards[s].embedding[k] for s, k in place]  # type: ignore[index]
    fields: dict[str, Any] = {"embedding": np.stack(rows) if rows else None}
    found = next((d.embeddings for d in built if d.name == TARGET), None)
    if found is not None:
        ids = tuple(sorted(row.id for row in target))
        fields |= {"target_ids": ids, "target_embedding": reorder(found, content_order(target), ids)}
    return fields


def _facts(built: BuiltDirection, seed: int) -> Direction:
    reliability = split_half(built.sketches, stream(seed, f"split_half/{built.name}"))
    return Direction(
        built.name,
        "target" if built.name == TARGET else "protect",
        built.norm,
        built.num_rows,
        built.num_tokens,
        reliability.mean,
        reliability.sd,
    )


def restrict(problem: Problem, keep: Sequence[str]) -> Problem:
    """Leave only some rows in a problem.

    Args:
        problem: any problem.
        keep: ids of the rows that stay; others are not looked for.

    Returns:
        The smaller problem, id order kept.
    """
    wanted = set(keep)
    at = np.array([k for k, i in enumerate(problem.ids) if i in wanted], dtype=np.int64)

    def part(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[at].copy()

    return replace(
        problem,
        ids=tuple(problem.ids[k] for k in at),
        sources=tuple(problem.sources[k] for k in at),
        num_tokens=problem.num_tokens[at].copy(),
        num_trained=problem.num_trained[at].copy(),
        copy_group=tuple(problem.copy_group[k] for k in at) if problem.copy_group else (),
        texts=tuple(problem.texts[k] for k in at) if problem.texts else (),
        external={name: column[at].copy() for name, column in problem.external.items()},
        checkpoints=tuple(replace(one, features=one.features[at]) for one in problem.checkpoints),
        **{name: part(getattr(problem, name)) for name in SIGNALS},
    )
