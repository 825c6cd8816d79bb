"""Budgets made concrete, and rows taken in rank order with the measured numerical bound at the cut (ours).

A score is known up to a bound ``b``: measured again, in another batch, it may move by that much. What follows from it
for a choice of the k highest scores:

* two rows less than 2 b apart cannot be told apart. Near the cut they are settled by id, so that exact copies of a row
  come out the same way in every run;
* both the rows and the window in which ids decide may move by 2 b, so the choice is the same in every run when the
  margin at the cut exceeds 4 b, and otherwise only rows within 4 b of the cut can change sides. They are the
  *undecided* rows.

Under a token budget the walk is a sequence of such cuts, one for each time a row does not fit. The margin is the least
of them; a margin above the bound still proves the choice, but after an undecided cut the rows that fill what is left
can change too, and those are not listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import BudgetError, DataError, NumericsError
from gradsift.types import Budget, Cut, Note, Problem


@dataclass(frozen=True)
class Allowance:
    """A budget made concrete for a problem: exactly one of the two is set.

    Args:
        rows: rows to take.
        tokens: trained tokens not to be exceeded.
        notes: shortages.
    """

    rows: int | None
    tokens: int | None
    notes: tuple[Note, ...] = ()

    @property
    def amount(self) -> int:
        """Rows or trained tokens, whichever is counted."""
        return self.rows if self.tokens is None else self.tokens  # type: ignore[return-value] - one of them is set

    def cost(self, problem: Problem) -> Int[np.ndarray, " N"]:
        """What each row takes of the amount: 1, or its trained tokens.

        Args:
            problem: the eligible rows.

        Returns:
            int64 [N].
        """
        return np.ones(problem.size, dtype=np.int64) if self.tokens is None else problem.num_trained

    def __str__(self) -> str:
        return f"{self.rows} rows" if self.tokens is None else f"{self.tokens} trained tokens"


def resolve_budget(problem: Problem, budget: Budget) -> Allowance:
    """Turn a budget into a number of rows or tokens; ``P%`` is the floor of the eligible rows, at least 1.

    Args:
        problem: the eligible rows.
        budget: what was asked.

    Returns:
        Rows or tokens, with a note when there are fewer eligible rows than asked.

    Raises:
        BudgetError: more was asked than was read, or fewer tokens than the shortest row has.
    """
    refuse_empty_pool(problem)
    if budget.percent is not None:
        # 1e-9: 18.4% of 375 rows are 69, which floating point puts just below.
        return Allowance(max(1, int(np.floor(problem.size * budget.percent / 100 + 1e-9))), None)
    if budget.rows is not None:
        _refuse_more_than_read(budget, budget.rows, problem.num_read, f"at most {problem.num_read} rows")
        return _allow(budget.rows, problem.size, "rows")
    assert budget.tokens is not None
    _refuse_more_than_read(budget, budget.tokens, problem.num_trained_read, f"at most {problem.num_trained_read}tok")
    shortest = int(problem.num_trained.min())
    if budget.tokens < shortest:
        raise BudgetError(
            "no row fits into the budget",
            where="--budget",
            got=str(budget),
            expected=f"at least {shortest}tok, the trained tokens of the shortest row",
            do="raise the budget",
        )
    return _allow(budget.tokens, int(problem.num_trained.sum()), "trained tokens")


def refuse_empty_pool(problem: Problem) -> None:
    """Refuse a pool without an eligible row.

    Args:
        problem: the eligible rows.

    Raises:
        DataError: there is none.
    """
    if problem.size == 0:
        raise DataError(
            "no usable row is left to select from",
            got=f"{problem.num_read} rows read, 0 usable",
            do="look at the statuses in the audit table; gradsift inspect shows one row",
        )


def _refuse_more_than_read(budget: Budget, asked: int, read: int, expected: str) -> None:
    if asked > read:
        unit = "trained tokens" if budget.tokens is not None else "rows"
        raise BudgetError(
            f"the budget asks for more {unit} than were read",
            where="--budget",
            got=str(budget),
            expected=expected,
            do="lower the budget or add pool files",
        )


def _allow(asked: int, eligible: int, unit: str) -> Allowance:
    notes: tuple[Note, ...] = ()
    if asked > eligible:
        text = f"{asked} {unit} were asked, {eligible} are eligible: all of them may be taken"
        notes = (Note("shortage", text, asked - eligible),)
    if unit == "rows":
        return Allowance(min(asked, eligible), None, notes)
    return Allowance(None, asked, notes)


@dataclass(frozen=True)
class Taken:
    """Rows taken in rank order.

    Args:
        chosen: int64 [k] row indices in rank order.
        order: int64 [n] all candidates in the rank order that was used.
        skipped: int64 [s] candidates passed over because they did not fit the tokens left.
        cut: margin, bound and undecided ids.
        undecided: int64 [u] the undecided rows by index, in id order.
    """

    chosen: Int[np.ndarray, " k"]
    order: Int[np.ndarray, " n"]
    skipped: Int[np.ndarray, " s"]
    cut: Cut
    undecided: Int[np.ndarray, " u"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(frozen=True)
class Reached:
    """Rows taken in rank order until they reach an amount.

    Args:
        rows: int64 [k] row indices in rank order.
        undecided: int64 [u] the undecided rows, rising.
    """

    rows: Int[np.ndarray, " k"]
    undecided: Int[np.ndarray, " u"]


@dataclass(frozen=True)
class _Stop:
    """A place in the walk where a row did not fit, so that scores decided.

    Args:
        fitting: int64 [f] rows that fitted one by one when the last stretch began.
        edge: score of the last row of the stretch.
        gap: how much lower the best of the other fitting rows scores.
    """

    fitting: Int[np.ndarray, " f"]
    edge: float
    gap: float


@dataclass(frozen=True)
class _Walk:
    chosen: Int[np.ndarray, " k"]
    stops: tuple[_Stop, ...]


def take_ranked(
    problem: Problem,
    score: Float[np.ndarray, " N"],
    allowance: Allowance,
    *,
    candidates: Bool[np.ndarray, " N"] | None = None,
    unsure: Bool[np.ndarray, " N"] | None = None,
    bound: float = 0.0,
) -> Taken:
    """Take candidates by falling score; near-ties at the cut are settled by id.

    Under a token budget a row that does not fit is skipped and the next is tried.

    Args:
        problem: the eligible rows.
        score: float64 [N], higher first; must be finite on the candidates.
        allowance: rows or tokens.
        candidates: bool [N], rows that may be taken; all by default.
        unsure: bool [N], rows whose candidacy the measurement does not settle, whichever way it went here; none by
            default. Their scores must be finite too.
        bound: how far one score may move when the signals are measured again.

    Returns:
        The rows taken, the order used and the cut; its bound is 4 times ``bound``. A score that is not finite is
        refused by row (NumericsError).
    """
    values = np.asarray(score, dtype=np.float64)
    pool = np.arange(problem.size) if candidates is None else np.flatnonzero(candidates)
    maybe = pool[:0] if unsure is None else np.flatnonzero(unsure)
    _refuse_nonfinite(problem, values, np.union1d(pool, maybe))
    cost = allowance.cost(problem)
    ranked = _by_score(values, pool)
    walk = _walk(ranked, values, cost, allowance.amount)
    order, stops = ranked, walk.stops
    if stops and stops[0].gap <= 2 * bound:
        order = _settle_by_id(ranked, values, stops[0].edge, 2 * bound)
        walk = _walk(order, values, cost, allowance.amount)
        stops = (stops[0], *walk.stops[1:])  # the settled order has no scores of its own at the first stop
    margin = min((stop.gap for stop in stops), default=0.0)
    undecided = _undecided(values, stops, 4 * bound)
    if len(maybe):
        if (cost != 1).any():  # tokens: what fills the rest after a change is not followed
            moved = maybe[cost[maybe] <= allowance.amount]
        else:
            moved = _undecided_by_candidacy(values, pool, maybe, cost, allowance.amount, 4 * bound)
        undecided = np.union1d(undecided, moved)
        margin = 0.0 if np.isin(maybe, moved).any() else margin
    taken = np.isin(order, walk.chosen)
    reached = int(np.flatnonzero(taken).max(initial=-1)) + 1
    cut = Cut(float(margin), 4 * bound, tuple(problem.ids[i] for i in undecided))
    return Taken(walk.chosen, order, order[:reached][~taken[:reached]], cut, undecided)


def take_until(
    score: Float[np.ndarray, " N"],
    cost: Int[np.ndarray, " N"],
    amount: int,
    *,
    candidates: Bool[np.ndarray, " N"],
    unsure: Bool[np.ndarray, " N"],
    bound: float,
) -> Reached:
    """Take candidates by falling score until their costs reach an amount; the row that reaches it is taken too.

    The score at which the amount is reached is a quantile weighted by cost, so it moves no further than the scores do.

    Args:
        score: float64 [N], higher first; must be finite on the candidates and the unsure rows.
        cost: int64 [N] >= 1.
        amount: at least 1; all candidates are taken where they do not reach it.
        candidates: bool [N], rows that may be taken.
        unsure: bool [N], rows whose candidacy the measurement does not settle, whichever way it went here.
        bound: how far one score may move when the signals are measured again.

    Returns:
        The rows taken, and those that another measurement could move; near-ties at the edge are settled by id.
    """
    pool, maybe, reach = np.flatnonzero(candidates), np.flatnonzero(unsure), 4 * bound
    edge = _cut_score(score, pool, cost, amount)
    order = _settle_by_id(_by_score(score, pool), score, edge, 2 * bound)
    rows = order[: int(np.searchsorted(np.cumsum(cost[order]), amount)) + 1]
    undecided = pool[:0]
    if reach > 0 and np.isfinite(edge):
        close = pool[np.abs(score[pool] - edge) <= reach]
        before = int(cost[pool[score[pool] > edge + reach]].sum())
        if before + cost[close].sum() - cost[close].min() >= amount:  # otherwise all of them are taken in any order
            undecided = close
    return Reached(rows, np.union1d(undecided, _undecided_by_candidacy(score, pool, maybe, cost, amount, reach)))


def _refuse_nonfinite(problem: Problem, values: Float[np.ndarray, " N"], rows: Int[np.ndarray, " n"]) -> None:
    bad = rows[~np.isfinite(values[rows])]
    if len(bad):
        raise NumericsError(
            "a score is not finite",
            where=f"row {problem.ids[bad[0]]}",
            got=str(values[bad[0]]),
            expected="a finite score for every candidate",
            do="report this as a defect of the method",
        )


def _by_score(values: Float[np.ndarray, " N"], rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Rows by falling score; equal scores by id, which is the row index."""
    return rows[np.lexsort((rows, -values[rows]))]


def _walk(
    order: Int[np.ndarray, " n"], values: Float[np.ndarray, " N"], cost: Int[np.ndarray, " N"], amount: int
) -> _Walk:
    """Take rows in order, skipping what does not fit: one stretch of fitting rows after the other.

    All rows of a stretch are taken whatever their order, so only its end depends on the scores.
    """
    left, rest = amount, order
    chosen: list[Int[np.ndarray, " r"]] = [order[:0]]
    stops: list[_Stop] = []
    while len(fitting := rest[cost[rest] <= left]):
        size = int(np.searchsorted(np.cumsum(cost[fitting]), left, side="right"))
        chosen.append(fitting[:size])
        left -= int(cost[fitting[:size]].sum())
        rest = fitting[size:]
        if len(rest):
            edge = float(values[fitting[size - 1]])
            stops.append(_Stop(fitting, edge, edge - float(values[rest[0]])))
    return _Walk(np.concatenate(chosen), tuple(stops))


def _settle_by_id(
    order: Int[np.ndarray, " n"], values: Float[np.ndarray, " N"], edge: float, window: float
) -> Int[np.ndarray, " n"]:
    close = np.abs(values[order] - edge) <= window
    above = values[order] > edge
    return np.concatenate([order[~close & above], np.sort(order[close]), order[~close & ~above]])


def _undecided(values: Float[np.ndarray, " N"], stops: tuple[_Stop, ...], reach: float) -> Int[np.ndarray, " u"]:
    rows = [np.zeros(0, dtype=np.int64)]
    for stop in stops:
        if reach > 0 and stop.gap <= reach:  # an exact score ties, but it does not move
            rows.append(stop.fitting[np.abs(values[stop.fitting] - stop.edge) <= reach])
    return np.unique(np.concatenate(rows))


def _undecided_by_candidacy(
    values: Float[np.ndarray, " N"],
    pool: Int[np.ndarray, " n"],
    maybe: Int[np.ndarray, " m"],
    cost: Int[np.ndarray, " N"],
    amount: int,
    reach: float,
) -> Int[np.ndarray, " u"]:
    """Rows that change sides when any of the unsure rows become candidates or cease to be.

    The cut, where the best candidates reach the amount, then lies anywhere between its place without and with all of them.
    """
    everyone = np.union1d(pool, maybe)
    low = _cut_score(values, np.setdiff1d(pool, maybe), cost, amount)
    if not (values[maybe] >= low - reach).any():
        return maybe[:0]
    high = _cut_score(values, everyone, cost, amount)
    between = everyone[(values[everyone] >= low - reach) & (values[everyone] <= high + reach)]
    return np.union1d(between, maybe[values[maybe] >= low - reach])


def _cut_score(
    values: Float[np.ndarray, " N"], rows: Int[np.ndarray, " n"], cost: Int[np.ndarray, " N"], amount: int
) -> float:
    """Score of the row at which the best ones reach the amount; minus infinity where all do not."""
    order = _by_score(values, rows)
    at = int(np.searchsorted(np.cumsum(cost[order]), amount))
    return float(values[order[at]]) if at < len(order) else -np.inf


def shortage_note(problem: Problem, allowance: Allowance, taken: Taken) -> tuple[Note, ...]:
    """Say when a method that excludes rows could not fill the budget; nothing is filled in.

    Args:
        problem: the eligible rows.
        allowance: rows or tokens asked for.
        taken: what was taken out of the candidates.

    Returns:
        The allowance's own notes, and one more when the candidates ran out before the eligible rows did. Rows longer than
        the budget count on neither side.
    """
    cost = allowance.cost(problem)
    cost = np.where(cost <= allowance.amount, cost, 0)
    reachable = min(allowance.amount, int(cost.sum()))
    available = int(cost[taken.order].sum())
    if available >= reachable:
        return allowance.notes
    unit = "rows" if allowance.tokens is None else "trained tokens"
    text = f"{reachable} {unit} could be taken by the budget, but the method leaves only {available} as candidates"
    return (*allowance.notes, Note("shortage", text, reachable - available))
