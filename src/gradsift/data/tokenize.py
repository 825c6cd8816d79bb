"""Tokens exactly as the trainer sees them: template, mask and truncation of TRL's SFTTrainer, row by row.

Read from TRL 1.16 (``SFTTrainer._prepare_dataset``) and tested against it. Conversations go through the chat template;
strings get the end token when they lack it; a completion begins where the tokenized prompt and the tokenized whole part;
masks are made before truncation, and truncation keeps the start. No begin token is added that the trainer would not add.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.data.templates import MarkedTemplate, marked_template, template_text
from gradsift.errors import ConfigError
from gradsift.types import Example, LossOn, Row, RowStatus, Shape, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LOSS: Mapping[Shape, LossOn] = {"messages": "assistant", "prompt_completion": "completion", "text": "all"}
ALLOWED_LOSS: Mapping[Shape, tuple[LossOn, ...]] = {
    "messages": ("assistant", "all"),
    "prompt_completion": ("completion", "assistant", "all"),
    "text": ("all",),
}


@dataclass(frozen=True)
class MaskRule:
    """Which tokens carry loss.

    Args:
        loss_on: as asked; None takes the default of each row's shape.
        template: chat template that renders conversations, or None for the tokenizer's own.
        template_origin: who marked it: ``tokenizer``, ``gradsift``, ``trl``, or empty when no markers are needed.
        template_sha256: hash of the template in use, or None without conversations.
    """

    loss_on: LossOn | None
    template: str | None
    template_origin: str
    template_sha256: str | None

    def of(self, shape: Shape) -> LossOn:
        """Give the rule for rows of a shape."""
        return self.loss_on or DEFAULT_LOSS[shape]


def mask_rule(tokenizer: PreTrainedTokenizerBase, loss_on: LossOn | None, shapes: Collection[Shape]) -> MaskRule:
    """Settle which tokens carry loss, before any row is tokenized.

    Args:
        tokenizer: the navigator's.
        loss_on: as asked, or None.
        shapes: shapes that occur in the data.

    Returns:
        The rule.

    Raises:
        ConfigError: a shape cannot be trained that way, or the chat template cannot say what the assistant wrote.
    """
    for shape in sorted(shapes):
        if loss_on is not None and loss_on not in ALLOWED_LOSS[shape]:
            raise ConfigError(
                f"rows of shape {shape} cannot take the loss on {loss_on}",
                where="--loss-on",
                got=loss_on,
                expected=" or ".join(ALLOWED_LOSS[shape]),
                do=f"leave --loss-on out (the default for {shape} is {DEFAULT_LOSS[shape]}), or convert the rows",
            )
    wanted = {loss_on or DEFAULT_LOSS[shape] for shape in shapes}
    marked: MarkedTemplate | None = None
    if "assistant" in wanted:
        marked = marked_template(tokenizer)
    text = marked.text if marked else (template_text(tokenizer) if set(shapes) - {"text"} else None)
    return MaskRule(
        loss_on,
        text,
        marked.origin if marked else "",
        hashlib.sha256(text.encode("utf-8")).hexdigest() if text else None,
    )


def trl_arguments(loss_on: LossOn) -> dict[str, bool]:
    """Translate to TRL's ``SFTConfig``.

    Args:
        loss_on: the rule of the data set's shape.

    Returns:
        Keyword arguments.
    """
    return {"assistant_only_loss": loss_on == "assistant", "completion_only_loss": loss_on == "completion"}


def tokenize_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, rule: MaskRule, *, max_length: int
) -> tuple[TokenRow, ...]:
    """Tokenize every row that could be read.

    Args:
        rows: rows of a pool, in input order.
        tokenizer: the navigator's.
        rule: which tokens carry loss.
        max_length: tokens kept from the start.

    Returns:
        One token row per row, in the same order; rows that are not usable have no tokens, or the tokens that show why.
    """
    return tuple(_tokenize_row(row, tokenizer, rule, max_length) for row in rows)


def _tokenize_row(row: Row, tokenizer: PreTrainedTokenizerBase, rule: MaskRule, max_length: int) -> TokenRow:
    if not row.status.usable or row.example is None:
        return _without_tokens(row.id, row.status, row.reason)
    try:
        encoded = _encode(row.example, tokenizer, rule)
    except Exception as error:  # tokenizers and templates raise what they like; one bad row costs one row
        words = " ".join(f"{type(error).__name__}: {error}".split())
        return _without_tokens(row.id, RowStatus.TOKENIZE_ERROR, words[:300])
    ids, trained = encoded.ids, encoded.trained
    total = len(ids)
    kept_ids = np.asarray(ids[:max_length], dtype=np.int32)
    kept = np.asarray(trained[:max_length], dtype=bool)
    result = TokenRow(row.id, kept_ids, kept, total, RowStatus.OK)
    if result.num_trained == 0:
        lost = sum(trained[1:])
        reason = f"all {lost} trained tokens lie beyond the first {max_length}" if lost else "no token carries loss"
        return TokenRow(row.id, kept_ids, kept, total, RowStatus.NO_TRAINED_TOKEN, reason)
    if total > max_length:
        reason = (
            f"cut from {total} to {max_length} tokens; {result.num_trained} of {sum(trained[1:])} trained ones are left"
        )
        return TokenRow(row.id, kept_ids, kept, total, RowStatus.TRUNCATED, reason)
    return result


def _without_tokens(row: str, status: RowStatus, reason: str) -> TokenRow:
    return TokenRow(row, np.zeros(0, np.int32), np.zeros(0, bool), 0, status, reason)


@dataclass(frozen=True)
class _Encoded:
    """Tokens and mask of one row before truncation."""

    ids: list[int]
    trained: list[bool]


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, rule: MaskRule) -> _Encoded:
    loss_on, fields = rule.of(example.shape), example.fields
    if example.shape == "text":
        ids = _plain(tokenizer, _with_end(fields["text"], tokenizer))
        return _Encoded(ids, [True] * len(ids))
    if example.shape == "messages":
        return _conversation(fields["messages"], fields, tokenizer, rule, loss_on)
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str):
        if loss_on == "assistant":
            raise ValueError("the loss on assistant turns needs message lists, and this row has strings")
        whole = _plain(tokenizer, prompt + _with_end(completion, tokenizer))
        before = _plain(tokenizer, prompt)
    else:
        both = _conversation([*prompt, *completion], fields, tokenizer, rule, loss_on)
        if loss_on == "assistant":
            return both
        whole = both.ids
        before = _chat(prompt, fields, tokenizer, rule, add_generation_prompt=True)["input_ids"]
    if loss_on == "all":
        return _Encoded(whole, [True] * len(whole))
    start = _common_prefix(before, whole)
    return _Encoded(whole, [i >= start for i in range(len(whole))])


def _conversation(
    messages: Sequence[Any],
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    rule: MaskRule,
    loss_on: LossOn,
) -> _Encoded:
    if loss_on != "assistant":
        ids = _chat(messages, fields, tokenizer, rule)["input_ids"]
        return _Encoded(ids, [True] * len(ids))
    got = _chat(messages, fields, tokenizer, rule, return_assistant_tokens_mask=True)
    return _Encoded(got["input_ids"], [bool(bit) for bit in got["assistant_masks"]])


def _chat(
    messages: Sequence[Any],
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    rule: MaskRule,
    **options: bool,
) -> Mapping[str, list[int]]:
    tools = fields.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    extra = dict(fields.get("chat_template_kwargs") or {})
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        list(messages),
        tools=tools,
        chat_template=rule.template,
        tokenize=True,
        return_dict=True,
        **{**extra, **options},
    )


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text=text)["input_ids"])  # type: ignore[arg-type]


def _with_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    return text if not isinstance(end, str) or text.endswith(end) else text + end


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))
