"""From a finished run to its pictures, each with a sentence that says what is seen (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from gradsift.report import charts
from gradsift.report.bins import MAX_POINTS, bin_shares, sample_rows
from gradsift.report.fields import Manifest
from gradsift.report.run import Audit, Run
from gradsift.report.svg import render_svg
from gradsift.report.words import count, number, one_line, plural, signed


@dataclass(frozen=True)
class Figure:
    """A picture on the page.

    Args:
        title: what is drawn.
        svg: the picture, safe to put into a page as it is.
        says: the same in a sentence, for who cannot see it and for the caption.
    """

    title: str
    svg: str
    says: str


def measured(audit: Audit, values: Float[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Tell which rows are eligible and have a value.

    Args:
        audit: the rows.
        values: float64 [N].

    Returns:
        bool [N].
    """
    return audit.usable & np.isfinite(values)


def _profile(
    audit: Audit, values: Float[np.ndarray, " N"], title: str, *, log: bool, zero: bool = False
) -> Figure | None:
    mask = measured(audit, values)
    if not mask.any():
        return None
    kept = audit.selected[mask]
    found = values[mask]
    word = signed if zero else number
    says = f"Median {word(float(np.median(found)))} in the pool"
    says += f", {word(float(np.median(found[kept])))} in the kept rows." if kept.any() else "; no kept row."
    chart = charts.histogram(bin_shares(found, kept, log=log), title, zero=zero)
    return Figure(title, render_svg(chart), says)


def distributions(audit: Audit) -> tuple[Figure, ...]:
    """Draw loss, gradient norm and length, kept rows against the pool.

    Args:
        audit: the rows.

    Returns:
        A figure for each quantity that was measured.
    """
    wanted = (
        (audit.loss, "Loss, nats per trained token", False),
        (audit.grad_norm, "Gradient norm", True),
        (audit.num_tokens, "Length, tokens", True),
    )
    drawn = (_profile(audit, values, title, log=log) for values, title, log in wanted)
    return tuple(figure for figure in drawn if figure is not None)


def cosines(run: Run) -> tuple[Figure, ...]:
    """Draw each row's cosine with every anchor and the target.

    Args:
        run: the run.

    Returns:
        A figure per direction that was measured.
    """
    figures = []
    for name, values in run.audit.cos.items():
        entry = run.manifest.direction(name)
        title = "Cosine with the target" if name == "target" else f"Cosine with {one_line(name, 24)}"
        if entry is not None and entry.word == "no reliable direction":
            title += " (no reliable direction)"
        figures.append(_profile(run.audit, values, title, log=False, zero=True))
    return tuple(figure for figure in figures if figure is not None)


def target_against_anchors(run: Run) -> Figure | str:
    """Draw each row's cosine with the target against its lowest cosine with a reliable anchor.

    Args:
        run: the run.

    Returns:
        The figure, or why there is none.
    """
    audit, manifest = run.audit, run.manifest
    protected = [d.name for d in manifest.directions if d.role == "protect" and d.name in audit.cos]
    trusted = [d.name for d in manifest.directions if d.name in protected and d.reliable]
    if "target" not in audit.cos or not protected:
        return "Not measured: the plane of target and anchors needs both a target and an anchor."
    if not trusted:
        return "Not drawn: no anchor has a reliable direction."
    worst = np.min([audit.cos[name] for name in trusted], axis=0)
    mask = measured(audit, worst + audit.cos["target"])
    if not mask.any():
        return "Not measured: no eligible row has both cosines."
    rows = np.flatnonzero(mask)
    rows = rows[sample_rows([audit.ids[i] for i in rows], audit.selected[rows])]
    kept = audit.selected[rows]
    says = f"{plural(int(kept.sum()), 'kept row')} and {plural(int((~kept).sum()), 'other')}"
    if len(rows) < mask.sum():
        total, chosen = int(mask.sum()), int(audit.selected[mask].sum())
        says += f", drawn by id out of {count(chosen)} and {count(total - chosen)} (at most {count(MAX_POINTS)} points)"
    says += "." if len(trusted) == len(protected) else "; anchors without a reliable direction are left out."
    titles = (
        "cosine with the target",
        "lowest cosine with an anchor" if len(trusted) > 1 else f"cosine with {trusted[0]}",
    )
    svg = render_svg(charts.scatter(audit.cos["target"][rows], worst[rows], kept, titles))
    return Figure("Target against anchors", svg, says)


def source_shares(audit: Audit) -> tuple[Figure, ...]:
    """Draw each source's share of the eligible rows and of the kept rows, by rows and by trained tokens.

    Args:
        audit: the rows.

    Returns:
        Two figures; none when no row was kept or there is one source only.
    """
    labels = sorted(set(audit.sources))
    chosen = audit.usable & audit.selected
    if len(labels) < 2 or not chosen.any():
        return ()
    source = np.array(audit.sources, dtype=object)
    figures = []
    for title, weight in (("Share of rows", np.ones(len(source))), ("Share of trained tokens", audit.num_trained)):
        weight = np.where(np.isfinite(weight), weight, 0.0)
        sums = [max(1e-300, float(weight[mask].sum())) for mask in (audit.usable, chosen)]
        pairs = [
            charts.Pair(
                label,
                float(weight[audit.usable & (source == label)].sum()) / sums[0],
                float(weight[chosen & (source == label)].sum()) / sums[1],
            )
            for label in labels
        ]
        svg = render_svg(charts.dumbbell(pairs, title.lower(), shares=True))
        figures.append(Figure(title, svg, "From the eligible pool to what was kept, per source."))
    return tuple(figures)


def scores(run: Run) -> Figure | None:
    """Draw the score by rank.

    Args:
        run: the run.

    Returns:
        The figure, or None when the method gives no score.
    """
    audit = run.audit
    rows = np.flatnonzero(measured(audit, audit.score) & (audit.rank >= 1))
    if not len(rows):
        return None
    total = len(rows)
    rows = rows[sample_rows([audit.ids[i] for i in rows], audit.selected[rows], 4_000)]
    cut = run.manifest.selection.cut
    undecided = np.zeros(len(rows), dtype=bool)
    if cut and cut.known:
        named = set(cut.undecided)  # all of them in runs of before the column
        undecided = np.array([audit.undecided[i] or audit.ids[i] in named for i in rows], dtype=bool)
    svg = render_svg(charts.score_curve(audit.rank[rows], audit.score[rows], audit.selected[rows], undecided))
    says = f"{plural(total, 'candidate')} by rank"
    says += f", {count(len(rows))} of them drawn by id. " if len(rows) < total else ". "
    return Figure("Score by rank", svg, says + "Dashed: the lowest score that was kept. Ringed: undecided.")


def batches(manifest: Manifest) -> Figure | None:
    """Draw the cosines of random batches of the chosen set with the anchors.

    Args:
        manifest: the run's manifest.

    Returns:
        The figure, or None when nothing was measured.
    """
    rows = [
        charts.Interval(f"{one_line(e.anchor, 16)}, B = {e.batch_size}", e.p05, e.p50, e.p95, e.predicted)
        for e in manifest.batch_check
        if e.p05 is not None and e.p50 is not None and e.p95 is not None
    ]
    if not rows:
        return None
    svg = render_svg(charts.intervals(rows, "cosine of the batch's summed gradient"))
    return Figure("Random batches of the chosen set", svg, "Bar: percentiles 5 to 95. Dot: median. Diamond: predicted.")


def sets(manifest: Manifest) -> Figure | None:
    """Draw the cosine of the whole chosen set with each anchor, beside the pool's.

    Args:
        manifest: the run's manifest.

    Returns:
        The figure, or None when nothing was measured.
    """
    pairs = [
        charts.Pair(entry.anchor, entry.pool, entry.selected)
        for entry in manifest.set_conflict
        if entry.pool is not None and entry.selected is not None
    ]
    if not pairs:
        return None
    svg = render_svg(charts.dumbbell(pairs, "cosine of the summed gradient"))
    return Figure("The whole set", svg, "From the whole eligible pool to the chosen set, per anchor.")


def stage_seconds(manifest: Manifest) -> Figure | None:
    """Draw the seconds of each stage.

    Args:
        manifest: the run's manifest.

    Returns:
        The figure, or None when nothing was measured.
    """
    known = [(name, value) for name, value in manifest.cost.seconds.items() if value is not None]
    if not known:
        return None
    slowest = max(known, key=lambda item: item[1])[0]
    return Figure("Seconds per stage", render_svg(charts.stages(known)), f"The longest stage is {one_line(slowest)}.")
