"""Ids and masks against a twin that spells every token out by hand; truncation, statuses, refusals, what is shown."""

from __future__ import annotations

import copy
import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import CHATML, toy_tokenizer

from gradsift.data import templates
from gradsift.data.show import plain_text, segments, token_table
from gradsift.data.tokenize import RESERVED, MaskRule, mask_rule, tokenize_rows, trl_arguments
from gradsift.errors import ConfigError
from gradsift.types import Example, LossOn, Row, RowStatus, Shape, TokenRow

TOKENIZER = toy_tokenizer()
SHAPES: tuple[Shape, ...] = ("messages", "prompt_completion", "text")
PLENTY = 10_000

words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<"), max_size=10)
said = words.filter(bool)


def row(shape: Shape, fields: dict[str, Any], name: str = "r") -> Row:
    return Row(name, "pool", "pool.jsonl", 0, RowStatus.OK, example=Example(name, shape, fields))


def one(
    shape: Shape,
    fields: dict[str, Any],
    loss_on: LossOn | None = None,
    length: int = PLENTY,
    tokenizer: Any = TOKENIZER,
) -> TokenRow:
    rule = mask_rule(tokenizer, loss_on, [shape])
    return tokenize_rows([row(shape, fields)], tokenizer, rule, max_length=length)[0]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


START, END = (TOKENIZER.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))


def letters(text: str) -> list[int]:
    """The toy vocabulary has one token per byte: this is how its bytes are named."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    name = {b: chr(b) for b in visible}
    hidden = [b for b in range(256) if b not in name]
    name |= {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [TOKENIZER.convert_tokens_to_ids(name[b]) for b in text.encode("utf-8")]


def spelled(messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """The slow twin of a conversation under the assistant's mask."""
    ids: list[int] = []
    mask: list[bool] = []
    for message in messages:
        head, body = [START, *letters(message["role"] + "\n")], [*letters(message["content"]), END]
        ids += [*head, *body, *letters("\n")]
        mask += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False]
    return ids, mask


def equals(got: TokenRow, ids: list[int], mask: list[bool]) -> None:
    assert got.status is RowStatus.OK, got.reason
    assert got.input_ids.tolist() == ids
    assert got.trained.tolist() == mask
    assert got.num_untruncated == len(ids)
    assert (got.input_ids.dtype, got.trained.dtype) == (np.int32, bool)


talks = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), words), max_size=4).map(
    lambda turns: [turn(role, content) for role, content in turns]
)


@given(talks, said)
@settings(deadline=None)
def test_messages_are_spelled_out(talk: list[dict[str, str]], answer: str) -> None:
    talk = [*talk, turn("assistant", answer)]
    ids, mask = spelled(talk)
    equals(one("messages", {"messages": talk}), ids, mask)
    equals(one("messages", {"messages": talk}, "all"), ids, [True] * len(ids))


@given(words, said, st.booleans())
@settings(deadline=None)
def test_strings_are_spelled_out(prompt: str, completion: str, ends: bool) -> None:
    """The end token closes a string that lacks it, once; a prompt never gets one."""
    before, after = letters(prompt), [*letters(completion), END]
    written = completion + ("<|im_end|>" if ends else "")
    fields = {"prompt": prompt, "completion": written}
    equals(one("prompt_completion", fields), before + after, [False] * len(before) + [True] * len(after))
    equals(one("prompt_completion", fields, "all"), before + after, [True] * len(before + after))
    equals(one("text", {"text": written}), after, [True] * len(after))


@given(talks.filter(bool), talks, said)
@settings(deadline=None)
def test_chats_of_prompt_and_completion_are_spelled_out(
    prompt: list[dict[str, str]], more: list[dict[str, str]], answer: str
) -> None:
    """completion: from behind the generation prompt, as far as the whole begins like it; assistant: turns of both."""
    completion = [turn("assistant", answer), *more]
    fields = {"prompt": prompt, "completion": completion}
    ids, mask = spelled(prompt + completion)
    start = len(spelled(prompt)[0]) + len([START, *letters("assistant\n")])
    equals(one("prompt_completion", fields), ids, [i >= start for i in range(len(ids))])
    equals(one("prompt_completion", fields, "assistant"), ids, mask)
    equals(one("prompt_completion", fields, "all"), ids, [True] * len(ids))


@given(words, said)
@settings(deadline=None)
def test_a_completion_begins_where_the_tokens_part(content: str, answer: str) -> None:
    """Behind a prompt comes a user's turn, not the assistant's: of the generation prompt only <|im_start|> is shared."""
    prompt, completion = [turn("user", content)], [turn("user", answer), turn("assistant", "x")]
    ids, _ = spelled(prompt + completion)
    start = len(spelled(prompt)[0]) + 1
    got = one("prompt_completion", {"prompt": prompt, "completion": completion})
    assert got.trained.tolist() == [i >= start for i in range(len(ids))]


@given(talks, said, st.integers(2, 80), st.sampled_from([None, "all"]))
@settings(deadline=None)
def test_truncation_keeps_the_start_of_ids_and_mask(
    talk: list[dict[str, str]], answer: str, length: int, loss_on: LossOn | None
) -> None:
    fields = {"messages": [*talk, turn("assistant", answer)]}
    whole, cut = one("messages", fields, loss_on), one("messages", fields, loss_on, length)
    assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
    assert cut.trained.tolist() == whole.trained[:length].tolist()
    assert cut.num_untruncated == whole.num_tokens
    left = int(whole.trained[1:length].sum())
    if left == 0:
        assert cut.status is RowStatus.NO_TRAINED_TOKEN
    else:
        assert cut.status is (RowStatus.TRUNCATED if whole.num_tokens > length else RowStatus.OK)
    assert cut.num_trained == left
    assert bool(cut.reason) is (cut.status is not RowStatus.OK)


def test_truncation_says_how_much_was_cut() -> None:
    cut = one("text", {"text": "a" * 30}, length=10)
    assert cut.status is RowStatus.TRUNCATED
    assert cut.reason == "cut from 31 to 10 tokens; 9 of 30 trained ones are left"
    gone = one("prompt_completion", {"prompt": "p" * 12, "completion": "yes"}, length=10)
    assert gone.status is RowStatus.NO_TRAINED_TOKEN
    assert gone.reason == "all 4 trained tokens lie beyond the first 10"
    assert gone.num_tokens == 10


def test_exactly_the_maximum_length_is_not_truncated() -> None:
    assert one("text", {"text": "a" * 9}, length=10).status is RowStatus.OK
    assert one("text", {"text": "a" * 10}, length=10).status is RowStatus.TRUNCATED


def test_the_first_token_is_never_predicted() -> None:
    """Its label is there, as in the trainer, but it trains nothing."""
    alone = one("text", {"text": "<|im_end|>"})
    assert alone.trained.tolist() == [True]
    assert alone.status is RowStatus.NO_TRAINED_TOKEN
    assert alone.num_trained == 0
    assert one("text", {"text": "a"}).num_trained == 1


def test_nobody_answers() -> None:
    got = one("messages", {"messages": [turn("user", "hello?")]})
    assert got.status is RowStatus.NO_TRAINED_TOKEN
    assert got.reason == "no token carries loss"
    assert one("messages", {"messages": [turn("user", "hello?")]}, "all").status is RowStatus.OK


def test_unusable_rows_pass_through() -> None:
    rows = [
        Row("a", "p", "f", 0, RowStatus.MALFORMED, "why a"),
        row("text", {"text": "x"}, "b"),
        Row("c", "p", "f", 2, RowStatus.DUPLICATE, "why c", Example("c", "text", {"text": "x"}), "b"),
        Row("d", "p", "f", 3, RowStatus.EMPTY, "why d"),
    ]
    got = tokenize_rows(rows, TOKENIZER, mask_rule(TOKENIZER, None, ["text"]), max_length=9)
    assert [g.id for g in got] == ["a", "b", "c", "d"]
    for r, g in zip(rows, got, strict=True):
        assert g.status is r.status
        assert g.reason == r.reason
        assert g.num_tokens == (2 if r.id == "b" else 0)


def test_copies_that_are_kept_are_tokenized() -> None:
    kept = Row("c", "p", "f", 2, RowStatus.OK, "", Example("c", "text", {"text": "x"}), "b")
    assert (
        tokenize_rows([kept], TOKENIZER, mask_rule(TOKENIZER, None, ["text"]), max_length=9)[0].status is RowStatus.OK
    )


def test_each_row_of_a_mixed_pool_has_the_rule_of_its_shape() -> None:
    rule = mask_rule(TOKENIZER, None, SHAPES)
    rows = [
        row("messages", {"messages": [turn("user", "q"), turn("assistant", "a")]}, "m"),
        row("prompt_completion", {"prompt": "q", "completion": "a"}, "p"),
        row("text", {"text": "qa"}, "t"),
    ]
    got = tokenize_rows(rows, TOKENIZER, rule, max_length=99)
    assert [segments(g, TOKENIZER)[-1].trained for g in got] == [False, True, True]
    assert [int(g.trained.sum()) for g in got] == [2, 2, 3]


# --- errors of one row -------------------------------------------------------------------------------------------------

TALK = [turn("user", "q"), turn("assistant", "a")]
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate: ' + messages[0]['content']) }}{% endif %}"


@pytest.mark.parametrize(
    ("shape", "fields", "reason"),
    [
        ("text", {"text": "a\ud800b"}, "lone surrogate"),
        ("messages", {"messages": [turn("user", "q"), turn("assistant", "\udfff")]}, "lone surrogate"),
        ("prompt_completion", {"prompt": "\udc00", "completion": "x"}, "lone surrogate"),
        ("messages", {"messages": [turn("assistant", "a"), turn("user", "q")]}, "roles must alternate: a"),
        ("messages", {"messages": [turn("assistant", "\ud83d"), turn("user", "q")]}, "lone surrogate"),
        (
            "messages",
            {"messages": [turn("user", "q"), {"role": "assistant", "tool_calls": []}, turn("user", 3)]},
            "Error",
        ),
        ("messages", {"messages": TALK, "chat_template_kwargs": {"return_dict": 1}}, "may not set return_dict"),
        ("messages", {"messages": TALK, "chat_template_kwargs": {"conversation": 1}}, "multiple values"),
        ("messages", {"messages": TALK, "tools": "{not json"}, "JSONDecodeError"),
        ("messages", {"messages": []}, "empty conversation"),
        ("messages", {"messages": 7}, "TypeError"),
        ("text", {}, "KeyError"),
    ],
)
def test_what_cannot_be_tokenized_costs_one_row(shape: Shape, fields: dict[str, Any], reason: str) -> None:
    tokenizer = toy_tokenizer(STRICT + CHATML)
    rule = mask_rule(tokenizer, None, SHAPES)
    good = row("text", {"text": "fine"}, "good")
    got = tokenize_rows([good, row(shape, fields), good], tokenizer, rule, max_length=99)
    assert [g.status for g in got] == [RowStatus.OK, RowStatus.TOKENIZE_ERROR, RowStatus.OK]
    assert reason in got[1].reason
    assert len(got[1].reason) <= 400
    assert got[1].num_tokens == got[1].num_untruncated == 0
    got[1].reason.encode("utf-8")


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_row_brings_no_template_and_no_switches(name: str) -> None:
    """Also not through a value that would be harmless: a row's data must not choose code or what comes back."""
    got = one("messages", {"messages": TALK, "chat_template_kwargs": {name: None}})
    assert got.status is RowStatus.TOKENIZE_ERROR
    assert name in got.reason


def test_strings_have_no_assistant() -> None:
    got = one("prompt_completion", {"prompt": "q", "completion": "a"}, "assistant")
    assert got.status is RowStatus.TOKENIZE_ERROR
    assert "message lists" in got.reason


class PanicException(BaseException):
    """The name that the panics of Rust libraries have."""


@pytest.mark.parametrize("raised", [PanicException, KeyboardInterrupt, SystemExit])
def test_a_panic_costs_one_row_and_an_interrupt_goes_through(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised("no")

    tokenizer = toy_tokenizer()
    rule = mask_rule(tokenizer, None, ["text"])
    monkeypatch.setattr(type(tokenizer), "_encode_plus", fail)
    some = [row("text", {"text": "x"})]
    if raised is PanicException:
        assert tokenize_rows(some, tokenizer, rule, max_length=9)[0].status is RowStatus.TOKENIZE_ERROR
    else:
        with pytest.raises(raised):
            tokenize_rows(some, tokenizer, rule, max_length=9)


def test_rows_are_not_changed() -> None:
    fields = {"messages": copy.deepcopy(TALK), "tools": [{"name": "f"}], "chat_template_kwargs": {"x": [1]}}
    before = copy.deepcopy(fields)
    one("messages", fields)
    assert fields == before


# --- templates ---------------------------------------------------------------------------------------------------------


def test_tools_and_keywords_reach_the_template() -> None:
    tokenizer = toy_tokenizer("{{ tools | tojson if tools else 'no' }}{{ tone | default('plain') }}" + CHATML)
    as_list, as_text = [{"name": "f"}], '[{"name":"f"}]'
    seen = [
        tokenizer.decode(one("messages", {"messages": TALK, **more}, tokenizer=tokenizer).input_ids)
        for more in ({}, {"tools": as_list}, {"tools": as_text}, {"chat_template_kwargs": {"tone": "warm"}})
    ]
    assert seen[0].startswith("noplain")
    assert seen[1].startswith('[{"name": "f"}]plain')
    assert seen[1] == seen[2]
    assert seen[3].startswith("nowarm")


def test_named_templates_are_chosen_as_the_trainer_chooses() -> None:
    """With tools the variant for tools, otherwise the default."""
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools:" + CHATML}
    for tools, start in ((None, "<|im_start|>"), ([{"name": "f"}], "tools:")):
        got = one("messages", {"messages": TALK, "tools": tools}, tokenizer=tokenizer)
        assert str(tokenizer.decode(got.input_ids)).startswith(start)


def test_rules_record_the_template_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    smol = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    own = mask_rule(TOKENIZER, None, ["messages"])
    assert own == MaskRule(None, CHATML, "tokenizer", hashlib.sha256(CHATML.encode()).hexdigest(), "<|im_end|>")
    marked = mask_rule(toy_tokenizer(smol), None, ["messages"])
    assert marked.template_origin == "gradsift"
    assert "generation" in (marked.template or "")
    everything = mask_rule(toy_tokenizer(plain), "all", ["messages"])
    assert (everything.template, everything.template_origin) == (plain, "")
    text = mask_rule(toy_tokenizer(None), None, ["text"])
    assert (text.template, text.template_sha256) == (None, None)


def test_a_trainer_that_swaps_templates_swaps_only_for_the_assistants_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL renders with its training variant under assistant_only_loss alone, and such a variant may render otherwise."""
    monkeypatch.setattr(templates, "trl_variant", lambda template: "T" + CHATML)
    tokenizer = toy_tokenizer("O{% for message in messages %}{{ message['content'] }}{% endfor %}")
    rule = mask_rule(tokenizer, None, ["messages", "prompt_completion"])
    assert rule.template_origin == "trl"
    rows = [row("messages", {"messages": TALK}), row("prompt_completion", {"prompt": TALK[:1], "completion": TALK[1:]})]
    got = [str(tokenizer.decode(g.input_ids)) for g in tokenize_rows(rows, tokenizer, rule, max_length=99)]
    assert got == ["T<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n", "Oqa"]


# --- refusals before any row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_on", "shape"), [("completion", "text"), ("assistant", "text"), ("completion", "messages")]
)
def test_impossible_rules_are_refused(loss_on: LossOn, shape: Shape) -> None:
    for refused in (lambda: mask_rule(TOKENIZER, loss_on, [shape]), lambda: trl_arguments(loss_on, shape)):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert "--loss-on" in str(caught.value)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("loss_on", [None, "all", "assistant"])
def test_messages_without_a_template_are_refused(loss_on: LossOn | None) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        mask_rule(toy_tokenizer(None), loss_on, ["messages"])


def test_strings_need_no_template() -> None:
    got = one("prompt_completion", {"prompt": "q", "completion": "a"}, tokenizer=toy_tokenizer(None))
    assert got.status is RowStatus.OK


def test_a_tokenizer_without_offsets_cannot_mask_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = toy_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ConfigError, match="assistant turns cannot be masked"):
        mask_rule(tokenizer, None, ["messages"])
    mask_rule(tokenizer, "all", ["messages"])


def test_without_an_end_token_nothing_is_added() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    assert one("text", {"text": "ab"}, tokenizer=tokenizer).input_ids.tolist() == letters("ab")


def test_trl_arguments_of_every_rule() -> None:
    got = {
        (shape, loss_on): tuple(trl_arguments(loss_on, shape).values())
        for shape, rules in (
            ("messages", (None, "all")),
            ("prompt_completion", (None, "assistant", "all")),
            ("text", (None,)),
        )
        for loss_on in rules
    }
    assert got == {
        ("messages", None): (True, False),
        ("messages", "all"): (False, False),
        ("prompt_completion", None): (False, True),
        ("prompt_completion", "assistant"): (True, False),
        ("prompt_completion", "all"): (False, False),
        ("text", None): (False, False),
    }  # fmt: skip


# --- what is shown -----------------------------------------------------------------------------------------------------


@given(talks, said)
@settings(deadline=None, max_examples=30)
def test_shown_parts_and_tokens_are_the_row(talk: list[dict[str, str]], answer: str) -> None:
    got = one("messages", {"messages": [*talk, turn("assistant", answer)]})
    parts, table = segments(got, TOKENIZER), token_table(got, TOKENIZER)
    assert [t.id for t in table] == got.input_ids.tolist()
    assert [t.trained for t in table] == got.trained.tolist()
    assert [t.position for t in table] == list(range(got.num_tokens))
    assert all(a.trained != b.trained for a, b in pairwise(parts))
    assert "".join(p.text for p in parts) == TOKENIZER.decode(got.input_ids)
    assert parts[-2].text == answer + "<|im_end|>"


def test_plain_text_is_all_text_and_no_template() -> None:
    asked = [turn("user", "q"), {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    assert plain_text(row("messages", {"messages": asked})) == "q\na"
    assert plain_text(row("prompt_completion", {"prompt": "p", "completion": "c"})) == "p\nc"
    assert plain_text(Row("a", "p", "f", 0, RowStatus.MALFORMED, "why")) == ""
