"""What a run of ``ogs`` says of its policy in tables, shared by ``gradsift policy show`` and the page (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradsift.report.policy_fields import Details, TrainingEntry, TriedEntry
from gradsift.report.policy_words import ABSENT, mean_of, nats, verdict_on
from gradsift.report.words import MINUS, one_line

MAX_EPOCHS = 10
# A terminal is 80 columns wide: tables of many sources go on in further tables.
SOURCES_PER_CONTEST, SOURCES_PER_TRAINING, SOURCES_PER_CLUSTER = 2, 2, 4


@dataclass(frozen=True)
class Grid:
    """A table of texts.

    Args:
        title: its title.
        headings: one per column, all different; a line break separates the name from its unit.
        lines: one tuple per line.
        right: headings of columns of figures.
    """

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    right: frozenset[str]

    def typeset(self) -> tuple[tuple[str, ...], ...]:
        """The lines as a page shows them.

        Returns:
            Figures with a minus sign instead of a hyphen, and nothing for those that are absent.
        """
        return tuple(
            tuple(
                _typeset(cell) if name in self.right else cell for name, cell in zip(self.headings, line, strict=True)
            )
            for line in self.lines
        )


def _typeset(cell: str) -> str:
    return "" if cell == ABSENT else cell.replace("-", MINUS)


def limits_grid(details: Details) -> Grid:
    """Lay out where every held-out loss starts and how far it may rise.

    Args:
        details: of the run.

    Returns:
        A line per source, then the target.
    """
    lines = [
        (one_line(name), f"{details.start[name]:.4f}" if name in details.start else ABSENT, nats(limit),
         _percent(limit / details.start[name] if details.start.get(name) else None))
        for name, limit in details.limits.items()
    ]  # fmt: skip
    if "target" in details.start:
        lines.append(("target", f"{details.start['target']:.4f}", ABSENT, ABSENT))
    headings = ("held-out rows of", "loss at the start", "may rise by", "of the start")
    return Grid("Limits, in nats per trained token", headings, tuple(lines), frozenset(headings[1:]))


def _percent(share: float | None) -> str:
    return ABSENT if share is None or not math.isfinite(share) else f"{100 * share:.3g}%"


def ranked(details: Details) -> tuple[TriedEntry, ...]:
    """Order the contest: the returned policy, those that keep the limits, those that do not, those only simulated.

    Args:
        details: of the run.

    Returns:
        Every entry; by gain within each group.
    """

    def place(one: TriedEntry) -> tuple[bool, int, float]:
        gain = float(np.mean(one.gain)) if one.gain else one.simulated_gain
        group = 2 if one.keeps is None else int(not one.keeps)
        return one.policy != details.policy or not one.gain, group, -(gain if gain is not None else -math.inf)

    return tuple(sorted(details.contest, key=place))


def contest_grids(details: Details, *, wide: bool = False) -> tuple[Grid, ...]:
    """Lay the contest out: gains simulated and real, rises beside their limits, whether all limits are kept.

    Args:
        details: of the run.
        wide: one table for a page, with the verdict in words; otherwise tables for a terminal, with yes or no and a star
            before the returned policy.

    Returns:
        One table, and further ones where there are more sources than a terminal has room for.
    """
    entries, grids, last = ranked(details), [], "limits" if wide else "kept"
    between = " " if wide else "\n"
    for part, sources in enumerate(_chunks(details.sources, SOURCES_PER_CONTEST, wide)):
        rises = tuple(f"rise of{between}{_label(s, details)}\nup to{between}{nats(details.limits[s])}" for s in sources)
        figures = ("gain,\nsimul.", "real gain\n\u00b1 sd", "n") if not part else ()
        lines = []
        for one in entries:
            star = "* " if one is entries[0] and not wide else ""
            gains = (nats(one.simulated_gain), mean_of(one.gain), str(len(one.gain))) if not part else ()
            real = (nats(float(np.mean(one.rise[s]))) if one.gain else ABSENT for s in sources)
            kept = verdict_on(one, details) if wide else {None: ABSENT, True: "yes", False: "no"}[one.keeps]
            lines.append((star + one_line(one.policy), *gains, *real, *((kept,) if not part else ())))
        headings = ("policy", *figures, *rises, *((last,) if not part else ()))
        title = "Contest, in nats per trained token" + (", further sources" if part else "")
        title += "" if wide else " (* returned)"
        grids.append(Grid(title, headings, tuple(lines), frozenset((*figures, *rises))))
    return tuple(grids)


def _label(source: str, details: Details) -> str:
    """A source's name, short, and told apart from the others that look alike."""
    short = one_line(source, 10)
    same = [s for s in details.sources if one_line(s, 10) == short]
    return short if len(same) == 1 else f"{short} ({same.index(source) + 1})"


def _chunks(names: Sequence[str], size: int, whole: bool = False) -> Iterator[Sequence[str]]:
    size = max(1, len(names)) if whole else size
    yield from (names[k : k + size] for k in range(0, max(1, len(names)), size))


def thinned(num: int, most: int = MAX_EPOCHS) -> tuple[int, ...]:
    """Choose lines of a long table: the first, the last and evenly between.

    Args:
        num: lines there are.
        most: lines to keep, at least 2.

    Returns:
        Their places, ascending.
    """
    return tuple(dict.fromkeys(int(k) for k in np.rint(np.linspace(0, num - 1, min(num, most)))))


def training_grids(training: TrainingEntry, details: Details) -> tuple[Grid, ...]:
    """Lay the training out over epochs.

    Args:
        training: figures per epoch.
        details: of the run.

    Returns:
        One table of about ten epochs, and further ones where there are many sources.
    """
    grids = []
    for part, sources in enumerate(_chunks(details.sources, SOURCES_PER_TRAINING)):
        names = [_label(s, details) for s in sources]
        own = tuple(h for s in names for h in (f"rise\n{s}", f"price\n{s}"))
        gains = ("gain", "greedy\ngain", "dealt\ngain") if not part else ()
        lines = []
        for k in thinned(len(training.gain)):
            first = (
                tuple(nats(v[k]) for v in (training.gain, training.greedy_gain, training.dealt_gain))
                if not part
                else ()
            )
            rest = (v for s in sources for v in (nats(training.rise[s][k]), f"{training.price[s][k]:.3g}"))
            lines.append((str(k + 1), *first, *rest))
        title = "Training, mean of an epoch's episodes" + (", further sources" if part else "")
        headings = ("epoch", *gains, *own)
        grids.append(Grid(title, headings, tuple(lines), frozenset(headings)))
    return tuple(grids)


def clusters_grids(details: Details, *, wide: bool = False) -> tuple[Grid, ...]:
    """Lay the clusters out.

    Args:
        details: of the run.
        wide: one table for a page, however many sources there are.

    Returns:
        A table with a line per cluster: kind, rows, rows taken, mean cosines and loss; further ones for many sources.
    """
    taken = np.zeros(len(details.clusters), dtype=np.int64)
    for move in details.mix:
        taken[move.cluster] += move.rows
    grids = []
    for part, sources in enumerate(_chunks(details.sources, SOURCES_PER_CLUSTER, wide)):
        own = tuple(f"cos\n{_label(s, details)}" for s in sources)
        fixed = ("kind", "rows", "taken", "loss", "cos with\nthe target") if not part else ()
        lines = []
        for k, c in enumerate(details.clusters):
            first = ("general" if c.general else "domain", str(c.size), str(taken[k]), _plain(c.figure("loss"), ".3f"),
                     _plain(c.figure("cos_target"), "+.3f")) if not part else ()  # fmt: skip
            lines.append((str(k), *first, *(_plain(c.figure(f"cos_{s}"), "+.3f") for s in sources)))
        headings = ("cluster", *fixed, *own)
        title = "Clusters, mean over their rows" + (", further sources" if part else "")
        grids.append(Grid(title, headings, tuple(lines), frozenset({*headings} - {"kind"})))
    return tuple(grids)


def _plain(value: float | None, form: str) -> str:
    return ABSENT if value is None or not math.isfinite(value) else format(value, form)


def mix_grid(details: Details) -> Grid:
    """Lay the returned list out by decision; equal decisions in a row share a line.

    Args:
        details: of the run.

    Returns:
        Decisions, cluster, kind and rows.
    """
    runs: list[list[int]] = []  # first decision, last decision, cluster, rows
    for t, move in enumerate(details.mix, 1):
        if runs and runs[-1][2] == move.cluster:
            runs[-1][1], runs[-1][3] = t, runs[-1][3] + move.rows
        else:
            runs.append([t, t, move.cluster, move.rows])
    lines = tuple(
        (str(a) if a == b else f"{a} to {b}", str(k), "general" if details.clusters[k].general else "domain", str(rows))
        for a, b, k, rows in runs
    )
    headings = ("decision", "cluster", "kind", "rows")
    return Grid("The returned list", headings, lines, frozenset(("decision", "cluster", "rows")))
