"""Domain weights round by round: how far a step on a domain moves a task, times how much the task can still improve.

Paper: "DIDS: Domain Impact-aware Data Sampling", EMNLP 2025, arXiv 2504.13227. Only its abstract was available to us;
the algorithm is read from the released code and corrected.

Algorithm:
    1  p <- prior; then R rounds on one optimizer state and one schedule; L_j(0): loss of task j on rows that give no gradient
    2  g_i, h_j: mean gradients of rows of domain i and task j; f = Adam's second moment, 1 before the first step
    3  A = g'(f h), b = g'(f g), c = h'(f h) in float64
       score = -(b + c - 2 A) / 2  |  A  |  A / sqrt(b c)
    4  rank test, before round 0 and every 5 rounds: one real step on each domain from a saved state; Spearman of the falls
       of the task losses with the score. Below 0.3 the mixture is the prior, and that is said
    5  N_ij = softmax over i of score_ij / tau                    larger score, more weight
    6  G_j = 1 in round 0, else max(0, L_j(t-1) - L_j(t) + potential_j)
    7  c_i = mean_j N_ij G_j;  q proportional to sqrt(c_i)
    8  p <- beta p + (1 - beta) q, at least 0.2 / k and at most 3 times the prior
    9  draw rows by p, train a round, measure L_j

Departures from the paper: the three scores come from one Gram matrix and are held against measured steps; the potential
is a bounded fit, 0 with fewer than five losses; the square root has the fixed point of the paper's diminishing returns
without its oscillation; domains are the given labels unless clusters are asked for, which are found over the whole pool
and not within sources; the target set is one task, and anchors can be further ones; after a failed rank test the mixture
is the prior, which ``prior = uniform`` makes the stratified draw.
What a domain gets is no causal share of the gain: G is a property of the task.

Departures from released code: shiweijiezero/DIDS @bccc432. Its impact is inverted (an inner product under a
normalization made for a divergence, so the best aligned domain gets 0); its metric rests on two squared batch means and a
floor; it restarts Adam every round, floors the counts, sums in bfloat16 and puts 1 nat where a potential is not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from gradsift.geometry.impact import ScoreKind, impact_scores, rank_test, shift_min_columns, softmax_columns
from gradsift.geometry.mixture import PriorKind, prior_weights
from gradsift.geometry.potential import potential
from gradsift.geometry.reweight import root_step
from gradsift.geometry.trajectory import Domains, Feedback, Plan, Signal, State, Trajectory, count_event
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

FAILED = "rank_test_failed"


@register
@dataclass(frozen=True)
class Dids:
    """Impact times potential.

    Args:
        domains: ``source`` takes the labels of the pool files, ``cluster`` groups sketches.
        num_clusters: groups; None for the default of the pool's size.
        small: ``merge`` puts small domains together (groups below 1% of the pool, labels below ``rows_per_domain``);
            ``keep`` keeps and counts them.
        tasks: ``target`` alone, or ``all``: every anchor is a task as well.
        score: which of the three scores.
        metric: ``adam`` (second moment as Fisher diagonal) or ``identity``.
        normalize: ``softmax``, or ``shift_min``, which gives the worst domain 0.
        tau: temperature; None lets about half of the domains count.
        beta: weight of the old mixture.
        floor: every weight stays at least ``floor`` / k.
        cap: every weight stays at most ``cap`` times its prior.
        prior: ``size`` (as the pool) or ``uniform``.
        num_rounds: rounds.
        rows_per_domain: rows of each domain, and at most so many of each task, that give a round's gradients.
        rows_per_round: rows trained on in a round.
        test_every: rounds between two rank tests; 0 for none.
        min_rank: Spearman correlation below which the mixture falls back to the prior.
    """

    name: ClassVar[str] = "dids"
    paper: ClassVar[str] = "arXiv 2504.13227 (abstract; algorithm from released code, corrected)"
    summary: ClassVar[str] = "domain weights from training rounds: impact on the task times what it can still gain"
    evidence: ClassVar[str] = "abstract + code"

    domains: DomainKind = "source"
    num_clusters: Annotated[int, Field(ge=2)] | None = None
    small: SmallKind = "keep"
    tasks: Literal["target", "all"] = "target"
    score: ScoreKind = "cos"
    metric: Literal["adam", "identity"] = "adam"
    normalize: Literal["softmax", "shift_min"] = "softmax"
    tau: Annotated[float, Field(gt=0)] | None = None
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.5
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.2
    cap: Annotated[float, Field(ge=1)] = 3.0
    prior: PriorKind = "size"
    num_rounds: Annotated[int, Field(ge=1)] = 10
    rows_per_domain: Annotated[int, Field(ge=1)] = 16
    rows_per_round: Annotated[int, Field(ge=1)] = 64
    test_every: Annotated[int, Field(ge=0)] = 5
    min_rank: Annotated[float, Field(ge=-1, le=1)] = 0.3

    @property
    def needs(self) -> Needs:
        """Two labels or sketches, a target and a proxy run."""
        return replace(mixture_needs(self.domains, target=True), anchors=self.tasks == "all")

    @property
    def proxy_plans(self) -> tuple[Plan, ...]:
        """One run."""
        measures: tuple[Signal, ...] = ("gram", "fisher") if self.metric == "adam" else ("gram",)
        return (
            Plan(self.num_rounds, self.rows_per_domain, "sampled", self.rows_per_round, measures,
                 test_every=self.test_every),
        )  # fmt: skip

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Learn domain weights in training rounds and draw rows by them.

        Args:
            problem: the eligible rows with labels or sketches, and a proxy.
            budget: rows, percentage or trained tokens.
            stream: of clusters and draws.

        Returns:
            The selection with its mixture; ``details`` holds weights, scores, gains and losses of every round, and the
            rank tests.
        """
        require(problem, self)
        tasks = problem.proxy.tasks if self.tasks == "all" else ("target",)
        least = math.ceil(0.01 * problem.size) if self.domains == "cluster" else self.rows_per_domain
        dealt = make_domains(problem, self.domains, stream=stream.child("clusters"), num_clusters=self.num_clusters,
                             least=least, small=self.small, tasks=tasks)  # fmt: skip
        run = problem.proxy.run(self, self.proxy_plans[0], dealt.domains, self.name)
        notes = [*run_notes(run, dealt.domains.names), *self._notes(run)]
        return select_by_mixture(problem, self, budget, stream, dealt=dealt, weights=run.weights[-1], notes=notes,
                                 details=show_run(run, dealt.domains.names))  # fmt: skip

    def start(self, domains: Domains) -> State:
        """Begin at the prior.

        Args:
            domains: the pool in domains.

        Returns:
            The state before the first round.
        """
        prior = prior_weights(domains.sizes, self.prior)
        return State(prior, prior, np.zeros((0, len(domains.tasks))))

    def step(self, state: State, feedback: Feedback) -> State:
        """Take one round in: steps 3 to 8.

        Args:
            state: before it; its ``carried`` is the prior.
            feedback: Gram matrices, task losses, and measured falls where this round tests the ranks.

        Returns:
            The state after it.
        """
        assert feedback.gram is not None
        assert feedback.task_losses is not None
        at, prior, k = len(state.history), state.carried, len(state.weights)
        metric = "adam" if self.metric == "adam" and feedback.fisher is not None else "identity"
        grams = {"identity": feedback.gram} | ({"adam": feedback.fisher} if feedback.fisher is not None else {})
        scores = impact_scores(grams[metric], k)
        history = np.vstack([state.history, feedback.task_losses])
        figures: dict[str, Any] = {"metric": metric, "scores": scores}
        if feedback.drops is not None:
            test = rank_test(grams, feedback.drops, at)
            figures |= {"rank_test": test.rho, "drops": feedback.drops}
            if test.rho[f"{self.score}/{metric}"] < self.min_rank:
                events = count_event(state.events, FAILED)
                return State(prior, prior, history, stopped=True, events=events, figures=figures)
        score = scores[self.score]
        flat = int((score == score[0]).all(axis=0).sum())
        impact = softmax_columns(score, self.tau) if self.normalize == "softmax" else shift_min_columns(score)
        gain, failures = _gain(history)
        events = count_event(count_event(state.events, "equal_scores", flat), "fit_failed", failures)
        figures |= {"impact": impact, "gain": gain}
        utility = (impact * gain).mean(axis=1)
        if not utility.any():
            events = count_event(events, "no_task_improved")
            return State(state.weights, prior, history, events=events, figures=figures)
        low = np.full(k, self.floor / k)
        weights = root_step(state.weights, utility, self.beta, low=low, high=np.maximum(self.cap * prior, low))
        return State(weights, prior, history, events=events, figures={**figures, "utility": utility})

    def _notes(self, run: Trajectory) -> list[Note]:
        last, notes = run.rounds[-1].state, []
        tests = [(t, r.state.figures["rank_test"]) for t, r in enumerate(run.rounds) if "rank_test" in r.state.figures]
        if last.stopped:
            at, rho = tests[-1]
            told = ", ".join(f"{name} {value:+.2f}" for name, value in rho.items())
            text = (
                f"before round {at} the {self.score} scores did not order the domains as measured steps did (Spearman {told}; "
                f"at least {self.min_rank} is asked): the mixture is the prior"
            )
            notes.append(Note(FAILED, text, 1))
        for code, text in (
            ("no_task_improved", "rounds in which no task improved kept their mixture"),
            ("equal_scores", "columns of scores had nothing but ties and count as uniform"),
            ("fit_failed", "fits of a potential failed and count as 0"),
        ):
            if count := last.events.get(code, 0):
                notes.append(Note(code, f"{count} {text}", count))
        notes.append(Note("no_attribution", "gains are credited to domains by their gradients, not by an experiment"))
        return notes


def _gain(history: Float[np.ndarray, "t m"]) -> tuple[Float[np.ndarray, " m"], int]:
    """Effective gain of every task: 1 before any training, then the last fall and the potential, at least 0."""
    if len(history) == 1:
        return np.ones(history.shape[1]), 0
    found = [potential(task) for task in history.T]
    gain = history[-2] - history[-1] + np.array([one.value for one in found])
    return np.maximum(gain, 0.0), sum(one.failed for one in found)
