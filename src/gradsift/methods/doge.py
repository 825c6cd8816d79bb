"""Domain weights by gradient alignment: a domain gains where its gradient points the way of the goal's.

Paper: Fan, Pagliardini, Jaggi, "DoGE: Domain Reweighting with Generalization Estimation", ICML 2024, arXiv 2310.15393.

Algorithm:
    1  a <- uniform over the k domains; then T rounds, one optimizer step of the proxy each
    2  g_j: gradient of the mean token loss of rows of domain j, clipped to ``grad_clip``; h: the same of target rows
    3  W_j = <g_j, h>                   (``goal = domains``: W_j = sum_i <g_j, g_i>, without i = j from five domains on)
    4  u_j = clip(eta_t W_j / mean_i |g_i|, -5 eta_t, 5 eta_t)            (absent domain: 0, or 0.9 of its last u)
    5  a_j <- a_j exp(u_j / mu), normalized
    6  optimizer step along sum_j a_j g_j with the fresh a
    7  the mixture is the mean of a over the rounds; rows are drawn by it

Departures from the paper: the proxy is the navigator, fine-tuned for a short run, and not a model trained from scratch;
one row of a batch is one row of the pool; the clip is signed, because forgiving a domain that hurts throws evidence
away; rows of a domain are drawn anew each round without replacement until it has been seen; target rows
that also stand in the pool are said (``leak``) and not refused.

Departures from released code: Olivia-fsm/DoGE @88400e9. Its clip to [0, 5 eta] is ``clip = release``; absent domains
never reuse a stale value silently; leaving the self term out is a stated choice (there the branch compares sets of tensors
that never match); both averages are kept; an optional floor. Its Adam metric is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from gradsift.geometry.mixture import bounded
from gradsift.geometry.reweight import (
    Absent,
    Clip,
    alignment,
    entropic_evidence,
    entropic_step,
    fill_absent,
    largest_log_step,
)
from gradsift.geometry.trajectory import Domains, Feedback, Plan, State, count_event
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

SELF_TERM_FROM = 5
LARGE_STEP = 0.25
NEARLY_EQUAL = 0.1


@register
@dataclass(frozen=True)
class Doge:
    """Entropic updates by gradient alignment.

    Args:
        goal: ``target`` learns weights for the target set, ``domains`` for all domains together.
        domains: ``source`` takes the labels of the pool files, ``cluster`` groups sketches.
        num_clusters: groups; None for the default of the pool's size.
        small: ``merge`` puts domains of fewer rows than ``rows_per_domain`` together; ``keep`` keeps and counts them.
        num_rounds: rounds, an optimizer step each.
        rows_per_domain: rows of each domain, and at most so many of the target, per round.
        mu: strength of the old weights.
        clip: ``signed`` (ours), ``release`` or ``none``.
        absent: evidence of a domain that a round lacks; the navigator's rounds lack none.
        grad_clip: norm that gradients are clipped to; 0 for none.
        floor: every weight stays at least ``floor`` / k; 0 for none.
        returned: ``mean`` over the rounds, for a fresh run, or the ``last`` weights.
    """

    name: ClassVar[str] = "doge"
    paper: ClassVar[str] = "Fan et al. 2024, arXiv 2310.15393"
    summary: ClassVar[str] = "domain weights from a proxy run: domains whose gradient points the goal's way gain"
    evidence: ClassVar[str] = "abstract + code + summaries"

    goal: Literal["target", "domains"] = "target"
    domains: DomainKind = "source"
    num_clusters: Annotated[int, Field(ge=2)] | None = None
    small: SmallKind = "keep"
    num_rounds: Annotated[int, Field(ge=1)] = 20
    rows_per_domain: Annotated[int, Field(ge=1)] = 16
    mu: Annotated[float, Field(gt=0)] = 0.01
    clip: Clip = "signed"
    absent: Absent = "zero"
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    returned: Literal["mean", "last"] = "mean"

    @property
    def needs(self) -> Needs:
        """Two labels or sketches, and a proxy run."""
        return mixture_needs(self.domains, target=self.goal == "target")

    @property
    def proxy_plans(self) -> tuple[Plan, ...]:
        """One run."""
        return (Plan(self.num_rounds, self.rows_per_domain, "combined", measures=("gram",), clip=self.grad_clip),)

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Learn domain weights in a proxy run and draw rows by them.

        Args:
            problem: the eligible rows with labels or sketches, and a proxy.
            budget: rows, percentage or trained tokens.
            stream: of clusters and draws.

        Returns:
            The selection with its mixture; ``details`` holds weights, losses and alignments of every round.
        """
        require(problem, self)
        tasks = ("target",) if self.goal == "target" else ()
        dealt = make_domains(problem, self.domains, stream=stream.child("clusters"), num_clusters=self.num_clusters,
                             least=self.rows_per_domain, small=self.small, tasks=tasks)  # fmt: skip
        run = problem.proxy.run(self, self.proxy_plans[0], dealt.domains, self.name)
        weights = run.mean_weights() if self.returned == "mean" else run.weights[-1]
        notes = run_notes(run, dealt.domains.names)
        spread = float(np.ptp(np.log(weights)))
        if spread < NEARLY_EQUAL:
            text = f"the log-weights lie within {spread:.3f} of each other: more rounds or a smaller mu let them part"
            notes.append(Note("nearly_uniform", text))
        if large := run.rounds[-1].state.events.get("large_step", 0):
            text = f"{large} steps moved a log-weight by more than {LARGE_STEP}: eta / mu is large, raise mu"
            notes.append(Note("large_step", text, large))
        return select_by_mixture(problem, self, budget, stream, dealt=dealt, weights=weights, notes=notes,
                                 details=show_run(run, dealt.domains.names))  # fmt: skip

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
        """Take one round in: steps 3 to 5.

        Args:
            state: before it.
            feedback: the Gram matrix of clipped mean gradients, and eta_t.

        Returns:
            The state after it.
        """
        assert feedback.gram is not None
        k = len(state.weights)
        here = np.concatenate([feedback.present, np.ones(len(feedback.gram) - k, dtype=bool)])
        dots, norms = np.zeros(k), np.zeros(k)
        dots[feedback.present] = alignment(
            feedback.gram[np.ix_(here, here)], int(feedback.present.sum()), drop_self=k >= SELF_TERM_FROM
        )
        norms[feedback.present] = np.sqrt(np.diag(feedback.gram)[:k][feedback.present])
        evidence = np.zeros(k)
        evidence[feedback.present] = entropic_evidence(
            dots[feedback.present], norms[feedback.present], feedback.lr, self.clip
        )
        u = fill_absent(evidence, state.carried, feedback.present, self.absent)
        weights = entropic_step(state.weights, u, self.mu)
        if self.floor:
            weights = bounded(weights, np.full(k, self.floor / k), np.ones(k))
        largest = largest_log_step(u, self.mu)
        events = count_event(state.events, "large_step", int(largest > LARGE_STEP * (1 + 1e-9)))
        figures = {"alignment": dots, "norms": norms, "evidence": u, "largest_log_step": largest}
        return State(weights, u, events=events, figures=figures)
