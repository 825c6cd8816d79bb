"""Write the tables of "What compare measured here" on the methods' pages from the committed results.

Which arms of which results stand on which page is in docs/methods/measured.json. A page holds one block per folder of results, between
two comments; what stands outside the blocks is left alone. A test holds the tables to the results.

    python benchmarks/measured.py
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from gradsift.evaluate.statistics import MIN_SEEDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/methods"
LAST = "## What compare measured here"
FIGURES = "difference from plain random paired over the seeds with a 95% t interval, cost in plain training runs:"
TEXT = "is to learn medical text from a pool with wrong, repeated and foreign rows; seeds {seeds}"
LOSSES = "hypervolume of gain and kept general loss in nats per trained token"
DEEP = (
    "On [SmolLM2-135M](../results/README.md) (after a lesson in the general sets, so that there is something to forget; LoRA; learns "
    "from 60 of about 174 DOMAIN rows with wrong, repeated and foreign ones among them; seeds {seeds}, arms fixed beforehand);"
)
INTRODUCTIONS = {
    "text-wide": (
        "In the [text world](../results/README.md) (a small model that has read no medical text "
        f"{TEXT}, no setting was tried there before); {LOSSES}, {FIGURES}"
    ),
    "ogs-text": (
        "In the [text world](../results/README.md) (a small model that has read no medical text "
        f"{TEXT}, no setting of ogs was tried there before); {LOSSES}, {FIGURES}"
    ),
    "family-text": (
        "In the [text world](../results/README.md) (a small model that has read no medical text "
        f"{TEXT}, the method's own defaults, not tried in this world before); {LOSSES}, {FIGURES}"
    ),
    "family-text-rest": (
        "In the [text world](../results/README.md) (a small model that has read no medical text "
        f"{TEXT}, the method's own defaults; the rows have no prompts, no domain labels and no columns of scores); {LOSSES}, {FIGURES}"
    ),
    "deep-medical": f"{DEEP.replace('DOMAIN', 'medical')} {LOSSES}, {FIGURES}",
    "deep-legal": f"{DEEP.replace('DOMAIN', 'legal')} {LOSSES}, {FIGURES}",
    "deep-financial": f"{DEEP.replace('DOMAIN', 'financial')} {LOSSES}, {FIGURES}",
    "deep-family": f"{DEEP.replace('DOMAIN', 'medical')} the family's study, own defaults; {LOSSES}, {FIGURES}",
    "deep-family-rest": f"{DEEP.replace('DOMAIN', 'medical')} the family's study, own defaults; {LOSSES}, {FIGURES}",
    "deep-ogs": f"{DEEP.replace('DOMAIN', 'medical')} {LOSSES}, {FIGURES}",
    "arithmetic-development": (
        "In the [arithmetic world](../results/README.md) (planted truth; seeds {seeds}, on which our own methods were developed, so no "
        f"claim stands on them); hypervolume of general and domain accuracy, {FIGURES}"
    ),
}
"""Folder of results -> what its block says first; blocks of other folders were written by hand."""


def block(folder: str, arms: list[str]) -> str:
    """Write the block of one folder of results."""
    found = json.loads((ROOT / "docs/results" / folder / "results.json").read_text("utf-8"))
    config = declared(folder)
    mean = {arm["name"]: arm for arm in found["arms"]}
    beside = {one["arm"]: one["interval"] for one in found["against_random"]}
    why = {one["arm"]: one["why"] for one in found["missing"]}
    seeds = sorted({seed for arm in found["arms"] for seed in arm["seeds"]})
    lines = ["| arm | hypervolume | minus random | cost |", "|---|---|---|---|"]
    for arm in arms:
        if arm not in mean:
            lines.append(f"| {arm} | {why[arm].splitlines()[0]} | | |")
            continue
        gap = beside.get(arm)
        shown = f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]" if gap else ""
        done = len(mean[arm]["seeds"])
        name = arm if done == len(config["seeds"]) else f"{arm}, {done} seeds"
        lines.append(f"| {name} | {mean[arm]['mean']:.3f} | {shown} | {mean[arm]['spent']['relative']:.2f} |")
    said = INTRODUCTIONS[folder].replace("{seeds}", f"{seeds[0]} to {seeds[-1]}")
    shown_arms = [arm for arm in arms if arm in mean]
    parts = [
        wrapped(said),
        "\n".join(lines),
        wrapped(f"{verdict(found, shown_arms)} {far_below(folder, found, shown_arms)}"),
    ]
    return "\n\n".join(part for part in parts if part)


def declared(folder: str) -> dict[str, Any]:
    """Read what was declared before the first cell."""
    return json.loads((ROOT / "docs/results" / folder / "manifest.json").read_text("utf-8"))["config"]


def verdict(found: dict[str, Any], arms: list[str]) -> str:
    """Say which arms beat, or lost to, random and the best cheap arm, by their intervals."""
    said: dict[tuple[str, str], list[str]] = {}
    few: dict[int, dict[str, None]] = {}
    cheap = f"`{found['best_cheap']}`, the best cheap arm there"
    both = [("random", found["against_random"]), (cheap, found["against_cheap"])]
    for name, pairs in both[: 1 if found["best_cheap"] == "random" else 2]:
        for pair in pairs:
            gap, arm = pair["interval"], pair["arm"]
            if arm not in arms or arm in ("oracle", found["best_cheap"] if name == cheap else "random"):
                continue
            if gap["n"] < MIN_SEEDS:
                few.setdefault(gap["n"], {})[f"`{arm}`"] = None
                continue
            word = "beat" if gap["low"] > 0 else "lost to" if gap["high"] < 0 else ""
            said.setdefault((word, name), []).append(f"`{arm}`")
    sentences = [f"{', '.join(some)}: {n} seeds are too few for a verdict." for n, some in sorted(few.items())]
    for (word, name), some in said.items():
        names = some[0] if len(some) == 1 else f"{', '.join(some[:-1])} and {some[-1]}"
        comma = "," if name == cheap else ""
        sentences.append(
            f"{names} {word} {name}." if word else f"No advantage of {names} over {name}{comma} was measured."
        )
    return " ".join(sentences)


def far_below(folder: str, found: dict[str, Any], arms: list[str]) -> str:
    """Name the arms that are worse than the corner of the area on the mean of their seeds at every learning rate."""
    corner = declared(folder)["reference"]
    named = [
        f"`{arm['name']}` ({arm['points'][0]['x']:+.3f}, {arm['points'][0]['y']:+.3f})"
        for arm in found["arms"]
        if arm["name"] in arms and all(p["x"] < corner[0] or p["y"] < corner[1] for p in arm["points"])
    ]
    if not named:
        return ""
    return f"The area counts a seed that gained nothing as zero, however bad; mean gain and -forgetting of {', '.join(named)}."


def wrapped(text: str) -> str:
    """Break a paragraph into lines of at most 124 characters."""
    return "\n".join(textwrap.wrap(text, 124, break_long_words=False, break_on_hyphens=False))


def main() -> None:
    """Rewrite every page's blocks."""
    for name, folders in json.loads((PAGES / "measured.json").read_text("utf-8")).items():
        page = PAGES / f"{name}.md"
        text = page.read_text("utf-8")
        for folder, arms in folders.items():
            if folder not in INTRODUCTIONS:
                continue
            new = f"<!-- {folder} -->\n{block(folder, arms)}\n<!-- end of {folder} -->\n"
            old = re.compile(rf"<!-- {folder} -->.*?<!-- end (?:of )?{folder} -->\n", re.DOTALL)
            if old.search(text):
                text = old.sub(lambda _, new=new: new, text)
            else:
                head, last = text.split(LAST, 1)
                last = last.replace("Not measured yet.", "").strip()
                text = f"{head}{LAST}\n\n{last + chr(10) * 2 if last else ''}{new}"
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
