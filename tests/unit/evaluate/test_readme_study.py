"""README's table of the study on SmolLM2 says what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NAMES = {
    "domain-looking + 25% replay": "domain_looking+replay25",
    "ogs_dual + 25% replay": "ogs_dual+replay25",
    "random at the total cost of ogs_rounds": "random_total",
}


def shown() -> dict[str, list[str]]:
    """Rows of the table that follows the folder's name."""
    text = (ROOT / "README.md").read_text("utf-8").partition("`docs/results/deep-medical`")[2].partition("\n\n- ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {NAMES.get(name, name): rest for name, *rest in rows if name != "arm"}


def test_the_table_of_the_study_is_that_of_its_results():
    found = json.loads((ROOT / "docs/results/deep-medical/results.json").read_text("utf-8"))
    beside = {one["arm"]: one["interval"] for one in found["against_random"]}
    want = {}
    for arm in found["arms"]:
        gap = beside.get(arm["name"])
        words = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else ""
        want[arm["name"]] = [f"{arm['mean']:.3f}", words, f"{arm['spent']['relative']:.2f}"]
    assert shown() == want


def test_every_claim_is_worded_as_the_rule_words_it():
    text = (ROOT / "docs/results/deep-medical/results.md").read_text("utf-8")
    assert len(re.findall(r"^- no advantage over \w+ was measured", text, re.M)) == 4
    assert "**No advantage over random or `rds` was measured**" in (ROOT / "README.md").read_text("utf-8")
