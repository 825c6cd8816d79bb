"""Domain probabilities and what becomes of them: priors, floors and caps, and the rows that a mixture asks for.

Source: largest remainders, exhaustion and epochs as the specification of DIDS (arXiv 2504.13227) corrects its release,
which floors the counts and so loses mass; everything else ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import NumericsError

PriorKind = Literal["size", "uniform"]
BISECTIONS = 200


@dataclass(frozen=True)
class Counts:
    """Rows that a mixture takes from each domain.

    Args:
        counts: int64 [k] rows to take.
        planned: int64 [k] rows that the mixture alone would take.
        exhausted: indices of the domains that gave all they had and were asked for more.
        short: rows that no domain could give.
    """

    counts: Int[np.ndarray, " k"]
    planned: Int[np.ndarray, " k"]
    exhausted: tuple[int, ...]
    short: int


def largest_remainder(weights: Float[np.ndarray, " k"], total: int) -> Int[np.ndarray, " k"]:
    """Round shares of a total to whole numbers that add up to it.

    Args:
        weights: k shares >= 0 of positive sum.
        total: rows to deal out, >= 0.

    Returns:
        int64 [k] summing to ``total``: the floors, and one more for the largest remainders; equal remainders go to the
        domain that comes first.
    """
    exact = total * weights / weights.sum()
    # 1e-9: a share such as 0.29 * 100 lies just below its whole number in floating point
    floors = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.round(exact - floors, 12)
    order = np.lexsort((np.arange(len(weights)), -rest))
    floors[order[: total - int(floors.sum())]] += 1
    return floors


def mixture_counts(weights: Float[np.ndarray, " k"], available: Int[np.ndarray, " k"], total: int) -> Counts:
    """Deal a number of rows out to domains that may run out (K11 of the specifications).

    A domain that cannot give its share gives what it has and is dropped; the others share the rest by their renormalized
    weights. A domain of weight 0 gives nothing, so rows can be missing although some domain still has them.

    Args:
        weights: k domain probabilities.
        available: k rows that each domain can still give, epochs counted.
        total: rows asked for.

    Returns:
        The counts, with every shortfall.

    Raises:
        NumericsError: the weights are no probabilities.
    """
    refuse_no_mixture(weights)
    counts = np.zeros(len(weights), dtype=np.int64)
    planned = largest_remainder(weights, total)
    live, left = (weights > 0) & (available > 0), total
    exhausted = {int(i) for i in np.flatnonzero((weights > 0) & (available == 0) & (planned > 0))}
    while left and live.any():
        share = np.zeros_like(counts)
        share[live] = largest_remainder(weights[live], left)
        over = live & (counts + share > available)
        if not over.any():
            counts += share
            left = 0
            break
        # only what runs out is settled in a pass: what it leaves over changes the shares of the others
        exhausted |= {int(i) for i in np.flatnonzero(over)}
        left -= int((available - counts)[over].sum())
        counts[over] = available[over]
        live &= ~over
    return Counts(counts, planned, tuple(sorted(exhausted)), left)


def refuse_no_mixture(weights: Float[np.ndarray, " k"]) -> None:
    """Refuse weights that are no probabilities.

    Args:
        weights: k domain weights.

    Raises:
        NumericsError: one is negative or not finite, or they do not sum to 1.
    """
    if not np.isfinite(weights).all() or (weights < 0).any() or abs(float(weights.sum()) - 1) > 1e-9:
        raise NumericsError(
            "domain weights are no probabilities",
            where="mixture",
            got=np.array2string(np.asarray(weights), precision=4),
            expected="finite numbers >= 0 that sum to 1",
            do="lower the proxy's learning rate",
        )


def prior_weights(sizes: Int[np.ndarray, " k"], kind: PriorKind) -> Float[np.ndarray, " k"]:
    """Give the mixture that knows nothing: proportional to size (a random draw of rows) or uniform (stratified).

    Args:
        sizes: k rows per domain, >= 1.
        kind: ``size`` or ``uniform``.

    Returns:
        float64 [k] summing to 1.
    """
    raw = sizes.astype(np.float64) if kind == "size" else np.ones(len(sizes))
    return raw / raw.sum()


def bounded(
    weights: Float[np.ndarray, " k"], low: Float[np.ndarray, " k"], high: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """Scale weights to a sum of 1 with floors and caps: w_i = clip(s w_i, low_i, high_i), s such that they sum to 1 (ours).

    Ratios between the domains that touch no bound stay as they are.

    Args:
        weights: k weights >= 0 of positive sum.
        low: k floors, sum <= 1.
        high: k caps >= the floors, sum >= 1.

    Returns:
        float64 [k] within the bounds, summing to 1 to 1e-12.

    Raises:
        NumericsError: no weights lie within the bounds.
    """
    if low.sum() > 1 + 1e-12 or high.sum() < 1 - 1e-12 or (low > high).any():
        raise NumericsError(
            "floors and caps leave no mixture", where="mixture", got=f"floors sum to {low.sum():.4g}, caps to {high.sum():.4g}",
            expected="floors that sum to at most 1, caps to at least 1", do="lower the floor or raise the cap",
        )  # fmt: skip
    # A weight of exactly 0 could never reach its cap, so that caps of the others might leave mass over.
    raw = np.maximum(weights / weights.sum(), 1e-15)
    lower, upper = 0.0, 1.0 / raw.min()
    for _ in range(BISECTIONS):
        middle = 0.5 * (lower + upper)
        lower, upper = (middle, upper) if np.clip(middle * raw, low, high).sum() < 1 else (lower, middle)
    found = np.clip(upper * raw, low, high)
    free = (found > low) & (found < high)
    if free.any():  # bisection leaves the last bits: the free domains take them in proportion
        fixed = float(found[~free].sum())
        found[free] *= (1 - fixed) / found[free].sum()
    return found


def effective_number(weights: Float[np.ndarray, " k"]) -> float:
    """Count the domains that a mixture uses: the exponential of its entropy.

    Args:
        weights: k probabilities.

    Returns:
        Between 1 (one domain) and k (uniform).
    """
    some = weights[weights > 0]
    return float(np.exp(-(some * np.log(some)).sum()))


def mixture_places(
    domain: Int[np.ndarray, " N"],
    draw: Float[np.ndarray, " N"],
    cost: Int[np.ndarray, " N"],
    weights: Float[np.ndarray, " k"],
    total: int,
) -> Float[np.ndarray, " N"]:
    """Line rows up so that the first ones of any budget hold the domains in the mixture's shares (ours).

    Within a domain rows come by their draw. Counted in rows, the first ``total`` places are exactly the counts of
    :func:`mixture_counts`, dealt evenly; rows behind them, and rows counted in tokens, stand where the domain has used as
    much of the budget as its weight gives it up to there.

    Args:
        domain: int64 [N] domain of each row, 0 to k - 1.
        draw: float64 [N] smaller first; ties by position.
        cost: int64 [N] what a row takes of the budget: 1, or its trained tokens.
        weights: float64 [k] domain probabilities.
        total: the budget in the same unit, >= 1.

    Returns:
        float64 [N] finite places, smaller first.
    """
    place, used = np.empty(len(domain)), np.empty(len(domain), dtype=np.int64)
    sizes = np.bincount(domain, minlength=len(weights))
    in_rows = bool((cost == 1).all())
    counts = mixture_counts(weights, sizes, min(total, len(domain))).counts if in_rows else np.zeros_like(sizes)
    for d in range(len(weights)):
        rows = np.flatnonzero(domain == d)
        rows = rows[np.argsort(draw[rows], kind="stable")]
        used[rows] = np.cumsum(cost[rows])
        share = max(float(weights[d]) * total, 1e-9)  # a domain of weight 0 comes last, and still in an order
        place[rows] = 1 + (used[rows] - 0.5 * cost[rows]) / share
        if in_rows and counts[d]:
            first = rows[: counts[d]]
            place[first] = (np.arange(counts[d]) + 0.5) / counts[d]
    return place


def name_weights(names: Sequence[str], weights: Float[np.ndarray, " k"]) -> dict[str, float]:
    """Pair domain names with their probabilities.

    Args:
        names: k domain names.
        weights: k probabilities.

    Returns:
        Name -> probability, in the order given.
    """
    return dict(zip(names, (float(w) for w in weights), strict=True))
