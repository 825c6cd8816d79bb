"""R12: a tokenizer or template that does not fit is refused or flagged before a gradient is taken, or moves no number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import Stopped, Stops, quiet, recipe_of, room, run, store_rows, world_in
from tests.toy import CHATML, toy_tokenizer

from gradsift import doctor
from gradsift.errors import GradsiftError
from gradsift.pipeline.progress import Silent

BLIND = "doctor finds every row well tokenized and every id in the vocabulary"


def save(place: Path, change: Callable[[Any], None], template: str = CHATML) -> None:
    """Replace the navigator's tokenizer."""
    with quiet():
        tokenizer = toy_tokenizer(template)
        change(tokenizer)
        tokenizer.save_pretrained(place / "navigator")


def grown(tokenizer: Any) -> None:
    tokenizer.add_tokens(["good day"])  # stands in the anchor's rows, beyond the model's table


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "vocabulary larger than the embedding": ("flagged", lambda p: save(p, grown)),
    "begin token doubled": (
        "flagged",
        lambda p: save(p, lambda t: None, CHATML.replace("{%- for message", "{{ '<|endoftext|><|endoftext|>' }}{%- for message", 1)),
    ),
    "other special tokens between two runs": ("refused", lambda p: save(p, lambda t: setattr(t, "eos_token", "<|pad|>"))),
    "template edited between two runs": ("refused", lambda p: save(p, lambda t: None, CHATML.replace("user", "usr").replace("'\\n'", "'\\n\\n'"))),
    "template that marks no answer": ("flagged", lambda p: save(p, lambda t: None, "{% for m in messages %}{{ m['content'] }}{% endfor %}")),
    "pad token is the end token": ("moves nothing", lambda p: save(p, lambda t: setattr(t, "pad_token", t.eos_token))),
    "tokenizer pads on the left": ("moves nothing", lambda p: save(p, lambda t: setattr(t, "padding_side", "left"))),
    "tokenizer pads on the right": ("moves nothing", lambda p: save(p, lambda t: setattr(t, "padding_side", "right"))),
}  # fmt: skip


def signals(out: Path) -> dict[str, tuple]:
    """Every number of a run."""
    return store_rows(out)


def flagged(place: Path) -> tuple[bool, str]:
    """Whether doctor fails or warns, and on what."""
    try:
        with quiet():
            checks = doctor.examine(recipe_of(place), Silent(), num_rows=2)
    except GradsiftError as error:
        return True, f"refused: {error.what}"
    bad = [
        f"{check.name}: {check.verdict}" for check in checks if check.verdict != "ok" and "truncation" not in check.name
    ]
    return bool(bad), "; ".join(bad)


def once(kind: str, defect: str) -> dict[str, Any]:
    """One kind of misfit."""
    want, change = KINDS[kind]
    with room() as folder:
        place = world_in(folder / "world", 12)
        clean, words = flagged(place)
        progress = Stops()
        if want == "refused":
            with contextlib.suppress(Stopped):
                run(recipe_of(place), folder / "run", Stops(after=5))
        base = None
        if want == "moves nothing":
            run(recipe_of(place), folder / "base")
            base = signals(folder / "base")
        change(place)
        told, words = (False, "")
        same = None
        if want == "flagged":
            told, words = flagged(place)
        else:
            out = folder / "run"
            try:
                run(recipe_of(place), out, progress)
                same = base is not None and signals(out) == base
            except GradsiftError as error:
                told, words = True, error.what
        return {
            "want": want,
            "told": told,
            "words": words,
            "before": not clean,
            "same": same,
            "measured": progress.num_rows,
        }


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Every kind by itself."""
    names = list(KINDS) if full else ["vocabulary larger than the embedding", "tokenizer pads on the left"]
    if defect:
        ok = doctor.Check("planted", "ok", "")
        patch.object(doctor, "_vocabulary", lambda *_: ok).start()
        patch.object(doctor, "token_checks", lambda *_: [ok]).start()
        patch.object(doctor, "_gradient_checks", lambda *_: [ok]).start()
        names = [name for name in names if KINDS[name][0] == "flagged" and "answer" not in name]
    found = {name: once(name, defect) for name in names}
    patch.stopall()
    return {"kinds": found}


def well(found: Mapping[str, Any]) -> bool:
    """Whether it was told before any row was measured, or moved nothing."""
    if found["want"] == "moves nothing":
        return bool(found["same"])
    return found["told"] and found["measured"] == 0 and found["before"]


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Eight of eight."""
    found = figures["kinds"]
    bad = [name for name, f in found.items() if not well(f)]
    seen = f"{len(found) - len(bad)}/{len(found)}" + (f", not: {', '.join(bad)}" if bad else "")
    moved = [name for name, f in found.items() if f["want"] == "moves nothing"]
    words = (
        (f"{len(moved)} of them move no number in gradsift, which pads itself: {', '.join(moved)}",) if moved else ()
    )
    return Outcome(
        "R12", (Check("refused or flagged before any gradient, or no number moved", seen, "8/8", not bad),), words
    )


TRIAL = Trial(
    "R12", "tokenizer and template that do not fit the model, the run or each other", "8/8 before any gradient", measure,
    judge, (BLIND,), {"rows": 12}, slow=True,
)  # fmt: skip
