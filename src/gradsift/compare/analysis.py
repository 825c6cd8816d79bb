"""From cells to what may be said: paired differences, the decision rule's own error, placebo checks, claims (ours)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsift.compare import words
from gradsift.compare.applicable import inapplicable_rows
from gradsift.compare.arms import ORACLE
from gradsift.compare.cell import Cell
from gradsift.compare.config import BEST_CHEAP, CompareConfig
from gradsift.compare.null import PlaceboCheck, check_placebo, is_placebo, null_rate
from gradsift.compare.plane import ArmFigures, arm_figures, spent
from gradsift.compare.store import Filed
from gradsift.evaluate.statistics import (
    BootstrapInterval,
    Interval,
    Wins,
    cluster_bootstrap,
    paired_interval,
    paired_wins,
    probability_of_improvement,
    smallest_detectable,
)
from gradsift.evaluate.wording import claim
from gradsift.seeds import stream


@dataclass(frozen=True)
class Pair:
    """An arm beside a baseline, over the seeds that both have finished.

    Args:
        arm: the arm.
        baseline: the baseline.
        interval: of the hypervolume's differences; decides.
        bootstrap: shown beside it, never decides.
        improvement: probability that a run of the arm exceeds a run of the baseline.
        wins: paired.
        detectable: smallest true difference that this many seeds find in about 80% of repeats; NaN for one seed.
    """

    arm: str
    baseline: str
    interval: Interval
    bootstrap: BootstrapInterval
    improvement: float
    wins: Wins
    detectable: float


@dataclass(frozen=True)
class Told:
    """A declared claim in words.

    Args:
        arm: whose advantage was asked for.
        asked: the declared baseline.
        baseline: the arm it stands for; empty when none is finished.
        supported: whether the figures allow the claim.
        sentence: what may be said.
        interval: arm minus baseline; None where nothing can be compared or seeds are missing.
        weak: whether the claim is supported, but over an arm that itself lost to the random one.
    """

    arm: str
    asked: str
    baseline: str
    supported: bool
    sentence: str
    interval: Interval | None = None
    weak: bool = False


@dataclass(frozen=True)
class Missing:
    """A cell that was declared and is not finished.

    Args:
        arm: its arm.
        seed: its seed.
        why: the reason.
    """

    arm: str
    seed: int
    why: str


@dataclass(frozen=True)
class Analysis:
    """What a comparison found.

    Args:
        arms: figures per arm that has a cell, best mean hypervolume first.
        best_cheap: the cheap arm of the highest mean hypervolume; empty when none is finished.
        against_random: every other arm beside the random arm.
        against_cheap: every other arm beside the best cheap one.
        regained: arm -> share of the distance from random to oracle that it covers; empty without an oracle.
        claims: the declared claims in words.
        n: paired seeds that the decision rule uses.
        null_t: share of null draws in which the t interval excludes zero at that n.
        null_bootstrap: the same of the bootstrap.
        placebos: checks.
        missing: what was not run.
        notes: what a reader must know.
    """

    arms: tuple[ArmFigures, ...]
    best_cheap: str
    against_random: tuple[Pair, ...]
    against_cheap: tuple[Pair, ...]
    regained: Mapping[str, float]
    claims: tuple[Told, ...]
    n: int
    null_t: float
    null_bootstrap: float
    placebos: tuple[PlaceboCheck, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the run's own checks hold."""
        return all(check.passed for check in self.placebos)

    def plain(self) -> dict[str, Any]:
        """Return plain values for results.json; what is no finite number becomes None."""
        value = _finite(dataclasses.asdict(self))
        for arm, own in zip(value["arms"], self.arms, strict=True):
            arm |= _finite({"mean": own.mean, "sd": own.sd})
        return {**value, "passed": self.passed}


def analyse(config: CompareConfig, filed: Mapping[tuple[str, int], Filed], missing: tuple[Missing, ...]) -> Analysis:
    """Work a comparison up.

    Args:
        config: the declared comparison.
        filed: (arm, seed) -> finished cell; at least one.
        missing: the declared cells that are not finished.

    Returns:
        The analysis.
    """
    roles = next(iter(filed.values())).roles
    cells: dict[str, dict[int, Cell]] = {}
    for (name, seed), one in sorted(filed.items()):
        cells.setdefault(name, {})[seed] = one.cell
    plain = spent(list(cells[config.random].values()), math.nan).training if config.random in cells else math.nan
    figures = {
        arm.name: arm_figures(arm, cells[arm.name], config, roles, plain) for arm in config.arms if arm.name in cells
    }
    best = best_cheap(config, figures)
    ordered = tuple(sorted(figures.values(), key=lambda arm: (-arm.mean, arm.name)))
    n = config.placebo.seeds_per_run if config.placebo else len(config.seeds)
    return Analysis(
        ordered,
        best,
        _beside(ordered, figures, config.random),
        _beside(ordered, figures, best),
        _regained(config, figures),
        tuple(_told(config, figures, c.arm, c.baseline, best, missing) for c in config.claims),
        n,
        null_rate(n, "t"),
        null_rate(n, "bootstrap"),
        tuple(
            check_placebo(config, figures[arm.name], figures[config.random])
            for arm in config.arms
            if is_placebo(arm.placebo, arm.family) and arm.name in figures and config.random in figures
        ),
        missing,
        (*words.notes(config, filed, missing), *words.far_below(config, ordered)),
    )


def best_cheap(config: CompareConfig, figures: Mapping[str, ArmFigures]) -> str:
    """Find the cheap arm of the highest mean hypervolume over the seeds that all finished cheap arms share.

    It is chosen by the same figures that it is then compared on, which favours the baseline: a claim over it is
    conservative. No claim over it is judged before every cheap arm that the world can feed has all declared seeds.

    Args:
        config: names the cheap arms.
        figures: the finished arms.

    Returns:
        Its name; equal means go to the smaller name; empty when no cheap arm shares a seed.
    """
    cheap = [figures[name] for name in config.cheap if name in figures]
    shared = sorted(set.intersection(*(set(arm.seeds) for arm in cheap))) if cheap else []
    if not shared:
        return ""
    return min(cheap, key=lambda arm: (-float(np.mean(arm.at(shared))), arm.name)).name


def compare_pair(arm: ArmFigures, baseline: ArmFigures) -> Pair | None:
    """Compare two arms over the seeds that both have finished.

    Args:
        arm: the arm.
        baseline: the baseline.

    Returns:
        The pair, positive when the arm is better, or None when they share no seed.
    """
    seeds = sorted(set(arm.seeds) & set(baseline.seeds))
    if not seeds:
        return None
    a, b = arm.at(seeds), baseline.at(seeds)
    interval = paired_interval(a, b)
    draw = stream(0, f"compare/bootstrap/{arm.name}/{baseline.name}")
    return Pair(
        arm.name,
        baseline.name,
        interval,
        cluster_bootstrap(np.subtract(a, b), seeds, draw),
        probability_of_improvement(a, b),
        paired_wins(a, b),
        smallest_detectable(interval.sd, len(seeds)) if len(seeds) > 1 else math.nan,
    )


def _beside(arms: tuple[ArmFigures, ...], figures: Mapping[str, ArmFigures], baseline: str) -> tuple[Pair, ...]:
    if baseline not in figures:
        return ()
    pairs = (compare_pair(arm, figures[baseline]) for arm in arms if arm.name != baseline)
    return tuple(pair for pair in pairs if pair)


def _regained(config: CompareConfig, figures: Mapping[str, ArmFigures]) -> dict[str, float]:
    oracle = next((f for f in figures.values() if f.method == ORACLE), None)
    random = figures.get(config.random)
    if oracle is None or random is None:
        return {}
    shares = {}
    for name, arm in figures.items():
        seeds = sorted(set(arm.seeds) & set(oracle.seeds) & set(random.seeds))
        if seeds and name not in (oracle.name, random.name):
            low, own, high = (float(np.mean(f.at(seeds))) for f in (random, arm, oracle))
            shares[name] = (own - low) / (high - low) if high > low else math.nan
    return shares


def _told(
    config: CompareConfig,
    figures: Mapping[str, ArmFigures],
    name: str,
    asked: str,
    best: str,
    missing: tuple[Missing, ...],
) -> Told:
    baseline = best if asked == BEST_CHEAP else asked
    pair = compare_pair(figures[name], figures[baseline]) if {name, baseline} <= set(figures) else None
    if pair is None:
        return Told(name, asked, baseline, False, words.nothing_to_compare(name, baseline or asked))
    lost = compare_pair(figures[baseline], figures[config.random]) if config.random in figures else None
    done, declared = pair.interval.n, len(config.seeds)
    settings: Any = {
        "trial": config.trial,
        "cost_note": words.cost_note(figures[name].spent, figures[baseline].spent),
    }
    metric = words.hypervolume(config)
    if done < declared:  # looking early and stopping when it suits would be a test of its own, with more errors
        return Told(name, asked, baseline, False, words.unfinished(name, baseline, pair.interval, declared, metric))
    foreign = inapplicable_rows(missing)
    if asked == BEST_CHEAP and (short := _unfinished_cheap(config, figures, foreign)):
        return Told(name, asked, baseline, False, words.unfinished_cheap(name, baseline, pair.interval, short, metric))
    sentence = claim(name, baseline, metric, pair.interval, words.data_set(config), **settings)
    weak = pair.interval.supports_gain and lost is not None and lost.interval.high < 0
    if weak and lost:
        sentence += f" {words.weak_baseline(lost)}"
    if asked == BEST_CHEAP:
        sentence += f" {words.best_of(baseline, [arm for arm in config.cheap if arm in foreign])}"
    return Told(name, asked, baseline, pair.interval.supports_gain, sentence, pair.interval, weak)


def _unfinished_cheap(
    config: CompareConfig, figures: Mapping[str, ArmFigures], foreign: Mapping[str, str]
) -> dict[str, int]:
    """Count the finished seeds of the cheap arms that lack some: the best cheap arm could be one of them."""
    done = {name: len(figures[name].seeds) if name in figures else 0 for name in config.cheap if name not in foreign}
    return {name: count for name, count in done.items() if count < len(config.seeds)}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
