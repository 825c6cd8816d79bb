"""Multiple choice: layouts, log-likelihoods against the slow twin, chance adjustment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from eval_toys import slow_log_probs
from hypothesis import given
from hypothesis import strategies as st
from tests.rows import write_jsonl
from tests.toy import toy_llama, toy_tokenizer

from gradsift.errors import DataError
from gradsift.evaluate.choice import (
    ChoiceItem,
    answer_choices,
    chance_adjusted,
    encode_choices,
    read_choices,
    standard_error,
)

MMLU = {"question": "Two and two?", "choices": ["three", "four", "five"], "answer": 1, "subject": "sums"}
ITEMS = tuple(
    ChoiceItem(f"q{n}", f"What is {n}?", options, n % len(options), "ab"[n % 2])
    for n, options in enumerate(
        [("one", "two"), ("a", "bb", "ccc"), ("x y", "x z", "w"), ("up", "down", "left", "right")] * 3
    )
)


@pytest.mark.parametrize(
    "row",
    [
        MMLU,
        {**MMLU, "answer": "B"},
        {**MMLU, "answer": "four"},
        {**MMLU, "answer": "1"},
        {
            "question": "Two and two?",
            "choices": {"text": ["three", "four", "five"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {"question": "Two and two?", "options": {"A": "three", "B": "four", "C": "five"}, "answer_idx": "B"},
        {
            "question": "Two and two?",
            "options": {"A": "three", "B": "four", "C": "five"},
            "answer": "four",
            "answer_idx": "B",
        },
        {"ctx": "Two and two?", "endings": ["three", "four", "five"], "label": "1"},
    ],
)
def test_common_layouts_read_the_same(tmp_path, row):
    item = read_choices(str(write_jsonl(tmp_path / "set.jsonl", [row])), "set")[0]
    assert (item.prompt, item.options, item.answer) == ("Two and two?", ("three", "four", "five"), 1)
    assert item.id == "0"
    assert item.source == ("sums" if "subject" in row else "set")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 3}, "none of the options"),
        ({"answer": -1}, "none of the options"),
        ({"answer": "D"}, "names no option"),
        ({"answer": True}, "neither a position nor a text"),
        ({"choices": ["B", "four"], "answer": "B"}, "more than one"),  # the letter and the text disagree
        ({"choices": ["four"]}, "two different options"),
        (
            {"choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answer": 1},
            "a position and also the label",
        ),
        ({"choices": ["four", "four"], "answer": 0}, "two different options"),
        ({"choices": ["four", ""], "answer": 0}, "two different options"),
        ({"choices": [4, 5], "answer": 0}, "no list of texts"),
        ({"choices": None}, "choices, options, endings"),
        ({"question": " "}, "no text"),
        ({"id": "x"}, "one id"),
    ],
)
def test_a_row_with_doubt_is_refused_and_named(tmp_path, change, words):
    path = write_jsonl(tmp_path / "set.jsonl", [{**MMLU, "id": "x"}, {**MMLU, **change}])
    with pytest.raises(DataError, match=words) as error:
        read_choices(str(path), "set")
    assert "row 1" in error.value.where


def test_an_answer_that_is_a_number_of_the_options_is_the_option_not_the_position(tmp_path):
    row = {"question": "?", "choices": ["2", "1", "0"], "answer": "2"}
    assert read_choices(str(write_jsonl(tmp_path / "set.jsonl", [row])), "set")[0].answer == 0


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_likelihoods_equal_the_slow_twin(style):
    model, tokenizer = toy_llama(5, torch.float64), toy_tokenizer()
    encoded = encode_choices(ITEMS, tokenizer, style=style, max_length=200)
    got = answer_choices(model, encoded, pad_id=3, tokens_per_batch=256)
    best, best_norm = [], []
    for item in ITEMS:
        scores = []
        for option in item.options:
            text = (f"Question: {item.prompt}\nAnswer:", " " + option)
            if style == "chat":
                text = (f"<|im_start|>user\n{item.prompt}<|im_end|>\n<|im_start|>assistant\n", option)
            before, whole = (tokenizer(t)["input_ids"] for t in (text[0], text[0] + text[1]))
            table = slow_log_probs(model, type("R", (), {"input_ids": np.array(whole)}))
            scores.append(sum(table[t - 1, whole[t]] for t in range(len(before), len(whole))))
        best.append(int(np.argmax(scores)))
        best_norm.append(int(np.argmax([s / len(o) for s, o in zip(scores, item.options, strict=True)])))
    right = [item.answer for item in ITEMS]
    assert got.correct.tolist() == [a == b for a, b in zip(best, right, strict=True)]
    assert got.correct_norm.tolist() == [a == b for a, b in zip(best_norm, right, strict=True)]
    assert best != best_norm  # else the two figures would not be told apart here
    assert got.accuracy == np.mean(got.correct)


def test_figures_of_a_source_are_its_questions():
    got = answer_choices(toy_llama(5), encode_choices(ITEMS, toy_tokenizer(), style="plain", max_length=200),
                         pad_id=3, tokens_per_batch=256)  # fmt: skip
    parts = [got.of(source) for source in "ab"]
    assert sum(part.correct.sum() for part in parts) == got.correct.sum()
    assert parts[0].ids == tuple(item.id for item in ITEMS if item.source == "a")
    assert got.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 3 + 1 / 4) / 4)
    assert got.accuracy_adjusted == pytest.approx((got.accuracy - got.chance) / (1 - got.chance))
    p, n = got.accuracy, len(got.ids)
    assert got.standard_error == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert math.isnan(standard_error(np.array([True])))


def test_a_model_that_knows_the_answers_is_perfect():
    items = tuple(ChoiceItem(str(n), f"{n}", ("aaaa", "zzzz"), 1, "s") for n in range(4))
    model, tokenizer = toy_llama(5), toy_tokenizer()
    with torch.no_grad():  # the head says z whatever comes in: push the final norm's output along one direction
        z = tokenizer("z")["input_ids"][0]
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.model.norm.register_forward_hook(lambda _m, _a, out: torch.ones_like(out))
        model.lm_head.weight[z] = 1.0
    got = answer_choices(
        model, encode_choices(items, tokenizer, style="plain", max_length=99), pad_id=3, tokens_per_batch=99
    )
    assert (got.accuracy, got.accuracy_norm, got.accuracy_adjusted) == (1, 1, 1)


def test_long_questions_are_left_out_whole_and_counted():
    long = ChoiceItem("long", "?", ("short", "s" * 60), 0, "s")
    encoded = encode_choices([*ITEMS, long], toy_tokenizer(), style="plain", max_length=60)
    assert encoded.items == ITEMS
    assert [(note.code, note.count, note.ids) for note in encoded.notes] == [("too_long", 1, ("long",))]
    with pytest.raises(DataError, match="no question fits"):
        encode_choices([long], toy_tokenizer(), style="plain", max_length=60)


@given(st.floats(0, 1), st.floats(0, 0.9))
def test_chance_adjustment_fixes_its_two_ends(accuracy, chance):
    assert chance_adjusted(1.0, chance) == 1
    assert chance_adjusted(chance, chance) == 0
    known = chance_adjusted(accuracy, chance)
    assert known + (1 - known) * chance == pytest.approx(accuracy, abs=1e-9)
