"""README's table of the text world says what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "docs/results"
NAMES = {
    "random, the total cost of ogs_rounds": "random_total",
    "domain-looking": "domain_looking",
    "domain-looking + 25% replay": "domain_looking+replay25",
    "random + 25% replay": "random+replay25",
}


def section() -> str:
    return (ROOT / "README.md").read_text("utf-8").partition("**The text world**")[2].partition("On SmolLM2-135M")[0]


def found(folder: str):
    return json.loads((RESULTS / folder / "results.json").read_text("utf-8"))


def line(study, arm: str) -> list[str]:
    (own,) = (one for one in study["arms"] if one["name"] == arm)
    gaps = [one["interval"] for one in study["against_random"] if one["arm"] == arm]
    shown = f"{gaps[0]['mean']:+.3f} [{gaps[0]['low']:+.3f}, {gaps[0]['high']:+.3f}]" if gaps else ""
    return [f"{own['mean']:.3f}", shown, f"{own['spent']['relative']:.2f}"]


def test_every_row_of_the_table_is_that_of_its_study():
    rows = [one for one in section().replace("**", "").splitlines() if one.startswith("| ")][1:]
    wide, own = found("text-wide"), found("ogs-text")
    for row in rows:
        name, *rest = [cell.strip() for cell in row.removeprefix("|").removesuffix("|").split("|")]
        arm = NAMES.get(name, name)
        study = own if arm == "ogs" else wide
        assert rest == line(study, arm), name
    assert len(rows) == 16


def test_what_stands_below_the_table():
    text, wide = " ".join(section().split()), found("text-wide")
    claims = {(one["arm"], one["baseline"]): one for one in wide["claims"]}
    for pair in (("ogs_rounds", "random_total"), ("ogs_rounds", "rds"), ("crossfit", "random_total_crossfit")):
        gap = claims[pair]["interval"]
        assert f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" in text, pair
    assert claims["ogs_rounds", "random_total"]["supported"]
    assert not claims["ogs_rounds", "rds"]["supported"]
    (words,) = (one for one in found("family-text")["arms"] if one["name"] == "dsir")
    assert f"(`docs/results/family-text`): {words['mean']:.3f}," in text
