"""Drop the worst conflict, then the best target gain spread over clusters.

Source: ours, after Zhang et al., "Orthogonal Gradient Selection", 2026, arXiv 2602.06359 (abstract and summaries only);
no reproduction.

Algorithm:
    1  conf_i = max_m (-<g_i, u_m> / |g_i|); drop the floor(conflict_quantile N) rows of largest conf_i
    2  rho_i = min(1, q99(|g|) / |g_i|);  d_i = rho_i <g_i, u_target>
    3  K clusters of unit sketches; per cluster at most ceil(1.5 B / K) of its rows, those of largest d_i
    4  take the rows of largest d_i within the budget B

B counts rows or trained tokens, as the budget does. Rows may be longer than a share of a token budget: a cluster then
gives rows in rank order until they reach its share, the one that reaches it included, and rows longer than the budget use
up no share. When caps and conflict leave fewer than B, fewer are returned: nothing is filled.

Departures from the paper: the paper learns which cluster to draw from; this is a fixed rule. The quantile is relative,
because absolute cosines are small in high dimension. Dots are clipped at the 99th percentile of the norms, so that a
few large gradients do not decide.

Departures from released code: no official code was found. Departures from our specification: its cap counts rows; in
tokens a cluster may exceed it by less than the row that reaches it. The margin at the cut covers steps 1, 3 and 4 for the
clusters that were found; it does not cover the fit of the clusters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from gradsift.geometry.cluster import Clusters, spherical_kmeans
from gradsift.geometry.similarity import conf_max, row_scale
from gradsift.methods.base import (
    Allowance,
    Needs,
    build_selection,
    refuse_empty,
    register,
    require,
    resolve_budget,
    shortage_note,
    take_ranked,
)
from gradsift.methods.conflict import Kept, Share, drop_worst, threshold_note
from gradsift.methods.taking import take_until
from gradsift.seeds import Stream
from gradsift.types import Budget, Problem, Selection


@dataclass(frozen=True)
class Gain:
    """First-order gain of each row.

    Args:
        value: float64 [N] d_i, in units of gradient length.
        bound: how far one value may move when the signals are measured again.
    """

    value: Float[np.ndarray, " N"]
    bound: float


def clipped_gain(problem: Problem) -> Gain:
    """Dots with the target, rows above the 99th percentile of the norms scaled down to it (ours; ogs, scale clipped).

    Args:
        problem: the eligible rows with ``target_dot`` and ``grad_norm``.

    Returns:
        Gains d_i = min(|g_i|, q99) cos_i and their bound.
    """
    norm, cos = problem.grad_norm, problem.target_cos
    assert norm is not None
    assert cos is not None
    length = norm * row_scale(norm, "clipped")
    noise = problem.noise
    # |l'c' - lc| <= l'|c' - c| + |c||l' - l| with l' <= l (1 + noise.norm); the quantile moves no more than its rows.
    bound = float(np.max(length * ((1 + noise.norm) * noise.cos + np.abs(cos) * noise.norm)))
    return Gain(length * cos, bound)


def cap_clusters(
    problem: Problem, gain: Gain, kept: Kept, clusters: Clusters, allowance: Allowance, cap: Allowance
) -> Kept:
    """Keep the best rows of each cluster until they reach its share; rows longer than the budget stay, and use none of it.

    Args:
        problem: the eligible rows.
        gain: what rows are ranked by.
        kept: rows that are still in.
        clusters: the groups.
        allowance: the budget.
        cap: rows or trained tokens per cluster.

    Returns:
        The rows that remain, unsure ones and every row dropped so far.
    """
    cost = cap.cost(problem)
    fits = cost <= allowance.amount
    rows, unsure = kept.rows & ~fits, np.zeros(problem.size, dtype=bool)
    dropped = dict(kept.dropped)
    for number in range(len(clusters.sizes)):
        inside = (clusters.labels == number) & fits
        candidates = kept.rows & inside
        taken = take_until(
            gain.value, cost, cap.amount, candidates=candidates, unsure=kept.unsure & inside, bound=gain.bound
        )
        rows[taken.rows] = True
        unsure[taken.undecided] = True
        for row in np.flatnonzero(candidates & ~rows):
            dropped[int(row)] = ("dropped:cluster_cap", f"cluster {number} already gives its share of {cap}")
    return Kept(rows, unsure, dropped)


@register
@dataclass(frozen=True)
class Hybrid:
    """Low conflict, high gain, spread over clusters.

    Args:
        conflict_quantile: share of the rows dropped for conflict.
        cap_factor: a cluster gives at most this many times an equal share.
        num_clusters: K, or from the pool's size.
    """

    conflict_quantile: Share = 0.1
    cap_factor: Annotated[float, Field(ge=1, le=1000)] = 1.5
    num_clusters: Annotated[int, Field(ge=1)] | None = None

    name: ClassVar[str] = "hybrid"
    paper: ClassVar[str] = "ours, after Zhang et al. 2026, arXiv 2602.06359"
    summary: ClassVar[str] = "drops the worst conflict, then highest target gain with a cap per cluster"
    evidence: ClassVar[str] = "ours"

    @property
    def needs(self) -> Needs:
        """One forward and backward pass with sketches, an anchor and a target."""
        signals = frozenset({"anchor_dot", "grad_norm", "target_dot", "sketch"})
        return Needs(signals=signals, anchors=True, target=True, constrains=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Choose by conflict, gain and cluster.

        Args:
            problem: the eligible rows with ``anchor_dot``, ``grad_norm``, ``target_dot`` and ``sketch``.
            budget: how many rows or trained tokens.
            stream: seeds the clusters.

        Returns:
            The selection; scores are gains.
        """
        require(problem, self)
        allowance = resolve_budget(problem, budget)
        anchor_cos = problem.anchor_cos
        assert anchor_cos is not None
        assert problem.sketch is not None
        low = drop_worst(problem, anchor_cos, self.conflict_quantile)
        gain = clipped_gain(problem)
        clusters = spherical_kmeans(
            problem.sketch, stream.child("clusters"), ids=problem.ids, num_clusters=self.num_clusters
        )
        cap = self._cap(allowance, len(clusters.sizes))
        capped = cap_clusters(problem, gain, low, clusters, allowance, cap)
        taken = take_ranked(
            problem, gain.value, allowance, candidates=capped.rows, unsure=capped.unsure, bound=gain.bound
        )
        refuse_empty(problem, self, taken.chosen, taken.order)
        return build_selection(
            problem,
            self,
            budget,
            stream,
            chosen=taken.chosen,
            score=gain.value,
            order=taken.order,
            skipped=taken.skipped,
            cut=taken.cut,
            kept="gain",
            why_kept=_why(gain.value, conf_max(anchor_cos), clusters.labels),
            dropped=capped.dropped,
            cluster=clusters.labels,
            notes=[*shortage_note(problem, allowance, taken), *threshold_note(problem, low.unsure)],
        )

    def _cap(self, allowance: Allowance, num_clusters: int) -> Allowance:
        amount = int(np.ceil(self.cap_factor * allowance.amount / num_clusters - 1e-9))
        return Allowance(amount, None) if allowance.tokens is None else Allowance(None, amount)


def _why(
    gain: Float[np.ndarray, " N"], conf: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"]
) -> Callable[[int], str]:
    median = float(np.median(gain))
    return lambda i: f"gain {gain[i]:.3g}, pool median {median:.3g}, conflict {conf[i]:+.3f}, cluster {labels[i]}"
