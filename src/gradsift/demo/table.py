"""The demo's last word: what was kept, what was not, and why."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

SHOWN = 4


def kept_and_why(run: Path) -> Table:
    """Make a table of a few kept and dropped rows with their reasons.

    Args:
        run: a finished run folder.

    Returns:
        A table for the terminal.
    """
    rows = json.loads((run / "selection" / "examples.json").read_text("utf-8"))
    table = Table(title="What was kept, and why", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("", "question", "cosines", "reason"):
        table.add_column(heading, overflow="fold", max_width=60)
    for selected, word, style in ((True, "kept", "green"), (False, "dropped", "red")):
        for row in [r for r in rows if r["selected"] is selected][:SHOWN]:
            text = "".join(part for part, _ in row["segments"])
            question = text.split("<|im_start|>user\n")[-1].split("<|im_end|>")[0].split("\n")[0]
            cos = "\n".join(f"{name} {value:+.3f}" for name, value in row["cos"].items())
            table.add_row(Text(word, style=style), Text(question[:110]), Text(cos), Text(row["reason"]))
    return table
