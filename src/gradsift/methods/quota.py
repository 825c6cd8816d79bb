"""Groups of rows that share a budget in proportion to their sizes, each ranked by values of its own (ours).

Row r (from 0) of a group of n rows has the place (r + 1/2) / n; rows are taken by rising place, so that every group has its
share of any budget to within a row, and a budget in tokens is walked the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.methods.audit import NO_CUT, build_selection, refuse_empty
from gradsift.methods.base import Method
from gradsift.methods.taking import Taken, resolve_budget, shortage_note, take_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Cut, Note, Problem, Selection


@dataclass(frozen=True)
class Group:
    """Rows of one source.

    Args:
        label: its name.
        rows: int64 [n] rows of the problem, rising.
        value: float64 [n] what they are ranked by, largest first.
        bound: how far one value may move against another when the signals are measured again.
        candidates: bool [n] rows that may be taken.
        unsure: bool [n] rows whose candidacy the measurement does not settle.
    """

    label: str
    rows: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    bound: float
    candidates: Bool[np.ndarray, " n"]
    unsure: Bool[np.ndarray, " n"]

    @property
    def order(self) -> Int[np.ndarray, " c"]:
        """Places of the candidates within the group, best first; ties to the smaller id."""
        ranked = np.argsort(-self.value, kind="stable")
        return ranked[self.candidates[ranked]]


def select_by_quota(
    problem: Problem,
    method: Method,
    budget: Budget,
    stream: Stream,
    *,
    groups: Sequence[Group],
    kept: str,
    why_kept: Callable[[int], str],
    dropped: Mapping[int, tuple[str, str]],
    notes: Sequence[Note],
) -> Selection:
    """Take the best rows of every group in proportion to its size.

    Args:
        problem: the eligible rows.
        method: the method that chooses.
        budget: what was asked.
        stream: the stream the method was given.
        groups: disjoint groups of rows.
        kept: last part of the reason code of chosen rows.
        why_kept: sentence for a row, by its index.
        dropped: reason code and sentence of rows in no group.
        notes: counted remarks, beside those about shortages.

    Returns:
        The selection in the order of places. Scores are the values themselves for one group, else 1 minus the place. When
        nothing fits the budget the choice is refused (InfeasibleError).
    """
    score, candidates = np.full(problem.size, np.nan), np.zeros(problem.size, dtype=bool)
    place, which = np.full(problem.size, np.inf), np.zeros(problem.size, dtype=np.int64)
    reasons = dict(dropped)
    for number, group in enumerate(groups):
        order = group.order
        candidates[group.rows[order]] = True
        place[group.rows[order]] = (np.arange(len(order)) + 0.5) / len(group.rows)
        which[group.rows] = number
        score[group.rows] = group.value
        for i in group.rows[~group.candidates]:
            reasons[int(i)] = (
                "dropped:below_median",
                f"its signal lies below the median of {group.label or 'the pool'}",
            )
    if len(groups) > 1:
        score = np.where(candidates, 1 - place, np.nan)
    allowance = resolve_budget(problem, budget)
    turn = np.empty(problem.size)  # equal places go to the earlier group, whichever rows stand there
    turn[np.lexsort((which, place))] = np.arange(problem.size)
    taken = take_ranked(problem, -turn, allowance, candidates=candidates)
    refuse_empty(problem, method, taken.chosen, taken.order)
    tokens = allowance.tokens is not None
    everything = len(taken.chosen) == len(taken.order) and not any(group.unsure.any() for group in groups)
    return build_selection(
        problem,
        method,
        budget,
        stream,
        chosen=taken.chosen,
        score=score,
        order=taken.order,
        skipped=taken.skipped,
        cut=NO_CUT if everything else _cut(problem, groups, taken, tokens=tokens),
        kept=kept,
        why_kept=why_kept,
        dropped=reasons,
        notes=[*shortage_note(problem, allowance, taken), *notes, *_quota_note(groups, taken)],
    )


def _cut(problem: Problem, groups: Sequence[Group], taken: Taken, *, tokens: bool) -> Cut:
    """The least margin of any group, and the rows that another measurement could move across its edge.

    Under a token budget every row may decide what fits after it, so that all neighbors within a group count.
    """
    chosen = np.isin(np.arange(problem.size), taken.chosen)
    margin, bound, undecided = np.inf, 4 * max(group.bound for group in groups), []
    counts = [int(chosen[group.rows].sum()) for group in groups]
    unsure = sum(int(group.unsure.sum()) for group in groups)
    # What a group that is used up gives depends on how many candidates it has, and the others fill what it leaves.
    swings = any(
        group.unsure.any() and count + unsure >= (group.candidates & ~group.unsure).sum()
        for group, count in zip(groups, counts, strict=True)
    )
    for group, count in zip(groups, counts, strict=True):
        order = group.order
        values = group.value[order]
        others = unsure - int(group.unsure.sum()) if swings else 0
        gaps = values[:-1] - values[1:]
        if tokens:
            near = np.flatnonzero(gaps <= 4 * group.bound)
            margin = min(margin, float(gaps.min()) if len(gaps) else np.inf)
            close = order[np.union1d(near, near + 1)] if len(near) else order[:0]
            open_rows = np.union1d(close, np.flatnonzero(group.unsure))
        elif count < len(order) or group.unsure.any() or others:
            margin = min(margin, float(gaps[count - 1]) if 0 < count < len(order) else np.inf)
            open_rows = _open(group, count, others)
        else:
            open_rows = order[:0]
        if group.unsure.any():
            margin = min(margin, 0.0)
        undecided += group.rows[open_rows].tolist()
    margin = float(margin) if np.isfinite(margin) else 0.0
    return Cut(margin, bound, tuple(problem.ids[i] for i in sorted(undecided)) if bound > 0 else ())


def _open(group: Group, count: int, others: int) -> Int[np.ndarray, " u"]:
    """Places of the rows of a group that could trade sides when its best ``count`` are taken.

    Other groups may leave up to ``others`` rows more or fewer to this one.
    """
    if group.bound == 0 or count + others == 0:
        return group.order[:0]
    value, reach = group.value, 4 * group.bound
    pool, everyone = np.flatnonzero(group.candidates), np.flatnonzero(group.candidates | group.unsure)
    low = _nth(value[group.candidates & ~group.unsure], count + others) - reach
    maybe = np.flatnonzero(group.unsure & (value >= low))
    if others or maybe.size:
        high = _nth(value[everyone], count - others) + reach
        return np.union1d(maybe, everyone[(value[everyone] >= low) & (value[everyone] <= high)])
    inside = np.isin(pool, group.order[:count])
    first_out, last_in = _nth(value[pool], count + 1), _nth(value[pool], count)
    return pool[np.where(inside, value[pool] - first_out <= reach, last_in - value[pool] <= reach)]


def _nth(values: Float[np.ndarray, " n"], n: int) -> float:
    """The n-th largest; infinity before the first and minus infinity behind the last."""
    if n < 1:
        return np.inf
    return float(np.sort(values)[len(values) - n]) if n <= len(values) else -np.inf


def _quota_note(groups: Sequence[Group], taken: Taken) -> tuple[Note, ...]:
    if len(groups) < 2:
        return ()
    chosen = set(taken.chosen.tolist())
    counts = {group.label: sum(int(i) in chosen for i in group.rows) for group in groups}
    text = "rows by source: " + ", ".join(f"{label} {n}" for label, n in sorted(counts.items()))
    return (Note("quota", text, len(chosen)),)
