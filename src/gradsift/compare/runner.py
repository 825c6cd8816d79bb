"""Work on a comparison cell by cell: any number of processes on one folder, each cell done once, resumable (ours)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradsift.compare.applicable import reason, refuse_inapplicable
from gradsift.compare.arms import ArmSpec, Desk
from gradsift.compare.cell import Cell, run_cell, with_total
from gradsift.compare.claiming import claim
from gradsift.compare.config import CompareConfig, arms_to_run
from gradsift.compare.placebo import shuffle_anchors
from gradsift.compare.store import (
    cell_key,
    declared_config,
    file_cell,
    file_failure,
    forget_failures,
    read_cell,
    read_failure,
)
from gradsift.compare.worlds import build_world, make_grid, place
from gradsift.errors import ConfigError, DiskFullError, GradsiftError, Interrupted, StoreError

POLL_SECONDS = 0.5
SHAM = "shuffled_anchors"


@dataclass(frozen=True)
class Job:
    """A cell that is to be computed.

    Args:
        arm: the arm's name.
        seed: the seed.
        key: names its files.
        needs: key of the cell whose total cost it may spend; empty for none.
    """

    arm: str
    seed: int
    key: str
    needs: str = ""


@dataclass(frozen=True)
class Event:
    """A cell that this process has left behind.

    Args:
        job: which.
        seconds: wall time of the cell.
        error: why it could not be computed; empty when it is finished.
    """

    job: Job
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Left:
    """What is finished and what is not.

    Args:
        done: finished cells.
        failed: cells that could not be computed, with the reason.
        open: the others.
    """

    done: tuple[Job, ...]
    failed: tuple[tuple[Job, str], ...]
    open: tuple[Job, ...]


Tell = Callable[[Event], None]


def list_jobs(
    config: CompareConfig, arms: Iterable[str] | None = None, seeds: Sequence[int] | None = None
) -> tuple[Job, ...]:
    """List the cells of a comparison, seed by seed, so that the arms of a seed share one world and one pass.

    Args:
        config: the declared comparison.
        arms: names; None for all. An arm brings along the arm whose total it spends.
        seeds: a part of the declared seeds; None for all.

    Returns:
        Cells; within a seed an arm follows the one it depends on.

    Raises:
        ConfigError: an arm or a seed was not declared.
    """
    chosen = arms_to_run(config, arms)
    if unknown := sorted(set(seeds or ()) - set(config.seeds)):
        raise ConfigError("these seeds were not declared", where="--seeds", got=unknown, do="use another --out")
    return tuple(
        Job(
            arm.name,
            seed,
            cell_key(config, arm.name, seed),
            cell_key(config, arm.total_of, seed) if arm.total_of else "",
        )
        for seed in (config.seeds if seeds is None else seeds)
        for arm in chosen
    )


def look(folder: Path, jobs: Iterable[Job]) -> Left:
    """Tell what is finished; reads names of files, not the cells.

    Args:
        folder: of the comparison.
        jobs: the cells asked for.

    Returns:
        The cells by state.
    """
    done: list[Job] = []
    failed: list[tuple[Job, str]] = []
    rest: list[Job] = []
    for job in jobs:
        if (folder / "cells" / f"{job.key}.json").exists():
            done.append(job)
        elif (why := read_failure(folder, job.key)) is not None:
            failed.append((job, why))
        else:
            rest.append(job)
    return Left(tuple(done), tuple(failed), tuple(rest))


def work(
    folder: Path, jobs: Sequence[Job], tell: Tell, *, turn: int = 0, alone: bool = True, device: str = "auto"
) -> None:
    """Compute cells until none is left that this process can do.

    Args:
        folder: of the comparison, with its manifest.
        jobs: the cells asked for.
        tell: hears of every cell this process leaves behind; may raise to stop.
        turn: which of several workers this is: each starts at other seeds.
        alone: False ends the work when the parent process has gone.
        device: auto, cpu, cuda or cuda:N (:func:`gradsift.compare.worlds.place`).
    """
    torch.set_num_threads(1)  # the same sums whatever the number of workers
    config, parent = declared_config(folder), os.getppid()
    bench = _Bench(folder, config, place(config.world, device, turn))
    order = sorted({job.seed for job in jobs})
    order = order[turn % max(1, len(order)) :] + order[: turn % max(1, len(order))]
    while True:
        left = look(folder, jobs).open
        moved = False
        for seed in order:
            for job in (job for job in left if job.seed == seed):
                if not alone and os.getppid() != parent:
                    return
                moved |= bench.attempt(job, tell)
        if not look(folder, jobs).open:
            return
        if not moved:
            time.sleep(POLL_SECONDS)  # the rest is in other hands; a dead hand is noticed by the claim


class _Bench:
    """One process's work: the desk of the seed at hand stays until another seed comes.

    Args:
        folder: of the comparison.
        config: the declared comparison.
        device: where models live, cpu or cuda:N.
    """

    def __init__(self, folder: Path, config: CompareConfig, device: str = "cpu") -> None:
        self.folder, self.config, self.grid, self.device = folder, config, make_grid(config), device
        self._desks: dict[str, Desk] = {}
        self._seed: int | None = None

    def attempt(self, job: Job, tell: Tell) -> bool:
        """Compute a cell if it is free and what it needs is there; return whether anything was left behind."""
        if job.needs and (why := read_failure(self.folder, job.needs)) is not None:
            text = reason(why) or "the arm whose total it may spend could not be computed"
            file_failure(self.folder, job.key, text)
            tell(Event(job, 0.0, text))
            return True
        if job.needs and not (self.folder / "cells" / f"{job.needs}.json").exists():
            return False
        with claim(self.folder, job.key) as ours:
            if not ours:
                return False
            started = time.perf_counter()
            desk = self._desk(job)  # a world that cannot be built stops the run: no other cell could be computed either
            roles = {held.name: held.role for held in desk.world.evaluations}
            try:
                file_cell(self.folder, job.key, self.compute(desk, job), roles, self.device, desk.world.base)
                event = Event(job, time.perf_counter() - started)
            except (DiskFullError, StoreError, Interrupted):
                raise
            except torch.OutOfMemoryError as error:
                text = f"the GPU's memory does not suffice: run fewer --jobs on it ({str(error).partition('. ')[0]})"
                file_failure(self.folder, job.key, text)
                event = Event(job, time.perf_counter() - started, text)
            except GradsiftError as error:
                text = str(error)
                file_failure(self.folder, job.key, text)
                event = Event(job, time.perf_counter() - started, text)
        tell(event)
        return True

    def compute(self, desk: Desk, job: Job) -> Cell:
        """Compute one cell."""
        arm = self.config.arm(job.arm).spec()
        total = None
        if job.needs:
            other = read_cell(self.folder, job.needs)
            assert other is not None, "attempt() looked"
            total = with_total(arm, other.cell, self.grid)
        return run_arm(desk, arm, self.grid, total)

    def _desk(self, job: Job) -> Desk:
        if self._seed != job.seed:
            world = build_world(self.config.world, job.seed, self.device)
            if world.metric != self.config.metric:
                raise ConfigError("the world is measured by another metric", where="metric", got=self.config.metric,
                                  expected=world.metric)  # fmt: skip
            self._desks, self._seed = {"": Desk(world, self.grid.budget)}, job.seed
        kind = SHAM if self.config.arm(job.arm).placebo == SHAM else ""
        if kind not in self._desks:
            plain = self._desks[""]
            self._desks[kind] = Desk(shuffle_anchors(plain.world, plain.stream(f"placebo/{SHAM}")), plain.budget)
        return self._desks[kind]


def run_arm(desk: Desk, arm: ArmSpec, grid: Any, total: float | None = None) -> Cell:
    """Run an arm on its desk, a sham world being the placebo already.

    Args:
        desk: the seed's desk, of the sham world for an arm with shuffled anchors.
        arm: the arm.
        grid: how every arm is trained.
        total: flops that it may spend, or None.

    Returns:
        The cell.
    """
    refuse_inapplicable(desk.world, arm)
    plain = replace(arm, placebo="") if arm.placebo == SHAM else arm
    return run_cell(desk, plain, grid, total=total)


def run_all(
    folder: Path,
    jobs: Sequence[Job],
    num_workers: int,
    tell: Tell,
    watch: Callable[[], None],
    device: str = "auto",
) -> Left:
    """Compute all cells with some processes.

    Args:
        folder: of the comparison, with its manifest.
        jobs: the cells asked for.
        num_workers: processes, one torch thread each; 1 works in this process.
        tell: hears of every cell that is left behind, by whomever.
        watch: called a few times a second with several workers; may raise to stop.
        device: auto, cpu, cuda or cuda:N (:func:`gradsift.compare.worlds.place`).

    Returns:
        What is finished and what is not.

    Raises:
        StoreError: a worker died; what it had finished is kept.
    """
    forget_failures(folder)
    if num_workers == 1:
        work(folder, jobs, tell, device=device)
        return look(folder, jobs)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(str(folder), tuple(jobs), turn, device), daemon=True)
        for turn in range(num_workers)
    ]
    known = {job.key for job in look(folder, jobs).done}
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            watch()
            time.sleep(POLL_SECONDS / 2)
            known = _hear(folder, jobs, known, tell)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()
    _hear(folder, jobs, known, tell)
    left = look(folder, jobs)
    if left.open:
        for turn in range(num_workers):
            if why := read_failure(folder, f"worker-{turn}"):
                raise StoreError(f"a worker stopped: {why}", where=str(folder))
        codes = [worker.exitcode for worker in workers]
        raise StoreError("a worker ended before its work was done", where=str(folder), got=f"exit codes {codes}",
                         do="run the same command again: finished cells are kept")  # fmt: skip
    return left


def _worker(folder: str, jobs: tuple[Job, ...], turn: int, device: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    try:
        work(Path(folder), jobs, lambda _: None, turn=turn, alone=False, device=device)
    except GradsiftError as error:  # told by the parent, which is the one that speaks to a person
        file_failure(Path(folder), f"worker-{turn}", str(error))


def _hear(folder: Path, jobs: Sequence[Job], known: set[str], tell: Tell) -> set[str]:
    left = look(folder, jobs)
    for job in left.done:
        if job.key not in known:
            filed = read_cell(folder, job.key)
            tell(Event(job, filed.cell.seconds if filed else 0.0))
    for job, why in left.failed:
        if job.key not in known:
            tell(Event(job, 0.0, why))
    return {job.key for job in left.done} | {job.key for job, _ in left.failed}
