"""What a report and ``gradsift policy show`` say of a learned schedule, as plain JSON values (ours)."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradsift.policy.contest import Tried
from gradsift.policy.episodes import NO_ROW, Table
from gradsift.policy.schedule import Schedule


def describe_schedule(found: Schedule, table: Table) -> dict[str, Any]:
    """Turn a schedule into JSON values.

    Args:
        found: the schedule.
        table: its clusters.

    Returns:
        ``policy``, ``feasible``, ``limits``, ``start``, ``clusters`` (size, features), ``mix`` (cluster and rows per
        decision), ``contest`` (one entry per policy), ``training`` (prices, rises and gains per epoch, or None),
        ``simulator`` (verdict, horizon, figures, roll-outs) and ``notes``.
    """
    settled, trained = found.settled, found.trained
    sources = settled.simulator.sources
    training = None
    if trained is not None:
        history = trained.state.history
        training = {
            "gain": _list(history.gain),
            "rise": {name: _list(history.rise[:, m]) for m, name in enumerate(sources)},
            "price": {name: _list(history.price[:, m]) for m, name in enumerate(sources)},
            "greedy_gain": _list(history.greedy_gain),
            "dealt_gain": _list(history.dealt_gain),
            "deployed": trained.policy.mode,
            "greedy_rise": {name: _list(history.greedy_rise[:, m]) for m, name in enumerate(sources)},
            "num_decisions": int(trained.num_decisions),
            "feasible": bool(trained.feasible),
            "epoch": int(trained.state.best.epoch) if trained.state.best else 0,
        }
    return {
        "policy": found.policy,
        "feasible": bool(found.feasible),
        "limits": {name: float(v) for name, v in zip(sources, found.limits, strict=True)},
        "start": {name: float(v) for name, v in zip((*sources, "target"), found.start, strict=True)},
        "clusters": [
            {
                "size": len(some),
                "general": bool(table.general[k]),
                **{name: float(table.features[k, f]) for f, name in enumerate(table.feature_names)},
            }
            for k, some in enumerate(table.members)
        ],
        "mix": [
            {"cluster": int(k), "rows": int((line != NO_ROW).sum())}
            for k, line in zip(found.actions, found.rows, strict=True)
        ],
        "contest": [_tried(one, found, table.num_clusters) for one in found.tried],
        "training": training,
        "simulator": {
            "accepted": bool(settled.accepted),
            "horizon": int(settled.validation.horizon),
            "sentence": settled.validation.sentence,
            **{name: float(value) for name, value in settled.cost.items()},
        },
        "notes": list(found.notes),
    }


def _tried(one: Tried, found: Schedule, num_clusters: int) -> dict[str, Any]:
    sources = found.settled.simulator.sources
    real = len(one.gain) > 0
    return {
        "policy": one.name,
        "simulated_gain": one.simulated_gain,
        "simulated_rise": {name: float(v) for name, v in zip(sources, one.simulated_rise, strict=True)},
        "gain": _list(one.gain),
        "rise": {name: _list(one.rise[:, m]) for m, name in enumerate(sources)},
        "keeps": one.keeps(found.limits) if real else None,
        "counts": [int(n) for n in np.bincount(one.actions, minlength=num_clusters)],
    }


def _list(values: np.ndarray) -> list[float]:
    return [float(v) for v in values]
