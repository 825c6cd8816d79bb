"""``gradsift select``: choose rows under a budget."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from rich.console import Console

    from gradsift.launch.seat import Seat
    from gradsift.pipeline import Outcome

MAX_LABEL = 64

Pool = Annotated[
    list[str] | None,
    typer.Option(
        "--pool",
        metavar="[LABEL=]PATH",
        help="Candidate rows: JSONL, JSON, CSV, Parquet, Arrow or a hub id. Repeatable; the label defaults to the file's stem.",
    ),
]
Anchor = Annotated[
    list[str] | None,
    typer.Option("--anchor", metavar="NAME=PATH", help="Rows that stand for what must be kept. Repeatable."),
]
General = Annotated[
    list[str] | None,
    typer.Option(
        "--general",
        metavar="[LABEL=]PATH",
        help="General rows that may be chosen as replay, within the budget (method ogs). Repeatable.",
    ),
]
Target = Annotated[
    str | None, typer.Option("--target", metavar="PATH", help="A few rows like those the model must get better at.")
]
Navigator = Annotated[
    str | None,
    typer.Option(
        "--navigator",
        metavar="auto|HUB_ID|DIR|FILE.gguf",
        help="The small model that measures. auto: the packaged SmolLM2-135M-Instruct.",
    ),
]
MethodName = Annotated[
    str | None, typer.Option("--method", metavar="NAME", help="The rule; gradsift methods lists them.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the method (band=middle) or of the recipe (navigator.parameters=all). Repeatable.",
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", metavar="10%|500|20000tok", help="Share of the usable rows, rows, or trained tokens."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run folder. The same command resumes a stopped run.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every random stream. [default: 42]")]
FormatName = Annotated[
    str | None,
    typer.Option("--format", metavar="auto|messages|prompt_completion|text|alpaca|sharegpt", help="Shape of the rows."),
]
LossOn = Annotated[
    str | None,
    typer.Option(
        "--loss-on", metavar="assistant|completion|all", help="Tokens that carry loss, as your trainer will have it."
    ),
]
Dedup = Annotated[
    str | None, typer.Option("--dedup", metavar="drop|keep", help="What happens to exact copies. [default: drop]")
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="25%|8",
        help="Measure the upper decoder layers only, a share or a count: cheaper, and less exact (gradsift doctor --layers).",
    ),
]
TwoStage = Annotated[
    str | None,
    typer.Option(
        "--screen",
        metavar="trained|25%|8",
        help="Measure all rows cheaply, with prompts held constant or by upper layers, and exactly only those that may be "
        "chosen; what was lost is bounded.",
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="YAML recipe; --set and flags win over it.")
]
Launcher = Annotated[
    str,
    typer.Option(
        "--launcher",
        metavar="auto|inline|torchrun|slurm-array|ray",
        help="Who measures the pool. auto: one rank of torchrun, accelerate or srun where their variables are set, else "
        "this process alone.",
    ),
]
Workers = Annotated[int | None, typer.Option("--workers", metavar="N", help="Ray actors, with --launcher ray.")]
Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", help="How long a rank other than 0 waits for rank 0 to begin.")
]
Fsdp = Annotated[
    bool,
    typer.Option(
        "--fsdp",
        help="Deal the navigator's weights over the ranks of torchrun, for one that does not fit a device.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print rows, tokens, memory, disk and time, and stop.")]


def command(
    pool: Pool = None,
    general: General = None,
    anchor: Anchor = None,
    target: Target = None,
    navigator: Navigator = None,
    method: MethodName = None,
    set_: Settings = None,
    budget: BudgetText = None,
    out: Out = None,
    seed: Seed = None,
    format_: FormatName = None,
    loss_on: LossOn = None,
    dedup: Dedup = None,
    layers: Layers = None,
    screen: TwoStage = None,
    recipe: RecipeFile = None,
    launcher: Launcher = "auto",
    workers: Workers = None,
    wait: Wait = 300.0,
    fsdp: Fsdp = False,
    dry_run: DryRun = False,
) -> None:
    """Choose the rows of a pool that teach the target and spare the anchors.

    Example: gradsift select --pool medical.jsonl --anchor math=math.jsonl --target exam.jsonl --method ogs_dual
    --budget 10% --out run
    """
    flags: list[tuple[str, Any]] = [
        ("pool", [labelled(text, "--pool") for text in pool] if pool else None),
        ("general", [labelled(text, "--general") for text in general] if general else None),
        ("anchors", [labelled(text, "--anchor", named=True) for text in anchor] if anchor else None),
        ("target", target),
        ("navigator.model", navigator),
        ("method.name", method),
        ("budget", budget),
        ("seed", seed),
        ("data.format", format_),
        ("data.loss_on", loss_on),
        ("data.dedup", dedup),
        ("collect.layers", layers),
        ("screen.by", screen),
    ]
    from gradsift.launch.seat import find_seat

    built = build(recipe, set_ or [], [(key, value) for key, value in flags if value is not None])
    seat = find_seat(launcher, workers, os.environ, join_seconds=wait, fsdp=fsdp)
    run(built, out, dry_run=dry_run, seat=seat)


def labelled(text: str, flag: str, *, named: bool = False) -> dict[str, str]:
    """Split ``LABEL=PATH``; without a label a pool takes the file's stem.

    Args:
        text: the flag's value.
        flag: its name, for the message.
        named: the label is required.

    Returns:
        ``label`` and ``path``.

    Raises:
        ConfigError: an anchor has no name, or a URL holds a secret.
    """
    from gradsift.recipe import refuse_secrets

    refuse_secrets(text)
    label, sep, path = text.partition("=")
    if sep and label and "/" not in label:
        return {"label": label, "path": path}
    if named:
        raise ConfigError(
            "an anchor needs a name", where=flag, got=text, expected="NAME=PATH", do=f"{flag} math={text}"
        )
    return {"label": label_of(text), "path": text}


def label_of(path: str) -> str:
    """Name a pool after its file.

    Args:
        path: path, URL or hub id.

    Returns:
        The file's stem in ASCII, at most 64 characters: a longer one ends in a hash of its own.
    """
    if "://" in path:
        host, slash, rest = re.split("[?#]", path.partition("://")[2])[0].partition("/")
        path = rest if slash else host
    stem = Path(path.split(":")[0]).name.split(".")[0]
    letters = (c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c))
    clean = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in letters).lstrip("_-")
    if len(clean) > MAX_LABEL:
        clean = f"{clean[: MAX_LABEL - 9]}-{hashlib.sha256(stem.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return clean or "pool"


def build(recipe: Path | None, settings: list[str], flags: list[tuple[str, Any]]) -> Any:
    """Combine recipe file, ``--set`` and flags; later wins.

    Args:
        recipe: YAML file or None.
        settings: ``KEY=VALUE`` texts.
        flags: dotted keys and values.

    Returns:
        The recipe.

    Raises:
        ConfigError: something required is missing.
    """
    from gradsift.recipe import apply_overrides, build_recipe, load_recipe, parse_override

    values = load_recipe(recipe) if recipe else {}
    values = apply_overrides(values, [parse_override(text) for text in settings])
    values = apply_overrides(values, flags)
    method = values.get("method")
    missing = [flag for flag, gone in (("--pool", not values.get("pool")), ("--budget", not values.get("budget")),
                                       ("--method", not (isinstance(method, dict) and method.get("name")))) if gone]  # fmt: skip
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            where="gradsift select",
            expected="--pool PATH --method NAME --budget 10% --out DIR",
            do="add it, or give a --recipe that has it",
        )
    return build_recipe(values)


def run(recipe: Any, out: Path | None, *, dry_run: bool = False, seat: Seat | None = None) -> Outcome | None:
    """Run a recipe with progress on the terminal and print what came out.

    Args:
        recipe: the recipe.
        out: the run folder.
        dry_run: print the estimate and stop.
        seat: this process, where several measure together.

    Returns:
        The outcome, or None for a dry run and for a process that only measures.

    Raises:
        ConfigError: no run folder was named.
    """
    from rich.console import Console

    from gradsift.cli.screen import Screen

    console = Console(stderr=False)
    words = ["gradsift", *sys.argv[1:]]
    screen = Screen(console, shlex.join(words))
    with screen.watching_signals():
        if dry_run and (seat is None or seat.commits):
            from gradsift.pipeline.estimate import estimate

            show_estimate(console, estimate(recipe, screen))
            return None
        if out is None:
            raise ConfigError(
                "--out is missing", where="gradsift select", expected="a folder for the run", do="--out run"
            )
        if seat is not None and not seat.commits:
            if not dry_run:
                work(recipe, out, seat, console)
            return None
        from gradsift.pipeline import select

        outcome = select(recipe, out, command=shlex.join(words), progress=screen, seat=seat)
        page = draw_report(console, out)
    show(console, outcome, page)
    return outcome


def work(recipe: Any, out: Path, seat: Seat, console: Console) -> None:
    """Measure for the process that commits, without a word until the end.

    Args:
        recipe: the recipe.
        out: the run folder.
        seat: this process.
        console: where to print.
    """
    from rich.console import Console

    from gradsift.cli.screen import Screen
    from gradsift.pipeline.serve import serve

    screen = Screen(Console(quiet=True), shlex.join(["gradsift", *sys.argv[1:]]))
    with screen.watching_signals():
        done = serve(recipe, out, seat, progress=screen)
    text = f"rank {done.rank} of {seat.world}: measured {done.num_units} units, {done.num_rows} rows"
    console.print(text, highlight=False)


def draw_report(console: Console, out: Path) -> Path | None:
    """Draw the page, or say which extra is missing.

    Args:
        console: where to print.
        out: the run folder.

    Returns:
        The page, or None.
    """
    from gradsift.report.page import render_report

    try:
        return render_report(out)
    except DependencyError as error:
        console.print(f"no report was drawn: {error.what} ({error.do})", markup=False)
        return None


def show_estimate(console: Console, plan: Any) -> None:
    """Print a dry run.

    Args:
        console: where to print.
        plan: from ``pipeline.estimate``.
    """
    from gradsift.cli.screen import cell, table

    out = table("What this run would take", "part", "estimate")
    for name, value in plan.lines():
        out.add_row(name, cell(value))
    console.print(out)


def show(console: Console, outcome: Outcome, page: Path | None) -> None:
    """Print what was kept, what to beware of and where the files are.

    Args:
        console: where to print.
        outcome: the run.
        page: the report.
    """
    from gradsift.cli.app import safe
    from gradsift.cli.screen import cell, table

    manifest = outcome.manifest
    rows, chosen = manifest["rows"], manifest["selection"]
    counts = table("Rows read", "status", "rows", right=("rows",))
    for status, count in sorted(rows["status"].items(), key=lambda pair: -pair[1]):
        counts.add_row(status, str(count))
    counts.add_row("total", str(rows["read"]))
    console.print(counts)
    if manifest.get("set_conflict"):
        sums = table("Cosine of the summed gradient", "with", "of the chosen rows", "of the whole pool",
                     right=("of the chosen rows", "of the whole pool"))  # fmt: skip
        for entry in manifest["set_conflict"]:
            sums.add_row(cell(entry["anchor"]), f"{entry['selected']:+.3f}", f"{entry['pool']:+.3f}")
        console.print(sums)
    for note in chosen["notes"]:
        console.print(safe(f"note: {note['text']}"), style="yellow", markup=False, highlight=False)
    console.print(safe(verdict(manifest)), style="bold", markup=False, highlight=False)
    for path in (*outcome.files, *([page] if page else [])):
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)


def verdict(manifest: Any) -> str:
    """Say in a few lines what was chosen and how sharp the cut is.

    Args:
        manifest: content of manifest.json.

    Returns:
        Plain text.
    """
    rows, chosen, noise = manifest["rows"], manifest["selection"], manifest.get("noise")
    text = (
        f"kept {chosen['num_rows']} of {rows['usable']} usable rows "
        f"({chosen['num_trained']} of {rows['trained_tokens']} trained tokens) with {chosen['method']}"
    )
    cut = chosen["cut"]
    if cut.get("known", True):
        text += f"\nmargin at the cut {cut['margin']:.3g}, numerical bound {cut['bound']:.3g}"
        if count := cut.get("num_undecided", len(cut["undecided"])):
            text += f"; {count} rows inside the bound were settled by id"
    else:
        text += f"\nnumerical bound of the signals {cut['bound']:.3g}; how far it moves this choice is not known"
    if noise:
        text += f" (measured on {noise['num_rows']} rows)"
    ratios = (manifest.get("sketch") or {}).get("noise_ratio") or {}
    if ratios:
        text += "\nsketch noise / spread of the cosines: " + ", ".join(f"{n} {r:.2f}" for n, r in ratios.items())
    proof = chosen.get("certificate")
    if proof:
        text += (
            f"\ncertificate: gain {proof['value']:.4g}, no choice can exceed {proof['upper_bound']:.4g}"
            f" (gap {proof['gap']:.2%})"
        )
    return text
