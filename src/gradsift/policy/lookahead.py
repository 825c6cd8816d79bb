"""What each cluster would do from where the simulated learners stand, by trying it (ours): for plans made again and again."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from gradsift.policy.episodes import Losses
from gradsift.policy.plan import Effects
from gradsift.policy.simulator import Simulator, batch_of, move, parts

MAX_BATCHES = 8


class Lookahead:
    """A :class:`~gradsift.policy.planned.Linearization` from a simulator, which is copied and not moved.

    Args:
        simulator: imitates the learner; its bound on the number of steps holds here too.
        rows_per_decision: rows of a batch. Batches are tried rather than means of whole clusters, because the length of
            a normalized step depends on how much of the gradient a batch averages away.
    """

    def __init__(self, simulator: Simulator, rows_per_decision: int) -> None:
        self._copy = Simulator(
            simulator.coordinates, simulator.coefficients, simulator.start, simulator.curvature, simulator.max_steps
        )
        self.sources, self.rows_per_decision = simulator.sources, rows_per_decision

    def reset(self, num: int) -> Losses:
        """Put the copies to the starting weights.

        Args:
            num: E.

        Returns:
            The losses there.
        """
        return self._copy.reset(num)

    def step(self, rows: Int[np.ndarray, "E b"]) -> Losses:
        """Follow the learners.

        Args:
            rows: what they were trained on.

        Returns:
            The simulated losses.
        """
        return self._copy.step(rows)

    def effects(self, members: tuple[tuple[int, ...], ...]) -> Effects:
        """Try up to 8 batches of each cluster and take the mean of what they do.

        Args:
            members: K clusters as row numbers.

        Returns:
            [E, K] gains and [E, K, M] harms, nats per decision.
        """
        falls = np.stack([self._fall(np.array(some, dtype=np.int64)) for some in members], axis=1)
        return Effects(falls[:, :, -1], -falls[:, :, :-1])

    def _fall(self, rows: Int[np.ndarray, " n"]) -> np.ndarray:
        """Mean fall of every loss over batches of a cluster, float64 [E, A], the target's last."""
        copy, width = self._copy, min(self.rows_per_decision, len(rows))
        starts = np.arange(0, len(rows) - width + 1, width)[:MAX_BATCHES]
        kappa = np.array(copy.coefficients.losses)
        before, after = parts(copy.state.delta, copy.coordinates, copy.curvature), []
        for start in starts:
            same = np.tile(rows[start : start + width], (len(copy.state.delta), 1))
            batch = batch_of(copy.coordinates, same, copy.curvature)
            delta = move(copy.state, batch, copy.coefficients, copy.curvature).delta
            after.append(parts(delta, copy.coordinates, copy.curvature))
        linear = before[0] - np.mean([one[0] for one in after], axis=0)
        return linear + kappa * (before[1] - np.mean([one[1] for one in after], axis=0))
