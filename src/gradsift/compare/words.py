"""The sentences of a comparison that ``evaluate.wording`` does not have, and its results as Markdown (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsift.compare.applicable import inapplicable_rows, reason
from gradsift.compare.config import CompareConfig
from gradsift.compare.written import write_seeds
from gradsift.evaluate.statistics import MIN_SEEDS, Interval, Uniformity
from gradsift.evaluate.wording import MIN_DATA_SETS, no_advantage

if TYPE_CHECKING:
    from gradsift.compare.analysis import Analysis, Missing, Pair
    from gradsift.compare.plane import ArmFigures, Spent
    from gradsift.compare.store import Filed

CONSERVATIVE = (
    "the best cheap baseline was chosen by the same figures it is then compared on, which favours the baseline"
)


def hypervolume(config: CompareConfig) -> str:
    """Name the metric with its reference point.

    Args:
        config: a resolved comparison.

    Returns:
        For example ``hypervolume of (general accuracy, domain accuracy) above (0, 0)``.
    """
    axes = " , ".join(axis_names(config)).replace(" ,", ",")
    corner = ", ".join(f"{v:g}" for v in config.reference or ())
    return f"hypervolume of ({axes}) above ({corner})"


def axis_names(config: CompareConfig) -> tuple[str, str]:
    """Name the two coordinates of the plane."""
    if config.metric == "accuracy":
        return "general accuracy", "domain accuracy"
    return "gain, nats per trained token", "-forgetting, nats per trained token"


def data_set(config: CompareConfig) -> str:
    """Name where the comparison was made."""
    kind = f", pool of {config.world.exchangeable} rows only" if config.world.exchangeable else ""
    return f"the {config.world.name} world{kind}"


def cost_note(own: Spent, other: Spent) -> str:
    """Say what each side cost in total, in units of one training run of the random arm."""
    return f"total cost {runs(own.relative)} against {runs(other.relative)} plain training runs"


def runs(relative: float) -> str:
    """Write a cost in plain training runs."""
    return "unknown" if math.isnan(relative) else f"{relative:.2f}"


def nothing_to_compare(name: str, baseline: str) -> str:
    """Say that two arms share no finished seed."""
    return f"{no_advantage(baseline)}: {name} and {baseline} share no finished seed."


def unfinished(name: str, baseline: str, interval: Interval, declared: int, metric: str) -> str:
    """Say that a claim is not judged before all declared seeds are finished."""
    return (
        f"{no_advantage(baseline)}: {interval.n} of {declared} declared seeds are finished, and a claim is judged on all of "
        f"them. So far {name} minus {baseline} in {metric} is {interval}."
    )


def unfinished_cheap(name: str, baseline: str, interval: Interval, done: Mapping[str, int], metric: str) -> str:
    """Say that a claim over the best cheap arm is not judged while a cheap arm lacks seeds.

    Args:
        name: the arm.
        baseline: the best of the cheap arms so far.
        interval: arm minus baseline.
        done: cheap arm -> its finished seeds, of those that lack some.
        metric: what is compared.

    Returns:
        A sentence.
    """
    some = ", ".join(f"{arm} ({count})" for arm, count in done.items())
    return (
        f"{no_advantage('best_cheap')}: not all cheap arms have all declared seeds, and the best of them could be one of those "
        f"that lack some: {some}. So far {name} minus {baseline} in {metric} is {interval}."
    )


def best_of(baseline: str, foreign: Sequence[str]) -> str:
    """Name the best cheap arm, and the cheap arms that the world cannot feed.

    Args:
        baseline: the best cheap arm.
        foreign: cheap arms that are not applicable there.

    Returns:
        A sentence.
    """
    rest = f" of those that apply ({', '.join(foreign)} cannot run)" if foreign else ""
    return f"{baseline} is the best cheap arm there{rest}."


def weak_baseline(lost: Pair) -> str:
    """Say that the arm which was beaten is itself worse than the random arm, so that beating it is little praise.

    Args:
        lost: the beaten arm beside the random arm.

    Returns:
        A sentence.
    """
    return f"Beating it says little: {lost.arm} itself lost to {lost.baseline}, {lost.interval}."


def placebo(
    name: str,
    num_runs: int,
    declared: int,
    gains: int,
    losses: int,
    allowed: int,
    uniform: Uniformity | None,
    passed: bool,
) -> str:
    """Tell how a placebo fared."""
    text = f"{name}: {gains} significant gains and {losses} significant losses in {num_runs} placebo runs"
    text += f" ({declared} declared, at most {allowed} gains allowed)"
    if uniform:
        text += f"; p-values against uniform: distance {uniform.statistic:.3f}, p = {uniform.p_value:.3g}"
    if not passed:
        over = gains > allowed
        return text + (
            ". THE CHECK FAILS: a gain where there is nothing to find is a leak or a mistake of the comparison."
            if over
            else ". THE CHECK FAILS: the decision rule's p-values are not uniform where there is nothing to find."
        )
    return text + (". The check holds." if num_runs == declared else ". The check holds so far.")


def null_sentence(analysis: Analysis) -> str:
    """Tell how often the decision rule itself is wrong at the number of seeds in use."""
    if analysis.n < 2:
        return "One seed has no interval, so nothing can be decided."
    return (
        f"At n = {analysis.n} the two-sided 95% t interval excludes zero in {analysis.null_t:.1%} of 20,000 null draws, the "
        f"bootstrap interval in {analysis.null_bootstrap:.1%}; the t interval decides, the bootstrap never does."
    )


def notes(
    config: CompareConfig, filed: Mapping[tuple[str, int], Filed], missing: tuple[Missing, ...]
) -> tuple[str, ...]:
    """List what a reader must know before any figure.

    Args:
        config: the declared comparison.
        filed: the finished cells.
        missing: the others.

    Returns:
        Sentences.
    """
    out = [
        f"{config.num_variants} variants of the claimed methods were tried on this world before the first cell.",
        f"{len(config.claims)} claims were declared; they are not corrected for their number.",
        f"{data_set(config)} stands alone: an interval over data sets needs {MIN_DATA_SETS} of them, so every claim names it.",
    ]
    if len(config.seeds) < MIN_SEEDS and not config.placebo:
        out.append(f"{len(config.seeds)} seeds are too few for any claim; {MIN_SEEDS} are needed.")
    commits = sorted({one.origin.commit or "no commit" for one in filed.values()})
    machines = sorted({one.origin.hardware for one in filed.values()})
    if len(commits) > 1:
        out.append(f"cells come from {len(commits)} commits of the code: {', '.join(c[:12] for c in commits)}.")
    if len(machines) > 1:
        out.append(f"cells come from {len(machines)} kinds of machine: {'; '.join(machines)}.")
    if len(bases := {one.origin.base for one in filed.values() if one.origin.base}) > 1:
        out.append(
            f"cells start from {len(bases)} different base weights: taught on different machines, they round apart; taught with "
            "other versions of the libraries, they may differ by more."
        )
    out += other_versions([one.origin.versions for one in filed.values() if one.origin.versions])
    if rest := [cell for cell in missing if reason(cell.why) is None]:
        out.append(f"{len(rest)} of {len(missing) + len(filed)} declared cells were not run.")
    return tuple(out)


def other_versions(some: Sequence[Mapping[str, str]]) -> list[str]:
    """Name the libraries of which cells had different versions.

    Args:
        some: per cell, name -> version.

    Returns:
        One sentence, or none.
    """
    names = sorted({name for one in some for name in one})
    found = {name: sorted({one.get(name, "absent") for one in some}) for name in names}
    apart = [f"{name} {', '.join(which)}" for name, which in found.items() if len(which) > 1]
    return [f"cells were made with different versions of {'; '.join(apart)}."] if apart else []


def far_below(config: CompareConfig, arms: Sequence[ArmFigures]) -> tuple[str, ...]:
    """Tell which arms are worse than the corner on the mean of their seeds: the area counts such a seed as nothing.

    Args:
        config: names the axes and the corner.
        arms: figures per arm.

    Returns:
        One sentence, or none.
    """
    corner = config.reference or (0.0, 0.0)
    best = {arm.name: arm.best_point(corner) for arm in arms}
    named = [f"{name} ({p.x:+.3f}, {p.y:+.3f})" for name, p in best.items() if p.x < corner[0] or p.y < corner[1]]
    if not named:
        return ()
    axes = ", ".join(title.partition(",")[0] for title in axis_names(config))
    return (
        f"the area counts a seed below the corner as nothing, however far below it lies. On the mean of their seeds these arms "
        f"lie below it at every learning rate, ({axes}): {'; '.join(named)}.",
    )


def not_run(missing: tuple[Missing, ...]) -> dict[str, list[str]]:
    """Group the missing cells.

    Args:
        missing: cells without a result.

    Returns:
        Reason -> ``arm (seeds 0-4)`` texts.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for cell in missing:
        groups.setdefault((cell.why, cell.arm), []).append(cell.seed)
    out: dict[str, list[str]] = {}
    for (why, arm), seeds in groups.items():
        out.setdefault(why, []).append(f"{arm} (seeds {write_seeds(sorted(seeds))})")
    return out


def markdown(config: CompareConfig, analysis: Analysis, manifest: Mapping[str, Any]) -> str:
    """Write the results as Markdown, with what made them at the top.

    Args:
        config: the declared comparison.
        analysis: what was found.
        manifest: of the folder.

    Returns:
        The text of results.md.
    """
    lines = [f"# {config.trial}: {len(config.arms)} arms in {data_set(config)}", ""]
    lines += [f"    {manifest['command']}", ""]
    lines += [f"Declared {manifest['date']} at commit {manifest['commit'] or 'none'} on {manifest['hardware']}; "
              f"settings {manifest['config_sha256'][:16]}; seeds {write_seeds(config.seeds)}.", ""]  # fmt: skip
    lines += ["## Claims", "", *(f"- {told.sentence}" for told in analysis.claims)]
    if not analysis.claims:
        lines.append("No claim was declared.")
    lines += ["", null_sentence(analysis), "", f"With `best_cheap`, {CONSERVATIVE}.", ""]
    if analysis.placebos:
        lines += ["## Placebos", "", *(f"- {check.sentence}" for check in analysis.placebos), ""]
    at = " and ".join(title.partition(",")[0] for title in axis_names(config))
    lines += [
        "## Arms",
        "",
        f"Metric: {hypervolume(config)}. {at}: mean of the seeds at the learning rate of the largest area.",
        "",
        *_arm_table(config, analysis),
        "",
    ]
    lines += ["## What a reader must know", "", *(f"- {note}" for note in analysis.notes)]
    for why, arms in not_run(analysis.missing).items():
        lines.append(f"- not run ({' '.join(why.split())}): {'; '.join(arms)}")
    return "\n".join(lines) + "\n"


def second_difference(config: CompareConfig, analysis: Analysis) -> list[str]:
    """Head the column of differences from the best cheap arm; none where that is the random arm, which has its own column."""
    return [] if analysis.best_cheap == config.random else [f"minus {analysis.best_cheap or 'best cheap'}"]


def _arm_table(config: CompareConfig, analysis: Analysis) -> list[str]:
    beside = {pair.arm: pair for pair in analysis.against_random}
    cheap = {pair.arm: pair for pair in analysis.against_cheap}
    second = second_difference(config, analysis)
    corner, axes = config.reference or (0.0, 0.0), [title.partition(",")[0] for title in axis_names(config)]
    head = ["arm", "seeds", "HV", *axes, f"minus {config.random}", "bootstrap", *second,
            "P(better)", "wins", "of oracle gap", "cost"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in analysis.arms:
        share = analysis.regained.get(arm.name)
        over = [str(cheap[arm.name].interval) if arm.name in cheap else "" for _ in second]
        best = arm.best_point(corner)
        row = [arm.name, str(len(arm.seeds)), f"{arm.mean:.3f}", f"{best.x:+.3f}", f"{best.y:+.3f}", *figures(beside.get(arm.name)),
               *over, *chances(beside.get(arm.name)),
               "" if share is None or math.isnan(share) else f"{share:.0%}", runs(arm.spent.relative)]  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    for name, why in inapplicable_rows(analysis.missing).items():
        lines.append(f"| {' | '.join([name, '0', why, *[''] * (len(head) - 3)])} |")
    return lines


def figures(pair: Pair | None) -> tuple[str, str]:
    """Write a pair's two intervals; empty for the baseline itself."""
    if pair is None:
        return "", ""
    boot = pair.bootstrap
    return str(pair.interval), f"[{boot.low:+.3f}, {boot.high:+.3f}]" if boot.num_clusters > 1 else "none"


def chances(pair: Pair | None) -> tuple[str, str]:
    """Write a pair's probability of improvement and its wins; empty for the baseline itself."""
    if pair is None:
        return "", ""
    return f"{pair.improvement:.2f}", f"{pair.wins.wins}-{pair.wins.ties}-{pair.wins.losses}"
