"""What a method is: needs, a registry, budgets, and taking rows in rank order.

A method is a frozen dataclass whose fields are its settings. It declares what it needs, so a missing anchor or target
is refused before a model loads, and it never walks the pool itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import TypeAdapter, ValidationError

from gradsift.errors import BudgetError, ConfigError, DataError, NumericsError, SignalError
from gradsift.seeds import Stream
from gradsift.types import SIGNALS, Budget, Certificate, Cut, Note, Problem, Selection

FORWARD_SIGNALS = frozenset({"loss"})
TEXT_SIGNALS = frozenset({"lexical"})
GRADIENT_SIGNALS = frozenset(SIGNALS) - FORWARD_SIGNALS - TEXT_SIGNALS


@dataclass(frozen=True)
class Needs:
    """What a method must be given.

    Args:
        signals: names out of :data:`gradsift.types.SIGNALS`.
        anchors: at least one protect anchor.
        target: a target set.
        constrains: the method constrains on anchors, so weak ones need ``allow_weak_anchor``.
    """

    signals: frozenset[str] = frozenset()
    anchors: bool = False
    target: bool = False
    constrains: bool = False

    @property
    def cost_class(self) -> str:
        """``text`` (no model), ``forward`` (one forward) or ``gradient`` (one forward and backward) per row."""
        if self.signals & GRADIENT_SIGNALS:
            return "gradient"
        return "forward" if self.signals & FORWARD_SIGNALS else "text"


@runtime_checkable
class Method(Protocol):
    """The protocol of an offline method."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What must be given; may depend on the settings."""
        ...

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Choose rows of the problem within the budget."""
        ...


NO_CUT = Cut(0.0, 0.0)
_REGISTRY: dict[str, type[Any]] = {}
C = TypeVar("C", bound=type[Any])


def register(cls: C) -> C:
    """Class decorator: put a method into the registry under its ``name``.

    Args:
        cls: a frozen dataclass that satisfies :class:`Method`.

    Returns:
        The class, unchanged.

    Raises:
        ConfigError: the name is taken by another class.
    """
    taken = _REGISTRY.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ConfigError(
            "a method name is registered twice", got=cls.name, where=f"{taken!r} and {cls!r}", do="rename one of them"
        )
    _REGISTRY[cls.name] = cls
    return cls


def methods() -> Mapping[str, type[Any]]:
    """List every registered method, third-party ones included.

    Returns:
        Classes by name, sorted.
    """
    for point in entry_points(group="gradsift.methods"):
        register(point.load())
    return dict(sorted(_REGISTRY.items()))


def make_method(name: str, settings: Mapping[str, Any]) -> Method:
    """Build a method from its name and settings, checking both.

    Args:
        name: registered name.
        settings: the method's own fields.

    Returns:
        The method.

    Raises:
        ConfigError: the name or a setting is unknown, or a value has the wrong type; the known ones are listed.
    """
    known = methods()
    if name == "ogs":
        raise ConfigError(
            "the learned policy of ogs is not built yet",
            where="--method",
            got="ogs",
            expected="ogs_dual (set-level, recommended), hybrid, conflict or ogs_static",
            do="use --method ogs_dual, which solves the constrained choice exactly on one set of signals",
        )
    if name not in known:
        raise ConfigError(
            "there is no such method", where="--method", got=name, expected=", ".join(known), do="run gradsift methods"
        )
    cls = known[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(settings) - fields)
    if unknown:
        raise ConfigError(
            f"{name} has no such setting",
            where="--set",
            got=", ".join(unknown),
            expected=", ".join(sorted(fields)) or "no settings",
            do="run gradsift methods",
        )
    adapter: TypeAdapter[Any] = TypeAdapter(cls)
    try:
        return adapter.validate_python(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"a setting of {name} has a wrong value",
            where=f"--set {'.'.join(map(str, first['loc']))}",
            got=repr(first["input"]),
            expected=first["msg"],
        ) from None


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


def resolve_budget(problem: Problem, budget: Budget) -> Allowance:
    """Turn a budget into a number of rows or tokens (issue 2: ``P%`` = floor of the eligible rows, at least 1).

    Args:
        problem: the eligible rows.
        budget: what was asked.

    Returns:
        Rows or tokens, with a note when there are fewer eligible rows than asked.

    Raises:
        BudgetError: more was asked than was read.
        DataError: no row is eligible.
    """
    if problem.size == 0:
        raise DataError(
            "no usable row is left to select from",
            got=f"{problem.num_read} rows read, 0 usable",
            do="look at the statuses in the audit table; gradsift inspect shows one row",
        )
    if budget.percent is not None:
        return Allowance(max(1, int(np.floor(problem.size * budget.percent / 100 + 1e-9))), None)
    if budget.rows is not None:
        if budget.rows > problem.num_read:
            raise BudgetError(
                "the budget asks for more rows than were read",
                where="--budget",
                got=str(budget),
                expected=f"at most {problem.num_read} rows",
                do="lower the budget or add pool files",
            )
        if budget.rows <= problem.size:
            return Allowance(budget.rows, None)
        text = f"{budget.rows} rows were asked, {problem.size} are eligible: all of them may be taken"
        return Allowance(problem.size, None, (Note("shortage", text, budget.rows - problem.size),))
    assert budget.tokens is not None
    total = int(problem.num_trained.sum())
    if budget.tokens > problem.num_trained_read:
        raise BudgetError(
            "the budget asks for more trained tokens than were read",
            where="--budget",
            got=str(budget),
            expected=f"at most {problem.num_trained_read}tok",
            do="lower the budget or add pool files",
        )
    if budget.tokens <= total:
        return Allowance(None, budget.tokens)
    text = f"{budget.tokens} trained tokens were asked, {total} are eligible: all rows may be taken"
    return Allowance(None, budget.tokens, (Note("shortage", text, budget.tokens - total),))


@dataclass(frozen=True)
class Taken:
    """Rows taken in rank order.

    Args:
        chosen: int64 [k] row indices in rank order.
        order: int64 [n] all candidates in the rank order that was used.
        skipped: int64 [s] candidates passed over because they did not fit the tokens left.
        cut: margin, bound and undecided rows.
    """

    chosen: Int[np.ndarray, " k"]
    order: Int[np.ndarray, " n"]
    skipped: Int[np.ndarray, " s"]
    cut: Cut


def take_ranked(
    problem: Problem,
    score: Float[np.ndarray, " N"],
    allowance: Allowance,
    *,
    candidates: Bool[np.ndarray, " N"] | None = None,
    bound: float = 0.0,
) -> Taken:
    """Take candidates by falling score; near-ties at the cut are settled by id.

    Rows whose score lies within ``bound`` of the cut cannot be told apart by the measurement: they are listed as
    undecided and taken in id order. Under a token budget a row that does not fit is skipped and the next is tried.

    Args:
        problem: the eligible rows.
        score: float64 [N], higher first; must be finite on the candidates.
        allowance: rows or tokens.
        candidates: bool [N], rows that may be taken; all by default.
        bound: measured numerical bound on a score.

    Returns:
        The rows taken, the order used and the cut.

    Raises:
        NumericsError: a candidate's score is not finite.
    """
    pool = np.arange(problem.size) if candidates is None else np.flatnonzero(candidates)
    values = np.asarray(score, dtype=np.float64)
    if not np.isfinite(values[pool]).all():
        bad = pool[~np.isfinite(values[pool])][0]
        raise NumericsError(
            "a score is not finite",
            where=f"row {problem.ids[bad]}",
            got=str(values[bad]),
            expected="a finite score for every candidate",
            do="report this as a defect of the method",
        )
    order = pool[np.lexsort((pool, -values[pool]))]
    chosen, skipped, cut_at = _walk(order, problem.num_trained, allowance)
    if cut_at >= len(order):
        return Taken(chosen, order, skipped, Cut(0.0, bound))
    edge = values[order[max(cut_at - 1, 0)]]
    margin = float(edge - values[order[cut_at]]) if cut_at else 0.0
    undecided = np.abs(values[order] - edge) <= bound
    if margin > bound or not undecided[cut_at]:
        return Taken(chosen, order, skipped, Cut(margin, bound))
    order = np.concatenate(
        [
            order[~undecided & (values[order] > edge)],
            np.sort(order[undecided]),
            order[~undecided & (values[order] < edge)],
        ]
    )
    chosen, skipped, _ = _walk(order, problem.num_trained, allowance)
    window = np.sort(pool[np.abs(values[pool] - edge) <= bound])
    return Taken(chosen, order, skipped, Cut(margin, bound, tuple(problem.ids[i] for i in window)))


def _walk(
    order: Int[np.ndarray, " n"], num_trained: Int[np.ndarray, " N"], allowance: Allowance
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " s"], int]:
    """Walk the order within the allowance; also return the position of the first row left out."""
    if allowance.rows is not None:
        k = min(allowance.rows, len(order))
        return order[:k], order[:0], k
    assert allowance.tokens is not None
    left, chosen, skipped, first_out = allowance.tokens, [], [], len(order)
    cheapest_ahead = np.minimum.accumulate(num_trained[order][::-1])[::-1] if len(order) else np.zeros(0)
    for position, row in enumerate(order):
        if cheapest_ahead[position] > left:
            first_out = min(first_out, position)
            break
        if num_trained[row] <= left:
            chosen.append(row)
            left -= int(num_trained[row])
        else:
            skipped.append(row)
            first_out = min(first_out, position)
    return np.array(chosen, dtype=np.int64), np.array(skipped, dtype=np.int64), first_out


def build_selection(
    problem: Problem,
    method: Method,
    budget: Budget,
    stream: Stream,
    *,
    chosen: Int[np.ndarray, " k"],
    score: Float[np.ndarray, " N"],
    order: Sequence[int] | Int[np.ndarray, " n"],
    skipped: Int[np.ndarray, " s"] | None = None,
    cut: Cut = NO_CUT,
    kept: str = "score",
    why_kept: str | Callable[[int], str] = "",
    dropped: Mapping[int, tuple[str, str]] | None = None,
    weights: Float[np.ndarray, " k"] | None = None,
    cluster: Int[np.ndarray, " N"] | None = None,
    certificate: Certificate | None = None,
    mixture: Mapping[str, float] | None = None,
    notes: Sequence[Note] = (),
) -> Selection:
    """Assemble a Selection with an audit entry for every row of the problem.

    Args:
        problem: the eligible rows.
        method: the method that chose.
        budget: what was asked.
        stream: the stream the method was given.
        chosen: int64 [k] row indices in training order.
        score: float64 [N].
        order: candidate row indices by rank; gives the 1-based ranks.
        skipped: rows that did not fit the tokens left.
        cut: margin, bound, undecided.
        kept: last part of the reason code of chosen rows (``kept:score``).
        why_kept: sentence for chosen rows, or a function of the row index.
        dropped: reason code and sentence for rows excluded before ranking, by row index.
        weights: float32 [k], 1 by default.
        cluster: int32 [N], -1 by default.
        certificate: for set-level methods.
        mixture: for mixture methods.
        notes: counted remarks.

    Returns:
        The selection.
    """
    n = problem.size
    rank = np.full(n, -1, dtype=np.int32)
    order = np.asarray(order, dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1, dtype=np.int32)
    codes = ["dropped:budget"] * n
    reasons = [f"rank {r} of {len(order)}, beyond the budget {budget}" for r in rank]
    for row, (code, text) in (dropped or {}).items():
        codes[row], reasons[row] = code, text
    for row in skipped if skipped is not None else ():
        codes[row] = "dropped:does_not_fit"
        reasons[row] = (
            f"rank {rank[row]} of {len(order)}, but its {problem.num_trained[row]} trained tokens did not fit"
        )
    for row in chosen:
        codes[row] = f"kept:{kept}"
        detail = why_kept(int(row)) if callable(why_kept) else why_kept
        reasons[row] = f"rank {rank[row]} of {len(order)}" + (f": {detail}" if detail else "")
    return Selection(
        ids=tuple(problem.ids[i] for i in chosen),
        weights=np.ones(len(chosen), dtype=np.float32) if weights is None else weights,
        problem_ids=problem.ids,
        score=np.asarray(score, dtype=np.float64),
        rank=rank,
        reason_code=tuple(codes),
        reason=tuple(reasons),
        cluster=np.full(n, -1, dtype=np.int32) if cluster is None else cluster,
        method=method.name,
        config=dataclasses.asdict(method),  # type: ignore[call-overload] - every method is a dataclass
        budget=budget,
        seed=stream.seed,
        num_trained=int(problem.num_trained[chosen].sum()) if len(chosen) else 0,
        num_skipped=0 if skipped is None else len(skipped),
        cut=cut,
        certificate=certificate,
        mixture=mixture,
        notes=tuple(notes),
    )


def require(problem: Problem, method: Method) -> None:
    """Refuse a problem that lacks a signal the method needs.

    Args:
        problem: the eligible rows.
        method: the method about to run.

    Raises:
        SignalError: a needed signal is None; it is named.
    """
    for name in sorted(method.needs.signals):
        if getattr(problem, name) is None:
            raise SignalError(
                f"{method.name} needs the signal {name}",
                where="the collected signals",
                got="not measured",
                expected=f"a store that holds {name}",
                do="collect again with the same --out",
            )
