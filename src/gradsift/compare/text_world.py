"""The text world: a small language model that has read general text is to learn medical abstracts (after trials.md, 13).

The pool mixes *clean* medical chunks, *replay* (general chunks of the kind the base has read), *conflict* (general chunks
with their words shuffled: the same tokens, so no word tells them from replay), *noise* (medical chunks with their words
in alphabetical order), one *duplicate* many times, and *irrelevant* legal chunks. Documents of evaluation, anchors, replay set, target
and pool do not meet, and the base has read none of them.

Noise is sorted and not shuffled because a base that has not read the domain learns its vocabulary even from shuffled rows:
with shuffled noise a random draw of domain-looking rows came to the oracle's hypervolume (0.257 against 0.267, seeds 900
and 901). The pool holds 100 clean rows for a budget of 160: the oracle takes all of them, and replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradsift.compare.cell import Grid
from gradsift.compare.text_base import BaseSettings, TextBase, text_base
from gradsift.compare.text_data import (
    DOMAIN,
    IRRELEVANT,
    Document,
    chunk_row,
    cut_chunks,
    deal_documents,
    shuffle_words,
    sort_words,
)
from gradsift.compare.word_cue import fit_word_cue
from gradsift.compare.world import EvalSet, World
from gradsift.errors import ConfigError
from gradsift.seeds import key64, stream
from gradsift.types import TokenRow

KINDS = ("clean", "replay", "conflict", "noise", "duplicate", "irrelevant")
# General sources of the worlds. Stories are for the base alone: they are few and long.
SOURCES = ("news", "wiki", "talk")

TEXT_GRID = Grid(lrs=(5e-5, 2e-4, 8e-4), num_steps=60, batch_size=8, budget=160, tokens_per_batch=4096)


@dataclass(frozen=True)
class TextSettings:
    """Sizes and rules; fixed in a committed file before any method is tried.

    Args:
        clean: medical chunks.
        replay: general chunks.
        conflict: general chunks with their words shuffled.
        noise: medical chunks with their words in alphabetical order.
        duplicate: copies of one medical chunk.
        irrelevant: legal chunks.
        num_eval: held-out medical chunks.
        num_eval_general: held-out chunks of each general source.
        num_anchor: anchor chunks of each general source.
        num_target: target chunks, medical.
        num_replay: chunks of each general source that an arm may train on.
        per_document: most chunks taken from one document.
        base_key: :meth:`BaseSettings.key` of the base model; another base is refused.
    """

    clean: int = 100
    replay: int = 120
    conflict: int = 120
    noise: int = 120
    duplicate: int = 60
    irrelevant: int = 80
    num_eval: int = 72
    num_eval_general: int = 40
    num_anchor: int = 24
    num_target: int = 48
    num_replay: int = 32
    per_document: int = 4
    base_key: str = BaseSettings().key()


def text_world(seed: int, settings: TextSettings | None = None, base: TextBase | None = None) -> World:
    """Build one seed of the world; the base model comes from the cache, or is trained first (about 10 CPU minutes).

    Args:
        seed: of the deal of documents, the drawn chunks and the shuffles.
        settings: sizes and rules.
        base: a base model already at hand.

    Returns:
        The world, measured in nats; every seed starts from the same weights.

    Raises:
        ConfigError: the base is not the one that the settings name.
    """
    s = settings or TextSettings()
    base = base or text_base()
    if base.settings.key() != s.base_key:
        raise ConfigError(
            "the settings ask for another base model",
            where="world.settings.base_key",
            got=s.base_key,
            expected=base.settings.key(),
            do="leave base_key out; figures of another base cannot be continued",
        )
    dealt = _deal(s, base, seed)
    texts: dict[str, str] = {}

    def rows(role: str, source: str, count: int) -> tuple[TokenRow, ...]:
        some = _draw(dealt[source][role], base, s, seed, role)[:count]
        made = tuple(chunk_row(f"{role}/{name}", text, base.tokenizer, base.settings.length) for name, text in some)
        texts.update({row.id: text for row, (_, text) in zip(made, some, strict=True)})
        return made

    pool, kinds, pool_texts = _pool(s, base, dealt, seed)
    evaluations = [EvalSet(DOMAIN, "domain", rows("eval", DOMAIN, s.num_eval))]
    evaluations += [EvalSet(source, "general", rows("eval", source, s.num_eval_general)) for source in SOURCES]
    texts.clear()  # evaluation texts stay out of every lexical score
    anchors = {source: rows("anchor", source, s.num_anchor) for source in SOURCES}
    replay = tuple(row for source in SOURCES for row in rows("replay", source, s.num_replay))
    general = list(texts.values())
    target = rows("target", DOMAIN, s.num_target)
    cue = fit_word_cue([texts[row.id] for row in target], general, pool_texts.values())
    return World(
        name="text",
        seed=seed,
        make_model=base.model,
        pool=pool,
        kinds=kinds,
        sources={row.id: "pool" for row in pool},
        texts={**texts, **pool_texts},
        anchors=anchors,
        target=target,
        replay=replay,
        evaluations=tuple(evaluations),
        metric="loss",
        pad_id=base.tokenizer.pad,
        copy_of=exact_copies(pool),
        looks_domain=frozenset(row.id for row in pool if cue.score(pool_texts[row.id]) > 0),
    )


def exact_copies(pool: Sequence[TokenRow]) -> dict[str, str]:
    """Find rows whose tokens and mask an earlier row has.

    Args:
        pool: rows in id order.

    Returns:
        Row id -> id of its first copy; rows without an earlier one are absent.
    """
    first: dict[bytes, str] = {}
    copies = {}
    for row in pool:
        original = first.setdefault(row.input_ids.tobytes() + row.trained.tobytes(), row.id)
        if original != row.id:
            copies[row.id] = original
    return copies


def _deal(s: TextSettings, base: TextBase, seed: int) -> dict[str, dict[str, tuple[Document, ...]]]:
    """Deal the documents of every source to the roles."""

    def usable(document: Document) -> int:
        return min(s.per_document, len(cut_chunks(document.text, base.tokenizer, base.settings.length)))

    general = {"eval": s.num_eval_general, "anchor": s.num_anchor, "replay": s.num_replay}
    sizes: dict[str, Mapping[str, int]] = {
        source: {**general, "pool": _quota(s.replay, source) + _quota(s.conflict, source)} for source in SOURCES
    }
    sizes[DOMAIN] = {"eval": s.num_eval, "target": s.num_target, "pool": s.clean + s.noise + 1}
    sizes[IRRELEVANT] = {"pool": s.irrelevant}
    return {
        source: deal_documents(base.held_out[source], wanted, seed, f"text/deal/{source}", usable)
        for source, wanted in sizes.items()
    }


def _quota(count: int, source: str) -> int:
    """Share a count evenly between the general sources, the first ones taking the rest."""
    return count // len(SOURCES) + (SOURCES.index(source) < count % len(SOURCES))


def _draw(
    documents: Sequence[Document], base: TextBase, s: TextSettings, seed: int, role: str
) -> list[tuple[str, str]]:
    """Draw at most ``per_document`` chunks of each document and put them all in keyed order."""
    drawn: list[tuple[float, str, str]] = []
    for document in documents:
        chunks = cut_chunks(document.text, base.tokenizer, base.settings.length)
        names = [f"{document.id}#{k:03d}" for k in range(len(chunks))]
        keyed = zip(stream(seed, f"text/chunks/{role}").uniform(names).tolist(), names, chunks, strict=True)
        drawn += sorted(keyed)[: s.per_document]
    return [(name, text) for _, name, text in sorted(drawn)]


def _pool(
    s: TextSettings, base: TextBase, dealt: Mapping[str, Mapping[str, tuple[Document, ...]]], seed: int
) -> tuple[tuple[TokenRow, ...], dict[str, str], dict[str, str]]:
    """Make the pool: rows in id order, their kinds and their words."""
    made: list[tuple[str, str, str]] = []  # kind, chunk, words

    def take(source: str, *parts: tuple[str, int]) -> list[tuple[str, str]]:
        left = _draw(dealt[source]["pool"], base, s, seed, "pool")
        for kind, count in parts:
            some, left = left[:count], left[count:]
            made.extend((kind, name, _spoil(kind, name, text, seed)) for name, text in some)
        return left

    for source in SOURCES:
        take(source, ("replay", _quota(s.replay, source)), ("conflict", _quota(s.conflict, source)))
    rest = take(DOMAIN, ("clean", s.clean), ("noise", s.noise))
    name, text = rest[0]  # the deal asked for one chunk more than clean and noise
    made += [("duplicate", f"{name}/{k}", text) for k in range(s.duplicate)]
    take(IRRELEVANT, ("irrelevant", s.irrelevant))
    rows, kinds, texts = [], {}, {}
    for kind, name, text in made:
        row = f"{key64(seed, 'text/id', kind, name):016x}"  # an id that tells nothing of the kind
        rows.append(chunk_row(row, text, base.tokenizer, base.settings.length))
        kinds[row], texts[row] = kind, text
    return tuple(sorted(rows, key=lambda row: row.id)), kinds, texts


def _spoil(kind: str, name: str, text: str, seed: int) -> str:
    """Break the order of a chunk's words where its kind says so."""
    if kind == "conflict":
        return shuffle_words(text, stream(seed, f"text/shuffle/{name}").numpy())
    return sort_words(text) if kind == "noise" else text
