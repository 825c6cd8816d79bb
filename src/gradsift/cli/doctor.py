"""``gradsift doctor``: look before a long run."""

from __future__ import annotations

from typing import Annotated

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


def command(
    pool: Pool = None,
    anchor: Anchor = None,
    target: Target = None,
    navigator: Navigator = None,
    set_: Settings = None,
    format_: FormatName = None,
    loss_on: LossOn = None,
    recipe: RecipeFile = None,
    rows: Annotated[int, typer.Option("--rows", help="Rows to differentiate one by one with the oracle.")] = 4,
) -> None:
    """Try the navigator on real rows: masks, begin tokens, vocabulary, coverage, exactness, batching."""
    from rich.console import Console

    from gradsift.cli.app import safe
    from gradsift.cli.screen import Screen, table
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
    checks = examine(built, Screen(console, "gradsift doctor"), num_rows=rows)
    out = table("Doctor", "check", "verdict", "seen", "do this")
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        out.add_row(
            safe(check.name), f"[{styles[check.verdict]}]{check.verdict}[/]", safe(check.figure), safe(check.advice)
        )
    console.print(out)
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(1)
