"""Invented but plausible details of a run of ``ogs``, for tests of what is said of its policy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SENTENCE = "the simulator is trusted for 10 of 10 steps: over them the worst of 3 losses has Spearman 0.91"
LEARNED = "ppo_lagrangian"


def tried(
    name: str, gain: Sequence[float], rise: Mapping[str, Sequence[float]], *, keeps: bool | None, simulated: float = 0.1
) -> dict[str, Any]:
    """An entry of the contest."""
    return {
        "policy": name, "gain": list(gain), "rise": {s: list(v) for s, v in rise.items()}, "keeps": keeps,
        "simulated_gain": simulated, "simulated_rise": dict.fromkeys(rise, 0.01), "counts": [1, 2, 3],
    }  # fmt: skip


def some_details(
    sources: tuple[str, ...] = ("general", "math"),
    *,
    trained: int = 60,
    accepted: bool = True,
    policy: str = LEARNED,
    num_decisions: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """What describe_schedule writes, with limits of 0.04 nats, 0.05, ...: ``breaker`` breaks the first."""
    rng = np.random.default_rng(seed)
    limits = {s: 0.04 + 0.01 * k for k, s in enumerate(sources)}
    real = {"uniform": 0.4, "best_single": 0.7, "ogs_dual_clusters": 0.8, LEARNED: 0.9}
    contest = []
    for k, (name, part) in enumerate(real.items()):
        rises = {s: [part * limit, part * limit - 0.004] for s, limit in limits.items()}
        contest.append(tried(name, [0.05 + 0.02 * k, 0.06 + 0.02 * k], rises, keeps=True, simulated=0.06 + 0.02 * k))
    over = {s: [1.9 * limit, 2.1 * limit] if k == 0 else [0.01, 0.02] for k, (s, limit) in enumerate(limits.items())}
    contest.append(tried("breaker", [0.2, 0.21], over, keeps=False, simulated=0.19))
    contest.append(tried("exp3", [], {s: [] for s in sources}, keeps=None, simulated=0.07))
    steps = np.arange(trained)
    path = {
        s: (limit * (1.6 - 0.2 * k - 0.7 * steps / max(1, trained - 1))).tolist()
        for k, (s, limit) in enumerate(limits.items())
    }
    training = {
        "gain": (0.1 - 0.04 * np.exp(-steps / 12) + 0.003 * rng.normal(size=trained)).tolist(),
        "greedy_gain": (0.11 - 0.05 * np.exp(-steps / 9)).tolist(),
        "dealt_gain": (0.105 - 0.05 * np.exp(-steps / 8)).tolist(), "deployed": "greedy",
        "rise": path, "greedy_rise": path,
        "price": {s: (0.4 * (k + 1) * (1 - np.exp(-steps / 15))).tolist() for k, s in enumerate(sources)},
        "num_decisions": 19_000, "feasible": True,
    }  # fmt: skip
    clusters = [
        {"size": 12 + k, "general": k == 3, "loss": 2.5 - 0.2 * k, "log_size": 2.5, "is_general": float(k == 3),
         **{f"cos_{s}": 0.1 * k - 0.15 for s in (*sources, "target")}}
        for k in range(5)
    ]  # fmt: skip
    sentence = SENTENCE if accepted else "the simulator is not trusted for any number of steps"
    return {
        "policy": policy, "feasible": True, "limits": limits,
        "start": {**{s: 2.0 + k for k, s in enumerate(sources)}, "target": 3.25},
        "clusters": clusters,
        "mix": [{"cluster": int(k), "rows": 3} for k in rng.choice([0, 1, 3], size=num_decisions, p=[0.5, 0.2, 0.3])],
        "contest": contest, "training": training if trained else None,
        "simulator": {"accepted": accepted, "horizon": 10 if accepted else 0, "sentence": sentence, "num_rollouts": 10.0},
        "notes": [f"{sentence}; 10 roll-outs, 100 steps and 900 tokens of the navigator went into it",
                  "no advantage of the learned policy over ogs_dual_clusters was measured"],
    }  # fmt: skip


def make_policy_run(run: Path, details: dict[str, Any]) -> Path:
    """Turn an invented run folder (``report_fixture.write_run``) into one of ``ogs``."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["selection"] |= {"method": "ogs", "config": {"on": "simulator"}, "certificate": None}
    manifest["rollouts"] = {"num_rollouts": 12, "num_decisions": 120, "train_tokens": 4000, "dev_tokens": 9000,
                            "flops": 1.5e12, "seconds": 61.5, "dev_rows": {"target": 8}}  # fmt: skip
    manifest["cost"]["seconds"] |= {"roll": 61.5, "select": 20.0}
    path.write_text(json.dumps(manifest), "utf-8")
    (run / "selection" / "details.json").write_text(json.dumps(details), "utf-8")
    return run
