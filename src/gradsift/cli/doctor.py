"""``gradsift doctor``: look before a long run."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.cli.select import (
    Anchor,
    FormatName,
    LossOn,
    Navigator,
    Pool,
    RecipeFile,
    Settings,
    Target,
    build,
    labelled,
)

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.pipeline.shares import Ratio


def command(
    pool: Pool = None,
    anchor: Anchor = None,
    target: Target = None,
    navigator: Navigator = None,
    set_: Settings = None,
    format_: FormatName = None,
    loss_on: LossOn = None,
    recipe: RecipeFile = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Rows to differentiate with the oracle [4], or to rank with --layers [64]."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Measure instead what upper layers cost and how well they rank.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="With --layers: write the figures to a file.")
    ] = None,
) -> None:
    """Try the navigator on real rows: masks, begin tokens, vocabulary, coverage, exactness, batching; or --layers."""
    from rich.console import Console
    from rich.text import Text

    from gradsift.cli.screen import Screen, cell, table
    from gradsift.doctor import examine

    flags = [
        ("pool", [labelled(text, "--pool") for text in pool] if pool else None),
        ("anchors", [labelled(text, "--anchor", named=True) for text in anchor] if anchor else None),
        ("target", target),
        ("navigator.model", navigator),
        ("data.format", format_),
        ("data.loss_on", loss_on),
    ]
    defaults = [] if recipe else [("method.name", "random"), ("budget", "1")]
    built = build(recipe, set_ or [], [*defaults, *((key, value) for key, value in flags if value is not None)])
    console = Console()
    if layers:
        show_shares(console, built, rows or 64, json)
        return
    checks = examine(built, Screen(console, "gradsift doctor"), num_rows=rows or 4)
    out = table("Doctor", "check", "verdict", "seen", "do this")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        out.add_row(
            cell(check.name), Text(check.verdict, styles[check.verdict]), cell(check.figure), cell(check.advice)
        )
    console.print(out)
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(1)


def show_shares(console: Console, recipe: Any, num_rows: int, file: Path | None) -> None:
    """Measure shares of the layers, print the table and the advice, and write both where a file is named.

    Args:
        console: where to print.
        recipe: the planned run.
        num_rows: rows to rank.
        file: JSON file to write, or None.
    """
    from gradsift.cli.screen import Screen, table
    from gradsift.manifest import git_sha, versions, write_json_atomic
    from gradsift.pipeline.shares import measure_shares

    found = measure_shares(recipe, Screen(console, "gradsift doctor --layers"), num_rows=num_rows)
    names = list(found.lines[0].ranks)
    heads = ["share", "layers", "parameters", "x plain step", "x whole step", *(f"rank of {name}" for name in names)]
    out = table(f"Upper layers beside all, on {found.num_rows} rows with {found.num_tokens} tokens", *heads)
    for line in found.lines:
        ranks = [f"{r.rho:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in line.ranks.values()] or ["1"] * len(names)
        out.add_row(
            line.share, line.layers, f"{line.coverage:.1%}", _spread(line.cost), _spread(line.cost_whole), *ranks
        )
    console.print(out)
    console.print(found.advice, style="bold", highlight=False, markup=False)
    if file is not None:
        head = {"command": shlex.join(["gradsift", *sys.argv[1:]]), "date": date.today().isoformat(),
                "commit": git_sha(Path(__file__).parent), "versions": versions()}  # fmt: skip
        body = {**asdict(found), "recommended": found.recommended and found.recommended.share, "advice": found.advice}
        write_json_atomic(file, {**head, "parameters": recipe.navigator.parameters, **body})


def _spread(cost: Ratio) -> str:
    return f"{cost.median:.2f} ({cost.low:.2f}..{cost.high:.2f})"
