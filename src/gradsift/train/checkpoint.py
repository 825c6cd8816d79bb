"""Checkpoints of a training run: published by rename, sealed by hashes, safetensors and JSON only (ours).

Dropout is seeded per step and rows come from the plan, so weights, moments and what was logged are the whole state.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gradsift.data.cache import disk_errors, published_folder
from gradsift.errors import ConfigError, StoreError
from gradsift.manifest import seal, sha256_file, unseal, write_bytes_atomic
from gradsift.models.foreign import short

WEIGHTS, MOMENTS, STATE, HOOK, RECORD = (
    "weights.safetensors", "moments.safetensors", "trainer_state.json", "hook.safetensors", "record.json",
)  # fmt: skip
KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Found:
    """What was found to resume from.

    Args:
        path: newest whole checkpoint, or None.
        record: its record; empty without one.
        remarks: what was passed over, and why.
    """

    path: Path | None
    record: Mapping[str, Any]
    remarks: tuple[str, ...]


def find_checkpoint(folder: Path, key: str) -> Found:
    """Find the newest checkpoint whose bytes are what was written; remove what a killed save left.

    Args:
        folder: where checkpoints stand; may be absent.
        key: what decides the trajectory; a checkpoint of another run is refused.

    Returns:
        The checkpoint and remarks on damaged ones.

    Raises:
        ConfigError: the newest whole checkpoint belongs to another configuration or other rows.
    """
    remarks = []
    for stale in sorted(folder.glob(".checkpoint-*")):
        shutil.rmtree(stale, ignore_errors=True)
        remarks.append(f"{stale.name.split('.')[1]} was being saved when the run was stopped; it is not used")
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        record, problem = _check(path)
        if record is None:
            remarks.append(f"{path.name} is damaged ({problem}) and is not used")
            continue
        if record["key"] != key:
            raise ConfigError(
                "the folder holds a run with other settings, rows or model",
                where=str(path),
                got=record["key"],
                expected=key,
                do="use another --out, or the old settings",
            )
        return Found(path, record, tuple(remarks))
    return Found(None, {}, tuple(remarks))


def _check(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Read a checkpoint's record, or say what is wrong with it."""
    try:
        record = unseal((path / RECORD).read_bytes())
    except OSError:
        return None, f"no {RECORD}"
    if record is None:
        return None, f"{RECORD} is not what was written"
    for name, digest in record["files"].items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            return None, f"{name} is not what was written"
    return record, ""


def save_checkpoint(folder: Path, step: int, record: Mapping[str, Any], write: Any) -> Path:
    """Publish one checkpoint and drop those before the last ``KEPT``.

    Args:
        folder: where checkpoints stand.
        step: optimizer steps taken.
        record: JSON values; ``files`` is added.
        write: called with an empty folder to write the files into.

    Returns:
        The checkpoint.
    """
    path = folder / f"checkpoint-{step}"
    with disk_errors(path):
        if path.exists():  # damaged, or the same state: find_checkpoint resumed from it or passed over it
            shutil.rmtree(path)
        with published_folder(path) as temporary:
            write(temporary)
            files = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
            write_bytes_atomic(temporary / RECORD, seal({**record, "files": files}))
    numbered = sorted((int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)))
    for _, old in numbered[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def split_state(value: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """Part nested plain values and tensors into JSON and tensors.

    Args:
        value: mappings with string keys, sequences, strings, numbers, booleans, None and tensors.
        tensors: filled with the tensors, by their place.
        path: place of ``value``.

    Returns:
        JSON values in which a tensor or a number that is not finite is a mapping with one key.

    Raises:
        TypeError: a value has no such form.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"__tensor__": path}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"{path}: the keys of a state must be strings")
        return {key: split_state(item, tensors, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [split_state(item, tensors, f"{path}/{n}") for n, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: a state cannot hold a {type(value).__name__}")


def join_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`split_state`; tuples come back as lists.

    Args:
        value: JSON values.
        tensors: by their place.

    Returns:
        The nested values.
    """
    if isinstance(value, dict):
        if set(value) == {"__tensor__"}:
            return tensors[value["__tensor__"]]
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: join_state(item, tensors) for key, item in value.items()}
    return [join_state(item, tensors) for item in value] if isinstance(value, list) else value


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: the file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        StoreError: the file cannot be read.
    """
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except Exception as error:  # safetensors raises many kinds
        raise StoreError("the tensors cannot be read", where=str(path), got=short(error)) from None
