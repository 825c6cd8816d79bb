"""Pages of tlm, ifd, dsir, daar, thtb and memory_level: figures computed, text as in the modules."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import pytest
from tests.forward_pages import FORWARD_EXAMPLES

from gradsift.cli.methods import describe_needs
from gradsift.methods import methods

PAGES = Path(__file__).parents[3] / "docs" / "methods"


def sections(name):
    pieces = re.split(r"^## (.*)\n", (PAGES / f"{name}.md").read_text("utf-8"), flags=re.MULTILINE)
    return {"head": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}


def plain(text):
    return " ".join(re.sub(r"```(text)?|`", " ", text).split()).lower()


@pytest.mark.parametrize("name", FORWARD_EXAMPLES)
def test_the_worked_example_is_what_the_code_gives(name):
    text, lines = sections(name)["A worked example"], FORWARD_EXAMPLES[name]()
    assert len(lines) >= 3
    for line in lines:
        assert line in text


@pytest.mark.parametrize("name", FORWARD_EXAMPLES)
def test_algorithm_and_departures_are_those_of_the_module(name):
    page, text = sections(name), inspect.getdoc(sys.modules[methods()[name].__module__]) or ""
    heads = ("Paper:", "Algorithm:", "Departures from the paper:", "Departures from released code:")
    at = [text.index(head) for head in heads]
    parts = [text[a + len(h) : b] for h, a, b in zip(heads, at, [*at[1:], len(text)], strict=True)]
    for title, part in zip(("head", "Algorithm", heads[2][:-1], heads[3][:-1]), parts, strict=True):
        assert plain(part) in plain(page[title])


@pytest.mark.parametrize("name", FORWARD_EXAMPLES)
def test_head_and_settings(name):
    cls, page = methods()[name], sections(name)
    head = " ".join(page["head"].split())
    assert f"- Evidence: {cls.evidence} (" in head
    assert f"- Cost: {cls().needs.cost_class}. By default it {describe_needs(cls().needs)}." in head
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", page["Defaults"], re.MULTILINE)
    found = {key: value for key, value, _ in lines}
    assert found == {f.name: str(getattr(cls(), f.name)) for f in dataclasses.fields(cls)}
