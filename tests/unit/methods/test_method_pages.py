"""The pages of docs/methods: every method has one, and what it says is what the code does."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys

import numpy as np
import pytest
from tests.pages import (
    EXAMPLES,
    HELD_OUT,
    LOSS,
    MEASURED,
    PAGES,
    ROOT,
    atoms_problem,
    choose,
    measured_lines,
    toy,
    toy_lines,
)

from gradsift.cli.methods import describe_needs
from gradsift.geometry.similarity import row_scale
from gradsift.methods import methods
from gradsift.methods.evidence import EVIDENCE
from gradsift.train.config import TrainConfig

PARTS = ("algorithm", "departures? from the paper", "released code", "default", "example", "when not to use")
OURS = sorted(set(EXAMPLES) & set(methods()))
LAST = "What compare measured here"


def sections(name: str) -> dict[str, str]:
    """Text by heading, in the page's order; the part before the first one is the head."""
    pieces = re.split(r"^## (.*)\n", (PAGES / f"{name}.md").read_text("utf-8"), flags=re.MULTILINE)
    return {"head": pieces[0], **dict(zip(pieces[1::2], pieces[2::2], strict=True))}


def plain(text: str) -> str:
    """Words alone: line breaks, code marks and fences away, case of the first letter too."""
    text = re.sub(r"```(text)?", " ", text).replace("`", "")
    return " ".join(text.split()).lower()


def said_in_code(name: str) -> dict[str, str]:
    """The module's docstring by its headings."""
    text = inspect.getdoc(sys.modules[methods()[name].__module__]) or ""
    heads = ("Paper|Source", "Algorithm", "Departures from the paper", "Departures from released code")
    found = [re.search(rf"^({head}):", text, re.MULTILINE) for head in heads]
    ends = [*(match.start() for match in found[1:]), len(text)]
    return {match[1]: text[match.end() : end] for match, end in zip(found, ends, strict=True)}


@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_page_with_all_its_parts(name):
    assert (PAGES / f"{name}.md").is_file(), "write docs/methods/<name>.md; docs/methods/README.md says what it holds"
    headings = [heading for heading in sections(name) if heading != "head"]
    at = [next((i for i, h in enumerate(headings) if re.search(part, h, re.IGNORECASE)), None) for part in PARTS]
    assert None not in at, dict(zip(PARTS, at, strict=True))
    assert headings[-1] == LAST


@pytest.mark.parametrize("name", methods())
def test_the_index_names_every_method(name):
    assert f"| [`{name}`]({name}.md) |" in (PAGES / "README.md").read_text("utf-8")


def test_the_readme_shows_the_six_rows_and_the_words_of_evidence():
    text = (PAGES / "README.md").read_text("utf-8")
    for line in [*toy_lines(), *(f"| {word} | {meaning} |" for word, meaning in EVIDENCE.items())]:
        assert line + "\n" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_worked_example_is_what_the_method_gives(name):
    text = sections(name)["A worked example"]
    found = EXAMPLES[name]()
    assert len(found) >= 2
    for line in found:
        assert line in text


@pytest.mark.parametrize("name", OURS)
def test_algorithm_and_departures_are_those_of_the_module(name):
    page, code = sections(name), said_in_code(name)
    assert plain(code.pop("Paper", "") or code.pop("Source", "")) in plain(page["head"])
    for heading, text in code.items():
        assert plain(text) == plain(page[heading])


@pytest.mark.parametrize("name", OURS)
def test_the_head_says_evidence_cost_and_needs(name):
    cls, head = methods()[name], " ".join(sections(name)["head"].split())
    assert head.startswith(f"# `{name}`: ")
    assert f"- Evidence: {cls.evidence} (" in head
    assert f"- Cost: {cls().needs.cost_class}. By default it {describe_needs(cls().needs)}." in head


@pytest.mark.parametrize("name", OURS)
def test_every_setting_stands_with_its_default_and_a_source(name):
    method, text = methods()[name](), sections(name)["Defaults"]
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", text, re.MULTILINE)
    wanted = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    assert {key: value for key, value, _ in lines} == {k: "none" if v is None else str(v) for k, v in wanted.items()}
    assert lines or "no settings" in text


def test_the_settings_of_token_masking_stand_with_their_defaults():
    text, stm = sections("stm")["Defaults"], TrainConfig(model="m").stm
    for name in type(stm).model_fields:
        value = getattr(stm, name)
        assert f"| `stm.{name}` | {'none' if value is None else value} |" in text


@pytest.mark.parametrize("name", sorted({*EXAMPLES, *methods(), *MEASURED}))
def test_measured_figures_are_those_of_the_results_and_nothing_else_is_shown(name):
    text = sections(name)[LAST]
    if name not in MEASURED:
        assert text.strip() == "Not measured yet."
        return
    table = [line for line in text.splitlines() if re.match(r"\| [a-z]\S+(, \d seeds)? \| [0-9]", line)]
    assert table == measured_lines(name)


def test_what_the_page_of_ogs_says_of_its_cells_is_what_they_hold():
    """The simulator refused on all ten seeds, no limit kept on four of them."""
    cells = [
        json.loads(path.read_text("utf-8"))["cell"]
        for path in sorted((ROOT / "docs/results/ogs-arithmetic").glob("cells/*.json"))
    ]
    found = [cell["points"][0]["extra"] for cell in cells if cell["arm"] == "ogs"]
    kept = sum(one["policy_feasible"] for one in found)
    assert (len(found), sum(one["simulator_accepted"] for one in found), len(found) - kept) == (10, 0, 4)
    text = " ".join(sections("ogs")[LAST].split())
    assert "refused on all ten seeds" in text
    assert "on four of them no policy kept the limit" in text


def test_what_the_page_of_daar_says_of_its_refusals_is_what_they_hold():
    missing = json.loads((ROOT / "docs/results/family-text-rest/results.json").read_text("utf-8"))["missing"]
    shares = [re.search(r"([0-9.]+) of 40 held-out rows", one["why"]) for one in missing if one["arm"] == "daar"]
    right = sorted(found[1] for found in shares if found)
    assert len(right) == len(shares) == 6
    told = f"On the other six seeds its probe refused: {right[0]} to {right[-1]} of 40 held-out rows labeled right"
    assert told in " ".join(sections("daar")[LAST].split())


def figures() -> dict[str, list[str]]:
    """Figures that the prose of an example gives, from the formulas and not from the method."""
    problem, dual = toy(), choose("ogs_dual")
    norm = problem.grad_norm
    assert norm is not None
    price = dual.certificate.prices["math"]
    least, most = choose("grad_match", atoms_problem((2, 1, 0.5)), 3, batch_size=1, ridge=0.0), 2 + 0.625 + 0.625
    clipped = float((norm * row_scale(norm, "clipped")).max())
    return {
        "loss": [f"is {np.median(LOSS):g}", "0.25", "0.75"],
        "norm": [f"log 2 = {np.log(2):.3f}", f"log 1.5 = {np.log(1.5):.3f}"],
        "target_cosine": [f"has cosine {0.8 / np.hypot(0.6, 0.8):.1f}", f"has {-0.4 / np.hypot(0.3, 0.4):.1f}"],
        "hybrid": [f"{clipped:.3f}"],
        "ogs_dual": [
            f"{clipped:.3f}",
            f"{price:.3f} (9/22)",
            f"{clipped + 0.8 + 0.8:.3f}",
            f"0.8 + {price:.3f} * 0.6 = {0.8 + price * 0.6:.3f}",
            f"{0.6 + 0 - 1.2:.1f} along the anchor",
        ],
        "crossfit": [
            f"{0.53 * 6:.2f} rows",
            f"({np.quantile(problem.anchor_loss, 0.95):.2f})",
            f"a ({HELD_OUT[0]:.1f}) and c ({HELD_OUT[2]:.1f}), not b ({HELD_OUT[1]:.1f})",
        ],
        "grad_match": [f"{w * most / 3:g}" for w in (np.round(least.weights.astype(np.float64), 6))],
    }


@pytest.mark.parametrize("name", figures())
def test_figures_in_the_prose_of_an_example(name):
    text = " ".join(sections(name)["A worked example"].split())
    for figure in figures()[name]:
        assert figure in text
