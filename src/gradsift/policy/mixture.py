"""What each cluster's rows do by the end of an episode, regressed on finished roll-outs (ours, after RegMix, 2407.01492).

RegMix fits small models' losses to their mixtures and takes the best predicted mixture. Here the rows are clusters, the
runs are the navigator's roll-outs that were made anyway, and limits on several losses are kept by the linear program. No
first-order picture is asked to hold, so this is what is left to learn from when the simulator is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gradsift.policy.calibration import Rollout
from gradsift.policy.episodes import NO_ROW, Table
from gradsift.policy.plan import Effects

STRENGTHS = tuple(float(10.0**k) for k in range(-3, 5))


@dataclass(frozen=True)
class MixtureFit:
    """Effects per decision and how well they told left-out roll-outs.

    Args:
        effects: [K] gains and [K, M] harms in nats per full decision.
        strength: of the ridge, the one of least error.
        error: root mean square error of left-out changes over their spread, sources first, the target last; 1 says that
            the mixture told nothing.
        num_rollouts: roll-outs of the fit.
    """

    effects: Effects
    strength: float
    error: tuple[float, ...]
    num_rollouts: int


def fit_mixture(rollouts: Sequence[Rollout], table: Table, rows_per_decision: int) -> MixtureFit:
    """Regress the losses' changes over an episode on how much of each cluster it was made of.

    change = sum_k n_k (e + u_k) with n_k the decisions' worth of rows of cluster k, a ridge on the u_k alone, and its
    strength chosen by leaving one roll-out out at a time.

    Args:
        rollouts: at least 3 finished ones.
        table: the clusters.
        rows_per_decision: rows of a full decision.

    Returns:
        The fit.

    Raises:
        ValueError: there are fewer than 3 roll-outs.
    """
    if len(rollouts) < 3:
        raise ValueError("a mixture is fitted to at least 3 roll-outs")
    cluster = np.full(len(table.price), -1)
    for k, some in enumerate(table.members):
        cluster[list(some)] = k
    counts = np.stack(
        [
            np.bincount(cluster[one.rows[one.rows != NO_ROW]], minlength=table.num_clusters) / rows_per_decision
            for one in rollouts
        ]
    )
    change = np.stack([one.losses[-1] - one.losses[0] for one in rollouts])
    spread = change.std(axis=0)
    scaled = change / np.where(spread > 0, spread, 1.0)
    errors = [_left_out(counts, scaled, strength) for strength in STRENGTHS]
    best = int(np.argmin([e.mean() for e in errors]))
    effect = _ridge(counts, change, STRENGTHS[best])
    return MixtureFit(
        Effects(-effect[:, -1], effect[:, :-1]), STRENGTHS[best], tuple(errors[best].tolist()), len(rollouts)
    )


def _ridge(
    counts: Float[np.ndarray, "R K"], change: Float[np.ndarray, "R A"], strength: float
) -> Float[np.ndarray, "K A"]:
    """Common effect and deviations, the deviations penalized; in mean-count units so that the strength has one meaning."""
    unit = float(np.sqrt(np.square(counts).mean())) or 1.0
    design = np.column_stack([counts.sum(axis=1), counts]) / unit
    penalty = np.diag([1e-9, *np.full(counts.shape[1], strength)])
    found = np.linalg.solve(design.T @ design + penalty, design.T @ change) / unit
    return found[0] + found[1:]


def _left_out(
    counts: Float[np.ndarray, "R K"], change: Float[np.ndarray, "R A"], strength: float
) -> Float[np.ndarray, " A"]:
    """Root mean square error of each roll-out told by the others."""
    keep = ~np.eye(len(counts), dtype=bool)
    told = np.stack([counts[i] @ _ridge(counts[m], change[m], strength) for i, m in enumerate(keep)])
    return np.sqrt(np.square(told - change).mean(axis=0))
