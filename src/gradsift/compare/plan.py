"""How long a comparison will take, from its finished cells or from a short measurement, before it starts (ours)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gradsift.compare.arms import ArmSpec, Desk
from gradsift.compare.cell import run_cell
from gradsift.compare.config import CompareConfig
from gradsift.compare.runner import Job, look
from gradsift.compare.store import read_cell
from gradsift.compare.worlds import build_world, make_grid, place

SHORT, LONG = 2, 8


@dataclass(frozen=True)
class Plan:
    """What is left to do and how long it will take.

    Args:
        num_cells: cells asked for.
        num_done: finished ones.
        seconds: estimate per arm of its unfinished cells, all seeds together.
        world_seconds: estimate of building the worlds.
        num_workers: processes.
        basis: what the estimate rests on.
    """

    num_cells: int
    num_done: int
    seconds: Mapping[str, float]
    world_seconds: float
    num_workers: int
    basis: str

    @property
    def total(self) -> float:
        """Processor seconds, one thread each."""
        return sum(self.seconds.values()) + self.world_seconds

    @property
    def wall(self) -> float:
        """Seconds until the end when every process has a core of its own."""
        return self.total / self.num_workers


@dataclass(frozen=True)
class Speed:
    """Seconds of one cell and of its parts.

    Args:
        world: building a world and measuring its pool, pretraining included unless it is cached.
        fixed: per learning rate: evaluation and set-up.
        step: one optimizer step.
    """

    world: float
    fixed: float
    step: float


def make_plan(folder: Path, config: CompareConfig, jobs: Sequence[Job], num_workers: int, device: str = "auto") -> Plan:
    """Estimate the time that is left.

    Args:
        folder: of the comparison; need not exist.
        config: the resolved comparison.
        jobs: the cells asked for.
        num_workers: processes.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The plan. Without finished cells the random arm is measured for a few steps on the first seed.
    """
    left = look(folder, jobs)
    filed = [f for job in left.done if (f := read_cell(folder, job.key))]
    open_jobs = [*left.open, *(job for job, _ in left.failed)]
    if not open_jobs:
        return Plan(len(jobs), len(left.done), {}, 0.0, num_workers, "nothing is left to do")
    if filed:
        known: dict[str, list[float]] = {}
        for one in filed:
            known.setdefault(one.cell.arm, []).append(one.cell.seconds)
        usual = float(np.median([s for some in known.values() for s in some]))
        each = {job.arm: float(np.mean(known.get(job.arm, [usual]))) for job in open_jobs}
        world, basis = 0.0, f"{len(filed)} finished cells; arms without one are taken as the median cell"
    else:
        speed = measure_speed(config, device)
        grid = make_grid(config)
        cell = len(grid.lrs) * (speed.fixed + grid.num_steps * speed.step)
        each = {job.arm: cell for job in open_jobs}
        world = speed.world * len({job.seed for job in open_jobs})
        basis = (
            f"{LONG} steps of the random arm on the first seed; collecting gradients, hooks, penalties and rounds come "
            "on top, often as much again"
        )
    seconds = {arm: each[arm] * sum(job.arm == arm for job in open_jobs) for arm in each}
    return Plan(len(jobs), len(left.done), seconds, world, num_workers, basis)


def measure_speed(config: CompareConfig, device: str = "auto") -> Speed:
    """Time a few steps of the random arm on the first seed.

    Args:
        config: the resolved comparison.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        Seconds per part, two lengths of training telling steps from the rest.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        build_world(config.world, config.seeds[0], place(config.world, device))  # what is trained once for all seeds
        begun = time.perf_counter()
        world = build_world(config.world, config.seeds[0], place(config.world, device))
        grid = make_grid(config)
        desk, arm = Desk(world, grid.budget), ArmSpec("random", "random")
        run_cell(desk, arm, replace(grid, lrs=grid.lrs[:1], num_steps=1))  # also measures the pool, once a seed
        built = time.perf_counter() - begun
        took = [run_cell(desk, arm, replace(grid, lrs=grid.lrs[:1], num_steps=n)).seconds for n in (SHORT, LONG)]
    finally:
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the workers come next
    step = max((took[1] - took[0]) / (LONG - SHORT), 0.0)
    return Speed(built, max(took[0] - SHORT * step, 0.0), step)
