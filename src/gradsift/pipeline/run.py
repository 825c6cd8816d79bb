"""``select``: the whole road from files to a chosen file, its reasons and its page."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gradsift.data.export import write_mixture, write_selected
from gradsift.errors import ConfigError
from gradsift.launch.seat import Seat
from gradsift.manifest import (
    MANIFEST,
    NEXT_RECIPE,
    RECIPE,
    fsync_folder,
    git_sha,
    make_folder,
    remove_temporary,
    sha256_file,
    versions,
    write_bytes_atomic,
    write_json_atomic,
)
from gradsift.methods import make_method
from gradsift.pipeline.asked import wants_gradients
from gradsift.pipeline.audit import AuditRows, write_audit
from gradsift.pipeline.checks import batch_checks, example_rows, sketch_noise
from gradsift.pipeline.forward import measures_prompts
from gradsift.pipeline.fsdp import check_fsdp
from gradsift.pipeline.learner import NavigatorLearner
from gradsift.pipeline.measure import Measurement, measured_rows, refuse_weak
from gradsift.pipeline.memory import with_budget
from gradsift.pipeline.prepare import Prepared, prepare
from gradsift.pipeline.probe import Probed, probe
from gradsift.pipeline.probe_design import design_probes
from gradsift.pipeline.problem import build_problem, eligible_rows
from gradsift.pipeline.progress import Clock, Progress, Silent
from gradsift.pipeline.proxy import NavigatorProxy
from gradsift.pipeline.screen import Screened, measure_screened
from gradsift.pipeline.screen_check import check_alone
from gradsift.pipeline.serve import measure_together, needs_model
from gradsift.recipe import Recipe, dump_recipe, parse_budget
from gradsift.report.card import render_card
from gradsift.seeds import stream
from gradsift.types import Problem, Selection

FORMAT = 1
NUM_NAMED = 100  # undecided rows that the manifest names

__all__ = ["Outcome", "Progress", "Silent", "select"]


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Args:
        selection: the choice.
        out: the run folder.
        files: chosen rows, audit table, card, manifest, and the report when it could be drawn.
        manifest: content of ``manifest.json``.
    """

    selection: Selection
    out: Path
    files: tuple[Path, ...]
    manifest: Mapping[str, Any]


def select(
    recipe: Recipe,
    out: Path,
    *,
    command: str = "gradsift.select(...)",
    progress: Progress | None = None,
    seat: Seat | None = None,
) -> Outcome:
    """Select rows and write the run folder; the same call resumes a run that was stopped.

    Args:
        recipe: everything that determines the run.
        out: the run folder, made when absent.
        command: what a person would type to get the same; goes into the manifest.
        progress: who is told; nobody by default.
        seat: this process, where several measure together; it is the one that commits (others call ``serve``).

    Returns:
        The selection and the files.
    """
    clock = Clock(progress or Silent())
    budget = asked = parse_budget(recipe.budget)
    check_alone(recipe, seat)
    method = make_method(recipe.method.name, recipe.method.settings)
    check_fsdp(recipe, method, seat)
    _check_folder(out)
    prepared = prepare(recipe, method, clock)
    if method.needs.probes is not None:
        design_probes(prepared, eligible_rows(prepared, None))  # refuses before a model loads
    make_folder(out)
    for folder in (out, out / "selection"):
        remove_temporary(folder)
    # An earlier run's recipe stands until this run's results do: it says what the results there were made with.
    write_bytes_atomic(out / NEXT_RECIPE, dump_recipe(recipe).encode("utf-8"))
    if needs_model(recipe, prepared):
        wanted = {"gradients": wants_gradients(prepared, out), "prompts": measures_prompts(prepared, out)}
        prepared = with_budget(prepared, measured_rows(prepared), **wanted)
    screened = None
    if recipe.screen.by is not None:
        screened = measure_screened(prepared, budget, out, clock)
        prepared, measured, budget = screened.prepared, screened.measured, screened.budget
    else:
        measured = measure_together(prepared, out, clock, seat) if needs_model(recipe, prepared) else None
    if measured is not None:
        refuse_weak(prepared, {d.name: d for d in measured.directions})
    probed = None
    if method.needs.probes is not None and measured is not None:
        probed = probe(prepared, measured, eligible_rows(prepared, measured), out, clock)
    learner = None
    if method.needs.rollouts and measured is not None:
        learner = NavigatorLearner(prepared, measured, eligible_rows(prepared, measured), out, clock)
    with clock.stage("select"):
        problem = dataclasses.replace(build_problem(prepared, measured, probed), learner=learner)
        if method.needs.proxy and measured is not None:
            proxy = NavigatorProxy(prepared, measured, eligible_rows(prepared, measured), out, clock)
            problem = dataclasses.replace(problem, proxy=proxy)
        selection = method.select(problem, budget, stream(recipe.seed, f"select/{method.name}"))
        notes = (*prepared.notes, *(measured.notes if measured else ()), *(probed.notes if probed else ()))
        taken = problem.proxy.notes(selection.ids) if problem.proxy else ()
        left = (screened.note(selection),) if screened else ()
        selection = dataclasses.replace(selection, budget=asked, notes=(*notes, *selection.notes, *taken, *left))
    with clock.stage("write"):
        files, manifest = _write(prepared, (measured, probed, screened), problem, selection, out, command, clock)
    return Outcome(selection, out, files, manifest)


def _check_folder(out: Path) -> None:
    """Refuse to write into a folder that is something else."""
    if out.exists() and not out.is_dir():
        raise ConfigError("the run folder is a file", where="--out", got=str(out), do="name a folder")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in (RECIPE, NEXT_RECIPE)):
        raise ConfigError(
            "the folder holds something else", where="--out", got=f"{out} without {RECIPE}",
            expected="a new or empty folder, or an earlier run", do="name another folder",
        )  # fmt: skip


def _write(
    prepared: Prepared,
    found: tuple[Measurement | None, Probed | None, Screened | None],
    problem: Problem,
    selection: Selection,
    out: Path,
    command: str,
    clock: Clock,
) -> tuple[tuple[Path, ...], dict[str, Any]]:
    measured, probed, screened = found
    place = out / "selection"
    make_folder(place)
    (out / MANIFEST).unlink(missing_ok=True)  # it says that the run is finished, which from here on it is not
    fsync_folder(out)
    exported = write_selected(prepared.pool.pool, selection.ids, place)
    selection = dataclasses.replace(selection, notes=(*selection.notes, *exported.notes))
    template = place / "chat_template.jinja"
    if prepared.rule.template_origin == "gradsift" and prepared.rule.template is not None:
        write_bytes_atomic(template, prepared.rule.template.encode("utf-8"))
    else:
        template.unlink(missing_ok=True)
    audit = AuditRows(prepared, measured, problem, selection)
    write_audit(audit, place / "audit.parquet")
    write_json_atomic(place / "examples.json", example_rows(prepared, measured, problem, selection))
    details = ()
    if selection.details is not None:
        details = (place / "details.json",)
        write_json_atomic(details[0], dict(selection.details))
    else:
        (place / "details.json").unlink(missing_ok=True)
    mixture = write_mixture(selection.mixture, place)
    (out / NEXT_RECIPE).replace(out / RECIPE)
    manifest = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions(),
        "git_sha": git_sha(Path(__file__).parent),
        "inputs": _inputs(prepared),
        "files": {str(path.relative_to(out)): sha256_file(path) for path in (out / RECIPE, exported.paths[0])},
        "rows": audit.counts(),
        **_measured(prepared, measured),
        "sketch": sketch_noise(problem),
        "screen": screened.summary(selection) if screened else None,
        "probes": dict(probed.summary) if probed else None,
        "rollouts": problem.learner.summary() if problem.learner else None,
        "warmup": dict(measured.warmup) if measured is not None and measured.warmup else None,
        "launch": dict(measured.launch) if measured is not None and measured.launch else None,
        "proxy": problem.proxy.summary() if problem.proxy else None,
        "selection": _selection(selection),
        **batch_checks(problem, selection, prepared.recipe.seed),
        "cost": _cost(clock),
    }
    write_bytes_atomic(place / "README.md", render_card(manifest).encode("utf-8"))
    write_json_atomic(out / MANIFEST, manifest)
    files = (*exported.paths, *mixture, place / "audit.parquet", *details, place / "README.md", out / MANIFEST)
    return files, manifest


def _inputs(prepared: Prepared) -> list[dict[str, Any]]:
    return [
        {"role": source.role, "label": file.label, "path": file.path, "kind": file.kind, "sha256": file.sha256,
         "num_rows": file.num_rows, "shapes": dict(file.shapes)}
        for source in (prepared.pool, *prepared.directions)
        for file in source.pool.files
    ]  # fmt: skip


def _measured(prepared: Prepared, measured: Measurement | None) -> dict[str, Any]:
    loss_on = prepared.recipe.data.loss_on
    data = {"loss_on": loss_on, "max_length": prepared.recipe.data.max_length,
            "template_sha256": prepared.rule.template_sha256,
            "template_origin": prepared.rule.template_origin}  # fmt: skip
    if measured is None:
        names = ("navigator", "spec", "spec_key", "directions", "direction_cos", "noise")
        return {"data": data, **dict.fromkeys(names)}
    navigator, covered = measured.navigator, measured.coverage
    return {
        "data": data,
        "navigator": {
            "name": prepared.recipe.navigator.model,
            "source": navigator.resolved.source,
            "source_sha256": navigator.resolved.source_sha256,
            "model_sha256": navigator.model_sha256,
            "tokenizer_sha256": navigator.tokenizer_sha256,
            "architecture": navigator.architecture,
            "parameters": measured.spec.parameters,
            "num_parameters": measured.parameters.numel,
            "coverage": covered.share,
            "uncovered": list(covered.unseen),
            "dtype": navigator.dtype,
            "device": navigator.device,
        },
        "spec": measured.spec.fields(),
        "spec_key": measured.spec.key,
        "directions": [{**dataclasses.asdict(d), "reliable": d.reliable} for d in measured.directions] or None,
        "direction_cos": {"names": [d.name for d in measured.directions], "matrix": measured.gram.tolist()}
        if measured.directions
        else None,
        "noise": dataclasses.asdict(measured.noise),
    }


def _selection(selection: Selection) -> dict[str, Any]:
    return {
        "method": selection.method,
        "config": dict(selection.config),
        "budget": str(selection.budget),
        "seed": selection.seed,
        "num_rows": len(selection.ids),
        "num_trained": selection.num_trained,
        "num_skipped": selection.num_skipped,
        "cut": {
            "margin": selection.cut.margin,
            "bound": selection.cut.bound,
            "num_undecided": len(selection.cut.undecided),
            "undecided": list(selection.cut.undecided[:NUM_NAMED]),  # all of them in audit.parquet
            "known": selection.cut.known,
        },
        "certificate": dataclasses.asdict(selection.certificate) if selection.certificate else None,
        "mixture": dict(selection.mixture) if selection.mixture else None,
        "notes": [dataclasses.asdict(note) for note in selection.notes],
    }


def _cost(clock: Clock) -> dict[str, Any]:
    import torch

    collected, seconds = clock.tokens.get("collect", 0), clock.seconds.get("collect", 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": {name: round(s, 3) for name, s in clock.seconds.items()},
        "tokens": dict(clock.tokens),
        "tokens_per_second": collected / seconds if seconds and collected else None,
        "peak_memory_bytes": peak,
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
    }
