"""``gradsift evaluate``: gain and forgetting of a fine-tuned model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.cli.select import FormatName, LossOn, labelled
from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.evaluate.run import Evaluation

Model = Annotated[
    str | None,
    typer.Option("--model", metavar="auto|HUB_ID|DIR|FILE.gguf", help="The model before fine-tuning. [default: auto]"),
]
Tuned = Annotated[
    str | None,
    typer.Option("--tuned", metavar="DIR", help="Folder of the adapter or the model after it. Without: before only."),
]
Domain = Annotated[
    list[str] | None,
    typer.Option("--domain", metavar="NAME=PATH", help="Held-out rows of what had to be learned. Repeatable."),
]
General = Annotated[
    list[str] | None,
    typer.Option("--general", metavar="NAME=PATH", help="Held-out rows of what had to be kept. Repeatable."),
]
Choice = Annotated[
    list[str] | None,
    typer.Option(
        "--choice",
        metavar="[domain:]NAME=PATH",
        help="Multiple-choice questions (question, choices, answer); general unless marked domain:. Repeatable.",
    ),
]
LmEval = Annotated[
    list[str] | None,
    typer.Option("--lm-eval", metavar="[domain:]TASK", help="Task of lm-eval from --lm-eval-dir. Repeatable."),
]
LmEvalDir = Annotated[
    str | None, typer.Option("--lm-eval-dir", metavar="DIR", help="Folder of lm-eval task files (YAML).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting, such as data.max_length=512. Repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for the figures.")]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Seed of the run that is measured; stands beside every figure.")
]


def command(
    model: Model = None,
    tuned: Tuned = None,
    domain: Domain = None,
    general: General = None,
    choice: Choice = None,
    lm_eval: LmEval = None,
    lm_eval_dir: LmEvalDir = None,
    set_: Settings = None,
    out: Out = None,
    seed: Seed = None,
    format_: FormatName = None,
    loss_on: LossOn = None,
) -> None:
    """Measure what fine-tuning taught and what it cost: loss, accuracy, KL, forgetting per question.

    Example: gradsift evaluate --model auto --tuned train --domain exam=exam.jsonl --general chat=chat.jsonl --out eval
    """
    from rich.console import Console

    from gradsift.cli.screen import Screen
    from gradsift.evaluate.config import EvaluateConfig
    from gradsift.recipe import build_section, parse_override

    flags: list[tuple[str, Any]] = [
        ("model", model),
        ("tuned", tuned),
        ("domain", [_named(text, "--domain") for text in domain or ()]),
        ("general", [_named(text, "--general") for text in general or ()]),
        ("choice", [{**_named(rest, "--choice"), "role": role} for role, rest in map(_role, choice or ())]),
        ("lm_eval.tasks", [{"name": rest, "role": role} for role, rest in map(_role, lm_eval or ())]),
        ("lm_eval.folder", lm_eval_dir),
        ("seed", seed),
        ("data.format", format_),
        ("data.loss_on", loss_on),
    ]
    given = [*map(parse_override, set_ or ()), *((key, value) for key, value in flags if value not in (None, []))]
    config = build_section(EvaluateConfig, _nested(given), "the command")
    if out is None:
        raise ConfigError("--out is missing", where="gradsift evaluate", expected="a folder", do="--out eval")
    from gradsift.evaluate.run import evaluate

    console = Console()
    words = shlex.join(["gradsift", *sys.argv[1:]])
    screen = Screen(console, words)
    with screen.watching_signals():
        done = evaluate(config, out, command=words, progress=screen)
    show(console, done)


def _named(text: str, flag: str) -> dict[str, str]:
    label, sep, path = text.partition("=")
    if not sep or not label or not path or "/" in label:
        raise ConfigError(
            "a set needs a name", where=flag, got=text, expected="NAME=PATH", do=f"{flag} exam={path or text}"
        )
    return labelled(text, flag, named=True)


def _role(text: str) -> tuple[str, str]:
    for role in ("domain", "general"):
        if text.startswith(f"{role}:"):
            return role, text.removeprefix(f"{role}:")
    return "general", text


def _nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings, later ones winning."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError("this field has no parts", where=f"--set {key}", got=part, do="correct the name")
        node[last] = value
    return values


def show(console: Console, done: Evaluation) -> None:
    """Print figures, what changed, what to beware of, and where the files are.

    Args:
        console: where to print.
        done: the stage's outcome.
    """
    from gradsift.cli.app import safe
    from gradsift.cli.screen import cell, table

    if done.skipped:
        console.print("the folder holds these figures already; nothing was measured again", style="dim")
    out = table("Figures", "role", "set", "metric", "n", "before", "after", "gain", "forgetting",
                right=("n", "before", "after", "gain", "forgetting"))  # fmt: skip
    for cells in lines(done):
        out.add_row(*map(cell, cells))
    console.print(out)
    for entry in done.manifest["transitions"]:
        console.print(safe(transition_line(entry)), markup=False, highlight=False)
    for note in done.manifest["notes"]:
        console.print(safe(f"note: {note['text']}"), style="yellow", markup=False, highlight=False)
    for name in ("eval.parquet", "items.parquet", "manifest.json"):
        console.print(f"  {done.out / name}", markup=False, highlight=False, soft_wrap=True)


def lines(done: Evaluation) -> list[tuple[str, ...]]:
    """Lay the figures out, one line per task, source and metric.

    Args:
        done: the stage's outcome.

    Returns:
        Texts of role, set, metric, n, before, after, gain, forgetting.
    """
    table = done.table
    changes = {} if not table.phase("after") else {
        (c.role, c.task, c.source, c.metric, c.seed): c.value for c in (*table.gain(), *table.forgetting())
    }  # fmt: skip
    cells: dict[Any, dict[str, Any]] = {}
    for row in table.rows:
        cells.setdefault(row.key, {})[row.phase] = row
    result = []
    for key, phases in cells.items():
        role, task, source, metric, _ = key
        name = task if source == task else f"{task}/{source}"
        texts = [f"{phases[p].value:.4f}" if p in phases else "" for p in ("before", "after")]
        moved = f"{changes[key]:+.4f}" if key in changes else ""
        gain, loss = (moved, "") if role == "domain" else ("", moved)
        count = str(next(iter(phases.values())).n)
        result.append((role, name, metric, count, *texts, gain, loss))
    return result


def transition_line(entry: Mapping[str, Any]) -> str:
    """Say what became of the questions of one source.

    Args:
        entry: of the manifest's ``transitions``.

    Returns:
        One line.
    """
    name = entry["task"] if entry["source"] == entry["task"] else f"{entry['task']}/{entry['source']}"
    return (
        f"{name}: right before and wrong after {entry['forgotten']:.1%}, wrong before and right after "
        f"{entry['learned']:.1%}; without guessing {entry['forgotten_adjusted']:+.1%} and {entry['learned_adjusted']:+.1%} "
        f"({entry['n']} questions)"
    )
