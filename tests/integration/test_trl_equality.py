"""The same rows through TRL's SFTTrainer under the same setting: token ids and labels must be equal, row by row."""

from __future__ import annotations

import json

import pytest
from tests.toy import CHATML, toy_llama, toy_tokenizer

from gradsift.data.pool import read_pool
from gradsift.data.templates import marked_template
from gradsift.data.tokenize import mask_rule, tokenize_rows, trl_arguments
from gradsift.recipe import SourceConfig
from gradsift.types import RowStatus

MAX_LENGTH = 60
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turn(role, content):
    return {"role": role, "content": content}


MESSAGES = [
    {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]},
    {
        "messages": [
            turn("system", "Short."),
            turn("user", "2+2?"),
            turn("assistant", "4"),
            turn("user", "3+3?"),
            turn("assistant", "6"),
        ]
    },
    {"messages": [turn("user", "x" * 30), turn("assistant", "a long answer that will be cut")]},
    {"messages": [turn("user", "y" * 100), turn("assistant", "beyond the cut")]},
    {"messages": [turn("user", "\u00fcml\u00e4ut \u4e94"), turn("assistant", "\U0001f600")]},
]
PAIRS = [
    {"prompt": "Question: 2+2? Answer:", "completion": " 4"},
    {"prompt": "Say it:", "completion": " done<|im_end|>"},
    {"prompt": "z" * 50, "completion": " cut here please"},
    {"prompt": "z" * 80, "completion": " never seen"},
    {"prompt": "ends with a space ", "completion": "and goes on"},
]
CHATS = [
    {"prompt": [turn("user", "Hi")], "completion": [turn("assistant", "Hello.")]},
    {"prompt": [turn("system", "S"), turn("user", "2+2?")], "completion": [turn("assistant", "4")]},
    {"prompt": [turn("user", "q" * 30)], "completion": [turn("assistant", "w" * 40)]},
]
TEXTS = [{"text": "Plain text."}, {"text": "ends itself<|im_end|>"}, {"text": "t" * 90}]

CASES = [
    ("messages", MESSAGES, None, CHATML),
    ("messages", MESSAGES, "all", CHATML),
    ("messages, marked by us", MESSAGES, None, SMOL),
    ("prompt/completion strings", PAIRS, None, CHATML),
    ("prompt/completion strings", PAIRS, "all", CHATML),
    ("prompt/completion chats", CHATS, None, CHATML),
    ("prompt/completion chats", CHATS, "assistant", CHATML),
    ("prompt/completion chats", CHATS, "all", CHATML),
    ("text", TEXTS, None, CHATML),
]


def ours(rows, tokenizer, loss_on, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pool = read_pool([SourceConfig(label="rows", path=str(path))])
    shapes = sorted({row.example.shape for row in pool.rows})
    rule = mask_rule(tokenizer, loss_on, shapes)
    assert len(shapes) == 1
    return rule.of(shapes[0]), tokenize_rows(pool.rows, tokenizer, rule, max_length=MAX_LENGTH)


def theirs(rows, tokenizer, loss_on, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        report_to="none",
        use_cpu=True,
        packing=False,
        bf16=False,
        gradient_checkpointing=False,
        **trl_arguments(loss_on),
    )
    trainer = SFTTrainer(toy_llama(), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "rows", "loss_on", "template"), CASES)
def test_ids_and_labels_equal_trl(name, rows, loss_on, template, tmp_path):
    tokenizer = toy_tokenizer(template)
    effective, tokens = ours(rows, tokenizer, loss_on, tmp_path)
    trainers = toy_tokenizer(template)
    if template == SMOL:
        trainers.chat_template = marked_template(tokenizer).text  # what the selection card hands to the trainer
    kept = [row for row in tokens if (row.trained).any()]
    want = theirs([dict(row) for row in rows], trainers, effective, tmp_path)
    assert len(want) == len(kept)
    for got, (ids, labels) in zip(kept, want, strict=True):
        assert got.input_ids.tolist() == ids
        assert [i if t else -100 for i, t in zip(got.input_ids.tolist(), got.trained, strict=True)] == labels
    lost = [row for row in tokens if row.status is RowStatus.NO_TRAINED_TOKEN]
    assert len(lost) == len(rows) - len(kept)


@pytest.mark.filterwarnings("ignore")
def test_tool_calls_and_tools_equal_trl(tmp_path):
    """Tool columns reach the template: here a template that prints them."""
    template = "{{ tools | tojson if tools else '' }}" + CHATML
    rows = [{**MESSAGES[0], "tools": TOOLS}, {**MESSAGES[1], "tools": TOOLS}]
    tokenizer = toy_tokenizer(template)
    global_length = MAX_LENGTH
    try:
        globals()["MAX_LENGTH"] = 400
        effective, tokens = ours(rows, tokenizer, None, tmp_path)
        want = theirs(rows, toy_tokenizer(template), effective, tmp_path)
    finally:
        globals()["MAX_LENGTH"] = global_length
    assert "add" in tokenizer.decode(tokens[0].input_ids)
    for got, (ids, labels) in zip(tokens, want, strict=True):
        assert got.input_ids.tolist() == ids
        assert [i if t else -100 for i, t in zip(ids, got.trained, strict=True)] == labels
