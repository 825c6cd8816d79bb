"""The stage ``probe``: short trainings of the navigator, and the loss of every row under those that did not learn it.

Every probe is written on its own, so a stopped run loses at most one; a repeated run reads them back. Rows of equal tokens
and mask are in one fold and share one loss, whatever their ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gradsift.data.token_rows import content_of
from gradsift.errors import NumericsError
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.hooks import GradientEngine
from gradsift.manifest import make_folder
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared
from gradsift.pipeline.probe_design import Design, design_probes
from gradsift.pipeline.probe_store import ProbeStore
from gradsift.pipeline.progress import Clock
from gradsift.pipeline.trainable import trainable_navigator
from gradsift.train.crossfit import ProbePlan
from gradsift.train.probe import ProbeRun, row_losses, train_probe
from gradsift.types import Note, TokenRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

VERSION = "probe-1"


@dataclass(frozen=True)
class Probed:
    """What the probes found.

    Args:
        held_out: id of a group -> mean loss under the probes that did not learn it, nats per trained token.
        anchor_loss: float64 [n_a] starting loss of every anchor row, anchors in their order, rows in id order.
        summary: the manifest's ``probes`` section.
        notes: remarks.
    """

    held_out: Mapping[str, float]
    anchor_loss: Float[np.ndarray, " n_a"]
    summary: Mapping[str, Any]
    notes: tuple[Note, ...]


def probe(prepared: Prepared, measured: Measurement, rows: Sequence[TokenRow], out: Path, clock: Clock) -> Probed:
    """Train the probes that are missing and read the others back.

    Args:
        prepared: the run's inputs; the method needs probes.
        measured: the pass over the pool.
        rows: the eligible rows in id order.
        out: the run folder.
        clock: timing and progress.

    Returns:
        Losses of rows and anchor rows.
    """
    design = design_probes(prepared, rows)
    store = ProbeStore.of(out / "probes", _fields(prepared, measured, design))
    make_folder(store.folder)
    anchors = _anchor_loss(prepared, measured, store, clock)
    judges = [design.judges(plan) for plan in design.plans]
    losses = [store.read(_name(p), len(some)) for p, some in zip(design.plans, judges, strict=True)]
    missing = [k for k, one in enumerate(losses) if one is None]
    total = sum(sum(design.tokens(design.plans[k])) for k in missing)
    if missing:
        if len(missing) < len(losses):
            clock.progress.say(f"resuming: {len(losses) - len(missing)} of {len(losses)} probes were trained before")
        with clock.stage("probe", total):
            learner, run = _Learner(prepared, measured), _run(prepared, clock)
            for k in missing:
                values = learner.probe(design, design.plans[k], judges[k], run)
                store.write(_name(design.plans[k]), values)
                losses[k] = values
    summary = {
        "num_probes": len(design.plans),
        "num_prior": len(design.prior),
        "num_replay": sum(1 for i in set(design.plans[0].train) if i not in design.groups),
        "num_anchor_rows": len(anchors),
        "tokens_per_batch": prepared.recipe.collect.tokens_per_batch,
        "key": store.key,
    }
    return Probed(_means(design, judges, losses), anchors, summary, tuple(_notes(prepared, design)))


def _means(
    design: Design, judges: Sequence[Sequence[TokenRow]], losses: Sequence[Float[np.ndarray, " n"] | None]
) -> dict[str, float]:
    """Mean over the probes that judged a group; every group is judged by at least one per repeat."""
    found: dict[str, list[float]] = {row.id: [] for row in design.judged}
    for some, values in zip(judges, losses, strict=True):
        assert values is not None
        for row, value in zip(some, values.tolist(), strict=True):
            found[row.id].append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _run(prepared: Prepared, clock: Clock) -> ProbeRun:
    recipe = prepared.recipe
    return ProbeRun(
        recipe.probe.lr,
        recipe.seed,
        prepared.pad_id,
        recipe.collect.tokens_per_batch,
        lambda n, tokens: clock.tick("probe", n, tokens),
    )


def _name(plan: ProbePlan) -> str:
    return f"probe-{plan.repeat}-{plan.fold}"


def _notes(prepared: Prepared, design: Design) -> list[Note]:
    if not design.shared or not prepared.recipe.probe.replay:
        return []
    text = f"{len(design.shared)} anchor rows also stand in the pool, so that probes are not trained on them as replay"
    return [Note("replay_shared", text, len(design.shared), design.shared[:5])]


def _fields(prepared: Prepared, measured: Measurement, design: Design) -> dict[str, Any]:
    """Everything that the losses depend on; batch size and device move last bits only and are left out."""
    recipe, spec = prepared.recipe, measured.spec
    lora = recipe.navigator.lora
    own = recipe.navigator.parameters
    return {
        "version": VERSION,
        "model_sha256": spec.model_sha256,
        "adapter_sha256": spec.adapter_sha256,
        "dtype": recipe.navigator.dtype,
        "parameters": own if isinstance(own, str) else list(own),
        "lora": lora.model_dump(mode="json", include={"rank", "alpha", "target_modules"}) if own == "lora" else None,
        "probe": recipe.probe.model_dump(mode="json"),
        "seed": recipe.seed,
        "prior": [[i, design.groups[i]] for i in design.prior],
        "judged": [[row.id, content_of(row)] for row in design.judged],
        "anchors": [[s.name, *_hashes(s.usable)] for s in prepared.anchors],
    }


def _hashes(rows: Sequence[TokenRow]) -> list[list[str]]:
    return [[row.id, content_of(row)] for row in sorted(rows, key=lambda row: row.id)]


def _anchor_loss(
    prepared: Prepared, measured: Measurement, store: ProbeStore, clock: Clock
) -> Float[np.ndarray, " n_a"]:
    """Measure the anchors' rows as the pool's were: the same engine on the same weights."""
    sources = [sorted(source.usable, key=lambda row: row.id) for source in prepared.anchors]
    found = store.read("anchors", sum(map(len, sources)))
    if found is not None:
        return found
    parts = []
    with clock.stage("anchor_loss", sum(row.num_tokens for rows in sources for row in rows)):
        run = Pass(
            GradientEngine(measured.navigator.model, ()), (), prepared.recipe.collect.tokens_per_batch, prepared.pad_id,
            False, lambda n, tokens: clock.tick("anchor_loss", n, tokens),
        )  # fmt: skip
        for source, rows in zip(prepared.anchors, sources, strict=True):
            by_length = sorted(rows, key=lambda row: (row.num_tokens, row.id))
            with run.engine:
                got = measure_shard(run, by_length)
            bad = np.flatnonzero(~got.usable)
            if bad.size:
                raise NumericsError(
                    "an anchor row cannot be measured",
                    where=f"row {got.ids[bad[0]]} of {source.name}",
                    got=f"{got.status[bad[0]]}: {got.reason[bad[0]]}",
                    expected="a finite loss",
                    do="look at this row with gradsift inspect, or leave it out of the anchor",
                )
            loss = dict(zip(got.ids, got.loss.tolist(), strict=True))
            parts.append(np.array([loss[row.id] for row in rows]))
    found = np.concatenate(parts)
    store.write("anchors", found)
    return found


class _Learner:
    """The navigator made trainable, and put back to its starting weights before every probe."""

    def __init__(self, prepared: Prepared, measured: Measurement) -> None:
        self.model = trainable_navigator(prepared, measured)
        self.start = [(p, p.detach().clone()) for p in self.model.parameters() if p.requires_grad]

    def probe(
        self, design: Design, plan: ProbePlan, judged: Sequence[TokenRow], run: ProbeRun
    ) -> Float[np.ndarray, " n"]:
        """Train one probe and judge rows."""
        with _own_random_state(self.start[0][0].device), self._trainable():
            train_probe(self.model, plan.steps, design.rows, run)
            return row_losses(self.model, judged, run)

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        import torch

        try:
            yield
        finally:  # the starting weights come back, whatever happened
            with torch.no_grad():
                for parameter, value in self.start:
                    parameter.copy_(value)
                    parameter.grad = None


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they are: dropout of a probe is seeded step by step."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
