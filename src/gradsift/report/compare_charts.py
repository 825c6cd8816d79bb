"""The pictures of a comparison: the plane with its fronts, differences with intervals, composition, cost (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsift.compare.analysis import Analysis, Pair
from gradsift.compare.arms import ORACLE
from gradsift.compare.config import CompareConfig
from gradsift.compare.plane import ArmFigures, PlanePoint
from gradsift.compare.words import axis_names
from gradsift.report.charts import FAINT, INK, KEPT, LINE, MARK, POOL, _chart, _data, _zero, distinct
from gradsift.report.figures import Figure
from gradsift.report.svg import render_svg
from gradsift.report.words import one_line, plural

if TYPE_CHECKING:
    import altair as alt

# Okabe and Ito (2008), then greys; the page names them in its own key.
KIND_COLORS = ("#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#8A9099", "#B8B2A7", "#5B626B")
ROW = 21
PLANE = (560, 380)  # pixels
FEW_ARMS = 10
"""Up to so many arms are all named in the plane."""


def roles(config: CompareConfig, analysis: Analysis) -> dict[str, str]:
    """Give every arm the part it plays on the page.

    Args:
        config: the comparison.
        analysis: its figures.

    Returns:
        Arm -> ``claimed``, ``baseline`` (random and the best cheap arm), ``bound`` or ``other``.
    """
    claimed = {told.arm for told in analysis.claims}
    known = {}
    for arm in analysis.arms:
        known[arm.name] = "other"
        if arm.method == ORACLE:
            known[arm.name] = "bound"
        elif arm.name in (config.random, analysis.best_cheap):
            known[arm.name] = "baseline"
        elif arm.name in claimed:
            known[arm.name] = "claimed"
    return known


_COLOR = {"claimed": KEPT, "bound": MARK, "baseline": INK, "other": POOL}


def plane(config: CompareConfig, analysis: Analysis) -> Figure:
    """Draw every arm's learning rates in the plane, mean over seeds, joined in the order of the grid.

    Args:
        config: names the axes.
        analysis: the arms.

    Returns:
        The figure; filled points lie on their arm's front, hollow ones are dominated by another of its points.
    """
    import altair as alt

    part = roles(config, analysis)
    titles = axis_names(config)
    corner = config.reference or (0.0, 0.0)
    inside = [(p.x, p.y) for arm in analysis.arms for p in arm.points if not _below(p, corner)]
    spans = [_span([place[axis] for place in inside], corner[axis]) for axis in (0, 1)]
    scales = [alt.Scale(domain=span, zero=False, nice=False, clamp=True) for span in spans]
    ways: dict[str, Any] = {
        "x": alt.X("x:Q", scale=scales[0], axis=alt.Axis(title=titles[0], format="~g", tickCount=6)),
        "y": alt.Y("y:Q", scale=scales[1], axis=alt.Axis(title=titles[1], format="~g", tickCount=6)),
    }
    cut = sum(_below(p, corner) for arm in analysis.arms for p in arm.points)
    few = len(analysis.arms) <= FEW_ARMS
    layers: list[Any] = []
    order = ("other", "baseline", "bound", "claimed")
    for arm in sorted(analysis.arms, key=lambda arm: order.index(part[arm.name])):
        layers += _path(arm, part[arm.name], ways, corner)
    loudest = sorted(analysis.arms, key=lambda arm: -order.index(part[arm.name]))
    named = [arm for arm in loudest if few or part[arm.name] != "other"]
    layers += _names(named, part, ways, spans, corner)
    text = f"{plural(len(analysis.arms), 'arm')}, each at {plural(len(analysis.arms[0].points), 'learning rate')}"
    says = f"{text}, mean over seeds. Up and to the right is better; filled points are on their arm's front."
    if cut:
        at = f"({corner[0]:g}, {corner[1]:g})"
        says += f" Triangles at the edge: {plural(cut, 'point')} below the corner {at}, which add nothing."
    return Figure("Gain and forgetting", render_svg(_chart(layers, *PLANE)), says)


def _below(point: PlanePoint, corner: tuple[float, float]) -> bool:
    return point.x < corner[0] or point.y < corner[1]


def _span(values: Sequence[float], low: float) -> list[float]:
    """The range of an axis: the values inside with a margin, which triangles for what lies below stand on."""
    if not values:
        return [low, low + 1.0]
    margin = 0.08 * (max(values) - min(values)) or 0.05 * abs(max(values) - low) or 0.05
    return [max(low, min(values) - margin), max(values) + margin]


def _path(arm: ArmFigures, role: str, ways: Mapping[str, Any], corner: tuple[float, float]) -> list[Any]:
    import altair as alt

    color, loud = _COLOR[role], role != "other"
    rows = [
        {"x": p.x, "y": p.y, "order": k, "front": p.on_front} for k, p in enumerate(arm.points) if not _below(p, corner)
    ]
    cut = [{"x": p.x, "y": p.y} for p in arm.points if _below(p, corner)]
    layers: list[Any] = []
    if rows:
        layers.append(
            alt.Chart(_data(rows))
            .mark_line(color=color, strokeWidth=1.8 if loud else 0.8, opacity=0.9 if loud else 0.45)
            .encode(**ways, order="order:Q")
        )
    for front in (True, False):
        some = [row for row in rows if row["front"] is front]
        if some:
            mark = alt.Chart(_data(some)).mark_point(
                color=color, filled=front, size=46 if loud else 24, opacity=1 if loud else 0.7
            )
            layers.append(mark.encode(**ways))
    if cut:  # the scale moves them onto the edge
        mark = alt.Chart(_data(cut)).mark_point(color=color, shape="triangle-left", size=46 if loud else 16,
                                                opacity=1 if loud else 0.6)  # fmt: skip
        layers.append(mark.encode(**ways))
    return layers


def _names(
    arms: Sequence[ArmFigures],
    part: Mapping[str, str],
    ways: Mapping[str, Any],
    spans: Sequence[Sequence[float]],
    corner: tuple[float, float],
) -> list[Any]:
    """Write each arm's name beside the point that spans the largest area by itself: the gentlest rates of all lie in one spot."""
    import altair as alt

    layers: list[Any] = []
    taken: list[tuple[float, float, float]] = []
    for arm in arms:
        top = arm.best_point(corner)
        label = one_line(arm.name, 26) + (f" ({top.x:.3g}, {top.y:.3g})" if _below(top, corner) else "")
        share = [
            min(max((v - low) / (high - low), 0.0), 1.0) for v, (low, high) in zip((top.x, top.y), spans, strict=True)
        ]
        left, dy = free_place(share[0] * PLANE[0], (1 - share[1]) * PLANE[1], 6.2 * len(label), taken)
        text = alt.Chart(_data([{"x": top.x, "y": top.y, "label": label}])).mark_text(
            color=_COLOR[part[arm.name]], align="left" if left else "right", dx=7 if left else -7, dy=dy, fontSize=11
        )
        layers.append(text.encode(**ways, text="label:N"))
    return layers


def free_place(x: float, y: float, width: float, taken: list[tuple[float, float, float]]) -> tuple[bool, float]:
    """Find room for a name beside a point, as near as there is.

    Args:
        x: pixels of the point from the left edge of the plane.
        y: pixels from its top.
        width: of the name.
        taken: left end, right end and middle height of the names that stand; the new one is added.

    Returns:
        Whether the name stands right of its point rather than left, and how far below it (pixels). Where all is
        taken it overlaps another one.
    """
    height = 13.0
    steps = [0, *(k * sign for k in range(1, 8) for sign in (1, -1))]
    sides = [side for side, fits in ((True, x + 7 + width <= PLANE[0] + 12), (False, x - 7 - width >= 0)) if fits] or [
        True
    ]
    for step in steps:
        dy = -5 + step * height
        if step and not 0 <= y + dy <= PLANE[1]:
            continue
        for right in sides:
            low, high = (x + 7, x + 7 + width) if right else (x - 7 - width, x - 7)
            if all(high <= a or b <= low or abs(y + dy - c) >= height for a, b, c in taken):
                taken.append((low, high, y + dy))
                return right, dy
    low, high = (x + 7, x + 7 + width) if sides[0] else (x - 7 - width, x - 7)
    taken.append((low, high, y - 5))
    return sides[0], -5.0


def differences(config: CompareConfig, analysis: Analysis, pairs: Sequence[Pair]) -> Figure | None:
    """Draw paired differences of the hypervolume with the interval that decides and the one that does not.

    Args:
        config: the comparison.
        analysis: tells which arms are claimed.
        pairs: arms beside one baseline.

    Returns:
        The figure, or None without pairs.
    """
    import altair as alt

    if not pairs:
        return None
    part = roles(config, analysis)
    ordered = sorted(pairs, key=lambda pair: -pair.interval.mean)
    labels = distinct([pair.arm for pair in ordered])
    rows = [
        {"label": label, "mean": p.interval.mean, "low": p.interval.low, "high": p.interval.high,
         "b_low": p.bootstrap.low, "b_high": p.bootstrap.high, "role": part[p.arm]}
        for label, p in zip(labels, ordered, strict=True)
    ]  # fmt: skip
    y = alt.Y("label:N", sort=None, axis=alt.Axis(title=None, grid=False))
    base = ordered[0].baseline
    x = alt.X(
        "mean:Q", axis=alt.Axis(title=f"hypervolume minus that of {one_line(base, 30)}", format="~g", tickCount=6)
    )
    layers: list[Any] = [_zero()]
    sure = [row for row in rows if math.isfinite(row["low"]) and math.isfinite(row["b_low"])]
    if sure:
        drawn = alt.Chart(_data(sure))
        layers.append(drawn.mark_bar(color=LINE, opacity=0.55, height=9).encode(x="b_low:Q", x2="b_high:Q", y=y))
    for role, color in _COLOR.items():
        some = [row for row in rows if row["role"] == role]
        bars = [row for row in some if math.isfinite(row["low"])]
        if bars:
            layers.append(
                alt.Chart(_data(bars)).mark_rule(color=color, strokeWidth=2).encode(x="low:Q", x2="high:Q", y=y)
            )
        if some:
            drop = [{k: row[k] for k in ("label", "mean")} for row in some]
            layers.append(
                alt.Chart(_data(drop)).mark_point(color=color, filled=True, size=50, opacity=1).encode(x=x, y=y)
            )
    above = sum(p.interval.low > 0 for p in pairs)
    below = sum(p.interval.high < 0 for p in pairs)
    says = f"Of {plural(len(pairs), 'arm')}, {above} have an interval above {one_line(base)} and {below} below it. "
    says += "Lines are the Student t intervals that decide, pale bars the bootstrap beside them, which never does."
    chart = _order(_chart(layers, 250, max(60, ROW * len(rows))), labels)
    return Figure(f"Differences to {one_line(base)}", render_svg(chart), says)


def _order(chart: alt.LayerChart, labels: Sequence[str]) -> alt.LayerChart:
    """Keep the rows in the order given: layers of parts of the rows would otherwise be merged in their own."""
    for layer in chart.layer:
        y = getattr(layer.encoding, "y", None)
        if y is not None and str(getattr(y, "shorthand", "")).startswith("label"):
            y["sort"] = list(labels)
    return chart


def kinds(analysis: Analysis) -> tuple[str, ...]:
    """List the kinds that some arm trained on, in the order of their colours."""
    return tuple(sorted({kind for arm in analysis.arms for kind in arm.shares}))


def composition(analysis: Analysis) -> Figure | None:
    """Draw what each arm's training rows consist of.

    Args:
        analysis: the arms.

    Returns:
        The figure, or None when nothing is known of the rows.
    """
    import altair as alt

    names = kinds(analysis)
    if not names:
        return None
    labels = distinct([arm.name for arm in analysis.arms])
    rows = [
        {"label": label, "kind": kind, "share": arm.shares.get(kind, 0.0), "order": k}
        for label, arm in zip(labels, analysis.arms, strict=True)
        for k, kind in enumerate(names)
    ]
    colors = [KIND_COLORS[k % len(KIND_COLORS)] for k in range(len(names))]
    bars = (
        alt.Chart(_data(rows))
        .mark_bar(height=13)
        .encode(
            x=alt.X("share:Q", stack=True, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title="share of training rows", format="~p")),
            y=alt.Y("label:N", sort=list(labels), axis=alt.Axis(title=None, grid=False)),
            color=alt.Color("kind:N", scale=alt.Scale(domain=list(names), range=colors), legend=None),
            order="order:Q",
        )
    )  # fmt: skip
    says = "Training rows by kind, mean over seeds: " + ", ".join(map(one_line, names)) + "."
    return Figure("What the arms trained on", render_svg(_chart([bars], 380, max(60, ROW * len(labels)))), says)


def costs(analysis: Analysis) -> Figure | None:
    """Draw each arm's total cost in plain training runs.

    Args:
        analysis: the arms.

    Returns:
        The figure, or None without a random arm to measure by.
    """
    import altair as alt

    some = [arm for arm in analysis.arms if math.isfinite(arm.spent.relative)]
    if not some:
        return None
    labels = distinct([arm.name for arm in some])
    rows = []
    for label, arm in zip(labels, some, strict=True):
        both = arm.spent.choosing + arm.spent.training
        for k, flops in enumerate((arm.spent.training, arm.spent.choosing)):
            rows.append({"label": label, "part": k, "runs": arm.spent.relative * flops / both if both else 0.0})
    bars = (
        alt.Chart(_data(rows))
        .mark_bar(height=13)
        .encode(
            x=alt.X("runs:Q", stack=True, axis=alt.Axis(title="operations, in plain training runs", format="~g")),
            y=alt.Y("label:N", sort=list(labels), axis=alt.Axis(title=None, grid=False)),
            color=alt.Color("part:N", scale=alt.Scale(domain=[0, 1], range=[POOL, KEPT]), legend=None),
            order="part:Q",
        )
    )
    rule = alt.Chart(_data([{"one": 1}])).mark_rule(color=FAINT).encode(x="one:Q")
    dearest = max(some, key=lambda arm: arm.spent.relative)
    says = f"The dearest arm, {one_line(dearest.name)}, costs {dearest.spent.relative:.2f} plain training runs."
    chart = _chart([rule, bars], 380, max(60, ROW * len(labels)))
    return Figure("What the arms cost", render_svg(chart), says)
