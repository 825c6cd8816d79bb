"""R11: the same path, other weights: moved by one unit in the last place, another adapter, another dtype."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import Stopped, Stops, recipe_of, room, run, world_in
from safetensors.torch import load_file, save_file

from gradsift.errors import SpecError
from gradsift.models import load as loading
from gradsift.pipeline import measure as measuring

SHALLOW = "the hash of the weights sees names and sizes, not bytes"


def change_weights(how: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "navigator" / "model.safetensors"
        save_file(how(load_file(path)), path, metadata={"format": "pt"})

    return change


def one_ulp(tensors: dict[str, Any]) -> dict[str, Any]:
    w = tensors["lm_head.weight"]
    w[3, 4] = torch.nextafter(w[3, 4], torch.tensor(float("inf")))
    return tensors


def narrow(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: t.to(torch.bfloat16) for name, t in tensors.items()}


def other_adapter(place: Path) -> None:
    plain = measuring.attach_lora
    patch.object(measuring, "attach_lora", lambda model, lora, seed: plain(model, lora, seed + 1)).start()


CHANGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "one weight moved by 1 ulp": ("model_sha256", change_weights(one_ulp)),
    "another adapter": ("adapter_sha256", other_adapter),
    "weights in another dtype": ("model_sha256", change_weights(narrow)),
}


def once(change: Callable[[Path], None], field: str) -> dict[str, Any]:
    """Run a few rows, change, go on."""
    try:
        with room() as folder:
            place = world_in(folder / "world", 16)
            with contextlib.suppress(Stopped):
                run(recipe_of(place), folder / "run", Stops(after=8))
            change(place)
            try:
                run(recipe_of(place), folder / "run", Stops(after=1))
            except SpecError as error:
                return {"refused": True, "named": f"{field}: " in error.expected}
            except Stopped:
                pass
            return {"refused": False, "named": False}
    finally:
        patch.stopall()


def hash_seconds(size: int) -> float:
    """How long 500 MB of weights take to be hashed."""
    with room() as folder:
        block = np.random.default_rng(1).bytes(1 << 20)
        path = folder / "model.safetensors"
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(block)
        begun = time.perf_counter()
        loading.weights_key(folder)
        return time.perf_counter() - begun


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Three changes, and the cost of seeing them."""
    found = {}
    for name, (field, change) in CHANGES.items():
        if defect:  # once() stops all patches
            patch.object(loading, "sha256_file", lambda path: f"{path.name} {path.stat().st_size}").start()
        found[name] = once(change, field)
    return {"changes": found, "mb": 500 if full else 8, "hash_seconds": hash_seconds((500 if full else 8) << 20)}


def judge(figures: Mapping[str, Any]) -> Outcome:
    """All refused by name."""
    found = figures["changes"]
    good = [name for name, f in found.items() if f["refused"] and f["named"]]
    bad = [name for name in found if name not in good]
    seen = f"{len(good)}/{len(found)}" + (f", not: {', '.join(bad)}" if bad else "")
    words = f"{figures['mb']} MB of weights are hashed in {figures['hash_seconds']:.1f} s"
    return Outcome("R11", (Check("changes refused by name", seen, "3/3", not bad and len(found) == 3),), (words,))


TRIAL = Trial(
    "R11", "same path, a weight moved by 1 ulp; adapter swapped; dtype changed", "3/3 refused; hash time of 500 MB", measure,
    judge, (SHALLOW,), {"rows": 16}, slow=True,
)  # fmt: skip
