"""Work on cells: dependencies, failures, two runners at once, a kill in the middle, and the same figures after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tests.fabricated import MINI, config

import gradsift.compare.runner as runner
from gradsift.compare.arithmetic import ArithmeticSettings, arithmetic_world
from gradsift.compare.cell import with_total
from gradsift.compare.claiming import claim, holder
from gradsift.compare.placebo import exchangeable, shuffle_anchors
from gradsift.compare.plan import make_plan
from gradsift.compare.runner import list_jobs, look, run_all
from gradsift.compare.store import declare, read_cell
from gradsift.compare.worlds import make_grid
from gradsift.errors import ConfigError, StoreError
from gradsift.seeds import stream

WORKER = """
import sys
from pathlib import Path
from gradsift.compare.runner import list_jobs, work
from gradsift.compare.store import declared_config
folder = Path(sys.argv[1])
print("ready", flush=True)
work(folder, list_jobs(declared_config(folder)), lambda e: print(e.job.key, flush=True), turn=int(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(folder, found, num_workers=1, jobs=None):
    events = []
    found = declare(folder, found, "test")
    left = run_all(folder, jobs or list_jobs(found), num_workers, events.append, lambda: None)
    return left, events


def figures(folder, found):
    """Everything of the cells but the time they took."""
    out = {}
    for job in list_jobs(found):
        cell = read_cell(folder, job.key).cell
        out[job.arm, job.seed] = [(p.lr, p.metrics, {k: c.flops for k, c in p.cost.items()}) for p in cell.points]
    return out


def test_all_cells_are_computed_once_and_a_second_run_computes_none(tmp_path):
    found = config(seeds="0-1")
    left, events = run(tmp_path, found)
    assert len(left.done) == len(events) == 8
    assert not left.failed
    assert [e.job.seed for e in events] == [0] * 4 + [1] * 4, "seed by seed, so that arms share a world"
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    left, events = run(tmp_path, found)
    assert (len(left.done), events) == (8, [])
    assert stamps == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    plan = make_plan(tmp_path, found, list_jobs(found), 2)
    assert (plan.num_done, plan.total) == (8, 0.0)
    assert not list((tmp_path / "locks").glob("*.lock"))


def test_cached_weights_give_the_same_cells(tmp_path, monkeypatch):
    found = config(seeds="0")
    run(tmp_path / "a", found)
    run(tmp_path / "b", found)  # weights out of the cache
    monkeypatch.setenv("GRADSIFT_CACHE", str(tmp_path / "empty"))
    run(tmp_path / "c", found)  # trained again
    assert figures(tmp_path / "a", found) == figures(tmp_path / "b", found) == figures(tmp_path / "c", found)
    cached = next((tmp_path / "empty" / "worlds").glob("arithmetic-*"))
    cached.write_bytes(cached.read_bytes()[:100])
    with pytest.raises(StoreError, match="cached weights are damaged"):
        run(tmp_path / "d", found)


def test_an_arm_spends_the_total_of_another(tmp_path):
    arms = [{"name": "total", "method": "random", "total_of": "ours"}, *config().dump()["arms"]]
    found = config(arms=arms, seeds="0")
    left, events = run(tmp_path, found)
    assert not left.failed
    order = [e.job.arm for e in events]
    assert order.index("total") > order.index("ours")
    cells = {job.arm: read_cell(tmp_path, job.key).cell for job in left.done}
    spec = found.arm("total").spec()
    allowed = with_total(spec, cells["ours"], make_grid(found))
    used = max(p.cost["train"].flops for p in cells["total"].points)
    assert cells["random"].points[0].cost["train"].flops < used <= allowed


def test_a_dependent_cell_waits_for_the_one_in_other_hands(tmp_path):
    arms = [{"name": "total", "method": "random", "total_of": "ours"}, *config().dump()["arms"]]
    found = declare(tmp_path, config(arms=arms, seeds="0"), "test")
    jobs = {job.arm: job for job in list_jobs(found)}
    bench, told = runner._Bench(tmp_path, found), []
    with claim(tmp_path, jobs["ours"].key) as ours:
        assert ours
        assert not bench.attempt(jobs["ours"], told.append)
        assert not bench.attempt(jobs["total"], told.append)
    assert told == []
    assert bench.attempt(jobs["ours"], told.append)
    assert bench.attempt(jobs["total"], told.append)


def test_a_failed_cell_is_told_and_stops_neither_the_others_nor_a_retry(tmp_path, monkeypatch):
    arms = [{"name": "total", "method": "random", "total_of": "ours"}, *config().dump()["arms"]]
    found = config(arms=arms, seeds="0-1")
    real = runner.run_cell

    def fails(desk, arm, grid, total=None):
        if arm.name == "ours" and desk.world.seed == 0:
            raise ConfigError("planted failure")
        return real(desk, arm, grid, total=total)

    monkeypatch.setattr(runner, "run_cell", fails)
    left, events = run(tmp_path, found)
    assert {(job.arm, job.seed) for job, _ in left.failed} == {("ours", 0), ("total", 0)}
    assert len(left.done) == 8
    assert sum(bool(e.error) for e in events) == 2
    monkeypatch.undo()
    left, _ = run(tmp_path, found)
    assert len(left.done) == 10


def test_a_wrong_metric_stops_the_run(tmp_path):
    with pytest.raises(ConfigError, match="another metric"):
        run(tmp_path, config(metric="loss", seeds="0"))
    assert not (tmp_path / "cells").exists()


def test_seeds_and_arms_can_be_a_part(tmp_path):
    found = config()
    jobs = list_jobs(found, ["ours"], [3, 4])
    assert {(job.arm, job.seed) for job in jobs} == {("ours", 3), ("ours", 4)}
    with pytest.raises(ConfigError, match="not declared"):
        list_jobs(found, None, [11])
    left, _ = run(tmp_path, found, jobs=jobs)
    assert len(left.done) == 2
    assert len(look(tmp_path, list_jobs(found)).open) == 38
    plan = make_plan(tmp_path, found, list_jobs(found), 2)
    assert plan.num_done == 2
    assert plan.total > 0
    assert plan.wall == plan.total / 2


def test_a_plan_without_cells_measures_a_few_steps(tmp_path):
    found = config(seeds="0-1")
    plan = make_plan(tmp_path / "none", found, list_jobs(found), 1)
    assert plan.num_done == 0
    assert set(plan.seconds) == {"random", "cheap", "ours", "oracle"}
    assert plan.total > 0
    assert not (tmp_path / "none").exists()


def start(folder, turn):
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(turn)], stdout=subprocess.PIPE, text=True)


def test_two_runners_do_every_cell_once_and_a_killed_one_is_replaced(tmp_path):
    found = declare(tmp_path / "two", config(seeds="0-3"), "test")
    victim, other = start(tmp_path / "two", 0), start(tmp_path / "two", 2)
    keys, until, held = [job.key for job in list_jobs(found)], time.monotonic() + 60, False
    while not held and time.monotonic() < until:
        held = any((who := holder(tmp_path / "two", key)) and who.pid == victim.pid for key in keys)
    victim.send_signal(signal.SIGKILL)
    told = [key for w in (victim, other) for key in w.communicate(timeout=100)[0].split()[1:]]
    assert held, "the kill must have come while a cell was at work"
    assert (victim.returncode, other.returncode) == (-signal.SIGKILL, 0)
    assert len(told) == len(set(told)), "no cell twice"
    assert {p.stem for p in (tmp_path / "two").glob("cells/*.json")} == set(keys)
    assert not list((tmp_path / "two").glob("locks/*.lock"))
    run(tmp_path / "one", config(seeds="0-3"))
    assert figures(tmp_path / "one", found) == figures(tmp_path / "two", found)


def test_several_workers_under_one_parent(tmp_path):
    found = config(seeds="0-1")
    left, events = run(tmp_path, found, num_workers=2)
    assert len(left.done) == len(events) == 8


def test_a_worker_that_stops_is_told(tmp_path):
    with pytest.raises(StoreError, match="another metric"):
        run(tmp_path, config(metric="loss", seeds="0"), num_workers=2)


def world():
    return arithmetic_world(0, ArithmeticSettings(**MINI))


def test_an_exchangeable_pool_holds_one_kind_and_no_copies():
    plain = arithmetic_world(0, ArithmeticSettings(**{**MINI, "clean": 80}))  # each pair twice and more
    same = exchangeable(plain)
    assert len(same.pool) < 40
    assert {same.kinds[row.id] for row in same.pool} == {"clean"}
    contents = [row.input_ids.tobytes() for row in same.pool]
    assert len(set(contents)) == len(contents)
    assert set(contents) == {row.input_ids.tobytes() for row in plain.pool if plain.kinds[row.id] == "clean"}
    assert not same.copy_of
    assert (same.evaluations[0].rows[0].input_ids == plain.evaluations[0].rows[0].input_ids).all()
    with pytest.raises(ConfigError, match="clean"):
        exchangeable(plain, "cleen")


def test_shuffled_anchors_keep_inputs_and_counts_and_lose_the_answers():
    plain = world()
    sham = shuffle_anchors(plain, stream(0, "sham"))
    again = shuffle_anchors(plain, stream(0, "sham"))
    for before, after, twice in [
        (plain.anchors["A"], sham.anchors["A"], again.anchors["A"]),
        (plain.target, sham.target, again.target),
    ]:
        trained = [np.concatenate([r.input_ids[r.trained] for r in rows]) for rows in (before, after, twice)]
        assert sorted(trained[0]) == sorted(trained[1])
        assert (trained[0] != trained[1]).any()
        assert (trained[1] == trained[2]).all()
        assert all(
            (a.input_ids[~a.trained] == b.input_ids[~b.trained]).all() for a, b in zip(before, after, strict=True)
        )
    assert sham.pool is plain.pool
    assert sham.replay is plain.replay


def test_sham_arms_get_the_sham_world_and_real_arms_do_not(tmp_path, monkeypatch):
    arms = [
        {"name": "random", "method": "random"},
        {"name": "ours", "method": "target_cosine"},
        {"name": "sham", "method": "target_cosine", "placebo": "shuffled_anchors"},
    ]
    seen = {}
    real = runner.run_cell

    def spy(desk, arm, grid, total=None):
        seen[arm.name] = desk.world.target
        return real(desk, arm, grid, total=total)

    monkeypatch.setattr(runner, "run_cell", spy)
    left, _ = run(tmp_path, config(arms=arms, seeds="0", cheap=[], claims=[]))
    assert len(left.done) == 3
    assert seen["ours"] is seen["random"]
    assert seen["sham"] is not seen["ours"]
    assert os.environ["GRADSIFT_CACHE"]
