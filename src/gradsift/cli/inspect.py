"""``gradsift inspect``: see one row as the trainer sees it."""

from __future__ import annotations

from typing import Annotated

import typer

from gradsift.errors import ConfigError


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A data file or hub id.")],
    row: Annotated[int, typer.Option("--row", help="0-based row of the file.")] = 0,
    navigator: Annotated[str, typer.Option("--navigator", metavar="auto|HUB_ID|DIR|FILE.gguf")] = "auto",
    format_: Annotated[str, typer.Option("--format", metavar="auto|messages|...")] = "auto",
    loss_on: Annotated[str | None, typer.Option("--loss-on", metavar="assistant|completion|all")] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens kept from the start.")] = 1024,
    tokens: Annotated[bool, typer.Option("--tokens", help="List every token.")] = False,
) -> None:
    """Show one row: its status, the text that is fed, and which tokens carry loss."""
    from rich.console import Console
    from rich.text import Text

    from gradsift.cli.app import safe
    from gradsift.cli.screen import cell, table
    from gradsift.data.pool import read_pool
    from gradsift.data.show import segments, token_table
    from gradsift.data.tokenize import mask_rule, tokenize_rows
    from gradsift.models.load import load_tokenizer
    from gradsift.models.resolve import resolve_navigator
    from gradsift.recipe import DataConfig, SourceConfig, build_section
    from gradsift.types import Shape

    console = Console()
    data = build_section(
        DataConfig, {"format": format_, "loss_on": loss_on, "max_length": max_length}, "gradsift inspect"
    )
    source = build_section(SourceConfig, {"label": "pool", "path": path}, "the file of rows")
    pool = read_pool([source], fmt=data.format)
    if not 0 <= row < len(pool.rows):
        raise ConfigError("there is no such row", where="--row", got=row, expected=f"0 to {len(pool.rows) - 1}")
    chosen = pool.rows[row]
    tokenizer = load_tokenizer(resolve_navigator(navigator))
    shapes: set[Shape] = {chosen.example.shape} if chosen.example else set()
    rule = mask_rule(tokenizer, data.loss_on, shapes)
    seen = tokenize_rows([chosen], tokenizer, rule, max_length=data.max_length)[0]
    console.print(f"row {row} of {safe(path)}, id {safe(chosen.id)}", markup=False, highlight=False)
    console.print(f"status {seen.status.value}" + (f": {safe(seen.reason)}" if seen.reason else ""), markup=False)
    if chosen.example:
        console.print(f"read as {chosen.example.shape}; {seen.num_tokens} tokens, {seen.num_trained} carry loss")
    shown = Text()
    for part in segments(seen, tokenizer):
        shown.append(safe(part.text), style="bold green" if part.trained else "dim")
    console.print(shown)
    if seen.num_tokens:
        console.print("green carries loss, dim is context", style="dim")
    if tokens:
        out = table("Tokens", "position", "id", "text", "loss", right=("position", "id"))
        for token in token_table(seen, tokenizer):
            out.add_row(str(token.position), str(token.id), cell(repr(token.text)), "yes" if token.trained else "")
        console.print(out)
