"""The arithmetic world: a tiny transformer that knows one sum and is to learn another (after trials.md, section 13).

Task A, ``x + y mod p``, is what the model was pretrained on and must be kept (not every seed reaches 100%: each cell's
``exact_before`` says what was known). The pool mixes *clean* rows of domain B, ``min(x, y)``, *replay* (correct A),
*conflict* (A's own tokens under a wrong rule, so no word tells them from replay), *noise* (B with random answers), one
*duplicate* many times, and an *irrelevant* task C. A row is ``BOS x op y = z``; only ``z`` carries loss. Pairs are
split once per seed: evaluation, anchor, target, replay and pool pairs of a task do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from gradsift.compare.world import EvalSet, World
from gradsift.data.cache import cache_folder, published_file
from gradsift.errors import ConfigError, StoreError
from gradsift.manifest import canonical_json, sha256_bytes
from gradsift.seeds import key64, stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.types import RowStatus, TokenRow

KINDS = ("clean", "replay", "conflict", "noise", "duplicate", "irrelevant")
HEADS = 4


@dataclass(frozen=True)
class ArithmeticSettings:
    """Sizes and rules; fixed in a committed file before any method is tried.

    Args:
        modulus: p.
        clean: rows of B with the right answer, min(x, y).
        replay: correct rows of A.
        conflict: rows of A under the wrong rule.
        noise: rows of B with random answers.
        duplicate: copies of one clean row.
        irrelevant: rows of C.
        num_eval: held-out pairs per task.
        num_anchor: anchor pairs of A.
        num_target: target pairs of B.
        num_replay: replay pairs of A that an arm may train on.
        pretrain_steps: full-batch steps on A before anything else.
        pretrain_lr: their learning rate.
        pretrain_decay: their weight decay.
        hidden: width of the model.
        layers: its depth.
    """

    modulus: int = 17
    clean: int = 500
    replay: int = 300
    conflict: int = 300
    noise: int = 300
    duplicate: int = 150
    irrelevant: int = 150
    num_eval: int = 60
    num_anchor: int = 64
    num_target: int = 40
    num_replay: int = 64
    pretrain_steps: int = 600
    pretrain_lr: float = 3e-3
    pretrain_decay: float = 1.0
    hidden: int = 64
    layers: int = 2

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.hidden % (2 * HEADS):  # rotary embeddings take a head's width in pairs
            raise ConfigError("the width does not divide among the heads", where="hidden", got=self.hidden,
                              expected=f"a multiple of {2 * HEADS}")  # fmt: skip
        needed = {"A": self.num_eval + self.num_anchor + self.num_replay, "B": self.num_eval + self.num_target}
        for task, taken in needed.items():
            if taken >= self.modulus**2:
                raise ConfigError(
                    "the held-out pairs leave none for the pool",
                    where=f"arithmetic world, task {task}",
                    got=f"{taken} of {self.modulus**2} pairs",
                    expected=f"fewer than {self.modulus**2}",
                    do="raise modulus or lower num_eval, num_anchor, num_target or num_replay",
                )


@dataclass(frozen=True)
class _Words:
    """The vocabulary: numbers first, then BOS, '=', padding and one operator per task."""

    modulus: int

    @property
    def size(self) -> int:
        return self.modulus + 6

    @property
    def bos(self) -> int:
        return self.modulus

    @property
    def equals(self) -> int:
        return self.modulus + 1

    @property
    def pad(self) -> int:
        return self.modulus + 2

    def operator(self, task: str) -> int:
        return self.modulus + 3 + "ABC".index(task)


def _row(words: _Words, name: str, task: str, x: int, y: int, z: int) -> TokenRow:
    ids = np.array([words.bos, x, words.operator(task), y, words.equals, z], dtype=np.int32)
    trained = np.array([False] * 5 + [True])
    return TokenRow(name, ids, trained, len(ids), RowStatus.OK)


def _rules(s: ArithmeticSettings) -> dict[str, Callable[[int, int], int]]:
    p = s.modulus
    return {
        "A": lambda x, y: (x + y) % p,
        "B": min,
        "C": lambda x, y: (x * y) % p,
        "wrong A": lambda x, y: (x - y + 1) % p,
    }


def arithmetic_world(seed: int, settings: ArithmeticSettings | None = None) -> World:
    """Build one seed of the world, pretraining its model (about 20 s on one core).

    Args:
        seed: of weights, splits and rows.
        settings: sizes and rules.

    Returns:
        The world.
    """
    s = settings or ArithmeticSettings()
    words, rules = _Words(s.modulus), _rules(s)
    pairs = {task: _split_pairs(s, seed, task) for task in "ABC"}
    pool, kinds = _pool(s, words, rules, pairs, seed)
    texts = {row.id: " ".join(f"w{t}" for t in row.input_ids) for row in pool}

    def known(name: str, task: str, some: Sequence[tuple[int, int]]) -> tuple[TokenRow, ...]:
        rows = tuple(_row(words, f"{name}-{x:02d}-{y:02d}", task, x, y, rules[task](x, y)) for x, y in some)
        texts.update({row.id: " ".join(f"w{t}" for t in row.input_ids) for row in rows})
        return rows

    weights = _pretrained(
        s, words, seed, known("pretrain", "A", [(x, y) for x in range(s.modulus) for y in range(s.modulus)])
    )
    first: dict[bytes, str] = {}
    copy_of = {}
    for row in pool:
        original = first.setdefault(row.input_ids.tobytes(), row.id)
        if original != row.id:
            copy_of[row.id] = original
    return World(
        name="arithmetic",
        seed=seed,
        make_model=lambda: _model(s, words, seed, weights),
        pool=pool,
        kinds=kinds,
        sources={row.id: "pool" for row in pool},
        texts=texts,
        anchors={"A": known("anchor", "A", pairs["A"]["anchor"])},
        target=known("target", "B", pairs["B"]["target"]),
        replay=known("replay", "A", pairs["A"]["replay"]),
        evaluations=(
            EvalSet("B", "domain", known("eval-b", "B", pairs["B"]["eval"])),
            EvalSet("A", "general", known("eval-a", "A", pairs["A"]["eval"])),
        ),
        metric="accuracy",
        pad_id=words.pad,
        copy_of=copy_of,
        looks_domain=frozenset(row.id for row in pool if row.input_ids[2] == words.operator("B")),
    )


def _split_pairs(s: ArithmeticSettings, seed: int, task: str) -> dict[str, list[tuple[int, int]]]:
    order = stream(seed, f"arithmetic/pairs/{task}").numpy().permutation(s.modulus**2)
    every = [(int(k) // s.modulus, int(k) % s.modulus) for k in order]
    second = s.num_anchor if task == "A" else s.num_target
    third = s.num_replay if task == "A" else 0
    a, b = s.num_eval, s.num_eval + second
    return {
        "eval": every[:a],
        "anchor": every[a:b],
        "target": every[a:b],
        "replay": every[b : b + third],
        "pool": every[b + third :],
    }


def _pool(
    s: ArithmeticSettings,
    words: _Words,
    rules: dict[str, Callable[[int, int], int]],
    pairs: dict[str, dict[str, list[tuple[int, int]]]],
    seed: int,
) -> tuple[tuple[TokenRow, ...], dict[str, str]]:
    task = {"clean": "B", "replay": "A", "conflict": "A", "noise": "B", "duplicate": "B", "irrelevant": "C"}
    rng = stream(seed, "arithmetic/pool").numpy()
    made: list[tuple[str, str, int, int, int]] = []
    for kind in KINDS:
        some = pairs[task[kind]]["pool"]
        if kind == "duplicate":
            drawn = [int(rng.integers(len(some)))] * s.duplicate
        else:
            drawn = _cover(rng, len(some), getattr(s, kind))
        for k in drawn:
            x, y = some[k]
            rule = rules["wrong A"] if kind == "conflict" else rules[task[kind]]
            z = int(rng.integers(s.modulus)) if kind == "noise" else rule(x, y)
            made.append((kind, task[kind], x, y, z))
    rows, kinds = [], {}
    for place, (kind, op, x, y, z) in enumerate(made):
        name = f"{key64(seed, 'arithmetic/id', place):016x}"  # an id that tells nothing of the kind
        rows.append(_row(words, name, op, x, y, z))
        kinds[name] = kind
    return tuple(sorted(rows, key=lambda row: row.id)), kinds


def _cover(rng: np.random.Generator, size: int, count: int) -> list[int]:
    """Draw evenly: every item floor(count / size) times, the rest without repetition."""
    whole = [k for _ in range(count // size) for k in range(size)]
    return whole + [int(k) for k in rng.permutation(size)[: count % size]]


def _model(s: ArithmeticSettings, words: _Words, seed: int, weights: dict[str, torch.Tensor] | None) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words.size,
        hidden_size=s.hidden,
        intermediate_size=176 * s.hidden // 64,
        num_hidden_layers=s.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=8,
        tie_word_embeddings=False,
        bos_token_id=words.bos,
        eos_token_id=words.equals,
        pad_token_id=words.pad,
    )
    torch.manual_seed(key64(seed, "arithmetic/weights") % 2**63)
    model = LlamaForCausalLM(config)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def _pretrained(s: ArithmeticSettings, words: _Words, seed: int, rows: tuple[TokenRow, ...]) -> dict[str, torch.Tensor]:
    """Train on A, or read the weights that an earlier run of the same seed and settings left in the cache folder."""
    from safetensors.torch import load_file, save_file

    own = {n: getattr(s, n) for n in ("modulus", "pretrain_steps", "pretrain_lr", "pretrain_decay", "hidden", "layers")}
    # Raise `version` when the training code changes what it computes; another torch may round in another way.
    key = sha256_bytes(canonical_json({**own, "seed": seed, "torch": torch.__version__, "version": 1}).encode())[:32]
    path = cache_folder() / "worlds" / f"arithmetic-{key}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise StoreError(
                "cached weights are damaged", where=str(path), got=str(error), do="delete this file and run again"
            ) from None
    model = _model(s, words, seed, None)
    loop = Loop(
        model, LoopConfig(lr=s.pretrain_lr, total_steps=s.pretrain_steps, weight_decay=s.pretrain_decay), words.pad
    )
    for _ in range(s.pretrain_steps):
        loop.step(rows)
    weights = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    with published_file(path) as temporary:
        save_file(weights, temporary)
    return weights
