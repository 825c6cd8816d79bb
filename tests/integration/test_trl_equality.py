"""The same file through TRL's SFTTrainer under the same setting: token ids and labels must be equal, row by row."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.toy import CHATML, toy_llama, toy_tokenizer
from tokenizers.processors import TemplateProcessing

from gradsift.data.pool import read_pool
from gradsift.data.tokenize import MaskRule, mask_rule, tokenize_rows, trl_arguments
from gradsift.errors import ModelError
from gradsift.recipe import SourceConfig
from gradsift.types import LossOn, RowStatus, Shape, TokenRow

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of TRL and of what it imports are not ours to judge

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reads every optional column and marks calls; the prompt alone ends otherwise than the whole goes on.
RICH = (
    "{{ tools | tojson if tools else '' }}{{ tone | default('') }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] or '' }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)
WORDS = (
    "a",
    "two words",
    "\u00fcml\u00e4ut \u4e94",
    "\U0001f600\U0001f468\u200d\U0001f469",
    "x" * 45,
    " y ",
    "line\nline",
    "\u05e9\u05dc",
)
ENDS = ("", "", "<|im_end|>", " <|im_end|> ", "\n")


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def talk(draw: random.Random) -> list[dict[str, Any]]:
    turns = [turn("system", draw.choice(WORDS))] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 2)):
        turns += [turn("user", draw.choice(WORDS)), turn("assistant", draw.choice(WORDS))]
    return turns


def called(draw: random.Random) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": {draw.choice("xy"): draw.choice([1, "s"])}}}
    asked = [turn("user", "sum?"), {"role": "assistant", "content": draw.choice(["", "Wait."]), "tool_calls": [call]}]
    return [*asked, turn("tool", "3"), turn("assistant", draw.choice(WORDS))]


def tools_as_text(draw: random.Random) -> str:
    return json.dumps(
        [{"type": "function", "function": {"name": draw.choice("fg"), "parameters": {draw.choice("pq"): 1}}}]
    )


TOOLS = [{"type": "function", "function": {"name": "f", "description": "adds", "parameters": {"type": "object"}}}]
KINDS: dict[str, Any] = {
    "messages": lambda draw: {"messages": talk(draw)},
    "messages with calls and tools": lambda draw: {"messages": draw.choice([called, talk])(draw), "tools": TOOLS},
    "messages with tools as text": lambda draw: {"messages": called(draw), "tools": tools_as_text(draw)},
    "messages with keywords": lambda draw: {
        "messages": talk(draw), "chat_template_kwargs": {"tone": draw.choice(WORDS)}
    },
    "strings": lambda draw: {
        "prompt": draw.choice(WORDS) + draw.choice(["", " ", ":"]), "completion": draw.choice(WORDS[:5]) + draw.choice(ENDS)
    },
    "chats": lambda draw: {
        "prompt": [*draw.choice([[], talk(draw)]), turn("user", draw.choice(WORDS))],
        "completion": [turn("assistant", draw.choice(WORDS)), *draw.choice([[], talk(draw)])],
    },
    "chats with tools": lambda draw: {
        "prompt": called(draw)[:-1], "completion": [turn("assistant", draw.choice(WORDS))], "tools": TOOLS
    },
    "text": lambda draw: {"text": draw.choice(WORDS[:5]) + draw.choice(WORDS) + draw.choice(ENDS)},
}  # fmt: skip


def written(kind: str, folder: Path, count: int, seed: int = 0) -> Path:
    """A file of rows that share one shape."""
    draw = random.Random(f"{seed} {kind}")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), **KINDS[kind](draw)}) + "\n" for i in range(count)), "utf-8")
    return path


def ours(path: Path, tokenizer: Any, loss_on: LossOn | None, length: int) -> tuple[Shape, MaskRule, Sequence[TokenRow]]:
    pool = read_pool([SourceConfig(label="rows", path=str(path))], dedup="keep")
    (shape,) = {row.example.shape for row in pool.rows if row.example}
    rule = mask_rule(tokenizer, loss_on, [shape])
    return shape, rule, tokenize_rows(pool.rows, tokenizer, rule, max_length=length)


def theirs(path: Path, tokenizer: Any, masks: dict[str, bool], length: int) -> dict[str, tuple[list[int], list[int]]]:
    """Ids and labels by row id, as the trainer is about to train on them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(path.parent / "trl"),
        max_length=length,
        report_to="none",
        use_cpu=True,
        packing=False,
        bf16=False,
        gradient_checkpointing=False,
        **masks,  # pyright: ignore[reportArgumentType]
    )
    rows = Dataset.from_json(str(path), cache_dir=str(path.parent / "cache"))
    trainer = SFTTrainer(toy_llama(), args=arguments, train_dataset=rows, processing_class=tokenizer)
    return {row["id"]: (row["input_ids"], row["labels"]) for row in trainer.train_dataset}


def compare(path: Path, tokenizers: tuple[Any, Any], loss_on: LossOn | None, length: int) -> Sequence[TokenRow]:
    shape, rule, tokens = ours(path, tokenizers[0], loss_on, length)
    if rule.template_origin == "gradsift":  # what the selection card tells the trainer's user to do
        tokenizers[1].chat_template = rule.template
    want = theirs(path, tokenizers[1], trl_arguments(loss_on, shape), length)
    # TRL drops rows without any label, and keeps those whose only label is the first token, which nothing predicts.
    assert [row.id for row in tokens if row.trained.any()] == list(want)
    for got in tokens:
        assert got.status in (RowStatus.OK, RowStatus.TRUNCATED, RowStatus.NO_TRAINED_TOKEN), got.reason
        if got.id in want:
            ids, labels = want[got.id]
            assert got.input_ids.tolist() == ids
            assert [i if t else -100 for i, t in zip(got.input_ids.tolist(), got.trained, strict=True)] == labels
    return tokens


def cut_some(path: Path, tokenizers: tuple[Any, Any], loss_on: LossOn | None) -> None:
    """Compare at a length that leaves some rows whole and cuts the others."""
    lengths = sorted(row.num_untruncated for row in ours(path, tokenizers[0], loss_on, 10_000)[2])
    tokens = compare(path, tokenizers, loss_on, lengths[len(lengths) * 2 // 3])
    assert {RowStatus.OK, RowStatus.TRUNCATED} <= {row.status for row in tokens}


CASES = [
    ("messages", None, CHATML),
    ("messages", "all", CHATML),
    ("messages", None, SMOL),
    ("messages with calls and tools", None, RICH),
    ("messages with calls and tools", "all", RICH),
    ("messages with tools as text", None, RICH),
    ("messages with keywords", None, RICH),
    ("strings", None, CHATML),
    ("strings", "all", None),
    ("chats", None, CHATML),
    ("chats", "assistant", CHATML),
    ("chats", "assistant", SMOL),
    ("chats", "all", CHATML),
    ("chats", None, RICH),
    ("chats with tools", None, RICH),
    ("chats with tools", "assistant", RICH),
    ("text", None, CHATML),
]


@pytest.mark.parametrize(("kind", "loss_on", "template"), CASES)
def test_ids_and_labels_equal_trl(kind: str, loss_on: LossOn | None, template: str | None, tmp_path: Path) -> None:
    path = written(kind, tmp_path, 30)
    cut_some(path, (toy_tokenizer(template), toy_tokenizer(template)), loss_on)


@pytest.mark.parametrize("ends", ["<|endoftext|> $A", "$A <|pad|>", "<|endoftext|> $A <|pad|>"])
@pytest.mark.parametrize("kind", ["strings", "chats", "text"])
def test_tokens_that_the_tokenizer_adds_itself_equal_trl(kind: str, ends: str, tmp_path: Path) -> None:
    """A begin or end token of the tokenizer goes where the trainer puts it: round strings, not into conversations."""
    some = (toy_tokenizer(), toy_tokenizer())
    for tokenizer in some:
        special = [("<|endoftext|>", tokenizer.bos_token_id), ("<|pad|>", tokenizer.pad_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=ends, special_tokens=special)
    tokens = compare(written(kind, tmp_path, 20), some, None, 90)
    begins = {row.input_ids[0] == some[0].bos_token_id for row in tokens}
    assert begins == {kind != "chats" and ends.startswith("<")}


def test_first_token_alone_is_what_trl_keeps_and_we_do_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id":"0","text":"<|im_end|>"}\n{"id":"1","text":"a"}\n', "utf-8")
    alone, pair = compare(path, (toy_tokenizer(), toy_tokenizer()), None, 90)
    assert (alone.status, pair.status) == (RowStatus.NO_TRAINED_TOKEN, RowStatus.OK)


@pytest.mark.parametrize("name", ["gemma", "llama3", "qwen2_5", "qwen3"])
def test_templates_that_trl_swaps_equal_trl(name: str, tmp_path: Path) -> None:
    """The trainer is given the tokenizer as released and swaps in its own variant."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    path = tmp_path / "rows.jsonl"
    draw = random.Random(name)
    rows = [[turn("user", "hi"), turn("assistant", draw.choice(WORDS)), *talk(draw)[-2:]] for _ in range(8)]
    path.write_text("".join(json.dumps({"id": str(i), "messages": m}) + "\n" for i, m in enumerate(rows)), "utf-8")
    some = (toy_tokenizer(template), toy_tokenizer(template))
    assert mask_rule(some[0], None, ["messages"]).template_origin == "trl"
    compare(path, some, None, 200)


@pytest.mark.packaged
@pytest.mark.parametrize(
    ("kind", "loss_on"),
    [
        ("messages", None),
        ("messages", "all"),
        ("strings", None),
        ("chats", None),
        ("chats", "assistant"),
        ("text", None),
    ],
)
def test_the_packaged_navigator_equals_trl(kind: str, loss_on: LossOn | None, tmp_path: Path) -> None:
    """A real vocabulary, whose tokens merge across the end of a prompt, and a real template without markers."""
    from gradsift.models.load import load_tokenizer, resolve_navigator

    try:
        resolved = resolve_navigator("auto")
    except ModelError as error:
        pytest.skip(str(error))
    some = (load_tokenizer(resolved), load_tokenizer(resolved))
    cut_some(written(kind, tmp_path, 60), some, loss_on)
