"""R22: a policy's training is killed ten times and goes on, bit for bit; a damaged last save costs the epoch after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import room
from tests.unit.policy.test_ppo_lagrangian import Sums, process

from gradsift import manifest
from gradsift.pipeline import kept_state
from gradsift.pipeline.kept_state import load_state, save_state
from gradsift.policy.descent import Descent
from gradsift.policy.multiplier import MultiplierConfig
from gradsift.policy.ppo_lagrangian import PPOConfig, train_policy
from gradsift.policy.ppo_state import TrainState, from_arrays, to_arrays
from gradsift.seeds import stream

FORGETS = "the optimizer's moments are not kept"
NO_BEFORE = "the save before the last is not kept"
DAMAGES = ("a bit flipped", "cut in half", "of no bytes")


class Deadly:
    """Counts what may be interrupted and kills this process at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(folder: Path, config: PPOConfig, tick: Callable[[], None], defect: str) -> dict[str, Any]:
    """Train, or go on; every decision, every save and every call of a save is a moment at which ``tick`` may kill."""
    path, epochs = folder / "state.npz", []

    def keep(state: TrainState) -> None:
        epochs.append(state.epoch)
        save_state(path, to_arrays(state))

    step, write, fsync = Sums.step, os.replace, os.fsync

    def deadly(plain: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            tick()
            return plain(*arguments, **options)

        return called

    arrays, remark = load_state(path)
    state = None if arrays is None else from_arrays(arrays)
    if state is not None and defect == FORGETS:
        state = replace(state, actor=Descent(state.actor.weights, *(np.zeros_like(state.actor.weights),) * 2))
    begun = 0 if state is None else state.epoch
    with (
        patch.object(Sums, "step", deadly(step)), patch.object(manifest.os, "replace", deadly(write)),
        patch.object(manifest.os, "fsync", deadly(fsync)),
    ):  # fmt: skip
        got = train_policy(process(), config, 3, state=state, on_epoch=keep)
    return {"begun": begun, "state": to_arrays(got.state), "actor": got.policy.actor, "remark": remark}


def forked(work: Callable[[], None]) -> int:
    """Do something in a process of its own; give its end as ``waitpid`` tells it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def same(got: Mapping[str, Any], want: Mapping[str, Any]) -> bool:
    """Every bit of the state (weights, moments, prices, history) and of the kept policy."""
    a, b = (dict(found["state"], kept=found["actor"]) for found in (got, want))
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a
    )


def harm(path: Path, how: str) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    if how == "a bit flipped":
        data[len(data) // 3] ^= 4
    path.write_bytes({"a bit flipped": bytes(data), "cut in half": bytes(data[: len(data) // 2])}.get(how, b""))


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Kill at random moments, go on; then damage what was saved last, go on."""
    num_epochs, num_kills = (12, 10) if full else (5, 2)
    config = PPOConfig(num_epochs=num_epochs, num_episodes=6, hidden=8, cost_epochs=3,
                       multiplier=MultiplierConfig(dual="pi"))  # fmt: skip
    plain_save = kept_state.save_state

    def alone(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        plain_save(path, arrays)
        kept_state._before(path).unlink(missing_ok=True)

    if defect == NO_BEFORE:
        globals()["save_state"] = alone
    figures: dict[str, Any] = {"kills": [], "damaged": []}
    with room() as folder:
        counter = Deadly(0)
        (folder / "whole").mkdir()
        whole = trained(folder / "whole", config, counter, "")
        moments = [int(k) for k in stream(22, "r22").numpy().integers(2, counter.count, num_kills)]
        for n, at in enumerate(moments):
            place = folder / f"kill-{n}"
            place.mkdir()
            end = forked(lambda place=place, at=at: trained(place, config, Deadly(at), defect) and None)
            got = trained(place, config, lambda: None, defect)
            figures["kills"].append(
                {"moment": at, "of": counter.count, "killed": end == signal.SIGKILL, "went_on_at": got["begun"],
                 "identical": same(got, whole)}
            )  # fmt: skip
        for how in DAMAGES if full else DAMAGES[:1]:
            place = folder / how.replace(" ", "-")
            place.mkdir()
            moment = counter.count * 3 // 4
            while not (place / "state.npz").exists():  # a kill between two names leaves the save before alone
                forked(lambda place=place, moment=moment: trained(place, config, Deadly(moment), defect) and None)
                moment += 1
            arrays, _ = load_state(place / "state.npz")
            last = 0 if arrays is None else from_arrays(arrays).epoch
            harm(place / "state.npz", how)
            got = trained(place, config, lambda: None, defect)
            figures["damaged"].append(
                {"how": how, "last_saved": last, "went_on_at": got["begun"], "said": bool(got["remark"]),
                 "identical": same(got, whole)}
            )  # fmt: skip
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """All trajectories identical; a damaged save is passed over for the one before it, and that is said."""
    kills, damaged = figures["kills"], figures["damaged"]
    good = sum(k["killed"] and k["identical"] for k in kills)
    back = sum(d["identical"] and d["said"] and d["went_on_at"] == d["last_saved"] - 1 > 0 for d in damaged)
    return Outcome(
        "R22",
        (
            Check("killed trainings that end bit for bit as the whole one", f"{good}/{len(kills)}", "all",
                  good == len(kills) > 0),
            Check("damaged saves passed over for the one before", f"{back}/{len(damaged)}", "all",
                  back == len(damaged) > 0),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R22", "kill -9 a policy's training at random decisions and calls of a save; damage its last save",
    "10/10 identical, falls back to the save before", measure, judge, (FORGETS, NO_BEFORE),
    {"epochs": 12, "kills": 10, "damages": DAMAGES}, slow=True,
)  # fmt: skip
