"""Which tokens are a prompt's words: found by hand in a rendered conversation, and counted where they cannot be found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import CHATML, toy_tokenizer

from gradsift.data.formats import normalise
from gradsift.data.prompts import prompt_and_response, prompt_mask
from gradsift.data.tokenize import mask_rule, tokenize_rows
from gradsift.errors import ConfigError
from gradsift.types import Example, Row, RowStatus

TOKENIZER = toy_tokenizer()


def row_of(value) -> Row:
    found = normalise(value)
    assert found.shape is not None
    return Row("r", "s", "f", 0, RowStatus.OK, example=Example("r", found.shape, found.fields))


def words_of(value, tokenizer=TOKENIZER, *, loss_on=None, max_length=10_000) -> str:
    """The text that the prompt mask covers; the toy tokenizer has one token per byte."""
    row = row_of(value)
    rule = mask_rule(tokenizer, loss_on, {row.example.shape})
    (got,) = tokenize_rows([row], tokenizer, rule, max_length=max_length, find_template=True)
    return tokenizer.decode(got.input_ids[prompt_mask(got)])


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_the_words_of_every_turn_before_the_last_answer_and_nothing_of_the_template():
    talk = chat(("system", "be brief."), ("user", "user?"), ("assistant", "no"), ("user", "m"), ("assistant", "ok"))
    assert words_of(talk) == "be brief.user?m"
    assert words_of(chat(("user", "hi"), ("assistant", "ok"), ("user", "bye"))) == "hi"


def test_without_looking_the_template_counts_as_prompt():
    row = row_of(chat(("user", "hi"), ("assistant", "ok")))
    (got,) = tokenize_rows([row], TOKENIZER, mask_rule(TOKENIZER, None, {"messages"}), max_length=99)
    assert got.template is None
    assert TOKENIZER.decode(got.input_ids[prompt_mask(got)]) == "user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_of_message_lists_and_of_strings():
    lists = {"prompt": [{"role": "user", "content": "why?"}], "completion": [{"role": "assistant", "content": "so"}]}
    assert words_of(lists) == "why?"
    assert words_of({"prompt": "why? ", "completion": "so"}) == "hy? "  # nothing predicts the first token
    assert words_of({"text": "all of it"}) == ""


def test_truncation_cuts_the_mask_too():
    talk = chat(("user", "0123456789"), ("assistant", "ok"))
    whole = row_of(talk)
    rule = mask_rule(TOKENIZER, None, {"messages"})
    (full,) = tokenize_rows([whole], TOKENIZER, rule, max_length=999, find_template=True)
    (cut,) = tokenize_rows([whole], TOKENIZER, rule, max_length=full.num_tokens - 2, find_template=True)
    assert cut.template.shape == cut.input_ids.shape
    assert TOKENIZER.decode(cut.input_ids[prompt_mask(cut)]) == "0123456789"


def test_a_template_that_strips_its_texts_is_followed():
    strips = toy_tokenizer(CHATML.replace("message['content'] or ''", "(message['content'] or '').strip()"))
    assert words_of(chat(("user", "  hi  "), ("assistant", "ok")), strips) == "hi"


def test_a_rendering_that_cannot_be_taken_apart_leaves_no_prompt():
    shouts = toy_tokenizer(CHATML.replace("message['content'] or ''", "(message['content'] or '').upper()"))
    assert words_of(chat(("user", "hi"), ("assistant", "ok")), shouts) == ""


def test_a_tokenizer_without_offsets_is_refused():
    slow = toy_tokenizer()
    row = row_of(chat(("user", "hi"), ("assistant", "ok")))
    rule = mask_rule(slow, "all", {"messages"})
    type(slow).is_fast, kept = False, type(slow).is_fast
    try:
        with pytest.raises(ConfigError, match="prompts cannot be told"):
            tokenize_rows([row], slow, rule, max_length=99, find_template=True)
    finally:
        type(slow).is_fast = kept


@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\u27e6\u27e7"), min_size=1), min_size=1, max_size=4
    )
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_texts_are_found_again(texts):
    turns = [t for text in texts for t in (("user", text), ("assistant", "ok"))]
    assert words_of(chat(*turns)) == "".join(texts)


@pytest.mark.parametrize(
    ("value", "pair"),
    [
        (chat(("system", "s"), ("user", "q"), ("assistant", "a")), ("s\nq", "a")),
        (chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")), ("q\na\nr", "b")),
        ({"prompt": "q", "completion": "a"}, ("q", "a")),
        ({"text": "t"}, ("", "t")),
        ({"instruction": "do", "input": "this", "output": "done"}, ("do\nthis", "done")),
    ],
)
def test_prompt_and_response_as_text(value, pair):
    assert prompt_and_response(row_of(value)) == pair
    assert prompt_and_response(Row("r", "s", "f", 0, RowStatus.MALFORMED)) == ("", "")
