"""A small made-up pool whose every signal is a function of the row's id, so that any store can be checked row by row."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gradsift.manifest import hash_parts
from gradsift.seeds import stream
from gradsift.store.shards import ShardResult
from gradsift.store.signals import SignalStore, open_store
from gradsift.store.spec import GradientSpec, Projection
from gradsift.store.writer import open_writer
from gradsift.types import RowStatus

DIRECTIONS = ("math", "target")
DIM = 11
WIDTH = 6  # of the embeddings, where they are measured


def make_spec(**changes) -> GradientSpec:
    fields = {
        "parameters": "lora",
        "parameters_sha256": "p" * 64,
        "model_sha256": "m" * 64,
        "tokenizer_sha256": "t" * 64,
        "loss_on": "assistant",
        "max_length": 512,
        "signals": ("loss", "grad_norm", "dots", "sketch", "emb_grad_norm"),
        "code_version": "engine-1",
        "anchors": {name: f"hash of {name}" for name in DIRECTIONS},
        "projection": Projection(DIM, 42, "signfold-1"),
        "adapter_sha256": "a" * 64,
        "template_sha256": "c" * 64,
    }
    return GradientSpec(**{**fields, **changes})


SPEC = make_spec()
EMBEDDING_SPEC = make_spec(signals=(*SPEC.signals, "embedding"))


def make_ids(count: int) -> tuple[str, ...]:
    return tuple(f"row-{i:05d}" for i in range(count))


def content(name: str, edition: int = 0) -> str:
    return hash_parts([name.encode(), bytes([edition])])


def status_of(name: str) -> RowStatus:
    number = int(name.rpartition("-")[2])
    if number % 7 == 3:
        return RowStatus.TRUNCATED
    return RowStatus.ZERO_GRAD if number % 13 == 5 else RowStatus.NONFINITE_LOSS if number % 17 == 6 else RowStatus.OK


def embeddings(ids: Sequence[str]) -> np.ndarray:
    return np.stack([stream(1, f"embedding/{name}").numpy().standard_normal(WIDTH) for name in ids]).astype(np.float32)


def measure(ids: Sequence[str], *, edition: int = 0, dim: int = DIM, embedding: bool = False) -> ShardResult:
    """Make the signals up. They depend on the id alone, never on the rows beside it."""
    n, status = len(ids), tuple(status_of(name) for name in ids)
    draws = np.stack([stream(1, f"row/{name}").numpy().standard_normal(8 + dim) for name in ids])
    usable = np.array([s.usable for s in status])
    norm = np.where(usable, np.exp(3 * draws[:, 0]), np.nan)
    norm[[s is RowStatus.ZERO_GRAD for s in status]] = 0.0
    loss = np.where([s is RowStatus.NONFINITE_LOSS for s in status], np.nan, np.abs(draws[:, 1]) + 0.1)
    return ShardResult(
        ids=tuple(ids),
        content_hashes=tuple(content(name, edition) for name in ids),
        status=status,
        reason=tuple("" if s is RowStatus.OK else f"because of {s}" for s in status),
        num_tokens=np.array([20 + len(name) for name in ids]),
        num_trained=np.arange(n) * 0 + 9,
        loss=loss,
        grad_norm=norm,
        emb_grad_norm=norm / 3,
        head_grad_norm=np.full(n, np.nan),
        dots=np.where(usable[:, None], draws[:, 2:4] * norm[:, None], np.nan),
        directions=DIRECTIONS,
        sketch=np.where(usable[:, None], draws[:, 8:] / np.sqrt(dim) * norm[:, None], np.nan).astype(np.float32),
        embedding=np.where(usable[:, None], embeddings(ids), np.nan).astype(np.float32) if embedding else None,
    )


def fill(
    folder: Path,
    ids: Sequence[str],
    rows_per_shard: int,
    *,
    spec: GradientSpec = SPEC,
    measured: Callable[[ShardResult], None] = lambda _: None,
    committed: Callable[[ShardResult], None] = lambda _: None,
) -> None:
    """What a collector does: measure what is missing, commit shard by shard."""
    with open_writer(folder, spec) as writer:
        todo = writer.missing(ids, [content(name) for name in ids])
        for start in range(0, len(todo), rows_per_shard):
            some = [ids[i] for i in todo[start : start + rows_per_shard]]
            result = measure(some, dim=spec.projection.dim, embedding="embedding" in spec.signals)
            measured(result)
            writer.commit(result)
            committed(result)


def snapshot(store: SignalStore, ids: Sequence[str] | None = None) -> dict[str, tuple]:
    """Every row's every stored bit, by id."""
    view = store if ids is None else store.take(ids)
    usable = [name for name, status in zip(view.ids, view.status) if status.usable]
    sketch = dict(zip(usable, view.unit_sketch(usable))) if usable else {}
    pooled = dict(zip(usable, view.embedding(usable))) if usable and "embedding" in view.spec.signals else {}
    numbers = np.column_stack([view.loss, view.grad_norm, view.emb_grad_norm, view.head_grad_norm, view.all_dots])
    return {
        name: (
            view.content_hashes[i],
            view.status[i],
            view.reason[i],
            int(view.num_tokens[i]),
            int(view.num_trained[i]),
            numbers[i].tobytes(),
            sketch[name].tobytes() if name in sketch else b"",
            *([pooled[name].tobytes()] if name in pooled else []),
        )
        for i, name in enumerate(view.ids)
    }


def read(folder: Path, spec: GradientSpec = SPEC) -> dict[str, tuple]:
    return snapshot(open_store(folder, spec))


def truth(ids: Sequence[str], dim: int = DIM, *, embedding: bool = False) -> dict[str, tuple]:
    """What a store must say, computed without the store (its slow, obvious twin)."""
    result = measure(ids, dim=dim)
    rows = {}
    for i, name in enumerate(ids):
        numbers = [result.loss[i], result.grad_norm[i], result.emb_grad_norm[i], np.nan, *result.dots[i]]
        unit = b""
        if result.status[i].usable:
            unit = (result.sketch[i].astype(np.float64) / result.grad_norm[i]).astype(np.float16).astype(np.float32)
            unit = unit.tobytes()
        rows[name] = (
            result.content_hashes[i],
            result.status[i],
            result.reason[i],
            int(result.num_tokens[i]),
            int(result.num_trained[i]),
            np.array(numbers).tobytes(),
            unit,
            *([embeddings([name]).tobytes()] if embedding and result.status[i].usable else []),
        )
    return rows


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where the machine has one: thousands of fsyncs are about order here, not about disks."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="gradsift-test-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def files_of(folder: Path) -> list[Path]:
    return [*sorted(p for part in ("shards", "ledger") for p in (folder / part).iterdir()), folder / "spec.json"]
