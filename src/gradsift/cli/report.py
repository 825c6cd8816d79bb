"""``gradsift report``: draw the page of a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder of gradsift select.")],
    redact: Annotated[bool, typer.Option("--redact", help="Hide the texts of rows.")] = False,
) -> None:
    """Draw report.html of a finished run from its manifest and audit table."""
    from gradsift.report.page import render_report

    print(render_report(run, redact=redact))
