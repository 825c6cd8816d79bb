"""The pictures of a run of ``ogs``: the contest, the training of the learned policy, the returned list (ours)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.report.charts import INK, KEPT, LINE, MARK, POOL, _chart, _data, _zero, distinct
from gradsift.report.figures import Figure
from gradsift.report.policy_fields import Details, TrainingEntry, TriedEntry
from gradsift.report.policy_view import ranked
from gradsift.report.policy_words import mix_words, nats, tried_of
from gradsift.report.svg import render_svg
from gradsift.report.words import MINUS, one_line, plural

if TYPE_CHECKING:
    import altair as alt

GENERAL = "var(--good, #009E73)"
# Okabe and Ito (2008) without the colours that mean something else on the page; the page names them in its key.
SOURCE_COLORS = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#8A9099")
MAX_SOURCES = 4
"""Sources that have a picture of their own in the contest; those whose limits are nearest come first."""

ROW = 22


def contest(details: Details) -> tuple[Figure, ...]:
    """Draw the real gain of every policy and, per source, its rise as a share of the limit.

    Args:
        details: of the run.

    Returns:
        The gain, then the sources whose limits are most nearly broken.
    """
    entries = [one for one in ranked(details) if one.gain]
    only = len(details.contest) - len(entries)
    n = plural(len(entries[0].gain), "real roll-out")
    says = f"{plural(len(entries), 'policy', 'policies')}, each on {n}: dots, and their mean as a bar. Diamond: as simulated."
    says += f" {plural(only, 'further one was', 'further ones were')} only simulated." if only else ""
    gains = _rows(entries, details, lambda one: one.gain, lambda one: one.simulated_gain)
    chart = _points(gains, [one.policy for one in entries], "fall of the target\u2019s loss, nats", None)
    figures = [Figure("Gain on the target", render_svg(chart), says)]
    for source in _nearest(entries, details)[:MAX_SOURCES]:
        figures.append(_rise(source, entries, details))
    return tuple(figures)


def _rise(source: str, entries: Sequence[TriedEntry], details: Details) -> Figure:
    limit = details.limits[source]
    unit = abs(limit) or 1.0  # a limit of 0 has no shares, so that its rises stay in nats
    rows = _rows(
        entries, details,
        lambda one: [v / unit for v in one.rise[source]],
        lambda one: None if (v := one.simulated_rise.get(source)) is None else v / unit,
    )  # fmt: skip
    title = "rise of the loss, share of its limit" if limit else "rise of the loss, nats"
    chart = _points(rows, [one.policy for one in entries], title, limit / unit, shares=bool(limit))
    over = sum(float(np.mean(one.rise[source])) > limit for one in entries)
    name = one_line(source, 24)
    says = f"Dashed: the limit, {_signs(nats(limit))} nats. The mean of {over or 'none'} of {len(entries)} is above it."
    return Figure(f"Rise of {name}", render_svg(chart), says)


def _nearest(entries: Sequence[TriedEntry], details: Details) -> list[str]:
    """Sources by the largest mean rise over the limit that any policy shows."""

    def nearness(source: str) -> float:
        return max(float(np.mean(one.rise[source])) - details.limits[source] for one in entries) / (
            abs(details.limits[source]) or 1.0
        )

    return sorted(details.sources, key=nearness, reverse=True)


def _rows(
    entries: Sequence[TriedEntry],
    details: Details,
    real: Callable[[TriedEntry], Sequence[float]],
    simulated: Callable[[TriedEntry], float | None],
) -> list[dict[str, Any]]:
    """One row per roll-out, mean and simulated value, with the policy's part on the page."""
    rows: list[dict[str, Any]] = []
    for label, one in zip(distinct([one.policy for one in entries]), entries, strict=True):
        part = "returned" if one is tried_of(details) else ("keeps" if one.keeps else "breaks")
        values = real(one)
        rows += [{"label": label, "part": part, "what": "roll", "value": float(v)} for v in values]
        rows.append({"label": label, "part": part, "what": "mean", "value": float(np.mean(values))})
        if (guess := simulated(one)) is not None:
            rows.append({"label": label, "part": part, "what": "simulated", "value": float(guess)})
    return rows


def _points(
    rows: Sequence[dict[str, Any]], names: Sequence[str], title: str, limit: float | None, *, shares: bool = False
) -> alt.LayerChart:
    import altair as alt

    labels = list(distinct(names))
    axis = alt.Axis(title=one_line(title, 60), format="~p" if shares else "~g", tickCount=5)
    x = alt.X("value:Q", scale=alt.Scale(zero=limit is not None, nice=True), axis=axis)
    layers: list[Any] = [_zero()] if limit is not None else []
    if limit is not None:
        rule = alt.Chart(_data([{"limit": limit}])).mark_rule(color=MARK, strokeDash=[4, 3])
        layers.append(rule.encode(x="limit:Q"))
    for part, color in (("keeps", INK), ("breaks", MARK), ("returned", KEPT)):
        for what, mark in (
            ("simulated", {"type": "point", "shape": "diamond", "size": 50, "filled": False, "strokeWidth": 1.2}),
            ("roll", {"type": "point", "size": 26, "filled": True, "opacity": 0.6}),
            ("mean", {"type": "tick", "thickness": 2.5, "size": 13, "opacity": 1}),
        ):
            some = [row for row in rows if (row["part"], row["what"]) == (part, what)]
            # every layer gets its own sort: layers of parts of the rows would otherwise be merged in their own order
            y = alt.Y("label:N", sort=labels, axis=alt.Axis(title=None, grid=True))
            shade = POOL if what == "simulated" else color
            if some:
                layers.append(alt.Chart(_data(some), mark=alt.MarkDef(**mark, color=shade)).encode(x=x, y=y))
    return _chart(layers, 190, max(50, ROW * len(names)))


def colors(details: Details) -> dict[str, str]:
    """Give every source its colour.

    Args:
        details: of the run.

    Returns:
        Source -> colour, repeated after the sixth.
    """
    return {s: SOURCE_COLORS[k % len(SOURCE_COLORS)] for k, s in enumerate(details.sources)}


def training(details: Details) -> tuple[Figure, ...]:
    """Draw gain, rises and prices over the epochs of the learned policy's training.

    Args:
        details: of the run.

    Returns:
        Three figures; none where no policy was trained.
    """
    t = details.training
    if t is None or not t.gain:
        return ()
    shade = colors(details)
    gain = _lines(
        {"sampled": t.gain, "greedy": t.greedy_gain, "dealt": t.dealt_gain},
        {"sampled": POOL, "greedy": KEPT, "dealt": INK},
        "fall of the loss, nats",
    )
    scaled = {s: [v / (abs(details.limits[s]) or 1.0) for v in values] for s, values in t.rise.items()}
    rise = _lines(scaled, shade, "rise, share of the limit", limit=1.0, shares=True)
    price = _lines(t.price, shade, "price of a limit")
    last = len(t.gain) - 1
    return (
        Figure("Gain over training", render_svg(gain), f"Grey: mean of the epoch\u2019s episodes. Blue: the greedy episode, {_signs(nats(t.greedy_gain[last]))} nats at the end. Dark: the mixture dealt evenly, {_signs(nats(t.dealt_gain[last]))}. Kept was the {'dealt' if t.deployed == 'deal' else 'greedy'} one."),
        Figure("Rises over training", render_svg(rise), f"Mean of the epoch\u2019s episodes. Dashed: the limit. At the end {_ends(t, details)}."),
        Figure("Prices over training", render_svg(price), f"A price is 0 where the limit does not bind. At the end {_prices(t)}."),
    )  # fmt: skip


def _ends(t: TrainingEntry, details: Details) -> str:
    ends = {s: values[-1] / (abs(details.limits[s]) or 1.0) for s, values in t.rise.items()}
    return ", ".join(f"{one_line(s, 24)} {_signs(f'{v:.0%}')}" for s, v in list(ends.items())[:MAX_SOURCES])


def _prices(t: TrainingEntry) -> str:
    return ", ".join(f"{one_line(s, 24)} {values[-1]:.2f}" for s, values in list(t.price.items())[:MAX_SOURCES])


def _signs(text: str) -> str:
    return text.replace("-", MINUS)


def _lines(
    series: Mapping[str, Sequence[float]],
    shade: Mapping[str, str],
    title: str,
    *,
    limit: float | None = None,
    shares: bool = False,
) -> alt.LayerChart:
    import altair as alt

    num = max(map(len, series.values()))
    x = alt.X("epoch:Q", scale=alt.Scale(domain=[1, max(2, num)], nice=False),
              axis=alt.Axis(title="epoch", grid=False, format="d", tickCount=min(5, num), tickMinStep=1))  # fmt: skip
    y = alt.Y("value:Q", scale=alt.Scale(zero=limit is not None or "price" in title),
              axis=alt.Axis(title=one_line(title, 60), format="~p" if shares else "~g", tickCount=4))  # fmt: skip
    layers: list[Any] = []
    if limit is not None:
        rule = alt.Chart(_data([{"limit": limit}])).mark_rule(color=LINE, strokeDash=[4, 3], strokeWidth=1.4)
        layers.append(rule.encode(y="limit:Q"))
    for name, values in series.items():
        rows = [{"epoch": k, "value": float(v)} for k, v in enumerate(values, 1)]
        mark = alt.Chart(_data(rows)).mark_line(
            color=shade[name], strokeWidth=1.8, point={"color": shade[name]} if num == 1 else False
        )
        layers.append(mark.encode(x=x, y=y, order="epoch:Q"))
    return _chart(layers, 236, 128)


def mix(details: Details) -> Figure:
    """Draw which cluster every decision of the returned list takes its rows from.

    Args:
        details: of the run.

    Returns:
        The strip: a line per cluster that is used, a cell per decision.
    """
    import altair as alt

    used = sorted({move.cluster for move in details.mix}, key=lambda k: (details.clusters[k].general, k))
    labels = {k: f"{k} {'general' if details.clusters[k].general else 'domain'}" for k in used}
    num = len(details.mix)
    x = alt.X("from:Q", scale=alt.Scale(domain=[0.5, num + 0.5], nice=False),
              axis=alt.Axis(title="decision", grid=False, format="d", tickCount=min(10, num), tickMinStep=1))  # fmt: skip
    layers = []
    for general, color in ((False, KEPT), (True, GENERAL)):
        rows = [
            {"label": labels[move.cluster], "from": t - 0.46, "to": t + 0.46}
            for t, move in enumerate(details.mix, 1)
            if details.clusters[move.cluster].general is general
        ]
        if rows:
            y = alt.Y("label:N", sort=list(labels.values()), axis=alt.Axis(title=None, grid=True))
            bar = alt.Chart(_data(rows)).mark_bar(color=color, opacity=0.85, height=13)
            layers.append(bar.encode(x=x, x2="to:Q", y=y))
    return Figure(
        "The returned list", render_svg(_chart(layers, 420, max(44, 20 * len(used)))), f"{mix_words(details)}."
    )
