"""Shapes of rows: what is read, in which columns, and why not."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradsift.data.formats import FORMATS, SHAREGPT_ROLES, detect, normalise
from gradsift.types import RowStatus

# The machine may be shared: wall time says nothing about a row.
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
KEYS = ["messages", "prompt", "completion", "conversations", "text", "instruction", "input", "output"]
KEYS += ["system", "history", "tools", "chat_template_kwargs", "role", "content", "tool_calls", "from", "value", "type"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "human", " ", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@relaxed
@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=6), st.sampled_from(["auto", *FORMATS]))
def test_any_row_gets_one_status_and_is_left_alone(row, fmt):
    before = copy.deepcopy(row)
    found = normalise(row, fmt)
    assert repr(row) == repr(before)  # repr: NaN differs from itself
    ok = found.status is RowStatus.OK
    assert found.status in (RowStatus.OK, RowStatus.MALFORMED, RowStatus.EMPTY)
    assert (found.fields is not None) == (found.shape is not None) == ok == (found.reason == "")
    if fmt != "auto" and found.format:
        assert found.format == fmt
    if ok:
        wanted = {"messages": {"messages"}, "prompt_completion": {"prompt", "completion"}, "text": {"text"}}[
            found.shape
        ]
        assert wanted <= set(found.fields) <= wanted | {"tools", "chat_template_kwargs"}
    found.reason.encode("utf-8")  # reasons go into tables


text = st.text(min_size=1).filter(str.strip)
turns = st.lists(st.tuples(st.sampled_from(sorted(SHAREGPT_ROLES)), text), min_size=1, max_size=5)


@relaxed
@given(turns, st.none() | st.text())
def test_sharegpt_keeps_every_turn_in_order(talk, system):
    row = {"conversations": [{"from": tag, "value": said} for tag, said in talk], "system": system}
    messages = normalise(row).fields["messages"]
    added = bool(system and system.strip()) and talk[0][0] != "system"
    if added:
        assert messages[0] == {"role": "system", "content": system}
    assert [(m["role"], m["content"]) for m in messages[added:]] == [(SHAREGPT_ROLES[tag], said) for tag, said in talk]


@relaxed
@given(text, st.none() | st.text(), text, st.lists(st.tuples(st.text(), st.text()), max_size=3))
def test_alpaca_joins_and_keeps_history(instruction, extra, output, history):
    row = {"instruction": instruction, "input": extra, "output": output, "history": [list(pair) for pair in history]}
    messages = normalise(row).fields["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(history) + 1)
    assert messages[-2]["content"] == (f"{instruction}\n{extra}" if extra else instruction)
    assert messages[-1]["content"] == output
    assert [m["content"] for m in messages[:-2]] == [said for pair in history for said in pair]


def test_alpaca_by_hand():
    row = {"instruction": "Add", "input": "2 3", "output": "5", "system": "Be brief", "history": [["Hi", "Hello"]]}
    found = normalise(row)
    assert (found.format, found.shape) == ("alpaca", "messages")
    assert found.fields == {
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Add\n2 3"},
            {"role": "assistant", "content": "5"},
        ]
    }


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [], "text": "x", "prompt": "p", "completion": "c", "conversations": []}, "messages"),
        ({"prompt": "p", "completion": "c", "text": "x", "conversations": []}, "prompt_completion"),
        ({"conversations": [], "text": "x", "instruction": "i", "output": "o"}, "sharegpt"),
        ({"text": "x", "instruction": "i", "output": "o"}, "text"),
        ({"messages": None, "text": None, "instruction": "i", "output": "o"}, "alpaca"),
        ({"prompt": "p", "answer": "c"}, ""),
    ],
)
def test_order_of_detection(row, name):
    assert detect(row) == name


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"messages": [U, A], "id": 1, "extra": math.nan}, {"messages": [U, A]}),
        (
            {"messages": [U, A], "tools": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}},
            {"messages": [U, A], "tools": [{"name": "f"}], "chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"messages": [U, A], "tools": None, "chat_template_kwargs": None}, {"messages": [U, A]}),
        ({"prompt": "", "completion": "c", "tools": [{}]}, {"prompt": "", "completion": "c"}),
        ({"prompt": [U], "completion": [A], "tools": []}, {"prompt": [U], "completion": [A], "tools": []}),
        (
            {"conversations": [{"from": "gpt", "value": "x"}], "tools": ""},
            {"messages": [{"role": "assistant", "content": "x"}]},
        ),
    ],
)
def test_fields_are_what_the_trainer_reads(row, fields):
    assert normalise(row).fields == fields


def test_messages_that_need_no_text():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    for message in (call, {k: v for k, v in call.items() if k != "content"}):
        assert normalise({"messages": [message]}).fields["messages"] == [message]
    parts = {"role": "user", "content": [{"type": "text", "text": "x", "image": None}]}
    assert normalise({"messages": [parts]}).status is RowStatus.OK


MALFORMED = [
    ({}, "no known shape"),
    ({"prompt": "p"}, "no known shape"),
    ({"messages": "hi"}, "messages is a string"),
    ({"messages": {"role": "user"}}, "messages is an object"),
    ({"messages": ["hi"]}, "messages[0] is a string"),
    ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
    ({"messages": [{"role": "", "content": "x"}]}, "role is blank"),
    ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role is a number"),
    ({"messages": [U, {"role": "assistant"}]}, "messages[1].content is missing"),
    ({"messages": [{"role": "user", "tool_calls": [{}]}]}, "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is a number"),
    ({"messages": [{"role": "user", "content": True}]}, "a boolean"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "content[0] is a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text parts"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "text is missing or null"),
    ({"messages": [{**A, "tool_calls": "f"}]}, "tool_calls is not a list"),
    ({"messages": [{**A, "tool_calls": [{"x": math.inf}]}]}, "not finite"),
    ({"messages": [U, A], "tools": [{"x": [math.nan]}]}, "not finite"),
    ({"messages": [U, A], "tools": "nope"}, "tools is a string that is not JSON"),
    ({"messages": [U, A], "tools": ""}, "tools is a string that is not JSON"),
    ({"messages": [U, A], "tools": {"a": 1}}, "tools is not a list"),
    ({"messages": [U, A], "chat_template_kwargs": []}, "chat_template_kwargs is a list"),
    ({"prompt": "p", "completion": [A]}, "both must be"),
    ({"prompt": 1, "completion": 2}, "prompt is a number"),
    ({"prompt": [], "completion": [A]}, "empty list"),
    ({"text": 5}, "text is a number"),
    ({"text": ["x"]}, "text is a list"),
    ({"conversations": "x"}, "conversations is a string"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "'alien'"),
    ({"conversations": [{"from": "human"}]}, "conversations[0].value is missing"),
    ({"conversations": [{"role": "user", "content": "x"}]}, "conversations[0].from is missing"),
    ({"instruction": 1, "output": "o"}, "instruction is a number"),
    ({"instruction": "i", "output": "o", "input": {}}, "input is an object"),
    ({"instruction": "i", "output": "o", "history": [["a"]]}, "history[0] is not a pair"),
    ({"instruction": "i", "output": "o", "system": 4}, "system is a number"),
]
EMPTY = [
    ({"messages": []}, "empty list"),
    ({"messages": [{"role": "user", "content": " \n"}, {"role": "assistant", "content": ""}]}, "holds any text"),
    ({"messages": [{"role": "user", "content": []}]}, "holds any text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}, "holds any text"),
    ({"prompt": "p", "completion": " \t"}, "completion is blank"),
    ({"prompt": [U], "completion": []}, "empty list"),
    ({"prompt": [U], "completion": [{"role": "assistant", "content": ""}]}, "holds any text"),
    ({"text": "\u00a0\u2003"}, "text is blank"),
    ({"conversations": []}, "empty list"),
    ({"instruction": "i", "output": ""}, "output is blank"),
]


@pytest.mark.parametrize(("row", "reason"), MALFORMED)
def test_malformed(row, reason):
    found = normalise(row)
    assert (found.status, found.fields) == (RowStatus.MALFORMED, None)
    assert reason in found.reason


@pytest.mark.parametrize(("row", "reason"), EMPTY)
def test_empty(row, reason):
    found = normalise(row)
    assert (found.status, found.fields) == (RowStatus.EMPTY, None)
    assert reason in found.reason


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_a_forced_shape_is_not_guessed_around(fmt):
    full = {
        "messages": [U, A],
        "prompt": "p",
        "completion": "c",
        "conversations": [{"from": "human", "value": "x"}],
        "text": "t",
        "instruction": "i",
        "output": "o",
    }
    assert normalise(full, fmt).format == fmt
    assert normalise(full, fmt).status is RowStatus.OK
    without = {k: v for k, v in full.items() if k != FORMATS[fmt][-1]}
    found = normalise(without, fmt)
    assert found.status is RowStatus.MALFORMED
    assert repr(FORMATS[fmt][-1]) in found.reason


def test_sharegpt_system_turn_wins_over_the_column():
    talk = [{"from": "system", "value": "S"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert normalise({"conversations": talk, "system": "T"}).fields["messages"][0]["content"] == "S"
    assert len(normalise({"conversations": talk, "system": "T"}).fields["messages"]) == 3
    assert normalise({"conversations": talk[1:], "system": "T"}).fields["messages"][0] == {
        "role": "system",
        "content": "T",
    }
    assert len(normalise({"conversations": talk[1:], "system": " "}).fields["messages"]) == 2
