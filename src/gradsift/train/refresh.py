"""Statistics of the clusters, rescored at the weights that training has reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from gradsift.geometry.cluster import Clusters
from gradsift.policy.episodes import Table
from gradsift.policy.statistics import describe_clusters
from gradsift.seeds import stream
from gradsift.train.online_parts import Refreshed
from gradsift.train.rescore import RescoreConfig, rescore
from gradsift.types import TokenRow

# The size of a cluster is that of its start; how much of it is used is seen beside it.
STAYS = ("log_size", "is_general")


@dataclass(frozen=True)
class Rescorer:
    """Measures the rows that are left, and describes their clusters as ``policy.statistics`` does.

    Args:
        pool: rows by their number.
        anchors: rows of each protected source, in the order of the table's statistics.
        target: rows of what is to be learned.
        config: what is measured; sketches always are.
        pad_id: padding token.
        copy_of: row id -> id of its first exact copy.
        tau: cosines below -tau count as conflicting.
        navigator: measured in place of the model in training; None measures the model in training.
    """

    pool: Sequence[TokenRow]
    anchors: Mapping[str, Sequence[TokenRow]]
    target: Sequence[TokenRow]
    config: RescoreConfig
    pad_id: int
    copy_of: Mapping[str, str] | None = None
    tau: float = 0.0
    navigator: nn.Module | None = None

    def __call__(self, model: nn.Module, table: Table, left: Sequence[int]) -> Refreshed:
        """Measure statistics.

        Args:
            model: in training; left as it was.
            table: clusters with the statistics so far.
            left: row numbers that may still be trained on; at least one.

        Returns:
            Statistics of the clusters' remaining rows; a cluster without a row to measure keeps those it had.
        """
        scored = rescore(
            model if self.navigator is None else self.navigator, [self.pool[i] for i in left], self.anchors,
            self.target, replace(self.config, keep_sketch=True), pad_id=self.pad_id, copy_of=self.copy_of,
        )  # fmt: skip
        problem, features = scored.problem, table.features.copy()
        if problem.size:
            owner = {self.pool[i].id: k for k, some in enumerate(table.members) for i in some}
            of = np.array([owner[i] for i in problem.ids])
            present, labels, sizes = np.unique(of, return_inverse=True, return_counts=True)
            groups = Clusters(labels, np.zeros((len(present), 1), dtype=np.float32), sizes.astype(np.int64))
            order = stream(self.config.seed, "online/refresh")  # of members, which are not looked at
            fresh = describe_clusters(problem, groups, table.general[of], order, tau=self.tau)
            if fresh.feature_names != table.feature_names:
                raise ValueError(f"statistics {fresh.feature_names} do not fit the table's {table.feature_names}")
            moves = np.array([name not in STAYS for name in table.feature_names])
            features[np.ix_(present, moves)] = fresh.features[:, moves]
        return Refreshed(features, scored.cost, len(scored.dropped))
