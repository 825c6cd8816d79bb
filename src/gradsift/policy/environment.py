"""The constrained decision process as a Gymnasium environment, one episode at a time (needs the extra ``rl``).

Conventions: the reward is one number, the costs stand in ``info["cost"]`` as a vector with one entry per protected
source, and ``info["action_mask"]`` says in ``Discrete.sample(mask=...)``'s form what may be chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gradsift.errors import ConfigError, DependencyError
from gradsift.policy.episodes import NO_ROW, Episodes, Observation

try:
    import gymnasium
    from gymnasium import spaces
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "gymnasium":
        raise
    raise DependencyError(
        "gymnasium is not installed", where="gradsift.policy.environment", do="pip install 'gradsift[rl]'"
    ) from None

Seen = dict[str, Any]


class SelectionEnv(gymnasium.Env[Seen, np.int64]):
    """One episode of :class:`Episodes` behind Gymnasium's interface.

    Observation: ``clusters`` float64 [K, F+1], ``common`` float64 [G], ``mask`` int8 [K]. Action: a cluster's number.
    Info: ``cost`` float64 [M] (zeros after ``reset``), ``action_mask`` int8 [K], ``rows`` int64, the rows just trained
    on, ``episode`` the episode's number. An episode terminates when no cluster is left within the budget and is never
    truncated.

    Args:
        episodes: the process; nobody else may play it meanwhile.
        shuffle: whether the order of rows is drawn per episode.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium declares it so

    def __init__(self, episodes: Episodes, *, shuffle: bool = True) -> None:
        self.episodes, self.shuffle, self._next = episodes, shuffle, 0
        table, num_sources = episodes.table, len(episodes.terms.limits)
        wide, columns = np.inf, len(table.feature_names) + 1
        self.action_space = spaces.Discrete(table.num_clusters)
        self.observation_space = spaces.Dict(
            {
                "clusters": spaces.Box(-wide, wide, (table.num_clusters, columns), np.float64),
                # the change of a loss has no bound
                "common": spaces.Box(-wide, wide, (2 + 2 * num_sources,), np.float64),
                "mask": spaces.MultiBinary(table.num_clusters),
            }
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Seen, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: number of the episode; the one after the last when None, 0 at first.
            options: not read; Gymnasium's interface has it.

        Returns:
            The observation and the info.
        """
        super().reset(seed=seed)
        number = self._next if seed is None else seed
        self._next = number + 1
        self._seen = self.episodes.reset(number, 1, shuffle=self.shuffle)
        nothing = np.zeros(0, dtype=np.int64)
        return _view(self._seen), self._info(np.zeros(len(self.episodes.terms.limits)), nothing)

    def step(self, action: np.int64 | int) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """Train on the next rows of a cluster.

        Args:
            action: its number.

        Returns:
            Observation, reward in nats, terminated, truncated (never), info.

        Raises:
            ConfigError: the action mask forbids this cluster.
        """
        if not self._seen.mask[0, action]:
            raise ConfigError(
                "the cluster may not be chosen: it has no row left that fits the budget, or the episode is over",
                where="SelectionEnv.step",
                got=int(action),
                expected=f"one of {np.flatnonzero(self._seen.mask[0]).tolist()}",
                do="choose by info['action_mask'], and call reset when an episode has terminated",
            )
        step = self.episodes.step(np.array([action], dtype=np.int64))
        self._seen = step.observation
        rows = step.rows[0][step.rows[0] != NO_ROW]
        return _view(self._seen), float(step.reward[0]), bool(self._seen.done[0]), False, self._info(step.cost[0], rows)

    def _info(self, cost: Float[np.ndarray, " M"], rows: Int[np.ndarray, " b"]) -> dict[str, Any]:
        mask = self._seen.mask[0].astype(np.int8)
        return {"cost": cost.copy(), "action_mask": mask, "rows": rows, "episode": int(self.episodes.numbers[0])}


def _view(seen: Observation) -> Seen:
    """Copies, because the caller keeps what it is given."""
    return {
        "clusters": seen.clusters[0].astype(np.float64),
        "common": seen.common[0].astype(np.float64),
        "mask": seen.mask[0].astype(np.int8),
    }
