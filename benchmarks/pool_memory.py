"""Resident memory of reading, tokenizing and measuring pools of several sizes, with made-up numbers in place of a model.

``python benchmarks/pool_memory.py --rows 10000 50000 200000 --json FILE`` writes JSON Lines of about 1,000 bytes a row (words
by Zipf's law, a BPE tokenizer trained on them: about 190 tokens a row), and runs ``prepare`` and one pass over the pool in a
fresh process per size. The pass reads every row's tokens and commits shards of 64 rows through the store's writer, with
sketches of 64 numbers. Anonymous memory is what the process holds; resident memory also counts pages of files, which the
system takes back when it needs them. The growth per row is that between the two largest sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIM, ROW_BYTES, NUM_WORDS = 64, 1000, 6000


def words() -> list[str]:
    """Make 6,000 words of two to four syllables."""
    import numpy as np

    random, parts = np.random.default_rng(0), [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return ["".join(random.choice(parts, size=int(random.integers(2, 5)))) for _ in range(NUM_WORDS)]


def write_pool(path: Path, num_rows: int) -> None:
    """Write rows of about ``ROW_BYTES`` bytes; a row depends on its number alone."""
    import numpy as np

    known = words()
    weight = 1 / np.arange(1, NUM_WORDS + 1)
    bounds = np.cumsum(weight / weight.sum())
    with path.open("wb") as file:
        for number in range(num_rows):
            random = np.random.default_rng(number)
            length = int(random.integers(ROW_BYTES // 2, ROW_BYTES * 3 // 2)) // 7
            text = " ".join(known[min(i, NUM_WORDS - 1)] for i in np.searchsorted(bounds, random.random(length)))
            file.write(json.dumps({"text": text, "number": number}).encode() + b"\n")


def write_navigator(folder: Path, pool: Path) -> None:
    """Save a toy model with a tokenizer that was trained on the first rows."""
    from tests.toy import toy_llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    with pool.open() as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(1000), file, strict=False)]
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    toy_llama(seed=3).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], pad_token=special[0]).save_pretrained(
        folder
    )


def memory() -> dict[str, float]:
    """MiB held now, and the peak since the last look."""
    text = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in text.splitlines() if line.endswith("kB")}
    Path("/proc/self/clear_refs").write_text("5")
    return {"anonymous": found["RssAnon"], "resident": found["VmRSS"], "peak": found["VmHWM"]}


def child(pool: Path, navigator: Path, out: Path) -> dict[str, Any]:
    """Run prepare and a pass in this process."""
    import numpy as np

    from gradsift.launch.bench import INLINE, Bench
    from gradsift.methods import make_method
    from gradsift.pipeline.measure import measured_rows
    from gradsift.pipeline.prepare import prepare
    from gradsift.pipeline.progress import Clock, Silent
    from gradsift.recipe import build_recipe
    from gradsift.store.shards import ShardResult
    from gradsift.store.signals import open_store
    from gradsift.store.spec import GradientSpec, Projection, content_hash
    from gradsift.store.writer import open_writer

    spec = GradientSpec(
        parameters="all", parameters_sha256="p" * 64, model_sha256="m" * 64, tokenizer_sha256="t" * 64, loss_on="all",
        max_length=1024, signals=("loss", "grad_norm", "sketch"), code_version="stub", anchors={},
        projection=Projection(DIM, 42, "stub"), adapter_sha256=None, template_sha256=None,
    )  # fmt: skip

    def stub(rows: Any) -> ShardResult:
        n = len(rows)
        loss = np.array([float(row.input_ids[row.trained].mean()) for row in rows])
        nan, sketch = np.full(n, np.nan), np.ones((n, DIM), np.float32) / DIM**0.5
        hashes = tuple(content_hash(row.input_ids, row.trained) for row in rows)
        return ShardResult(
            tuple(row.id for row in rows), hashes, tuple(row.status for row in rows), ("",) * n,
            np.array([row.num_tokens for row in rows]), np.array([row.num_trained for row in rows]),
            loss, np.ones(n), nan, nan, np.zeros((n, 0)), (), sketch,
        )  # fmt: skip

    recipe = build_recipe(
        {"pool": [{"label": "pool", "path": str(pool)}], "navigator": {"model": str(navigator)}, "budget": "10%",
         "method": {"name": "norm"}}
    )  # fmt: skip
    steps: dict[str, dict[str, float]] = {}

    def note(name: str) -> None:
        gc.collect()
        nonlocal begun
        steps[name] = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu, **memory()}
        begun = time.perf_counter()

    begun, cpu = time.perf_counter(), time.process_time()
    note("start")
    prepared = prepare(recipe, make_method("norm", {}), Clock(Silent()))
    note("prepare")
    rows = measured_rows(prepared)
    bench = Bench("signals", out, spec, rows, 64, stub, lambda *_: None, {})
    with open_writer(out, spec) as writer:
        INLINE.collect(bench, writer, lambda: None)
    note("measure")
    store = open_store(out, spec)
    note("open the store")
    tokens = sum(row.num_tokens for row in rows)
    return {
        "rows": len(rows),
        "stored": store.size,
        "tokens": tokens,
        "pool_bytes": pool.stat().st_size,
        "steps": steps,
    }


def run(size: int, again: bool) -> list[dict[str, Any]]:
    """Run one size in fresh processes: with an empty cache, and once more where asked."""
    with tempfile.TemporaryDirectory(prefix="gradsift-pool-", dir=os.environ.get("GRADSIFT_BENCH_DIR")) as name:
        place, found = Path(name), []
        write_pool(place / "pool.jsonl", size)
        write_navigator(place / "navigator", place / "pool.jsonl")
        for number in range(1 + again):
            arguments = [str(place / "pool.jsonl"), str(place / "navigator"), str(place / f"signals-{number}")]
            environment = {**os.environ, "GRADSIFT_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, __file__, "--child", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            found.append({"cache": "found" if number else "made", **json.loads(done.stdout.splitlines()[-1])})
        return found


def growth(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Bytes per row between the two largest sizes."""
    small, large = sorted((one for one in runs if one["cache"] == "made"), key=lambda one: one["rows"])[-2:]
    rows = large["rows"] - small["rows"]
    return {
        step: {k: (after[k] - small["steps"][step][k]) * 2**20 / rows for k in ("anonymous", "resident", "peak")}
        for step, after in large["steps"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--again", action="store_true", help="a second process that finds the tokens in the cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    runs = []
    for size in options.rows:
        for one in run(size, options.again):
            runs.append(one)
            print(
                f"{one['rows']:,} rows, {one['tokens']:,} tokens, {one['pool_bytes'] / 2**20:,.0f} MiB of text, cache {one['cache']}"
            )
            for step, m in one["steps"].items():
                print(f"  {step:15} {m['seconds']:8.1f} s {m['anonymous']:8.0f} MiB anonymous {m['resident']:8.0f} resident "
                      f"{m['peak']:8.0f} peak")  # fmt: skip
    result = {"runs": runs, "bytes_per_row": growth(runs) if len(options.rows) > 1 else {}}
    for step, found in result["bytes_per_row"].items():
        print(f"growth, {step:15}" + "".join(f" {name} {value:,.0f}" for name, value in found.items()) + " bytes a row")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
