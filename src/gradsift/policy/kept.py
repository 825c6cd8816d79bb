"""What a finished search for a policy leaves to those who train later: effects of the clusters and the learned actor (ours)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from gradsift.errors import StoreError
from gradsift.policy.episodes import Table
from gradsift.policy.learned import LearnedPolicy
from gradsift.policy.network import Shape
from gradsift.policy.plan import Effects

KEPT = "policy-final"
"""Name of the state under which a learner keeps it."""


@dataclass(frozen=True)
class KeptPolicy:
    """What is known of a table of clusters at the end.

    Args:
        table: from :func:`table_key`.
        rows_per_decision: rows of a decision that the effects are of.
        effects: [K] gains and [K, M] harms in nats per decision at the roll-outs' learning rate.
        policy: the learned one, or None where none was.
    """

    table: str
    rows_per_decision: int
    effects: Effects
    policy: LearnedPolicy | None


def table_key(table: Table) -> str:
    """Hash what the numbers of clusters and rows mean; statistics are left out, for their last bits may differ.

    Args:
        table: clusters.

    Returns:
        32 hex digits.
    """
    fields = [[list(some) for some in table.members], table.price.tolist(), list(table.feature_names),
              table.general.tolist()]  # fmt: skip
    # the standard library's own, for methods reach this module and may know no file (manifest)
    return hashlib.blake2b(json.dumps(fields).encode("ascii"), digest_size=16).hexdigest()


def kept_to_arrays(kept: KeptPolicy) -> dict[str, np.ndarray]:
    """Write it as named arrays of numbers.

    Args:
        kept: what is known.

    Returns:
        ``part/field`` -> array.
    """
    out = {
        "table": np.frombuffer(bytes.fromhex(kept.table), dtype=np.uint8).copy(),
        "rows_per_decision": np.array(kept.rows_per_decision),
        "effects/gain": kept.effects.gain,
        "effects/harm": kept.effects.harm,
    }
    if kept.policy is not None:
        out |= {"policy/actor": kept.policy.actor, "policy/prices": kept.policy.prices}
        out["policy/dealt"] = np.array(kept.policy.mode == "deal")
        out |= {f"shape/{name}": np.array(size) for name, size in asdict(kept.policy.shape).items()}
    return out


def kept_from_arrays(arrays: Mapping[str, np.ndarray]) -> KeptPolicy:
    """Read it back.

    Args:
        arrays: what :func:`kept_to_arrays` gave; others beside them are not looked at.

    Returns:
        The same, bit for bit.

    Raises:
        StoreError: an array is missing.
    """
    try:
        policy = None
        if "policy/actor" in arrays:
            sizes = {name.removeprefix("shape/"): int(arrays[name]) for name in arrays if name.startswith("shape/")}
            policy = LearnedPolicy(
                arrays["policy/actor"],
                Shape(**sizes),
                arrays["policy/prices"],
                "deal" if arrays["policy/dealt"] else "greedy",
            )
        effects = Effects(arrays["effects/gain"], arrays["effects/harm"])
        return KeptPolicy(arrays["table"].tobytes().hex(), int(arrays["rows_per_decision"]), effects, policy)
    except (KeyError, TypeError) as error:
        raise StoreError("what was kept of the policy is incomplete", where=str(error),
                         do="run the same gradsift select again") from error  # fmt: skip
