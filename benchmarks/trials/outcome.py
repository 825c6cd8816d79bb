"""A trial's verdict and what JSON can hold of its figures; no torch, so that trials of the store start at once."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Check:
    """One figure beside what was asked.

    Args:
        name: what was measured.
        figure: what was seen, in words.
        asked: the threshold of the trial sheet, in words.
        met: whether it was met.
    """

    name: str
    figure: str
    asked: str
    met: bool


@dataclass(frozen=True)
class Outcome:
    """A trial's verdict: met when every check is met."""

    trial: str
    checks: tuple[Check, ...]
    wording: tuple[str, ...] = ()

    @property
    def met(self) -> bool:
        return all(check.met for check in self.checks)

    def line(self) -> str:
        """Say figure, asked, met or missed in one line."""
        parts = [f"{c.name} {c.figure} (asked {c.asked}: {'met' if c.met else 'missed'})" for c in self.checks]
        said = "".join(f"; {words}" for words in self.wording)
        return f"{self.trial}: {'met' if self.met else 'missed'}; " + "; ".join(parts) + said


def machine() -> str:
    """Name the processor and count its cores, as far as the system tells."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = found[0] if found else name
    return f"{name}, {os.cpu_count()} cores"


def plain(value: Any) -> Any:
    """Numbers rounded to 6 digits, arrays as lists, NaN as None: what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
