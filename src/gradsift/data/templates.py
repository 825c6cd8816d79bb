"""Chat templates with generation markers, so that the loss can be taken on assistant turns.

transformers needs ``{% generation %}`` markers in a template to say which tokens the assistant wrote, and most released
templates have none. Where they lack, the trainer's own marked variant is used if TRL is installed and knows the
template; otherwise the assistant's turn is marked by rewriting the one expression that renders it. Either way the marked
template is only accepted when it renders the same text as the original on a set of conversations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_Q = "['\"]"
_ROLE = rf"message(?:\.role|\[{_Q}role{_Q}\])"
_NL = r"(?:\\n|\n)"  # a JSON file's \n becomes a real line break inside the Jinja string
_CONTENT = rf"(?P<content>message(?:\.content|\[{_Q}content{_Q}\])(?:\s*\|\s*trim)?)"

# Each rule: the expression that renders a turn, and what it becomes. The end-of-turn token is trained, so that the model
# learns to stop; the line break behind it is not.
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (  # ChatML in one expression (SmolLM2, Qwen1.5, many fine-tunes)
        re.compile(
            rf"\{{\{{-?\s*{_Q}<\|im_start\|>{_Q}\s*\+\s*{_ROLE}\s*\+\s*{_Q}{_NL}{_Q}\s*\+\s*{_CONTENT}\s*\+\s*"
            rf"{_Q}<\|im_end\|>{_Q}\s*\+\s*{_Q}{_NL}{_Q}\s*-?\}}\}}"
        ),
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ CONTENT + '<|im_end|>' }}{% endgeneration %}{% else %}{{ CONTENT + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    ),
    (  # Zephyr and TinyLlama
        re.compile(rf"\{{\{{-?\s*{_Q}<\|assistant\|>{_NL}{_Q}\s*\+\s*{_CONTENT}\s*\+\s*eos_token\s*-?\}}\}}"),
        "{{ '<|assistant|>\\n' }}{% generation %}{{ CONTENT + eos_token }}{% endgeneration %}",
    ),
    (  # Llama 2 and Mistral: the assistant's words between two spaces or none, then the end token
        re.compile(
            rf"\{{\{{-?\s*(?P<before>{_Q} {_Q}\s*\+\s*)?{_CONTENT}\s*\+\s*(?P<after>{_Q} {_Q}\s*\+\s*)?eos_token\s*-?\}}\}}"
        ),
        "{% generation %}{{ BEFORE CONTENT + AFTER eos_token }}{% endgeneration %}",
    ),
)

PROBES: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One\n\ntwo"},
        {"role": "assistant", "content": "  three "},
        {"role": "user", "content": "{{ four }} <b>"},
        {"role": "assistant", "content": "f\u00fcnf \u4e94"},
    ),
    ({"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}),
)


@dataclass(frozen=True)
class MarkedTemplate:
    """A template that says which tokens the assistant wrote.

    Args:
        text: the template.
        origin: ``tokenizer`` (it had markers), ``trl`` or ``gradsift`` (we marked it).
    """

    text: str
    origin: str


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
    """Find a template with generation markers that renders the same text as the tokenizer's own.

    Args:
        tokenizer: a tokenizer with a chat template.

    Returns:
        The template and where it came from.

    Raises:
        ConfigError: there is no template, or it cannot be marked.
    """
    original = template_text(tokenizer)
    if original is None:
        raise ConfigError(
            "the tokenizer has no chat template, so messages cannot be rendered",
            where="navigator",
            expected="a chat model, or rows with text or prompt and completion",
            do="choose an instruct model as --navigator, or convert the rows",
        )
    if has_markers(original):
        return MarkedTemplate(original, "tokenizer")
    for origin, candidate in (("gradsift", mark(original)), ("trl", _from_trl(tokenizer))):
        if candidate is not None and renders_same(tokenizer, original, candidate):
            return MarkedTemplate(candidate, origin)
    raise ConfigError(
        "the chat template does not say which tokens the assistant wrote",
        where="navigator's chat template",
        got="no {% generation %} markers, and it is none that gradsift or TRL can mark",
        expected="a template with {% generation %} ... {% endgeneration %} around the assistant's turn",
        do="--loss-on all, or a navigator folder whose chat_template.jinja has the markers",
    )


def mark(template: str) -> str | None:
    """Put markers round the assistant's turn of a template we know how to read.

    Args:
        template: Jinja text without markers.

    Returns:
        Marked Jinja text, or None when no rule fits.
    """
    for pattern, replacement in _RULES:
        found = pattern.search(template)
        if found is None:
            continue
        groups = found.groupdict()
        new = replacement.replace("CONTENT", groups["content"])
        new = new.replace("BEFORE ", groups.get("before") or "").replace("AFTER ", groups.get("after") or "")
        return template[: found.start()] + new + template[found.end() :]
    return None


def renders_same(tokenizer: PreTrainedTokenizerBase, original: str, candidate: str) -> bool:
    """Compare two templates on a set of conversations, and check that the candidate marks the assistant's words.

    Args:
        tokenizer: renders them.
        original: the tokenizer's own template.
        candidate: the marked one.

    Returns:
        True when every conversation that the original accepts comes out the same, and tokens are marked.
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
    if not rendered:
        return False
    masks = tokenizer.apply_chat_template(
        list(PROBES[0]), chat_template=candidate, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return 1 in masks["assistant_masks"]  # type: ignore[index,operator]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], template: str, prompt: bool
) -> str | None:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # templates raise what they like, for example for a system turn
        return None
    return str(text)


def _from_trl(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    try:
        found: Any = get_training_chat_template(tokenizer)
    except Exception:  # it raises ValueError for templates it does not know, and template errors for others
        return None
    return found if isinstance(found, str) else None
