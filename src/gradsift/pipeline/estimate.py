"""``--dry-run``: rows, tokens, memory, disk and time before anything is spent.

Time is arithmetic: multiplications per token times tokens, over the speed of a matrix product measured now, times the
share of it that whole models reach. It is right within about a factor of two; the progress bar knows better.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gradsift.methods import make_method
from gradsift.pipeline.asked import wants_gradients
from gradsift.pipeline.forward import measures_prompts
from gradsift.pipeline.measure import measured_rows
from gradsift.pipeline.memory import PassMemory, pass_memory, resident, with_budget
from gradsift.pipeline.pass_cost import ScreenPlan, pass_work, plan_screen
from gradsift.pipeline.prepare import Prepared, prepare
from gradsift.pipeline.probe_design import design_probes
from gradsift.pipeline.progress import Clock, Progress
from gradsift.pipeline.proxy_check import ProxyTokens, proxy_tokens
from gradsift.pipeline.warm import num_warmup_tokens
from gradsift.recipe import Recipe, parse_budget

REACHED = 0.6  # share of a matrix product's speed that a forward and backward of a whole model reaches on a CPU
BYTES_PER_ROW = 220  # row table and record, beside the sketch and the embedding


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Args:
        rows: usable rows per role.
        read: rows read per role.
        tokens: tokens to measure per role; none where the method needs no model.
        trained: trained tokens of the pool.
        budget: what was asked.
        num_parameters: weights of the navigator.
        cost: ``text``, ``forward``, ``probe`` or ``gradient``.
        memory: memory at the peak by parts; None where no model is needed.
        held_bytes: what this process holds now, libraries and rows.
        tokens_per_batch: the budget of a micro-batch, as given or as it was chosen.
        disk_bytes: signals on disk.
        seconds: wall time of the measuring without a screen, rough.
        remarks: notes on the data.
        num_probes: short trainings.
        trained_by_probes: tokens they train on, repeats included.
        judged_by_probes: tokens they send forward afterwards.
        warmup_tokens: tokens that the navigator is trained on before the pass.
        num_passes: passes over the pool, one per checkpoint.
        proxy: what trainings in rounds would take.
        screen: what its two stages would take; None without one.
    """

    rows: dict[str, int]
    read: dict[str, int]
    tokens: dict[str, int]
    trained: int
    budget: str
    num_parameters: int
    cost: str
    memory: PassMemory | None
    held_bytes: int
    tokens_per_batch: int
    disk_bytes: int
    seconds: float
    remarks: tuple[str, ...]
    num_probes: int = 0
    trained_by_probes: int = 0
    judged_by_probes: int = 0
    warmup_tokens: int = 0
    num_passes: int = 1
    proxy: ProxyTokens = field(default_factory=ProxyTokens)
    screen: ScreenPlan | None = None

    @property
    def memory_bytes(self) -> int:
        """Memory at the peak: resident, or of the device that the model is on."""
        return self.held_bytes if self.memory is None else self.memory.peak

    def _parts(self) -> str:
        if self.memory is None:
            return ""
        parts = ", ".join(f"{name} {_size(size)}" for name, size in self.memory.lines())
        where = "" if self.memory.device == "cpu" else f" on {self.memory.device}"
        how = "" if self.memory.traced else " (by a formula: this model's forward cannot be traced without weights)"
        return f"{where}: {parts}; micro-batches of {self.tokens_per_batch:,} tokens{how}"

    def lines(self) -> Iterator[tuple[str, str]]:
        """Give the plan as (part, estimate) pairs for a table.

        Yields:
            Pairs of text.
        """
        for name, count in self.rows.items():
            tokens = f", {self.tokens[name]:,} tokens to measure" if name in self.tokens else ""
            yield f"rows of {name}", f"{count:,} usable of {self.read[name]:,} read{tokens}"
        yield "budget", f"{self.budget} of {self.rows['pool']:,} rows with {self.trained:,} trained tokens"
        kind = "forward" if self.cost in ("probe", "proxy") else self.cost
        yield "navigator", f"{self.num_parameters / 1e6:.1f}M weights, one {kind} pass"
        if "active anchors" in self.tokens:
            yield "active anchors", f"{self.tokens['active anchors']:,} tokens to measure before they are chosen"
        if self.warmup_tokens:
            passes = f", and {self.num_passes} passes" if self.num_passes > 1 else ""
            yield "warm-up", f"{self.warmup_tokens:,} tokens to train the navigator on first{passes}"
        if self.num_probes:
            trained, judged = f"{self.trained_by_probes:,} tokens to train on", f"{self.judged_by_probes:,} to judge"
            yield "probes", f"{self.num_probes} short trainings: {trained}, {judged}"
        if self.proxy.num_runs:
            both, forward = f"about {self.proxy.both:,} tokens forward and backward", f"{self.proxy.forward:,} forward"
            trainings = f"{self.proxy.num_runs} training{'s' * (self.proxy.num_runs > 1)} in rounds"
            yield "proxy", f"{trainings}: {both}, {forward}"
        if self.screen is not None:
            yield "screen", self.screen.words()
        yield "memory", f"about {_size(self.memory_bytes)} at the peak" + self._parts()
        yield "disk", f"about {self.disk_bytes / 2**20:.1f} MiB of signals"
        times = (
            [self.seconds] if self.screen is None else [self.seconds * n for n in (self.screen.least, self.screen.most)]
        )
        yield "time", f"about {' to '.join(map(human_time, times))} to measure (within a factor of two)"
        for remark in self.remarks:
            yield "note", remark


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.0f} MiB"


def human_time(seconds: float) -> str:
    """Write a duration.

    Args:
        seconds: how long.

    Returns:
        Such as ``45 s``, ``12 min`` or ``3.4 h``.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(recipe: Recipe, progress: Progress) -> Plan:
    """Read and tokenize everything and work out what measuring it would take; no weights are loaded.

    Args:
        recipe: the run's settings.
        progress: who is told.

    Returns:
        The plan.
    """
    method = make_method(recipe.method.name, recipe.method.settings)
    parse_budget(recipe.budget)
    prepared = prepare(recipe, method, Clock(progress))
    cost = "gradient" if wants_gradients(prepared) else method.needs.cost_class
    prompts = measures_prompts(prepared)
    if cost != "text":
        prepared = with_budget(prepared, measured_rows(prepared), gradients=cost == "gradient", prompts=prompts)
    counts = weight_count(prepared.resolved.folder)
    measured = {"pool": sum(row.num_tokens for row in measured_rows(prepared))} if cost != "text" else {}
    if cost == "gradient":
        measured |= {s.name: sum(row.num_tokens for row in s.usable) for s in prepared.directions}
    elif "embedding" in method.needs.signals and prepared.target is not None:
        measured[prepared.target.name] = sum(row.num_tokens for row in prepared.target.usable)
    if "alone_loss" in method.needs.signals:  # a forward of its own, over the trained tokens
        measured["answers alone"] = sum(row.num_trained + 1 for row in measured_rows(prepared))
    if method.needs.probes is not None:
        measured |= {s.name: sum(row.num_tokens for row in s.usable) for s in prepared.anchors}
    if cost == "gradient" and recipe.active_anchors is not None:  # one more pass, over all their rows and the target's
        measured["active anchors"] = sum(measured[s.name] for s in prepared.directions)
    lora = recipe.navigator.parameters == "lora"
    num_probes, trained, judged = _probes(prepared)
    warmed, passes = _warmup(prepared)
    proxy = proxy_tokens(prepared)
    whole = pass_work(prepared, recipe.collect) if cost == "gradient" else 0.0
    products = {"text": 0, "forward": 2, "probe": 2, "proxy": 2, "gradient": whole}[cost]
    work = products * passes * sum(measured.values()) + (4 if lora else 6) * (trained + warmed + proxy.both)
    work += 2 * (judged + proxy.forward)
    seconds = counts * work / (REACHED * product_speed()) if measured else 0.0
    roles = (prepared.pool, *prepared.directions)
    return Plan(
        rows={s.name: len(s.usable) for s in roles},
        read={s.name: len(s.tokens) for s in roles},
        tokens=measured,
        trained=sum(row.num_trained for row in prepared.pool.usable),
        budget=recipe.budget,
        num_parameters=counts,
        cost=cost,
        memory=None
        if cost == "text"
        else pass_memory(
            prepared,
            measured_rows(prepared),
            gradients=cost == "gradient",
            num_gradients=proxy.num_gradients,
            prompts=prompts,
        ),
        held_bytes=resident(),
        tokens_per_batch=prepared.recipe.collect.tokens_per_batch,
        disk_bytes=_disk(prepared, cost),
        seconds=seconds,
        remarks=tuple(note.text for note in prepared.notes),
        num_probes=num_probes,
        trained_by_probes=trained,
        judged_by_probes=judged,
        warmup_tokens=warmed,
        num_passes=passes,
        proxy=proxy,
        screen=plan_screen(prepared),
    )


def _warmup(prepared: Prepared) -> tuple[int, int]:
    """Tokens that the navigator is trained on first, and passes over the pool."""
    warmup = prepared.method.needs.warmup
    if warmup is None:
        return 0, 1
    passes = 1 if warmup.direction == "none" else warmup.num_checkpoints
    return num_warmup_tokens(measured_rows(prepared), warmup, prepared.recipe.seed), passes


def _probes(prepared: Prepared) -> tuple[int, int, int]:
    """Probes, tokens that they train on and tokens that they judge."""
    if prepared.method.needs.probes is None:
        return 0, 0, 0
    design = design_probes(prepared, sorted(prepared.pool.usable, key=lambda row: row.id))
    tokens = [design.tokens(plan) for plan in design.plans]
    return len(tokens), sum(t for t, _ in tokens), sum(j for _, j in tokens)


def weight_count(folder: Path) -> int:
    """Count a model's weights from the headers of its safetensors files, without reading them.

    Args:
        folder: a model folder.

    Returns:
        Number of weights.
    """
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                size = 1
                for n in file.get_slice(name).get_shape():
                    size *= n
                total += size
    return total


def product_speed(seconds: float = 0.3) -> float:
    """Measure floating-point operations per second of a float32 matrix product on this machine.

    Args:
        seconds: how long to measure.

    Returns:
        Operations (multiplications and additions) per second.
    """
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    torch.mm(a, b)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        torch.mm(a, b)
        count += 1
    return count * 2 * 512**3 / (time.perf_counter() - begun)


def _disk(prepared: Prepared, cost: str) -> int:
    sketch = 2 * prepared.recipe.collect.sketch_dim * _warmup(prepared)[1] if cost == "gradient" else 0
    embeds = "embedding" in prepared.method.needs.signals or prepared.recipe.collect.signals == "all"
    layers = len(prepared.method.needs.layers)
    embedding = 4 * _width(prepared) * (embeds + layers)
    return 0 if cost == "text" else len(measured_rows(prepared)) * (sketch + embedding + BYTES_PER_ROW)


def _width(prepared: Prepared) -> int:
    config = json.loads((prepared.resolved.folder / "config.json").read_text("utf-8"))
    return int(config.get("hidden_size", config.get("n_embd", 1024)))
