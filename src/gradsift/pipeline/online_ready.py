"""From a finished run and a model to what online selection works on: rows for that model, clusters, effects, policy (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.data.tokenize import mask_rule, tokenize_rows
from gradsift.errors import ConfigError, DataError
from gradsift.geometry.cluster import Clusters
from gradsift.manifest import canonical_json, hash_parts
from gradsift.pipeline.online_run import Offer, read_offer
from gradsift.pipeline.progress import Clock, Silent
from gradsift.policy.episodes import Table
from gradsift.policy.plan import Effects
from gradsift.policy.statistics import first_order_effects
from gradsift.store.spec import content_hash
from gradsift.train.config import TrainConfig
from gradsift.train.held_out import DevSets
from gradsift.train.material import Material, read_material
from gradsift.types import Note, RowStatus, Shape, TokenRow

FEWEST = 2  # held-out rows of a source


@dataclass(frozen=True)
class Ready:
    """Everything but the model.

    Args:
        config: settings.
        offer: the run.
        material: rows for the model that is trained; ``selected`` is all that may be chosen, by row number.
        rows: N rows for that model by row number, also those that may not be chosen.
        anchors: rows of the directions for that model: source -> rows, ``target`` among them.
        table: the run's clusters without rows that may not be chosen.
        dev: held-out rows.
        effects: [K] and [K, M] effects of a decision.
        effects_from: where they come from, in words.
        notes: what to beware of.
    """

    config: TrainConfig
    offer: Offer
    material: Material
    rows: tuple[TokenRow, ...]
    anchors: Mapping[str, tuple[TokenRow, ...]]
    table: Table
    dev: DevSets
    effects: Effects
    effects_from: str
    notes: tuple[Note, ...]

    @property
    def width(self) -> int:
        """Rows of a full decision."""
        return self.config.online.updates * self.config.batch_size

    @property
    def policy_key(self) -> str:
        """Hash of what decides choices beside the policy's name."""
        kept = self.offer.kept
        parts = [self.effects.gain, self.effects.harm]
        if self.config.online.policy == "ppo_lagrangian" and kept is not None and kept.policy is not None:
            parts += [kept.policy.actor, kept.policy.prices]
        return hash_parts(part.tobytes() for part in parts)

    @property
    def key(self) -> str:
        """Hash of what decides the outcome, beside settings, rows and starting weights."""
        table = self.table
        values = [
            self.policy_key, self.offer.budget, self.dev.hashes(), [list(some) for some in table.members],
            table.price.tolist(), table.features.tolist(), list(table.feature_names), list(rise_limit(self)),
        ]  # fmt: skip
        return hash_parts([canonical_json(values).encode("ascii")])


def get_ready(config: TrainConfig, run: Path) -> Ready:
    """Read a run for online selection; no weights are loaded.

    Args:
        config: settings with a policy.
        run: folder of a finished run of ``select``.

    Returns:
        Rows, clusters and effects.
    """
    refuse_settings(config)
    offer = read_offer(run, Clock(Silent()))
    refuse_policy(config, offer)
    if config.data not in (None, offer.recipe.data):
        raise ConfigError("online selection reads rows as the run read them", where="data", got=str(config.data),
                          expected=str(offer.recipe.data), do="leave the data settings out")  # fmt: skip
    prepared, material = offer.prepared, read_material(config, run)
    rule, tokens = _tokens(offer, material)
    held = {s.name: {row.id for row in s.tokens} for s in prepared.dev}
    dev_rows, notes = _held_out(tokens, held)
    known = {content_hash(row.input_ids, row.trained) for some in dev_rows.values() for row in some}
    by_id = {row.id: row for row in tokens[prepared.pool.name]}
    rows = tuple(by_id[row.id] for row in offer.rows)
    table, clusters, lost = _leave_out(offer.table, rows, known)
    used = {s.name: {row.id for row in s.usable} for s in prepared.directions}
    anchors = {name: _outside((r for r in tokens[name] if r.id in ids and r.status.usable), known)
               for name, ids in used.items()}  # fmt: skip
    target = dev_rows.pop("target")
    dev = DevSets(target, dev_rows, material.pad_id, config.tokens_per_micro_batch)
    effects, origin = _effects(config, offer)
    chosen = tuple(rows[i] for i in sorted(i for some in table.members for i in some))
    material = replace(
        material, rule=rule, selected=chosen, weights={},
        anchors={name: _outside(some, known) for name, some in material.anchors.items()},
        held_out={**material.held_out, **{f"the held-out rows of {n}": r for n, r in (*dev_rows.items(), ("target", target))}},
        inputs=(*(e for e in material.inputs if e["role"] != "selected"), *_inputs(offer)),
        notes=(),
    )  # fmt: skip
    notes += [*lost, *_remarks(offer, material)]
    return Ready(config, offer, material, rows, anchors, table, dev,
                 Effects(effects.gain[clusters], effects.harm[clusters]), origin, tuple(notes))  # fmt: skip


def refuse_settings(config: TrainConfig) -> None:
    """Refuse options that a fixed list is needed for, before anything is read.

    Args:
        config: settings with a policy.

    Raises:
        ConfigError: one of them is on; it is named.
    """
    odd = [
        ("steps", config.steps is not None, "the budget of the run ends training"),
        ("epochs", config.epochs is not None, "the budget of the run ends training, and no row comes twice"),
        ("replay.share", config.replay.share > 0, "general rows of the run's pool are clusters that a policy chooses"),
        ("stm", config.stm.on, "tokens are masked before training, for rows that are known by then"),
        ("order", config.order != "shuffle", "the policy decides the order; online.shuffle draws it within clusters"),
    ]
    for where, on, why in odd:
        if on:
            raise ConfigError(f"{where} does not go with online selection", where=f"--set {where}",
                              expected=why, do=f"leave {where} out, or leave online.policy out")  # fmt: skip


def refuse_policy(config: TrainConfig, offer: Offer) -> None:
    """Refuse a learned policy where the run kept none.

    Args:
        config: settings with a policy.
        offer: the run.

    Raises:
        ConfigError: there is none.
    """
    if config.online.policy != "ppo_lagrangian" or (offer.kept is not None and offer.kept.policy is not None):
        return
    why = "a run of another method" if offer.method.name != "ogs" else "none was learned"
    if offer.method.name == "ogs" and offer.kept is None:
        why = "a run of an earlier version, which did not keep it"
    raise ConfigError(
        "this run holds no learned policy", where="online.policy=ppo_lagrangian", got=f"{offer.folder}: {why}",
        expected="a run of ogs whose simulator was accepted, or with --set on=navigator",
        do="see gradsift policy show RUN; or take another policy, such as ogs_dual_priced",
    )  # fmt: skip


def rise_limit(ready: Ready) -> tuple[str, float]:
    """Say how much each protected source's loss may rise.

    Args:
        ready: settings and run.

    Returns:
        ``nats`` or ``share`` of the loss at the start, and the number.
    """
    asked, method = ready.config.online, ready.offer.method
    if asked.allowed_nats is not None:
        return "nats", asked.allowed_nats
    if asked.allowed_rise is not None:
        return "share", asked.allowed_rise
    if (nats := getattr(method, "allowed_nats", None)) is not None:
        return "nats", float(nats)
    return "share", float(getattr(method, "allowed_rise", 0.01))


def _tokens(offer: Offer, material: Material) -> tuple[Any, dict[str, tuple[TokenRow, ...]]]:
    """Every row of the run as the trained model's tokenizer sees it, by source."""
    sources, data = (offer.prepared.pool, *offer.prepared.directions), offer.recipe.data
    shapes: set[Shape] = {shape for s in sources for shape in s.pool.shapes}
    rule = mask_rule(material.tokenizer, data.loss_on, shapes)
    return rule, {s.name: tokenize_rows(s.pool.rows, material.tokenizer, rule, max_length=data.max_length)
                  for s in sources}  # fmt: skip


def _held_out(
    tokens: Mapping[str, Sequence[TokenRow]], held: Mapping[str, set[str]]
) -> tuple[dict[str, tuple[TokenRow, ...]], list[Note]]:
    found, notes = {}, []
    for name, ids in held.items():
        found[name] = tuple(row for row in tokens[name] if row.id in ids and row.status.usable)
        lost = len(ids) - len(found[name])
        if len(found[name]) < FEWEST:
            raise DataError("too few held-out rows can be measured on this model", where=name, got=len(found[name]),
                            expected=f"at least {FEWEST}", do="give the run more rows of it")  # fmt: skip
        if lost:
            text = f"{lost} held-out rows of {name} cannot be used with this model's tokenizer and are not measured"
            notes.append(Note("held_out", text, lost))
    return found, notes


def _outside(rows: Iterable[TokenRow], known: set[str]) -> tuple[TokenRow, ...]:
    return tuple(row for row in rows if content_hash(row.input_ids, row.trained) not in known)


def _leave_out(table: Table, rows: Sequence[TokenRow], known: set[str]) -> tuple[Table, list[int], list[Note]]:
    """Take rows out of their clusters that this model cannot train on or that are measured with, and clusters left empty."""
    unusable = {i for i, row in enumerate(rows) if not row.status.usable}
    usable = [i for i in range(len(rows)) if i not in unusable]
    leaks = {i for i in usable if content_hash(rows[i].input_ids, rows[i].trained) in known}
    texts = (("unusable", unusable, "cannot be trained on with this model's tokenizer"),
             ("leak", leaks, "are held out to be measured with, and are not trained on"))  # fmt: skip
    notes = [Note(code, f"{len(some)} rows of the pool {why}", len(some), tuple(rows[i].id for i in sorted(some)[:5]))
             for code, some, why in texts if some]  # fmt: skip
    members = [tuple(i for i in some if i not in unusable | leaks) for some in table.members]
    stay = [k for k, some in enumerate(members) if some]
    if not stay:
        raise DataError("no row of the pool can be trained on with this model", where="--model", got=f"{len(rows)} rows",
                        do="gradsift inspect FILE --row 0 shows how a row is read")  # fmt: skip
    if len(stay) < len(members):
        gone = len(members) - len(stay)
        notes.append(
            Note("clusters", f"{gone} clusters are left out with all their rows; the others are numbered anew", gone)
        )
    left = replace(table, members=tuple(members[k] for k in stay), features=table.features[stay],
                   general=table.general[stay])  # fmt: skip
    return left, stay, notes


def _effects(config: TrainConfig, offer: Offer) -> tuple[Effects, str]:
    """What a decision for each cluster does: from the run's roll-outs, else of first order at about Adam's step length."""
    width = config.online.updates * config.batch_size
    if offer.kept is not None:
        scale, effects = width / offer.kept.rows_per_decision, offer.kept.effects
        return Effects(scale * effects.gain, scale * effects.harm), "the run's roll-outs of the navigator"
    problem, clusters = offer.problem, _as_clusters(offer.table)
    assert problem.grad_norm is not None
    # AdamW moves every weight by about the learning rate, however long the gradient is.
    weights = offer.manifest["navigator"]["num_parameters"]
    length = config.lr * config.online.updates * float(np.sqrt(weights))
    effects = first_order_effects(problem, clusters, length / float(np.median(problem.grad_norm)))
    return effects, "gradients of the navigator, of first order and not calibrated"


def _as_clusters(table: Table) -> Clusters:
    labels = np.zeros(len(table.price), dtype=np.int32)
    for k, some in enumerate(table.members):
        labels[list(some)] = k
    return Clusters(labels, np.zeros((table.num_clusters, 1), dtype=np.float32), table.sizes)


def _remarks(offer: Offer, material: Material) -> list[Note]:
    notes = []
    cut = [row for row in material.selected if row.status is RowStatus.TRUNCATED]
    if cut:
        text = f"{len(cut)} rows of the pool are cut to {material.data.max_length} tokens"
        notes.append(Note("truncated", text, len(cut), tuple(row.id for row in cut[:5])))
    if not offer.table.general.any():
        notes.append(Note("no_general_rows", "the run has no general rows, so no decision can be replay"))
    if not offer.method.needs.rollouts:
        text = f"{offer.method.name} held no rows out: the held-out rows were part of the directions it measured"
        notes.append(Note("held_out_seen", text))
    return notes


def _inputs(offer: Offer) -> list[dict[str, Any]]:
    return [
        {"role": e["role"], "name": e["label"], "path": e["path"], "sha256": e["sha256"], "num_rows": e["num_rows"]}
        for e in offer.manifest["inputs"]
    ]
