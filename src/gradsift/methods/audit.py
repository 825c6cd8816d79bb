"""A Selection with an audit entry for every row of the problem (ours)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import InfeasibleError
from gradsift.methods.taking import resolve_budget, shortage_note, take_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Certificate, Cut, Note, Problem, Selection

if TYPE_CHECKING:
    from gradsift.methods.base import Method

NO_CUT = Cut(0.0, 0.0)


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
    details: Mapping[str, Any] | None = None,
    explained: bool = True,
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
        details: what else the method has to show, as plain JSON values.
        explained: False leaves the sentences of all rows empty, for a caller that writes its own: a million are 200 MB.

    Returns:
        The selection.
    """
    n = problem.size
    rank = np.full(n, -1, dtype=np.int32)
    order = np.asarray(order, dtype=np.int64)
    rank[order] = np.arange(1, len(order) + 1, dtype=np.int32)
    codes = ["dropped:budget"] * n
    reasons = [f"rank {r} of {len(order)}, beyond the budget {budget}" if explained else "" for r in rank]
    for row, (code, text) in (dropped or {}).items():
        codes[row], reasons[row] = code, text
    for row in skipped if skipped is not None else ():
        codes[row] = "dropped:does_not_fit"
        reasons[row] = (
            f"rank {rank[row]} of {len(order)}, but its {problem.num_trained[row]} trained tokens did not fit"
        )
    for row in chosen:
        codes[row] = f"kept:{kept}"
        if not explained:
            continue
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
        details=details,
    )


def select_ranked(
    problem: Problem,
    method: Method,
    budget: Budget,
    stream: Stream,
    *,
    score: Float[np.ndarray, " N"],
    bound: float = 0.0,
    kept: str = "score",
    why_kept: Callable[[int], str],
    candidates: Bool[np.ndarray, " N"] | None = None,
    unsure: Bool[np.ndarray, " N"] | None = None,
    dropped: Mapping[int, tuple[str, str]] | None = None,
    notes: Sequence[Note] = (),
) -> Selection:
    """Take the rows of highest score within the budget: the second half of every method that ranks.

    Args:
        problem: the eligible rows.
        method: the method that chooses.
        budget: what was asked.
        stream: the stream the method was given.
        score: float64 [N], higher first.
        bound: how far one score may move when the signals are measured again.
        kept: last part of the reason code of chosen rows.
        why_kept: sentence for a row, by its index.
        candidates: bool [N], rows that may be taken; all by default.
        unsure: bool [N], rows whose candidacy the measurement does not settle.
        dropped: reason code and sentence of the rows that are no candidates.
        notes: counted remarks, beside those about shortages.

    Returns:
        The selection, in rank order. When the method excludes every row, or every one that fits the budget, it is
        refused (InfeasibleError).
    """
    allowance = resolve_budget(problem, budget)
    taken = take_ranked(problem, score, allowance, candidates=candidates, unsure=unsure, bound=bound)
    refuse_empty(problem, method, taken.chosen, taken.order)
    return build_selection(
        problem,
        method,
        budget,
        stream,
        chosen=taken.chosen,
        score=score,
        order=taken.order,
        skipped=taken.skipped,
        cut=taken.cut,
        kept=kept,
        why_kept=why_kept,
        dropped=dropped,
        notes=[*shortage_note(problem, allowance, taken), *notes],
    )


def refuse_empty(
    problem: Problem,
    method: Method,
    chosen: Int[np.ndarray, " k"],
    candidates: Int[np.ndarray, " n"],
    *,
    why: str = "none of which fits the budget",
    do: str = "raise the budget, loosen the method's settings, or use ogs_dual, which constrains the sum of the rows and not "
    "each of them",
) -> None:
    """Refuse a selection of no rows: nothing could be trained on it.

    Args:
        problem: the eligible rows.
        method: the method that chose.
        chosen: int64 [k] row indices.
        candidates: int64 [n] rows that the method left as candidates.
        why: what keeps them out.
        do: the remedy.

    Raises:
        InfeasibleError: nothing was chosen.
    """
    if len(chosen) == 0:
        raise InfeasibleError(
            f"{method.name} leaves no row to choose",
            got=f"{problem.size} eligible rows, {len(candidates)} of them candidates, {why}",
            expected="at least one row",
            do=do,
        )
