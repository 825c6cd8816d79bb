"""Benchmarks of lm-eval in this process, from a local folder of task files: no model hub, no data hub.

A task file may run code of its own (``!function``), as lm-eval intends: use folders you would run a script from.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradsift.errors import ConfigError, DependencyError
from gradsift.evaluate.losses import evaluating
from gradsift.evaluate.table import DIRECTIONS
from gradsift.models.foreign import short
from gradsift.types import Note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUIET = ("lm_eval", "lm-eval", "evaluate", "datasets")


@dataclass(frozen=True)
class BenchScore:
    """One figure of a benchmark.

    Args:
        task: name of the task.
        metric: with its filter, such as ``acc,none``.
        value: as lm-eval gives it.
        standard_error: lm-eval's, NaN where it gives none.
        n: questions answered.
    """

    task: str
    metric: str
    value: float
    standard_error: float
    n: int


@dataclass(frozen=True)
class BenchResult:
    """All figures of some benchmarks.

    Args:
        scores: figures whose direction is known, tasks in the order asked.
        notes: metrics left out because it is not known which way is better.
        version: of lm-eval.
    """

    scores: tuple[BenchScore, ...]
    notes: tuple[Note, ...]
    version: str


def require_lm_eval() -> str:
    """Check that lm-eval is there, before anything costly begins.

    Returns:
        Its version.

    Raises:
        DependencyError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    try:
        if find_spec("lm_eval") is not None:
            return version("lm_eval")
    except PackageNotFoundError:
        pass
    raise DependencyError(
        "lm-eval is not installed", where="--lm-eval", got="no package lm_eval", do="pip install 'gradsift[eval]'"
    )


def run_benchmarks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: Path,
    *,
    seed: int,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> BenchResult:
    """Run tasks on a model that is loaded.

    Args:
        model: a causal language model, with or without an adapter; it is put into eval mode and back.
        tokenizer: its tokenizer.
        tasks: names of tasks in the folder.
        folder: YAML task files; relative ``data_files`` in them are looked up there.
        seed: of the few-shot draws.
        batch_size: rows at once.
        limit: first so many questions of each task; None for all.
        num_fewshot: examples before each question; None for what the task says.

    Returns:
        The figures.

    Raises:
        ConfigError: a task is not in the folder, or lm-eval refuses it.
        DependencyError: lm-eval is not installed.
    """
    found = require_lm_eval()
    if not folder.is_dir():
        raise ConfigError("there is no such folder of tasks", where="--lm-eval-dir", got=str(folder), do="check it")
    folder = folder.absolute()  # the working folder changes below
    with _quietly(folder, next(model.parameters()).device):
        # By name: the extra [eval] need not be there when the package is type-checked.
        lm_eval, tasks_of, models_of = map(import_module, ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface"))
        manager = tasks_of.TaskManager(include_path=str(folder), include_defaults=False)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise ConfigError(
                "the folder has no such task",
                where="--lm-eval",
                got=", ".join(unknown),
                expected=", ".join(manager.all_tasks) or f"YAML task files in {folder}",
                do="correct the name or --lm-eval-dir",
            )
        with evaluating(model):
            try:
                results = lm_eval.simple_evaluate(
                    model=models_of.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=list(tasks),
                    task_manager=manager,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    bootstrap_iters=1000,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except Exception as error:  # task files and metrics raise many kinds
                raise ConfigError(
                    "lm-eval could not run the tasks",
                    where=f"--lm-eval {', '.join(tasks)}",
                    got=short(error),
                    do="run lm_eval with the same task files by hand to see all of its message",
                ) from error
    return _read(dict(results or {}), tasks, found)


def _read(results: dict[str, Any], tasks: Sequence[str], version: str) -> BenchResult:
    """Take the figures out of lm-eval's result; a group gives the figures of its tasks."""
    scores: list[BenchScore] = []
    odd: list[str] = []
    named = [task for task in results["results"] if task in results["n-samples"]]
    for task in sorted(named, key=lambda name: tasks.index(name) if name in tasks else len(tasks)):
        figures, count = results["results"][task], int(results["n-samples"][task]["effective"])
        higher = results.get("higher_is_better", {}).get(task, {})
        for metric, value in figures.items():
            name, _, rest = metric.partition(",")
            if not rest or name.endswith("_stderr") or isinstance(value, str):
                continue
            expected = {"higher": True, "lower": False}.get(DIRECTIONS.get(name, "neither"))
            if expected is None or higher.get(name, expected) != expected:
                odd.append(f"{task} {metric}")
                continue
            error = figures.get(f"{name}_stderr,{rest}")
            error = float(error) if isinstance(error, float | int) else float("nan")
            scores.append(BenchScore(task, metric, float(value), error, count))
    text = f"{len(odd)} figures of lm-eval were left out, it is not known which way is better: {', '.join(odd[:5])}"
    notes = (Note("unknown_metric", text, len(odd), tuple(odd[:5])),) if odd else ()
    return BenchResult(tuple(scores), notes, version)


@contextlib.contextmanager
def _quietly(folder: Path, device: torch.device) -> Iterator[None]:
    """Keep lm-eval's chatter and its global seeding in, and let relative data files be found in the task folder."""
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    state = random.getstate(), np.random.get_state()  # noqa: NPY002 - lm-eval seeds the global generators
    pool = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstraps would fork this process once per core
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.chdir(folder),
            warnings.catch_warnings(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _mute_children(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC") if pool is None else os.environ.update(DISABLE_MULTIPROC=pool)


@contextlib.contextmanager
def _mute_children() -> Iterator[None]:
    """Send file descriptor 2 nowhere: lm-eval asks git for a commit, and git complains outside a work tree."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
