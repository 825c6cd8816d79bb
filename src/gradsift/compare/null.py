"""The decision rule where there is nothing to find: simulated, and end to end in placebo runs (trials.md T14)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from gradsift.compare import words
from gradsift.compare.config import CompareConfig
from gradsift.compare.plane import ArmFigures
from gradsift.evaluate.statistics import (
    Uniformity,
    false_positive_rate,
    kolmogorov_smirnov_uniform,
    paired_interval,
)
from gradsift.seeds import stream

NULL_DRAWS = 20_000


@dataclass(frozen=True)
class PlaceboCheck:
    """Runs of the decision rule where there is nothing to find.

    Args:
        arm: the placebo.
        num_runs: complete runs.
        num_declared: declared runs.
        gains: runs whose interval lies above zero.
        losses: runs whose interval lies below zero.
        max_gains: gains that are allowed.
        uniform: test of the runs' p-values; None for a single run.
        passed: whether the check holds.
        sentence: in words.
    """

    arm: str
    num_runs: int
    num_declared: int
    gains: int
    losses: int
    max_gains: int
    uniform: Uniformity | None
    passed: bool
    sentence: str


def is_placebo(placebo: str, family: str) -> bool:
    """Tell whether an arm must not gain."""
    return bool(placebo) or family == "placebo"


@cache
def null_rate(n: int, rule: Any) -> float:
    """Simulate the decision rule on null draws at the number of seeds in use.

    Args:
        n: paired seeds.
        rule: ``t`` or ``bootstrap``.

    Returns:
        Share of 20,000 null draws whose interval excludes zero; NaN for one seed, which has no interval.
    """
    return false_positive_rate(n, stream(0, f"compare/null/{rule}"), NULL_DRAWS, rule) if n > 1 else math.nan


def check_placebo(config: CompareConfig, arm: ArmFigures, random: ArmFigures) -> PlaceboCheck:
    """Count significant gains of a placebo over random, run by run.

    Args:
        config: how the seeds form runs; without placebo runs all seeds are one run, in which a gain fails the check.
        arm: the placebo.
        random: the random arm.

    Returns:
        The check.
    """
    size = config.placebo.seeds_per_run if config.placebo else len(config.seeds)
    allowed = config.placebo.max_gains if config.placebo else 0
    shared = set(arm.seeds) & set(random.seeds)
    groups = [config.seeds[k : k + size] for k in range(0, len(config.seeds), size)]
    runs = [paired_interval(arm.at(group), random.at(group)) for group in groups if set(group) <= shared]
    gains = sum(run.low > 0 and not run.constant for run in runs)
    losses = sum(run.high < 0 and not run.constant for run in runs)
    p_values = [run.p_value for run in runs if math.isfinite(run.p_value)]
    uniform = kolmogorov_smirnov_uniform(p_values) if len(p_values) > 1 else None
    floor = config.placebo.min_uniform if config.placebo else 0.0
    passed = gains <= allowed and (uniform is None or uniform.p_value >= floor)
    told = words.placebo(arm.name, len(runs), len(groups), gains, losses, allowed, uniform, passed)
    return PlaceboCheck(arm.name, len(runs), len(groups), gains, losses, allowed, uniform, passed, told)
