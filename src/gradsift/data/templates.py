"""Chat templates with generation markers, so that the loss can be taken on assistant turns.

transformers needs ``{% generation %}`` markers in a template to say which tokens the assistant wrote, and most released
templates have none. The trainer (TRL) swaps in a marked variant of the templates it knows, so its variant comes first;
it lies in its package as a file and is found without importing TRL, which takes seconds. Otherwise the few expressions
that render the assistant's turn are rewritten in place (``mark``); such a template is only accepted when it renders the
same text as the original and marks what the assistant wrote and nothing else.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradsift.data.marking import mark
from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Origin = Literal["tokenizer", "trl", "gradsift"]
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


_CALL = {"id": "abcdefgh9", "type": "function", "function": {"name": "PROBE", "arguments": {"x": "y"}}}
PROBES: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "content": "hello?"}, {"role": "assistant", "content": "GOOD DAY."}),
    (
        {"role": "system", "content": "be brief."},
        {"role": "user", "content": "one\n\ntwo"},
        {"role": "assistant", "content": "  THREE "},
        {"role": "user", "content": "{{ four }} <b>"},
        {"role": "assistant", "content": "F\u00dcNF \u4e94"},
    ),
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "c"}),
    (
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "abcdefgh9", "content": "rain."},
        {"role": "assistant", "content": "IT RAINS."},
    ),
)


@dataclass(frozen=True)
class MarkedTemplate:
    """A template that says which tokens the assistant wrote.

    Args:
        text: Jinja text with generation markers.
        origin: ``tokenizer`` (it had them), ``trl`` (its training variant) or ``gradsift`` (we put them in).
    """

    text: str
    origin: Origin


def has_markers(template: str) -> bool:
    """Tell whether a template has generation markers.

    Args:
        template: Jinja text.

    Returns:
        True when it has.
    """
    return _MARKER.search(template) is not None


def template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give a tokenizer's chat template, the default one of several named.

    Args:
        tokenizer: any tokenizer.

    Returns:
        Jinja text or None.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def marked_template(tokenizer: PreTrainedTokenizerBase) -> MarkedTemplate:
    """Find the template with generation markers that the trainer is to use.

    The tokenizer's own if it has markers; else TRL's training variant if TRL is installed and knows the template (it
    may render some conversations differently, and the trainer then does so too); else our marked one.

    Args:
        tokenizer: any tokenizer.

    Returns:
        The template and where it came from.

    Raises:
        ConfigError: there is no template, or it cannot be marked.
    """
    original = template_text(tokenizer)
    if original is None:
        raise no_template()
    if has_markers(original):
        return MarkedTemplate(original, "tokenizer")
    theirs = trl_variant(original)
    if theirs is not None:
        return MarkedTemplate(theirs, "trl")
    ours = mark(original)
    if ours is not None and renders_same(tokenizer, original, ours):
        return MarkedTemplate(ours, "gradsift")
    missing = importlib.util.find_spec("trl") is None
    raise ConfigError(
        "the chat template does not say which tokens the assistant wrote",
        where="navigator's chat template",
        got="no {% generation %} markers, and it is none that gradsift can mark"
        + (" (TRL, which may know it, is not installed)" if missing else ", and none that TRL knows"),
        expected="a template with {% generation %} ... {% endgeneration %} around the assistant's turn",
        do=("pip install 'gradsift[train]', or " if missing else "")
        + "--loss-on all, or a navigator folder whose chat_template.jinja has the markers",
    )


def no_template() -> ConfigError:
    """Build the refusal of a tokenizer that cannot render conversations.

    Returns:
        The error, to be raised.
    """
    return ConfigError(
        "the tokenizer has no chat template, so messages cannot be rendered",
        where="navigator",
        got="no chat template",
        expected="a chat model, or rows with text or with prompt and completion as strings",
        do="choose an instruct model as --navigator, or convert the rows",
    )


def trl_variant(template: str) -> str | None:
    """Find the training variant that TRL swaps in for a template, from the files of its package.

    Args:
        template: Jinja text without markers.

    Returns:
        Jinja text with markers, or None when TRL is absent or does not know the template.
    """
    spec = importlib.util.find_spec("trl")  # finds the package without importing it
    if spec is None or spec.origin is None:
        return None
    for variant in sorted((Path(spec.origin).parent / "chat_templates").glob("*_training.jinja")):
        base = variant.with_name(variant.name.replace("_training.jinja", ".jinja"))
        if base.is_file() and base.read_text("utf-8") == template:
            return variant.read_text("utf-8")
    return None


def renders_same(tokenizer: PreTrainedTokenizerBase, original: str, candidate: str) -> bool:
    """Check a marked template against the one it was made from, on a set of conversations.

    Args:
        tokenizer: renders them.
        original: the tokenizer's own template.
        candidate: the marked one.

    Returns:
        True when every conversation that the original accepts comes out the same (and at least one does), and what the
        assistant wrote is marked with its end-of-turn token, and nothing else is.
    """
    rendered = 0
    for messages in PROBES:
        for prompt in (False, True):
            want = _render(tokenizer, messages, original, prompt)
            if want is None:
                continue
            if _render(tokenizer, messages, candidate, prompt) != want:
                return False
            rendered += 1
            if not prompt and not _marks_assistant(tokenizer, messages, candidate):
                return False
    return rendered > 0


def _marks_assistant(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], template: str) -> bool:
    """One span per assistant turn: its words (or its call, if the template renders calls) and more, no one else's."""
    text, spans = _marked_text(tokenizer, messages, template)
    turns = [message for message in messages if message["role"] == "assistant"]
    if len(spans) != len(turns):
        return False
    for turn, span in zip(turns, spans, strict=True):
        words = "PROBE" if "tool_calls" in turn and "PROBE" in text else turn["content"].strip()
        if words not in span or (words and span.rstrip().endswith(words)):
            return False
    others = [message["content"].strip() for message in messages if message["role"] != "assistant"]
    return not any(words in span for words in others for span in spans if len(words) > 1)


def _marked_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], template: str
) -> tuple[str, list[str]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    special: dict[str, Any] = dict(tokenizer.special_tokens_map)
    rendered: Any = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **special,
    )
    texts, spans = rendered
    return texts[0], [texts[0][start:end] for start, end in spans[0]]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], template: str, prompt: bool
) -> str | None:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # templates raise what they like, for example for a system turn
        return None
    return str(text)
