"""Training a navigator on a share of the pool before it measures, with checkpoints and Adam's moments (less.md 3, grads.md 3; ours).

It is the plain loop over keyed rows. With a folder, every kept checkpoint is published whole and sealed by hashes, and a
stopped training goes on from its last minute; weights and moments are safetensors by parameter name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.errors import NumericsError, StoreError
from gradsift.geometry.checkpoints import Warmup
from gradsift.manifest import canonical_json, hash_parts, seal, sha256_file, unseal, write_bytes_atomic
from gradsift.seeds import stream
from gradsift.store.spec import content_hash
from gradsift.train import checkpoint
from gradsift.train.loop import Loop, LoopConfig, schedule_factor
from gradsift.train.moments import Moments, load_moments, put_moments, read_moments, save_moments
from gradsift.train.parts import Cost, trainable
from gradsift.types import TokenRow

SAVE_SECONDS = 60.0  # a kill costs about this much


@dataclass(frozen=True)
class WarmupRun:
    """How a warm-up trains.

    Args:
        lr: peak AdamW learning rate.
        batch_size: rows per optimizer step.
        schedule: ``linear``, ``cosine`` or ``constant``.
        rise: share of the steps over which the learning rate rises.
        tokens_per_batch: longest row times rows of a micro-batch.
        pad_id: padding token.
        seed: of the draw, the order and dropout.
        tick: called after every step with the rows and tokens done; raises to stop the run.
    """

    lr: float
    batch_size: int = 32
    schedule: str = "linear"
    rise: float = 0.03
    tokens_per_batch: int | None = None
    pad_id: int = 0
    seed: int = 0
    tick: Callable[[int, int], None] = lambda rows, tokens: None


@dataclass(frozen=True)
class Checkpoint:
    """A navigator after an epoch.

    Args:
        epoch: which, from 1; 0 for the starting weights.
        weights: trainable parameters by name, on the CPU.
        moments: Adam's moments of the same parameters.
        lr: mean learning rate of the epoch.
        digests: hashes of weights and moments, where they stand in a folder; empty in memory.
    """

    epoch: int
    weights: Mapping[str, Tensor]
    moments: Moments
    lr: float
    digests: Mapping[str, str] = field(default_factory=dict)

    def enter(self, model: nn.Module) -> None:
        """Put the weights into a model.

        Args:
            model: whose parameters have these names.

        Raises:
            StoreError: a name or shape does not fit.
        """
        named = dict(model.named_parameters())
        for name, value in self.weights.items():
            if name not in named or named[name].shape != value.shape:
                raise StoreError(
                    "the checkpoint does not fit the model", where=name, got=str(tuple(value.shape)),
                    expected=str(tuple(named[name].shape)) if name in named else "a parameter of that name",
                    do="use another --out, or the model that was trained",
                )  # fmt: skip
        with torch.no_grad():
            for name, value in self.weights.items():
                named[name].copy_(value)


@dataclass(frozen=True)
class Warmed:
    """What a warm-up left.

    Args:
        checkpoints: those asked for, rising.
        num_rows: different rows that it trained on.
        cost: of all of it, earlier parts of a stopped run included.
        key: what decides it, as the folder is named; empty in memory.
    """

    checkpoints: tuple[Checkpoint, ...]
    num_rows: int
    cost: Cost
    key: str = ""


def draw_rows(rows: Sequence[TokenRow], share: float, seed: int) -> tuple[TokenRow, ...]:
    """Draw the rows that a navigator is trained on, by id.

    Args:
        rows: usable pool rows.
        share: share of them in (0, 1], rounded up.
        seed: the run's seed.

    Returns:
        At least one row, in id order.
    """
    keys = stream(seed, "warmup").uniform([row.id for row in rows])
    count = max(1, int(np.ceil(share * len(rows) - 1e-9)))
    ranked = sorted(range(len(rows)), key=lambda i: (keys[i], rows[i].id))
    return tuple(sorted((rows[i] for i in ranked[:count]), key=lambda row: row.id))


def plan_epochs(ids: Sequence[str], epochs: int, batch_size: int, seed: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Deal rows into the steps of every epoch; the last step of an epoch may be short, so that epochs do not mix.

    Args:
        ids: rows.
        epochs: how many.
        batch_size: rows per step.
        seed: the run's seed.

    Returns:
        Per epoch its steps, ids each.
    """
    out = []
    for epoch in range(epochs):
        draws = stream(seed, f"warmup/order/{epoch}").uniform(ids)
        order = [ids[k] for k in np.lexsort((np.array(ids), draws))]
        out.append(tuple(tuple(order[k : k + batch_size]) for k in range(0, len(order), batch_size)))
    return tuple(out)


def warm_up(
    model: nn.Module,
    rows: Sequence[TokenRow],
    warmup: Warmup,
    run: WarmupRun,
    *,
    folder: Path | None = None,
    start: str = "",
) -> Warmed:
    """Train a navigator and keep checkpoints, or read back what an earlier call kept.

    Args:
        model: trained in place; its trainable parameters have ``requires_grad``.
        rows: usable pool rows, of which ``warmup.share`` is drawn.
        warmup: share, epochs and checkpoints; at least one epoch.
        run: optimizer and batches.
        folder: where checkpoints stand; None keeps them in memory.
        start: hash of the starting weights, so that a checkpoint of another model is not taken up.

    Returns:
        The checkpoints and what they cost. The model is left anywhere on the way: enter a checkpoint.

    Raises:
        NumericsError: the loss is not finite; lower the learning rate.
    """
    drawn = draw_rows(rows, warmup.share, run.seed)
    plan = plan_epochs([row.id for row in drawn], warmup.epochs, run.batch_size, run.seed)
    key = "" if folder is None else _key(drawn, warmup, run, start)
    place = None if folder is None else _Place(folder / key, key)
    if place is not None:
        found = place.read_all(warmup.kept_epochs)
        if found is not None:
            return Warmed(found, len(drawn), place.cost, key)
    total = sum(len(steps) for steps in plan)
    config = LoopConfig(
        lr=run.lr, total_steps=total, schedule=run.schedule, warmup_steps=round(run.rise * total), seed=run.seed,
        tokens_per_batch=run.tokens_per_batch,
    )  # fmt: skip
    loop = Loop(model, config, run.pad_id)
    ends = dict(enumerate(np.cumsum([len(steps) for steps in plan]).tolist(), start=1))
    done = 0 if place is None else place.resume(loop, {epoch: ends[epoch] for epoch in warmup.kept_epochs})
    by_id, kept, at, saved = {row.id: row for row in drawn}, [], 0, time.monotonic()
    for epoch, steps in enumerate(plan, start=1):
        first = at
        for ids in steps:
            at += 1
            if at <= done:
                continue
            some = [by_id[i] for i in ids]
            _step(loop, some)
            run.tick(len(some), sum(row.num_tokens for row in some))
            if place is not None and time.monotonic() - saved > SAVE_SECONDS:
                place.save_progress(loop)
                saved = time.monotonic()
        if epoch in warmup.kept_epochs:
            lr = float(np.mean([config.lr * schedule_factor(config, k) for k in range(first, at)]))
            if place is None:
                kept.append(_take(loop, epoch, lr))
            elif at >= done:
                place.keep(loop, epoch, lr)
        if place is not None and at > done:
            place.save_progress(loop)
    if place is None:
        return Warmed(tuple(kept), len(drawn), loop.cost)
    read = place.read_all(warmup.kept_epochs)
    assert read is not None
    place.forget_progress()
    return Warmed(read, len(drawn), place.cost, key)


def _step(loop: Loop, rows: Sequence[TokenRow]) -> None:
    device = loop.parameters[0].device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout is seeded step by step
            loop.step(rows)
    except NumericsError as error:
        raise NumericsError(
            "the loss of the warm-up is not finite", where=error.where, got=error.got, expected="a finite number",
            do="lower its learning rate: --set warmup.lr=1e-5 (navigator.lora.warmup_lr for navigator.lora.warmup_share)",
        ) from None  # fmt: skip


def _take(loop: Loop, epoch: int, lr: float) -> Checkpoint:
    weights = {name: p.detach().cpu().clone() for name, p in trainable(loop.model)}
    return Checkpoint(epoch, weights, read_moments(loop.model, loop.optimizer), lr)


def _key(drawn: Sequence[TokenRow], warmup: Warmup, run: WarmupRun, start: str) -> str:
    """What decides the training: rows and their order, optimizer, starting weights."""
    named = {name: value for name, value in asdict(run).items() if name != "tick"}
    facts = canonical_json({"version": 1, "epochs": warmup.epochs, "start": start, **named})
    rows = [f"{row.id} {content_hash(row.input_ids, row.trained)}" for row in drawn]
    return hash_parts((part.encode("utf-8", "surrogatepass") for part in (facts, *rows)), digest_size=8)


class _Place:
    """A warm-up's folder: kept epochs, and the newest states of an unfinished one."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.progress = folder / "progress"
        self.cost = Cost()
        self._before = Cost()

    def read_all(self, epochs: Sequence[int]) -> tuple[Checkpoint, ...] | None:
        """Read the kept epochs, or None when one of them is missing or damaged."""
        found = [self._read(self.folder / f"epoch-{epoch}") for epoch in epochs]
        whole = [one for one in found if one is not None]
        return tuple(whole) if len(whole) == len(found) else None

    def _read(self, path: Path) -> Checkpoint | None:
        names = (checkpoint.WEIGHTS, checkpoint.MOMENTS)
        try:
            record = unseal((path / checkpoint.RECORD).read_bytes())
            if record is None or any(sha256_file(path / name) != record["files"][name] for name in names):
                return None
        except OSError:
            return None
        self.cost = Cost(**record["cost"])
        weights = checkpoint.load_tensors(path / checkpoint.WEIGHTS)
        digests = {"weights": record["files"][names[0]], "moments": record["files"][names[1]]}
        return Checkpoint(record["epoch"], weights, load_moments(path / checkpoint.MOMENTS), record["lr"], digests)

    def resume(self, loop: Loop, ends: Mapping[int, int]) -> int:
        """Put the loop where a stopped run was; give the steps that it has done.

        It starts over where an epoch that it has passed is no longer there.
        """
        found = checkpoint.find_checkpoint(self.progress, self.key)
        if found.path is None:
            return 0
        passed = [epoch for epoch, end in ends.items() if end < len(found.record["losses"])]
        if any(self._read(self.folder / f"epoch-{epoch}") is None for epoch in passed):
            return 0
        named, weights = dict(trainable(loop.model)), checkpoint.load_tensors(found.path / checkpoint.WEIGHTS)
        with torch.no_grad():
            for name, value in weights.items():
                named[name].copy_(value)
        put_moments(loop.model, loop.optimizer, load_moments(found.path / checkpoint.MOMENTS))
        loop.losses = list(found.record["losses"])
        self._before = Cost(**found.record["cost"])
        return len(loop.losses)

    def save_progress(self, loop: Loop) -> None:
        """Keep the state of the loop."""
        record = {"key": self.key, "losses": list(loop.losses), "cost": asdict(self._before + loop.cost)}
        checkpoint.save_checkpoint(self.progress, len(loop.losses), record, lambda place: _write(loop, place))

    def keep(self, loop: Loop, epoch: int, lr: float) -> None:
        """Publish a checkpoint that is to be measured; one that is damaged is replaced."""
        import shutil

        from gradsift.data.cache import disk_errors, published_folder

        path = self.folder / f"epoch-{epoch}"
        with disk_errors(path):
            shutil.rmtree(path, ignore_errors=True)
            with published_folder(path) as place:
                _write(loop, place)
                files = {file.name: sha256_file(file) for file in sorted(place.iterdir())}
                record: dict[str, Any] = {
                    "epoch": epoch,
                    "lr": lr,
                    "cost": asdict(self._before + loop.cost),
                    "files": files,
                }
                write_bytes_atomic(place / checkpoint.RECORD, seal(record))

    def forget_progress(self) -> None:
        """Remove the states of a finished training."""
        import shutil

        shutil.rmtree(self.progress, ignore_errors=True)


def _write(loop: Loop, place: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: p.detach().cpu().contiguous() for name, p in trainable(loop.model)}
    save_file(dict(sorted(weights.items())), str(place / checkpoint.WEIGHTS))
    save_moments(read_moments(loop.model, loop.optimizer), place / checkpoint.MOMENTS)
