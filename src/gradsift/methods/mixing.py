"""What the mixture methods share: the pool in domains, and rows drawn by a mixture (ours).

A mixture is a method's answer; rows are drawn from it within each domain by a keyed draw, so that a selection of any
budget can be trained on as it is, and ``selection/mixture.json`` gives the probabilities to trainers that sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import DataError
from gradsift.geometry.cluster import spherical_kmeans
from gradsift.geometry.mixture import effective_number, mixture_counts, mixture_places, name_weights
from gradsift.geometry.round_record import plain
from gradsift.geometry.trajectory import Domains, Trajectory
from gradsift.methods.base import Needs, resolve_budget, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Cut, Note, Problem, Selection

if TYPE_CHECKING:
    from gradsift.methods.base import Method

DomainKind = Literal["source", "cluster"]
SmallKind = Literal["keep", "merge"]
REST = "merged"
COLLAPSED, SETTLED = 0.9, 0.01


def mixture_needs(kind: DomainKind, *, target: bool) -> Needs:
    """Say what a mixture method must be given.

    Args:
        kind: given labels, or groups found on sketches, which take a gradient pass.
        target: a target set.

    Returns:
        The needs.
    """
    signals = {"loss", "sketch"} if kind == "cluster" else {"loss"}
    return Needs(signals=frozenset(signals), target=target, domains=kind == "source", proxy=True)


@dataclass(frozen=True)
class Dealt:
    """The pool in domains, and what was said about it.

    Args:
        domains: names, rows and sizes.
        notes: merged and small domains.
    """

    domains: Domains
    notes: tuple[Note, ...]


def make_domains(
    problem: Problem,
    kind: DomainKind,
    *,
    stream: Stream,
    num_clusters: int | None = None,
    least: int = 1,
    small: SmallKind = "keep",
    tasks: tuple[str, ...] = (),
) -> Dealt:
    """Part the pool into domains.

    Args:
        problem: the eligible rows; with ``sketch`` for clusters.
        kind: ``source`` takes the labels, ``cluster`` finds groups.
        stream: of the clustering.
        num_clusters: groups to look for; None for the default of the pool's size.
        least: rows below which a domain is small.
        small: ``keep`` small domains, or ``merge`` them: groups into the nearest group, labels into one domain together.
        tasks: names of the tasks.

    Returns:
        Domains in name order, each with at least one row.

    Raises:
        DataError: fewer than two domains are left.
    """
    if kind == "source":
        names, of_row = np.unique(np.array(problem.sources, dtype=object).astype(str), return_inverse=True)
        names = [str(name) for name in names]
        of_row = of_row.astype(np.int64)
        merged = _small(of_row, least) if small == "merge" else []
        if len(merged) > 1:
            names, of_row = _together(names, of_row, merged)
        merged = merged if len(merged) > 1 else []
    else:
        assert problem.sketch is not None
        groups = spherical_kmeans(problem.sketch, stream, ids=problem.ids, num_clusters=num_clusters)
        of_row = groups.labels.astype(np.int64)
        merged = _small(of_row, least) if small == "merge" else []
        of_row = _nearest(of_row, groups.centers, merged)
        used, of_row = np.unique(of_row, return_inverse=True)
        width = len(str(len(used) - 1))  # numbered like the audit's clusters, whatever was merged
        names, of_row = [f"cluster-{c:0{width}d}" for c in range(len(used))], of_row.astype(np.int64)
    if len(names) < 2:
        raise DataError(
            "a mixture needs at least two domains",
            where="the pool's source labels" if kind == "source" else "clusters of the pool",
            got=f"{len(names)}: {', '.join(names)}",
            expected="two labels or more: --pool medical=a.jsonl --pool law=b.jsonl",
            do="give the pool in several files with labels, or --set domains=cluster",
        )
    sizes = np.bincount(of_row, minlength=len(names))
    return Dealt(Domains(tuple(names), of_row, sizes, tasks), tuple(_size_notes(names, sizes, merged, least)))


def _small(of_row: Int[np.ndarray, " N"], least: int) -> list[int]:
    sizes = np.bincount(of_row)
    return [int(d) for d in np.flatnonzero((sizes > 0) & (sizes < least))]


def _together(
    names: Sequence[str], of_row: Int[np.ndarray, " N"], some: Sequence[int]
) -> tuple[list[str], Int[np.ndarray, " N"]]:
    """Make one domain of several labels; it comes last."""
    kept = [d for d in range(len(names)) if d not in some]
    number = np.full(len(names), len(kept), dtype=np.int64)
    number[kept] = np.arange(len(kept))
    name = REST
    while name in names:  # a label of that name is somebody's own
        name += "_"
    return [*(names[d] for d in kept), name], number[of_row]


def _nearest(
    of_row: Int[np.ndarray, " N"], centers: Float[np.ndarray, "K D"], some: Sequence[int]
) -> Int[np.ndarray, " N"]:
    """Move the rows of small groups to the nearest group that is not small; all stay where every group is."""
    large = np.setdiff1d(np.unique(of_row), np.array(some, dtype=np.int64))
    out = of_row.copy()
    for d in some if large.size else ():
        out[of_row == d] = large[int(np.argmax(centers[large] @ centers[d]))]
    return out


def _size_notes(names: Sequence[str], sizes: Int[np.ndarray, " k"], merged: Sequence[int], least: int) -> list[Note]:
    notes = []
    if merged:
        text = f"{len(merged)} domains of fewer than {least} rows were merged"
        notes.append(Note("domains_merged", text, len(merged)))
    few = [f"{name} ({n})" for name, n in zip(names, sizes, strict=True) if n < least]
    if few:
        text = f"{len(few)} domains have fewer than {least} rows, so their gradients are coarse: {', '.join(few[:5])}"
        notes.append(Note("small_domains", text, len(few)))
    return notes


def select_by_mixture(
    problem: Problem,
    method: Method,
    budget: Budget,
    stream: Stream,
    *,
    dealt: Dealt,
    weights: Float[np.ndarray, " k"],
    notes: Sequence[Note],
    details: Mapping[str, Any],
) -> Selection:
    """Draw rows by a mixture within the budget.

    Args:
        problem: the eligible rows.
        method: whose mixture it is.
        budget: rows, percentage or trained tokens; tokens are shared by the mixture too.
        stream: of the draw.
        dealt: the pool in domains.
        weights: float64 [k] domain probabilities.
        notes: of the method.
        details: what else to show.

    Returns:
        The selection with its mixture. A domain that runs out is dropped and the others share the rest, which is counted.
    """
    domains, allowance = dealt.domains, resolve_budget(problem, budget)
    draw = stream.child("draw").uniform(problem.ids)
    cost = allowance.cost(problem)
    place = mixture_places(domains.of_row, draw, cost, weights, allowance.amount)
    names = domains.names

    def why(i: int) -> str:
        d = domains.of_row[i]
        return f"draw {draw[i]:.4f} within {names[d]}, whose share is {weights[d]:.4f} (of the pool {domains.sizes[d] / problem.size:.4f})"

    selection = select_ranked(problem, method, budget, stream, score=-place, kept="mixture", why_kept=why)
    bound = max(problem.noise.loss, problem.noise.norm, problem.noise.cos)
    chosen = np.isin(np.array(problem.ids, dtype=object), selection.ids)
    got = np.bincount(domains.of_row[chosen], weights=cost[chosen], minlength=len(names))
    said = [*selection.notes, *dealt.notes, *notes, *_shortfalls(problem, dealt, weights, got, cost)]
    return dataclasses.replace(
        selection,
        # a training lies between the signals and the mixture: no bound is known on what another measurement would give
        cut=Cut(0.0, bound, problem.ids if bound else (), known=False),
        cluster=domains.of_row.astype(np.int32),
        mixture=name_weights(names, weights),
        notes=tuple(said),
        details=plain({**details, "domains": _table(problem, dealt, weights, got)}),
    )


def _shortfalls(
    problem: Problem,
    dealt: Dealt,
    weights: Float[np.ndarray, " k"],
    got: Float[np.ndarray, " k"],
    cost: Int[np.ndarray, " N"],
) -> list[Note]:
    """Say which domains gave all they have and less than their share of what was taken."""
    have = np.bincount(dealt.domains.of_row, weights=cost, minlength=len(weights))
    found = mixture_counts(weights, have.astype(np.int64), round(float(got.sum())))
    out = [d for d in found.exhausted if have[d] <= got[d] < found.planned[d]]
    if not out:
        return []
    unit = "rows" if (cost == 1).all() else "trained tokens"
    missing = sum(int(found.planned[d] - got[d]) for d in out)
    named = ", ".join(f"{dealt.domains.names[d]} ({have[d]:.0f} of {found.planned[d]})" for d in out)
    text = (
        f"{named} ran out: {missing} {unit} of their share came from the other domains, so the chosen rows do not "
        "follow the mixture; a trainer that samples can repeat rows (selection/mixture.json)"
    )
    return [Note("domain_exhausted", text, missing)]


def _table(
    problem: Problem, dealt: Dealt, weights: Float[np.ndarray, " k"], got: Float[np.ndarray, " k"]
) -> list[dict[str, Any]]:
    assert problem.loss is not None
    domains = dealt.domains
    mean = np.bincount(domains.of_row, weights=problem.loss) / domains.sizes
    return [
        {"name": name, "rows": int(n), "share_of_pool": n / problem.size, "weight": w, "share_chosen": c / got.sum(),
         "loss": loss}
        for name, n, w, c, loss in zip(domains.names, domains.sizes, weights, got, mean, strict=True)
    ]  # fmt: skip


def run_notes(trajectory: Trajectory, names: Sequence[str]) -> list[Note]:
    """Say what any proxy run must say: collapse, weights that still move, rows that were missing.

    Args:
        trajectory: the run.
        names: k domains.

    Returns:
        Counted remarks.
    """
    notes, weights = [], trajectory.weights
    high = np.flatnonzero(weights.max(axis=1) > COLLAPSED)
    if high.size:
        top = names[int(weights[high[0]].argmax())]
        text = f"{top} held more than {COLLAPSED:.0%} of the weight from round {high[0]} on: a larger mu, floor or smoothing spreads it"
        notes.append(Note("collapse", text, len(high)))
    if trajectory.drift >= SETTLED and not trajectory.rounds[-1].state.stopped:
        text = f"the mean weights still moved by {trajectory.drift:.3f} (L1) in the last fifth of the rounds: more rounds would move them on"
        notes.append(Note("not_settled", text))
    short = sum(one.short for one in trajectory.rounds)
    if short:
        notes.append(Note("proxy_shortage", f"the proxy run lacked {short} rows: its domains ran out", short))
    return notes


def show_run(trajectory: Trajectory, names: Sequence[str]) -> dict[str, Any]:
    """Put a proxy run into a selection's details.

    Args:
        trajectory: the run.
        names: k domains.

    Returns:
        Weights, losses and figures per round, both averages and the effective number of domains.
    """
    last = trajectory.rounds[-1].state
    return {
        "names": list(names),
        "weights_mean": trajectory.weights.mean(axis=0),
        "weights_last": last.weights,
        "effective_number": effective_number(last.weights),
        "drift": trajectory.drift,
        "events": last.events,
        "task_losses_after": trajectory.task_losses,
        "rounds": [
            {"weights": r.state.weights, "losses": r.feedback.losses, "task_losses": r.feedback.task_losses,
             "gram": r.feedback.gram, "counts": r.counts, **r.state.figures}
            for r in trajectory.rounds
        ],
    }  # fmt: skip
