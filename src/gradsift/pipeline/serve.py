"""The part of a run that other processes take over: the passes over the pool, led by one of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradsift.launch.actors import Actors
from gradsift.launch.bench import Released
from gradsift.launch.board import LAUNCH
from gradsift.launch.lead import Lead, leading
from gradsift.launch.seat import Seat
from gradsift.launch.worker import Worker, ended_run, joined
from gradsift.methods import make_method
from gradsift.pipeline.asked import wants_gradients
from gradsift.pipeline.checkpoints import measure_trained
from gradsift.pipeline.forward import measures_prompts
from gradsift.pipeline.fsdp import check_fsdp
from gradsift.pipeline.measure import Measurement, measured_rows
from gradsift.pipeline.memory import with_budget
from gradsift.pipeline.prepare import Prepared, prepare
from gradsift.pipeline.progress import Clock, Progress, Silent
from gradsift.recipe import Recipe, build_recipe


@dataclasses.dataclass(frozen=True)
class Served:
    """What a worker did.

    Args:
        rank: of the worker.
        num_units: units that it measured and staged.
        num_rows: their rows.
    """

    rank: int
    num_units: int
    num_rows: int


def needs_model(recipe: Recipe, prepared: Prepared) -> bool:
    """Tell whether a run measures anything.

    Args:
        recipe: the run's settings.
        prepared: its inputs.

    Returns:
        False where the method reads texts only and nothing else is asked for.
    """
    return prepared.method.needs.cost_class != "text" or recipe.collect.signals == "all"


def measure_together(prepared: Prepared, out: Path, clock: Clock, seat: Seat | None) -> Measurement:
    """Measure the pool, with the other processes of the run where there are any.

    Args:
        prepared: the run's inputs.
        out: the run folder; exists.
        clock: timing and progress.
        seat: this process, which commits; None or inline for one process alone.

    Returns:
        The signals, with remarks on workers that were gone.
    """
    if seat is None or seat.launcher == "inline":
        return measure_trained(prepared, out, clock)
    crew = None
    if seat.launcher == "ray":
        gpu = prepared.recipe.navigator.device != "cpu" and _num_gpus() > 0
        crew = Actors(seat, act, prepared.recipe.model_dump(mode="json"), out, gpu=gpu)
    with leading(out, seat, crew) as lead, _together(lead, prepared, seat, clock):
        measured = measure_trained(dataclasses.replace(prepared, launch=lead), out, clock)
        if lead.lockstep is not None:
            lead.lockstep.end()
        return dataclasses.replace(measured, notes=measured.notes + lead.notes(), launch=lead.summary())


def serve(recipe: Recipe, out: Path, seat: Seat, *, run: str | None = None, progress: Progress | None = None) -> Served:
    """Be a worker of a run: measure units for rank 0 until it has all signals; writes no result.

    Args:
        recipe: everything that determines the run, as rank 0 has it.
        out: the run folder; need not exist yet.
        seat: this process; its rank is not 0.
        run: name of the run where it is known.
        progress: who is told; raises from ``advance`` to stop.

    Returns:
        What was done here.

    Raises:
        LaunchError: rank 0 did not begin, is gone or has failed.
        SpecError: this process has other inputs than rank 0.
    """
    clock = Clock(progress or Silent())
    ended = ended_run(out / LAUNCH)
    device = seat.device(recipe.navigator.device, _num_gpus())
    recipe = recipe.model_copy(update={"navigator": recipe.navigator.model_copy(update={"device": device})})
    method = make_method(recipe.method.name, recipe.method.settings)
    check_fsdp(recipe, method, seat)
    prepared = prepare(recipe, method, clock)
    if not needs_model(recipe, prepared):
        return Served(seat.rank, 0, 0)
    wanted = {"gradients": wants_gradients(prepared, out), "prompts": measures_prompts(prepared, out)}
    prepared = with_budget(prepared, measured_rows(prepared), **wanted)
    with (
        _going_home(),
        joined(
            out / LAUNCH, seat, lambda rows, tokens: clock.tick("wait", rows, tokens), run=run, ended=ended
        ) as worker,
        _together(worker, prepared, seat, clock),
    ):
        try:
            if prepared.method.needs.warmup is not None:
                worker.wait_open("", lambda rows, tokens: clock.tick("wait", rows, tokens))  # rank 0 trains
            measure_trained(dataclasses.replace(prepared, launch=worker), out, clock)
        except Released:
            pass
        return Served(seat.rank, worker.num_units, worker.num_rows)
    return Served(seat.rank, 0, 0)


def act(recipe: Mapping[str, Any], out: Path, seat: Mapping[str, Any], run: str, folder: str) -> dict[str, int]:
    """Be a worker inside a Ray actor.

    Args:
        recipe: the run's settings as plain values.
        out: the run folder.
        seat: fields of the worker's :class:`Seat`.
        run: name of the run.
        folder: where relative paths of the recipe begin.

    Returns:
        ``rank``, ``num_units`` and ``num_rows``.
    """
    os.chdir(folder)
    return dataclasses.asdict(serve(build_recipe(dict(recipe)), out, Seat(**seat), run=run))


@contextmanager
def _together(launch: Lead | Worker, prepared: Prepared, seat: Seat, clock: Clock) -> Iterator[None]:
    """Meet the other ranks, where all hold one model together."""
    if not seat.fsdp:
        yield
        return
    from gradsift.launch.lockstep import in_lockstep
    from gradsift.models.load import resolve_device
    from gradsift.models.shard import refuse_quantized

    refuse_quantized(prepared.resolved.folder)
    device = resolve_device(seat.device(prepared.recipe.navigator.device, _num_gpus()))
    with in_lockstep(seat, device, lambda rows, tokens: clock.tick("wait", rows, tokens)) as launch.lockstep:
        yield


@contextmanager
def _going_home() -> Iterator[None]:
    try:
        yield
    except Released:  # the run was over before this process had joined it
        return


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
