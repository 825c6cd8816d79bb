"""A row's prompt: which of its tokens are words of the prompt, and prompt and response as plain text (ours).

A chat template writes tokens of its own around every message. To tell them from the messages' words, the conversation is
rendered a second time with each text replaced by a mark; what stands between the marks is the template's. A rendering
that does not fit together again counts as template throughout, so such a row has no prompt token and is counted so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from gradsift.data.show import plain_parts
from gradsift.errors import ConfigError
from gradsift.types import Example, Row, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"\u27e6(\d+)\u27e7")


def prompt_mask(row: TokenRow) -> Bool[np.ndarray, " T"]:
    """Say which tokens are a row's prompt: without loss, before the last token with loss, and nobody's template.

    The first token is none of them, because nothing predicts it.

    Args:
        row: a token row.

    Returns:
        bool [T].
    """
    trained = np.flatnonzero(row.trained)
    mask = ~row.trained & (np.arange(row.num_tokens) < (trained[-1] if trained.size else 0))
    mask[:1] = False
    return mask if row.template is None else mask & ~row.template


def template_tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str | None, ids: Sequence[int]
) -> Bool[np.ndarray, " T"]:
    """Find the tokens that the chat template wrote.

    Args:
        example: the row.
        tokenizer: the navigator's.
        template: the template that ``ids`` were rendered with, or None for the tokenizer's own.
        ids: T token ids of the whole row, before truncation.

    Returns:
        bool [T]; a token counts as words when any of its characters is one of a message. Rows of plain strings have no
        template, and a rendering that cannot be taken apart is template throughout.

    Raises:
        ConfigError: the tokenizer does not say which characters a token stands for.
    """
    messages = _messages(example)
    if messages is None:
        return np.zeros(len(ids), dtype=bool)
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the tokenizer does not say which characters a token stands for, so prompts cannot be told from the template",
            where="navigator's tokenizer",
            got=type(tokenizer).__name__,
            expected="a tokenizer with tokenizer.json (a fast tokenizer)",
            do="choose another --navigator, or a method that reads no prompts",
        )
    marked, texts = _marked(messages)
    whole, frame = (_render(m, example.fields, tokenizer, template) for m in (messages, marked))
    spans = _spans(whole, frame, texts)
    got = tokenizer(text=whole, add_special_tokens=False, return_offsets_mapping=True)
    if spans is None or list(got["input_ids"]) != list(ids):  # type: ignore[arg-type]
        return np.ones(len(ids), dtype=bool)
    words = np.zeros(len(whole) + 1, dtype=np.int64)  # words[c]: characters of messages before c
    for start, end in spans:
        words[start + 1 : end + 1] += 1
    words = words.cumsum()
    return np.array([words[a] == words[b] for a, b in got["offset_mapping"]])  # type: ignore[index]


def _messages(example: Example) -> list[dict[str, Any]] | None:
    fields = example.fields
    if example.shape == "messages":
        return list(fields["messages"])
    if example.shape == "prompt_completion" and not isinstance(fields["prompt"], str):
        return [*fields["prompt"], *fields["completion"]]
    return None


def _marked(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Put a mark in the place of every text."""
    texts: list[str] = []

    def mark(text: str) -> str:
        texts.append(text)
        return f"\u27e6{len(texts) - 1}\u27e7"

    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            content = mark(content)
        elif isinstance(content, list):
            content = [{**part, "text": mark(part["text"])} if part["text"].strip() else part for part in content]
        out.append({**message, "content": content} if "content" in message else dict(message))
    return out, texts


def _render(
    messages: Sequence[Mapping[str, Any]],
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
) -> str:
    tools = fields.get("tools")
    chosen = {"chat_template": template, "tools": json.loads(tools) if isinstance(tools, str) else tools}
    chosen |= fields.get("chat_template_kwargs") or {}
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **chosen))  # type: ignore[arg-type]


def _spans(whole: str, frame: str, texts: Sequence[str]) -> list[tuple[int, int]] | None:
    """Places of the texts in the rendering, or None where the parts do not add up to it."""
    at, spans = 0, []
    pieces = _MARK.split(frame)  # template, number, template, number, ..., template
    for k, piece in enumerate(pieces):
        if k % 2 == 0:
            if not whole.startswith(piece, at):
                return None
            at += len(piece)
            continue
        after = pieces[k + 1]
        text = texts[int(piece)]
        fits = [t for t in (text, text.strip()) if whole.startswith(t + after, at)]
        if not fits:
            return None
        spans.append((at, at + len(fits[0])))
        at += len(fits[0])
    return spans if at == len(whole) else None


def prompt_and_response(row: Row) -> tuple[str, str]:
    """Split a row's text at its last turn of the assistant, or where its completion begins.

    Args:
        row: a row that could be read.

    Returns:
        Prompt and response without any template; a row of plain text is all response, and a row that could not be read
        is empty.
    """
    if row.example is None:
        return "", ""
    fields = row.example.fields
    if row.example.shape == "prompt_completion":
        return "\n".join(plain_parts(fields["prompt"])), "\n".join(plain_parts(fields["completion"]))
    if row.example.shape == "text":
        return "", "\n".join(plain_parts(fields["text"]))
    messages = list(fields["messages"])
    turns = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
    last = turns[-1] if turns else len(messages)
    return "\n".join(plain_parts(messages[:last])), "\n".join(plain_parts(messages[last : last + 1]))
