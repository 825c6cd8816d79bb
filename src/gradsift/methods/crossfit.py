"""Domain rows that probes trained on other rows believe, and pool rows that the model already knows.

Source: ours, after the small-loss rule of co-teaching (Han et al. 2018, arXiv 1804.06872), cross-fitting (Chernozhukov
et al. 2016, arXiv 1608.00060) and replay. Gradients play no part in it.

Algorithm:
    1  prior:   the ``prior_share`` of rows of largest likeness, mean over tokens of log p_target / p_pool; of rows of
                equal tokens at most ``max_copies``
    2  l1_i     mean loss of row i under short trainings on the other fold of the prior (measured before)
    3  trusted: the ``trust`` share of the prior of smallest l1
    4  known:   rows outside the likely domain with l0_i <= the ``known_quantile`` of the anchor rows' l0, l0 the loss
                at the starting weights; at most ``max_copies`` of equal ones
    5  draw from the known rows a share ``protect`` of the budget, from the trusted ones the rest, each by keyed draw;
       what one of the two cannot fill the other does, and that is said

Departures from the paper: co-teaching lets two networks exchange small-loss rows while they train; here the folds are
dealt once and the losses are those of finished probes. Cross-fitting corrects an estimate; here it only keeps a probe from
judging rows that it learned. A probe's replay rows are anchor rows. A token budget is shared by trained tokens.

Departures from released code: none was read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from gradsift.geometry.trust import (
    Prior,
    by_score,
    cap_copies,
    fair_places,
    likely_domain,
    num_trusted,
    settled_ranks,
)
from gradsift.methods.base import Allowance, Needs, register, require, resolve_budget, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Cut, Note, Problem, Selection

Share = Annotated[float, Field(gt=0, le=1)]


@register
@dataclass(frozen=True)
class Crossfit:
    """Trusted domain rows and known rows.

    Args:
        prior_share: share of the rows that may be domain, in (0, 1].
        max_copies: rows of equal tokens that may be trusted, and that may be known.
        trust: share of the prior that is trusted, in (0, 1].
        protect: share of the budget that is drawn from the known rows, in [0, 1).
        known_quantile: quantile of the anchor rows' starting loss up to which a row counts as known, in (0, 1].
    """

    name: ClassVar[str] = "crossfit"
    paper: ClassVar[str] = "ours, after co-teaching (arXiv 1804.06872) and cross-fitting (arXiv 1608.00060)"
    summary: ClassVar[str] = "domain rows of low loss under probes trained on other rows, and rows the model knows"
    evidence: ClassVar[str] = "ours"

    prior_share: Share = 0.53
    max_copies: Annotated[int, Field(ge=1)] = 3
    trust: Share = 0.65
    protect: Annotated[float, Field(ge=0, lt=1)] = 0.4
    known_quantile: Share = 0.95

    @property
    def needs(self) -> Needs:
        """One forward pass, and short trainings of the navigator on two halves of the likely domain."""
        return Needs(
            signals=frozenset({"loss", "likeness", "held_out_loss"}),
            anchors=True,
            target=True,
            probes=Prior(self.prior_share, self.max_copies),
        )

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Draw trusted and known rows.

        Args:
            problem: the eligible rows with ``loss``, ``likeness`` and ``held_out_loss``, and the ``anchor_loss``.
            budget: rows, percentage or trained tokens.
            stream: of the draw.

        Returns:
            The selection. Scores are minus the place in the merged queues of trusted and known rows.
        """
        require(problem, self)
        groups, allowance = self._groups(problem), resolve_budget(problem, budget)
        draw = stream.child("draw").uniform(problem.ids)
        place = fair_places(
            by_score(-draw, groups.trusted), by_score(-draw, groups.known), allowance.cost(problem), self.protect
        )
        candidates = np.isfinite(place)
        selection = select_ranked(
            problem,
            self,
            budget,
            stream,
            score=np.where(candidates, -place, np.nan),
            why_kept=lambda i: groups.why(problem, i),
            candidates=candidates,
            dropped=self._dropped(problem, groups),
        )
        cut = _cut(problem, groups, draw, allowance, self.protect)
        notes = (*selection.notes, *_notes(problem, groups, selection, self.protect, allowance))
        return dataclasses.replace(_renamed(problem, groups, selection), cut=cut, notes=notes)

    def _groups(self, problem: Problem) -> _Groups:
        loss, likeness, held, anchor_loss = (
            problem.loss, problem.likeness, problem.held_out_loss, problem.anchor_loss,
        )  # fmt: skip
        assert loss is not None
        assert likeness is not None
        assert held is not None
        assert anchor_loss is not None
        likely = likely_domain(likeness, self.prior_share)
        prior = by_score(-held, np.sort(cap_copies(likely, problem.copy_group, self.max_copies)))
        count = num_trusted(self.trust, len(prior))
        threshold = float(np.quantile(anchor_loss, self.known_quantile))
        outside = np.ones(problem.size, dtype=bool)
        outside[likely] = False
        known = cap_copies(np.flatnonzero(outside & (loss <= threshold)), problem.copy_group, self.max_copies)
        return _Groups(~outside, prior, prior[:count], known, loss, held, threshold)

    def _dropped(self, problem: Problem, groups: _Groups) -> dict[int, tuple[str, str]]:
        """Reasons of the rows that are no candidates."""
        assert problem.likeness is not None
        least = float(problem.likeness[groups.likely].min())
        in_prior, taken = np.zeros(problem.size, dtype=bool), np.zeros(problem.size, dtype=bool)
        in_prior[groups.prior] = True
        taken[np.concatenate([groups.trusted, groups.known])] = True
        copies = f"{self.max_copies} rows of equal tokens come before it"
        out: dict[int, tuple[str, str]] = {}
        for i in np.flatnonzero(~taken).tolist():
            if in_prior[i]:
                text = f"held-out loss {groups.held[i]:.4g} above {groups.edge:.4g}, the largest that is trusted"
                out[i] = ("dropped:untrusted", text)
            elif groups.likely[i] or groups.loss[i] <= groups.threshold:
                out[i] = ("dropped:copies", copies)
            else:
                text = (
                    f"likeness {problem.likeness[i]:.4g} below {least:.4g}, so no domain row, and starting loss "
                    f"{groups.loss[i]:.4g} above {groups.threshold:.4g}, so not known"
                )
                out[i] = ("dropped:not_domain", text)
        return out


@dataclass(frozen=True)
class _Groups:
    """What the choice rests on.

    Args:
        likely: bool [N] rows that look like domain, surplus copies included.
        prior: int64 [p] rows of the prior by rising held-out loss.
        trusted: int64 [t] the first of them.
        known: int64 [m] rows that the model knows, in id order.
        loss: float64 [N] at the starting weights.
        held: float64 [N] held-out loss.
        threshold: starting loss up to which a row is known.
    """

    likely: Bool[np.ndarray, " N"]
    prior: Int[np.ndarray, " p"]
    trusted: Int[np.ndarray, " t"]
    known: Int[np.ndarray, " m"]
    loss: Float[np.ndarray, " N"]
    held: Float[np.ndarray, " N"]
    threshold: float

    @property
    def edge(self) -> float:
        """Largest held-out loss that is trusted."""
        return float(self.held[self.trusted[-1]])

    def why(self, problem: Problem, i: int) -> str:
        """Say why a row is a candidate."""
        if not self.likely[i]:
            return (
                f"drawn from the known rows, starting loss {self.loss[i]:.4g}, anchor rows up to {self.threshold:.4g}"
            )
        likeness = 0.0 if problem.likeness is None else problem.likeness[i]
        return f"drawn from the trusted rows, held-out loss {self.held[i]:.4g}, likeness {likeness:.4g}"


def _renamed(problem: Problem, groups: _Groups, selection: Selection) -> Selection:
    """Name the group a row was drawn from, and the draw where it lost it."""
    chosen = set(selection.ids)
    codes, reasons = list(selection.reason_code), list(selection.reason)
    for i, row in enumerate(problem.ids):
        if row in chosen:
            codes[i] = "kept:trusted" if groups.likely[i] else "kept:known"
        elif codes[i] == "dropped:budget":
            group = "trusted" if groups.likely[i] else "known"
            codes[i], reasons[i] = "dropped:draw", f"{group}, but not drawn: {reasons[i]}"
    return dataclasses.replace(selection, reason_code=tuple(codes), reason=tuple(reasons))


def _notes(problem: Problem, groups: _Groups, selection: Selection, protect: float, allowance: Allowance) -> list[Note]:
    """Say that no gradient was used, and where one group had to fill in for the other."""
    notes = [
        Note(
            "no_gradients",
            "gradients play no part in crossfit: it reads tokens, starting losses and losses under probes",
        )
    ]
    place = {row: i for i, row in enumerate(problem.ids)}
    rows = np.array([place[row] for row in selection.ids])
    cost, known = allowance.cost(problem), ~groups.likely[rows]
    got, total = int(cost[rows[known]].sum()), int(cost[rows].sum())
    unit = "rows" if allowance.tokens is None else "trained tokens"
    short = next((name for name, all_of, some in (
        ("known", groups.known, known), ("trusted", groups.trusted, ~known)
    ) if len(all_of) == some.sum()), None)  # fmt: skip
    away = abs(got - protect * total)
    if short is not None and away > float(cost[rows].max()):
        text = (
            f"{got} of {total} {unit} come from the known rows instead of {protect:.0%}: {len(groups.known)} rows are "
            f"known and {len(groups.trusted)} are trusted, and all {short} ones were taken"
        )
        notes.append(Note("filled_in", text, round(away)))
    return notes


def _cut(problem: Problem, groups: _Groups, draw: Float[np.ndarray, " N"], allowance: Allowance, protect: float) -> Cut:
    """Find how near rows come to the two thresholds, and which rows that leaves undecided.

    The margin is in nats: the least distance of a row to the threshold of trust (twice) or of knowledge. Every loss may
    move by the measured bound, and so may the thresholds. Under a token budget only the rows near a threshold are listed.
    """
    reach = 4 * problem.noise.loss
    held, outside = groups.held, ~groups.likely
    rest = groups.prior[len(groups.trusted) :]
    margins = [float(np.abs(groups.loss[outside] - groups.threshold).min())] if outside.any() else []
    maybe = np.zeros((2, problem.size), dtype=bool)
    if len(rest):
        margins.append(float(held[rest[0]]) - groups.edge)
        maybe[0, groups.trusted] = held[groups.trusted] >= held[rest[0]] - reach
        maybe[0, rest] = held[rest] <= groups.edge + reach
    maybe[1] = outside & (np.abs(groups.loss - groups.threshold) <= reach)
    if not reach or not maybe.any():
        return Cut(min(margins, default=0.0), reach)
    if allowance.rows is None:
        undecided = np.flatnonzero(maybe.any(axis=0))
    else:
        undecided = _undecided(groups, draw, maybe, allowance.rows, protect)
    return Cut(min(margins), reach, tuple(problem.ids[i] for i in undecided))


def _undecided(
    groups: _Groups, draw: Float[np.ndarray, " N"], maybe: Bool[np.ndarray, "2 N"], count: int, protect: float
) -> Int[np.ndarray, " u"]:
    """Rows that another measurement could draw or not draw: the trusted rows keep their number, the known need not."""
    sure = np.zeros_like(maybe)
    sure[0, groups.trusted] = sure[1, groups.known] = True
    sure &= ~maybe
    size = len(groups.trusted)
    fewest, most = int(sure[1].sum()), int((sure[1] | maybe[1]).sum())
    low = min(fewest, max(int(np.floor(protect * count)), count - size))
    high = min(most, max(int(np.ceil(protect * count)), count - size))
    out = np.zeros(len(draw), dtype=bool)
    for group, least, largest in ((0, count - high, count - low), (1, low, high)):
        before, at_most = settled_ranks(draw, sure[group], maybe[group])
        out |= (maybe[group] | sure[group] & (at_most >= least)) & (before < largest)
    return np.flatnonzero(out)
