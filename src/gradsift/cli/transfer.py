"""``gradsift transfer``: does what the navigator measured hold on the model that will be trained?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.pipeline.transfer import Audited

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder of gradsift select.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="auto|HUB_ID|DIR|FILE.gguf", help="The model that will be trained."),
]
Rows = Annotated[int, typer.Option("--rows", metavar="N", help="Rows that are measured again, drawn by id.")]
LoraRank = Annotated[
    int | None, typer.Option("--lora-rank", metavar="N", help="Rank of the adapter on this model. [default: the run's]")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A field of the recipe for this model, such as navigator.dtype. Repeatable."
    ),
]


def command(run: Run, model: Model = None, rows: Rows = 256, lora_rank: LoraRank = None, set_: Settings = None) -> None:
    """Measure some rows of a run on the target model and compare ranks, signs and the top with the navigator's.

    Example: gradsift transfer run --model org/larger-model --rows 256
    """
    if model is None:
        raise ConfigError("--model is missing", where="gradsift transfer", expected="the model that will be trained",
                          do="--model org/name")  # fmt: skip
    from rich.console import Console

    from gradsift.cli.screen import Screen
    from gradsift.pipeline.transfer import TransferConfig, audit_transfer
    from gradsift.recipe import parse_override

    class Renamed(Screen):
        """The screen of ``select``, whose stages here concern the target model."""

        def start(self, stage: str, total_tokens: int) -> None:
            super().start(
                {"load": "loading the model", "collect": "measuring the rows"}.get(stage, stage), total_tokens
            )

        def finish(self, stage: str) -> None:
            super().finish({"load": "loading the model", "collect": "measuring the rows"}.get(stage, stage))

    settings = [
        *map(parse_override, set_ or ()),
        *([("navigator.lora.rank", lora_rank)] if lora_rank is not None else []),
    ]
    console = Console(stderr=False)
    words = shlex.join(["gradsift", *sys.argv[1:]])
    screen = Renamed(console, words)
    with screen.watching_signals():
        done = audit_transfer(run, TransferConfig(model, rows, tuple(settings)), command=words, progress=screen)
    show(console, done)


def show(console: Console, done: Audited) -> None:
    """Print the figures, what they mean, what to beware of and where the file is.

    Args:
        console: where to print.
        done: the audit.
    """
    from gradsift.cli.app import safe
    from gradsift.cli.screen import cell, table

    headings = ("with", "Spearman", "same sign", f"top {done.report['rows']['k']} shared", "by chance")
    out = table("The navigator's cosines on the target model", *headings, right=headings[1:])
    for entry in done.report["anchors"]:
        shares = [figure(entry[name], "{:.0%}") for name in ("signs", "overlap")]
        out.add_row(cell(entry["name"]), figure(entry["spearman"], "{:+.2f}"), *shares, f"{entry['by_chance']:.0%}")
    console.print(out)
    for entry in done.found:
        style = "bold yellow" if entry.warns else "bold"
        console.print(
            safe(("warning: " if entry.warns else "") + entry.sentence), style=style, markup=False, highlight=False
        )
    for note in done.report["notes"]:
        console.print(safe(f"note: {note}"), style="yellow", markup=False, highlight=False)
    rows, cost = done.report["rows"], done.report["cost"]["total"]
    console.print(
        f"compared {rows['compared']} rows, {cost['tokens']} tokens measured in {cost['seconds']:.1f} s",
        markup=False,
        highlight=False,
    )
    console.print(f"  {done.path}", markup=False, highlight=False, soft_wrap=True)


def figure(value: dict[str, Any], form: str) -> str:
    """Write a figure with its interval.

    Args:
        value: ``value``, ``low`` and ``high``; None where there is none.
        form: of one number.

    Returns:
        Such as ``+0.81 [+0.75, +0.86]``.
    """
    if value["value"] is None:
        return "-"
    text = form.format(value["value"])
    return text if value["low"] is None else f"{text} [{form.format(value['low'])}, {form.format(value['high'])}]"
