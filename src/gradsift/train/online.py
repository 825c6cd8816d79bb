"""Online selection: a policy chooses the next rows while the model is in training (OGS, arXiv 2602.06359; details ours).

Every ``updates`` optimizer steps the held-out losses are measured, the policy sees what its last choice brought and
chooses a cluster, whose next rows feed the next steps. Every ``rescore_every`` steps the clusters' statistics are measured
anew at the weights that training has reached. A checkpoint holds the decisions and what was measured, not the policy: on
resume the policy is played through them again, which brings it to where it was, and must decide as it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import nn
from transformers import TrainerCallback

from gradsift.errors import ConfigError
from gradsift.manifest import canonical_json, hash_parts
from gradsift.policy.calibration import Rollout
from gradsift.policy.episodes import NO_ROW, Episodes, Losses, Observation, Table, Terms
from gradsift.policy.play import Policy
from gradsift.seeds import stream
from gradsift.train.held_out import DevLosses, DevSets, measure_dev
from gradsift.train.online_parts import Decision, OnlineConfig, Pace, Refresh, as_features
from gradsift.train.parts import Cost
from gradsift.train.rollout import check_split, split_rows


class _Elsewhere:
    """Dynamics of episodes whose training is done by a trainer."""

    def __init__(self, sources: tuple[str, ...]) -> None:
        self.sources = sources
        self.start: Losses | None = None

    def reset(self, num: int) -> Losses:
        assert self.start is not None
        return self.start

    def step(self, rows: Int[np.ndarray, "E b"]) -> Losses:
        raise AssertionError("the trainer trains")


class OnlineSelection(TrainerCallback):
    """The decisions of one training run; :class:`gradsift.train.online_trainer.OnlineTrainer` asks it for its batches.

    ``episodes.multipliers`` may be set before training, for a policy that was trained to see them.

    Args:
        table: clusters over row numbers.
        ids: N row ids by row number.
        policy: decides; in the state it had before any decision of this run.
        terms: rows per decision, budget and limits.
        dev: held-out rows that reward, cost and observation are measured on.
        config: when is decided and rescored.
        refresh: measures the clusters' statistics anew.

    Raises:
        ConfigError: decisions have fewer rows than steps, or rescoring is half given.
    """

    def __init__(
        self,
        table: Table,
        ids: Sequence[str],
        policy: Policy,
        terms: Terms,
        dev: DevSets,
        config: OnlineConfig | None = None,
        *,
        refresh: Refresh | None = None,
    ) -> None:
        self.ids, self.policy, self.dev, self.refresh = tuple(ids), policy, dev, refresh
        self.config = config or OnlineConfig()
        check_split(self.config.updates, terms.rows_per_decision)
        if (refresh is None) != (self.config.rescore_every == 0):
            raise ConfigError(
                "rescoring takes an interval and something that rescores", where="rescore_every",
                got=self.config.rescore_every, expected="0 without rescoring, at least 1 with it",
            )  # fmt: skip
        if len(self.ids) != len(table.price) or len(set(self.ids)) != len(self.ids):
            raise ValueError("OnlineSelection.ids must be unique, one per row of the table")
        self._table = table
        self._elsewhere = _Elsewhere(tuple(dev.protect))
        self.episodes = Episodes(table, self._elsewhere, terms, stream(self.config.seed, "online/rows"))
        self.decisions: list[Decision] = []
        self.batches: list[tuple[int, ...]] = []
        self.dev_cost, self.rescore_cost = Cost(), Cost()
        self.num_rescored = self.num_dropped = 0
        self.start: DevLosses | None = None
        self.pace = Pace.of(table, terms, self.config.updates)
        self._spent = [0]
        self._open: Decision | None = None
        self._seen: Observation | None = None
        self._done = self._rescored_at = 0
        self._model: nn.Module | None = None

    @property
    def rows(self) -> list[int]:
        """Row numbers of the table that stand in a cluster, rising."""
        return sorted(i for some in self._table.members for i in some)

    @property
    def spent(self) -> int:
        """Rows or trained tokens that were dealt so far."""
        return self._spent[-1]

    def progress(self, step: int) -> int:
        """Say where the learning-rate schedule stands after some steps.

        Args:
            step: optimizer steps taken, at most those that were dealt.

        Returns:
            Full steps that their spending amounts to.
        """
        return self.pace.position(self._spent[step])

    @property
    def over(self) -> bool:
        """Whether nothing is left to decide or to train on."""
        return self._open is None and self._seen is not None and bool(self._seen.done.all())

    # What the trainer calls.

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure where training starts, unless it goes on from a checkpoint."""
        self._model = model
        if self._seen is None:
            self._begin(self._measure())
        if self.over:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See what a decision brought, once its rows are trained on; stop when the budget is used."""
        self._done = state.global_step
        if self._done == len(self.batches):
            self._close()
        if self.over:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy == "steps"

    def batch(self, step: int) -> tuple[int, ...] | None:
        """Give the rows of an optimizer step, deciding when that is due.

        Args:
            step: 0-based; those that were taken may be asked for again.

        Returns:
            Row numbers, or None when training is over.

        Raises:
            ConfigError: a step is asked for before the one before it was taken, so the decision would come too early.
        """
        if step > self._done:
            raise ConfigError(
                "the data loader reads ahead of training, so rows would be chosen before the last ones have taught anything",
                where=f"batch {step}", got=f"{self._done} steps taken", expected="one batch at a time",
                do="use OnlineTrainer: it has no workers and does not let accelerate wrap the loader",
            )  # fmt: skip
        if step == len(self.batches):
            self._close()
            if self.over:
                return None
            self._decide()
        return self.batches[step]

    # The decision process, one half before training and one after it.

    def _begin(self, start: DevLosses) -> None:
        self.start = start
        self._elsewhere.start = start.losses()
        self._seen = self.episodes.reset(0, 1, shuffle=self.config.shuffle)
        self.policy.begin(self.episodes, stream(self.config.seed, "online/policy"))

    def _decide(self) -> Decision:
        assert self._seen is not None
        cluster = np.asarray(self.policy.act(self._seen))
        rows = tuple(int(i) for i in self.episodes.deal(cluster)[0] if i != NO_ROW)
        self._open = Decision(int(cluster[0]), rows)
        for batch in split_rows(rows, self.config.updates, self.episodes.terms.rows_per_decision):
            self.batches.append(batch)
            self._spent.append(self._spent[-1] + int(self._table.price[list(batch)].sum()))
        return self._open

    def _close(self) -> None:
        """Measure what the open decision brought, if there is one."""
        if self._open is None:
            return
        found, features = self._measure(), None
        used = {i for batch in self.batches for i in batch}
        left = [i for i in self.rows if i not in used]
        affordable = left and self._table.price[left].min() <= self.episodes.terms.budget - self.spent
        due = self._done - self._rescored_at >= self.config.rescore_every
        if self.refresh is not None and due and affordable:
            fresh = self.refresh(self._model, self.episodes.table, left)  # type: ignore[arg-type]
            self.rescore_cost += fresh.cost
            self.num_dropped += fresh.num_dropped
            features = as_features(fresh.features.tolist())
        self._settle(replace(self._open, target=found.target, protect=found.protect, features=features))

    def _settle(self, decision: Decision) -> None:
        if decision.features is not None:
            self.episodes.refresh(np.array(decision.features, dtype=np.float64).reshape(self._table.features.shape))
            self.num_rescored, self._rescored_at = self.num_rescored + 1, len(self.batches)
        step = self.episodes.settle(DevLosses(decision.target, decision.protect, Cost()).losses())
        self.policy.learn(np.array([decision.cluster]), step)
        self._seen, self._open = step.observation, None
        self.decisions.append(decision)

    def _measure(self) -> DevLosses:
        assert self._model is not None
        found = measure_dev(self._model, self.dev)
        self.dev_cost += found.cost
        return found

    # What a checkpoint holds, and what comes out of a run.

    def key(self) -> str:
        """Hash what decides the choices, beside the model and the rows.

        Returns:
            32 hex digits.
        """
        table, terms = self._table, self.episodes.terms
        parts = [
            [list(some) for some in table.members], table.price.tolist(), table.features.tolist(),
            list(table.feature_names), table.general.tolist(), list(self.ids),
            [terms.rows_per_decision, terms.budget, terms.limits.tolist()], self.episodes.multipliers.tolist(),
            self.policy.name, asdict(self.config), self.dev.hashes(),
        ]  # fmt: skip
        return hash_parts(canonical_json(part).encode("ascii") for part in parts)

    def state(self) -> dict[str, Any]:
        """Give what a resumed run needs.

        Returns:
            JSON values.
        """
        assert self.start is not None
        return {
            "steps": self._done,
            "start": {"target": self.start.target, "protect": list(self.start.protect)},
            "decisions": [asdict(one) for one in self.decisions],
            "open": None if self._open is None else {"cluster": self._open.cluster, "rows": list(self._open.rows)},
            "dev_cost": asdict(self.dev_cost),
            "rescore_cost": asdict(self.rescore_cost),
            "num_dropped": self.num_dropped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Play the decisions of a stopped run again, with what was measured then.

        Args:
            state: from :meth:`state`.

        Raises:
            ConfigError: the policy decides otherwise.
        """
        self._begin(DevLosses(state["start"]["target"], tuple(state["start"]["protect"]), Cost()))
        pending: list[dict[str, Any]] = [] if state["open"] is None else [state["open"]]
        for number, kept in enumerate([*state["decisions"], *pending]):
            now = self._decide()
            if (now.cluster, list(now.rows)) != (kept["cluster"], list(kept["rows"])):
                raise ConfigError(
                    "the policy decides otherwise than in the run that was stopped", where=f"decision {number}",
                    got=f"cluster {now.cluster}", expected=f"cluster {kept['cluster']}",
                    do="resume with the same policy and settings, or use another --out",
                )  # fmt: skip
            if number < len(state["decisions"]):
                self._settle(
                    replace(
                        now,
                        target=kept["target"],
                        protect=tuple(kept["protect"]),
                        features=as_features(kept["features"]),
                    )
                )
        self._done = state["steps"]
        self.dev_cost, self.rescore_cost = Cost(**state["dev_cost"]), Cost(**state["rescore_cost"])
        self.num_dropped = state["num_dropped"]

    def rollout(self) -> Rollout:
        """Give the losses of the run, as a roll-out that a simulator can be judged on.

        Returns:
            Rows and losses of the decisions that were trained on to their end; at least one.
        """
        assert self.start is not None
        width = self.episodes.terms.rows_per_decision
        rows = np.array([[*one.rows, *[NO_ROW] * (width - len(one.rows))] for one in self.decisions], dtype=np.int64)
        seen = [self.start, *self.decisions]
        protect = np.array([one.protect for one in seen], dtype=np.float64).reshape(len(seen), -1)
        return Rollout(self.policy.name, rows, np.array([one.target for one in seen]), protect)
