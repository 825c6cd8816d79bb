"""ogs from files to a chosen file: held-out rows apart, roll-outs that are kept, a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.rows import some_rows, world, write_jsonl

from gradsift.errors import ConfigError
from gradsift.methods import make_method
from gradsift.pipeline.prepare import prepare
from gradsift.pipeline.progress import Clock, Silent
from gradsift.pipeline.run import select
from gradsift.recipe import build_recipe
from gradsift.store.spec import content_hash

pytestmark = pytest.mark.timeout(600)  # seconds of a clock, on a machine that may be busy

POLICY = {
    "num_epochs": 2, "num_episodes": 4, "num_confirmed": 1, "num_clusters": 4, "rows_per_decision": 15,
    "allowed_nats": 1.0, "infeasible": "least",
}  # fmt: skip
BUDGET = "30"  # of 24 domain and 12 general rows, so that some replay is chosen whatever the policy


def recipe(files, model, *, anchors=("math", "chat"), policy=None, **changes):
    values = {
        "pool": [{"label": "pool", "path": str(files["pool"])}],
        "general": [{"label": "old", "path": str(files["general"])}],
        "anchors": [{"label": name, "path": str(files[name])} for name in anchors],
        "target": str(files["target"]),
        "method": {"name": "ogs", "settings": {**POLICY, **(policy or {})}},
        "budget": BUDGET,
        "rollout": {"lr": 3e-3, "batch_size": 8},
        "collect": {"rows_per_shard": 7, "sketch_dim": 251},
        "navigator": {"model": str(model), "parameters": "all"},
        **changes,
    }
    return build_recipe(values)


def small_world(folder):
    files = world(folder, 24)
    odd = {"messages": []}  # trains nothing, and has no place in the schedules
    write_jsonl(files["pool"], [odd, *some_rows(24, 0)])
    return {**files, "general": write_jsonl(folder / "general.jsonl", some_rows(12, 7, answer="four"))}


def audit(out):
    return {row["id"]: row for row in pq.read_table(out / "selection/audit.parquet").to_pylist()}


def read(out, name="selection/details.json"):
    return json.loads((out / name).read_text())


SIMULATED = ("seconds", "sentence", "notes")


def same(one, two):
    """Details but for the clock and what is said of the simulator: a Gram matrix read back differs in its last bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(k in SIMULATED or same(v, two[k]) for k, v in one.items())
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == (pytest.approx(two, rel=1e-9, abs=1e-12) if isinstance(one, float) else two)


def rollouts(out):
    return sorted(out.glob("rollouts/*/rollout-*.json"))


class Stopping(Silent):
    """Hears of every roll-out that is trained, and can stop after one."""

    def __init__(self, after: int = 10**9) -> None:
        self.after, self.told = after, []

    def say(self, text: str) -> None:
        if text.startswith("roll-out "):
            self.told.append(text)

    def advance(self, rows: int, tokens: int) -> None:
        if len(self.told) >= self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def clean(tmp_path_factory, navigator):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("clean")
    files, progress = small_world(folder), Stopping()
    outcome = select(recipe(files, navigator), folder / "run", progress=progress)
    return files, folder / "run", outcome, progress, read(folder / "run")


def test_a_run_leaves_its_files_and_a_reason_for_every_row(clean):
    _, out, outcome, *_ = clean
    rows, details, manifest = audit(out), read(out), read(out, "manifest.json")
    assert len(rows) == 37
    assert len([row for row in rows.values() if row["status"] == "OK"]) == 36
    chosen = [row for row in rows.values() if row["selected"]]
    assert len(chosen) == len(outcome.selection.ids) == 30
    usable = [row for row in rows.values() if row["status"] == "OK"]
    assert {row["reason_code"] for row in usable} == {"kept:policy", "dropped:policy"}
    assert all(row["reason_code"] == "kept:policy" for row in chosen)
    assert [row["id"] for row in sorted(chosen, key=lambda row: row["order"])] == list(outcome.selection.ids)
    assert details["policy"] in {one["policy"] for one in details["contest"]}
    assert sum(one["rows"] for one in details["mix"]) == 30
    assert sum(one["size"] for one in details["clusters"]) == 36
    sizes = np.bincount([row["cluster"] for row in usable])
    assert sizes.tolist() == [one["size"] for one in details["clusters"]]
    for k, one in enumerate(details["mix"]):
        mine = [row for row in chosen if f": decision {k + 1} of {len(details['mix'])} by " in row["reason"]]
        assert len(mine) == one["rows"]
        assert {row["cluster"] for row in mine} == {one["cluster"]}
    assert set(details["limits"]) == {"math", "chat"}
    assert set(details["start"]) == {"math", "chat", "target"}
    lines = (out / "selection/selected.jsonl").read_text().splitlines()
    assert len(lines) == 30
    assert {note["code"] for note in manifest["selection"]["notes"]} >= {"policy"}


def test_general_rows_are_chosen_as_replay_and_say_so(clean):
    _, out, outcome, *_ = clean
    rows, details = audit(out), read(out)
    general = {i for i, row in rows.items() if row["source"] == "old"}
    assert len(general) == 12
    marked = {k for k, one in enumerate(details["clusters"]) if one["general"]}
    assert marked
    for i, row in rows.items():
        assert row["status"] != "OK" or (row["cluster"] in marked) == (i in general)
        if row["selected"]:
            assert ("general cluster" in row["reason"]) == (i in general)
    replayed = [i for i in outcome.selection.ids if i in general]
    assert len(replayed) >= 6
    assert "no_general_rows" not in {note.code for note in outcome.selection.notes}


def test_roll_outs_are_counted_where_they_are_kept_and_where_they_are_told(clean):
    _, out, _, progress, _ = clean
    counted = read(out, "manifest.json")["rollouts"]
    assert counted["num_rollouts"] == len(rollouts(out)) == len(progress.told)
    assert counted["dev_rows"] == {"math": 4, "chat": 4, "target": 4}
    assert counted["policy_tokens"] == 0
    tokens = read(out, "manifest.json")["cost"]["tokens"]
    assert tokens["roll"] == counted["train_tokens"] + counted["dev_tokens"]
    real = {one["policy"] for one in read(out)["contest"] if one["gain"]}
    assert {"uniform", "best_single", "ogs_dual_clusters", "mixture_regression_1"} <= real


def test_the_same_command_reads_the_roll_outs_back(clean, navigator):
    files, out, outcome, *_ = clean
    details, counted = read(out), read(out, "manifest.json")["rollouts"]
    before = {path: path.stat().st_mtime_ns for path in rollouts(out)}
    progress = Stopping()
    again = select(recipe(files, navigator), out, progress=progress)
    assert progress.told == []
    assert read(out, "manifest.json")["cost"]["tokens"] == {}
    assert {path: path.stat().st_mtime_ns for path in rollouts(out)} == before
    assert (again.selection.ids, again.selection.reason) == (outcome.selection.ids, outcome.selection.reason)
    assert same(read(out), details)
    assert read(out, "manifest.json")["rollouts"] == counted


def test_the_same_command_gives_the_same_details_to_the_last_bit(clean, navigator):
    files, out, *_ = clean
    select(recipe(files, navigator), out)
    details = read(out)
    select(recipe(files, navigator), out)
    assert read(out) == details  # both were read back
    assert details == clean[4]


@pytest.mark.parametrize("after", [9])
def test_a_stopped_run_goes_on_roll_out_by_roll_out(clean, navigator, tmp_path, after):
    files, out, outcome, progress, _ = clean
    with pytest.raises(KeyboardInterrupt):
        select(recipe(files, navigator), tmp_path / "run", progress=Stopping(after))
    assert len(rollouts(tmp_path / "run")) == after
    resumed = Stopping()
    again = select(recipe(files, navigator), tmp_path / "run", progress=resumed)
    assert len(resumed.told) == len(progress.told) - after
    assert (again.selection.ids, again.selection.reason) == (outcome.selection.ids, outcome.selection.reason)
    assert same(read(tmp_path / "run"), read(out))


DIE = """
import json, os, signal, sys
from pathlib import Path
from gradsift.pipeline.run import select
from gradsift.recipe import build_recipe
from gradsift.train import rollout
real, seen = rollout.roll, []
def roll(dynamics, rows, name=""):
    seen.append(name)
    if len(seen) == 8:  # in the middle of a training, after a step of it
        dynamics.reset(1)
        dynamics.step(rows[:1])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(dynamics, rows, name)
rollout.roll = roll
select(build_recipe(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_in_a_roll_out_repeats_that_one_alone(clean, navigator, tmp_path):
    files, out, outcome, progress, _ = clean
    asked = recipe(files, navigator)
    root = Path(__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", DIE, asked.model_dump_json(exclude_none=True), str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert len(rollouts(tmp_path / "run")) == 7
    assert not (tmp_path / "run/manifest.json").exists()
    resumed = Stopping()
    again = select(asked, tmp_path / "run", progress=resumed)
    assert len(resumed.told) == len(progress.told) - 7
    assert (again.selection.ids, again.selection.reason) == (outcome.selection.ids, outcome.selection.reason)
    assert same(read(tmp_path / "run"), read(out))


def test_held_out_rows_give_no_direction(clean, navigator):
    files, out, *_ = clean
    prepared = prepare(recipe(files, navigator), make_method("ogs", POLICY), Clock(Silent()))

    def contents(sources):
        return [{content_hash(row.input_ids, row.trained) for row in source.tokens} for source in sources]

    directions, dev = contents(prepared.directions), contents(prepared.dev)
    assert [source.name for source in prepared.dev] == ["math", "chat", "target"]
    assert [len(some) for some in dev] == [4, 4, 4]
    assert [len(some) for some in directions] == [6, 6, 6]
    assert not set().union(*directions) & set().union(*dev)
    manifest = read(out, "manifest.json")
    assert {d["name"]: d["num_rows"] for d in manifest["directions"]} == {"math": 6, "chat": 6, "target": 6}


def test_what_two_sets_share_is_on_one_side(navigator, tmp_path):
    """A row that is held out of one anchor is no part of another's direction."""
    files = small_world(tmp_path)
    own = some_rows(6, 11)
    files["both"] = write_jsonl(tmp_path / "both.jsonl", [*some_rows(10, 1, answer="four"), *own])
    made = recipe(files, navigator, anchors=("math", "both"))
    prepared = prepare(made, make_method("ogs", POLICY), Clock(Silent()))
    held = {content_hash(row.input_ids, row.trained) for source in prepared.dev for row in source.tokens}
    left = {content_hash(row.input_ids, row.trained) for source in prepared.directions for row in source.tokens}
    assert not held & left
    files["math"], files["twin"] = (
        write_jsonl(tmp_path / name, some_rows(5, 1, answer="four")) for name in ("m.jsonl", "t.jsonl")
    )
    made = recipe(files, navigator, anchors=("math", "twin"), rollout={"dev_share": 0.6})  # two of five must agree
    method = make_method("ogs", POLICY)
    with pytest.raises(ConfigError, match="shares nearly all"):
        prepare(made, method, Clock(Silent()))


@pytest.fixture
def _no_model(monkeypatch):
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize(("count", "role"), [(3, "math"), (4, "target"), (3, "target")])
def test_too_few_rows_to_hold_some_out_are_refused_before_a_model_loads(tmp_path, navigator, count, role):
    files = small_world(tmp_path)
    files[role] = write_jsonl(tmp_path / "few.jsonl", [*some_rows(count, 5), *some_rows(count, 5)])  # copies count once
    changes = {"rollout": {"dev_share": 0.6}} if count == 4 else {}
    made = recipe(files, navigator, **changes)
    if count == 4:
        prepare(made, make_method("ogs", POLICY), Clock(Silent()))
        return
    with pytest.raises(ConfigError, match="too few rows") as refusal:
        select(made, tmp_path / "run")
    assert role in refusal.value.where
    assert "3 different usable rows" in refusal.value.got


@pytest.mark.usefixtures("_no_model")
def test_general_rows_are_refused_by_a_method_that_does_not_choose_them(tmp_path, navigator):
    files = small_world(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        select(recipe(files, navigator, method={"name": "ogs_dual"}), tmp_path / "run")
    assert refusal.value.where == "--general"
    assert refusal.value.got == "old"
    assert "--replay" in refusal.value.do


@pytest.mark.usefixtures("_no_model")
def test_weights_in_bfloat16_are_refused_before_a_model_loads(tmp_path, navigator):
    files = small_world(tmp_path)
    half = {"model": str(navigator), "parameters": "all", "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="bfloat16"):
        select(recipe(files, navigator, navigator=half), tmp_path / "run")


def test_on_the_navigator_a_stopped_training_goes_on_and_all_of_it_is_counted(tmp_path, navigator, monkeypatch):
    from gradsift.pipeline.learner import NavigatorLearner

    files = small_world(tmp_path)
    tiny = {"on": "navigator", "num_epochs": 2, "num_episodes": 2, "rows_per_decision": 6, "num_clusters": 2}
    made = recipe(files, navigator, policy=tiny, general=[], budget="12")
    whole = select(made, tmp_path / "whole")
    save, calls = NavigatorLearner.save, []

    def save_once(self, name, arrays):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(self, name, arrays)

    monkeypatch.setattr(NavigatorLearner, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        select(made, tmp_path / "run")
    monkeypatch.setattr(NavigatorLearner, "save", save)
    again = select(made, tmp_path / "run")
    assert (again.selection.ids, again.selection.reason) == (whole.selection.ids, whole.selection.reason)
    assert same(read(tmp_path / "run"), read(tmp_path / "whole"))
    counted = [read(tmp_path / name, "manifest.json")["rollouts"] for name in ("whole", "run")]
    # probe of three episodes and two epochs of two sampled and a greedy one: 12 rows each, none kept as a roll-out
    own = counted[0]["policy_tokens"]
    assert own > 9 * 12 * 20
    # what the stopped run did after its last saved epoch is lost with it; all else is the same
    assert counted[1] == {**counted[0], "seconds": counted[1]["seconds"]}
    assert "no_general_rows" in {note.code for note in whole.selection.notes}
