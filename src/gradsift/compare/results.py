"""Cells in, results out: what is finished and what is missing, results.json and results.md (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsift.compare import words
from gradsift.compare.analysis import Analysis, Missing
from gradsift.compare.config import CompareConfig
from gradsift.compare.runner import list_jobs, look
from gradsift.compare.store import Filed, read_cell
from gradsift.manifest import write_bytes_atomic, write_json_atomic


def gather(folder: Path, config: CompareConfig) -> tuple[dict[tuple[str, int], Filed], tuple[Missing, ...]]:
    """Read every finished cell of a comparison and list the others.

    Args:
        folder: of the comparison.
        config: the declared comparison.

    Returns:
        (arm, seed) -> cell, and the declared cells without a result.

    Raises:
        StoreError: a finished cell is damaged.
    """
    left = look(folder, list_jobs(config))
    filed = {(job.arm, job.seed): one for job in left.done if (one := read_cell(folder, job.key))}
    missing = [Missing(job.arm, job.seed, why) for job, why in left.failed]
    missing += [Missing(job.arm, job.seed, "not started") for job in left.open]
    return filed, tuple(missing)


def write_results(folder: Path, config: CompareConfig, analysis: Analysis, manifest: Mapping[str, Any]) -> list[Path]:
    """Write results.json and results.md.

    Args:
        folder: of the comparison.
        config: the declared comparison.
        analysis: what was found.
        manifest: of the folder; its command, date, commit and hardware head both files.

    Returns:
        The two paths.

    Raises:
        StoreError: the disk refuses.
    """
    top = {
        key: manifest[key] for key in ("command", "date", "commit", "hardware", "versions", "config_sha256", "config")
    }
    write_json_atomic(folder / "results.json", {**top, "metric": words.hypervolume(config), **analysis.plain()})
    write_bytes_atomic(folder / "results.md", words.markdown(config, analysis, manifest).encode("utf-8"))
    return [folder / "results.json", folder / "results.md"]
