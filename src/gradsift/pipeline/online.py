"""``train`` with online selection: a policy chooses rows from a finished run's whole pool while the model trains (ours).

``OUT/train`` holds what :mod:`gradsift.train.finetune` leaves, and ``online.json`` with every decision.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from gradsift.manifest import canonical_json, hash_parts, make_folder, pretty_json, sha256_file, write_bytes_atomic
from gradsift.models.load import weights_key
from gradsift.pipeline.online_policy import make_policy, make_refresh
from gradsift.pipeline.online_ready import Ready, get_ready, rise_limit
from gradsift.pipeline.progress import Clock, Silent
from gradsift.policy.episodes import Terms
from gradsift.train.assembly import Work, load_model, make_parts
from gradsift.train.config import TrainConfig
from gradsift.train.finetune import Forecast, Trained, require_trainer
from gradsift.train.held_out import measure_dev
from gradsift.train.online_parts import OnlineConfig, Pace
from gradsift.train.outcome import publish, read_done, stage_key, start_key
from gradsift.train.parts import Cost
from gradsift.train.plan import TrainPlan
from gradsift.train.replay import refuse_leak
from gradsift.train.rollout import split_rows

if TYPE_CHECKING:
    from torch import nn

    from gradsift.train.online import OnlineSelection
    from gradsift.train.online_trainer import OnlineTrainer

FILE = "online.json"
START = "start.json"


@dataclass(frozen=True)
class _Spent:
    """A line of the manifest's cost table."""

    name: str
    cost: Cost


def finetune_online(
    config: TrainConfig,
    run: Path,
    out: Path,
    *,
    command: str = "gradsift.train(...)",
    tick: Callable[[int, int], None] = lambda rows, tokens: None,
    begin: Callable[[int], None] = lambda tokens: None,
) -> Trained:
    """Fine-tune a model on rows that a policy chooses meanwhile; the same call resumes a run that was stopped.

    Args:
        config: everything but the rows, with ``online.policy``.
        run: a finished run of ``select``.
        out: the run folder.
        command: what a person would type to get the same; goes into the manifest.
        tick: called with rows and tokens of every optimizer step; what it raises stops the run.
        begin: called with about the tokens to train on, before the first step.

    Returns:
        Where the weights are, and the manifest.

    Raises:
        DependencyError: trl is not installed.
    """
    require_trainer()  # before anything is read
    ready = get_ready(config, run)
    _refuse_leaks(ready)
    base = weights_key(ready.material.resolved.folder)
    key, folder = hash_parts([stage_key(config, ready.material, base).encode(), ready.key.encode()]), out / "train"
    done = read_done(folder, key)
    if done is not None:
        return Trained(folder, folder / "model", done, skipped=True)
    make_folder(out)
    place = out / "train-work"
    make_folder(place)
    model = load_model(config, ready.material)
    free = _copy(config, model)
    online, measuring = _online(ready, model, place, key)
    begin(_tokens(ready))
    engine = _trainer(ready, model, online, place, start_key(ready.material, base), tick)
    found = engine.resume()
    if config.wise_ft != 1.0:
        from gradsift.train.averaging import wise_ft

        wise_ft(model, config.wise_ft, free)
    head = {"key": key, "command": command, "remarks": list(found.remarks),
            "base": {"model": config.model, "source": ready.material.resolved.source, "weights_sha256": base}}  # fmt: skip
    manifest = _publish(ready, engine, measuring, folder, head)
    shutil.rmtree(place, ignore_errors=True)
    return Trained(folder, folder / "model", manifest, remarks=found.remarks)


def forecast_online(config: TrainConfig, run: Path) -> Forecast:
    """Count what would be trained on, without loading weights.

    Args:
        config: settings with ``online.policy``.
        run: a finished run of ``select``.

    Returns:
        Rows, steps and tokens, at the pool's means.
    """
    ready = get_ready(config, run)
    _refuse_leaks(ready)
    pace, rows = _pace(ready), ready.material.selected
    num = round(pace.spendable / _mean_price(ready))
    held = [row for some in (ready.dev.target, *ready.dev.protect.values()) for row in some]
    decisions = -(-pace.nominal_steps // config.online.updates)
    text = (f"rows are chosen while training: {decisions} decisions or more, and after each {len(held)} held-out rows "
            f"({sum(row.num_tokens for row in held):,} tokens) are sent forward")  # fmt: skip
    return Forecast(
        num_rows=num,
        num_steps=pace.nominal_steps,
        tokens=_tokens(ready),
        trained_tokens=round(num * float(np.mean([row.num_trained for row in rows]))),
        num_replayed=0,
        folder=ready.material.resolved.folder,
        notes=(text, *(note.text for note in ready.notes)),
    )


def _refuse_leaks(ready: Ready) -> None:
    material, hook = ready.material, ready.config.hook.name
    refuse_leak(material.selected, material.held_out, "the run's pool rows")
    refuse_leak(material.general, {**material.held_out, **material.anchors}, "the general rows")
    for name, rows in material.anchors.items() if hook is not None else ():
        refuse_leak(rows, material.held_out, f"the rows of {name}, which the hook measures,")


def _copy(config: TrainConfig, model: nn.Module) -> dict[str, Any] | None:
    if config.wise_ft == 1.0 or config.mode == "lora":
        return None
    from gradsift.train.averaging import copy_weights

    return copy_weights(model)


def _terms(ready: Ready, limits: Float[np.ndarray, " M"]) -> Terms:
    return Terms(ready.width, ready.offer.budget, limits)


def _pace(ready: Ready) -> Pace:
    return Pace.of(ready.table, _terms(ready, np.ones(len(ready.dev.protect))), ready.config.online.updates)


def _mean_price(ready: Ready) -> float:
    return float(ready.table.price[[i for some in ready.table.members for i in some]].mean())


def _tokens(ready: Ready) -> int:
    """About the tokens to train on, at the pool's mean length."""
    mean = float(np.mean([row.num_tokens for row in ready.material.selected]))
    return round(_pace(ready).spendable / _mean_price(ready) * mean)


def _online(ready: Ready, model: nn.Module, place: Path, key: str) -> tuple[OnlineSelection, Cost]:
    """The decisions, and what measuring the losses that limits are shares of took."""
    from gradsift.train.online import OnlineSelection

    kind, amount = rise_limit(ready)
    limits, cost = np.full(len(ready.dev.protect), amount), Cost()
    if kind == "share":
        start, cost = _start(ready, model, place / START, key)
        limits = limits * start
    asked, terms = ready.config.online, _terms(ready, limits)
    config = OnlineConfig(asked.updates, asked.rescore_every, asked.shuffle, ready.config.seed, ready.policy_key)
    refresh = make_refresh(ready, Clock(Silent()))
    ids = [row.id for row in ready.rows]
    policy = make_policy(ready, terms)
    return OnlineSelection(ready.table, ids, policy, terms, ready.dev, config, refresh=refresh), cost


def _start(ready: Ready, model: nn.Module, path: Path, key: str) -> tuple[Float[np.ndarray, " M"], Cost]:
    """The protected losses before training: measured once, for on a GPU a resumed run would find other last bits."""
    if path.is_file():
        kept = json.loads(path.read_text("utf-8"))
        if kept["key"] == key:
            return np.array(kept["protect"], dtype=np.float64), Cost(**kept["cost"])
    found = measure_dev(model, ready.dev)
    write_bytes_atomic(path, pretty_json({"key": key, "protect": list(found.protect), "cost": asdict(found.cost)}))
    return np.array(found.protect, dtype=np.float64), found.cost


def _trainer(
    ready: Ready, model: nn.Module, online: OnlineSelection, place: Path, base: str, tick: Callable[[int, int], None]
) -> OnlineTrainer:
    from gradsift.train.online_trainer import OnlineData, OnlineTrainer

    penalties, hook = make_parts(ready.config, ready.material, model)
    data = OnlineData({row.id: row for row in ready.material.selected}, {})
    return OnlineTrainer(model, ready.material.tokenizer, ready.config, data, online, penalties=penalties, hook=hook,
                         folder=place, base=base, tick=tick)  # fmt: skip


def _publish(
    ready: Ready, trainer: OnlineTrainer, measuring: Cost, folder: Path, head: Mapping[str, Any]
) -> dict[str, Any]:
    """Write what an ordinary run leaves, add the decisions, and rename the whole into place."""
    from gradsift.train.dataset import TrainData

    online, config = trainer.online, ready.config
    plan = TrainPlan(tuple(tuple(online.ids[i] for i in batch) for batch in online.batches))
    known = {row.id: row for row in ready.material.selected}
    trainer.data = TrainData(plan, known, {})  # what was trained on, in place of what might have been
    spent: Any = (_Spent("held-out losses", online.dev_cost + measuring), _Spent("rescoring", online.rescore_cost))
    trainer.penalties = (*trainer.penalties, *spent)
    rows = tuple(known[i] for step in plan.steps for i in step)
    notes = [*ready.notes]
    if online.num_dropped:
        from gradsift.types import Note

        text = f"{online.num_dropped} measurements of rows were not finite or zero when rescored, and do not count"
        notes.append(Note("rescored", text, online.num_dropped))
    work = Work(rows, None, None, tuple(notes), Cost())
    draft = folder.with_name("train-draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was stopped while it wrote
    manifest = publish(draft, config, ready.material, work, trainer, dict(head))
    write_bytes_atomic(draft / "log.jsonl", _log(trainer, draft / "log.jsonl"))
    write_bytes_atomic(draft / FILE, pretty_json(_decisions(ready, online)))
    manifest["rows"] |= {"selected": len(rows), "pool": len(known)}
    manifest["online"] = _summary(ready, online)
    manifest["files"] |= {name: sha256_file(draft / name) for name in ("log.jsonl", FILE)}
    write_bytes_atomic(draft / "manifest.json", pretty_json(manifest))
    draft.rename(folder)
    return manifest


def _steps(online: OnlineSelection) -> list[int]:
    """Number of the decision, from 0, of every optimizer step."""
    width = online.episodes.terms.rows_per_decision
    parts = [len(split_rows(one.rows, online.config.updates, width)) for one in online.decisions]
    return [d for d, num in enumerate(parts) for _ in range(num)]


def _log(trainer: OnlineTrainer, path: Path) -> bytes:
    """The log with each step's decision, and the learning rate of a schedule that follows the budget."""
    lines = []
    for text, decision in zip(path.read_text("ascii").splitlines(), _steps(trainer.online), strict=True):
        line = json.loads(text)
        factor = trainer._rate_factor(line["step"])
        lines.append(canonical_json({**line, "lr": trainer.schedule.lr * factor, "decision": decision}) + "\n")
    return "".join(lines).encode("ascii")


def _decisions(ready: Ready, online: OnlineSelection) -> dict[str, Any]:
    """What a checkpoint holds, with ids beside row numbers."""
    state = online.state()
    for one in state["decisions"]:
        one["ids"] = [online.ids[i] for i in one["rows"]]
        one["general"] = bool(ready.table.general[one["cluster"]])
    return {**state, "sources": list(ready.dev.protect)}


def _summary(ready: Ready, online: OnlineSelection) -> dict[str, Any]:
    """The manifest's ``online`` section."""
    kind, amount = rise_limit(ready)
    table, last, start = ready.table, online.decisions[-1], online.start
    assert start is not None
    names, limits = list(ready.dev.protect), online.episodes.terms.limits
    rise = np.array(last.protect) - np.array(start.protect)
    return {
        "policy": online.policy.name,
        "run": str(ready.offer.folder),
        "method": ready.offer.method.name,
        "budget": {"amount": ready.offer.budget, "unit": ready.offer.unit, "spent": online.spent},
        "rows_per_decision": ready.width,
        "num_decisions": len(online.decisions),
        "num_rescored": online.num_rescored,
        "num_dropped": online.num_dropped,
        "effects_from": ready.effects_from,
        "clusters": [
            {"size": len(some), "general": bool(g)} for some, g in zip(table.members, table.general, strict=True)
        ],
        "limits": {"allowed": amount, "unit": kind, "nats": dict(zip(names, limits.tolist(), strict=True))},
        "gain": start.target - last.target,
        "rise": dict(zip(names, rise.tolist(), strict=True)),
        "keeps": bool((rise <= limits).all()),
        "dev_rows": {"target": len(ready.dev.target), **{n: len(r) for n, r in ready.dev.protect.items()}},
    }
