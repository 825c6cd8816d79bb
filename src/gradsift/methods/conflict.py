"""Drop rows that oppose an anchor; choose among the rest.

Source: ours, the one-sided test of gradient surgery moved from the training step to the data: Lopez-Paz, Ranzato,
"Gradient Episodic Memory for Continual Learning", 2017, arXiv 1706.08840, and Chaudhry et al., "Efficient Lifelong
Learning with A-GEM", 2019, arXiv 1812.00420; scores after Zhang et al. 2026, arXiv 2602.06359 (summaries only).

Algorithm:
    1  c_im = <g_i, u_m> / |g_i| for every anchor m;  conf_i = max_m (-c_im)
    2  all:   drop rows with conf_i > 0
       worst: drop the floor(worst_share N) rows of largest conf_i
    3  with a target: take the rows of largest <g_i, u_target> / |g_i|; without one: of smallest draw, keyed by id

Departures from the paper: surgery projects a step, this drops a row; every anchor is tested alone, because opposed
anchors cancel in their mean.

Departures from released code: none was used. Rows whose conf_i lies within the measured bound of the threshold are
listed, because another batch could decide them the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field

from gradsift.geometry.similarity import conf_max
from gradsift.methods.base import Allowance, Needs, register, require, select_ranked, take_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Note, Problem, Selection

NUM_LISTED = 20
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Kept:
    """Rows that pass a test on conflict.

    Args:
        rows: bool [N], rows that pass.
        unsure: bool [N], rows whose outcome the measurement does not settle.
        dropped: reason code and sentence of every other row, by row index.
    """

    rows: Bool[np.ndarray, " N"]
    unsure: Bool[np.ndarray, " N"]
    dropped: dict[int, tuple[str, str]]


def drop_all(problem: Problem, anchor_cos: Float[np.ndarray, "N M"]) -> Kept:
    """Keep rows that oppose no anchor.

    Args:
        problem: the eligible rows.
        anchor_cos: float64 [N, M].

    Returns:
        The rows with conf <= 0; unsure within ``noise.cos`` of 0.
    """
    conf = conf_max(anchor_cos)
    worst = np.argmax(-anchor_cos, axis=1)
    dropped = {
        int(i): ("dropped:conflict", f"opposes {problem.anchors[worst[i]].name}: cosine {-conf[i]:+.3f}")
        for i in np.flatnonzero(conf > 0)
    }
    # No noise, no doubt: an exact 0 stays a 0.
    unsure = np.abs(conf) <= problem.noise.cos if problem.noise.cos > 0 else np.zeros(problem.size, dtype=bool)
    return Kept(conf <= 0, unsure, dropped)


def drop_worst(problem: Problem, anchor_cos: Float[np.ndarray, "N M"], share: float) -> Kept:
    """Keep all but the share of the rows that oppose an anchor most.

    Args:
        problem: the eligible rows.
        anchor_cos: float64 [N, M].
        share: share of the rows to drop, in [0, 1); rounded down to rows.

    Returns:
        The rows kept; among equals the smaller id is kept.
    """
    conf = conf_max(anchor_cos)
    worst = np.argmax(-anchor_cos, axis=1)
    keep = Allowance(problem.size - int(np.floor(share * problem.size + 1e-9)), None)
    taken = take_ranked(problem, -conf, keep, bound=problem.noise.cos)
    rows = np.zeros(problem.size, dtype=bool)
    rows[taken.chosen] = True
    text = f"conflict is among the worst {share:.0%}: cosine"
    dropped = {
        int(i): ("dropped:conflict_quantile", f"{text} {-conf[i]:+.3f} with {problem.anchors[worst[i]].name}")
        for i in np.flatnonzero(~rows)
    }
    unsure = np.zeros(problem.size, dtype=bool)
    unsure[taken.undecided] = True
    return Kept(rows, unsure, dropped)


def threshold_note(problem: Problem, unsure: Bool[np.ndarray, " N"]) -> tuple[Note, ...]:
    """List rows that the measurement cannot place on either side of a conflict threshold.

    Args:
        problem: the eligible rows.
        unsure: bool [N].

    Returns:
        One note, or none when every row is settled.
    """
    rows = np.flatnonzero(unsure)
    if not len(rows):
        return ()
    text = f"the conflict of {len(rows)} rows lies within the measured bound of the threshold"
    return (Note("undecided_threshold", text, len(rows), tuple(problem.ids[i] for i in rows[:NUM_LISTED])),)


@register
@dataclass(frozen=True)
class Conflict:
    """Rows that oppose no anchor.

    Args:
        drop: ``all`` rows with a conflict above 0, or only the ``worst``.
        worst_share: share of the rows that ``worst`` drops.
    """

    drop: Literal["all", "worst"] = "all"
    worst_share: Share = 0.1

    name: ClassVar[str] = "conflict"
    paper: ClassVar[str] = "ours, after Lopez-Paz and Ranzato 2017, arXiv 1706.08840"
    summary: ClassVar[str] = "drops rows that oppose an anchor; the rest by target cosine, or at random"
    evidence: ClassVar[str] = "ours"

    @property
    def needs(self) -> Needs:
        """One forward and backward pass and at least one anchor; a target is used when there is one."""
        by_row = self.drop == "all"  # the worst share is one of the rows at hand
        return Needs(signals=frozenset({"anchor_dot", "grad_norm"}), anchors=True, constrains=True, by_row=by_row)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the best of the rows that pass.

        Args:
            problem: the eligible rows with ``anchor_dot``, ``grad_norm`` and perhaps ``target_dot``.
            budget: how many rows or trained tokens.
            stream: used when there is no target.

        Returns:
            The selection; scores are cosines with the target, or minus the draw. When every row opposes an anchor the
            choice is refused (InfeasibleError).
        """
        require(problem, self)
        anchor_cos, target = problem.anchor_cos, problem.target_cos
        assert anchor_cos is not None
        kept = (
            drop_all(problem, anchor_cos) if self.drop == "all" else drop_worst(problem, anchor_cos, self.worst_share)
        )
        conf = conf_max(anchor_cos)
        draw = stream.child("draw").uniform(problem.ids)
        score = -draw if target is None else target
        by = "random draw" if target is None else "cosine with the target"
        return select_ranked(
            problem,
            self,
            budget,
            stream,
            score=score,
            bound=0.0 if target is None else problem.noise.cos,
            kept="draw" if target is None else "target",
            why_kept=lambda i: f"{by} {abs(score[i]) if target is None else score[i]:.3f}, conflict {conf[i]:+.3f}",
            candidates=kept.rows,
            unsure=kept.unsure,
            dropped=kept.dropped,
            notes=threshold_note(problem, kept.unsure),
        )
