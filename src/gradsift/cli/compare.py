"""``gradsift compare``: methods against honest baselines at equal total cost."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradsift.cli.select import DryRun, Out, RecipeFile
from gradsift.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from rich.console import Console

Preset = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="quick, arithmetic, text, real, placebo or placebo-planted."),
]
Seeds = Annotated[
    str | None,
    typer.Option("--seeds", metavar="0-9", help="Paired seeds; on a folder that exists, a part of the declared ones."),
]
Arms = Annotated[
    str | None,
    typer.Option("--arms", metavar="a,b", help="Work on these arms only; the others are reported as not run."),
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, max=256, help="Processes, one thread each.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]",
        help="auto: a GPU for the real world if there is one; the small planted models are faster on a CPU core.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="A declared setting (grid.num_steps=60, arms.NAME.replay=0.1). Repeatable."
    ),
]


def command(
    preset: Preset = None,
    recipe: RecipeFile = None,
    out: Out = None,
    seeds: Seeds = None,
    arms: Arms = None,
    jobs: Jobs = 1,
    device: Device = "auto",
    set_: Settings = None,
    dry_run: DryRun = False,
) -> None:
    """Train every arm on the same seeds and grid, and say what the figures allow; the same command resumes.

    Example: gradsift compare --preset quick --out run-compare --jobs 2
    """
    from rich.console import Console

    from gradsift.compare.worlds import resolve

    config = resolve(build(preset, recipe, set_ or [], seeds))
    wanted = [name.strip() for name in arms.split(",")] if arms else None
    if out is None:
        raise ConfigError("--out is missing", where="gradsift compare", expected="a folder", do="--out run-compare")
    if not run(Console(stderr=False), config, out, wanted, jobs, device=device, dry_run=dry_run):
        raise typer.Exit(1)


def build(preset: str | None, recipe: Path | None, settings: list[str], seeds: str | None) -> Any:
    """Combine preset or recipe, ``--set`` and ``--seeds``; later wins.

    Args:
        preset: name, or None.
        recipe: YAML file, or None.
        settings: ``KEY=VALUE`` texts.
        seeds: for example ``0-9``, or None.

    Returns:
        The settings, not yet resolved.

    Raises:
        ConfigError: not exactly one of preset and recipe was given, or a setting is wrong.
    """
    from gradsift.compare.config import build_config
    from gradsift.compare.written import load_preset, presets, with_overrides
    from gradsift.recipe import load_recipe, parse_override

    if (preset is None) == (recipe is None):
        raise ConfigError("a comparison comes from a preset or from a recipe", where="gradsift compare",
                          got="both" if preset else "neither", expected="--preset NAME or --recipe FILE",
                          do=f"presets: {', '.join(presets())}")  # fmt: skip
    values = load_preset(preset) if preset else load_recipe(recipe or Path())
    changes = [parse_override(text) for text in settings]
    return build_config(with_overrides(values, [*changes, *([("seeds", seeds)] if seeds else [])]))


def run(
    console: Console,
    config: Any,
    out: Path,
    wanted: list[str] | None,
    num_workers: int,
    *,
    device: str = "auto",
    dry_run: bool = False,
) -> bool:
    """Declare, plan, compute, and write results.json, results.md and report.html.

    Args:
        console: where to print.
        config: the resolved settings.
        out: the folder.
        wanted: arms to work on; None for all.
        num_workers: processes.
        device: auto, cpu, cuda or cuda:N.
        dry_run: print the plan and stop.

    Returns:
        Whether every cell asked for is finished and the run's own checks hold.
    """
    from gradsift.cli.screen import Screen
    from gradsift.compare.applicable import reason
    from gradsift.compare.plan import make_plan
    from gradsift.compare.runner import Event, list_jobs, run_all
    from gradsift.compare.store import declare
    from gradsift.compare.worlds import place

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError("there is no such device", where="--device", got=device, expected="auto, cpu, cuda or cuda:N",
                          do="leave --device out")  # fmt: skip
    place(config.world, device)  # refused before anything is declared
    command_line = shlex.join(["gradsift", *sys.argv[1:]])
    seeds = config.seeds
    if not dry_run:
        config = declare(out, config, command_line)  # before anything is computed
    jobs = list_jobs(config, wanted, seeds)
    plan = make_plan(out, config, jobs, num_workers, device)
    show_plan(console, plan)
    if dry_run:
        return True
    screen, done = Screen(console, command_line), [plan.num_done]

    def tell(event: Event) -> None:
        done[0] += not event.error
        text = f"{done[0]} of {len(jobs)}: {event.job.arm}, seed {event.job.seed}, {event.seconds:.1f} s"
        say(console, text if not event.error else f"not run: {event.job.arm}, seed {event.job.seed}: {event.error}")
        screen.advance(1, 0)

    with screen.watching_signals():
        left = run_all(out, jobs, num_workers, tell, lambda: screen.advance(0, 0), device)
    analysis = conclude(console, out, config)
    failed = [why for _, why in left.failed if reason(why) is None]  # what does not apply has not failed
    return not failed and not left.open and (analysis is None or analysis.passed)


def conclude(console: Console, out: Path, config: Any) -> Any:
    """Work the folder's cells up, print and write what was found.

    Args:
        console: where to print.
        out: the folder.
        config: the declared settings.

    Returns:
        The analysis, or None when no cell is finished.
    """
    from gradsift.compare.analysis import analyse
    from gradsift.compare.results import gather, write_results
    from gradsift.compare.store import read_manifest

    filed, missing = gather(out, config)
    if not filed:
        say(console, "no cell is finished, so there is nothing to report")
        return None
    analysis, manifest = analyse(config, filed, missing), read_manifest(out)
    paths = write_results(out, config, analysis, manifest)
    show(console, config, analysis)
    try:
        from gradsift.report.compare_page import render_compare

        paths = [*paths, render_compare(out, config, analysis, manifest)]
    except DependencyError as error:
        say(console, f"no report was drawn: {error.what} ({error.do})")
    for path in paths:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    return analysis


def show_plan(console: Console, plan: Any) -> None:
    """Print what is left to do and how long it takes.

    Args:
        console: where to print.
        plan: from ``compare.plan``.
    """
    from gradsift.cli.screen import cell, table
    from gradsift.pipeline.estimate import human_time

    say(console, f"{plan.num_cells} cells, {plan.num_done} of them finished")
    if plan.seconds:
        out = table("What is left", "arm", "seconds", right=("seconds",))
        for arm, seconds in plan.seconds.items():
            out.add_row(cell(arm), f"{seconds:.0f}")
        out.add_row("building the worlds", f"{plan.world_seconds:.0f}")
        console.print(out)
        processes = "1 process" if plan.num_workers == 1 else f"{plan.num_workers} processes"
        say(console, f"about {human_time(plan.wall)} with {processes}, a core each")
    say(console, f"estimated from: {plan.basis}")


def show(console: Console, config: Any, analysis: Any) -> None:
    """Print the arms, the claims in words, the placebo checks and the rule's own error.

    Args:
        console: where to print.
        config: the declared settings.
        analysis: what was found.
    """
    from gradsift.cli.screen import cell, table
    from gradsift.compare import words
    from gradsift.compare.applicable import inapplicable_rows

    second = words.second_difference(config, analysis)
    heads = ("arm", "seeds", "HV", f"minus {config.random}", *second, "cost")
    out = table(f"{config.trial}: {words.hypervolume(config)}", *heads, right=("seeds", "HV", "cost"))
    beside = {pair.arm: pair for pair in analysis.against_random}
    cheap = {pair.arm: pair for pair in analysis.against_cheap}
    for arm in analysis.arms:
        shown = (beside, *(cheap for _ in second))
        own = [str(some[arm.name].interval) if arm.name in some else "" for some in shown]
        out.add_row(cell(arm.name), str(len(arm.seeds)), f"{arm.mean:.3f}", *own, words.runs(arm.spent.relative))
    for name, why in inapplicable_rows(analysis.missing).items():
        out.add_row(cell(name), "0", cell(why))
    console.print(out)
    for check in analysis.placebos:
        say(console, check.sentence, style="" if check.passed else "bold red")
    for note in analysis.notes:
        say(console, f"note: {note}", style="yellow")
    say(console, words.null_sentence(analysis))
    for told in analysis.claims:
        say(console, told.sentence, style="bold")


def say(console: Console, text: str, style: str = "") -> None:
    """Print one line of foreign text safely.

    Args:
        console: where to print.
        text: any text.
        style: of rich.
    """
    from gradsift.cli.app import safe

    console.print(safe(text), style=style, markup=False, highlight=False)
