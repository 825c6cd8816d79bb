"""The list of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from gradsift.cli import compare, demo, doctor, evaluate, inspect, methods, policy, report, select, train, transfer
from gradsift.errors import GradsiftError

app = typer.Typer(
    name="gradsift",
    help="Pick the fine-tuning examples that teach a language model a domain without making it forget, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("select")(select.command)
app.command("train")(train.command)
app.command("transfer")(transfer.command)
app.command("evaluate")(evaluate.command)
app.command("compare")(compare.command)
app.command("doctor")(doctor.command)
app.command("inspect")(inspect.command)
app.command("methods")(methods.command)
app.command("report")(report.command)
app.add_typer(policy.app, name="policy")
app.command("demo")(demo.command)


def _version(value: bool) -> None:
    if value:
        from gradsift import __version__

        print(f"gradsift {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run one command line.

    Args:
        arguments: the words after ``gradsift``.

    Returns:
        The exit code.
    """
    log = logging.getLogger("gradsift")
    if not log.handlers:  # such as the one-time conversion of a GGUF file, which takes a while
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    try:
        app(args=arguments)
    except GradsiftError as error:
        print(f"gradsift: {safe(error.render())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("gradsift: stopped; what was committed is kept, the same command resumes", file=sys.stderr)
        return 130
    except SystemExit as done:  # typer has printed help, a usage error or nothing
        return done.code if isinstance(done.code, int) else 0
    return 0


def safe(text: str) -> str:
    """Escape control characters, so that text out of a data file cannot drive a terminal.

    Args:
        text: any text.

    Returns:
        The text with control and bidirectional characters written as escapes; line breaks stay.
    """
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
