"""Time gradient collection beside plain forward+backward and other projects: the speed table, made in one run.

See README.md in this folder for what the columns are and how the measurement is made.
"""

from __future__ import annotations

import os

# One thread for every library, set before any of them is loaded.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from arms import Arm, NotRunError, own_arms
from rich.console import Console
from rich.table import Table
from rivals import rival_makers
from worlds import MODELS, NUM_DIRECTIONS, REAL, TOKENS_PER_BATCH, Batch, build_batches, build_model, real_batches

from gradsift.gradients import products

HERE = Path(__file__).parent
QUICK_ROWS, QUICK_ROUNDS, QUICK_MODELS = 32, 3, ("Llama-10M", "GPT-2-8.5M")
SUM = ("bergson-sum", "bergson 2.5.1, both runs", "256 a layer + cosines", ("bergson-projected", "bergson-exact"))


@dataclass
class Line:
    """One arm on one model.

    Args:
        key: the arm's short name.
        label: what the table calls it.
        returns: what one pass returns for each example.
        against: key of the arm whose seconds divide.
        seconds: process CPU seconds of each round.
        ratios: seconds over those of ``against`` in the same round.
        headless: seconds over those of plain without the gradient of the head's weight; empty for arms that take that
            gradient, and for LoRA.
        same_products: seconds over those of plain whose linear layers multiply by oneDNN, without the gradient of the head's
            weight where the arm takes none; empty for arms that multiply by torch.
        not_run: why there are no figures, or None.
    """

    key: str
    label: str
    returns: str
    against: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    headless: list[float] = field(default_factory=list)
    same_products: list[float] = field(default_factory=list)
    not_run: str | None = None

    @property
    def median(self) -> float:
        """Median ratio."""
        return statistics.median(self.ratios)


@dataclass
class ModelResult:
    """All lines of one model.

    Args:
        model: name in :data:`worlds.MODELS`.
        num_parameters: of the whole model, tied weights once.
        num_tokens: real tokens of one round.
        num_batches: batches of one round.
        lines: in table order.
        cosine_gap: rival's key -> largest difference of its exact cosines from gradsift's on the last batch.
    """

    model: str
    num_parameters: int
    num_tokens: int
    num_batches: int
    lines: list[Line]
    cosine_gap: dict[str, float]

    def find(self, key: str) -> Line | None:
        """Give the line of an arm."""
        return next((line for line in self.lines if line.key == key), None)


def make_arms(model: torch.nn.Module, batches: Sequence[Batch]) -> tuple[list[Arm], list[Line]]:
    """Set every arm up and let it see two batches, so that nothing is built inside a timer.

    Args:
        model: whose weights all arms share.
        batches: the shortest and the longest bucket are run once.

    Returns:
        The arms that work, and a line for each that does not, with its reason.
    """
    arms, missing = own_arms(model), []
    warm = (batches[0], batches[-1])
    for arm in arms:
        _warm_up(arm, warm)
    for key, label, make in rival_makers(model, sum(len(b.indices) for b in batches)):
        try:
            arm = make()
            _warm_up(arm, warm)
        except NotRunError as error:
            missing.append(Line(key, label, "", "plain", not_run=str(error)))
        except Exception as error:  # another project's failure must be told, not end the run
            missing.append(Line(key, label, "", "plain", not_run=f"{type(error).__name__}: {error}"))
        else:
            arms.append(arm)
    return arms, missing


def _warm_up(arm: Arm, batches: Sequence[Batch]) -> None:
    for batch in batches:
        arm.before()
        arm.step(batch)


def time_rounds(arms: Sequence[Arm], batches: Sequence[Batch], rounds: int) -> dict[str, list[float]]:
    """Take CPU seconds of each arm and round; the arms take turns on every batch, in rotating order.

    Args:
        arms: ready and warm.
        batches: what one round consists of.
        rounds: how many.

    Returns:
        Key -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {arm.key: [] for arm in arms}
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number in range(rounds):
            spent = dict.fromkeys(seconds, 0.0)
            for position, batch in enumerate(batches):
                # A stride keeps an arm from always following the same neighbor's leftovers in the cache.
                shift = (number * 5 + position) % len(arms)
                for arm in [*arms[shift:], *arms[:shift]]:
                    arm.before()
                    start = time.process_time()
                    arm.step(batch)
                    spent[arm.key] += time.process_time() - start
                gc.collect()
            for key, value in spent.items():
                seconds[key].append(value)
    finally:
        gc.enable()
        gc.unfreeze()
    return seconds


def measure_model(name: str, num_rows: int, rounds: int) -> ModelResult:
    """Make one model's part of the table.

    Args:
        name: key of :data:`worlds.MODELS`.
        num_rows: rows of a round.
        rounds: rounds.

    Returns:
        Its lines.
    """
    model = build_model(name)
    batches = real_batches(num_rows) if name in REAL else build_batches(num_rows, model.config.vocab_size)
    arms, lines = make_arms(model, batches)
    seconds = time_rounds(arms, batches, rounds)
    done = [
        Line(
            arm.key,
            arm.label,
            arm.returns,
            arm.against,
            seconds[arm.key],
            _over(seconds, arm.key, arm.against),
            [] if arm.head or arm.against != "plain" else _over(seconds, arm.key, "plain-headless"),
            _over(seconds, arm.key, _same_products(arm)) if arm.key.startswith("gradsift") else [],
        )
        for arm in arms
    ]
    result = ModelResult(
        name,
        sum(p.numel() for p in model.parameters()),
        sum(b.num_tokens for b in batches),
        len(batches),
        _in_order([*done, *lines]),
        _cosine_gaps(arms, batches[-1]),
    )
    for arm in arms:
        arm.close()
    return result


def _same_products(arm: Arm) -> str:
    return f"{arm.against}-products" if arm.head or arm.against != "plain" else "plain-headless-products"


def _over(seconds: dict[str, list[float]], key: str, other: str) -> list[float]:
    return [a / b for a, b in zip(seconds[key], seconds[other], strict=True)]


def _in_order(lines: list[Line]) -> list[Line]:
    """Put rivals after plain PyTorch and before gradsift, with bergson's two runs added up."""
    key, label, returns, parts = SUM
    halves = [line for part in parts for line in lines if line.key == part and not line.not_run]
    if len(halves) == len(parts):
        seconds = [sum(pair) for pair in zip(*(h.seconds for h in halves), strict=True)]
        ratios, headless = (
            [sum(pair) for pair in zip(*(getattr(h, name) for h in halves), strict=True)]
            for name in ("ratios", "headless")
        )
        lines.append(Line(key, label, returns, "plain", seconds, ratios, headless))
    else:
        lines.append(Line(key, label, returns, "plain", not_run="needs both runs above"))
    lora = ("lora-plain", "lora-plain-products", "gradsift-lora")
    rank = (
        "plain",
        "plain-headless",
        "plain-products",
        "plain-headless-products",
        "forward",
        "floor",
        "less",
        "bergson",
        "dattri",
        "gradsift",
        *lora,
    )
    place = {k: i for i, k in enumerate(rank)}
    return sorted(lines, key=lambda line: place.get(line.key, place.get(line.key.partition("-")[0], 99)))


def _cosine_gaps(arms: Sequence[Arm], batch: Batch) -> dict[str, float]:
    """Compare the exact cosines that rivals and gradsift gave, untimed, for the same batch and directions."""
    by_key = {arm.key: arm for arm in arms}
    ours = by_key["gradsift-body"]
    ours.step(batch)
    gaps = {}
    for key in ("bergson-exact", "dattri-exact"):
        if key in by_key:
            by_key[key].step(batch)
            gaps[key] = float((by_key[key].cosines.double() - ours.cosines).abs().max())
    return gaps


def show(result: ModelResult, console: Console, *, absolute: bool) -> None:
    """Print one model's table."""
    size = f"{result.num_parameters / 1e6:.1f}M weights, {result.num_tokens:,} tokens in {result.num_batches} batches"
    table = Table(title=f"{result.model} ({size})", title_justify="left")
    table.add_column("arm")
    table.add_column("returns")
    table.add_column("ratio", justify="right")
    table.add_column("min..max", justify="right")
    table.add_column("no head", justify="right")
    table.add_column("same products", justify="right")
    if absolute:
        table.add_column("tokens per CPU second", justify="right")
    for line in result.lines:
        if line.not_run is not None:
            table.add_row(line.label, f"not run: {line.not_run}", *["-"] * (5 if absolute else 4))
            continue
        spread = f"{min(line.ratios):.2f}..{max(line.ratios):.2f}"
        speed = [f"{result.num_tokens / statistics.median(line.seconds):,.0f}"] if absolute else []
        style = "bold" if line.key.startswith("gradsift") else None
        more = [f"{statistics.median(some):.2f}" if some else "-" for some in (line.headless, line.same_products)]
        table.add_row(line.label, line.returns, f"{line.median:.2f}", spread, *more, *speed, style=style)
    console.print(table)
    for key, gap in result.cosine_gap.items():
        console.print(f"exact cosines of {key} and gradsift differ by at most {gap:.1e}")


def hardware() -> dict[str, str | int]:
    """Name the machine and the versions."""
    packages = {}
    for package in ("torch", "numpy", "transformers", "bergson", "dattri-llm"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {"cpu": _cpu_name(), "cores": os.cpu_count() or 0, "python": platform.python_version(), **packages}


def _cpu_name() -> str:
    try:
        listing = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()
    found = re.search(r"^Model name:\s*(.+)$", listing, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def commit() -> str:
    """Name the git commit, marked when files differ from it."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def exceeded(results: Sequence[ModelResult], limits: dict[str, float], allowance: float) -> list[str]:
    """List the medians above their limits.

    Args:
        results: what was measured.
        limits: arm's key -> largest median ratio.
        allowance: added to each limit.

    Returns:
        One sentence each; an arm that was not measured counts as exceeding.
    """
    out = []
    for result in results:
        for key, limit in limits.items():
            line = result.find(key)
            if line is None or line.not_run is not None:
                out.append(f"{result.model}: {key} was not measured")
            elif line.median > limit + allowance:
                out.append(f"{result.model}: {key} is {line.median:.3f}, more than {limit + allowance:.2f}")
    return out


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/collect.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROWS} rows, {QUICK_ROUNDS} rounds, small models")
    parser.add_argument("--rows", type=int, help="rows of a round (256)")
    parser.add_argument("--rounds", type=int, help="rounds (5)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="which models (all)")
    parser.add_argument("--absolute", action="store_true", help="also print tokens per CPU second")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 when a limit in FILE is exceeded")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (QUICK_ROWS if options.quick else 256)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else 5)
    options.models = options.models or list(QUICK_MODELS if options.quick else MODELS)
    if options.rows < 1 or options.rounds < 1:
        parser.error("--rows and --rounds must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write, check.

    Args:
        arguments: the command line, or None for the process's own.

    Returns:
        1 when a checked limit is exceeded, else 0.
    """
    options = parse(arguments)
    torch.set_num_threads(1)
    console = Console(width=max(130, Console().width))
    facts = {
        "command": " ".join(["benchmarks/collect.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "settings": {
            "rows": options.rows,
            "row_tokens": "16 to 256; SmolLM2-135M: the demo's medical rows, loss on answers",
            "rounds": options.rounds,
            "tokens_per_batch": TOKENS_PER_BATCH,
            "directions": NUM_DIRECTIONS,
            "dtype": "float32",
            "threads": 1,
            "clock": "process CPU seconds",
            "ratio": "arm / plain forward+backward of the same round; LoRA against its own",
            "headless": "the same without the gradient of the head's weight on both sides",
            "same_products": "the same over plain whose linear layers multiply by oneDNN, as gradsift's do where it pays, both "
            "without the gradient of the head's weight for the body",
            "onednn_pays": products.pays(),
        },
    }
    machine = facts["hardware"]
    console.print(f"{machine['cpu']}, torch {machine['torch']}, one thread, float32, {options.rounds} rounds")
    results = []
    for name in options.models:
        results.append(measure_model(name, options.rows, options.rounds))
        gc.collect()  # arms and their hooks refer to each other
        show(results[-1], console, absolute=options.absolute)
        if options.json:  # after each model, so that a run cut short keeps what it has
            text = json.dumps({**facts, "models": [_as_json(r) for r in results]}, indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
    if options.check:
        rules = json.loads(options.check.read_text(encoding="utf-8"))
        problems = exceeded(results, rules["limits"], rules["quick_allowance"] if options.quick else 0.0)
        for problem in problems:
            console.print(f"[red]{problem}")
        return 1 if problems else 0
    return 0


def _as_json(result: ModelResult) -> dict:
    out = asdict(result)
    for line, raw in zip(result.lines, out["lines"], strict=True):
        if line.not_run is None:
            raw |= {"median": line.median, "min": min(line.ratios), "max": max(line.ratios)}
            for name in ("headless", "same_products"):
                raw[f"{name}_median"] = statistics.median(raw[name]) if raw[name] else None
            raw["tokens_per_cpu_second"] = result.num_tokens / statistics.median(line.seconds)
    return out


if __name__ == "__main__":
    sys.exit(main())
