"""A proxy run on a model: mean gradients of domains and tasks, a reference, real probe steps, training by a mixture (ours).

The bench of :func:`gradsift.geometry.trajectory.play`: one optimizer state and one learning-rate schedule from the first
round to the last. Gradients are exact, of the trained weights and of the trainer's own loss (token mean), by ordinary
backward passes without dropout; their Gram matrix is summed in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradsift.geometry.reweight import token_excess
from gradsift.geometry.round_record import plain, read_round
from gradsift.geometry.trajectory import Domains, Feedback, Plan, Round
from gradsift.seeds import Stream
from gradsift.train.loop import Loop, schedule_factor
from gradsift.train.masking import measure_nats
from gradsift.train.parts import Cost
from gradsift.train.proxy_measure import Leaves, domain_gradient, gram_of, leave, return_to, second_moment, token_mean
from gradsift.train.proxy_rows import ProxyConfig, ProxyRows, Reference, deal, round_rows, updates
from gradsift.train.rollout import split_rows
from gradsift.types import TokenRow


@runtime_checkable
class Keeper(Protocol):
    """Where finished rounds and the model after the last of them are kept."""

    def read(self, name: str) -> dict[str, Any] | None:
        """Give a record back, or None."""
        ...

    def write(self, name: str, value: dict[str, Any], after: tuple[int, Loop] | None) -> None:
        """Keep a record, and the loop as it stands after round number ``after``."""
        ...

    def load(self, at: int, loop: Loop) -> None:
        """Bring weights and moments as they were after round ``at`` into the loop."""
        ...


class ModelBench:
    """:class:`gradsift.geometry.trajectory.Bench` on a model.

    Args:
        make: gives the loop at the starting weights; called once, and only when something is left to do.
        rows: pool and tasks.
        config: of the training.
        plan: of the run.
        domains: the pool in domains.
        stream: of the draws.
        reference: token losses under the reference, for ``excess``.
        keep: where finished rounds are kept; None for nowhere.
        tick: called often; raises to stop.
    """

    def __init__(
        self,
        make: Callable[[], Loop],
        rows: ProxyRows,
        config: ProxyConfig,
        plan: Plan,
        domains: Domains,
        stream: Stream,
        *,
        reference: Reference | None = None,
        keep: Keeper | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._make, self.rows, self.config, self.plan, self.domains, self.stream = (
            make, rows, config, plan, domains, stream,
        )  # fmt: skip
        self.reference, self.keep, self.tick = reference, keep, tick
        self.cost: dict[str, Cost] = {"train": Cost(), "probe": Cost()}
        self._used = np.zeros(len(domains.names), dtype=np.int64)
        self._losses: list[float] = []
        self._at: int | None = None  # rounds that the model in the loop has behind it
        self._gradients: list[Leaves] = []
        self._domain_losses = np.zeros(len(domains.names))
        self._before = dict(self.cost)

    @cached_property
    def loop(self) -> Loop:
        """The model in training."""
        return self._make()

    def read(self, at: int) -> Round | None:
        """Give a finished round back."""
        kept = None if self.keep is None else self.keep.read(f"round-{at:04d}")
        if kept is None:
            return None
        done = read_round(kept["round"])
        self._used = self._used + done.counts
        self._losses += kept["losses"]
        for part, cost in kept["cost"].items():
            self.cost[part] += Cost(**cost)
        return done

    def probe(self, at: int, weights: Float[np.ndarray, " k"]) -> Feedback:
        """Measure before the training of a round; the weights play no part in it."""
        self._enter(at)
        self._before, started = dict(self.cost), time.perf_counter()
        some = [
            [self.rows.pool[i] for i in line]
            for line in round_rows(self.rows, self.plan, self.domains, self.stream, at)
        ]
        measures = self.plan.measures
        losses, extra = self._gradient_part(at, some) if "gram" in measures else self._excess_part(some)
        tasks = self._task_losses() if self.domains.tasks else None
        tests = self.plan.test_every and at % self.plan.test_every == 0 and tasks is not None
        drops = self._drops(some, tasks) if tests and tasks is not None else None
        self._clock(self._before["probe"], started)
        lr = self.config.lr * schedule_factor(self.loop.config, len(self.loop.losses))
        return Feedback(lr, losses, np.ones(len(some), dtype=bool), task_losses=tasks, drops=drops, **extra)

    def train(
        self,
        at: int,
        weights: Float[np.ndarray, " k"],
        before: Float[np.ndarray, " k"],
        counts: Int[np.ndarray, " k"] | None,
    ) -> None:
        """Train a round."""
        self._enter(at)
        spent = self.loop.cost
        if self.plan.training == "combined":
            self._combined_step(weights)
        elif counts is None:
            lines = round_rows(self.rows, self.plan, self.domains, self.stream, at)
            share = np.array([len(line) for line in lines]) / sum(len(line) for line in lines)
            per_row = [float(before[d] / share[d]) for d, line in enumerate(lines) for _ in line]
            self.loop.step([self.rows.pool[i] for line in lines for i in line], per_row)
        else:
            for part in split_rows(self._sample(at, counts), updates(self.config, self.plan), self.plan.rows_per_round):
                self.loop.step([self.rows.pool[i] for i in part])
                self.tick()
        self._at, self._gradients = at + 1, []
        self.cost["train"] += _since(spent, self.loop.cost)
        self.tick()

    def write(self, at: int, done: Round) -> None:
        """Keep a finished round."""
        self._used = self._used + done.counts
        new = self.loop.losses[len(self._losses) :]
        self._losses += new
        self._at = at + 1
        if self.keep is not None:
            cost = {part: asdict(_since(self._before[part], spent)) for part, spent in self.cost.items()}
            self.keep.write(f"round-{at:04d}", {"round": plain(done), "losses": new, "cost": cost}, (at, self.loop))

    def finish(self, num_rounds: int) -> Float[np.ndarray, " m"]:
        """Measure the tasks after the last round."""
        kept = None if self.keep is None else self.keep.read("end")
        if kept is None:
            self._enter(num_rounds)
            before, started = self.cost["probe"], time.perf_counter()
            losses = self._task_losses()
            self._clock(before, started)
            kept = {"task_losses": losses.tolist(), "cost": asdict(_since(before, self.cost["probe"]))}
            if self.keep is not None:
                self.keep.write("end", kept, None)
        else:
            self.cost["probe"] += Cost(**kept["cost"])
        return np.array(kept["task_losses"], dtype=np.float64)

    def _clock(self, before: Cost, started: float) -> None:
        """Let wall time stand for the seconds of what was measured since."""
        seconds = before.seconds + time.perf_counter() - started
        self.cost["probe"] = replace(self.cost["probe"], seconds=seconds)

    def _enter(self, at: int) -> None:
        """Have the model in the loop as it is before round ``at``."""
        if self._at is None and at:
            assert self.keep is not None, "rounds are read back from somewhere"
            self.keep.load(at - 1, self.loop)
            self.loop.losses = list(self._losses)
            self._at = at
        self._at = 0 if self._at is None else self._at
        assert self._at == at, "rounds come in order"

    def _sample(self, at: int, counts: Int[np.ndarray, " k"]) -> list[int]:
        """Rows of a sampled round in a keyed order, each domain going on where it stopped."""
        out: list[int] = []
        for d, name in enumerate(self.domains.names):
            mine = np.flatnonzero(self.domains.of_row == d)
            ids = [self.rows.pool[i].id for i in mine]
            dealt = deal(ids, int(self._used[d]), int(counts[d]), self.stream.child(f"train/{name}"))
            out += [int(mine[i]) for i in dealt]
        draws = self.stream.child(f"order/{at}").uniform([self.rows.pool[i].id for i in out])
        return [out[i] for i in np.argsort(draws, kind="stable")]

    def _gradient_part(self, at: int, some: Sequence[Sequence[TokenRow]]) -> tuple[np.ndarray, dict[str, Any]]:
        """Mean gradients of domains and tasks; the domains' are kept for a combined step."""
        found = [self._gradient(name, rows) for name, rows in zip(self.domains.names, some, strict=True)]
        losses = np.array([loss for _, loss in found])
        tasks = [self._gradient(task, self._task_rows(task, at))[0] for task in self.domains.tasks]
        leaves = [one for one, _ in found]
        extra: dict[str, Any] = {"gram": gram_of([*leaves, *tasks])}
        if "fisher" in self.plan.measures and (v := second_moment(self.loop)) is not None:
            extra["fisher"] = gram_of([*leaves, *tasks], v)
        if self.plan.training == "combined":
            self._gradients, self._domain_losses = leaves, losses
        return losses, extra

    def _gradient(self, name: str, rows: Sequence[TokenRow]) -> tuple[Leaves, float]:
        leaves, loss, cost = domain_gradient(self.loop, rows, clip=self.plan.clip, name=name)
        self.cost["probe"] += cost
        self.tick()
        return leaves, loss

    def _task_rows(self, task: str, at: int) -> list[TokenRow]:
        rows = sorted(self.rows.probes[task], key=lambda row: row.id)
        count = min(len(rows), self.plan.rows_per_domain)
        dealt = deal([row.id for row in rows], at * count, count, self.stream.child(f"task/{task}"))
        return [rows[i] for i in dealt]

    def _excess_part(self, some: Sequence[Sequence[TokenRow]]) -> tuple[np.ndarray, dict[str, Any]]:
        """Token losses above the reference."""
        assert self.reference is not None, "excess is measured against a reference"
        losses, pairs = [], []
        for rows in some:
            got = measure_nats(self.loop.model, rows, self.rows.pad_id, self.config.tokens_per_batch)
            self.cost["probe"] += got.cost
            mine = np.concatenate([got.nats[row.id][row.trained[1:]] for row in rows])
            theirs = np.concatenate([self.reference.nats[row.id][row.trained[1:]] for row in rows])
            losses.append(float(mine.mean(dtype=np.float64)))
            pairs.append(token_excess(mine, theirs))
            self.tick()
        excess, positive = (np.array(column) for column in zip(*pairs, strict=True))
        return np.array(losses), {"excess": excess, "positive": positive}

    def _task_losses(self) -> Float[np.ndarray, " m"]:
        out = []
        for task in self.domains.tasks:
            loss, cost = token_mean(
                self.loop.model, self.rows.held[task], self.rows.pad_id, self.config.tokens_per_batch
            )
            self.cost["probe"] += cost
            out.append(loss)
            self.tick()
        return np.array(out)

    def _drops(self, some: Sequence[Sequence[TokenRow]], before: Float[np.ndarray, " m"]) -> Float[np.ndarray, "k m"]:
        """Take one real step on each domain from here, measure, and come back."""
        place, out = leave(self.loop), []
        for rows in some:
            spent = self.loop.cost
            self.loop.step(rows)
            self.cost["probe"] += _since(spent, self.loop.cost)
            out.append(before - self._task_losses())
            return_to(self.loop, place)
        return np.stack(out)

    def _combined_step(self, weights: Float[np.ndarray, " k"]) -> None:
        """One optimizer step along sum_j a_j g_j of gradients that are there already."""
        loop, at = self.loop, len(self.loop.losses)
        for i, p in enumerate(loop.parameters):
            p.grad = _mix([one[i] for one in self._gradients], weights).to(p.dtype)
        for group in loop.optimizer.param_groups:
            group["lr"] = loop.config.lr * schedule_factor(loop.config, at)
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
        loop.losses.append(float(weights @ self._domain_losses))


def _mix(parts: Sequence[Tensor], weights: Float[np.ndarray, " k"]) -> Tensor:
    out = torch.zeros_like(parts[0], dtype=torch.float32)
    for part, weight in zip(parts, weights, strict=True):
        out += float(weight) * part
    return out


def _since(before: Cost, after: Cost) -> Cost:
    return Cost(*(b - a for a, b in zip(asdict(before).values(), asdict(after).values(), strict=True)))
