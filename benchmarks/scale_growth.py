"""How cost grows with rows and tokens, and resident memory with rows; called by ``scale.py --growth``.

Cost: CPU seconds of the product's own pass (measure_shard, sketches, exact dots with two directions, all weights) with a small
Llama of random weights, one thread, shards of all sizes taking turns, the median of the rounds; the exponent is the slope of log seconds over
log size, of all sizes and of neighboring ones. Where oneDNN multiplies, a kernel is compiled for every length that occurs, so small
pools cost more a row. A row has a cost of its own beside that of its tokens (dots and folding read every weight once), and
attention costs a token the more the longer its row: the exponent over length begins below 1 and ends above. Memory: VmHWM of a process that commits stub rows of 1,024 numbers through the store's writer, with and without
their tokens in memory, as a run has them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SIZES = (1024, 2048, 4096)
LENGTHS = (64, 128, 256, 512, 1024)
LENGTH_ROWS = 64
SHARD = 16
ROUNDS = 3
STUB_ROWS = (10_000, 50_000, 200_000)


def token_rows(count: int, length: int, vocabulary: int, seed: int) -> list[Any]:
    """Rows of about one length, the second half of each trained."""
    from gradsift.types import RowStatus, TokenRow

    draw, rows = np.random.default_rng(seed), []
    for i in range(count):
        n = int(draw.integers(length // 2, length + 1))
        ids = draw.integers(0, vocabulary, n).astype(np.int32)
        rows.append(TokenRow(f"row-{seed}-{i:07}", ids, np.arange(n) >= n // 2, n, RowStatus.OK))
    return sorted(rows, key=lambda row: (row.num_tokens, row.id))


def make_pass() -> tuple[Any, Any]:
    """A small model and the engine over all of its weights, with two directions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradsift.gradients.collect import Pass
    from gradsift.gradients.directions import attach, build_direction
    from gradsift.gradients.hooks import GradientEngine
    from gradsift.gradients.project import Projector

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, max_position_embeddings=1024,
    )).eval()  # fmt: skip
    names, projector = [name for name, _ in model.named_parameters()], Projector(7, 4093)
    built = [build_direction(name, model, names, token_rows(16, 64, 1024, seed), projector, tokens_per_batch=1024, pad_id=0)
             for name, seed in (("keep", 91), ("target", 92))]  # fmt: skip
    engine = GradientEngine(model, names, projector=projector)
    attach(engine, built)
    return Pass(engine, ("keep", "target"), 1024, 0), model


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def cost() -> dict[str, Any]:
    """Measure both growths."""
    import torch

    from gradsift.gradients.collect import measure_shard

    torch.set_num_threads(1)
    run, _ = make_pass()
    cases = {("rows", n): token_rows(n, 128, 1024, 1) for n in SIZES}
    cases |= {("length", n): token_rows(LENGTH_ROWS, n, 1024, 2) for n in LENGTHS}
    spent: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    with run.engine:
        measure_shard(run, cases["rows", SIZES[0]][:32])
        # Shards of all cases take turns, each case at its own pace, so that a machine that slows down does so for all of them.
        turns = sorted(
            (start / len(rows), case, start) for case, rows in cases.items() for start in range(0, len(rows), SHARD)
        )
        for _ in range(ROUNDS):
            for case in cases:
                spent[case].append(0.0)
            for _, case, start in turns:
                begun = time.process_time()
                measure_shard(run, cases[case][start : start + SHARD])
                spent[case][-1] += time.process_time() - begun
    found: dict[str, Any] = {}
    for kind in ("rows", "length"):
        mine = [case for case in cases if case[0] == kind]
        tokens = [float(sum(row.num_tokens for row in cases[case])) for case in mine]
        typical = [statistics.median(spent[case]) for case in mine]
        sizes = [float(case[1]) for case in mine] if kind == "rows" else tokens
        found[kind] = {"sizes": [case[1] for case in mine], "tokens": tokens, "cpu_seconds": [spent[c] for c in mine],
                       "exponent": exponent(sizes, typical),
                       "steps": [exponent(sizes[k : k + 2], typical[k : k + 2]) for k in range(len(typical) - 1)]}  # fmt: skip
    return found


def commit_stub(folder: Path, num_rows: int, with_tokens: bool) -> None:
    """Commit rows of made-up numbers; their tokens are in memory or made shard by shard."""
    from scale_world import planted, spec_of, unit

    from gradsift.store.spec import store_folder
    from gradsift.store.writer import open_writer

    truth, spec = planted(1024), spec_of(1024)
    rows = (
        [
            row
            for start in range(0, num_rows, 10_000)
            for row in token_rows(min(10_000, num_rows - start), 128, 1024, start)
        ]
        if with_tokens
        else []
    )
    with open_writer(store_folder(folder / "signals", spec), spec) as writer:
        for start in range(0, num_rows, 64):
            writer.commit(unit(truth, start, min(64, num_rows - start)))
    assert not rows or len(rows) == num_rows


def growth(given: argparse.Namespace) -> None:
    """Measure, print and write."""
    from scale import ROOT, hardware, in_own_process

    from gradsift.manifest import git_sha, versions

    found: dict[str, Any] = {
        "command": "python benchmarks/scale.py " + " ".join(sys.argv[1:]), "date": str(date.today()),
        "commit": given.commit or git_sha(ROOT), "versions": versions(), "hardware": hardware(), "memory": {},
    }  # fmt: skip
    for tokens in ("stub", "stub_tokens"):
        for rows in STUB_ROWS if given.rows == [1_000_000] else given.rows:
            words = ["--step", tokens, "--folder", str(given.folder / f"{tokens}{rows}"), "--rows", str(rows)]
            one = in_own_process(words)
            found["memory"][f"{tokens} {rows}"] = one
            print(f"{tokens:12} {rows:8} {json.dumps(one)[:300]}", flush=True)
    found["cost"] = cost()
    for kind, one in found["cost"].items():
        steps = ", ".join(f"{step:.3f}" for step in one["steps"])
        typical = ", ".join(f"{statistics.median(s):.2f}" for s in one["cpu_seconds"])
        print(f"{kind:7} {one['sizes']} exponent {one['exponent']:.3f} (steps {steps}), CPU seconds {typical}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
