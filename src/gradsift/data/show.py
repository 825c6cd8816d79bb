"""A row as a person reads it: text pieces with and without loss, tokens one by one, words for lexical scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gradsift.types import Row, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A run of tokens that all carry loss, or all do not.

    Args:
        text: decoded, special tokens included.
        trained: whether they carry loss.
    """

    text: str
    trained: bool


@dataclass(frozen=True)
class ShownToken:
    """One token.

    Args:
        position: 0-based.
        id: token id.
        text: decoded alone.
        trained: whether it carries loss.
    """

    position: int
    id: int
    text: str
    trained: bool


def segments(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, ...]:
    """Cut a row into runs with and without loss.

    Args:
        row: a token row.
        tokenizer: decodes it.

    Returns:
        Segments in order; nothing for a row without tokens.
    """
    pairs = zip(row.input_ids.tolist(), row.trained.tolist(), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1])
    return tuple(Segment(str(tokenizer.decode([i for i, _ in run])), trained) for trained, run in runs)


def token_table(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> tuple[ShownToken, ...]:
    """List a row's tokens.

    Args:
        row: a token row.
        tokenizer: decodes them.

    Returns:
        One entry per token.
    """
    pairs = zip(row.input_ids.tolist(), row.trained.tolist(), strict=True)
    return tuple(ShownToken(n, i, str(tokenizer.decode([i])), bool(t)) for n, (i, t) in enumerate(pairs))


def plain_text(row: Row) -> str:
    """Join all text of a row, prompt and answer, without any template.

    Args:
        row: a row that could be read.

    Returns:
        Text, empty for a row that could not.
    """
    if row.example is None:
        return ""
    fields = row.example.fields
    parts: list[str] = []
    for name in ("text", "prompt", "completion", "messages"):
        parts += plain_parts(fields.get(name))
    return "\n".join(parts)


def plain_parts(value: Any) -> Iterable[str]:
    """List the texts of a column of messages, or the column itself where it is a string.

    Args:
        value: a string, a message, a list of messages or anything else.

    Returns:
        The texts in order; nothing for other values.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in plain_parts(item)]
    if isinstance(value, dict):
        return plain_parts(value.get("content")) or plain_parts(value.get("text"))
    return []
