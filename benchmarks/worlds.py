"""Models, length-bucketed batches and the one forward+backward that every arm shares.

Four models have random weights and rows of random tokens; SmolLM2-135M is the packaged one, with rows of the demo.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENS_PER_BATCH = 2048  # longest row times rows; bergson's own default, so that nobody gets a foreign batch size
NUM_DIRECTIONS = 3


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of similar length; the loss is on every token but a row's first, in the demo's rows on answers.

    Args:
        indices: numbers of the rows in the whole set.
        input_ids: [B, T].
        labels: [B, T], -100 on padding and where no loss is taken.
        lengths: [B].
    """

    indices: list[int]
    input_ids: Tensor
    labels: Tensor
    lengths: Tensor

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return int(self.lengths.sum())


def llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> nn.Module:
    """Make a Llama shape with weights as the current torch seed draws them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
        )
    )


def _gpt2(hidden: int, layers: int, heads: int, vocabulary: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            n_positions=512,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama-10M": lambda: llama(256, 768, 7, 4, 8192),
    "GPT-2-8.5M": lambda: _gpt2(256, 8, 4, 8192),
    "Llama-51M": lambda: llama(512, 1536, 10, 8, 16384),
    "GPT-2-46M": lambda: _gpt2(512, 12, 8, 16384),
    "SmolLM2-135M": lambda: _smollm2(),
}
REAL = ("SmolLM2-135M",)


@cache
def _prepared() -> Any:
    """Write and tokenize the demo's rows."""
    from gradsift.data.exam_rows import DemoCounts, write_demo_rows
    from gradsift.methods import make_method
    from gradsift.pipeline.prepare import prepare
    from gradsift.pipeline.progress import Clock, Silent
    from gradsift.recipe import build_recipe

    with tempfile.TemporaryDirectory() as folder:
        files = write_demo_rows(Path(folder), DemoCounts(pool=360))
        recipe = build_recipe({
            "pool": [{"label": "medical", "path": str(files.pool)}], "target": str(files.target), "budget": "25%",
            "anchors": [{"label": name, "path": str(path)} for name, path in files.anchors.items()],
            "method": {"name": "target_cosine"}, "navigator": {"parameters": "all", "device": "cpu"},
        })  # fmt: skip
        return prepare(recipe, make_method("target_cosine", {}), Clock(Silent()))


def _smollm2() -> nn.Module:
    from gradsift.models.load import load_navigator

    return load_navigator(_prepared().resolved, device="cpu").model


def real_batches(num_rows: int) -> list[Batch]:
    """Take the demo's medical rows, evenly over their lengths, in batches of TOKENS_PER_BATCH."""
    from gradsift.data.batches import collate, plan_batches

    prepared = _prepared()
    rows = sorted(prepared.pool.usable, key=lambda row: (row.num_tokens, row.id))
    rows = [rows[i * len(rows) // num_rows] for i in range(min(num_rows, len(rows)))]
    out = []
    for some in plan_batches(rows, range(len(rows)), TOKENS_PER_BATCH):
        tokens = collate([rows[i] for i in some], range(len(some)), prepared.pad_id)
        out.append(Batch(list(some), tokens.input_ids, tokens.labels, tokens.lengths))
    return out


def build_model(name: str, seed: int = 0) -> nn.Module:
    """Build one of the table's models, seeded, in float32 and eval mode."""
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def share(model: nn.Module) -> nn.Module:
    """Copy the module tree but not the weights, so that each arm keeps its own hooks and requires_grad flags."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=True) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def build_batches(num_rows: int, vocabulary: int, seed: int = 0) -> list[Batch]:
    """Draw rows of 16 to 256 random tokens and put them into length buckets."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, 257, (num_rows,), generator=generator).sort().values.tolist()
    batches, start = [], 0
    while start < num_rows:
        stop = start + 1
        while stop < num_rows and lengths[stop] * (stop + 1 - start) <= TOKENS_PER_BATCH:
            stop += 1
        some = torch.tensor(lengths[start:stop])
        padding = torch.arange(int(some.max()))[None] >= some[:, None]
        ids = torch.randint(1, vocabulary, padding.shape, generator=generator).masked_fill(padding, 0)
        batches.append(Batch(list(range(start, stop)), ids, ids.masked_fill(padding, -100), some))
        start = stop
    return batches


def row_losses(model: nn.Module, input_ids: Tensor, labels: Tensor, *, head_gradient: bool = True) -> Tensor:
    """Mean loss of each row, with logits made only where a loss is taken; the head's weight may be held constant.

    This is the fastest honest forward: right padding needs no attention mask under causal attention, and nobody pays for
    logits at padding. Every arm that lets its caller run the model uses it.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False)[0]
    supervised = labels[:, 1:] != -100
    head = model.get_output_embeddings()
    asked = hidden[:, :-1][supervised]
    logits = head(asked) if head_gradient else nn.functional.linear(asked, head.weight.detach(), head.bias)
    nats = nn.functional.cross_entropy(logits, labels[:, 1:][supervised], reduction="none")
    rows = supervised.nonzero()[:, 0]
    return nats.new_zeros(labels.shape[0]).index_add(0, rows, nats) / supervised.sum(1)


def backward(model: nn.Module, batch: Batch, *, head_gradient: bool = True) -> Tensor:
    """Run forward and backward of the sum of the rows' losses; return the losses [B]."""
    losses = row_losses(model, batch.input_ids, batch.labels, head_gradient=head_gradient)
    losses.sum().backward()
    return losses.detach()


def freeze(model: nn.Module) -> None:
    """Freeze every weight and let the gradient start at the embedding's output: no weight gradient is computed."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))


def body_layers(model: nn.Module) -> list[str]:
    """Names, below ``model.base_model``, of the body's linear layers (torch's Linear and GPT-2's Conv1D)."""
    return [n for n, m in model.base_model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]


def body_weights(model: nn.Module) -> list[str]:
    """Names, below ``model``, of the weights of those layers."""
    prefix = next(n for n, m in model.named_modules() if m is model.base_model)
    return [f"{prefix}.{name}.weight" for name in body_layers(model)]


def random_directions(shapes: Iterable[tuple[str, int, int]], seed: int = 1) -> dict[str, list[Tensor]]:
    """Draw NUM_DIRECTIONS matrices [rows, cols] a name, of unit length over all names together."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: [torch.randn(rows, cols, generator=generator) for _ in range(NUM_DIRECTIONS)]
        for name, rows, cols in shapes
    }
    for i in range(NUM_DIRECTIONS):
        norm = sum(float(matrices[i].double().square().sum()) for matrices in drawn.values()) ** 0.5
        for matrices in drawn.values():
            matrices[i] /= norm
    return drawn
