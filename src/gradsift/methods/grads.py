"""Rows of the densest norms of the embedding's and the LM head's gradient, after one epoch on the pool.

Paper: "GrADS", 2025, arXiv 2511.08620. This is a reconstruction from public summaries: only the abstract and the listing
could be read; no equation, data set, model or training setting of the paper is confirmed.

Algorithm:
    1  train the navigator for one epoch on the whole pool; freeze it
    2  e_i, h_i = Frobenius norms of row i's gradient on the embedding table and on the LM head, kept apart when tied
    3  u = log e, v = log h, each (a - median) / (q75 - q25);  s_i = (u_i + v_i) / 2
    4  rho_i = 1 / (n b) sum_j phi((s_i - s_j) / b) over the rows of the same source, b = sd(s) n^(-1/5)
    5  of every source, in proportion to its size, take the rows of largest rho

``rule``: ``top_density`` as above; ``density_sample`` draws without replacement with weights rho^gamma (advised for real
use: it keeps a spread); ``upper_density`` leaves out what lies below the median of s; ``product`` ranks by
log rho + beta z(s); ``top_norm``, ``bottom_norm`` and ``mid_band`` are controls on s. ``combine``: ``sum_raw``,
``emb_only``, ``lm_only`` and ``joint2d`` (a density in the plane) beside ``mean_log``. ``at_base`` measures without the epoch.

Departures from the paper: (as far as it is known) gradients are taken after the epoch, at frozen weights; scale and
combination are ours (the scale alone changes all picks at 5%); Scott's bandwidth; the budget is given; every source has a
density of its own, because one density would keep the largest source only; the selection trains the base and not the
warmed navigator; nothing is compared with a target or an anchor.

Departures from released code: there is no code. Departures from our specification: truncated rows are judged as the trainer
sees them and counted by the run; ``lm_only`` shares the ordinary pass instead of a forward of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from gradsift.errors import NumericsError
from gradsift.geometry.checkpoints import Share, Warmup
from gradsift.geometry.density import (
    MIN_ROWS,
    Combine,
    Points,
    combine_norms,
    kernel_density,
    rank_correlation,
    standard_score,
)
from gradsift.methods.base import Needs, register, require
from gradsift.methods.quota import Group, select_by_quota
from gradsift.seeds import Stream
from gradsift.types import Budget, Note, Problem, Selection

Rule = Literal["top_density", "density_sample", "upper_density", "product", "top_norm", "bottom_norm", "mid_band"]
LENGTH_WARNING = 0.5
SUMMARY = "reconstruction from public summaries: the paper's body, its settings and its code could not be read"


@register
@dataclass(frozen=True)
class Grads:
    """Dense middle of two gradient norms.

    Args:
        combine: how the two norms become one signal.
        rule: which rows of the density are taken.
        gamma: power of the density that ``density_sample`` draws by.
        beta: weight of the signal in ``product``.
        per_source: a density and a quota for every source; False takes all rows as one.
        warmup_share: share of the pool that the epoch runs over.
        at_base: measure at the starting weights, without the epoch.
    """

    combine: Combine = "mean_log"
    rule: Rule = "top_density"
    gamma: Annotated[float, Field(ge=0)] = 1.0
    beta: float = 0.5
    per_source: bool = True
    warmup_share: Share = 1.0
    at_base: bool = False

    name: ClassVar[str] = "grads"
    paper: ClassVar[str] = "GrADS 2025, arXiv 2511.08620 (reconstruction from public summaries)"
    summary: ClassVar[str] = "densest embedding and LM-head gradient norms after one epoch (from public summaries)"
    evidence: ClassVar[str] = "abstract + summaries"

    @property
    def needs(self) -> Needs:
        """One epoch of training, then one forward and backward pass."""
        used = {"emb_only": ("emb_grad_norm",), "lm_only": ("head_grad_norm",)}
        signals = used.get(self.combine, ("emb_grad_norm", "head_grad_norm"))
        warmup = None if self.at_base else Warmup(share=self.warmup_share)
        return Needs(signals=frozenset(signals), warmup=warmup, least_rows=MIN_ROWS, each_label=self.per_source)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take rows by the density of their norms.

        Args:
            problem: the eligible rows with ``emb_grad_norm`` and ``head_grad_norm``, whichever ``combine`` uses.
            budget: rows, percentage or trained tokens.
            stream: used by ``density_sample``.

        Returns:
            The selection. Scores are the rule's own values where all rows are one source, else 1 minus the place within
            the row's source. Fewer than 20 rows of a source, or norms without a spread, are refused (NumericsError).
        """
        require(problem, self)
        norms = [getattr(problem, name) for name in sorted(self.needs.signals)]
        scored = np.all([norm > 0 for norm in norms], axis=0)
        labels = np.array(problem.sources, dtype=object) if self.per_source else np.full(problem.size, "", dtype=object)
        signal, groups = np.full(problem.size, np.nan), []
        for label in sorted(set(labels[scored])):
            rows = np.flatnonzero((labels == label) & scored)
            points = self._points(problem, rows)
            signal[rows] = points.line
            groups.append(self._group(problem, rows, points, str(label), stream))
        _refuse_unscored(problem, scored)
        value = np.full(problem.size, np.nan)
        for group in groups:
            value[group.rows] = group.value
        return select_by_quota(
            problem,
            self,
            budget,
            stream,
            groups=groups,
            dropped=_dropped(scored),
            kept=self.rule if "density" in self.rule or self.rule == "product" else "signal",
            why_kept=lambda i: f"{self.rule} {value[i]:.4g} at signal {signal[i]:+.3f}",
            notes=_notes(problem, scored, signal, self),
        )

    def _points(self, problem: Problem, rows: np.ndarray) -> Points:
        """The signal of some rows."""
        emb, head = problem.emb_grad_norm, problem.head_grad_norm
        return combine_norms(
            None if emb is None else emb[rows], None if head is None else head[rows], self.combine,
            relative=problem.noise.norm,
        )  # fmt: skip

    def _group(self, problem: Problem, rows: np.ndarray, points: Points, label: str, stream: Stream) -> Group:
        """What the rule ranks the rows of one source by, and how far that may move."""
        density, line = kernel_density(points), points.line
        log_rho, middle = np.log(density.rho), float(np.median(line))
        every = np.ones(len(rows), dtype=bool)
        candidates, unsure = every, ~every
        if self.rule == "top_density":
            value, bound = log_rho, density.slack
        elif self.rule == "density_sample":  # the largest log w + Gumbel are a draw without replacement by weights w
            draws = stream.child("density").uniform([problem.ids[i] for i in rows])
            value = self.gamma * log_rho - np.log(-np.log(draws + 0.5**54))
            bound = self.gamma * density.slack
        elif self.rule == "upper_density":
            value, bound = log_rho, density.slack
            candidates = line >= middle
            unsure = (np.abs(line - middle) <= 2 * points.shift) & (points.shift > 0)
        elif self.rule == "product":
            z, moved = standard_score(points)
            value, bound = log_rho + self.beta * z, density.slack + abs(self.beta) * moved
        elif self.rule == "mid_band":
            value, bound = -np.abs(line - middle), 2 * points.shift
        else:
            value, bound = (line if self.rule == "top_norm" else -line), points.shift
        return Group(label, rows, value, bound, candidates, unsure)


def _refuse_unscored(problem: Problem, scored: Bool[np.ndarray, " N"]) -> None:
    if not scored.any():
        raise NumericsError(
            "no row has a gradient on the embedding and the LM head", where=f"{problem.size} rows", got="norms of 0",
            expected="positive norms", do="check the navigator with gradsift doctor",
        )  # fmt: skip


def _dropped(scored: Bool[np.ndarray, " N"]) -> dict[int, tuple[str, str]]:
    return {
        int(i): (
            "unscored:zero_norm",
            "its gradient norm on the embedding or the LM head is zero, and has no logarithm",
        )
        for i in np.flatnonzero(~scored)
    }


def _notes(
    problem: Problem, scored: Bool[np.ndarray, " N"], signal: Float[np.ndarray, " N"], method: Grads
) -> tuple[Note, ...]:
    """That this is a reconstruction, what has no norm, and how much the signal follows length."""
    notes = [Note("reconstruction", f"grads is a {SUMMARY}")]
    zero = np.flatnonzero(~scored)
    if zero.size:
        text = f"{zero.size} rows have a norm of zero on the embedding or the LM head and cannot be chosen"
        notes.append(Note("zero_norm", text, int(zero.size), tuple(problem.ids[i] for i in zero[:5])))
    found = rank_correlation(signal[scored], np.log(problem.num_trained[scored].astype(np.float64)))
    text = f"rank correlation of the signal with the log of the trained tokens: {found:+.2f}"
    if abs(found) > LENGTH_WARNING:
        notes.append(Note("length_confound", f"{text}; length decides much of this choice", int(scored.sum())))
    else:
        notes.append(Note("length", text, int(scored.sum())))
    if method.combine == "lm_only":
        notes.append(Note("shared_pass", "the LM head's norm needs a forward only; the ordinary pass measured it here"))
    return tuple(notes)
