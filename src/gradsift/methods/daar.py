"""Rows between domains: those of which a small probe on hidden states cannot say the domain.

Paper: Ling et al., "Diversity as a Reward: Fine-Tuning LLMs on a Mixture of Domain-Undetermined Data", NeurIPS 2025,
arXiv 2502.04380 (DaaR).

Algorithm:
    1  x_i = mean embedding-layer vector of the row's tokens, h_i = mean hidden state after ``layer`` (3)
    2  seed rows, if any are marked: near copies left out (cosine < tau), centroid C_k per domain
    3  K-means from the C_k on x of the probe rows (5,000, or ``probe_share`` of a smaller pool) -> pseudo-domains
    4  probe: MLP d -> 2d -> d -> d/2 -> 256 -> K on h of the probe rows, cross-entropy; refused below ``min_accuracy``
    5  H_i = entropy of its probabilities, calibrated by a temperature
    6  take the rows of largest H_i; with ``prefer`` each domain may give 10% of its rows, the preferred one 50%

Departures from the paper: no text is generated: seeds are rows that a column marks, and without them K-means draws its
first centers; entropy is taken from the probe itself, where the paper regresses it with a second network; the probe
learns from standardized states in batches of 32 with early stopping and a larger rate, since a tiny rate with single rows
is fragile; a temperature of at least 1 makes entropies comparable; no inner layer is narrower than 64. Rows that the probe learned from can be chosen, and
are marked.

Departures from released code: means are taken over real tokens, where modelscope/data-juicer, branch DaaR at
50be1c1, averages 1,024 padded positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from gradsift.errors import ConfigError, DataError
from gradsift.geometry.entropy import (
    domain_quotas,
    entropy,
    least_probe_rows,
    num_probe_rows,
    pseudo_labels,
    seed_centroids,
)
from gradsift.geometry.probe import Probe, ProbeConfig, train_probe
from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Column, Note, Problem, Selection


@register
@dataclass(frozen=True)
class Daar:
    """Largest domain entropy.

    Args:
        domains: ``clusters`` finds them, ``sources`` takes the labels of the pool files (an ablation of the paper).
        num_domains: K, where domains are found without seeds.
        seeds: column that names the domain of seed rows; empty for none.
        tau: largest cosine of two seed rows, to be undercut.
        min_seeds: least seed rows that a domain must keep.
        layer: whose hidden states the probe reads.
        prefer: domain (label, seed domain, or number of a cluster) that may give half of its rows; empty for none.
        order: ``entropy`` takes the largest, ``inverse`` the smallest (a control).
        probe_share: share of a pool below 5,000 rows that the probe learns from, in (0, 1].
        rows_per_domain: least rows per domain that it learns from.
        min_accuracy: least share of held-out rows that it must label right.
        lr: its learning rate.
        steps: most of its optimizer steps.
    """

    name: ClassVar[str] = "daar"
    paper: ClassVar[str] = "Ling et al. 2025, arXiv 2502.04380 (DaaR)"
    summary: ClassVar[str] = "rows between domains: largest entropy of a probe on early hidden states"
    evidence: ClassVar[str] = "paper + code"

    domains: Literal["clusters", "sources"] = "clusters"
    num_domains: Annotated[int, Field(ge=2)] = 4
    seeds: str = ""
    tau: Annotated[float, Field(gt=-1, le=1)] = 0.85
    min_seeds: Annotated[int, Field(ge=1)] = 3
    layer: Annotated[int, Field(ge=1)] = 3
    prefer: str = ""
    order: Literal["entropy", "inverse"] = "entropy"
    probe_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    rows_per_domain: Annotated[int, Field(ge=1)] = 50
    min_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.8
    lr: Annotated[float, Field(gt=0)] = 1e-3
    steps: Annotated[int, Field(ge=1)] = 600

    def __post_init__(self) -> None:
        if self.prefer and self.domains == "clusters" and not self.seeds:
            _refuse_unknown(self.prefer, _numbers(self.num_domains))  # here rather than when the pool was measured

    @property
    def needs(self) -> Needs:
        """One forward pass with two taps."""
        columns = (Column(self.seeds, "word", optional=True),) if self.seeds else ()
        given = self.domains == "sources"
        least = 0 if given or self.seeds else least_probe_rows(self.num_domains, self.rows_per_domain)
        return Needs(
            signals=frozenset({"hidden"}), layers=(0, self.layer), columns=columns, domains=given, least_rows=least
        )

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Take the rows whose domain the probe is least sure of.

        Args:
            problem: the eligible rows with ``hidden`` after layers 0 and ``layer``.
            budget: rows, percentage or trained tokens.
            stream: of the probe rows, the first centers and the probe.

        Returns:
            The selection. Scores are entropies in nats (negated for ``inverse``); ``cluster`` is the pseudo-domain.
        """
        require(problem, self)
        names, start = self._domains(problem)
        learned = self._probe_rows(problem, len(names), stream)
        labels = self._labels(problem, names, start, learned, stream)
        config = ProbeConfig(lr=self.lr, steps=self.steps)
        states = problem.layer(self.layer)
        probe = train_probe(states[learned], labels[learned], len(names), config, stream.child("probe").numpy())
        self._refuse_weak(probe)
        probability = probe.probabilities(states)
        unsure = entropy(probability)
        score = unsure if self.order == "entropy" else -unsure
        allowed = self._allowed(score, labels, names)
        likely, limit = probability.argmax(axis=1), float(np.log(len(names)))
        marked = np.isin(np.arange(problem.size), learned)
        selection = select_ranked(
            problem,
            self,
            budget,
            stream,
            score=score,
            kept=self.order,
            why_kept=lambda i: (
                f"entropy {unsure[i]:.4f} of at most {limit:.4f} nats, likeliest domain {names[likely[i]]} at "
                f"{probability[i, likely[i]]:.3f}, pseudo-domain {names[labels[i]]}"
                + (", one of the probe's rows" if marked[i] else "")
            ),
            candidates=allowed,
            dropped={
                int(i): ("dropped:quota", f"domain {names[labels[i]]} has given its share of rows with larger entropy")
                for i in np.flatnonzero(~allowed)
            },
            notes=self._notes(problem, names, labels, learned, unsure),
        )
        details = {
            "domains": list(names),
            "probe": {"accuracy": probe.accuracy, "num_held_out": probe.num_held_out, "temperature": probe.temperature},
            "probe_rows": [problem.ids[i] for i in learned],
        }
        return dataclasses.replace(selection, cluster=labels.astype(np.int32), details=details)

    def _domains(self, problem: Problem) -> tuple[tuple[str, ...], Float[np.ndarray, "K d"] | int]:
        """Names of the domains, and where K-means begins."""
        if self.domains == "sources":
            names = tuple(sorted(set(problem.sources)))
            if len(names) < 2:
                raise ConfigError(
                    "daar needs at least two domains", where="--pool", got=f"one label, {problem.sources[0]}",
                    expected="--pool a=one.jsonl --pool b=two.jsonl", do="--set domains=clusters",
                )  # fmt: skip
            return names, len(names)
        if not self.seeds:
            return _numbers(self.num_domains), self.num_domains
        marks = [str(mark) for mark in problem.external[self.seeds]]
        rows = [i for i, mark in enumerate(marks) if mark]
        vectors = problem.layer(0)[rows].astype(np.float64)
        found = seed_centroids(vectors, [marks[i] for i in rows], self.tau, least=self.min_seeds)
        if len(found) < 2:
            raise DataError(
                "daar needs seed rows of at least two domains", where=f"column {self.seeds}", got=", ".join(found),
                expected="two names or more", do="mark rows of another domain, or leave --set seeds out",
            )  # fmt: skip
        return tuple(found), np.stack(list(found.values()))

    def _probe_rows(self, problem: Problem, num_domains: int, stream: Stream) -> Int[np.ndarray, " n"]:
        count = num_probe_rows(problem.size, num_domains, self.probe_share, self.rows_per_domain)
        if max(count, 2) > problem.size:
            raise DataError(
                "the pool is too small for a probe",
                got=f"{problem.size} rows for {num_domains} domains",
                expected=f"at least {max(count, 2)}",
                do="add rows, or lower --set num_domains or --set rows_per_domain",
            )
        draws = stream.child("rows").uniform(problem.ids)
        return np.sort(np.lexsort((np.arange(problem.size), draws))[:count])

    def _labels(
        self,
        problem: Problem,
        names: tuple[str, ...],
        start: Float[np.ndarray, "K d"] | int,
        learned: Int[np.ndarray, " n"],
        stream: Stream,
    ) -> Int[np.ndarray, " N"]:
        if self.domains == "sources":
            return np.array([names.index(source) for source in problem.sources], dtype=np.int64)
        vectors = problem.layer(0)
        return pseudo_labels(vectors[learned], vectors, start, stream.child("clusters"))

    def _refuse_weak(self, probe: Probe) -> None:
        if probe.accuracy < self.min_accuracy:
            raise DataError(
                f"domains are not separable at layer {self.layer}",
                got=f"{probe.accuracy:.3f} of {probe.num_held_out} held-out rows labeled right",
                expected=f"at least {self.min_accuracy:g}",
                do="merge domains (--set num_domains), mark seed rows (--set seeds), or use another --set layer",
            )

    def _allowed(
        self, score: Float[np.ndarray, " N"], labels: Int[np.ndarray, " N"], names: tuple[str, ...]
    ) -> Bool[np.ndarray, " N"]:
        """Rows within their domain's quota; all of them without a preferred domain."""
        allowed = np.ones(len(score), dtype=bool)
        if not self.prefer:
            return allowed
        _refuse_unknown(self.prefer, names)
        sizes = np.bincount(labels, minlength=len(names)).tolist()
        for k, quota in enumerate(domain_quotas(sizes, names.index(self.prefer))):
            rows = np.flatnonzero(labels == k)
            allowed[rows[np.lexsort((rows, -score[rows]))][quota:]] = False
        return allowed

    def _notes(
        self,
        problem: Problem,
        names: tuple[str, ...],
        labels: Int[np.ndarray, " N"],
        learned: Int[np.ndarray, " n"],
        unsure: Float[np.ndarray, " N"],
    ) -> list[Note]:
        text = f"the probe learned from {len(learned)} rows, which can be chosen all the same"
        notes = [Note("probe_rows", text, len(learned), tuple(problem.ids[i] for i in learned[:5]))]
        if problem.noise.embedding or problem.noise.loss:
            text = "how far an entropy moves when hidden states are measured again is not known; no bound is given at the cut"
            notes.append(Note("no_bound", text))
        for k, size in enumerate(np.bincount(labels[learned], minlength=len(names)).tolist()):
            if size < 0.02 * len(learned):
                text = f"domain {names[k]} has {size} of the {len(learned)} probe rows; merge it with another"
                notes.append(Note("small_domain", text, size))
        if np.ptp(unsure) == 0:
            notes.append(Note("saturated", "all entropies are equal, so rows are taken in the order of their ids"))
        return notes


def _numbers(num_domains: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(num_domains))


def _refuse_unknown(prefer: str, names: tuple[str, ...]) -> None:
    if prefer not in names:
        raise ConfigError("there is no such domain", where="--set prefer", got=prefer, expected=", ".join(names))
