"""How fast float32 products are here by torch (MKL), numpy and oneDNN, and what oneDNN's operator must be spared.

The figures of docs/decisions/0012-products-on-a-cpu.md: best of five tenths of a second, CPU seconds of one thread. Odd layouts and
the memory of compiled kernels are measured once, in a process of their own where the size of the caches differs.

    python benchmarks/products.py --json docs/results/products.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import torch
from scale import ROOT, hardware, memory_now

from gradsift.gradients import products
from gradsift.manifest import git_sha, versions

SHAPES = ((2048, 256, 256), (2048, 768, 256), (2048, 512, 512), (2048, 1536, 512), (512, 512, 136), (113, 576, 136))
CACHES = {
    "as they are": {},
    "as gradsift sets them": {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "32"},
}


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply by oneDNN, in whatever layout the factors are."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def best(work: Callable[[], Any], seconds: float = 0.1) -> float:
    """CPU seconds of one call, the least of five tries."""
    work()
    found = []
    for _ in range(5):
        begun, count = time.process_time(), 0
        while time.process_time() - begun < seconds:
            work()
            count += 1
        found.append((time.process_time() - begun) / count)
    return min(found)


def speeds() -> list[dict[str, Any]]:
    """GFLOP/s of every shape [m, k] times [n, k]'."""
    out = []
    for m, n, k in SHAPES:
        a, b, into = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        ways = {
            "torch": lambda a=a, b=b, into=into: torch.mm(a, b.t(), out=into),
            "numpy": lambda a=a, b=b, into=into: np.matmul(a.numpy(), b.numpy().T, out=into.numpy()),
            "oneDNN": lambda a=a, b=b: onednn(a, b),
        }
        out.append({"m, n, k": [m, n, k], **{name: 2 * m * n * k / best(way) / 1e9 for name, way in ways.items()}})
    return out


def odd_layout() -> dict[str, float]:
    """Milliseconds with a whole weight and with one that is some columns of a wider one."""
    x, wide = torch.randn(200, 256), torch.randn(576, 600)[:, :256]
    whole = wide.contiguous()
    onednn(x, whole)
    found = {}
    for name, weight in (("whole", whole), ("columns of a wider one", wide)):
        begun = time.process_time()
        onednn(x, weight)
        found[name] = 1e3 * (time.process_time() - begun)
    return found


def kernels() -> dict[str, float]:
    """Resident memory that products of 500 lengths leave, and CPU milliseconds of a shape's first call over those of its second."""
    a, b, long = torch.randn(113, 600), torch.randn(600, 576), torch.randn(1536, 576)
    onednn(a[:, :300].contiguous(), b[:300].t())
    before, first, again = memory_now(), 0.0, 0.0
    for length in range(17, 517):
        for rows in (113, 96, 57):
            onednn(a[:rows, :length].contiguous(), b[:length].t())
        begun = time.process_time()
        onednn(b[:length], long)
        middle = time.process_time()
        onednn(b[:length], long)
        first, again = first + middle - begun, again + time.process_time() - middle
    resident = {name: memory_now()[name] - before[name] for name in ("anonymous", "file")}
    return {"grown_mib": sum(resident.values()), "shapes": 2000, "compiling_ms": 2 * (first - again)}  # of 500 shapes


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.kernels:
        print(json.dumps(kernels()))
        return
    found: dict[str, Any] = {"pays": products.pays(), "gflops": speeds(), "layout_ms": odd_layout(), "kernels": {}}
    for one in found["gflops"]:
        print(one["m, n, k"], "  ".join(f"{name} {one[name]:.0f} GFLOP/s" for name in ("torch", "numpy", "oneDNN")))
    print("weight:", "  ".join(f"{name} {value:.2f} ms" for name, value in found["layout_ms"].items()))
    plain = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    for name, more in CACHES.items():
        words = [sys.executable, __file__, "--kernels"]
        done = subprocess.run(words, env={**plain, **more}, capture_output=True, text=True, check=True)
        one = found["kernels"][name] = json.loads(done.stdout)
        print(
            f"caches {name}: {one['shapes']} shapes leave {one['grown_mib']:.0f} MiB, {one['compiling_ms']:.2f} ms to compile one"
        )
    if options.json:
        head = {"command": shlex.join(["python", *sys.argv]), "date": date.today().isoformat(), "commit": git_sha(ROOT),
                "hardware": hardware(), "versions": versions()}  # fmt: skip
        options.json.write_text(json.dumps({**head, **found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
