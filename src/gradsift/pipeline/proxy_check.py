"""What a proxy run asks of the inputs, checked before a model loads, and what it would take (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from gradsift.data.token_rows import places
from gradsift.errors import DataError
from gradsift.geometry.cluster import default_num_clusters
from gradsift.geometry.trajectory import Plan
from gradsift.seeds import stream
from gradsift.types import Note, TokenRow

if TYPE_CHECKING:
    from gradsift.pipeline.prepare import Prepared
    from gradsift.train.parts import Cost

MUCH_MEASURING = 0.2  # of what the training rounds take
MUCH_PROXY = 0.1  # of what training the target model takes
Split = dict[str, tuple[TokenRow, ...]]


@runtime_checkable
class Proxied(Protocol):
    """A method that says beforehand which proxy runs it will ask for."""

    @property
    def proxy_plans(self) -> tuple[Plan, ...]:
        """One plan per run."""
        ...


def split_tasks(prepared: Prepared, tasks: Sequence[str]) -> tuple[Split, Split]:
    """Part the rows of tasks into those that give a gradient and those that give a loss.

    Args:
        prepared: the run's inputs.
        tasks: names of anchors, or ``target``.

    Returns:
        task -> gradient rows, and task -> loss rows. Tasks of too few rows (ConfigError) or with shared rows (DataError)
        are refused.
    """
    from gradsift.train.proxy_rows import task_rows

    given, rows = prepared.recipe.proxy, {source.name: source.usable for source in prepared.directions}
    draws = stream(prepared.recipe.seed, "proxy").child("held")
    return task_rows({task: rows[task] for task in tasks}, given.held_share, given.held_rows, draws)


def needed_tasks(prepared: Prepared) -> tuple[str, ...]:
    """List the tasks that the method's proxy run will have: the target, and with anchors as tasks these too."""
    needs = prepared.method.needs
    anchors = tuple(source.name for source in prepared.anchors) if needs.anchors else ()
    return ("target", *anchors) if needs.target else anchors


def check_proxy(prepared: Prepared) -> None:
    """Refuse inputs that a proxy run could not use, before a model loads.

    Args:
        prepared: the run's inputs.

    Raises:
        DataError: fewer than two labels have usable rows; tasks that cannot be parted are refused too.
    """
    if not prepared.method.needs.proxy:
        return
    labels = sorted(_by_label(prepared))
    if prepared.method.needs.domains and len(labels) < 2:
        raise DataError(
            "a mixture needs at least two domains",
            where="usable rows of the pool",
            got=f"{len(labels)} label with any: {', '.join(labels)}",
            expected="two labels or more: --pool medical=a.jsonl --pool law=b.jsonl",
            do="look at the other files with gradsift inspect, or --set domains=cluster",
        )
    split_tasks(prepared, needed_tasks(prepared))


def _by_label(prepared: Prepared) -> dict[str, list[int]]:
    """Tokens of the usable rows by label."""
    rows, pool = prepared.pool.usable, prepared.pool.pool
    out: dict[str, list[int]] = {}
    for i, row in zip(places(pool, rows), rows, strict=True):
        out.setdefault(pool.label(int(i)), []).append(row.num_tokens)
    return out


@dataclass(frozen=True)
class ProxyTokens:
    """What proxy runs would take.

    Args:
        num_runs: trainings of the navigator, a reference included.
        both: tokens sent forward and backward.
        forward: tokens sent forward alone.
        num_gradients: gradients that a round keeps at a time.
    """

    num_runs: int = 0
    both: int = 0
    forward: int = 0
    num_gradients: int = 0


def proxy_tokens(prepared: Prepared) -> ProxyTokens:
    """Estimate the tokens of all proxy runs, each domain's rows as long as its mean and no rule stopping early.

    Args:
        prepared: the run's inputs.

    Returns:
        Estimates; zeros where the method asks for no proxy, or does not say which.
    """
    if not isinstance(prepared.method, Proxied):
        return ProxyTokens()
    groups = list(_by_label(prepared).values())
    if not prepared.method.needs.domains:  # groups that are yet to be found: of equal sizes
        rows = [n for group in groups for n in group]
        num = getattr(prepared.method, "num_clusters", None) or default_num_clusters(len(rows))
        groups = [rows[d::num] for d in range(min(num, len(rows)))]
    sizes, mean = np.array([len(group) for group in groups]), np.array([np.mean(group) for group in groups])
    probes, held = split_tasks(prepared, needed_tasks(prepared))
    plans = prepared.method.proxy_plans
    found = [_one(plan, sizes, mean, probes, held) for plan in plans]
    both, forward = sum(one[0] for one in found), sum(one[1] for one in found)
    referred = {plan for plan in plans if "excess" in plan.measures}
    for plan in referred:  # a reference is trained once, and measures what the proxy will
        shown = np.minimum(sizes, plan.rows_per_domain)
        both += float(plan.num_rounds * shown.sum() * (sizes @ mean) / sizes.sum())
        forward += float(np.minimum(sizes, plan.num_rounds * shown) @ mean)
    grams = [len(sizes) + len(probes) for plan in plans if "gram" in plan.measures]
    return ProxyTokens(len(plans) + len(referred), round(both), round(forward), max(grams, default=0))


def _one(plan: Plan, sizes: np.ndarray, mean: np.ndarray, probes: Split, held: Split) -> tuple[float, float]:
    """Tokens of a run: sent forward and backward, and forward alone."""
    rounds, shown = plan.num_rounds, float(np.minimum(sizes, plan.rows_per_domain) @ mean)
    kept = sum(row.num_tokens for rows in held.values() for row in rows)
    both = forward = 0.0
    if "gram" in plan.measures:
        each = [
            np.mean([row.num_tokens for row in rows]) * min(len(rows), plan.rows_per_domain) for rows in probes.values()
        ]
        both += rounds * (shown + float(sum(each)))
    if "excess" in plan.measures:
        forward += rounds * shown
    forward += (rounds + 1) * kept
    if plan.test_every and kept:
        tests = -(-rounds // plan.test_every)
        both, forward = both + tests * shown, forward + tests * len(sizes) * kept
    trained = {"combined": 0.0, "weighted": shown, "sampled": plan.rows_per_round * float(sizes @ mean) / sizes.sum()}
    return both + rounds * trained[plan.training], forward


def cost_notes(costs: Mapping[str, Mapping[str, Cost]], sampled: Sequence[str], num_tokens: int) -> list[Note]:
    """Say what proxy runs took, beside what they are for.

    Args:
        costs: run -> part (``train``, ``probe``) -> cost.
        sampled: runs whose rounds train on rows drawn by the mixture, so that measuring stands beside a training.
        num_tokens: tokens of the chosen rows.

    Returns:
        Remarks: measuring that took more than a fifth of the training rounds, and the weights that a target model must have
        for all proxy runs together to take less than a tenth of an epoch on the chosen rows.
    """
    notes = []
    for name in sampled:
        train, probe = costs[name]["train"].flops, costs[name]["probe"].flops
        if train and probe > MUCH_MEASURING * train:
            text = (
                f"measuring took {probe / train:.0%} of what the training rounds of {name} took (model operations): fewer "
                "rows_per_domain, fewer rank tests or more rows_per_round lower it"
            )
            notes.append(Note("probe_cost", text))
    flops = sum(cost.flops for parts in costs.values() for cost in parts.values())
    weights = flops / (MUCH_PROXY * 6 * num_tokens)  # an epoch takes 6 operations per weight and token
    text = (
        f"the proxy runs took {flops:.2g} operations: less than {MUCH_PROXY:.0%} of an epoch on the chosen rows only for a "
        f"target model of more than {weights / 1e9:.2g} billion weights"
    )
    return [*notes, Note("proxy_cost", text)]
