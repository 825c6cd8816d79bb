"""Thirty-odd kinds of ugly rows in one file: each gets exactly one expected status, none is lost and none raises."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import CHATML, toy_tokenizer

from gradsift.data.pool import Pool, read_pool
from gradsift.data.tokenize import mask_rule, tokenize_rows
from gradsift.recipe import SourceConfig
from gradsift.types import RowStatus, TokenRow

MAX_LENGTH = 64
STRICT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the assistant may not begin') }}{% endif %}{% endfor %}" + CHATML
)


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def line(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")


def nested(depth: int) -> bytes:
    return b'{"text":"x","meta":' + b"[" * depth + b"]" * depth + b"}"


OK, CUT, BAD, NONE = RowStatus.OK, RowStatus.TRUNCATED, RowStatus.MALFORMED, RowStatus.NO_TRAINED_TOKEN
EMPTY, ERROR, COPY = RowStatus.EMPTY, RowStatus.TOKENIZE_ERROR, RowStatus.DUPLICATE
UGLY: list[tuple[str, bytes, RowStatus, str]] = [
    ("plain", b'{"text":"hello"}', OK, ""),
    ("exact copy", b'{"text":"hello"}', COPY, "exact copy of row 0"),
    ("same value, other bytes", b'{"text": "hello"}', OK, ""),
    ("empty line", b"", EMPTY, "blank"),
    ("blank line", b" \t ", EMPTY, "blank"),
    ("empty object", b"{}", BAD, "no known shape"),
    ("empty text", b'{"text":""}', EMPTY, "blank"),
    ("blank text", line({"text": " \n\u3000\t"}), EMPTY, "blank"),
    ("empty message list", b'{"messages":[]}', EMPTY, "empty list"),
    ("blank messages", line(turns(("user", " "), ("assistant", "\n"))), EMPTY, "no message"),
    ("blank completion", b'{"prompt":"p","completion":"  "}', EMPTY, "blank"),
    ("nobody answers: all masked", line(turns(("user", "anyone?"))), NONE, "no token carries loss"),
    ("answer behind the cut", line(turns(("user", "q" * 99), ("assistant", "a"))), NONE, "beyond the first 64"),
    ("a single token", line({"text": "<|im_end|>"}), NONE, "no token carries loss"),
    ("one letter", b'{"text":"a"}', OK, ""),
    ("10x maximum length", line({"text": "x" * 10 * MAX_LENGTH}), CUT, "cut from 641 to 64 tokens"),
    ("1 MB line", line({"text": "ab " * 350_000}), CUT, "cut from 1050001 to 64 tokens"),
    ("NUL byte", b'{"text":"a\0b"}', BAD, "NUL"),
    ("escaped NUL", line({"text": "a\0b"}), OK, ""),
    ("control characters", line({"text": "\x01\x07\x1b[31m\x7f"}), OK, ""),
    ("raw control character", b'{"text":"a\x01b"}', BAD, "not JSON"),
    ("lone surrogate", b'{"text":"a\\ud800b"}', ERROR, "lone surrogate"),
    ("lone surrogate in a turn", b'{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"\\udc00"}]}', ERROR, "lone surrogate"),
    ("lone surrogate in an unread column", b'{"text":"fine","note":"\\ud800"}', OK, ""),
    ("invalid UTF-8", b'{"text":"caf\xe9"}', BAD, "not UTF-8"),
    ("UTF-8 cut in a character", b'{"text":"\xe4\xba', BAD, "not UTF-8"),
    ("right to left", line({"text": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627"}), OK, ""),
    ("joined emoji and combining marks", line({"text": "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301\u0316" * 2}), OK, ""),
    ("line separators inside", "{\"text\":\"a\u2028b\u0085c\"}".encode(), OK, ""),
    ("carriage return at the end", b'{"text":"windows"}\r', OK, ""),
    ("text is a number", b'{"text":7}', BAD, "text is a number"),
    ("text is a list", b'{"text":["a"]}', BAD, "text is a list"),
    ("text is null", b'{"text":null}', BAD, "no known shape"),
    ("row is a list", b'["text"]', BAD, "not an object"),
    ("row is a string", b'"text"', BAD, "not an object"),
    ("row is NaN", b"NaN", BAD, "not an object"),
    ("messages is an object", b'{"messages":{"role":"user"}}', BAD, "not a list"),
    ("a turn is a string", b'{"messages":["hi"]}', BAD, "not an object"),
    ("a turn without a role", b'{"messages":[{"content":"hi"}]}', BAD, "role"),
    ("a turn without content", b'{"messages":[{"role":"user"},{"role":"assistant","content":"a"}]}', BAD, "content is missing"),
    ("content is a number", line(turns(("user", 5), ("assistant", "a"))), BAD, "content is a number"),
    ("a picture", line(turns(("user", [{"type": "image"}]), ("assistant", "a"))), BAD, "only text parts"),
    ("string prompt, list completion", b'{"prompt":"p","completion":[{"role":"assistant","content":"a"}]}', BAD, "both must be"),
    ("missing completion", b'{"prompt":"p"}', BAD, "no known shape"),
    ("misspelt column", b'{"txet":"hello"}', BAD, "'txet'"),
    ("deep nesting", nested(200), BAD, "nested deeper"),
    ("very deep nesting", nested(100_000), BAD, "nested deeper"),
    ("deep but allowed", nested(100), OK, ""),
    ("duplicate keys", b'{"text":"a","text":"b"}', BAD, "'text' stands twice"),
    ("duplicate keys inside", b'{"messages":[{"role":"user","role":"assistant","content":"a"}]}', BAD, "'role' stands twice"),
    ("cut off JSON", b'{"text":"hel', BAD, "not JSON"),
    ("two objects on a line", b'{"text":"a"}{"text":"b"}', BAD, "not JSON"),
    ("Python instead of JSON", b"{'text': 'a'}", BAD, "not JSON"),
    ("a number of 5,000 digits", b'{"text":"x","n":' + b"9" * 5000 + b"}", BAD, "too many digits"),
    ("wrong role order", line(turns(("assistant", "I"), ("user", "you"))), ERROR, "may not begin"),
    ("its own chat template", line({**turns(("user", "q"), ("assistant", "a")), "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}), ERROR, "may not set chat_template"),
    ("tools that are not JSON", line({**turns(("user", "q"), ("assistant", "a")), "tools": "{"}), BAD, "not JSON"),
    ("template text in the words", line(turns(("user", "{{ 7*7 }}{% for x in y %}"), ("assistant", "{{ messages }}"))), OK, ""),
    ("id is a list", b'{"id":[1],"text":"a"}', BAD, "id is a list"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pool, tuple[TokenRow, ...]]:
    path = tmp_path_factory.mktemp("ugly") / "ugly.jsonl"
    path.write_bytes(b"".join(raw + b"\n" for _, raw, _, _ in UGLY))
    return judged(path)


def judged(path: Path) -> tuple[Pool, tuple[TokenRow, ...]]:
    pool = read_pool([SourceConfig(label="ugly", path=str(path))])
    tokenizer = toy_tokenizer(STRICT)
    shapes = {row.example.shape for row in pool.rows if row.example is not None}
    return pool, tokenize_rows(pool.rows, tokenizer, mask_rule(tokenizer, None, shapes), max_length=MAX_LENGTH)


def test_there_are_at_least_thirty_kinds() -> None:
    assert len({name for name, *_ in UGLY}) == len(UGLY) >= 30
    assert {status for *_, status, _ in UGLY} == {OK, CUT, BAD, NONE, EMPTY, ERROR, COPY}


@pytest.mark.parametrize("place", range(len(UGLY)), ids=[name for name, *_ in UGLY])
def test_each_ugly_row_has_its_status(place: int, outcome: tuple[Pool, tuple[TokenRow, ...]]) -> None:
    name, _, status, reason = UGLY[place]
    got = outcome[1][place]
    assert got.status is status, f"{name}: {got.status} because {got.reason!r}"
    assert reason in got.reason
    assert bool(got.reason) is (status is not OK)
    assert got.status.usable == (got.num_trained > 0)
    got.reason.encode("utf-8")  # a reason goes to the audit table, whatever the row held


def test_rows_in_equals_the_sum_over_statuses(outcome: tuple[Pool, tuple[TokenRow, ...]]) -> None:
    pool, tokens = outcome
    counts = Counter(row.status for row in tokens)
    assert len(UGLY) == len(pool.rows) == len(tokens) == sum(counts.values())
    assert [row.id for row in tokens] == [row.id for row in pool.rows]
    assert len({row.id for row in tokens}) == len(tokens)
    assert [pool.raw(i) for i in range(len(UGLY))] == [raw for _, raw, _, _ in UGLY]


def test_truncation_is_recorded_with_counts(outcome: tuple[Pool, tuple[TokenRow, ...]]) -> None:
    cut = [row for row in outcome[1] if row.status is CUT]
    assert [(row.num_untruncated, row.num_tokens, row.num_trained) for row in cut] == [
        (641, 64, 63),
        (1_050_001, 64, 63),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(
    [
        "messages",
        "prompt",
        "completion",
        "text",
        "tools",
        "chat_template_kwargs",
        "conversations",
        "instruction",
        "output",
    ]
)
turn_like = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | json_values,
        "content": st.text(st.characters(), max_size=5) | json_values,
        "from": st.sampled_from(["human", "gpt"]),
        "value": st.text(max_size=5),
        "tool_calls": json_values,
    },
)
fuzzed = st.dictionaries(columns, st.lists(turn_like, max_size=3) | json_values, max_size=4).map(line)
raw_lines = (fuzzed | st.binary(max_size=30)).filter(lambda raw: b"\n" not in raw)


@given(st.lists(raw_lines, min_size=1, max_size=8))
@settings(deadline=None, max_examples=150)
def test_whatever_the_bytes_every_line_has_one_status(
    tmp_path_factory: pytest.TempPathFactory, raws: list[bytes]
) -> None:
    """A first good line keeps chance marks of other encodings and archives away from the file's start."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(b"".join(raw + b"\n" for raw in [b'{"text":"good"}', *raws]))
    pool, tokens = judged(path)
    assert len(tokens) == len(pool.rows) == len(raws) + 1
    assert tokens[0].status is OK
    for row in tokens:
        assert row.status.usable == (row.num_trained > 0)
        assert bool(row.reason) is (row.status is not OK)
        row.reason.encode("utf-8")
