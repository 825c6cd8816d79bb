"""The page on cost: its figures are those of the results, its command has options that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer.main

from gradsift.cli.app import app

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "cost.md").read_text("utf-8")
RESULTS = ROOT / "docs" / "results"
LINES = {line["share"]: line for line in json.loads((RESULTS / "layers_cost.json").read_text("utf-8"))["lines"]}
NAMES = {
    "all layers and positions": "all",
    "held prompts": "trained",
    "held prompts, folded dots": "screen",
    "`--screen trained`: the same, exact signals predicted by a fit on 100 rows, judged on the other 100": "predicted",
}


def test_the_table_is_that_of_the_results():
    lines = [line for line in PAGE.splitlines() if re.search(r"\d\.\d\d \(", line) and line.startswith("|")]
    seen = []
    for line in lines:
        what, cost, *ranks = [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
        one = LINES[NAMES.get(what, what.strip("`").removeprefix("--layers "))]
        seen.append(one["share"])
        spread = one["cost"]
        assert cost == f"{spread['median']:.2f} ({spread['low']:.2f}..{spread['high']:.2f})"
        if one["share"] == "all":
            assert ranks == ["1"] * 4
            continue
        for text, name in zip(ranks, ("math", "general", "target", "norm"), strict=True):
            rank = one["ranks"][name]
            assert text == f"{rank['rho']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}]"
    assert sorted(seen) == sorted(LINES)


def test_the_sentences_about_it_hold():
    text = " ".join(PAGE.split())
    rhos = {share: [rank["rho"] for rank in line["ranks"].values()] for share, line in LINES.items()}
    cost = {share: line["cost"]["median"] for share, line in LINES.items()}
    assert f"**The screen meets it**: {cost['predicted']:.2f}, and {min(rhos['predicted']):.2f} or better" in text
    assert cost["predicted"] <= 0.5
    assert min(rhos["predicted"]) >= 0.9
    cosines = [rank["rho"] for name, rank in LINES["50%"]["ranks"].items() if name != "norm"]
    assert f"at {cost['50%']:.2f} they reach {min(cosines):.2f} to {max(cosines):.2f}" in text
    assert f"at {cost['75%']:.2f}. The reason" in text
    assert min(rhos["75%"]) >= 0.9 > min(rhos["50%"])
    share = json.loads((RESULTS / "layers.json").read_text("utf-8"))["share_of_squared_norm"]
    assert f"{sum(share['layers'][:15]):.0%} of its squared norm lies in the lower 15 of 30 layers" in text
    assert f"{share['last norm and head']:.0%} in the head" in text
    speed = json.loads((RESULTS / "speed.json").read_text("utf-8"))["models"]
    (model,) = (one for one in speed if one["model"] == "SmolLM2-135M")
    (plain,) = (line for line in model["lines"] if line["key"] == "plain-products")
    assert f"took {plain['median']:.2f} of the plain one" in text


ARMS = {
    "gradsift, every weight": "gradsift-all",
    "gradsift, body": "gradsift-body",
    "gradsift, LoRA r=16": "gradsift-lora",
    "gradsift, body, sketch alone": "gradsift-sketch",
    "bergson 2.5.1, two runs": "bergson-sum",
    "dattri-llm 0.1.0": "dattri-exact",
    "LESS's loop, a row at a time": "less",
    "forward and input gradients by PyTorch, nothing measured": "floor",
}


def spread(values):
    return f"{min(values):.2f} to {max(values):.2f}"


def test_the_speed_table_of_the_readme_is_that_of_the_results():
    text = (ROOT / "README.md").read_text("utf-8")
    *four, real = json.loads((RESULTS / "speed.json").read_text("utf-8"))["models"]
    by_key = [{line["key"]: line for line in model["lines"]} for model in (*four, real)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    seen = {row[0]: row[-2:] for row in rows if row[0] in ARMS}
    assert seen.keys() == ARMS.keys()
    for what, cells in seen.items():
        *medians, last = (lines[ARMS[what]]["median"] for lines in by_key)
        assert cells == [spread(medians), f"{last:.2f}"]
    flat = " ".join(text.split())
    for words, key in {"body costs {} of a step ({} on SmolLM2)": "body", "every weight {} ({})": "all",
                       "alone {} ({})": "sketch", "LoRA {} ({})": "lora"}.items():  # fmt: skip
        *same, last = (lines[f"gradsift-{key}"]["same_products_median"] for lines in by_key)
        assert words.format(spread(same), f"{last:.2f}") in flat
    assert f"takes {spread([lines['plain-products']['median'] for lines in by_key])} of PyTorch's own" in flat


def test_every_option_of_the_command_exists():
    commands = typer.main.get_command(app).commands
    known = {name for command in ("select", "doctor") for p in commands[command].params for name in p.opts}
    blocks = " ".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S))
    given = set(re.findall(r"--[a-z]+", blocks))
    assert {"--screen", "--pool"} <= given <= known
