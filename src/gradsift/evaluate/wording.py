"""The only sentences in which a comparison may be told; without evidence they say so in fixed words.

A claim needs 10 paired seeds and an interval above zero. Everything else prints, literally,
``no advantage over <baseline> was measured``. A claim carries its trial, figure, seeds and cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gradsift.errors import ConfigError
from gradsift.evaluate.statistics import MIN_CONFIDENCE, MIN_SEEDS, Interval, enough_for_a_claim, paired_interval

MIN_DATA_SETS: Final = 6


@dataclass(frozen=True)
class AcrossDataSets:
    """What may be said over several data sets.

    Args:
        sentence: the words.
        interval: Student t over the data sets' mean differences; None below 6 data sets.
    """

    sentence: str
    interval: Interval | None = None


def no_advantage(baseline: str) -> str:
    """Return the fixed sentence of trials T10, T15 and T16.

    Args:
        baseline: what was compared with.

    Returns:
        The sentence without a full stop.
    """
    return f"no advantage over {baseline} was measured"


def claim(
    name: str, baseline: str, metric: str, interval: Interval, data_set: str, *, trial: str, cost_note: str
) -> str:
    """Say what a paired comparison on one data set allows, and no more (trials.md 15.4).

    Args:
        name: the arm.
        baseline: the arm it was compared with.
        metric: what was measured, with its unit.
        interval: name minus baseline, signed so that positive is better (minus the forgetting, for example).
        data_set: where it was measured.
        trial: the trial's id.
        cost_note: what each side cost in total.

    Returns:
        One or two sentences with figure, seeds, trial and cost. An advantage is claimed only with at least 10 seeds
        that differ and an interval above zero; otherwise the text holds ``no_advantage(baseline)``.

    Raises:
        ConfigError: a name, the trial or the cost is missing.
    """
    _require(name=name, baseline=baseline, metric=metric, data_set=data_set, trial=trial, cost_note=cost_note)
    tail = f"({trial}; {cost_note})"
    if interval.supports_gain:
        return f"{name} beats {baseline} on {data_set} in {metric} by {interval} {tail}."
    text = f"{no_advantage(baseline)}: {name} on {data_set} in {metric}, difference {interval} {tail}."
    if not enough_for_a_claim(interval.n):
        seeds = "1 seed is" if interval.n == 1 else f"{interval.n} seeds are"
        text += f" {seeds} not enough for a claim, {MIN_SEEDS} are needed."
        if interval.high < 0:
            text += " The interval lies below zero."
        return text
    if interval.confidence < MIN_CONFIDENCE:
        text += f" The interval covers {interval.confidence:.0%}, {MIN_CONFIDENCE:.0%} are needed for a claim."
    if interval.constant:
        text += f" All {interval.n} seeds gave the same difference, so they count as one measurement."
    if interval.high < 0:
        text += f" {name} lost to {baseline} there."
    return text


def across_data_sets(
    intervals: Mapping[str, Interval], name: str, baseline: str, metric: str, *, trial: str, cost_note: str
) -> AcrossDataSets:
    """Say what several data sets allow together: below 6 of them each stands alone, from 6 on a t interval over them.

    The interval takes each data set's mean difference as one observation, so neither more seeds nor more rows of one
    data set make it narrower than the spread between data sets.

    Args:
        intervals: per data set, name minus baseline, positive is better, in one unit.
        name: the arm.
        baseline: the arm it was compared with.
        metric: what was measured, with its unit.
        trial: the trial's id.
        cost_note: what each side cost in total.

    Returns:
        The words and, from 6 data sets on, the interval. An advantage is claimed only if the interval lies above zero
        and every data set has at least 10 seeds; otherwise the text holds ``no_advantage(baseline)``.

    Raises:
        ConfigError: no data set is given, or a name, the trial or the cost is missing.
    """
    _require(name=name, baseline=baseline, metric=metric, trial=trial, cost_note=cost_note)
    if not intervals:
        raise ConfigError("no data set was compared", where=f"{name} against {baseline}", expected="at least one")
    tail, size = f"({trial}; {cost_note})", len(intervals)
    if size < MIN_DATA_SETS:
        sets = "the data set stands alone" if size == 1 else f"each of the {size} data sets stands alone"
        each = "; ".join(f"{data_set} {interval}" for data_set, interval in intervals.items())
        text = (
            f"{no_advantage(baseline)} across data sets: {sets}, {MIN_DATA_SETS} are needed for an interval over them"
        )
        return AcrossDataSets(f"{text}. {name} minus {baseline} in {metric}: {each} {tail}.")
    over = paired_interval([interval.mean for interval in intervals.values()], [0.0] * size)
    short = sum(not enough_for_a_claim(interval.n) for interval in intervals.values())
    figure = f"{over.mean:+.3f} [{over.low:+.3f}, {over.high:+.3f}], {size} data sets"
    if over.low > 0 and not over.constant and not short:
        return AcrossDataSets(f"{name} beats {baseline} across data sets in {metric} by {figure} {tail}.", over)
    text = f"{no_advantage(baseline)} across data sets: {name} in {metric}, difference {figure} {tail}."
    if short:
        text += f" {short} of {size} data sets have fewer than {MIN_SEEDS} seeds."
    if over.constant:
        text += f" All {size} data sets gave the same difference, so they count as one measurement."
    if over.high < 0:
        text += " The interval lies below zero." if short else f" {name} lost to {baseline} there."
    return AcrossDataSets(text, over)


def _require(**parts: str) -> None:
    for part, value in parts.items():
        if not value.strip():
            raise ConfigError(
                f"a comparison is told only with its {part.replace('_', ' ')}",
                where=part,
                got=repr(value),
                expected="text",
            )
