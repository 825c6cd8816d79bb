"""A small real-data world: made-up items in the shape of the packaged ones."""

from __future__ import annotations

from gradsift.compare import real_data as rd
from gradsift.compare.real_world import RealSettings

SMALL = RealSettings(
    clean=14,
    replay=9,
    wrong=6,
    duplicate=4,
    copies=2,
    other=5,
    num_eval=4,
    num_eval_general=3,
    num_anchor=3,
    num_target=3,
    num_replay=2,
    lesson=0,
    lora_rank=2,
    lora_alpha=4.0,
)


def made_up(source, count=60):
    choices = ("A. one", "B. two", "C. three") if source in ("medmcqa", "openbook_qa", "commonsense_qa") else ()
    choices = ("yes", "no") if source in ("boolq", "privacy_policy") else choices
    some = []
    for k in range(count):
        document = f"{source} doc {k // 2}" if source in ("boolq", "privacy_policy") else f"{source} {k}"
        prompt = "" if source == "xsum" else f"Question: {document} {source} q{k}\nAnswer:"
        answer = choices[k % len(choices)] if choices else f"{source} a{k}"
        some.append(rd.Item(f"{source}/{k:03d}", source, document, prompt, answer, choices))
    return tuple(some)
