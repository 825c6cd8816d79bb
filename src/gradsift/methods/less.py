"""Rows whose Adam direction points along the gradients of a few target rows, over checkpoints of a warm-up.

Paper: Xia, Malladi, Gururangan, Arora, Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning", 2024,
arXiv 2402.04333.

Algorithm:
    1  train the navigator's adapter on a random 5% of the pool for 4 epochs; keep weights and Adam's moments (m, v)
    2  at checkpoint c, for every pool row: g -> m' = .9 m + .1 g, v' = .999 v + .001 g^2, Gamma = m' / sqrt(v' + 1e-8);
       sketch it and bring it to length 1: G_c.  Rows of zero gradient are left out before this
    3  for every target row: its plain gradient, sketched, length 1: V_c
    4  Inf(z, z') = sum_c w_c <G_c[z], V_c[z']>, w_c the learning rate's share;  mean over the rows of a subtask
    5  each subtask in turn takes its best row that is left, until the budget is used up

``aggregate = max`` ranks by the largest subtask mean instead of step 5 (the paper's code). ``direction``: ``adam_diag`` is
g / sqrt(v + 1e-8), linear in g; ``raw`` is g itself. With ``redundancy`` below 1 a row whose direction has a larger cosine with
that of a row taken before is left out, and its subtask's turn is over. ``allow_cold`` measures the starting weights,
without a warm-up and with raw directions.

Departures from the paper: 2 checkpoints of the 4 epochs instead of 4, which halves the passes; sketches are sign-folds of
4,093 numbers, kept in float16; each subtask takes in turn, because the maximum can starve a subtask; the optimizer is the
recipe's. Our specification leaves near-copies out above a cosine of 0.95; that is off, because rows with like answers are no
copies and yet point alike, the more so under shared momentum.

Departures from released code: (princeton-nlp/LESS @8abf962, read for its formulas) the same Gamma (eps inside the root, no
bias correction, one (m, v) for all rows), the same plain target gradients, mean of cosines and normalization when rows
are written. Zero gradients are excluded: the shared m would give them a direction (cosine .9969 with a real row's in
the golden case).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field

from gradsift.errors import ConfigError, SignalError
from gradsift.geometry.checkpoints import CheckpointSignals, Count, Kept, Share, Warmup
from gradsift.geometry.embed import Turns, take_in_turns, unsettled
from gradsift.geometry.influence import (
    Influence,
    Walked,
    has_alike,
    influence_table,
    joint_features,
    walk_unlike,
)
from gradsift.methods.base import (
    Needs,
    build_selection,
    refuse_empty,
    register,
    require,
    resolve_budget,
    select_ranked,
    shortage_note,
    take_ranked,
)
from gradsift.methods.taking import Taken
from gradsift.seeds import Stream
from gradsift.types import Budget, Cut, Note, Problem, Selection


@register
@dataclass(frozen=True)
class Less:
    """Influence on a few target rows.

    Args:
        aggregate: ``round_robin`` lets subtasks choose in turn, ``max`` ranks by the best subtask.
        direction: what a pool row's gradient is turned into.
        num_checkpoints: checkpoints that are measured, one pass each.
        warmup_share: share of the pool that the navigator is trained on.
        epochs: passes of that training.
        redundancy: cosine with a taken row above which a row is left out; 1 leaves none out.
        allow_cold: no warm-up; for study, since without it the method is reported to be worse than a random draw.
    """

    aggregate: Literal["round_robin", "max"] = "round_robin"
    direction: Kept = "adam"
    num_checkpoints: Count = 2
    warmup_share: Share = 0.05
    epochs: Annotated[int, Field(ge=0)] = 4
    redundancy: Annotated[float, Field(gt=0, le=1)] = 1.0
    allow_cold: bool = False

    name: ClassVar[str] = "less"
    paper: ClassVar[str] = "Xia et al. 2024, arXiv 2402.04333 (LESS)"
    summary: ClassVar[str] = "Adam directions that point along a few target rows, over checkpoints of a warm-up"
    evidence: ClassVar[str] = "abstract + code + summaries"

    def __post_init__(self) -> None:
        if self.direction == "none":
            raise ConfigError(
                "less ranks by directions", where="--set direction", got="none", expected="adam, adam_diag or raw"
            )
        if self.epochs == 0 and not self.allow_cold:
            raise ConfigError(
                "less trains the navigator before it measures", where="--set epochs", got=0, expected="at least 1",
                do="leave epochs out, or study the cold form with --set allow_cold=true",
            )  # fmt: skip
        if not self.allow_cold:  # refuses here rather than when it is needed
            Warmup(self.warmup_share, self.epochs, self.num_checkpoints)

    @property
    def needs(self) -> Needs:
        """A warm-up, then a forward and backward pass per checkpoint, over pool and target."""
        trained = (self.warmup_share, self.epochs, self.num_checkpoints, self.direction)
        warmup = Warmup(epochs=0, direction="raw") if self.allow_cold else Warmup(*trained)
        return Needs(signals=frozenset({"grad_norm"}), target=True, warmup=warmup)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows of largest influence on the target's rows.

        Args:
            problem: the eligible rows with their ``checkpoints``, and the ``subtasks`` of the target's rows.
            budget: rows, percentage or trained tokens.
            stream: unused, nothing is drawn.

        Returns:
            The selection. Scores are the largest subtask mean, or, in turns, minus the number of the turn.
        """
        require(problem, self)
        _check(problem)
        found = influence_table(problem.checkpoints, problem.subtasks)
        best = found.table.argmax(axis=1)
        notes = (_length_note(problem, found), *_flat_note(found))

        def why(i: int) -> str:
            return f"mean influence {found.table[i, best[i]]:+.4f} on {found.subtasks[best[i]]}"

        if self.aggregate == "max":
            plain = select_ranked(
                problem, self, budget, stream, score=found.table.max(axis=1).astype(np.float64), bound=found.noise,
                kept="influence", why_kept=why, notes=notes,
            )  # fmt: skip
        else:
            plain = self._in_turns(problem, budget, stream, found, notes, why)
        # Where no two rows that could be chosen are alike, leaving near-copies out changes nothing.
        if self.redundancy == 1 or not _alike(problem, plain, self.redundancy - 2 * found.noise):
            return _with_shares(problem, plain, found)
        return _with_shares(problem, self._unlike(problem, budget, stream, found, notes), found)

    def _in_turns(
        self,
        problem: Problem,
        budget: Budget,
        stream: Stream,
        found: Influence,
        notes: tuple[Note, ...],
        why: Callable[[int], str],
    ) -> Selection:
        """Let each subtask in turn take its best row that is left."""
        turns, allowance = take_in_turns(found.table), resolve_budget(problem, budget)
        turn_of = _places(turns.order)
        taken = take_ranked(problem, -1.0 - turn_of, allowance)
        cut, near = _turn_cut(problem, found, turns, taken, turn_of)
        return build_selection(
            problem,
            self,
            budget,
            stream,
            chosen=taken.chosen,
            score=-1.0 - turn_of,
            order=taken.order,
            skipped=taken.skipped,
            cut=cut,
            kept="influence",
            why_kept=lambda i: f"taken by {found.subtasks[turns.taker[turn_of[i]]]}: {why(i)}",
            notes=(*shortage_note(problem, allowance, taken), *near, *notes),
        )

    def _unlike(
        self, problem: Problem, budget: Budget, stream: Stream, found: Influence, notes: tuple[Note, ...]
    ) -> Selection:
        """Walk the same order and leave near-copies out."""
        allowance, reach = resolve_budget(problem, budget), 2 * found.noise
        score = found.table.max(axis=1).astype(np.float64)
        order = np.argsort(-score, kind="stable")
        gap = np.append(score[order][:-1] - score[order][1:], np.inf)
        if self.aggregate == "round_robin":
            turns = take_in_turns(found.table)
            order, gap, score = turns.order, turns.gap, -1.0 - _places(turns.order)
        walked = walk_unlike(
            order, joint_features(problem.checkpoints), allowance.cost(problem), allowance.amount,
            threshold=self.redundancy, reach=reach,
        )  # fmt: skip
        left = np.array([i for i in order.tolist() if i not in walked.redundant], dtype=np.int64)
        refuse_empty(problem, self, walked.chosen, left)
        taken = Taken(walked.chosen, left, walked.skipped, _walk_cut(problem, order, gap, walked, reach))
        dropped = {
            i: (
                "dropped:redundant",
                f"its direction has a cosine above {self.redundancy} with that of {problem.ids[j]}",
            )
            for i, j in walked.redundant.items()
        }
        text = f"{len(dropped)} rows point almost where a taken row points and were left out"
        extra = (Note("redundant", text, len(dropped), tuple(problem.ids[i] for i in list(dropped)[:5])),)
        return build_selection(
            problem,
            self,
            budget,
            stream,
            chosen=taken.chosen,
            score=score,
            order=left,
            skipped=taken.skipped,
            cut=taken.cut,
            kept="influence",
            why_kept=lambda i: f"mean influence up to {found.table[i].max():+.4f}",
            dropped=dropped,
            notes=(*shortage_note(problem, allowance, taken), *(extra if dropped else ()), *notes),
        )


def _check(problem: Problem) -> None:
    """Refuse directions that do not belong to these rows."""
    for one in problem.checkpoints:
        assert isinstance(one, CheckpointSignals)
        if len(one.features) != problem.size or len(one.target) != len(problem.subtasks):
            raise SignalError(
                "the directions at a checkpoint are not those of these rows",
                where="problem.checkpoints",
                got=f"{len(one.features)} rows and {len(one.target)} target rows",
                expected=f"{problem.size} and {len(problem.subtasks)}",
                do="measure again with the same --out",
            )


def _alike(problem: Problem, selection: Selection, threshold: float) -> bool:
    """Tell whether two rows that are chosen, or could be, have directions with a larger cosine than the threshold."""
    some = {*selection.ids, *selection.cut.undecided}
    rows = np.array([k for k, name in enumerate(problem.ids) if name in some], dtype=np.int64)
    return has_alike(joint_features(problem.checkpoints, rows), threshold)


def _places(order: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return places


def _turn_cut(
    problem: Problem, found: Influence, turns: Turns, taken: Taken, turn_of: Int[np.ndarray, " N"]
) -> tuple[Cut, tuple[Note, ...]]:
    """Least gap of the turns that were used, and the rows that near-ties could bring in or out."""
    reach = 2 * found.noise  # both entries of a comparison may move
    if len(taken.chosen) == problem.size:
        return Cut(0.0, reach), ()
    used = int(turn_of[taken.chosen].max()) + 1
    undecided = unsettled(turns, found.table, used, reach)
    cut = Cut(float(turns.gap[:used].min()), reach, tuple(problem.ids[i] for i in undecided))
    close = int((turns.gap[:used] <= reach).sum())
    text = f"at {close} of {used} turns two rows were closer than the numerical bound"
    return cut, (Note("near_ties", text, close),) if undecided.size else ()


def _walk_cut(problem: Problem, order: Int[np.ndarray, " N"], gap: np.ndarray, walked: Walked, reach: float) -> Cut:
    """With near-copies left out, whatever comes after the first close comparison can change."""
    seen = len(order) - len(walked.rest)
    if not len(walked.rest) and not walked.redundant and not walked.skipped.size:
        return Cut(0.0, reach)
    margin = float(gap[:seen].min())
    close = np.flatnonzero(gap[:seen] <= reach)
    first = min(walked.settled, int(close[0]) if close.size else len(order))
    if reach == 0 or (first >= seen):
        return Cut(margin if np.isfinite(margin) else 0.0, reach)
    return Cut(0.0, reach, tuple(problem.ids[i] for i in sorted(order[first:].tolist())))


def _length_note(problem: Problem, found: Influence) -> Note:
    """Median length of the rows of largest influence against the pool's (less.md 7)."""
    score = found.table.max(axis=1)
    top = np.argsort(-score, kind="stable")[: max(1, problem.size // 20)]
    here, all_rows = float(np.median(problem.num_trained[top])), float(np.median(problem.num_trained))
    text = f"median trained tokens of the 5% of largest influence: {here:g}, of the pool: {all_rows:g}"
    return Note("length", text, len(top))


def _with_shares(problem: Problem, selection: Selection, found: Influence) -> Selection:
    """Say how many chosen rows serve each subtask best: the maximum can starve one (less.md 7)."""
    if len(found.subtasks) < 2:
        return selection
    place = {name: i for i, name in enumerate(problem.ids)}
    best = found.table[[place[name] for name in selection.ids]].argmax(axis=1)
    counts = zip(found.subtasks, np.bincount(best, minlength=len(found.subtasks)).tolist(), strict=True)
    text = f"rows chosen by the subtask that they serve best: {', '.join(f'{name} {n}' for name, n in counts)}"
    return replace(selection, notes=(*selection.notes, Note("subtasks", text, len(selection.ids))))


def _flat_note(found: Influence) -> tuple[Note, ...]:
    flat = [name for name, column in zip(found.subtasks, found.table.T, strict=True) if np.ptp(column) == 0]
    if not flat:
        return ()
    return (Note("flat_subtask", f"all rows have the same influence on {', '.join(flat)}", len(flat)),)
