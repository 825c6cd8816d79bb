"""The folder of a comparison: one manifest, written first, and one small sealed file per finished cell (ours)."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gradsift.compare.cell import Cell, Point
from gradsift.compare.claiming import guard
from gradsift.compare.config import CompareConfig, build_config
from gradsift.compare.worlds import world_version
from gradsift.compare.written import changed_field
from gradsift.errors import ConfigError, StoreError
from gradsift.gradients.roads import choose_road, describe
from gradsift.manifest import (
    canonical_json,
    git_sha,
    make_folder,
    read_error,
    seal,
    sha256_bytes,
    unseal,
    versions,
    write_bytes_atomic,
)
from gradsift.train.parts import Cost

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """Where and when a cell was computed.

    Args:
        date: UTC, ISO 8601.
        commit: of the code, empty where none is known (:func:`gradsift.manifest.git_sha`).
        hardware: processor and number of cores, and the GPU if one was used.
        base: digest of starting weights that were taught on a machine of its own; empty where the seed alone makes them.
        versions: of Python and the libraries; empty in cells from before they were kept.
    """

    date: str
    commit: str
    hardware: str
    base: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Filed:
    """A finished cell as it was read back.

    Args:
        cell: the cell.
        origin: where it was computed.
        roles: evaluation set -> domain or general.
    """

    cell: Cell
    origin: Origin
    roles: Mapping[str, str]


def hardware(device: str = "cpu") -> str:
    """Name the processor and its cores, and the GPU that was used.

    Args:
        device: where the models were; cpu or cuda:N.

    Returns:
        For example ``AMD EPYC 7763, 2 cores`` or ``AMD EPYC 7763, 2 cores, NVIDIA H100``.
    """
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    if device == "cpu":
        return f"{name}, {os.cpu_count()} cores"
    road = choose_road("auto", torch.device(device), torch.float32)
    gpu = f", {torch.cuda.get_device_name(device)}, {describe(road, torch.device(device), torch.float32)}"
    return f"{name}, {os.cpu_count()} cores{gpu}"


def here(device: str = "cpu", base: str = "") -> Origin:
    """Describe this process's machine and moment."""
    now, commit = datetime.now(UTC).isoformat(timespec="seconds"), git_sha(Path(__file__).parent)
    return Origin(now, commit or "", hardware(device), base, versions())


def declare(folder: Path, config: CompareConfig, command: str) -> CompareConfig:
    """Write the manifest before the first cell, or hold a later run to it.

    Args:
        folder: of the comparison; made when missing.
        config: the resolved comparison. Fewer seeds than declared are a part of the declared ones.
        command: the words that started it.

    Returns:
        The declared comparison.

    Raises:
        ConfigError: the folder was declared with other settings; the first field that differs is named.
        StoreError: the manifest is damaged, or cells lie there without one.
    """
    make_folder(folder)
    with guard(folder):
        if (folder / MANIFEST).exists():
            declared = declared_config(folder)
            asked = config
            if set(config.seeds) <= set(declared.seeds) and config.placebo == declared.placebo:
                asked = config.model_copy(update={"seeds": declared.seeds})
            if changed := changed_field(declared.dump(), asked.dump()):
                raise ConfigError(
                    "this folder was declared with other settings", where=str(folder / MANIFEST), got=changed,
                    expected="the declared settings: they were fixed before the first result",
                    do="use another --out for other settings",
                )  # fmt: skip
            return declared
        if any((folder / "cells").glob("*.json")):
            raise StoreError(
                "finished cells lie in a folder without manifest", where=str(folder), do="use another --out"
            )
        values = config.dump()
        manifest = {
            "config": values,
            "config_sha256": sha256_bytes(canonical_json(values).encode("ascii")),
            "command": command,
            **asdict(here()),
        }
        write_bytes_atomic(folder / MANIFEST, seal(manifest))
        return config


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest.

    Args:
        folder: of a comparison.

    Returns:
        config, config_sha256, command, versions, date, commit, hardware.

    Raises:
        StoreError: it is missing or damaged.
    """
    value = unseal(_read(folder / MANIFEST))
    if value is None:
        raise StoreError("the manifest is damaged", where=str(folder / MANIFEST), do="use another --out")
    return value


def declared_config(folder: Path) -> CompareConfig:
    """Read what was declared."""
    return build_config(read_manifest(folder)["config"])


def cell_key(config: CompareConfig, name: str, seed: int) -> str:
    """Name a cell's files by everything that defines it.

    Args:
        config: the declared comparison.
        name: of an arm.
        seed: its seed.

    Returns:
        ``<16 hex digits>-<seed>``.
    """
    arm = config.arm(name)
    parts: dict[str, Any] = {"arm": arm.model_dump(mode="json"), "world": config.world.model_dump(mode="json")}
    parts["grid"] = config.grid.model_dump(mode="json") if config.grid else None
    if version := world_version(config.world):
        parts["world_version"] = version
    if arm.total_of:
        parts["total_of"] = config.arm(arm.total_of).model_dump(mode="json")
    return f"{sha256_bytes(canonical_json(parts).encode('ascii'))[:16]}-{seed}"


def file_cell(
    folder: Path, key: str, cell: Cell, roles: Mapping[str, str], device: str = "cpu", base: str = ""
) -> None:
    """Publish a finished cell, whole or not at all.

    Args:
        folder: of the comparison.
        key: from :func:`cell_key`.
        cell: the cell.
        roles: evaluation set -> domain or general.
        device: where its models were.
        base: digest of taught starting weights.

    Raises:
        StoreError: the disk refuses.
    """
    make_folder(folder / "cells")
    value = {"cell": _plain(asdict(cell)), "origin": asdict(here(device, base)), "roles": dict(roles)}
    write_bytes_atomic(folder / "cells" / f"{key}.json", seal(value))
    (folder / "failures" / f"{key}.json").unlink(missing_ok=True)


def read_cell(folder: Path, key: str) -> Filed | None:
    """Read a finished cell.

    Args:
        folder: of the comparison.
        key: from :func:`cell_key`.

    Returns:
        The cell, or None when it is not finished.

    Raises:
        StoreError: the file is damaged.
    """
    path = folder / "cells" / f"{key}.json"
    if not path.exists():
        return None
    value = unseal(_read(path))
    if value is None:
        raise StoreError("a finished cell is damaged", where=str(path), do="delete this file and run again")
    got = value["cell"]
    points = tuple(
        Point(
            p["lr"], {s: _numbers(m) for s, m in p["metrics"].items()}, p["num_steps"], _costs(p["cost"]),
            _numbers(p["extra"]),
        )
        for p in got["points"]
    )  # fmt: skip
    whole = {**got, "points": points, "cost": _costs(got["cost"]), "notes": tuple(got["notes"])}
    return Filed(Cell(**whole), Origin(**value["origin"]), value["roles"])


def file_failure(folder: Path, key: str, text: str) -> None:
    """Record why a cell could not be computed; it is tried again by the next run."""
    make_folder(folder / "failures")
    write_bytes_atomic(folder / "failures" / f"{key}.json", seal({"error": text, "origin": asdict(here())}))


def read_failure(folder: Path, key: str) -> str | None:
    """Return why a cell could not be computed, or None."""
    path = folder / "failures" / f"{key}.json"
    try:
        value = unseal(path.read_bytes())
    except OSError:
        return None
    return "the record of the failure is damaged" if value is None else str(value["error"])


def forget_failures(folder: Path) -> int:
    """Clear the records of failed cells, so that they are tried again.

    Args:
        folder: of the comparison.

    Returns:
        How many there were.
    """
    paths = list((folder / "failures").glob("*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise read_error(error, path) from error


def _plain(value: Any) -> Any:
    """Write what is no finite number as a word: a diverged run is a result, and JSON has no form for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _costs(values: Mapping[str, Any]) -> dict[str, Cost]:
    return {name: Cost(**cost) for name, cost in values.items()}
