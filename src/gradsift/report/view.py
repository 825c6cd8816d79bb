"""What the page says, worked out: verdict, warnings and tables of a finished run (ours).

Words are chosen by what the measurement bears: an anchor whose split halves disagree has no reliable direction, and
then neither conflict nor protection is spoken of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from gradsift.report.fields import NO_DIRECTION, WEAK, DirectionEntry, Manifest, NoteEntry
from gradsift.report.figures import measured
from gradsift.report.run import Audit, Run
from gradsift.report.words import UNKNOWN, count, number, one_line, percent, plural, share, signed
from gradsift.types import RowStatus

MEANING = {
    RowStatus.OK: "measured whole",
    RowStatus.TRUNCATED: "measured up to the maximum length",
    RowStatus.DUPLICATE: "exact copy of an earlier row",
    RowStatus.MALFORMED: "could not be parsed",
    RowStatus.EMPTY: "holds no text",
    RowStatus.NO_TRAINED_TOKEN: "nothing in it carries loss",
    RowStatus.TOKENIZE_ERROR: "the tokenizer or the template refused it",
    RowStatus.NONFINITE_LOSS: "its loss is not a finite number",
    RowStatus.NONFINITE_GRAD: "its gradient is not finite",
    RowStatus.ZERO_GRAD: "its gradient is zero, so it has no direction",
    RowStatus.OOM_AT_1: "did not fit into memory even alone",
    RowStatus.WORKER_CRASH: "the process that measured it died",
    RowStatus.SCREENED_OUT: "left out by the screen, not measured exactly",
}
LOW_COVERAGE = 0.95


@dataclass(frozen=True)
class StatusLine:
    """A status, how many rows have it, and what it means."""

    status: str
    rows: int
    meaning: str
    eligible: bool


@dataclass(frozen=True)
class SourceLine:
    """A pool source: rows read, eligible and kept; its shares of the pool and of the kept rows."""

    label: str
    read: int
    eligible: int
    kept: int
    pool_rows: float | None
    kept_rows: float | None
    pool_tokens: float | None
    kept_tokens: float | None


@dataclass(frozen=True)
class QuartileLine:
    """Quartiles of a quantity in the pool and in the kept rows; None where there is nothing."""

    name: str
    rows: int
    pool: tuple[float, float, float] | None
    kept: tuple[float, float, float] | None
    below_zero: tuple[float, float | None] | None = None


def about(entry: DirectionEntry | None) -> str:
    """Name what a direction may be called.

    Args:
        entry: the direction, or None when nothing is known of it.

    Returns:
        ``protect``, ``target`` or ``no reliable direction``.
    """
    if entry is None or entry.reliability is None:
        return "reliability not measured"
    return entry.role if entry.reliable else "no reliable direction"


def headline(manifest: Manifest) -> str:
    """Say in one sentence what was kept.

    Args:
        manifest: the run's manifest.

    Returns:
        The sentence.
    """
    chosen, rows = manifest.selection, manifest.rows
    return f"Kept {count(chosen.num_rows)} of {plural(rows.read, 'row')} ({plural(chosen.num_trained, 'trained token')}) with {chosen.method}"


def verdict(manifest: Manifest) -> str:
    """Say how the chosen set stands to each anchor, as far as the anchors can be trusted.

    Args:
        manifest: the run's manifest.

    Returns:
        One or two sentences.
    """
    known = [e for e in manifest.set_conflict if e.selected is not None]
    trusted = [e for e in known if (d := manifest.direction(e.anchor)) is not None and d.reliable]
    doubtful = [d for d in manifest.directions if d.role == "protect" and d.word == "no reliable direction"]
    parts = [
        f"{signed(e.selected)} with {one_line(e.anchor)}"
        + (f" (the pool's {signed(e.pool)})" if e.pool is not None else "")
        for e in trusted[:4]
    ]
    sentences = []
    if parts:
        more = f"; {len(trusted) - 4} more anchors below" if len(trusted) > 4 else ""
        sentences.append(f"The chosen set\u2019s summed gradient has cosine {_joined(parts)}{more}.")
    for d in doubtful[:4]:
        sentences.append(
            f"{one_line(d.name)} has no reliable direction (split-half cosine {signed(d.reliability)}), so nothing is said of it."
        )
    if not sentences:
        protected = any(d.role == "protect" for d in manifest.directions)
        sentences = [
            "How the chosen set stands to the anchors was not measured."
            if protected
            else "No anchor was given, so nothing is known of what the choice may unlearn."
        ]
    return " ".join(sentences)


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def warnings(run: Run) -> tuple[NoteEntry, ...]:
    """Gather the run's notes and what the numbers themselves warn of.

    Args:
        run: the run.

    Returns:
        Notes of the selection first, then those found here that no note of the run has named.
    """
    manifest, found = run.manifest, list(run.manifest.selection.notes)
    codes = " ".join(note.code for note in found)
    for d in manifest.directions if "weak" not in codes and "reliab" not in codes else ():
        if d.reliability is not None and d.reliability < WEAK:
            what = "no reliable direction" if d.reliability < NO_DIRECTION else "a weak direction"
            text = f"{one_line(d.name)} has {what}: its split halves agree with cosine {signed(d.reliability)} only. More rows give a better one."
            found.append(NoteEntry(code="weak_anchor", text=text))
    nav = manifest.navigator
    if nav is not None and nav.coverage is not None and nav.coverage < LOW_COVERAGE and "coverage" not in codes:
        names = ", ".join(one_line(name) for name in nav.uncovered[:6])
        text = f"The signals see {percent(nav.coverage)} of the parameters that were to be measured. Not seen: {names or 'not named'}."
        found.append(NoteEntry(code="coverage", text=text, count=len(nav.uncovered)))
    return (*found, *_contradictions(run))


def _contradictions(run: Run) -> list[NoteEntry]:
    """Check the run's files against one another: a report must not smooth over a damaged run."""
    manifest, audit = run.manifest, run.audit
    checks = (
        ("rows by status", sum(manifest.rows.status.values()), "rows read", manifest.rows.read),
        ("rows in the audit table", len(audit.ids), "rows read", manifest.rows.read),
        (
            "rows kept in the audit table",
            int(audit.selected.sum()),
            "rows in the selection",
            manifest.selection.num_rows,
        ),
    )
    return [
        NoteEntry(
            code="contradiction", text=f"{count(got)} {a}, but {count(want)} {b}: the run\u2019s files do not agree."
        )
        for a, got, b, want in checks
        if got != want
    ]


def statuses(manifest: Manifest) -> tuple[StatusLine, ...]:
    """List the statuses that occur, usable ones first.

    Args:
        manifest: the run's manifest.

    Returns:
        One line per status.
    """
    known = {status.value: status for status in RowStatus}
    order = {name: i for i, name in enumerate(known)}
    lines = []
    for name, rows in sorted(manifest.rows.status.items(), key=lambda item: order.get(item[0], len(order))):
        status = known.get(name)
        if rows:
            lines.append(StatusLine(name, rows, MEANING[status] if status else "", bool(status and status.usable)))
    return tuple(lines)


def sources(audit: Audit) -> tuple[SourceLine, ...]:
    """Count each source in the pool and in the kept rows; shares are of eligible rows and of kept rows.

    Args:
        audit: the rows.

    Returns:
        One line per source, by label.
    """
    label_of = np.array(audit.sources, dtype=object)
    tokens = np.where(np.isfinite(audit.num_trained), audit.num_trained, 0.0)
    pool, kept = audit.usable, audit.usable & audit.selected
    lines = []
    for label in sorted(set(audit.sources)):
        here = label_of == label
        lines.append(
            SourceLine(
                label,
                int(here.sum()),
                int((here & pool).sum()),
                int((here & kept).sum()),
                share(float((here & pool).sum()), float(pool.sum())),
                share(float((here & kept).sum()), float(kept.sum())),
                share(float(tokens[here & pool].sum()), float(tokens[pool].sum())),
                share(float(tokens[here & kept].sum()), float(tokens[kept].sum())),
            )
        )
    return tuple(lines)


def quartiles(audit: Audit, name: str, values: Float[np.ndarray, " N"], *, zero: bool = False) -> QuartileLine:
    """Summarize a quantity in the pool and in the kept rows.

    Args:
        audit: the rows.
        name: of the quantity.
        values: float64 [N].
        zero: also give the share of values below 0.

    Returns:
        The line.
    """
    mask = measured(audit, values)
    kept = mask & audit.selected
    below = None
    if zero and mask.any():
        below = (float((values[mask] < 0).mean()), float((values[kept] < 0).mean()) if kept.any() else None)
    return QuartileLine(name, int(mask.sum()), _quartiles(values, mask), _quartiles(values, kept), below)


def _quartiles(values: Float[np.ndarray, " N"], mask: Bool[np.ndarray, " N"]) -> tuple[float, float, float] | None:
    if not mask.any():
        return None
    low, middle, high = np.percentile(values[mask], (25, 50, 75))
    return float(low), float(middle), float(high)


def reasons(audit: Audit) -> tuple[tuple[str, int], ...]:
    """Count the reason codes.

    Args:
        audit: the rows.

    Returns:
        Codes and rows, kept ones first, then by falling count.
    """
    counted = Counter(code or "none given" for code in audit.reason_code)
    return tuple(sorted(counted.items(), key=lambda item: (not item[0].startswith("kept"), -item[1], item[0])))


def stance(manifest: Manifest, anchor: str, cosine: float | None) -> str:
    """Say what a cosine with an anchor means, as far as the anchor's direction can be trusted.

    Args:
        manifest: the run's manifest.
        anchor: the anchor's name.
        cosine: of a summed gradient; None was not measured.

    Returns:
        A few words.
    """
    entry = manifest.direction(anchor)
    if entry is None or not entry.reliable:
        return about(entry)
    if cosine is None:
        return UNKNOWN
    return "conflict" if cosine < 0 else "no conflict"


def cut_words(manifest: Manifest) -> str:
    """Say whether measuring again could change the choice.

    Args:
        manifest: the run's manifest.

    Returns:
        A sentence.
    """
    cut = manifest.selection.cut
    if cut is None or cut.margin is None:
        return f"The margin at the cut was {UNKNOWN}."
    margin, bound = number(cut.margin), number(cut.bound)
    if not cut.known:
        return (
            f"The numerical bound of the signals is {bound}. How far errors of that size move the choice is not known: "
            "between the signals and the choice lies more than a comparison of scores, so no row's side is proven."
        )
    if cut.count:
        return (
            f"The margin at the cut is {margin}, the numerical bound {bound}. "
            f"{plural(cut.count, 'row')} could change sides if the signals were measured again; ids settled them."
        )
    if cut.margin == 0:
        return (
            "No score separates the kept rows from the rest: nothing was left out, or the choice does not go by score."
        )
    if cut.bound is not None and cut.margin > cut.bound:
        return f"The margin at the cut is {margin} and exceeds the numerical bound of {bound}: measuring again gives the same choice."
    return f"The margin at the cut is {margin}, the numerical bound {bound}."


def price_words(anchor: str, price: float | None) -> str:
    """Say what a price means.

    Args:
        anchor: the anchor's name.
        price: gain lost per unit; None was not measured.

    Returns:
        A sentence.
    """
    if price is None:
        return f"The price of {anchor} was {UNKNOWN}."
    if price == 0:
        return f"{anchor} costs nothing here: a little more of it would lose no gain."
    return f"One more unit of {anchor} costs {number(price)} of gain."
