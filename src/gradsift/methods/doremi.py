"""Domain weights by excess loss: a domain gains where the proxy lags a reference. It looks at no task.

Paper: Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", NeurIPS 2023, arXiv 2305.10429.

Algorithm:
    1  train the reference: the navigator on rows drawn by the prior, as many steps as the proxy will take
    2  a <- uniform; then T rounds, one optimizer step each, on equally many rows of every domain (s uniform):
    3  lambda_j = mean over the tokens of domain j of max(0, loss of the proxy - loss of the reference)
    4  a_j <- a_j exp(eta lambda_j), normalized; a <- (1 - c) a + c / k
    5  step on sum_tok (a_dom / s_dom) loss / sum_tok (a_dom / s_dom), with the a of the round before
    6  the mixture is the mean of a over the last 80% of the rounds; rows are drawn by it

Departures from the paper: reference and proxy are fine-tunings of one navigator from the same weights, on the trained
tokens of its rows, and not models trained from scratch; step 5 uses the weights of the step before, so that micro-batches
change nothing; an absent domain's lambda decays by 0.9 instead of staying; the reference's token losses are computed once.
It is a baseline without a task: a target set, where there is one, plays no part.

Departures from released code: sangmichaelxie/doremi @7cde52d. Steps 3 to 5 as there except for the above; the mean is
taken over the last 80% of the rounds instead of all; a second eta is run and shown beside the first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from gradsift.geometry.mixture import name_weights
from gradsift.geometry.reweight import dro_step, fill_absent
from gradsift.geometry.trajectory import Domains, Feedback, Plan, State, Trajectory, count_event
from gradsift.methods.base import Needs, register, require
from gradsift.methods.mixing import (
    DomainKind,
    SmallKind,
    make_domains,
    mixture_needs,
    run_notes,
    select_by_mixture,
    show_run,
)
from gradsift.seeds import Stream
from gradsift.types import Budget, Note, Problem, Selection

LAST_SHARE = 0.2


@register
@dataclass(frozen=True)
class Doremi:
    """Group DRO on excess loss.

    Args:
        domains: ``source`` takes the labels of the pool files, ``cluster`` groups sketches.
        num_clusters: groups; None for the default of the pool's size.
        small: ``merge`` puts domains of fewer rows than ``rows_per_domain`` together; ``keep`` keeps and counts them.
        num_rounds: rounds, an optimizer step each; the reference takes as many.
        rows_per_domain: rows of each domain per round.
        eta: step size of the weights.
        also: further step sizes whose mixtures are shown beside it; the proxy is trained anew for each.
        smoothing: c, so that no weight falls below c / k.
        averaged: share of the rounds, from the end, that the mixture is the mean of.
        absent: lambda of a domain that a round lacks: ``decay`` to 0.9 of its last, or ``keep`` it; the navigator's
            rounds lack none.
    """

    name: ClassVar[str] = "doremi"
    paper: ClassVar[str] = "Xie et al. 2023, arXiv 2305.10429"
    summary: ClassVar[str] = "domain weights from a reference and a proxy run: domains that lag the reference gain"
    evidence: ClassVar[str] = "sections + code + summaries"

    domains: DomainKind = "source"
    num_clusters: Annotated[int, Field(ge=2)] | None = None
    small: SmallKind = "keep"
    num_rounds: Annotated[int, Field(ge=1)] = 40
    rows_per_domain: Annotated[int, Field(ge=1)] = 8
    eta: Annotated[float, Field(gt=0)] = 1.0
    also: tuple[Annotated[float, Field(gt=0)], ...] = (0.1,)
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    averaged: Annotated[float, Field(gt=0, le=1)] = 0.8
    absent: Literal["decay", "keep"] = "decay"

    @property
    def needs(self) -> Needs:
        """Two labels or sketches, and a proxy run after a reference run."""
        return mixture_needs(self.domains, target=False)

    @property
    def etas(self) -> tuple[float, ...]:
        """Step sizes that are run, the one of the mixture first."""
        return tuple(dict.fromkeys((self.eta, *self.also)))

    @property
    def proxy_plans(self) -> tuple[Plan, ...]:
        """One run per step size, on the same rounds and rows."""
        plan = Plan(self.num_rounds, self.rows_per_domain, "weighted", measures=("excess",))
        return (plan,) * len(self.etas)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Learn domain weights and draw rows by them.

        Args:
            problem: the eligible rows with labels or sketches, and a proxy.
            budget: rows, percentage or trained tokens.
            stream: of clusters and draws.

        Returns:
            The selection with its mixture; ``details`` holds weights, losses and excess of every round, for every eta.
        """
        require(problem, self)
        dealt = make_domains(problem, self.domains, stream=stream.child("clusters"), num_clusters=self.num_clusters,
                             least=self.rows_per_domain, small=self.small)  # fmt: skip
        names = dealt.domains.names
        runs = {
            eta: problem.proxy.run(dataclasses.replace(self, eta=eta), plan, dealt.domains, f"{self.name}-{eta:g}")
            for eta, plan in zip(self.etas, self.proxy_plans, strict=True)
        }
        run = runs[self.eta]
        details: dict[str, Any] = {
            **show_run(run, names),
            "by_eta": {f"{eta:g}": name_weights(names, one.mean_weights(self.averaged)) for eta, one in runs.items()},
        }
        notes = [*run_notes(run, names), *self._notes(run)]
        return select_by_mixture(problem, self, budget, stream, dealt=dealt, weights=run.mean_weights(self.averaged),
                                 notes=notes, details=details)  # fmt: skip

    def start(self, domains: Domains) -> State:
        """Begin with equal weights.

        Args:
            domains: the pool in domains.

        Returns:
            The state before the first round.
        """
        k = len(domains.names)
        return State(np.full(k, 1 / k), np.zeros(k))

    def step(self, state: State, feedback: Feedback) -> State:
        """Take one round in: steps 3 and 4.

        Args:
            state: before it.
            feedback: the excess of every domain that is present.

        Returns:
            The state after it.
        """
        assert feedback.excess is not None
        if self.absent == "keep":
            excess = np.where(feedback.present, feedback.excess, state.carried)
        else:
            excess = fill_absent(feedback.excess, state.carried, feedback.present, "decay")
        weights = dro_step(state.weights, excess, self.eta, self.smoothing)
        events = count_event(state.events, "no_excess", int(not excess.any()))
        return State(weights, excess, events=events, figures={"excess": excess, "positive": feedback.positive})

    def _notes(self, run: Trajectory) -> list[Note]:
        """What the reference may have done wrong, and that no task was looked at."""
        notes = [Note("no_task", "doremi looks at no task: a target set plays no part in its weights")]
        idle = run.rounds[-1].state.events.get("no_excess", 0)
        if 2 * idle > len(run.rounds):
            text = f"in {idle} of {len(run.rounds)} rounds no domain lagged the reference: it is too weak, and the weights are smoothing"
            notes.append(Note("weak_reference", text, idle))
        last = run.rounds[-max(1, round(LAST_SHARE * len(run.rounds))) :]
        orders = {tuple(np.argsort(r.state.carried, kind="stable").tolist()) for r in last}
        if len(last) > 1 and len(orders) == 1 and all((r.state.carried > 0).all() for r in last):
            text = "every domain lags the reference, in an order that no longer changes: more rounds let the proxy catch up"
            notes.append(Note("fixed_order", text, len(last)))
        return notes
