"""What the trials share: worlds, one training, checks, the printed line and the JSON file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.trials.outcome import Check as Check
from benchmarks.trials.outcome import Outcome, machine, plain
from torch import nn

from gradsift.compare.arithmetic import ArithmeticSettings, arithmetic_world
from gradsift.compare.world import World
from gradsift.evaluate.statistics import Interval, paired_interval
from gradsift.manifest import git_sha, pretty_json, versions, write_json_atomic
from gradsift.seeds import Stream
from gradsift.train.loop import Loop, LoopConfig
from gradsift.train.plan import plan_steps
from gradsift.train.rescore import RescoreConfig, rescore
from gradsift.types import Problem, TokenRow

ROOT = Path(__file__).resolve().parents[2]


@lru_cache(maxsize=32)
def world_of(seed: int, settings: ArithmeticSettings | None = None) -> World:
    """Build a seed of the arithmetic world once per process; its pretraining is most of the cost."""
    return arithmetic_world(seed, settings)


@dataclass(frozen=True)
class Training:
    """One fine-tuning run, the same for every arm of a trial."""

    lr: float = 3e-4
    num_steps: int = 120
    batch_size: int = 64


def train_on(world: World, rows: Sequence[TokenRow], how: Training, order: Stream) -> nn.Module:
    """Fine-tune a fresh copy of the world's model on some rows."""
    by_id = {row.id: row for row in rows}
    model = world.make_model()
    loop = Loop(model, LoopConfig(lr=how.lr, total_steps=how.num_steps), world.pad_id)
    plan = plan_steps([row.id for row in rows], batch_size=how.batch_size, num_steps=how.num_steps, stream=order)
    loop.run(plan.steps, by_id.__getitem__, {})
    return model


def distinct(world: World) -> tuple[TokenRow, ...]:
    """Pool rows without further copies."""
    return tuple(row for row in world.pool if world.copy_of.get(row.id, row.id) == row.id)


def signals(
    world: World,
    model: nn.Module,
    rows: Sequence[TokenRow],
    *,
    anchors: Mapping[str, Sequence[TokenRow]] | None = None,
    target: Sequence[TokenRow] | None = None,
    keep_sketch: bool = False,
    sketch_dim: int = 257,
) -> Problem:
    """Measure some rows with gradsift's own pass; every row given is measured, copies too."""
    config = RescoreConfig(seed=world.seed, keep_sketch=keep_sketch, sketch_dim=sketch_dim)
    got = rescore(
        model,
        rows,
        world.anchors if anchors is None else anchors,
        world.target if target is None else target,
        config,
        pad_id=world.pad_id,
    )
    if got.dropped:
        raise RuntimeError(f"{len(got.dropped)} rows have no usable gradient, first {got.dropped[0]}")
    return got.problem


def embeddings(model: nn.Module, rows: Sequence[TokenRow]) -> np.ndarray:
    """Mean-pooled last hidden states [n, d] of rows of equal length."""
    with torch.no_grad():
        ids = torch.tensor(np.stack([row.input_ids for row in rows]).astype(np.int64))
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]  # type: ignore[operator]
    return hidden.mean(1).double().numpy()


def similarity(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean cosine of every row of some with the rows of others."""
    a = some / np.linalg.norm(some, axis=1, keepdims=True)
    b = others / np.linalg.norm(others, axis=1, keepdims=True)
    return (a @ b.T).mean(1)


def over_seeds(values: Sequence[float], against: float | Sequence[float] = 0.0) -> Interval:
    """Student t interval over seeds of values minus what they are compared with."""
    other = [against] * len(values) if isinstance(against, int | float) else against
    return paired_interval(np.array(values, dtype=float), np.array(other, dtype=float))


@dataclass(frozen=True)
class Trial:
    """A trial as a script runs it.

    Args:
        name: its id on the sheet.
        seeds: default seeds.
        measure: seed -> figures, a tree of plain numbers.
        judge: figures per seed -> verdict; a pure function, so tests can hand it planted defects.
        settings: what was fixed before any seed of the result was run.
    """

    name: str
    seeds: Sequence[int]
    measure: Callable[[int], dict[str, Any]]
    judge: Callable[[Mapping[int, dict[str, Any]]], Outcome]
    settings: Mapping[str, Any] = field(default_factory=dict)


def hardware() -> str:
    """Processor, cores in use and load, as far as the system tells."""
    return f"{machine()}, {torch.get_num_threads()} thread, no GPU used"


def parse_seeds(text: str) -> list[int]:
    """Read ``0-9`` or ``0,3,5``."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def run_trial(trial: Trial, seeds: Sequence[int], out: Path | None, command: str) -> Outcome:
    """Measure every seed, judge, print the line, write the file; a run that is killed leaves its finished seeds."""
    if not seeds:
        raise ValueError("a trial needs at least one seed")
    started, cpu = time.perf_counter(), time.process_time()
    figures: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        # Through JSON and back: the verdict is that of the figures in the file.
        figures[seed] = json.loads(pretty_json(plain(trial.measure(seed))))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        print(f"  {trial.name} seed {seed}: {seconds:.0f} s, {cpu_seconds:.0f} s of CPU", file=sys.stderr, flush=True)
        outcome = trial.judge(figures)
        if out is not None:
            times = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(out, plain(record_of(trial, figures, outcome, command) | times))
    print(outcome.line(), flush=True)
    return outcome


def record_of(trial: Trial, figures: Mapping[int, dict[str, Any]], outcome: Outcome, command: str) -> dict[str, Any]:
    """What stands in the file beside the times."""
    return {
        "trial": trial.name,
        "met": outcome.met,
        "line": outcome.line(),
        "checks": [asdict(check) for check in outcome.checks],
        "wording": list(outcome.wording),
        "command": command,
        "date": date.today().isoformat(),
        "commit": git_sha(ROOT),
        "hardware": hardware(),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "transformers", "numpy")},
        "settings": dict(trial.settings),
        "seeds": list(figures),
        "per_seed": figures,
    }


def main(trial: Trial, argv: Sequence[str] | None = None) -> int:
    """Run a trial from the command line; a missed figure is a result, not a failure of the program."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=f"Trial {trial.name}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=parse_seeds, default=list(trial.seeds), help="0-9 or 0,3,5")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    script = f"python benchmarks/trials/{Path(sys.argv[0]).name}"
    run_trial(trial, options.seeds, options.out, " ".join([script, *given]))
    return 0
