"""ogs: a policy learns on the navigator which cluster of rows to train on next, within limits on what is lost.

Paper: Zhang, Tian, Wang, Song, "Orthogonal Gradient Selection", arXiv 2602.06359, 2026. Only its abstract was available
to us; it names the navigator, the orthogonality to a general anchor, the constrained decision process and dynamic
selection. State, reward, cost, horizon, network and settings are ours (secondary summaries name PPO-Lagrangian).

Algorithm:
  1  clusters of domain rows and, apart from them, of general rows (choosing one of these is replay)
  2  a few roll-outs of the navigator calibrate a first-order simulator and judge it
  3  PPO-Lagrangian learns in the simulator: reward is the fall of the target's held-out loss, cost the signed rise of each
     protected source's, allowed up to ``allowed_rise`` of its loss at the start
  4  the learned policy, the linear program over clusters in several forms and trivial policies are played on the
     navigator itself; the best that keeps the limits gives the list, in its order

Departures from the paper: what is deployed is the frozen list of the best policy, which need not be the learned one; when
the simulator disagrees with the navigator, no policy is learned and that is said; several protected sources are several
costs; costs are signed, so that they add up to the rise of the loss.

Departures from released code: none was found to depart from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from gradsift.methods.base import Needs, build_selection, refuse_empty, register, require, resolve_budget
from gradsift.policy.episodes import NO_ROW, Table
from gradsift.policy.statistics import describe_clusters, make_clusters
from gradsift.seeds import Stream
from gradsift.types import Budget, Cut, Note, Problem, Selection


@register
@dataclass(frozen=True)
class Ogs:
    """Clusters, roll-outs and a constrained policy.

    Args:
        allowed_rise: allowed rise of each protected source's held-out loss, as a share of its loss at the start.
        allowed_nats: the same in nats, instead of the share; for sources whose loss at the start is next to nothing.
        num_clusters: K over domain and general rows; None for 10 below 20,000 rows and sqrt(N) / 5 up to 64 above.
        rows_per_decision: rows that one decision trains on; None for a tenth of the budget.
        on: train the policy in the ``simulator``, or on the ``navigator`` itself (thousands of roll-outs' steps).
        dual: multiplier by proportional and integral control (``pi``), or by plain dual ascent (``paper``).
        num_epochs: epochs of PPO.
        num_episodes: episodes per epoch.
        num_confirmed: real roll-outs per policy of the contest.
        axes: axes of the residual gradients that the simulator keeps beside the exact ones.
        infeasible: ``stop`` refuses limits that no policy keeps, ``least`` takes what breaks them least.
    """

    name: ClassVar[str] = "ogs"
    paper: ClassVar[str] = "arXiv 2602.06359 (abstract); the process is ours"
    summary: ClassVar[str] = "a constrained policy over clusters, learned and confirmed on roll-outs of the navigator"
    evidence: ClassVar[str] = "abstract + summaries + ours"

    allowed_rise: Annotated[float, Field(gt=0)] = 0.01
    allowed_nats: Annotated[float, Field(gt=0)] | None = None
    num_clusters: Annotated[int, Field(ge=2)] | None = None
    rows_per_decision: Annotated[int, Field(ge=1)] | None = None
    on: Literal["simulator", "navigator"] = "simulator"
    dual: Literal["pi", "paper"] = "pi"
    num_epochs: Annotated[int, Field(ge=1)] = 60
    num_episodes: Annotated[int, Field(ge=2)] = 32
    num_confirmed: Annotated[int, Field(ge=1)] = 2
    axes: Annotated[int, Field(ge=1)] = 64
    infeasible: Literal["stop", "least"] = "stop"

    @property
    def needs(self) -> Needs:
        """One pass with sketches, then roll-outs: short trainings of the navigator, measured on held-out rows."""
        signals = frozenset({"loss", "grad_norm", "anchor_dot", "target_dot", "sketch"})
        return Needs(signals=signals, anchors=True, target=True, constrains=True, rollouts=True)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Choose the rows of the best policy, in its order.

        Args:
            problem: the eligible rows with their signals and a learner.
            budget: rows, percentage or trained tokens.
            stream: of clusters, roll-outs and policies.

        Returns:
            The selection; ``details`` holds the contest, the prices over the training and the simulator's verdict.
            Limits that nothing keeps are refused (InfeasibleError) unless ``infeasible`` is ``least``.
        """
        from gradsift.policy.coordinates import make_coordinates, signals_of
        from gradsift.policy.learn import keep_learned, learn_schedule
        from gradsift.policy.report import describe_schedule

        require(problem, self)
        amount = resolve_budget(problem, budget)
        general = problem.general_rows
        clusters = make_clusters(problem, general, stream.child("clusters"), self.num_clusters)
        unit = "rows" if amount.rows is not None else "tokens"
        table = describe_clusters(problem, clusters, general, stream.child("members"), unit=unit)
        coordinates = make_coordinates(
            signals_of(problem, problem.direction_sketch), stream.child("coordinates"), dim=self.axes
        )
        size = amount.rows if amount.rows is not None else amount.tokens
        assert size is not None
        found = learn_schedule(table, size, coordinates, problem.learner, self._learning(), stream)
        keep_learned(found, table, problem.learner)
        chosen = found.rows[found.rows != NO_ROW]
        short = size - int(table.price[chosen].sum())
        refuse_empty(problem, self, chosen, np.arange(problem.size))
        notes = [Note("policy", text) for text in found.notes]
        if amount.rows is not None and short:
            notes.append(Note("shortage", f"{short} rows fewer than asked: the pool is used up", short))
        if not general.any():
            notes.append(Note("no_general_rows", "no general rows were given, so that no decision can be replay"))
        return build_selection(
            problem,
            self,
            budget,
            stream,
            chosen=chosen,
            score=_scores(problem.size, chosen),
            order=chosen,
            kept="policy",
            why_kept=_why(found.actions, found.rows, table, found.policy),
            dropped=_dropped(problem, table, chosen, found.policy),
            cut=_cut(problem),
            cluster=clusters.labels.astype(np.int32),
            notes=(*amount.notes, *notes),
            details=describe_schedule(found, table),
        )

    def _learning(self) -> Any:
        from gradsift.policy.multiplier import MultiplierConfig
        from gradsift.policy.ppo_lagrangian import PPOConfig
        from gradsift.policy.schedule import LearnConfig

        ppo = PPOConfig(
            num_epochs=self.num_epochs, num_episodes=self.num_episodes, multiplier=MultiplierConfig(self.dual)
        )
        return LearnConfig(
            allowed_rise=self.allowed_rise,
            allowed_nats=self.allowed_nats,
            rows_per_decision=self.rows_per_decision,
            on=self.on,
            num_confirmed=self.num_confirmed,
            infeasible=self.infeasible,
            ppo=ppo,
        )


def _cut(problem: Problem) -> Cut:
    """Say that no bound is known: groups and roll-outs may turn on the last bit of any row."""
    bound = max(problem.noise.norm, problem.noise.cos)
    return Cut(0.0, bound, problem.ids if bound else (), known=False)


def _scores(size: int, chosen: Int[np.ndarray, " k"]) -> Float[np.ndarray, " N"]:
    """Minus the place in the list; NaN for rows that are not on it."""
    score = np.full(size, np.nan)
    score[chosen] = -np.arange(1, len(chosen) + 1, dtype=np.float64)
    return score


def _why(actions: Int[np.ndarray, " T"], rows: Int[np.ndarray, "T b"], table: Table, policy: str) -> Any:
    decision = {int(i): t for t, line in enumerate(rows) for i in line if i != NO_ROW}

    def why(row: int) -> str:
        t = decision[row]
        kind = "general cluster" if table.general[actions[t]] else "cluster"
        return f"decision {t + 1} of {len(actions)} by {policy}: {kind} {actions[t]}"

    return why


def _dropped(problem: Problem, table: Table, chosen: Int[np.ndarray, " k"], policy: str) -> dict[int, tuple[str, str]]:
    """Reasons of the rows that are not on the list, by what was taken from their cluster."""
    taken, out = set(chosen.tolist()), {}
    for k, some in enumerate(table.members):
        count = sum(1 for i in some if i in taken)
        text = f"{policy} took {count} of the {len(some)} rows of cluster {k}, others before this one by the keyed draw"
        text = text if count else f"{policy} took no row of cluster {k}"
        out |= {i: ("dropped:policy", text) for i in some if i not in taken}
    return out
