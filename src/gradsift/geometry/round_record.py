"""Rounds of a proxy run as JSON values and back, floats to the last bit (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from gradsift.geometry.trajectory import Feedback, Round, State


def plain(value: Any) -> Any:
    """Turn rounds, states and arrays into JSON values; what is not finite becomes None.

    Args:
        value: nested dataclasses, mappings, sequences and arrays.

    Returns:
        Dictionaries, lists and numbers.
    """
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def read_round(value: Mapping[str, Any]) -> Round:
    """Make a round of what :func:`plain` wrote, floats to the last bit.

    Args:
        value: of a round.

    Returns:
        The round.
    """
    seen, state = value["feedback"], value["state"]
    feedback = Feedback(
        seen["lr"],
        _numbers(seen["losses"]),
        np.array(seen["present"], dtype=bool),
        **{name: None if seen[name] is None else _numbers(seen[name])
           for name in ("gram", "fisher", "task_losses", "excess", "positive", "drops")},
    )  # fmt: skip
    num = len(state["weights"])
    history = _numbers(state["history"]).reshape(len(state["history"]), -1) if state["history"] else np.zeros((0, 0))
    after = State(_numbers(state["weights"]), _numbers(state["carried"]).reshape(num), history, state["stopped"],
                  state["events"], state["figures"])  # fmt: skip
    return Round(feedback, after, np.array(value["counts"], dtype=np.int64), value["short"])


def _numbers(value: Any) -> np.ndarray:
    return np.array(value, dtype=np.float64)  # None becomes NaN
