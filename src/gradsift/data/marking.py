"""Generation markers put into the chat templates of known families, by rewriting the few expressions that render a turn.

Whether a rewritten template renders the same text and marks the right words is not taken on trust here:
``templates.renders_same`` checks it before it is used.
"""

from __future__ import annotations

import re


def _quoted(text: str) -> str:
    """Match a Jinja string; a line break in it is escaped, or real where a JSON file's escape was decoded."""
    return "['\"]" + r"(?:\\n|\n)".join(re.escape(part) for part in text.split("\n")) + "['\"]"


_ROLE = r"message(?:\.role|\[['\"]role['\"]\])"
_CONTENT = r"(?P<content>message(?:\.content|\[['\"]content['\"]\])(?:\s*\|\s*trim)?)"
_ASSISTANT_BRANCH = rf"(?P<head>\{{%-?\s*elif\s+{_ROLE}\s*==\s*['\"]assistant['\"]\s*-?%\}}\s*)"


def _output(*parts: str) -> str:
    """Match ``{{ a + b + c }}``; the whitespace control of both ends is kept as ``open`` and ``close``."""
    return r"\{\{(?P<open>-?)\s*" + r"\s*\+\s*".join(parts) + r"\s*(?P<close>-?)\}\}"


def _rule(pattern: str, new: str) -> tuple[re.Pattern[str], str]:
    return re.compile(pattern, re.DOTALL), new


_HEADER = "{{@open@ '<|im_start|>' + message['role'] + '\\n' }}"
_SPLIT = (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ @content@ + @end@ }}{% endgeneration %}"
    "{% else %}{{ @content@ + @end@ }}{% endif %}"
)
# Behind the calls of a turn, before the branch of the tools' answers (Qwen).
_END_OF_CALLS = _rule(
    rf"(?P<end>\{{\{{-\s*{_quoted('<|im_end|>' + chr(10))}\s*\}}\}})(?P<next>\s*\{{%-\s*elif\s+{_ROLE}\s*==\s*['\"]tool['\"])",
    "@end@{%- endgeneration %}@next@",
)

# Each family: expressions that all have to be there, and what they become. The end-of-turn token is trained, so that the
# model learns to stop. Where TRL marks a line break around the turn as well (Qwen, Gemma), so do we: whether TRL is
# installed must not change what is trained. ``{{ '' }}`` at a rewritten end keeps the line break of the original, which
# a block tag would swallow.
_FAMILIES: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {
    "qwen2.5": (
        _rule(
            _output(_quoted("<|im_start|>"), _ROLE, _quoted("\n"), _CONTENT, _quoted("<|im_end|>"), _quoted("\n")),
            "{{@open@ '<|im_start|>' + message.role }}{% if message.role == 'assistant' %}{% generation %}"
            "{{ '\\n' + @content@ + '<|im_end|>\\n' }}{% endgeneration %}"
            "{% else %}{{ '\\n' + @content@ + '<|im_end|>\\n' }}{% endif %}{{ '' @close@}}",
        ),
        _rule(
            _ASSISTANT_BRANCH + _output(_quoted("<|im_start|>"), _ROLE),
            "@head@{{@open@ '<|im_start|>' + message.role @close@}}{%- generation %}",
        ),
        _END_OF_CALLS,
    ),
    "qwen3-instruct": (
        _rule(
            _ASSISTANT_BRANCH + _output(_quoted("<|im_start|>"), _ROLE, _quoted("\n"), "content"),
            "@head@{{@open@ '<|im_start|>' + message.role + '\\n' }}{% generation %}{{ content @close@}}",
        ),
        _END_OF_CALLS,
    ),
    "chatml": (  # SmolLM2, Qwen1.5, Hermes and many fine-tunes
        _rule(
            _output(
                _quoted("<|im_start|>"),
                _ROLE,
                _quoted("\n"),
                _CONTENT,
                rf"(?:{_quoted('<|im_end|>')}\s*\+\s*{_quoted(chr(10))}|{_quoted('<|im_end|>' + chr(10))})",
            ),
            _HEADER + _SPLIT.replace("@end@", "'<|im_end|>'") + "{{ '\\n' @close@}}",
        ),
    ),
    "llama3.2": (
        _rule(
            _output(
                _quoted("<|start_header_id|>"), _ROLE, _quoted("<|end_header_id|>\n\n"), _CONTENT, _quoted("<|eot_id|>")
            ),
            "{{@open@ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
            + _SPLIT.replace("@end@", "'<|eot_id|>'")
            + "{{ '' @close@}}",
        ),
        _rule(
            rf"(?P<head>\{{\{{-\s*{_quoted('<|start_header_id|>assistant<|end_header_id|>' + chr(10) * 2)}\s*-\}}\}})"
            rf"\s*(?P<body>\{{\{{-\s*'\{{\"name\": \"'.{{,250}}?\{{\{{- \"<\|eot_id\|>\" \}}\}})(?P<next>\s*\{{%- elif)",
            "@head@{% generation %}@body@{%- endgeneration %}@next@",
        ),
    ),
    "llama3": (
        _rule(
            r"\{%(?P<open>-?) set content = "
            + r"\s*\+\s*".join(
                (
                    _quoted("<|start_header_id|>"),
                    _ROLE,
                    _quoted("<|end_header_id|>\n\n"),
                    _CONTENT,
                    _quoted("<|eot_id|>"),
                )
            )
            + r" %\}(?P<first>\{% if loop\.index0 == 0 %\}\{% set content = bos_token \+ content %\}\{% endif %\})"
            + r"\{\{ content \}\}",
            "{%@open@ set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}@first@"
            "{{ content }}" + _SPLIT.replace("@end@", "'<|eot_id|>'") + "{{ '' }}",
        ),
    ),
    "gemma": (
        _rule(
            _output(_quoted("<start_of_turn>"), "role", _quoted("\n"), _CONTENT, _quoted("<end_of_turn>\n")),
            "{{@open@ '<start_of_turn>' + role + '\\n' }}"
            + _SPLIT.replace("@end@", "'<end_of_turn>\\n'")
            + "{{ '' @close@}}",
        ),
    ),
    "zephyr": (  # and TinyLlama
        _rule(
            _output(_quoted("<|assistant|>\n"), _CONTENT, "eos_token"),
            "{{@open@ '<|assistant|>\\n' }}{% generation %}{{ @content@ + eos_token }}{% endgeneration %}{{ '' @close@}}",
        ),
    ),
    "llama2": (  # and Mistral: the assistant's words between two spaces or none, then the end token
        _rule(
            r"\{\{(?P<open>-?)\s*(?P<before>['\"] ['\"]\s*\+\s*)?"
            + _CONTENT
            + r"\s*\+\s*(?P<after>['\"] ['\"]\s*\+\s*)?eos_token\s*(?P<close>-?)\}\}",
            "{{@open@ '' }}{% generation %}{{ @before@@content@ + @after@eos_token }}{% endgeneration %}{{ '' @close@}}",
        ),
    ),
}


def mark(template: str) -> str | None:
    """Put markers round the assistant's turn of a template of a family we know.

    Args:
        template: Jinja text without markers.

    Returns:
        Marked Jinja text, or None when no family fits. Whether it renders the same is for ``renders_same`` to say.
    """
    for rules in _FAMILIES.values():
        marked: str | None = template
        for pattern, new in rules:
            marked = _replace_first(marked, pattern, new)
            if marked is None:
                break
        if marked is not None:
            return marked
    return None


def _replace_first(template: str, pattern: re.Pattern[str], new: str) -> str | None:
    found = pattern.search(template)
    if found is None:
        return None
    groups = found.groupdict()
    filled = re.sub(r"@(\w+)@", lambda name: groups[name[1]] or "", new)
    return template[: found.start()] + filled + template[found.end() :]
