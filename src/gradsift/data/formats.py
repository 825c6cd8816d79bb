"""Shapes of a row: which one it has, and its columns as the trainer reads them.

A row is looked at in the order of ``FORMATS``; the first shape whose columns are all there and not null wins, so
``messages`` beats everything and ``text`` beats Alpaca (a rendered ``text`` column is what the trainer would read).
Alpaca and ShareGPT become ``messages``. Columns that no shape asks for are left alone in the raw row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradsift.recipe import Format
from gradsift.types import RowStatus, Shape

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "alpaca": ("instruction", "output"),
}
"""Columns that a shape cannot do without, in the order of detection."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Normalised:
    """A row in the trainer's columns, or why it has none.

    Args:
        format: the shape it was read as (a key of ``FORMATS``), empty when none was found.
        status: OK, MALFORMED or EMPTY.
        reason: empty for OK, otherwise a sentence.
        shape: the trainer's shape, for OK rows.
        fields: the trainer's columns, for OK rows.
    """

    format: str
    status: RowStatus
    reason: str = ""
    shape: Shape | None = None
    fields: Mapping[str, Any] | None = None


class _Malformed(Exception):
    """The row cannot be read; the text says why."""


class _Empty(Exception):
    """The row is well formed and says nothing; the text says where."""


def detect(value: Mapping[str, Any]) -> str:
    """Name the shape of a row.

    Args:
        value: the row's columns.

    Returns:
        A key of ``FORMATS``, or an empty string. A null column counts as absent: tables fill holes with nulls.
    """
    for name, keys in FORMATS.items():
        if all(value.get(key) is not None for key in keys):
            return name
    return ""


def normalise(value: Mapping[str, Any], fmt: Format = "auto") -> Normalised:
    """Turn a row into the columns that the trainer reads.

    Never raises for a row, however odd its values are.

    Args:
        value: the row's columns.
        fmt: the shape it must have, or auto.

    Returns:
        The trainer's columns with OK, or MALFORMED or EMPTY with a reason.
    """
    name = detect(value) if fmt == "auto" else fmt
    if not name:
        columns = ", ".join(repr(key)[:40] for key in list(value)[:8]) or "none"
        return Normalised("", RowStatus.MALFORMED, f"no known shape among the columns: {columns}")
    missing = [key for key in FORMATS[name] if value.get(key) is None]
    if missing:
        return Normalised("", RowStatus.MALFORMED, f"read as {name}, but {missing[0]!r} is missing or null")
    try:
        shape, fields = _READERS[name](value)
        _refuse_nonfinite(fields)
    except _Malformed as problem:
        return Normalised(name, RowStatus.MALFORMED, str(problem))
    except _Empty as problem:
        return Normalised(name, RowStatus.EMPTY, str(problem))
    return Normalised(name, RowStatus.OK, "", shape, fields)


def _read_messages(value: Mapping[str, Any]) -> tuple[Shape, dict[str, Any]]:
    messages = _messages(value["messages"], "messages")
    fields = {"messages": messages, **_template_columns(value)}
    _refuse_silent(messages, "messages")
    return "messages", fields


def _read_prompt_completion(value: Mapping[str, Any]) -> tuple[Shape, dict[str, Any]]:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise _Empty("the completion is blank")
        return "prompt_completion", {"prompt": prompt, "completion": completion}
    if isinstance(prompt, str) or isinstance(completion, str):
        raise _Malformed(
            f"prompt is {_kind(prompt)} and completion is {_kind(completion)}: both must be strings or message lists"
        )
    fields = {"prompt": _messages(prompt, "prompt"), "completion": _messages(completion, "completion")}
    fields |= _template_columns(value)
    if not prompt:
        raise _Malformed("prompt is an empty list of messages, which the trainer cannot read")
    _refuse_silent(completion, "completion")
    return "prompt_completion", fields


def _read_text(value: Mapping[str, Any]) -> tuple[Shape, dict[str, Any]]:
    text = _string(value["text"], "text")
    if not text.strip():
        raise _Empty("text is blank")
    return "text", {"text": text}


def _read_alpaca(value: Mapping[str, Any]) -> tuple[Shape, dict[str, Any]]:
    """Alpaca: user = instruction and input joined by a newline where both say something, history = earlier turns."""
    asked = [_string(value.get(key), key, nullable=True) for key in ("instruction", "input")]
    output, system = _string(value["output"], "output"), _string(value.get("system"), "system", nullable=True)
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for question, answer in _history(value.get("history")):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": "\n".join(part for part in asked if part)})
    messages.append({"role": "assistant", "content": output})
    fields = {"messages": messages, **_template_columns(value, blank_tools=True)}
    if not output.strip():
        raise _Empty("the output is blank")
    return "messages", fields


def _history(history: Any) -> list[tuple[str, str]]:
    if history is None:
        return []
    if not isinstance(history, list):
        raise _Malformed(f"history is {_kind(history)}, not a list of pairs")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise _Malformed(f"history[{i}] is not a pair of strings")
    return [(pair[0], pair[1]) for pair in history]


def _read_sharegpt(value: Mapping[str, Any]) -> tuple[Shape, dict[str, Any]]:
    """ShareGPT: tags become roles; a ``system`` column is put first unless the talk opens with a system turn."""
    turns = value["conversations"]
    if not isinstance(turns, list):
        raise _Malformed(f"conversations is {_kind(turns)}, not a list of turns")
    messages = [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    system = _string(value.get("system"), "system", nullable=True)
    if system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    fields = {"messages": messages, **_template_columns(value, blank_tools=True)}
    _refuse_silent(messages, "conversations")
    return "messages", fields


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise _Malformed(f"{where} is {_kind(turn)}, not an object")
    tag = _string(turn.get("from"), f"{where}.from")
    if tag not in SHAREGPT_ROLES:
        raise _Malformed(f"{where}.from is {tag[:40]!r}, expected one of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[tag], "content": _string(turn.get("value"), f"{where}.value")}


_READERS = {
    "messages": _read_messages,
    "prompt_completion": _read_prompt_completion,
    "sharegpt": _read_sharegpt,
    "text": _read_text,
    "alpaca": _read_alpaca,
}


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise _Malformed(f"{where} is {_kind(messages)}, not a list of messages")
    for i, message in enumerate(messages):
        _check_message(message, f"{where}[{i}]")
    return messages


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise _Malformed(f"{where} is {_kind(message)}, not an object")
    role, calls = message.get("role"), message.get("tool_calls")
    if not isinstance(role, str) or not role.strip():
        raise _Malformed(
            f"{where}.role is {_kind(role)}, not a role's name" if role != "" else f"{where}.role is blank"
        )
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise _Malformed(f"{where}.tool_calls is not a list of objects")
    content = message.get("content")
    if isinstance(content, list):
        for j, part in enumerate(content):
            _check_part(part, f"{where}.content[{j}]")
    elif content is None:
        if role != "assistant" or not calls:
            raise _Malformed(f"{where}.content is missing, which only an assistant's tool calls may have")
    elif not isinstance(content, str):
        raise _Malformed(f"{where}.content is {_kind(content)}, not a string or a list of text parts")


def _check_part(part: Any, where: str) -> None:
    if not isinstance(part, dict):
        raise _Malformed(f"{where} is {_kind(part)}, not an object")
    if part.get("type") != "text":
        raise _Malformed(f"{where}.type is {str(part.get('type'))[:40]!r}; only text parts can be trained on")
    _string(part.get("text"), f"{where}.text")


def _refuse_silent(messages: list[dict[str, Any]], where: str) -> None:
    if not messages:
        raise _Empty(f"{where} is an empty list")
    if not any(_says_something(message) for message in messages):
        raise _Empty(f"no message of {where} holds any text")


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    texts += [message.get(key) for key in ("reasoning_content", "thinking")]
    return bool(message.get("tool_calls")) or any(isinstance(text, str) and text.strip() for text in texts)


def _template_columns(value: Mapping[str, Any], *, blank_tools: bool = False) -> dict[str, Any]:
    """Read the optional columns; ``tools`` written as a JSON string is decoded, as the trainer does."""
    fields: dict[str, Any] = {}
    tools, kwargs = value.get("tools"), value.get("chat_template_kwargs")
    if isinstance(tools, str):
        if blank_tools and not tools.strip():
            tools = None
        else:
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError):
                raise _Malformed("tools is a string that is not JSON") from None
    if tools is not None:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise _Malformed("tools is not a list of objects")
        fields["tools"] = tools
    if kwargs is not None:
        if not isinstance(kwargs, dict):
            raise _Malformed(f"chat_template_kwargs is {_kind(kwargs)}, not an object")
        fields["chat_template_kwargs"] = kwargs
    return fields


def _refuse_nonfinite(fields: Mapping[str, Any]) -> None:
    stack: list[Any] = list(fields.values())
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise _Malformed("a number in the trained columns is not finite")


def _string(value: Any, where: str, *, nullable: bool = False) -> str:
    if value is None and nullable:
        return ""
    if not isinstance(value, str):
        raise _Malformed(f"{where} is {_kind(value)}, not a string")
    return value


def _kind(value: Any) -> str:
    """Name a value's JSON type with its article."""
    if value is None:
        return "missing or null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
