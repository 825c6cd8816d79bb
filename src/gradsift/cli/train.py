"""``gradsift train``: fine-tune a model on selected rows."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.cli.select import DryRun, Out, RecipeFile, Seed
from gradsift.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

# One word for what people set most; every other field goes by its dotted name.
SHORT = {
    "replay_share": "replay.share",
    "replay_unit": "replay.unit",
    "rank": "lora.rank",
    "alpha": "lora.alpha",
    "tau": "stm.tau",
    "drop_share": "stm.drop_share",
    "kl_weight": "kl.weight",
    "ewc_weight": "ewc.weight",
    "max_length": "data.max_length",
    "loss_on": "data.loss_on",
}

SelectionPath = Annotated[
    Path | None,
    typer.Option(
        "--selection",
        metavar="RUN|DIR|FILE",
        help="A run folder of gradsift select, a folder with selected.jsonl, or a file of rows.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="auto|HUB_ID|DIR|FILE.gguf", help="The model that is trained. [default: auto]"),
]
Replay = Annotated[
    list[str] | None,
    typer.Option(
        "--replay", metavar="PATH", help="General rows for replay, KL or EWC; --set replay_share=0.25. Repeatable."
    ),
]
HeldOut = Annotated[
    list[str] | None,
    typer.Option("--held-out", metavar="PATH", help="Evaluation rows: training on any of them is refused. Repeatable."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A setting (lr=1e-4, epochs=2, mode=full, kl.weight=0.1). Repeatable."
    ),
]


def command(
    selection: SelectionPath = None,
    model: Model = None,
    out: Out = None,
    replay: Replay = None,
    held_out: HeldOut = None,
    hook: Annotated[
        str | None,
        typer.Option("--hook", metavar="agem|gem|pcgrad|...", help="Gradient surgery against the run's anchors."),
    ] = None,
    set_: Settings = None,
    seed: Seed = None,
    recipe: RecipeFile = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model on a selection; the same command resumes a stopped run.

    Example: gradsift train --selection run --model org/name --out run-train --set lr=1e-4 --set epochs=2

    With --set online.policy=ogs_dual_priced (or another policy) rows are chosen from the run's whole pool while training.
    """
    flags: list[tuple[str, Any]] = [
        ("model", model),
        ("general", replay),
        ("held_out", held_out),
        ("hook.name", hook),
        ("seed", seed),
    ]
    config = build(recipe, set_ or [], [(key, value) for key, value in flags if value is not None])
    if selection is None:
        raise ConfigError("--selection is missing", where="gradsift train", expected="a run folder of gradsift select",
                          do="--selection run")  # fmt: skip
    run(config, selection, out, dry_run=dry_run)


def build(recipe: Path | None, settings: list[str], flags: list[tuple[str, Any]]) -> Any:
    """Combine recipe file, ``--set`` and flags; later wins.

    Args:
        recipe: YAML file or None.
        settings: ``KEY=VALUE`` texts.
        flags: dotted keys and values.

    Returns:
        The settings.

    Raises:
        ConfigError: a key goes through a field that has no parts.
    """
    from gradsift.recipe import build_section, load_recipe, parse_override
    from gradsift.train.config import TrainConfig

    values = load_recipe(recipe) if recipe else {}
    for key, value in [*(parse_override(text) for text in settings), *flags]:
        *parents, last = SHORT.get(key, key).split(".")
        node = values
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError("this field has no parts", where=f"--set {key}", got=part)
        node[last] = value
    return build_section(TrainConfig, values, "the training recipe")


def run(config: Any, selection: Path, out: Path | None, *, dry_run: bool = False) -> Any:
    """Train with progress on the terminal and print what came out.

    Args:
        config: the settings.
        selection: run folder, selection folder or file of rows.
        out: the run folder.
        dry_run: print the estimate and stop.

    Returns:
        What was left, or None for a dry run.

    Raises:
        ConfigError: no run folder was named.
    """
    from rich.console import Console

    from gradsift.cli.screen import Screen

    console = Console(stderr=False)
    words = ["gradsift", *sys.argv[1:]]
    screen = Screen(console, shlex.join(words))
    with screen.watching_signals():
        if dry_run:
            show_forecast(console, config, selection)
            return None
        if out is None:
            raise ConfigError("--out is missing", where="gradsift train", expected="a folder for the run",
                              do="--out run-train")  # fmt: skip
        train = trainer_of(config)
        begun = []

        def begin(tokens: int) -> None:
            begun.append(tokens)
            screen.start("training", tokens)

        trained = train(config, selection, out, command=shlex.join(words), tick=screen.advance, begin=begin)
        if begun:
            screen.finish("training")
    show(console, trained)
    return trained


def trainer_of(config: Any) -> Any:
    """Choose what trains: on a fixed list, or on rows that a policy chooses meanwhile.

    Args:
        config: the settings.

    Returns:
        ``finetune`` or ``finetune_online``.
    """
    if config.online.policy is None:
        from gradsift.train.finetune import finetune

        return finetune
    from gradsift.pipeline.online import finetune_online

    return finetune_online


def show_forecast(console: Console, config: Any, selection: Path) -> None:
    """Print a dry run.

    Args:
        console: where to print.
        config: the settings.
        selection: run folder, selection folder or file of rows.
    """
    from gradsift.cli.screen import cell, table
    from gradsift.pipeline.estimate import REACHED, human_time, product_speed, weight_count

    if config.online.policy is None:
        from gradsift.train.finetune import forecast
    else:
        from gradsift.pipeline.online import forecast_online as forecast

    plan = forecast(config, selection)
    weights = weight_count(plan.folder)
    # Forward 2, backward 4 operations per weight and token; a frozen base needs no gradient of its own weights.
    seconds = (4 if config.mode == "lora" else 6) * weights * plan.tokens / (REACHED * product_speed())
    out = table("What this run would take", "part", "estimate")
    replayed = f", {plan.num_replayed:,} of them replayed" if plan.num_replayed else ""
    out.add_row("rows", f"{plan.num_rows:,}{replayed}")
    out.add_row("steps", f"{plan.num_steps:,} of {config.batch_size} rows")
    out.add_row("tokens", f"{plan.tokens:,}, of which {plan.trained_tokens:,} carry loss")
    out.add_row("model", f"{weights / 1e6:.1f}M weights, {config.mode}")
    out.add_row(
        "time", f"about {human_time(seconds)} on this CPU, without hooks and penalties (within a factor of two)"
    )
    for note in plan.notes:
        out.add_row("note", cell(note))
    console.print(out)


def show(console: Console, trained: Any) -> None:
    """Print what was trained, what to beware of and where the files are.

    Args:
        console: where to print.
        trained: what ``finetune`` returned.
    """
    from gradsift.cli.app import safe

    manifest = trained.manifest
    rows, loss, cost = manifest["rows"], manifest["loss"], manifest["cost"]["total"]
    for text in [*trained.remarks, *(note["text"] for note in manifest["notes"])]:
        console.print(safe(f"note: {text}"), style="yellow", markup=False, highlight=False)
    if trained.skipped:
        console.print("this run is done already; nothing was trained", markup=False)
    lines = [
        f"trained {manifest['config']['mode']} on {rows['trained_on']} rows ({rows['trained_tokens']} trained tokens, "
        f"{rows['replayed']} rows replayed) for {manifest['plan']['num_steps']} steps",
        f"loss {loss['first']:.4f} at the first step, {loss['last']:.4f} at the last",
        f"cost {cost['flops']:.3g} operations, {cost['backward_tokens']} tokens backward, {cost['seconds']:.1f} s",
    ]
    if manifest["stm"]:
        lines.append(
            f"masked {manifest['stm']['share']:.1%} of the trained tokens (perplexity above {manifest['stm']['tau']:.3g})"
        )
    console.print(safe("\n".join(lines)), style="bold", markup=False, highlight=False)
    files = [trained.model, trained.folder / "log.jsonl", trained.folder / "manifest.json"]
    if "online" in manifest:
        files.append(trained.folder / "online.json")
        show_decisions(console, manifest["online"], files[-1])
    for path in files:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)


def show_decisions(console: Console, online: dict[str, Any], path: Path) -> None:
    """Print what a policy decided, what was measured after each decision, and whether the limits were kept.

    Args:
        console: where to print.
        online: the manifest's section.
        path: ``online.json``.
    """
    import json

    from gradsift.cli.app import safe
    from gradsift.cli.screen import table

    found = json.loads(path.read_text("utf-8"))
    headings = ("decision", "cluster", "rows", "target", *found["sources"])
    out = table("Held-out losses after each decision", *headings, right=headings)

    def losses(one: dict[str, Any]) -> list[str]:
        return [f"{value:.4f}" for value in (one["target"], *one["protect"])]

    out.add_row("start", "", "", *losses(found["start"]))
    for number, one in enumerate(found["decisions"], start=1):
        kind = " (general)" if one["general"] else ""
        out.add_row(str(number), f"{one['cluster']}{kind}", str(len(one["rows"])), *losses(one))
    console.print(out)
    limits = online["limits"]["nats"]
    rises = ", ".join(f"{name} {rise:+.4f} (limit {limits[name]:+.4f})" for name, rise in online["rise"].items())
    verdict = "every limit was kept" if online["keeps"] else "a limit was broken"
    budget, line = online["budget"], f"{online['policy']}: target {-online['gain']:+.4f} nats, {rises}; {verdict}"
    line += f"\n{budget['spent']} of {budget['amount']} {budget['unit']} used; effects of clusters from {online['effects_from']}"
    if online["num_rescored"]:
        line += f"; clusters rescored {online['num_rescored']} times"
    console.print(safe(line), markup=False, highlight=False)
