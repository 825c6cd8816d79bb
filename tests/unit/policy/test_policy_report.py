"""What details.json says of a schedule is what the schedule holds, in plain values that the report can read."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
from tests.planted import planted_world

from gradsift.methods import make_method
from gradsift.policy.contest import LEARNED
from gradsift.policy.coordinates import make_coordinates, signals_of
from gradsift.policy.episodes import NO_ROW
from gradsift.policy.learn import learn_schedule
from gradsift.policy.ppo_lagrangian import PPOConfig
from gradsift.policy.report import describe_schedule
from gradsift.policy.schedule import LearnConfig
from gradsift.policy.statistics import describe_clusters, make_clusters
from gradsift.report.policy_fields import parse_details
from gradsift.seeds import stream
from gradsift.types import Budget

PPO = PPOConfig(num_epochs=3, num_episodes=4)
PROBLEM = planted_world("gradient").problem()


@cache
def learned():
    """The planted pool in four clusters, its third source general; losses are linear, so the simulator is trusted."""
    general = np.isin(np.array(PROBLEM.sources), ("s2",))
    draws = stream(0, "report")
    clusters = make_clusters(PROBLEM, general, draws.child("clusters"), 4)
    table = describe_clusters(PROBLEM, clusters, general, draws.child("members"))
    coordinates = make_coordinates(signals_of(PROBLEM), draws.child("coordinates"))
    config = LearnConfig(allowed_nats=1.0, rows_per_decision=6, ppo=PPO, num_simulated=3)
    return learn_schedule(table, 30, coordinates, PROBLEM.learner, config, draws), table


@cache
def described():
    return describe_schedule(*learned())


def test_it_is_json_that_the_report_reads():
    text = json.dumps(described(), allow_nan=False)
    details = parse_details(json.loads(text))
    assert details.policy == learned()[0].policy
    assert details.sources == ("anchor0", "anchor1")
    assert json.loads(text) == described(), "nothing is of a type that JSON turns into another"


def test_the_mix_and_the_clusters_are_those_of_the_list():
    found, table = learned()
    got = described()
    assert got["mix"] == [
        {"cluster": int(k), "rows": sum(int(i) != NO_ROW for i in line)}
        for k, line in zip(found.actions, found.rows, strict=True)
    ]
    assert sum(one["rows"] for one in got["mix"]) == 30
    assert [one["size"] for one in got["clusters"]] == [len(some) for some in table.members]
    assert [one["general"] for one in got["clusters"]] == table.general.tolist()
    assert any(one["general"] for one in got["clusters"])
    for k, one in enumerate(got["clusters"]):
        assert [one[name] for name in table.feature_names] == table.features[k].tolist()
    assert got["limits"] == {"anchor0": 1.0, "anchor1": 1.0}
    assert got["start"] == {"anchor0": 2.0, "anchor1": 2.0, "target": 2.0}


def test_every_policy_has_its_figures():
    found, table = learned()
    entries = {one["policy"]: one for one in described()["contest"]}
    assert list(entries) == [one.name for one in found.tried]
    for one in found.tried:
        entry = entries[one.name]
        assert entry["simulated_gain"] == one.simulated_gain
        assert list(entry["simulated_rise"].values()) == one.simulated_rise.tolist()
        assert entry["gain"] == one.gain.tolist()
        assert entry["rise"] == {f"anchor{m}": one.rise[:, m].tolist() for m in range(2)}
        assert entry["keeps"] == (one.keeps(found.limits) if len(one.gain) else None)
        assert entry["counts"] == [int((one.actions == k).sum()) for k in range(table.num_clusters)]


def test_the_training_and_the_simulator_are_told():
    found, _ = learned()
    got = described()
    assert found.trained is not None
    history = found.trained.state.history
    assert got["training"]["gain"] == history.gain.tolist()
    for name, values in (("rise", history.rise), ("price", history.price), ("greedy_rise", history.greedy_rise)):
        assert got["training"][name] == {f"anchor{m}": values[:, m].tolist() for m in range(2)}
    assert len(got["training"]["greedy_gain"]) == PPO.num_epochs
    assert got["training"]["dealt_gain"] == history.dealt_gain.tolist()
    assert got["training"]["deployed"] == found.trained.policy.mode
    assert got["training"]["num_decisions"] == found.trained.num_decisions
    assert got["simulator"]["accepted"]
    assert got["simulator"]["horizon"] == found.settled.validation.horizon == 5
    assert got["simulator"]["num_rollouts"] == found.settled.cost["num_rollouts"]
    assert got["notes"] == list(found.notes)
    none = describe_schedule(replace(found, trained=None), learned()[1])
    assert none["training"] is None
    assert {k: v for k, v in none.items() if k != "training"} == {k: v for k, v in got.items() if k != "training"}


def test_the_method_hands_the_same_values_on():
    """``ogs`` on the planted pool: its list, its notes and its details belong together."""
    settings = {"num_epochs": 2, "num_episodes": 4, "num_confirmed": 1, "num_clusters": 4, "allowed_nats": 1.0}
    problem = replace(PROBLEM, general=("s2",))
    got = make_method("ogs", settings).select(problem, Budget(rows=30), stream(0, "select/ogs"))
    details = parse_details(json.loads(json.dumps(got.details, allow_nan=False)))
    assert sum(move.rows for move in details.mix) == len(got.ids) == 30
    assert [note.text for note in got.notes if note.code == "policy"] == list(details.notes)
    index = {i: row for row, i in enumerate(problem.ids)}
    at = 0
    for move in details.mix:
        rows = [index[i] for i in got.ids[at : at + move.rows]]
        assert {int(got.cluster[row]) for row in rows} == {move.cluster}
        for row in rows:
            kind = "general cluster" if details.clusters[move.cluster].general else "cluster"
            assert f"by {details.policy}: {kind} {move.cluster}" in got.reason[row]
            assert (problem.sources[row] == "s2") == details.clusters[move.cluster].general
        at += move.rows
    assert {one.policy for one in details.contest} >= {LEARNED, "uniform", "exp3"}
