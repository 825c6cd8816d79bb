"""Time gradient collection on one GPU beside plain forward+backward: wall time from CUDA events, interleaved rounds.

What is expected on an H100 (800 TFLOP/s on large bf16 products, 3.3 TB/s, L2 about 5.5 TB/s), written before the first run;
0.5B, 16,384 tokens a batch, half of them supervised, rows of 128 tokens, milliseconds:

    body products, each of forward, input gradients, weight gradients: 11.7 TFLOP, 20 at 600 TFLOP/s
    head products: 2.2 TFLOP each, 4; logits are passed over a handful of times (2.5 GB each): 8
    norms, rotations, SiLU, residuals of an unfused model (memory): 15 forward, 25 backward
    plain 130, forward 45, floor 107 (0.82 of plain: it saves the weight gradients' 24)
    exact, body: + the direct product at 128 x 128 tiles, whose tokens come from L2 at 64 flop a byte (350 TFLOP/s): 33,
        and its sums, (M + 1) multiply-adds for each weight and example, half hidden: 6; about 146 (1.12)
    the same at 512 tokens: sums are a quarter: about 142 (1.09); at 2,048 the same but for attention
    sketch alone, body: + folds, which read every factor once (3 GB a layer pair) and small products: 12; 119 (0.91)
    exact with sketch, body: about 158 (1.21); every weight: + head product 7, embeddings 3, norms 2: about 170 (1.3)
    the engine's own loss reads bf16 logits three times where plain reads and writes them five times: -3 in all of ours
    torch road: gradients are written and read: 358M x 128 x 4 bytes, three times: 550 GB, + 170: about 290 (2.2)

Rows of 512 and 2,048 tokens need a quarter and a sixteenth of the sums and of the torch road's traffic. 1.5B at
8,192 tokens a batch: products are larger, so all ratios fall by a few hundredths. ``--toy`` runs the same script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from worlds import Batch, backward, body_weights, freeze, row_losses, share

from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector

M, SKETCH = 3, 4093
SHAPES: dict[str, dict[str, int]] = {
    "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
             "intermediate_size": 4864, "vocab_size": 151_936, "tokens": 16_384},
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
             "intermediate_size": 8960, "vocab_size": 151_936, "tokens": 8192},
    "toy": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "vocab_size": 260, "tokens": 64},
}  # fmt: skip
CELLS = (("0.5B", 128), ("0.5B", 512), ("1.5B", 128), ("1.5B", 512), ("1.5B", 2048), ("0.5B", 2048))
TOY_CELLS = (("toy", 8), ("toy", 16))
LEAST_SECONDS = 6.0  # what a cell needs, building the model apart


@dataclass
class Arm:
    """One line of a cell.

    Args:
        key: short name.
        step: the timed work.
        milliseconds: of each round.
        peak_gib: memory above what was held before the step.
        not_run: why there are no figures.
    """

    key: str
    step: Callable[[Batch], Any]
    milliseconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    not_run: str | None = None


@dataclass(frozen=True)
class Clock:
    """Times one call: CUDA events on a GPU, the wall elsewhere."""

    device: torch.device

    def time(self, call: Callable[[], Any]) -> float:
        """Milliseconds of a call on an idle device."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a Llama of random weights with a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {k: v for k, v in SHAPES[name].items() if k != "tokens"}
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=4096, attn_implementation="sdpa")
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def build_batch(length: int, tokens: int, vocabulary: int, device: torch.device) -> Batch:
    """Draw rows of one length; the second half of each is trained."""
    num = max(1, tokens // length)
    ids = torch.randint(1, vocabulary, (num, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return Batch(list(range(num)), ids.to(device), labels.to(device), torch.full((num,), length))


def draw_directions(engine: GradientEngine) -> dict[str, Tensor]:
    """Draw M directions; their sign flips do not change their distribution."""
    generator = torch.Generator(engine.device).manual_seed(2)
    size = sum(block.numel for block in engine.blocks.values()) ** -0.5
    return {
        name: torch.randn(M, block.numel, device=engine.device, generator=generator) * size
        for name, block in engine.blocks.items()
    }


def make_arms(model: nn.Module) -> list[Arm]:
    """Set every arm up on its own copy of the modules; the weights and directions are shared."""
    plain, floor, looks = share(model), share(model), share(model)
    freeze(floor)

    def train(batch: Batch) -> None:
        for parameter in plain.parameters():
            parameter.grad = None
        backward(plain, batch)

    def look(batch: Batch) -> None:
        with torch.no_grad():
            row_losses(looks, batch.input_ids, batch.labels)

    arms = [Arm("plain", train), Arm("forward", look), Arm("floor", lambda batch: backward(floor, batch))]
    scopes = {"body": body_weights(model), "every weight": [name for name, _ in model.named_parameters()]}
    drawn: dict[str, Tensor] = {}
    for scope, names in reversed(scopes.items()):
        for key, exact, sketch, road in (
            ("sketch", False, True, "auto"),
            ("exact", True, False, "auto"),
            ("exact+sketch", True, True, "auto"),
            ("exact+sketch, torch road", True, True, "torch"),
        ):
            if road == "torch" and scope != "body":
                continue
            projector = Projector(0, SKETCH) if sketch else None
            engine = GradientEngine(share(model), names, projector=projector, norms=exact, edges=False, road=road)
            if exact:
                drawn = drawn or draw_directions(engine)
                engine.num_directions = M
                for name, block in engine.blocks.items():
                    block.directions = drawn[name]
            engine.__enter__()
            arms.append(Arm(f"{key}, {scope}" if road == "auto" else key, _measure(engine)))
    return arms


def _measure(engine: GradientEngine) -> Callable[[Batch], Any]:
    return lambda batch: engine.measure(batch.input_ids, batch.labels, batch.lengths)


def warm_up(arms: Sequence[Arm], batch: Batch, clock: Clock) -> dict[str, float]:
    """Run every arm twice, kernels are built in the first; keep peak memory; return seconds of the first run."""
    first = {}
    for arm in arms:
        try:
            first[arm.key] = clock.time(lambda arm=arm: arm.step(batch)) / 1000
            if clock.device.type == "cuda":
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                arm.step(batch)
                torch.cuda.synchronize()
                arm.peak_gib = (torch.cuda.max_memory_allocated() - held) / 2**30
            else:
                arm.step(batch)
        except Exception as error:  # one arm's failure must not cost the others their figures
            arm.not_run = f"{type(error).__name__}: {error}"[:400]
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
    return first


def time_rounds(arms: Sequence[Arm], batch: Batch, clock: Clock, until: float, most: int) -> int:
    """Time the arms in turns, in rotating order, until the deadline, three rounds at least.

    Args:
        arms: warm.
        batch: what each step gets.
        clock: of the device.
        until: time.monotonic() after which no round begins.
        most: rounds.

    Returns:
        Rounds done.
    """
    live = [arm for arm in arms if arm.not_run is None]
    if not live:
        return 0
    gc.collect()
    gc.disable()
    done = 0
    try:
        while done < most and (done < 3 or time.monotonic() < until):
            shift = done * 3 % len(live)
            for arm in [*live[shift:], *live[:shift]]:
                if "torch road" in arm.key and done >= 3:
                    continue
                arm.milliseconds.append(clock.time(lambda arm=arm: arm.step(batch)))
            done += 1
    finally:
        gc.enable()
    return done


def peak_tflops(clock: Clock, size: int, dtype: torch.dtype) -> float:
    """Speed of one large product, the best of ten."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(clock.time(lambda: a @ b) for _ in range(10)) / 1e9


def time_kernels(clock: Clock, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Time the fused products alone: where the exact arms' time goes."""
    from gradsift.gradients import fused
    from gradsift.gradients.spans import Spans

    if clock.device.type != "cuda" or fused.why_not() is not None:
        return []
    out = []
    for rows, cols in ((4864, 896), (896, 896), (8960, 1536)):
        for length in (128, 512, 2048):
            num, count = 16_384 // length, 16_384
            x, g = (torch.randn(count, n, device=clock.device, dtype=dtype) for n in (cols, rows))
            spans = Spans.of((length,) * num, None, length)
            drawn = torch.randn(M, rows * cols, device=clock.device)
            plain = min(clock.time(lambda x=x, g=g: g.t() @ x) for _ in range(5))
            for m in (0, 1, 2, M):
                some = drawn[:m] if m else None

                def call(x: Tensor = x, g: Tensor = g, spans: Any = spans, some: Tensor | None = some) -> None:
                    fused.squares_and_dots(x, g, spans, some)

                call()
                took = min(clock.time(call) for _ in range(5))
                out.append({
                    "rows": rows, "cols": cols, "length": length, "directions": m, "ms": took,
                    "tflops": 2 * count * rows * cols / took / 1e9, "weight_gradient_ms": plain,
                    "gram": not m and fused.gram_pays(spans, rows, cols),
                })  # fmt: skip
    return out


def profile(arm: Arm, batch: Batch) -> list[dict[str, Any]]:
    """Name the kernels that one step spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        arm.step(batch)
        torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1000
    rows = [{"kernel": e.key[:90], "ms": e.self_device_time_total / 1000, "calls": e.count} for e in events[:25]]
    return [{"kernel": "all", "ms": total, "calls": sum(e.count for e in events)}, *rows]


def agreement(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Compare the roads on two rows, in units of the gradient's norm: same factors but for the backward's own rounding."""
    names, got = body_weights(model), []
    some = [t[:2] for t in (batch.input_ids, batch.labels, batch.lengths)]
    for road in ("auto", "torch", "torch"):
        engine = GradientEngine(share(model), names, projector=Projector(0, SKETCH), edges=False, road=road)
        drawn = draw_directions(engine)
        engine.num_directions = M
        for name, block in engine.blocks.items():
            block.directions = drawn[name]
        with engine:
            got.append(engine.measure(*some))
    a, b, again = got
    norm = b.square.sqrt()
    assert a.sketch is not None
    assert b.sketch is not None
    return {
        "loss": float((a.loss - b.loss).abs().max()),
        "norm": float((a.square.sqrt() / norm - 1).abs().max()),
        "dots": float(((a.dots - b.dots).abs().max(1).values / norm).max()),
        "sketch": float(((a.sketch - b.sketch).norm(dim=1) / norm).max()),
        "norm, torch road twice": float((again.square.sqrt() / norm - 1).abs().max()),
    }


def measure_cell(
    name: str, length: int, model: nn.Module, clock: Clock, options: argparse.Namespace, until: float
) -> dict:
    """Measure one model and length.

    Args:
        name: key of SHAPES.
        length: tokens of a row.
        model: built.
        clock: of the device.
        options: the command line.
        until: time.monotonic() after which no round begins.

    Returns:
        What is written for it.
    """
    shape = SHAPES[name]
    tokens = options.tokens or shape["tokens"]
    batch = build_batch(length, tokens, shape["vocab_size"], clock.device)
    arms = make_arms(model)
    first = warm_up(arms, batch, clock)
    rounds = time_rounds(arms, batch, clock, until, options.rounds)
    body = sum(p.numel() for n, p in model.named_parameters() if n in set(body_weights(model)))
    head = shape["vocab_size"] * shape["hidden_size"]
    trained = int((batch.labels[:, 1:] != -100).sum())
    base = next(arm for arm in arms if arm.key == "plain")
    lines = []
    for arm in arms:
        line: dict[str, Any] = {k: v for k, v in asdict(arm).items() if k != "step"}
        if arm.milliseconds and base.milliseconds:
            pairs = list(zip(arm.milliseconds, base.milliseconds, strict=False))
            ratios = [a / b for a, b in pairs]
            line |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
                     "median_ms": statistics.median(arm.milliseconds),
                     "tokens_per_second": 1000 * batch.num_tokens / statistics.median(arm.milliseconds)}  # fmt: skip
        lines.append(line)
    flops = 6 * (body * batch.num_tokens + head * trained)
    cell: dict[str, Any] = {
        "model": name, "length": length, "rows": len(batch.indices), "tokens": batch.num_tokens, "trained": trained,
        "body_weights": body, "head_weights": head, "rounds": rounds, "first_step_seconds": first, "arms": lines,
        "plain_tflop": flops / 1e12,
    }  # fmt: skip
    if base.milliseconds:
        cell["plain_tflops"] = flops / statistics.median(base.milliseconds) / 1e9
    for key in ("exact+sketch, every weight", "plain") if clock.device.type == "cuda" and length == 128 else ():
        arm = next(a for a in arms if a.key == key)
        if arm.not_run is None:
            try:
                cell.setdefault("profile", {})[key] = profile(arm, batch)
            except Exception as error:  # an aid, not a figure
                cell.setdefault("profile", {})[key] = [{"kernel": f"{type(error).__name__}: {error}"[:200]}]
    return cell


def show(facts: dict[str, Any]) -> None:
    """Print the short table."""
    for cell in facts["cells"]:
        print(f"\n{cell['model']}, rows of {cell['length']}, {cell['tokens']:,} tokens, {cell['rounds']} rounds, "
              f"plain {cell.get('plain_tflops', 0):.0f} TFLOP/s of {facts['peak_tflops']:.0f}")  # fmt: skip
        for line in cell["arms"]:
            if line.get("ratio") is None:
                print(f"  {line['key']:<34} not run: {(line['not_run'] or '')[:150]}")
                continue
            print(f"  {line['key']:<34} {line['ratio']:5.2f} [{line['ratio_min']:.2f}..{line['ratio_max']:.2f}] "
                  f"{line['median_ms']:8.1f} ms {line['tokens_per_second']:11,.0f} tokens/s {line['peak_gib']:6.1f} GiB")  # fmt: skip
    for one in facts["kernels"]:
        print(f"  kernel {one['rows']}x{one['cols']} L={one['length']} M={one['directions']}{' gram' if one['gram'] else ''}: "
              f"{one['ms']:.3f} ms, {one['tflops']:.0f} TFLOP/s (weight gradient {one['weight_gradient_ms']:.3f})")  # fmt: skip
    for cell in facts["cells"]:
        for key, rows in cell.get("profile", {}).items():
            print(f"  profile of {key}, {cell['model']}:")
            for row in rows[:13]:
                print(f"    {row.get('ms', 0):8.2f} ms {row.get('calls', 0):6d} {row['kernel'][:80]}")
    print("engine:", facts["engine"], "| roads agree to", facts["agreement"])
    print("not measured:", ", ".join(facts["not_measured"]) or "nothing", f"| {facts['seconds']:.0f} s in all")


def write(facts: dict[str, Any], path: Path | None) -> None:
    """Write everything measured so far."""
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def hardware(device: torch.device) -> dict[str, Any]:
    """Name the device and the versions."""
    out: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "transformers"):
        try:
            out[package] = __import__(package).__version__
        except ImportError:
            out[package] = None
    out["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return out


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0, help="of the whole run (150); what is left out is said")
    parser.add_argument("--rounds", type=int, default=9, help="of a cell, at most (9)")
    parser.add_argument("--tokens", type=int, help="of a batch (16384 for 0.5B, 8192 for 1.5B)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured, after each cell")
    parser.add_argument("--commit", default="unknown", help="commit to note, where git is not at hand")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print the table of an earlier run and measure nothing"
    )
    parser.add_argument("--toy", action="store_true", help="the same on a CPU, with a model of 50 thousand weights")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print.

    Args:
        arguments: the command line, or None for the process's own.

    Returns:
        0, or 2 without a GPU.
    """
    options = parse(arguments)
    if options.show:
        show(json.loads(options.show.read_text("utf-8")))
        return 0
    start = time.monotonic()
    if not options.toy and not torch.cuda.is_available():
        print("torch sees no GPU; --toy runs on a CPU")
        return 2
    device = torch.device("cpu" if options.toy else "cuda")
    dtype = torch.float32 if options.toy else torch.bfloat16
    clock, cells = Clock(device), TOY_CELLS if options.toy else CELLS
    facts: dict[str, Any] = {
        "command": " ".join(["benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": options.commit,
        "hardware": hardware(device), "directions": M, "sketch": SKETCH, "dtype": str(dtype)[6:],
        "peak_tflops": peak_tflops(clock, 256 if options.toy else 8192, dtype), "kernels": [], "agreement": {},
        "engine": "", "cells": [], "not_measured": [], "seconds": 0.0,
    }  # fmt: skip
    model, built = None, None
    for number, (name, length) in enumerate(cells):
        left = options.seconds - (time.monotonic() - start)
        if left < LEAST_SECONDS and number:
            facts["not_measured"].append(f"{name} at {length}")
            continue
        try:
            if built != name:
                model = None
                gc.collect()
                torch.cuda.empty_cache()
                model, built = build_model(name, device, dtype), name
            assert model is not None
            if number == 0:
                facts["engine"] = GradientEngine(share(model), ["model.norm.weight"]).description
                facts["agreement"] = agreement(
                    model, build_batch(length, 2 * length, SHAPES[name]["vocab_size"], device)
                )
                facts["kernels"] = time_kernels(clock, dtype)
                left = options.seconds - (time.monotonic() - start)
            until = time.monotonic() + left / (len(cells) - number) * 0.75  # warming up takes its share
            facts["cells"].append(measure_cell(name, length, model, clock, options, until))
        except Exception as error:  # what was measured before must be kept
            facts["not_measured"].append(f"{name} at {length} ({type(error).__name__}: {error})"[:400])
            model, built = None, None
        gc.collect()
        torch.cuda.empty_cache()
        facts["seconds"] = time.monotonic() - start
        print(f"{name} at {length}: {facts['seconds']:.0f} s", flush=True)
        write(facts, options.json)
    write(facts, options.json)  # what the time did not reach is known now
    show(facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
