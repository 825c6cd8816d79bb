"""``gradsift policy``: what a run of the method ``ogs`` learned, and how its policies did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.report.policy_fields import Details
    from gradsift.report.policy_view import Grid

app = typer.Typer(help="Look at the policy of a run of the method ogs.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keep ``show`` a word of its own: typer drops the name of an only command."""


@app.command("show")
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder of gradsift select --method ogs.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print selection/details.json instead.")] = False,
) -> None:
    """Show which policy was returned, whether it keeps the limits, how the others did and what finding it took."""
    from gradsift.report.run import read_policy

    manifest, details = read_policy(run)
    if as_json:
        print((run / "selection" / "details.json").read_text("utf-8"), end="")
        return
    from rich.console import Console

    draw(Console(stderr=False), manifest, details)


def draw(console: Console, manifest: dict[str, Any], details: Details) -> None:
    """Print sentences and tables.

    Args:
        console: where to print.
        manifest: of the run, as it was written.
        details: of the run.
    """
    from gradsift.cli.app import safe
    from gradsift.report import policy_view as view
    from gradsift.report import policy_words as words

    on = manifest["selection"].get("config", {}).get("on", "simulator")
    console.print(safe(words.headline(details)), style="bold", markup=False, highlight=False)
    put(console, view.limits_grid(details), *view.contest_grids(details))
    say(console, words.simulator_words(details), words.training_words(details, on))
    if details.training is not None:
        put(console, *view.training_grids(details.training, details))
    put(console, view.mix_grid(details))
    say(console, words.mix_words(details))
    put(console, *view.clusters_grids(details), bill_grid(manifest))
    say(console, *(f"note: {note}" for note in words.other_notes(details)), style="yellow")


def bill_grid(manifest: dict[str, Any]) -> Grid:
    """Lay out what choosing took; what fine-tuning takes is not known to a run of ``select``.

    Args:
        manifest: of the run.

    Returns:
        Seconds, tokens and operations of every part, and their sum.
    """
    from gradsift.report.overhead import HEADINGS, overhead, overhead_rows
    from gradsift.report.policy_view import Grid

    lines = overhead_rows(overhead(manifest, {}))[:-1]
    headings = HEADINGS[:4]
    return Grid("What choosing took", headings, tuple(line[:4] for line in lines), frozenset(headings[1:]))


def put(console: Console, *grids: Grid) -> None:
    """Print tables, each after an empty line.

    Args:
        console: where to print.
        *grids: the tables; what they hold is text, not markup, and control characters are escaped.
    """
    from gradsift.cli.screen import cell, table

    for grid in grids:
        out = table(grid.title, *grid.headings, right=tuple(grid.right))
        for line in grid.lines:
            out.add_row(*map(cell, line))
        console.print()
        console.print(out)


def say(console: Console, *texts: str, style: str | None = None) -> None:
    """Print sentences after an empty line.

    Args:
        console: where to print.
        *texts: the sentences, one per paragraph; control characters are escaped.
        style: of rich.
    """
    from gradsift.cli.app import safe

    console.print()
    for text in texts:
        console.print(safe(text), style=style, markup=False, highlight=False)
