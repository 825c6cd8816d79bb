"""Advantages of finished episodes, for rewards and costs alike: GAE, standardizing, the Lagrangian mixture, clipping."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

SMALLEST_SPREAD = 1e-8


def gae(
    rewards: Float[np.ndarray, "T E A"],
    values: Float[np.ndarray, "T E A"],
    running: Bool[np.ndarray, "T E"],
    decay: float = 0.95,
    discount: float = 1.0,
) -> Float[np.ndarray, "T E A"]:
    """Generalized advantage estimates (Schulman et al. 1506.02438, eq. 16) of episodes that end inside the arrays.

    Args:
        rewards: what each step brought; steps after an episode's end are not read.
        values: the critic's estimate before each step; the value of an ended episode is 0.
        running: whether the episode was running before the step.
        decay: lambda, in [0, 1].
        discount: gamma, in (0, 1].

    Returns:
        As rewards; 0 after an episode's end.
    """
    alive = running[:, :, None]
    out = np.zeros(rewards.shape)
    later, value_later = np.zeros(rewards.shape[1:]), np.zeros(rewards.shape[1:])
    for t in range(len(rewards) - 1, -1, -1):
        surprise = rewards[t] + discount * value_later - values[t]
        later = np.where(alive[t], surprise + discount * decay * later, 0.0)
        value_later = np.where(alive[t], values[t], 0.0)
        out[t] = later
    return out


def standardize(advantage: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """Subtract the mean and divide by the population standard deviation plus 1e-8 (omnisafe's reference form).

    Args:
        advantage: one estimate per step.

    Returns:
        Mean 0, and variance 1 unless all are equal.
    """
    return (advantage - advantage.mean()) / (advantage.std() + SMALLEST_SPREAD)


def lagrangian_advantage(
    reward: Float[np.ndarray, " B"],
    cost: Float[np.ndarray, "B M"],
    price: Float[np.ndarray, " M"],
    weight: float = 1.0,
) -> Float[np.ndarray, " B"]:
    """A = (A_R - sum_m lambda_m A_Cm) / (1 + sum_m lambda_m), all of them standardized (ogs.md 2.11).

    Standardizing undoes any unit of the costs, also the division by their limits.

    Args:
        reward: reward advantages.
        cost: cost advantages of each source.
        price: multipliers, >= 0.
        weight: of the reward; 0 trains for low costs only.

    Returns:
        What the policy ascends.
    """
    costs = np.stack([standardize(column) for column in cost.T], axis=1)
    return (weight * standardize(reward) - costs @ price) / (weight + price.sum())
