"""A store of any size with planted structure, for scale.py: made-up numbers, the store's own writer (ours).

A row's unit sketch is 0.5 of one of 64 planted centers plus noise; dots are taken with five planted directions, mixtures
of the centers, of which ``keep-a`` and ``keep-b`` oppose the target. Ids are hashes, as those of rows without an id are, so
id order has nothing to do with where a row lies on the disk. A row depends on the seed and its number alone.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gradsift.data.ids import IdsBuilder
from gradsift.data.rows import STATUSES, Pool, PoolColumns, PoolFile
from gradsift.data.spool import Remarks, Spool
from gradsift.data.token_rows import TokenRows
from gradsift.data.tokens import TokenColumns, TokenPart, TokenTable
from gradsift.seeds import stream
from gradsift.store.shards import ShardResult
from gradsift.store.signals import SignalStore
from gradsift.store.spec import GradientSpec, Projection, store_folder
from gradsift.store.writer import open_writer
from gradsift.types import Direction, Noise, Problem, RowStatus

SEED, NUM_CENTERS, PULL = 7, 64, 0.5
ANCHORS = ("keep-a", "keep-b", "keep-c", "keep-d")
NAMES = tuple(sorted((*ANCHORS, "target")))
OPPOSED = {"keep-a": -0.6, "keep-b": -0.4, "keep-c": 0.0, "keep-d": 0.3}
SOURCES = ("web", "books", "exams")


@dataclass(frozen=True)
class Planted:
    """The truth: centers [K, D] and unit directions [5, D] in the order of NAMES."""

    centers: np.ndarray
    directions: np.ndarray


def planted(dim: int) -> Planted:
    """Draw the truth for sketches of some length."""
    draw = stream(SEED, "scale/centers").numpy()
    centers = draw.standard_normal((NUM_CENTERS, dim))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    target = draw.standard_normal(NUM_CENTERS)
    mixes = {"target": target}
    for name, share in OPPOSED.items():
        mixes[name] = share * target + np.sqrt(1 - share**2) * draw.standard_normal(NUM_CENTERS)
    directions = np.stack([mixes[name] @ centers for name in NAMES])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Planted(centers.astype(np.float32), directions.astype(np.float32))


def row_id(number: int) -> str:
    """Name a row as the pool names rows without an id: 32 hex digits."""
    return hashlib.blake2b(f"{SEED}/{number}".encode(), digest_size=16).hexdigest()


def labels(ids: tuple[str, ...]) -> np.ndarray:
    """Planted group of every row, int64 [N]."""
    return (stream(SEED, "scale/group").uniform(ids) * NUM_CENTERS).astype(np.int64)


def spec_of(dim: int) -> GradientSpec:
    """What such a store says it holds."""
    return GradientSpec(
        parameters="all", parameters_sha256="p" * 64, model_sha256="m" * 64, tokenizer_sha256="t" * 64, loss_on="all",
        max_length=1024, signals=("loss", "grad_norm", "emb_grad_norm", "head_grad_norm", "sketch", "dots"),
        code_version="planted", anchors=dict.fromkeys(NAMES, "a" * 32), projection=Projection(dim, SEED, "planted"),
    )  # fmt: skip


def unit(truth: Planted, start: int, count: int) -> ShardResult:
    """Make the rows of one shard."""
    dim = truth.centers.shape[1]
    ids = tuple(row_id(i) for i in range(start, start + count))
    draw = stream(SEED, f"scale/rows/{start}").numpy()
    noise = draw.standard_normal((count, dim), dtype=np.float32) * np.float32(np.sqrt((1 - PULL**2) / dim))
    unit_rows = np.float32(PULL) * truth.centers[labels(ids)] + noise
    unit_rows /= np.linalg.norm(unit_rows, axis=1, keepdims=True)
    norm = np.exp(0.5 * draw.standard_normal(count))
    tokens = np.clip(np.exp(5.5 + 0.8 * draw.standard_normal(count)), 16, 1024).astype(np.int64)
    return ShardResult(
        ids, tuple(name[::-1] for name in ids), (RowStatus.OK,) * count, ("",) * count, tokens,
        np.maximum(1, (0.7 * tokens).astype(np.int64)), 2.0 + 0.3 * draw.standard_normal(count), norm, 0.1 * norm,
        0.3 * norm, norm[:, None] * (unit_rows @ truth.directions.T).astype(np.float64), NAMES,
        unit_rows * norm[:, None].astype(np.float32),
    )  # fmt: skip


def write_store(folder: Path, num_rows: int, dim: int, rows_per_shard: int) -> dict[str, float]:
    """Write a store, or what is missing of it; the writer's own commits, durable one by one."""
    truth, spec = planted(dim), spec_of(dim)
    begun = time.perf_counter()
    place = store_folder(folder / "signals", spec)
    with open_writer(place, spec, made_by={"device": "none"}) as writer:
        opened, made, committing = time.perf_counter() - begun, 0, 0.0
        known = writer.committed_ids()
        for start in range(0, num_rows, rows_per_shard):
            if row_id(start) in known:
                continue
            result = unit(truth, start, min(rows_per_shard, num_rows - start))
            before = time.perf_counter()
            writer.commit(result)
            committing += time.perf_counter() - before
            made += len(result.ids)
    return {"num_rows": made, "opening_seconds": opened, "committing_seconds": committing}


def problem_of(store: SignalStore, sketch: Any = None) -> Problem:
    """Join the signals as pipeline.problem does, without the texts that no file of this benchmark holds."""
    directions = {
        name: Direction(name, "target" if name == "target" else "protect", 1.0, 200, 50_000, 0.9, 0.01)
        for name in NAMES
    }
    truth = planted(store.spec.projection.dim if store.spec.projection else 2)
    order = [*ANCHORS, "target"]
    vectors = truth.directions[[NAMES.index(name) for name in order]].astype(np.float64)
    return Problem(
        ids=store.ids, sources=tuple(SOURCES[int(name[-1], 16) % 3] for name in store.ids),
        num_tokens=store.num_tokens, num_trained=store.num_trained, num_read=store.size,
        num_trained_read=int(store.num_trained.sum()), loss=store.loss, grad_norm=store.grad_norm,
        anchor_dot=store.dots(ANCHORS), target_dot=store.dots(["target"])[:, 0], sketch=sketch,
        anchors=tuple(directions[name] for name in ANCHORS), target=directions["target"],
        noise=Noise(1e-6, 1e-6, 1e-6, 8), gram=vectors @ vectors.T, direction_sketch=vectors.astype(np.float32),
    )  # type: ignore[arg-type] # fmt: skip


def stand_ins(store: SignalStore, problem: Problem) -> tuple[Any, Any]:
    """Give what the audit table reads of inputs and measurement: a pool whose rows have these ids, in no file that is read."""
    size = store.size
    builder = IdsBuilder()
    for number in range(size):
        builder.add_line(f"{SEED}/{number}".encode())  # the hash that row_id gives
    ids, first, clash = builder.seal(np.ones(size, dtype=bool))
    assert clash is None
    at = ids.find(store.ids)
    assert at.min() >= 0
    fine = np.full(size, STATUSES.index(RowStatus.OK), dtype=np.uint8)
    reasons = Remarks(np.zeros(0, dtype=np.int64), Spool().seal())
    starts = np.linspace(0, size, len(SOURCES) + 1).astype(int)
    files = tuple(PoolFile(name, f"{name}.jsonl", "jsonl", "0" * 64, int(n), {"text": int(n)})
                  for name, n in zip(SOURCES, np.diff(starts), strict=True))  # fmt: skip
    pool = Pool(PoolColumns(ids, first, fine, np.ones(size, dtype=np.uint8), reasons, "auto"), files, ())
    num_tokens, num_trained, none = (np.zeros(size, dtype=np.int32) for _ in range(3))
    num_tokens[at], num_trained[at] = store.num_tokens, store.num_trained
    columns = TokenColumns(
        fine, num_tokens, num_trained, num_tokens, none, np.zeros(size, dtype="S16"), none.astype(np.uint8), none,
        none.astype(np.uint32),
    )  # fmt: skip
    tokens = TokenRows(TokenTable(pool, [TokenPart(columns, b"")]))
    prepared = SimpleNamespace(pool=SimpleNamespace(pool=pool, tokens=tokens))
    return prepared, SimpleNamespace(store=store, directions=(*problem.anchors, problem.target))
