"""Marked templates: same text as the original, marks on what the assistant wrote, the same marks as TRL's where it has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import CHATML, toy_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from gradsift.data import marking, templates
from gradsift.data.marking import mark
from gradsift.data.templates import has_markers, marked_template, renders_same, template_text, trl_variant
from gradsift.errors import ConfigError

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Spellings of released families; the escapes of the first are decoded, those of the others stand in the template.
ORIGINALS = {
    "smollm2": SMOLLM2,
    "smollm2, escaped": SMOLLM2.replace("\n", "\\n"),
    "chatml, on lines": (
        "{%- for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
        "{% endfor %}"
    ),
    "llama2": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\n"
        "    {{ ' ' + message['content'] | trim + ' ' + eos_token }}\n{% endif %}{% endfor %}"
    ),
}
TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else None
# Templates that TRL knows and that must work without it too, with the same marks.
KNOWN = ("llama3", "gemma", "qwen2_5", "qwen3_instruct_2507")
# Marked by us alone: TRL has the template but no training variant.
OURS = ("llama3_2",)


def released(name: str) -> str:
    """The original as TRL's package ships it."""
    if FOLDER is None:
        pytest.skip("trl is not installed")
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


def spans(template: str, messages: list[dict[str, Any]], **more: Any) -> tuple[str, list[str]]:
    """Text and marked parts of one conversation, by transformers' own renderer."""
    texts, marks = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
        **more,
    )
    return texts[0], [texts[0][a:b] for a, b in marks[0]]


def plain(template: str, messages: list[dict[str, Any]], prompt: bool, **more: Any) -> str:
    """Text of one conversation."""
    texts, _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
        **more,
    )
    return texts[0]


content = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["", " ", "\n", "  x  ", "{{ a }}", "{% b %}", "<|im_end|>", "a\n\n", "'quoted\"", "\u202eright", "\r\n"]
)


@st.composite
def talks(draw: st.DrawFn, system: bool = True, calls: bool = False) -> list[dict[str, Any]]:
    """Alternating conversations, some with a system turn and with tool calls."""
    messages: list[dict[str, Any]] = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(content)})
        if calls and draw(st.booleans()):
            call = {"type": "function", "function": {"name": "f", "arguments": {"x": draw(content)}}}
            messages.append({"role": "assistant", "content": draw(content), "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(content)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(content)})
    return messages


def check_same_text(original: str, talk: list[dict[str, Any]], **more: Any) -> None:
    marked = mark(original)
    assert marked is not None
    for prompt in (False, True):
        assert plain(marked, talk, prompt, **more) == plain(original, talk, prompt, **more)
    assert spans(marked, talk, **more)[0] == plain(original, talk, False, **more)


@pytest.mark.parametrize("name", ORIGINALS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_marked_template_renders_the_same_text(name: str, data: st.DataObject) -> None:
    """Whatever the words are; and the marked part is the assistant's words and one end token."""
    original = ORIGINALS[name]
    talk = data.draw(talks(system=name not in ("mistral",)))
    check_same_text(original, talk)
    marked = mark(original)
    assert marked is not None
    _, parts = spans(marked, talk)
    end = "<|im_end|>" if "im_end" in original else "</s>"
    trims, padded = "trim" in original, "' ' +" in original
    said = [m["content"].strip() if trims else m["content"] for m in talk if m["role"] == "assistant"]
    assert parts == [f" {words} {end}" if padded else words + end for words in said]


@pytest.mark.parametrize("name", [*KNOWN, *OURS])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_released_templates_render_the_same_text(name: str, data: st.DataObject) -> None:
    """Tool calls and tool lists too, where the template knows them."""
    original = released(name)
    calls = name not in ("llama3", "gemma")
    talk = data.draw(talks(system=name != "gemma", calls=calls))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}] if calls and len(talk) % 2 else None
    check_same_text(original, talk, tools=tools)


@pytest.mark.parametrize("name", KNOWN)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_marks_are_those_of_the_trainers_variant(name: str, data: st.DataObject) -> None:
    """Whether TRL is installed must not change what is trained."""
    talk = data.draw(talks(system=name != "gemma", calls=name.startswith("qwen")))
    ours, theirs = mark(released(name)), trl_variant(released(name))
    assert ours is not None
    assert theirs is not None
    assert spans(ours, talk) == spans(theirs, talk)


def test_calls_are_marked_in_a_template_that_only_we_mark() -> None:
    marked = mark(released("llama3_2"))
    assert marked is not None
    talk = [dict(message) for message in templates.PROBES[3]]
    _, parts = spans(marked, talk)
    assert parts == ['{"name": "PROBE", "parameters": {"x": "y"}}<|eot_id|>', "IT RAINS.<|eot_id|>"]


@pytest.mark.parametrize("name", [*ORIGINALS, *KNOWN, *OURS])
def test_works_without_trl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ORIGINALS.get(name) or released(name)
    monkeypatch.setattr(templates, "trl_variant", lambda template: None)
    found = marked_template(toy_tokenizer(original))
    assert found.origin == "gradsift"
    assert has_markers(found.text)


def test_trl_variant_is_the_one_that_trl_swaps_in() -> None:
    """Every pair of files, against TRL's own function; and TRL's comes first."""
    trl = pytest.importorskip("trl.chat_template_utils")
    assert FOLDER is not None
    variants = sorted(FOLDER.glob("*_training.jinja"))
    assert len(variants) >= 20
    for variant in variants:
        original = released(variant.name.removesuffix("_training.jinja"))
        tokenizer = toy_tokenizer(original)
        if has_markers(original):
            continue
        assert trl_variant(original) == trl.get_training_chat_template(tokenizer), variant.name
        assert marked_template(tokenizer).origin == "trl"
    with pytest.raises(ValueError, match="not training-compatible"):
        trl.get_training_chat_template(toy_tokenizer(SMOLLM2))
    assert trl_variant(SMOLLM2) is None


def test_stop_token_is_trained_by_the_trainers_own_check() -> None:
    trl = pytest.importorskip("trl.chat_template_utils")
    for name in ("smollm2", "zephyr", "mistral"):
        tokenizer = toy_tokenizer(ORIGINALS[name])
        assert trl.is_chat_template_stop_token_trained(tokenizer, chat_template=marked_template(tokenizer).text)
        assert trl.has_generation_markers(marked_template(tokenizer).text)


def test_own_markers_are_kept() -> None:
    tokenizer = toy_tokenizer()
    assert marked_template(tokenizer) == templates.MarkedTemplate(CHATML, "tokenizer")


@pytest.mark.parametrize("spelling", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%-generation %}"])
def test_markers_are_seen(spelling: str) -> None:
    assert has_markers(f"a{spelling}b")
    assert not has_markers("{% if add_generation_prompt %}")


@pytest.mark.parametrize(
    ("why", "break_it"),
    [
        ("header of the turn inside", lambda t: t.replace("{{ '<|im_start|>' + message['role'] + '\\n' }}", "", 1)),
        ("no end token", lambda t: t.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}")),
        ("the user is marked", lambda t: t.replace("== 'assistant'", "!= 'nobody'")),
        ("one role's words alone", lambda t: t.replace("== 'assistant'", "== 'user'")),
        ("other text", lambda t: t.replace("'\\n' }}", "' ' }}")),
        ("not Jinja", lambda t: t.replace("{% endfor %}", "")),
    ],
)  # fmt: skip
def test_a_wrong_marking_is_not_accepted(why: str, break_it: Any) -> None:
    marked = mark(SMOLLM2)
    assert marked is not None
    tokenizer = toy_tokenizer(SMOLLM2)
    assert renders_same(tokenizer, SMOLLM2, marked)
    broken = break_it(marked)
    assert broken != marked, why
    assert not renders_same(tokenizer, SMOLLM2, broken), why


def test_unmarked_tool_calls_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain ChatML rule fits one branch of Qwen2.5 and would leave its tool calls without loss."""
    original = released("qwen2_5")
    monkeypatch.setattr(marking, "_FAMILIES", {"chatml": marking._FAMILIES["chatml"]})
    marked = mark(original)
    assert marked is not None
    assert not renders_same(toy_tokenizer(original), original, marked)


def test_refusals_name_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError) as caught:
        marked_template(toy_tokenizer(odd))
    assert "--loss-on all" in str(caught.value)
    assert "generation" in str(caught.value)
    monkeypatch.setattr(templates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        marked_template(toy_tokenizer(odd))
    assert "gradsift[train]" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        marked_template(toy_tokenizer(None))
    assert "--navigator" in str(caught.value)


def test_named_templates_use_the_default() -> None:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = {"tool_use": "other", "default": CHATML}
    assert template_text(tokenizer) == CHATML
    tokenizer.chat_template = {"tool_use": "other"}
    assert template_text(tokenizer) is None
