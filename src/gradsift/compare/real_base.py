"""The real-data world's starting weights: the packaged model after a short lesson in the general sets (ours).

The packaged model does not know these sets in this form: its loss on their short answers is several nats per token, and a few dozen
steps on almost any rows with answers lower it (docs/results/LOG.md, the first design). Nothing can be forgotten that was
never known, so the model first learns the general sets on rows that no seed uses for anything else; then a domain is to be
learned without losing them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gradsift.data.cache import cache_folder, published_file, sha256_file
from gradsift.errors import StoreError
from gradsift.manifest import canonical_json, sha256_bytes
from gradsift.models.adapter import adapter_parameters, attach_lora
from gradsift.recipe import LoraConfig
from gradsift.seeds import stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.plan import plan_steps
from gradsift.types import TokenRow

log = logging.getLogger(__name__)
VERSION = 1  # raise it when the code below changes what it computes


@dataclass(frozen=True)
class Lesson:
    """How the general sets are taught: low-rank, then merged into the weights.

    Args:
        epochs: passes over the rows.
        lr: of AdamW, falling linearly.
        batch_size: rows per step.
        rank: of the adapter on all linear layers.
        alpha: its alpha.
    """

    epochs: int = 2
    lr: float = 5e-4
    batch_size: int = 8
    rank: int = 16
    alpha: float = 32.0


def prepared(model: Any, digest: str, rows: Sequence[TokenRow], lesson: Lesson, pad_id: int) -> tuple[nn.Module, str]:
    """Teach a model the general sets, or merge what an earlier run of any seed left in the cache; of two processes one teaches.

    Args:
        model: the frozen packaged model; left as it is.
        digest: sha256 of its weights.
        rows: what is taught.
        lesson: how.
        pad_id: padding token.

    Returns:
        A copy, frozen, the lesson merged into its weights; and 12 hex digits of what was taught, which rounds otherwise on another
        kind of device.
    """
    from filelock import FileLock

    content = [[row.id, row.input_ids.tolist(), row.trained.tolist()] for row in rows]
    one = next(model.parameters())
    what = {"model": digest, "rows": content, "lesson": vars(lesson), "pad": pad_id, "version": VERSION,
            "device": one.device.type, "dtype": str(one.dtype)}  # fmt: skip
    path = cache_folder() / "worlds" / f"real-{sha256_bytes(canonical_json(what).encode())[:32]}.safetensors"
    adapted = attach_lora(copy.deepcopy(model), LoraConfig(rank=lesson.rank, alpha=lesson.alpha), 0)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                _teach(adapted, rows, lesson, pad_id, path)
    _read(adapted, path)
    merged: Any = adapted.merge_and_unload()
    return merged.eval().requires_grad_(False), sha256_file(path)[:12]


def _teach(adapted: nn.Module, rows: Sequence[TokenRow], lesson: Lesson, pad_id: int, path: Path) -> None:
    from safetensors.torch import save_file

    by_id: dict[str, TokenRow] = {row.id: row for row in rows}
    num_steps = lesson.epochs * len(rows) // lesson.batch_size
    log.info("real world: teaching the general sets once, %d steps", num_steps)
    config = LoopConfig(lr=lesson.lr, total_steps=num_steps, schedule="linear")
    loop = Loop(adapted, config, pad_id)
    plan = plan_steps(tuple(by_id), batch_size=lesson.batch_size, num_steps=num_steps, stream=stream(0, "real/lesson"))
    find: Callable[[str], TokenRow] = by_id.__getitem__
    loop.run(plan.steps, find, {})
    weights = {name: p.detach().cpu().clone().contiguous() for name, p in adapter_parameters(adapted)}  # pyright: ignore
    with published_file(path) as temporary:
        save_file(weights, temporary)


def _read(adapted: nn.Module, path: Path) -> None:
    """Put the adapter of the cache into the model; what was just taught comes from there as well, so that both are one."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
        with torch.no_grad():
            for name, p in adapter_parameters(adapted):  # pyright: ignore[reportArgumentType]
                p.copy_(weights[name])
    except (SafetensorError, KeyError) as error:
        raise StoreError(
            "cached weights are damaged", where=str(path), got=str(error), expected="the adapter of the lesson",
            do="delete this file and run again",
        ) from None  # fmt: skip
