"""The navigator as a proxy of a mixture method: trained in rounds from the weights that measured the pool (stage ``proxy``).

Every finished round stands in the run folder with the weights and moments after it, so that a stopped run goes on with the
round it was in; of the weights only the last are kept.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.data.token_rows import content_of
from gradsift.geometry.round_record import plain
from gradsift.geometry.trajectory import Domains, Plan, Rule, Trajectory, play
from gradsift.manifest import canonical_json, hash_parts, make_folder, write_bytes_atomic
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.progress import Clock
from gradsift.pipeline.proxy_check import cost_notes, split_tasks
from gradsift.pipeline.trainable import trainable_navigator
from gradsift.seeds import Stream, stream
from gradsift.store.records import RecordStore
from gradsift.train.loop import Loop
from gradsift.train.moments import load_moments, put_moments, read_moments, save_moments
from gradsift.train.parts import Cost, trainable
from gradsift.train.proxy import ModelBench
from gradsift.train.proxy_rows import ProxyConfig, ProxyRows, Reference, make_loop, train_reference
from gradsift.types import Note, TokenRow

VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """:class:`gradsift.train.proxy.Keeper` in a folder.

    Args:
        records: of the finished rounds.
    """

    records: RecordStore

    def read(self, name: str) -> dict[str, Any] | None:
        """Give a record back, or None.

        Args:
            name: of the record.

        Returns:
            What was written.
        """
        return self.records.read(name)

    def write(self, name: str, value: dict[str, Any], after: tuple[int, Loop] | None) -> None:
        """Keep the model, then the record, then let the model of the round before go.

        Args:
            name: of the record.
            value: JSON values.
            after: the round and the loop as it stands after it, or None.
        """
        from safetensors.torch import save

        if after is not None:
            at, loop = after
            make_folder(self.records.folder)
            tensors = {key: p.detach().cpu().contiguous() for key, p in trainable(loop.model)}
            write_bytes_atomic(self._weights(at), save(tensors))
            save_moments(read_moments(loop.model, loop.optimizer), self._moments(at))
        self.records.write(name, value)
        if after is not None and after[0]:
            self._weights(after[0] - 1).unlink(missing_ok=True)
            self._moments(after[0] - 1).unlink(missing_ok=True)

    def load(self, at: int, loop: Loop) -> None:
        """Bring weights and moments as they were after a round into a loop.

        Args:
            at: the round.
            loop: a fresh one over the same parameters.
        """
        import torch
        from safetensors.torch import load_file

        kept = load_file(self._weights(at))
        with torch.no_grad():
            for name, p in trainable(loop.model):
                p.copy_(kept[name])
        put_moments(loop.model, loop.optimizer, load_moments(self._moments(at)))

    def _weights(self, at: int) -> Path:
        return self.records.folder / f"after-{at:04d}.safetensors"

    def _moments(self, at: int) -> Path:
        return self.records.folder / f"after-{at:04d}.moments.safetensors"


class NavigatorProxy:
    """:class:`gradsift.geometry.trajectory.Proxy` of a run.

    Args:
        prepared: the run's inputs.
        measured: the pass over the pool.
        rows: the eligible rows in id order.
        out: the run folder.
        clock: timing and progress.
    """

    def __init__(
        self, prepared: Prepared, measured: Measurement, rows: Sequence[TokenRow], out: Path, clock: Clock
    ) -> None:
        self.prepared, self.measured, self.rows, self.out, self.clock = prepared, measured, tuple(rows), out, clock
        self.costs: dict[str, dict[str, Cost]] = {}
        self.num_rounds: dict[str, int] = {}
        self.folders: dict[str, str] = {}
        self.sampled: list[str] = []

    @property
    def tasks(self) -> tuple[str, ...]:
        """The target and every anchor."""
        anchors = tuple(source.name for source in self.prepared.anchors)
        return anchors if self.prepared.target is None else ("target", *anchors)

    @property
    def config(self) -> ProxyConfig:
        """How the navigator is trained."""
        recipe = self.prepared.recipe
        given = recipe.proxy
        return ProxyConfig(
            given.lr, given.batch_size, given.schedule, recipe.collect.tokens_per_batch, seed=recipe.seed
        )

    @cached_property
    def _model(self) -> Any:
        return trainable_navigator(self.prepared, self.measured, (self.out, self.clock))

    @cached_property
    def _start(self) -> dict[str, Any]:
        return {name: p.detach().clone() for name, p in trainable(self._model)}

    def _fresh(self, plan: Plan, domains: Domains) -> Loop:
        """The navigator at its starting weights, in a loop of its own."""
        import torch

        with torch.no_grad():
            for name, p in trainable(self._model):
                p.copy_(self._start[name])
        loop = make_loop(self._model, self.config, plan, self.prepared.pad_id)
        if "gram" in plan.measures:
            size, count = (
                sum(p.numel() * p.element_size() for p in loop.parameters),
                len(domains.names) + len(domains.tasks),
            )
            self.clock.progress.say(f"a round keeps {count} gradients of {size / 1e6:.1f} MB each")
        return loop

    def run(self, rule: Rule, plan: Plan, domains: Domains, name: str) -> Trajectory:
        """Train a fresh copy of the navigator, steered by a rule, or read its rounds back.

        Args:
            rule: whose weights it follows.
            plan: rounds and rows.
            domains: the eligible rows by domain.
            name: of the run.

        Returns:
            All rounds.
        """
        draws = stream(self.prepared.recipe.seed, "proxy")
        probes, held = split_tasks(self.prepared, domains.tasks)
        rows = ProxyRows(self.rows, probes, held, self.prepared.pad_id)
        fields = self._fields(rows, plan, domains)
        with self.clock.stage("proxy", told=False):
            reference = self._reference(rows, plan, domains, fields, draws) if "excess" in plan.measures else None
            keep = RunFolder(RecordStore.of(self.out / "proxy", {**fields, "rule": [name, plain(rule)]}, "proxy round"))
            self.folders[name] = f"proxy/{keep.records.folder.name}"
            bench = _Telling(self, name, lambda: self._fresh(plan, domains), rows, self.config, plan, domains, draws,
                             reference=reference, keep=keep, tick=self._tick)  # fmt: skip
            done = play(rule, plan, domains, bench)
        self.costs[name] = dict(bench.cost)
        self.num_rounds[name] = len(done.rounds)
        self.sampled += [name] if plan.training == "sampled" else []
        return done

    def _tick(self) -> None:
        self.clock.progress.advance(0, 0)  # the stage is not announced, so this is where a stop signal is noticed

    def _fields(self, rows: ProxyRows, plan: Plan, domains: Domains) -> dict[str, Any]:
        """Everything that a round depends on but the rule."""
        recipe = self.prepared.recipe

        def content(some: Sequence[TokenRow]) -> str:
            parts = [f"{row.id}\x1f{content_of(row)}".encode() for row in some]
            return hash_parts(parts, digest_size=16)

        navigator = recipe.navigator.model_dump(mode="json", exclude={"device"})
        return {
            "version": VERSION,
            "spec": self.measured.spec.key,
            "navigator": canonical_json(navigator),
            "config": asdict(self.config),
            "plan": plain(plan),
            "domains": list(domains.names),
            "of_row": hash_parts([domains.of_row.astype("<i8").tobytes()], digest_size=16),
            "pool": content(rows.pool),
            "probes": {task: content(some) for task, some in rows.probes.items()},
            "held": {task: content(some) for task, some in rows.held.items()},
        }

    def _reference(
        self, rows: ProxyRows, plan: Plan, domains: Domains, fields: dict[str, Any], draws: Stream
    ) -> Reference:
        """Train the reference, or read its token losses back."""
        folder = RecordStore.of(self.out / "proxy", {**fields, "rule": "reference"}, "reference").folder
        path = folder / "reference.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as kept:
                ids, ends = kept["ids"].tolist(), np.cumsum(kept["lengths"])[:-1]
                nats = dict(zip(ids, np.split(kept["nats"], ends), strict=True))
                flops, forward, backward, seconds = kept["cost"].tolist()
            found = Reference(nats, Cost(flops, int(forward), int(backward), seconds))
        else:
            self.clock.progress.say("training the reference of the proxy run")
            found = train_reference(self._fresh(plan, domains), rows, plan, domains, draws, self._tick)
            self._count(found.cost)
            make_folder(folder)
            buffer, ids = io.BytesIO(), sorted(found.nats)
            np.savez(
                buffer, ids=np.array(ids), lengths=np.array([len(found.nats[i]) for i in ids]),
                nats=np.concatenate([found.nats[i] for i in ids]), cost=np.array([*asdict(found.cost).values()]),
            )  # fmt: skip
            write_bytes_atomic(path, buffer.getvalue())
        self.costs["reference"] = {"train": found.cost}
        return found

    def _count(self, cost: Cost) -> None:
        self.clock.tokens["proxy"] = self.clock.tokens.get("proxy", 0) + cost.forward_tokens

    def notes(self, chosen: Collection[str]) -> list[Note]:
        """Say what the proxy runs took beside an epoch on the chosen rows.

        Args:
            chosen: ids.

        Returns:
            Remarks.
        """
        some = set(chosen)
        return cost_notes(self.costs, self.sampled, sum(row.num_tokens for row in self.rows if row.id in some))

    def summary(self) -> dict[str, Any]:
        """What the proxy runs took, rounds that were read back included.

        Returns:
            The manifest's ``proxy`` section.
        """
        total = sum((cost for parts in self.costs.values() for cost in parts.values()), Cost())
        return {
            "folders": self.folders,
            "num_rounds": self.num_rounds,
            "tokens": total.forward_tokens,
            "flops": total.flops,
            "seconds": total.seconds,
            "runs": {name: {part: asdict(cost) for part, cost in parts.items()} for name, parts in self.costs.items()},
        }


class _Telling(ModelBench):
    """A bench that tells of every round it finishes and counts its tokens."""

    def __init__(self, proxy: NavigatorProxy, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._proxy, self._name = proxy, name

    def write(self, at: int, done: Any) -> None:
        """Keep a finished round and say what the weights are."""
        self._count_since(self._before)
        super().write(at, done)
        pairs = zip(self.domains.names, done.state.weights, strict=True)
        told = ", ".join(f"{name} {weight:.3f}" for name, weight in sorted(pairs, key=lambda one: -one[1])[:6])
        self._proxy.clock.progress.say(f"{self._name}, round {at + 1} of {self.plan.num_rounds}: {told}")

    def finish(self, num_rounds: int) -> Any:
        """Measure the tasks after the last round, or read their losses back."""
        known = self.keep is not None and self.keep.read("end") is not None
        before = dict(self.cost)
        losses = super().finish(num_rounds)
        if not known:
            self._count_since(before)
        return losses

    def _count_since(self, before: dict[str, Cost]) -> None:
        spent = [sum(costs.values(), Cost()).forward_tokens for costs in (before, self.cost)]
        self._proxy._count(Cost(forward_tokens=spent[1] - spent[0]))
