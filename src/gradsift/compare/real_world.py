"""The real-data world: SmolLM2-135M with a fresh adapter is to learn a professional domain from a pool with junk in it.

The pool mixes *clean* domain questions, *replay* (general questions and prose), *wrong* (domain questions with a wrong
answer), *duplicate* (exact further copies of clean rows) and *other* (rows of other professional domains). Only answers
carry loss. Documents of lesson, evaluation, anchors, replay set, target and pool do not meet. The model first takes a short
lesson in the general sets (:mod:`gradsift.compare.real_base`), else there would be nothing to forget. Sizes are such that
one learning rate of one arm takes about five minutes on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from torch import nn

from gradsift.compare.cell import Grid
from gradsift.compare.real_base import Lesson, prepared
from gradsift.compare.real_data import DOMAINS, GENERAL, Item, Items, deal_items, read_items, wrong_answer
from gradsift.compare.text_world import exact_copies
from gradsift.compare.word_cue import fit_word_cue
from gradsift.compare.world import EvalSet, World
from gradsift.data.tokenize import mask_rule, tokenize_rows
from gradsift.errors import ConfigError, DataError, ModelError
from gradsift.models.adapter import attach_lora
from gradsift.models.load import Navigator, load_navigator, resolve_navigator
from gradsift.recipe import LoraConfig
from gradsift.seeds import key64
from gradsift.types import Example, Row, RowStatus, TokenRow

KINDS = ("clean", "replay", "wrong", "duplicate", "other")
# SmolLM2 was trained with this token before every text; its tokenizer adds none.
BEGIN = "<|endoftext|>"

REAL_GRID = Grid(lrs=(2e-4, 1e-3), num_steps=40, batch_size=4, budget=80, tokens_per_batch=1024)


@dataclass(frozen=True)
class RealSettings:
    """Sizes and rules; fixed in a committed file before any method is tried.

    Args:
        domain: what is to be learned.
        clean: domain rows with the right answer, of the domain's first source.
        replay: general rows of the pool.
        wrong: domain rows with a wrong answer.
        duplicate: further exact copies of clean rows.
        copies: copies per duplicated row.
        other: rows of the two other domains.
        num_eval: held-out rows of each source of the domain.
        num_eval_general: held-out rows of each general set.
        num_anchor: anchor rows of each general set.
        num_target: target rows of each source of the domain.
        num_replay: rows of each general set that an arm may train on.
        max_length: tokens of a row; a longer row is refused.
        lora_rank: rank of the adapter on all linear layers.
        lora_alpha: its alpha.
        begin: text before every row.
        lesson: rows of each general set that the starting weights were taught on, the same for every seed; 0 leaves the
            packaged model as it is.
        lesson_lr: learning rate of that lesson.
    """

    domain: Literal["medical", "legal", "financial"] = "medical"
    clean: int = 130
    replay: int = 40
    wrong: int = 30
    duplicate: int = 16
    copies: int = 4
    other: int = 24
    num_eval: int = 16
    num_eval_general: int = 12
    num_anchor: int = 12
    num_target: int = 12
    num_replay: int = 10
    max_length: int = 192
    lora_rank: int = 16
    lora_alpha: float = 32.0
    begin: str = BEGIN
    lesson: int = 64
    lesson_lr: float = 5e-4

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise ConfigError("there is no such domain", where="domain", got=self.domain, expected=", ".join(DOMAINS))
        if self.lesson < 0 or not self.lesson_lr > 0:
            raise ConfigError(
                "the lesson is out of range",
                where="lesson, lesson_lr",
                got=f"{self.lesson} rows at {self.lesson_lr}",
                expected="lesson >= 0 and lesson_lr > 0",
            )
        if self.copies < 1 or self.duplicate > self.copies * self.clean:
            raise ConfigError(
                "the duplicates need rows to copy",
                where="duplicate, copies",
                got=f"{self.duplicate} copies, {self.copies} of each of {self.clean} clean rows",
                expected="copies >= 1 and duplicate <= copies * clean",
            )

    @property
    def bad(self) -> Mapping[str, int]:
        """Kind of bad domain row -> how many the pool holds."""
        return {"wrong": self.wrong}

    def spoiled(self, kind: str, item: Item, others: Sequence[Item], seed: int) -> str:
        """Give a domain question a bad answer.

        Args:
            kind: of ``bad``.
            item: the question and its right answer.
            others: the domain's items in the pool, and no others: their answers are evaluation's.
            seed: of the world.

        Returns:
            The answer.
        """
        return wrong_answer(item, others, seed)


def real_world(
    seed: int,
    settings: RealSettings | None = None,
    navigator: Navigator | None = None,
    items: Items | None = None,
    device: str = "cpu",
) -> World:
    """Build one seed of the world from the packaged model and data.

    Args:
        seed: of the deal, the wrong answers and the adapter.
        settings: sizes and rules.
        navigator: a model already at hand; the packaged one by default.
        items: items already at hand; the wheel's by default.
        device: where the packaged model is loaded; cpu or cuda:N.

    Returns:
        The world, measured in nats.
    """
    s = settings or RealSettings()
    navigator = navigator or load_navigator(resolve_navigator("auto"), device=device)
    items = items or read_items()
    tokenize = _tokenizer(navigator, s)
    lesson, items = _set_aside(s, items)
    dealt, base = _deal(s, items, seed), ""
    if lesson:
        taught = tokenize([(f"lesson/{item.id}", item, item.answer) for item in lesson])
        how, digest = Lesson(lr=s.lesson_lr), navigator.model_sha256
        model, base = prepared(navigator.model, digest, taught, how, _pad(navigator))
        navigator = replace(navigator, model=model)
    texts: dict[str, str] = {}

    def rows(role: str, sources: Sequence[str]) -> tuple[TokenRow, ...]:
        some = [item for source in sources for item in dealt[source][role]]
        named = [(f"{role}/{item.id}", item, item.answer) for item in some]
        texts.update({name: f"{item.prompt} {answer}".strip() for name, item, answer in named})
        return tokenize(named)

    evaluations = [EvalSet(source, "domain", rows("eval", [source])) for source in DOMAINS[s.domain]]
    evaluations += [EvalSet(name, "general", rows("eval", sources)) for name, sources in GENERAL.items()]
    texts.clear()  # evaluation texts stay out of every lexical score
    anchors = {name: rows("anchor", sources) for name, sources in GENERAL.items()}
    replay = tuple(row for sources in GENERAL.values() for row in rows("replay", sources))
    general = list(texts.values())
    target = rows("target", DOMAINS[s.domain])
    made = _pool(s, dealt, seed)
    pool = tokenize([(name, item, answer) for name, _, item, answer in made])
    pool_texts = {name: f"{item.prompt} {answer}".strip() for name, _, item, answer in made}
    cue = fit_word_cue([texts[row.id] for row in target], general, pool_texts.values())
    return World(
        name=f"real-{s.domain}",
        seed=seed,
        make_model=lambda: _fresh(navigator, s, seed),
        pool=pool,
        kinds={name: kind for name, kind, _, _ in made},
        sources={name: item.source for name, _, item, _ in made},
        texts={**texts, **pool_texts},
        anchors=anchors,
        target=target,
        replay=replay,
        evaluations=tuple(evaluations),
        metric="loss",
        pad_id=_pad(navigator),
        copy_of=exact_copies(pool),
        looks_domain=frozenset(row.id for row in pool if cue.score(pool_texts[row.id]) > 0),
        base=base,
    )


def share(count: int, sources: Sequence[str], source: str) -> int:
    """Share a count evenly between sources, the first ones taking the rest.

    Args:
        count: to share.
        sources: distinct names.
        source: one of them.

    Returns:
        Its part.
    """
    return count // len(sources) + (list(sources).index(source) < count % len(sources))


def _others(s: RealSettings) -> tuple[str, ...]:
    return tuple(sources[0] for domain, sources in DOMAINS.items() if domain != s.domain)


def _set_aside(s: RealSettings, items: Items) -> tuple[tuple[Item, ...], Items]:
    """Take the lesson's items, the same for every seed, and leave out every document they came from."""
    lesson: list[Item] = []
    left = dict(items.by_source)
    for sources in GENERAL.values() if s.lesson else ():
        for source in sources:
            name = f"real/lesson/{source}"
            taken = deal_items(left[source], {"lesson": share(s.lesson, sources, source)}, 0, name)["lesson"]
            gone = {item.document for item in taken}
            left[source] = tuple(item for item in left[source] if item.document not in gone)
            lesson += taken
    return tuple(lesson), replace(items, by_source=left)


def _deal(s: RealSettings, items: Items, seed: int) -> dict[str, dict[str, tuple[Item, ...]]]:
    """Deal the items of every source to the roles."""
    own, general = DOMAINS[s.domain], tuple(GENERAL)
    sizes: dict[str, dict[str, int]] = {source: {"eval": s.num_eval, "target": s.num_target} for source in own}
    sizes[own[0]]["pool"] = s.clean + sum(s.bad.values())
    for name, sources in GENERAL.items():
        for source in sources:
            sizes[source] = {
                "eval": share(s.num_eval_general, sources, source),
                "anchor": share(s.num_anchor, sources, source),
                "replay": share(s.num_replay, sources, source),
                "pool": share(share(s.replay, general, name), sources, source),
            }
    for source in _others(s):
        sizes[source] = {"pool": share(s.other, _others(s), source)}
    return {
        source: deal_items(items.by_source[source], wanted, seed, f"real/deal/{source}")
        for source, wanted in sizes.items()
    }


def _pool(
    s: RealSettings, dealt: Mapping[str, Mapping[str, tuple[Item, ...]]], seed: int
) -> list[tuple[str, str, Item, str]]:
    """Make the pool in id order: id, kind, item, answer."""
    own = DOMAINS[s.domain][0]
    mine = dealt[own]["pool"]
    clean, rest = mine[: s.clean], iter(mine[s.clean :])
    made = [("clean", item.id, item, item.answer) for item in clean]
    for kind, count in s.bad.items():
        some = islice(rest, count)
        made += [(kind, item.id, item, s.spoiled(kind, item, mine, seed)) for item in some]
    for k in range(s.duplicate):
        item = clean[k // s.copies]
        made.append(("duplicate", f"{item.id}/{k % s.copies}", item, item.answer))
    general = [item for sources in GENERAL.values() for source in sources for item in dealt[source]["pool"]]
    made += [("replay", item.id, item, item.answer) for item in general]
    made += [("other", item.id, item, item.answer) for source in _others(s) for item in dealt[source]["pool"]]
    # An id that tells nothing of the kind.
    return sorted(
        (f"{key64(seed, 'real/id', kind, name):016x}", kind, item, answer) for kind, name, item, answer in made
    )


def _tokenizer(
    navigator: Navigator, s: RealSettings
) -> Callable[[Sequence[tuple[str, Item, str]]], tuple[TokenRow, ...]]:
    rule = mask_rule(navigator.tokenizer, "completion", {"prompt_completion"})

    def tokenize(named: Sequence[tuple[str, Item, str]]) -> tuple[TokenRow, ...]:
        given = []
        for place, (name, item, answer) in enumerate(named):
            fields = {"prompt": s.begin + item.prompt, "completion": f" {answer}"}
            example = Example(name, "prompt_completion", fields)
            given.append(Row(name, item.source, "", place, RowStatus.OK, example=example))
        made = tokenize_rows(given, navigator.tokenizer, rule, max_length=s.max_length)
        bad = next((row for row in made if row.status is not RowStatus.OK), None)
        if bad is not None:
            raise DataError("a row of the world cannot be used", where=bad.id, got=bad.reason, do="raise max_length")
        return tuple(
            _without_end(row) if not item.prompt else row for row, (_, item, _) in zip(made, named, strict=True)
        )

    return tokenize


def _without_end(row: TokenRow) -> TokenRow:
    """Drop the end token of cut prose: it ends nowhere, and training on such rows would teach where we cut."""
    return replace(row, input_ids=row.input_ids[:-1], trained=row.trained[:-1], num_untruncated=row.num_tokens - 1)


def _pad(navigator: Navigator) -> int:
    """Padding is masked everywhere, so the end token serves where there is none."""
    tokenizer = navigator.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not isinstance(pad, int):
        raise ModelError("the tokenizer has neither a padding nor an end token", where=navigator.resolved.name)
    return pad


def _fresh(navigator: Navigator, s: RealSettings, seed: int) -> nn.Module:
    """Copy the model, sharing the frozen weights, and attach the seed's adapter."""
    return attach_lora(shared_copy(navigator.model), LoraConfig(rank=s.lora_rank, alpha=s.lora_alpha), seed)


def shared_copy(model: Any) -> Any:
    """Copy a frozen model's structure without its weights, which both then read.

    Args:
        model: every parameter has ``requires_grad`` False.

    Returns:
        A model that computes the same and costs no memory for weights.

    Raises:
        ValueError: a parameter is trainable, so training one copy would move the other (our own mistake).
    """
    if any(p.requires_grad for p in model.parameters()):
        raise ValueError("only frozen models are shared")
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def layer_drop_navigator(model: Any, first: int = 20, last: int = 23) -> Any:
    """Make a smaller relative of a model by leaving out middle layers, unhealed, for the transfer audit.

    SmolLM2-135M without layers 20 to 23 has 120 million parameters; its perplexity on plain English rises from 14.6 to 53.

    Args:
        model: a frozen Llama-like model with ``model.layers``; left as it is.
        first: first layer left out, 0-based.
        last: last layer left out.

    Returns:
        The smaller model; it shares the remaining weights.

    Raises:
        ModelError: the model has no such layers, or none would be left.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or not 0 <= first <= last < len(layers) or last - first + 1 == len(layers):
        raise ModelError(
            "these layers cannot be left out",
            where=type(model).__name__,
            got=f"layers {first} to {last}",
            expected="some of model.layers" if layers is None else f"some, not all, of layers 0 to {len(layers) - 1}",
        )
    small = shared_copy(model)
    small.model.layers = nn.ModuleList(layer for k, layer in enumerate(small.model.layers) if not first <= k <= last)
    layers: Any = small.model.layers
    for k, layer in enumerate(layers):
        layer.self_attn.layer_idx = k  # the place in a key-value cache
    small.config.num_hidden_layers = len(small.model.layers)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [t for k, t in enumerate(small.config.layer_types) if not first <= k <= last]
    return small
