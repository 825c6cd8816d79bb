"""The page on cost: its figures are those of the results, its command has options that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import typer.main

from gradsift.cli.app import app

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "cost.md").read_text("utf-8")
FOUND = json.loads((ROOT / "docs" / "results" / "layers.json").read_text("utf-8"))
NAMES = {"held prompts": "trained", "upper 4 of 30 layers": "upper 4", "every fourth layer": "every 4th"}


def test_the_table_is_that_of_the_results():
    lines = [line for line in PAGE.splitlines() if re.search(r"\d\.\d\d \[", line) and line.startswith("|")]
    assert len(lines) == 7
    by_name = {one["layers"]: one for one in FOUND["choices"]}
    for line in lines:
        what, cost, *ranks = [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
        one = by_name[NAMES.get(what, what)]
        assert cost == f"{one['arithmetic_cost']:.2f}"
        for text, name in zip(ranks, ("math", "general", "target", "norm"), strict=True):
            rank = one["ranks"][name]
            assert text == f"{rank['rho']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}]"


def test_the_predictions_and_shares_are_those_of_the_results():
    by_name = {one["from"]: one["mean_rho"] for one in FOUND["predictions"]}
    text = " ".join(PAGE.split())
    for name in ("trained", "trained, groups of layers apart"):
        a, b, c, d = (f"{by_name[name][what]:.2f}" for what in ("math", "general", "target", "norm"))
        assert f"{a}, {b}, {c} and {d}" in text
    share = FOUND["share_of_squared_norm"]
    lower, upper = sum(share["layers"][:15]), sum(share["layers"][-8:])
    assert f"{lower:.0%} of its squared norm lies in the lower 15 layers, {upper:.0%} in the upper 8" in text


def test_the_measured_costs_are_those_of_the_results():
    lines = json.loads((ROOT / "docs" / "results" / "layers_cost.json").read_text("utf-8"))["lines"]
    assert len(lines) == 6
    for one in lines:
        cost = one["cost"]
        assert f"| {cost['median']:.2f} ({cost['low']:.2f}..{cost['high']:.2f}) |" in PAGE


def test_every_option_of_the_command_exists():
    commands = typer.main.get_command(app).commands
    known = {name for command in ("select", "doctor") for p in commands[command].params for name in p.opts}
    blocks = " ".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S))
    given = set(re.findall(r"--[a-z]+", blocks))
    assert {"--screen", "--pool"} <= given <= known
