"""Tokens exactly as the trainer sees them: template, mask and truncation of TRL's SFTTrainer, row by row.

Read from TRL 1.16 (``SFTTrainer._prepare_dataset``) and tested against it. Conversations go through the chat template;
strings get the end token when they lack it; a completion begins where the tokenized prompt and the tokenized whole part;
masks are made before truncation, and truncation keeps the start. No begin token is added that the trainer would not add.

Departures, each a counted status instead of a stopped run: a row that TRL stops at is TOKENIZE_ERROR or, without a
trained token, NO_TRAINED_TOKEN; a row whose only label is its first token, which nothing predicts, is NO_TRAINED_TOKEN
(TRL keeps it); a row may not bring a chat template or tokenizer switches of its own in ``chat_template_kwargs``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.data.prompts import template_tokens
from gradsift.data.templates import MarkedTemplate, marked_template, no_template, template_text
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
# Arguments of ``apply_chat_template`` that a row may not set: code to render with, and switches that change what comes back.
RESERVED = frozenset(
    {
        "chat_template",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)


@dataclass(frozen=True)
class MaskRule:
    """Which tokens carry loss.

    Args:
        loss_on: as asked; None takes the default of each row's shape.
        template: chat template in use; None without conversations. The trainer must be handed it when
            ``template_origin`` is ``gradsift``, and swaps it in by itself when it is ``trl``.
        template_origin: whose marked template it is: ``tokenizer``, ``trl``, ``gradsift``, or empty when no markers are
            needed.
        template_sha256: hash of the template in use, or None without conversations.
        eos_token: what strings are closed with, or None when the tokenizer has no end token.
    """

    loss_on: LossOn | None
    template: str | None
    template_origin: str
    template_sha256: str | None
    eos_token: str | None = None

    def of(self, shape: Shape) -> LossOn:
        """Give the rule for rows of a shape.

        Args:
            shape: the rows' shape.

        Returns:
            assistant, completion or all.
        """
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
        _check_loss(loss_on, shape)
    original = template_text(tokenizer)
    if "messages" in shapes and original is None:
        raise no_template()
    marked: MarkedTemplate | None = None
    if "assistant" in {loss_on or DEFAULT_LOSS[shape] for shape in shapes}:
        _require_offsets(tokenizer)
        marked = marked_template(tokenizer)
    text = marked.text if marked else (original if set(shapes) - {"text"} else None)
    end = tokenizer.eos_token
    return MaskRule(
        loss_on,
        text,
        marked.origin if marked else "",
        hashlib.sha256(text.encode("utf-8")).hexdigest() if text else None,
        end if isinstance(end, str) else None,
    )


def _check_loss(loss_on: LossOn | None, shape: Shape) -> None:
    if loss_on is None or loss_on in ALLOWED_LOSS[shape]:
        return
    raise ConfigError(
        f"rows of shape {shape} cannot take the loss on {loss_on}",
        where="--loss-on",
        got=loss_on,
        expected=" or ".join(ALLOWED_LOSS[shape]),
        do=f"leave --loss-on out (the default for {shape} is {DEFAULT_LOSS[shape]}), or convert the rows",
    )


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "the tokenizer does not say which characters a token stands for, so assistant turns cannot be masked",
            where="navigator's tokenizer",
            got=type(tokenizer).__name__,
            expected="a tokenizer with tokenizer.json (a fast tokenizer)",
            do="--loss-on all, or another --navigator",
        )


def trl_arguments(loss_on: LossOn | None, shape: Shape) -> dict[str, bool]:
    """Translate to TRL's ``SFTConfig``, which decides for a whole data set.

    ``assistant`` on prompt and completion marks the assistant's turns in both, so the completion mask is switched off.

    Args:
        loss_on: as asked, or None for the default of the shape.
        shape: the data set's shape.

    Returns:
        The two keyword arguments.

    Raises:
        ConfigError: the shape cannot be trained that way.
    """
    _check_loss(loss_on, shape)
    chosen = loss_on or DEFAULT_LOSS[shape]
    return {"assistant_only_loss": chosen == "assistant", "completion_only_loss": chosen == "completion"}


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rule: MaskRule,
    *,
    max_length: int,
    find_template: bool = False,
) -> tuple[TokenRow, ...]:
    """Tokenize every row that could be read.

    Args:
        rows: rows of a pool, in input order.
        tokenizer: the navigator's.
        rule: which tokens carry loss.
        max_length: tokens kept from the start.
        find_template: also say which tokens are the chat template's own.

    Returns:
        One token row per row, in the same order; rows that are not usable have no tokens, or the tokens that show why.
    """
    made = tuple(_tokenize_row(row, tokenizer, rule, max_length) for row in rows)
    if not find_template:
        return made
    return tuple(_with_template(row, one, tokenizer, rule) for row, one in zip(rows, made, strict=True))


def _with_template(row: Row, made: TokenRow, tokenizer: PreTrainedTokenizerBase, rule: MaskRule) -> TokenRow:
    if not made.status.usable or row.example is None:
        return made
    marked = rule.of(row.example.shape) == "assistant" and rule.template_origin != "tokenizer"
    ids = _encode(row.example, tokenizer, rule).ids
    mask = template_tokens(row.example, tokenizer, rule.template if marked else None, ids)
    return replace(made, template=mask[: made.num_tokens])


def _tokenize_row(row: Row, tokenizer: PreTrainedTokenizerBase, rule: MaskRule, max_length: int) -> TokenRow:
    if not row.status.usable or row.example is None:
        return _without_tokens(row.id, row.status, row.reason)
    try:
        encoded = _encode(row.example, tokenizer, rule)
    except BaseException as error:  # tokenizers and templates raise what they like; one bad row costs one row
        # A panic of the Rust tokenizer is no Exception; Ctrl-C is none either and must go through.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return _without_tokens(row.id, RowStatus.TOKENIZE_ERROR, _why(error, row.example))
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


def _why(error: BaseException, example: Example) -> str:
    try:
        json.dumps(example.fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # tokenizers only say that their input has the wrong type
        return "the text holds a lone surrogate, half of a character, which cannot be encoded"
    except (TypeError, ValueError, RecursionError):
        pass
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words[:300].encode("utf-8", "backslashreplace").decode("utf-8")


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
        before = _chat(prompt, fields, tokenizer, None, add_generation_prompt=True)["input_ids"]
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
        ids = _chat(messages, fields, tokenizer, None)["input_ids"]
        return _Encoded(ids, [True] * len(ids))
    template = None if rule.template_origin == "tokenizer" else rule.template
    got = _chat(messages, fields, tokenizer, template, return_assistant_tokens_mask=True)
    return _Encoded(got["input_ids"], [bool(bit) for bit in got["assistant_masks"]])


def _chat(
    messages: Sequence[Any],
    fields: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    **options: bool,
) -> Mapping[str, list[int]]:
    tools = fields.get("tools")
    extra = fields.get("chat_template_kwargs") or {}
    refused = sorted(RESERVED & set(extra))
    if refused:
        raise ValueError(f"chat_template_kwargs may not set {', '.join(refused)}")
    # As in TRL, what the row brings wins over the columns, and setting what TRL sets itself is an error.
    chosen = {
        "chat_template": template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **extra,
    }
    said = list(messages)
    if not said:  # not every version of transformers says so
        raise ValueError("empty conversation")
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        said, tokenize=True, return_dict=True, **options, **chosen
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
