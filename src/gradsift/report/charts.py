"""The report's charts: Altair builds a typed specification, vl-convert turns it into a still SVG (ours).

Colours are CSS variables with a fallback, so that one picture serves a light page, a dark page and paper. There are no
legends inside the pictures and no script in them; the page names the colours. Labels are data and never expressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from gradsift.report.bins import Bins
from gradsift.report.words import one_line

if TYPE_CHECKING:
    import altair as alt

# Okabe and Ito's palette (2008): told apart with every common kind of colour vision, and in grey.
KEPT, POOL, MARK = "var(--kept, #0072B2)", "var(--pool, #8A9099)", "var(--mark, #D55E00)"
INK, FAINT, LINE = "var(--soft, #5B626B)", "var(--faint, #E4E1DA)", "var(--line, #C9C5BC)"


def _chart(layers: Sequence[Any], width: int, height: int) -> alt.LayerChart:
    import altair as alt

    chart: Any = alt.layer(*layers).properties(
        width=width, height=height, padding={"left": 8, "right": 12, "top": 6, "bottom": 4}
    )
    axis = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal", "gridColor": FAINT, "domain": False}
    axis |= {"labelFontSize": 11, "titleFontSize": 11, "ticks": False, "labelPadding": 6, "titlePadding": 8}
    return (
        chart.configure(aria=False, background="transparent", font="sans-serif")
        .configure_view(stroke=None)
        .configure_axis(**axis, labelLimit=150, labelOverlap=True)
    )


def _data(rows: Sequence[dict[str, Any]]) -> alt.Data:
    import altair as alt

    return alt.Data(values=list(rows))


def _zero(field: str = "x") -> alt.Chart:
    import altair as alt

    mark = alt.Chart(_data([{"zero": 0}])).mark_rule(color=LINE, strokeWidth=1)
    return mark.encode(**{field: "zero:Q"})


def histogram(bins: Bins, title: str, *, zero: bool = False) -> alt.LayerChart:
    """Draw the pool as a filled profile and the kept rows as a line over it.

    Args:
        bins: the shares.
        title: name and unit of the quantity.
        zero: mark the place of 0.

    Returns:
        The chart.
    """
    import altair as alt

    rows = [{"x": float(x), "share": float(s), "kept": float(k)} for x, s, k in zip(bins.edges, bins.pool, bins.kept)]
    # The last edge closes the last step; both profiles start and end on the ground.
    rows = [{"x": rows[0]["x"], "share": 0.0, "kept": 0.0}, *rows]
    rows.append({"x": float(bins.edges[-1]), "share": rows[-1]["share"], "kept": rows[-1]["kept"]})
    rows.append({"x": float(bins.edges[-1]), "share": 0.0, "kept": 0.0})
    scale = alt.Scale(type="log" if bins.log else "linear", zero=False, nice=False)
    x = alt.X("x:Q", scale=scale, axis=alt.Axis(title=one_line(title), tickCount=4, grid=False, format="~g"))
    top = alt.Y("share:Q", axis=alt.Axis(title="share of rows", format="~p", tickCount=3))
    base = alt.Chart(_data([{"order": i, **row} for i, row in enumerate(rows)]))
    layers = [
        base.mark_area(interpolate="step-after", color=POOL, opacity=0.38).encode(x=x, y=top, order="order:Q"),
        base.mark_line(interpolate="step-after", color=KEPT, strokeWidth=1.8).encode(x=x, y="kept:Q", order="order:Q"),
    ]
    if zero and bins.edges[0] < 0 < bins.edges[-1]:
        layers.insert(0, _zero())
    return _chart(layers, 246, 128)


@dataclass(frozen=True)
class Pair:
    """One row of a dumbbell chart: a name, the pool's value and the kept rows' value."""

    label: str
    pool: float
    kept: float


def dumbbell(pairs: Sequence[Pair], title: str, *, shares: bool = False) -> alt.LayerChart:
    """Draw how each quantity moves from the pool to what was kept.

    Args:
        pairs: at least one.
        title: of the value axis.
        shares: the values are shares in [0, 1]; otherwise they are signed and 0 is marked.

    Returns:
        The chart.
    """
    import altair as alt

    labels = distinct([pair.label for pair in pairs])
    rows = [{"label": label, "pool": p.pool, "kept": p.kept} for label, p in zip(labels, pairs)]
    scale = alt.Scale(domain=[0, 1]) if shares else alt.Scale(nice=True)
    x = {"axis": alt.Axis(title=one_line(title), format="~p" if shares else "~g", tickCount=5), "scale": scale}
    y = alt.Y("label:N", sort=None, axis=alt.Axis(title=None, grid=False))
    base = alt.Chart(_data(rows))
    layers: list[Any] = [] if shares else [_zero()]
    layers += [
        base.mark_rule(color=KEPT, opacity=0.55, strokeWidth=2).encode(x=alt.X("pool:Q", **x), x2="kept:Q", y=y),
        base.mark_point(color=POOL, filled=True, size=75, opacity=1).encode(x=alt.X("pool:Q", **x), y=y),
        base.mark_point(color=KEPT, filled=True, size=75, opacity=1).encode(x=alt.X("kept:Q", **x), y=y),
    ]
    return _chart(layers, 280, max(44, 30 * len(pairs)))


def distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """Shorten labels for an axis; those that become equal are told apart by a number.

    Args:
        labels: any strings.

    Returns:
        As many labels, all different.
    """
    seen: dict[str, int] = {}
    result = []
    for label in map(one_line, labels, [26] * len(labels)):
        seen[label] = seen.get(label, 0) + 1
        result.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return tuple(result)


def scatter(
    x: Float[np.ndarray, " N"], y: Float[np.ndarray, " N"], kept: Bool[np.ndarray, " N"], titles: tuple[str, str]
) -> alt.LayerChart:
    """Draw rows by two cosines, kept ones on top.

    Args:
        x: float64 [N], finite.
        y: float64 [N], finite.
        kept: bool [N].
        titles: of the two axes.

    Returns:
        The chart.
    """
    import altair as alt

    scale = alt.Scale(zero=False, nice=True)
    ways = {
        "x": alt.X("x:Q", scale=scale, axis=alt.Axis(title=one_line(titles[0], 60), format="~g", tickCount=6)),
        "y": alt.Y("y:Q", scale=scale, axis=alt.Axis(title=one_line(titles[1], 60), format="~g", tickCount=6)),
    }
    layers: list[Any] = []
    for axis, values in (("x", x), ("y", y)):
        if len(values) and values.min() <= 0 <= values.max():
            layers.append(_zero(axis))
    for mask, color, opacity in ((~kept, POOL, 0.5), (kept, KEPT, 0.9)):
        rows = [{"x": round(float(a), 5), "y": round(float(b), 5)} for a, b in zip(x[mask], y[mask])]
        mark = alt.Chart(_data(rows)).mark_point(
            filled=True, size=18 if len(x) < 3000 else 7, color=color, opacity=opacity
        )
        layers.append(mark.encode(**ways))
    return _chart(layers, 400, 300)


def score_curve(
    rank: Float[np.ndarray, " N"],
    score: Float[np.ndarray, " N"],
    kept: Bool[np.ndarray, " N"],
    undecided: Bool[np.ndarray, " N"],
) -> alt.LayerChart:
    """Draw the score by rank, with the level of the lowest row kept.

    Args:
        rank: float64 [N], 1-based.
        score: float64 [N], finite.
        kept: bool [N].
        undecided: bool [N], rows whose side of the cut the measurement does not settle.

    Returns:
        The chart.
    """
    import altair as alt

    ways = {
        "x": alt.X(
            "rank:Q", scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(title="rank", format="~s", grid=False)
        ),
        "y": alt.Y("score:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="score", format="~g", tickCount=6)),
    }
    layers: list[Any] = []
    if kept.any():
        level = _data([{"score": float(score[kept].min())}])
        layers.append(alt.Chart(level).mark_rule(color=MARK, strokeDash=[4, 3]).encode(y="score:Q"))
    for mask, color, filled, area in (
        (~kept, POOL, True, 14),
        (kept, KEPT, True, 18),
        (undecided, MARK, False, 70),
    ):
        rows = [{"rank": float(a), "score": float(b)} for a, b in zip(rank[mask], score[mask])]
        mark = alt.Chart(_data(rows)).mark_point(filled=filled, color=color, size=area, opacity=0.9)
        layers.append(mark.encode(**ways))
    return _chart(layers, 400, 220)


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart; ``predicted`` may be unknown."""

    label: str
    low: float
    middle: float
    high: float
    predicted: float | None = None


def intervals(rows: Sequence[Interval], title: str) -> alt.LayerChart:
    """Draw percentiles 5 to 95 as a bar, the median as a dot and the prediction as a diamond.

    Args:
        rows: at least one.
        title: of the value axis.

    Returns:
        The chart.
    """
    import altair as alt

    labels = distinct([row.label for row in rows])
    values = [{"label": k, "low": r.low, "mid": r.middle, "high": r.high} for k, r in zip(labels, rows)]
    guess = [{"label": k, "mid": r.predicted} for k, r in zip(labels, rows) if r.predicted is not None]
    x = {"axis": alt.Axis(title=one_line(title), format="~g", tickCount=6), "scale": alt.Scale(nice=True)}
    y = alt.Y("label:N", sort=list(labels), axis=alt.Axis(title=None, grid=False))
    base = alt.Chart(_data(values))
    diamond = alt.Chart(_data(guess)).mark_point(shape="diamond", size=110, color=MARK, filled=False, strokeWidth=1.6)
    layers = [
        _zero(),
        base.mark_rule(color=KEPT, opacity=0.4, strokeWidth=7, strokeCap="round").encode(
            x=alt.X("low:Q", **x), x2="high:Q", y=y
        ),
        base.mark_point(color=KEPT, filled=True, size=60, opacity=1).encode(x=alt.X("mid:Q", **x), y=y),
        diamond.encode(x=alt.X("mid:Q", **x), y=y),
    ]
    return _chart(layers, 330, max(44, 28 * len(rows)))


def stages(seconds: Sequence[tuple[str, float]]) -> alt.LayerChart:
    """Draw where the time went.

    Args:
        seconds: stage and seconds, in order, at least one.

    Returns:
        The chart.
    """
    import altair as alt

    labels = distinct([name for name, _ in seconds])
    rows = [{"stage": label, "seconds": value} for label, (_, value) in zip(labels, seconds)]
    x = alt.X("seconds:Q", stack=None, axis=alt.Axis(title="seconds", format="~g", tickCount=5))
    y = alt.Y("stage:N", sort=list(labels), axis=alt.Axis(title=None, grid=False))
    bar = alt.Chart(_data(rows)).mark_bar(color=KEPT, opacity=0.8, height=11).encode(x=x, y=y)
    return _chart([bar], 300, 26 * len(rows))
