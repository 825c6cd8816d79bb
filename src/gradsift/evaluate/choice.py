"""Multiple choice by log-likelihood: the option the model finds likeliest after the question is its answer.

Accuracy of the summed log-likelihood, and of the one divided by the option's characters (``acc`` and ``acc_norm`` of
lm-eval, whose figures these reproduce). Chance-adjusted accuracy puts guessing at 0 and perfection at 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import nn

from gradsift.evaluate.losses import Tick, evaluate_rows
from gradsift.evaluate.questions import ChoiceItem, bad_question, read_choices
from gradsift.train.parts import Cost
from gradsift.types import Note, RowStatus, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChoiceItem", "ChoiceResult", "EncodedChoices", "answer_choices", "chance_adjusted", "encode_choices",
           "read_choices", "standard_error"]  # fmt: skip

Style = Literal["plain", "chat"]
PLAIN = "Question: {}\nAnswer:"


@dataclass(frozen=True)
class EncodedChoices:
    """Questions with every option as a row of its own, whose trained tokens are the option's.

    Args:
        items: n questions that fit.
        rows: per question one row per option.
        notes: questions left out because they are too long, counted.
    """

    items: tuple[ChoiceItem, ...]
    rows: tuple[tuple[TokenRow, ...], ...]
    notes: tuple[Note, ...] = ()


def encode_choices(
    items: Sequence[ChoiceItem], tokenizer: PreTrainedTokenizerBase, *, style: Style, max_length: int
) -> EncodedChoices:
    """Tokenize question and option together; the option begins where the tokenized question and the whole part.

    Args:
        items: questions.
        tokenizer: the model's.
        style: plain (``Question: ...``, newline, ``Answer:``, a blank, the option), or chat (the question as the user's
            turn in the chat template, the option as the start of the assistant's).
        max_length: longest row; a question with a longer one is left out whole and counted.

    Returns:
        The rows.

    Raises:
        DataError: an option has no token of its own, or no question fits.
    """
    kept: list[ChoiceItem] = []
    rows: list[tuple[TokenRow, ...]] = []
    long: list[str] = []
    for item in items:
        before = _prompt(item.prompt, tokenizer, style)
        gap = " " if style == "plain" else ""
        encoded = tuple(
            _row(f"{item.id}\x1f{k}", before, gap + option, tokenizer, bare=style == "chat")
            for k, option in enumerate(item.options)
        )
        if max(row.num_tokens for row in encoded) > max_length:
            long.append(item.id)
            continue
        kept.append(item)
        rows.append(encoded)
    if not kept:
        raise bad_question("max_length", f"no question fits into {max_length} tokens", f"{len(long)} questions")
    text = f"{len(long)} of {len(items)} questions are longer than {max_length} tokens and were left out"
    notes = (Note("too_long", text, len(long), tuple(long[:5])),) if long else ()
    return EncodedChoices(tuple(kept), tuple(rows), notes)


def _prompt(question: str, tokenizer: PreTrainedTokenizerBase, style: Style) -> str:
    if style == "plain":
        return PLAIN.format(question)
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _row(name: str, before: str, option: str, tokenizer: PreTrainedTokenizerBase, *, bare: bool) -> TokenRow:
    # A template writes its own begin token; the tokenizer must not add a second one.
    prompt = list(tokenizer(before, add_special_tokens=not bare)["input_ids"])  # type: ignore[arg-type]
    whole = list(tokenizer(before + option, add_special_tokens=not bare)["input_ids"])  # type: ignore[arg-type]
    start = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    trained = np.arange(len(whole)) >= start
    row = TokenRow(name, np.asarray(whole, dtype=np.int32), trained, len(whole), RowStatus.OK)
    if row.num_trained == 0:
        raise bad_question(name.partition("\x1f")[0], "an option has no token of its own", repr(option))
    return row


@dataclass(frozen=True)
class ChoiceResult:
    """Answers of a model.

    Args:
        ids: n question ids.
        sources: n source labels.
        num_options: int64 [n] options per question.
        correct: bool [n], the option with the largest summed log-likelihood is right; ties go to the first option.
        correct_norm: bool [n], the same per character of the option.
        cost: of measuring.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    num_options: Int[np.ndarray, " n"]
    correct: Bool[np.ndarray, " n"]
    correct_norm: Bool[np.ndarray, " n"]
    cost: Cost

    @property
    def chance(self) -> float:
        """Accuracy of guessing, mean of 1 / options."""
        return float((1 / self.num_options).mean())

    @property
    def accuracy(self) -> float:
        """Share answered right by summed log-likelihood."""
        return float(self.correct.mean())

    @property
    def accuracy_norm(self) -> float:
        """Share answered right by log-likelihood per character."""
        return float(self.correct_norm.mean())

    @property
    def accuracy_adjusted(self) -> float:
        """Accuracy with guessing at 0 and perfection at 1; below 0 for worse than guessing."""
        return chance_adjusted(self.accuracy, self.chance)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy; NaN for a single question."""
        return standard_error(self.correct)

    def of(self, source: str) -> ChoiceResult:
        """Keep the questions of one source; the cost stays that of the whole measurement.

        Args:
            source: one of ``sources``.

        Returns:
            Its questions.
        """
        where = np.array([i for i, name in enumerate(self.sources) if name == source], dtype=np.int64)
        ids, labels = tuple(self.ids[i] for i in where), (source,) * len(where)
        return replace(self, ids=ids, sources=labels, num_options=self.num_options[where],
                       correct=self.correct[where], correct_norm=self.correct_norm[where])  # fmt: skip


def answer_choices(
    model: nn.Module, encoded: EncodedChoices, *, pad_id: int, tokens_per_batch: int, tick: Tick | None = None
) -> ChoiceResult:
    """Let a model answer.

    Args:
        model: a causal language model.
        encoded: questions from :func:`encode_choices`.
        pad_id: padding token.
        tokens_per_batch: the budget of a micro-batch.
        tick: told rows and tokens after every micro-batch.

    Returns:
        Which answers are right.
    """
    flat = [row for rows in encoded.rows for row in rows]
    measured = evaluate_rows(model, flat, pad_id=pad_id, tokens_per_batch=tokens_per_batch, tick=tick)
    total = -measured.loss * measured.num_trained
    counts = np.array([len(rows) for rows in encoded.rows], dtype=np.int64)
    starts = np.cumsum(counts) - counts
    best, best_norm = np.zeros((2, len(counts)), dtype=np.int64)
    for i, item in enumerate(encoded.items):
        scores = total[starts[i] : starts[i] + counts[i]]
        best[i] = int(scores.argmax())
        best_norm[i] = int((scores / np.array([len(option) for option in item.options])).argmax())
    right = np.array([item.answer for item in encoded.items])
    ids, sources = tuple(i.id for i in encoded.items), tuple(i.source for i in encoded.items)
    return ChoiceResult(ids, sources, counts, best == right, best_norm == right, measured.cost)


def chance_adjusted(accuracy: float, chance: float) -> float:
    """Rescale an accuracy: (accuracy - chance) / (1 - chance), the share known if the rest were guessed.

    Args:
        accuracy: in [0, 1].
        chance: accuracy of guessing, in [0, 1).

    Returns:
        1 for perfect, 0 for guessing, below 0 for worse.
    """
    return (accuracy - chance) / (1 - chance)


def standard_error(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> float:
    """Standard error of a mean, sample standard deviation over sqrt(n) (arXiv 2411.00640, equation 1).

    Args:
        values: one per question, such as right or wrong.

    Returns:
        The standard error; NaN below two questions.
    """
    numbers = values.astype(np.float64)
    return float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else math.nan
