"""Warming a LoRA adapter on a share of the pool, so that both of its matrices carry signal (ours; optional).

Plain AdamW over rows drawn by id, in id order, one epoch. The result is kept as safetensors and read back by a repeated
run. It is a warm-up of the navigator, not the fine-tuning of a target model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradsift.data.batches import collate, plan_batches
from gradsift.manifest import hash_parts
from gradsift.models.adapter import adapter_parameters, attach_lora, load_adapter, save_adapter
from gradsift.recipe import LoraConfig
from gradsift.seeds import stream
from gradsift.store.spec import content_hash
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Warmed:
    """A warmed adapter.

    Args:
        model: the model with its adapter.
        num_rows: rows it was trained on.
    """

    model: PeftModel
    num_rows: int


def warmed_adapter(
    model: PreTrainedModel,
    lora: LoraConfig,
    seed: int,
    rows: Sequence[TokenRow],
    folder: Path,
    *,
    tokens_per_batch: int,
    pad_id: int,
    tick: Callable[[int, int], None],
) -> Warmed:
    """Train a fresh adapter on a keyed share of the rows, or read back the one trained before.

    Args:
        model: the base model.
        lora: rank, share and learning rate.
        seed: the run's seed.
        rows: usable pool rows.
        folder: where warmed adapters are kept.
        tokens_per_batch: longest row times rows of a step.
        pad_id: padding token.
        tick: called with rows and tokens done.

    Returns:
        The adapter and how many rows it saw.
    """
    keys = stream(seed, "warmup").uniform([row.id for row in rows])
    count = max(1, int(np.ceil(lora.warmup_share * len(rows))))
    drawn = sorted((rows[i] for i in np.argsort(keys, kind="stable")[:count]), key=lambda row: (row.num_tokens, row.id))
    parts = [lora.model_dump_json(), str(seed), *(content_hash(r.input_ids, r.trained) for r in drawn)]
    place = folder / hash_parts(part.encode() for part in parts)
    if place.is_dir():
        return Warmed(load_adapter(model, place), count)
    adapted = attach_lora(model, lora, seed)
    trained = [p for _, p in adapter_parameters(adapted)]
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=lora.warmup_lr, weight_decay=0.0)
    device = trained[0].device
    batches = plan_batches(drawn, range(len(drawn)), tokens_per_batch)
    for step in stream(seed, "warmup/order").numpy().permutation(len(batches)):
        some = [drawn[i] for i in batches[step]]
        tokens = collate(some, range(len(some)), pad_id)
        logits = adapted(input_ids=tokens.input_ids.to(device), use_cache=False).logits.float()
        targets = tokens.labels.to(device)[:, 1:]
        nats = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        loss = (nats.sum(1) / (targets != -100).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick(len(some), sum(row.num_tokens for row in some))
    for p in trained:
        p.requires_grad_(False)
    save_adapter(adapted, place)
    return Warmed(adapted, count)
