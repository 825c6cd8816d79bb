"""What the trials of whole runs share: a toy navigator on the disk, small data, recipes, and stores read row by row."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.launched import store_rows
from tests.rows import world
from tests.toy import toy_llama, toy_tokenizer

from gradsift.pipeline import Outcome, select
from gradsift.pipeline.progress import Silent
from gradsift.recipe import Recipe, apply_overrides, build_recipe

__all__ = ["Stopped", "Stops", "quiet", "recipe_of", "room", "run", "store_rows", "worker", "world_in"]


@contextmanager
def room() -> Iterator[Path]:
    """A folder in memory where there is one, removed afterwards."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="gradsift-trial-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and remarks of the libraries away."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def world_in(folder: Path, pool: int) -> Path:
    """Write a pool, two anchors, a target and a toy navigator into a folder."""
    folder.mkdir(exist_ok=True)
    with quiet():
        world(folder, pool)
        toy_llama(seed=3).save_pretrained(folder / "navigator")
        toy_tokenizer().save_pretrained(folder / "navigator")
    return folder


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    """A small run over the rows of :func:`world_in`; keys of ``changes`` have ``__`` for the dot."""
    values: dict[str, Any] = {
        "pool": [{"label": "pool", "path": str(folder / "pool.jsonl")}],
        "anchors": [{"label": name, "path": str(folder / f"{name}.jsonl")} for name in ("math", "chat")],
        "target": str(folder / "target.jsonl"),
        "navigator": {"model": str(folder / "navigator"), "device": "cpu"},
        "collect": {"rows_per_shard": 5, "sketch_dim": 251},
        "method": {"name": "ogs_dual"},
        "budget": "25%",
    }
    return build_recipe(apply_overrides(values, [(k.replace("__", "."), v) for k, v in changes.items()]))


class Stopped(Exception):
    """A run was stopped by :class:`Stops`."""


class Stops(Silent):
    """Progress that stops the run in the pass over the pool after so many rows; it counts them in any case."""

    def __init__(self, after: float = float("inf")) -> None:
        self.after, self.stage, self.num_rows = after, "", 0

    def start(self, stage: str, total_tokens: int) -> None:
        self.stage = stage

    def advance(self, rows: int, tokens: int) -> None:
        if self.stage == "collect":
            self.num_rows += rows
            if self.num_rows >= self.after:
                raise Stopped


def run(recipe: Recipe, out: Path, progress: Stops | None = None, **options: Any) -> Outcome:
    """``gradsift select`` in this process."""
    with quiet():
        return select(recipe, out, progress=progress or Stops(), **options)


def selected(out: Path) -> frozenset[str]:
    """Ids of the chosen rows."""
    import pyarrow.parquet as pq

    table = pq.read_table(out / "selection" / "audit.parquet", columns=["id", "selected"]).to_pydict()
    return frozenset(name for name, chosen in zip(table["id"], table["selected"], strict=True) if chosen)


@contextmanager
def worker(target: Callable[..., Any], *arguments: Any) -> Iterator[int]:
    """A forked process that does one thing; give its number. It is waited for, and killed where it stays."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            target(*arguments)
            code = 0
        finally:
            os._exit(code)
    try:
        yield pid
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.02)
        raise AssertionError("a worker does not go home")
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def counts(words: Sequence[str]) -> Mapping[str, int]:
    """How often each word stands there."""
    return {word: list(words).count(word) for word in dict.fromkeys(words)}
