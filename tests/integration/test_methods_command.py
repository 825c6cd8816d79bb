"""``gradsift methods``: every method by cost class within 100 columns, and one method with its settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from gradsift.cli.app import run
from gradsift.cli.methods import COSTS, UNSTATED, allowed, describe_needs, mark, setting_words
from gradsift.methods import Needs, methods
from gradsift.methods.base import GRADIENT_SIGNALS
from gradsift.methods.evidence import EVIDENCE

PAGES = Path(__file__).parents[2] / "docs/methods"


def test_the_list_is_grouped_by_cost_and_fits_100_columns(capsys):
    assert run(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    heads = [line.partition(":")[0] for line in lines if line.partition(":")[0] in COSTS]
    assert heads == [cost for cost in COSTS if cost in heads]
    place = {name: next(i for i, line in enumerate(lines) if line.split(" ")[0] == name) for name in methods()}
    starts = {line.partition(":")[0]: i for i, line in enumerate(lines) if line.partition(":")[0] in COSTS}
    for name, cls in methods().items():
        cost = cls().needs.cost_class
        later = [starts[c] for c in heads[heads.index(cost) + 1 :]]
        assert starts[cost] < place[name] < min(later, default=len(lines))
    text = " ".join(" ".join(lines).split())
    for cls in methods().values():
        for said in (cls.summary, cls.paper, f"[{mark(cls)}]", describe_needs(cls().needs)):
            assert " ".join(said.split()) in text
    assert all(word in text for word in EVIDENCE.values())
    assert "docs/methods/NAME.md" in text


@pytest.mark.parametrize("name", methods())
def test_one_method_shows_every_setting_with_its_default_and_its_page(capsys, name):
    assert run(["methods", name]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert f"docs/methods/{name}.md" in out
    cls, method = methods()[name], methods()[name]()
    assert set(setting_words(cls)) >= {field.name for field in dataclasses.fields(cls)}, "a setting without a sentence"
    for field in dataclasses.fields(cls):
        line = next(line for line in out.splitlines() if line.split(" ")[0] == field.name)
        value = getattr(method, field.name)
        assert ("none" if value is None else str(value))[:6] in line


def test_an_unknown_method_is_refused_with_the_known_ones(capsys):
    assert run(["methods", "randon"]) == 2
    assert "no such method" in capsys.readouterr().err


def test_a_method_that_states_no_evidence_is_said_to():
    @dataclass(frozen=True)
    class Foreign:
        """A third party's.

        Args:
            depth: how deep,
                and how wide.

        Returns:
            nothing: at all.
        """

        name: ClassVar[str] = "foreign"
        depth: int = 3

    assert mark(Foreign) == UNSTATED
    assert setting_words(Foreign) == {"depth": "how deep, and how wide."}


def test_values_and_needs_in_words():
    assert allowed({"enum": ["a", "b"]}) == "a, b"
    assert allowed({"const": "raw"}) == "raw"
    assert allowed({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}) == "integer >= 1, or none"
    assert allowed({"type": "number", "exclusiveMinimum": 0, "maximum": 1}) == "number > 0, <= 1"
    assert describe_needs(Needs()) == "needs the rows only"
    full = Needs(signals=frozenset(sorted(GRADIENT_SIGNALS)[:1]), anchors=True, target=True, rollouts=True)
    assert describe_needs(full).startswith("needs an anchor, a target, roll-outs; signals ")
