"""Multiple-choice questions read from files, in the layouts of MMLU, ARC, MedQA and HellaSwag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradsift.data.lines import Parsed
from gradsift.data.pool import open_source
from gradsift.errors import DataError

QUESTION = ("question", "ctx", "prompt")
OPTIONS = ("choices", "options", "endings")
ANSWER = ("answer", "answerKey", "answer_idx", "answer_index", "label")
SOURCE = ("source", "subject", "category")


@dataclass(frozen=True)
class ChoiceItem:
    """One question.

    Args:
        id: unique in its file.
        prompt: the question.
        options: at least two different texts.
        answer: which of them is right, from 0.
        source: which part of the file it belongs to.

    Raises:
        DataError: fewer than two options, two alike, an empty one, or an answer that is none of them.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    answer: int
    source: str

    def __post_init__(self) -> None:
        if len(self.options) < 2 or len(set(self.options)) < len(self.options) or not all(self.options):
            raise bad_question(self.id, "at least two different options with text are needed", str(self.options)[:120])
        if not 0 <= self.answer < len(self.options):
            raise bad_question(self.id, "the answer is none of the options", str(self.answer))


def read_choices(path: str, label: str) -> tuple[ChoiceItem, ...]:
    """Read questions from a file of any kind the pool reads.

    Columns: a question (``question``, ``ctx``, ``prompt``), options (``choices``, ``options``, ``endings``: a list, a
    mapping from label to text, or ``{"text": [...], "label": [...]}``), the right one (``answer``, ``answerKey``,
    ``answer_idx``, ``answer_index``, ``label``: a position from 0, a label, a letter, or the option's text), and
    optionally ``id`` and the part of the file (``source``, ``subject``, ``category``).

    Args:
        path: file or hub id.
        label: source of the items that name none.

    Returns:
        Every row as an item, in file order.

    Raises:
        DataError: a row cannot be read without doubt; the row is named. Evaluation sets are not thinned out silently.
    """
    items: list[ChoiceItem] = []
    seen: set[str] = set()
    for position, parsed in enumerate(open_source(path).rows.parsed()):
        if parsed.blank:
            continue
        item = _item(parsed, f"{path}, row {position}", str(position), label)
        if item.id in seen:
            raise bad_question(f"{path}, row {position}", "two questions have one id", item.id)
        seen.add(item.id)
        items.append(item)
    if not items:
        raise bad_question(path, "there is no question in the file", "0 rows")
    return tuple(items)


def _item(parsed: Parsed, where: str, fallback_id: str, label: str) -> ChoiceItem:
    value = parsed.value
    if value is None:
        raise bad_question(where, "the row cannot be read", parsed.problem)
    question, listed, answer = (_first(value, names, where) for names in (QUESTION, OPTIONS, ANSWER))
    if not isinstance(question, str) or not question.strip():
        raise bad_question(where, "the question is no text", str(question)[:80])
    labels, options = _options(listed, where)
    source = next((str(value[name]) for name in SOURCE if value.get(name) not in (None, "")), label)
    name = str(value["id"]) if value.get("id") not in (None, "") else fallback_id
    try:
        return ChoiceItem(name, question, options, _answer(answer, labels, options, where), source)
    except DataError as error:
        raise bad_question(where, error.what, str(error.got)) from None


def _first(value: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    found = next((name for name in names if value.get(name) is not None), None)
    if found is None:
        raise bad_question(where, f"none of the columns {', '.join(names)} is there", ", ".join(map(str, value))[:120])
    return value[found]


def _options(listed: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split options into labels (A, B, ... when none are given) and texts."""
    labels: Any = None
    if isinstance(listed, Mapping) and set(listed) == {"text", "label"}:
        labels, listed = listed["label"], listed["text"]
    elif isinstance(listed, Mapping):
        labels, listed = list(listed), list(listed.values())
    if not isinstance(listed, list | tuple) or not all(isinstance(option, str) for option in listed):
        raise bad_question(where, "the options are no list of texts", str(listed)[:120])
    letters = tuple(chr(ord("A") + i) for i in range(len(listed)))
    return (letters if labels is None else tuple(str(name) for name in labels)), tuple(listed)


def _answer(answer: Any, labels: Sequence[str], options: Sequence[str], where: str) -> int:
    """Find the right option; two readings that disagree are refused rather than ranked."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if (named := [i for i, name in enumerate(labels) if name == str(answer)]) and named != [answer]:
            raise bad_question(where, "the answer is a position and also the label of another option", repr(answer))
        return answer
    if not isinstance(answer, str):
        raise bad_question(where, "the answer is neither a position nor a text", repr(answer))
    readings = {i for i, name in enumerate(labels) if name == answer} | {
        i for i, o in enumerate(options) if o == answer
    }
    if not readings and answer.isdecimal():
        return int(answer)
    if len(readings) != 1:
        raise bad_question(where, "the answer names no option, or more than one", repr(answer))
    return readings.pop()


def bad_question(where: str, what: str, got: str) -> DataError:
    """Word the refusal of a question.

    Args:
        where: file and row, or id.
        what: the problem.
        got: what was found.

    Returns:
        The error to raise.
    """
    return DataError(
        what,
        where=where,
        got=got,
        expected="question, choices and answer, as in MMLU, ARC, MedQA or HellaSwag",
        do="correct the file, or leave the set out",
    )
