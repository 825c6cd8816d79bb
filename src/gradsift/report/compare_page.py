"""The page of a comparison: one HTML file without script and without the network, made of the folder alone (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsift.compare import words as told
from gradsift.compare.analysis import Analysis
from gradsift.compare.applicable import inapplicable_rows
from gradsift.compare.config import CompareConfig
from gradsift.compare.written import write_seeds
from gradsift.manifest import write_bytes_atomic
from gradsift.report import compare_charts as charts
from gradsift.report import words
from gradsift.report.page import CSP, _environment
from gradsift.report.svg import require_charts


def render_compare(folder: Path, config: CompareConfig, analysis: Analysis, manifest: Mapping[str, Any]) -> Path:
    """Write report.html of a comparison.

    Args:
        folder: of the comparison.
        config: the declared comparison.
        analysis: what was found.
        manifest: of the folder.

    Returns:
        The path of report.html, replaced at once.

    Raises:
        DependencyError: the extra ``[report]`` is absent.
        StoreError: the disk refuses the write.
    """
    require_charts()
    target = folder / "report.html"
    write_bytes_atomic(target, render_html(config, analysis, manifest).encode("utf-8"))
    return target


def render_html(config: CompareConfig, analysis: Analysis, manifest: Mapping[str, Any]) -> str:
    """Write the page as text.

    Args:
        config: the declared comparison.
        analysis: what was found; at least one finished cell.
        manifest: of the folder.

    Returns:
        HTML, the same for the same cells.
    """
    figures = {
        "plane": charts.plane(config, analysis),
        "random": charts.differences(config, analysis, analysis.against_random),
        "cheap": charts.differences(config, analysis, analysis.against_cheap)
        if told.second_difference(config, analysis)
        else None,
        "composition": charts.composition(analysis),
        "costs": charts.costs(analysis),
    }
    return _environment().get_template("compare.html.jinja").render(
        csp=CSP,
        c=config,
        a=analysis,
        m=manifest,
        fig=figures,
        told=told,
        words=words,
        headline=headline(config, analysis),
        beside={pair.arm: pair for pair in analysis.against_random},
        cheap={pair.arm: pair for pair in analysis.against_cheap},
        second=told.second_difference(config, analysis),
        kinds=list(zip(charts.kinds(analysis), range(100), strict=False)),
        kind_colors=charts.KIND_COLORS,
        seeds=write_seeds(config.seeds),
        missing=told.not_run(analysis.missing),
        inapplicable=inapplicable_rows(analysis.missing),
        num_cells=sum(len(arm.seeds) for arm in analysis.arms),
    )  # fmt: skip


def headline(config: CompareConfig, analysis: Analysis) -> str:
    """Say in one line what the page shows, losing claims included.

    Args:
        config: the declared comparison.
        analysis: what was found.

    Returns:
        The line.
    """
    place = told.data_set(config)
    if not analysis.passed:
        return f"A placebo check failed in {place}: nothing here may be believed yet"
    if config.placebo:
        whole = all(check.num_runs == check.num_declared for check in analysis.placebos)
        return f"The placebo checks hold{'' if whole and not analysis.missing else ' so far'} in {place}"
    good = sum(one.supported for one in analysis.claims)
    if not analysis.claims:
        return f"{words.plural(len(analysis.arms), 'arm')} compared in {place}; no claim was declared"
    return f"{good} of {words.plural(len(analysis.claims), 'declared claim')} supported in {place}"
