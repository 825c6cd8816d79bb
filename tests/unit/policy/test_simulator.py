"""The simulator against a quadratic truth, a loop over single episodes and a linear program."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from tests.quadratic import exact, make_world, schedules, signals

from gradsift.errors import ConfigError
from gradsift.policy.coordinates import make_coordinates
from gradsift.policy.curvature import factor, make_curvature
from gradsift.policy.episodes import NO_ROW, Episodes, Table, Terms
from gradsift.policy.simulator import KINDS, Coefficients, Simulator
from gradsift.seeds import stream


def simulator(world, coordinates, curvature):
    kappa = tuple(world.kappa) if curvature is not None else (0.0,) * len(world.kappa)
    train = world.kappa_train if curvature is not None else 0.0
    return Simulator(
        coordinates,
        Coefficients(world.eta, kappa, train, world.kind),
        np.full(len(world.kappa), world.start),
        curvature,
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 200), kind=st.sampled_from(KINDS), sources=st.integers(1, 3), groups=st.integers(1, 3))
def test_exact_when_the_truth_is_quadratic_and_nothing_is_cut(seed, kind, sources, groups):
    world = make_world(seed, kind=kind, sources=sources, groups=groups)
    coordinates, curvature = exact(world)
    rows = np.stack(schedules(world, 3, 12, seed=seed))
    # a short batch, an episode that ended, a step without rows
    rows[0, 4, 1:], rows[1, 7:], rows[2, 3] = NO_ROW, NO_ROW, NO_ROW
    got = simulator(world, coordinates, curvature).run(rows)
    true = np.stack([world.roll(r).losses for r in rows])
    assert np.abs(got - true).max() < 1e-9
    assert np.ptp(true, axis=1).min() > 1e-3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 200))
def test_inner_products_and_slopes_survive_the_change_of_axes(seed):
    world = make_world(seed)
    coordinates, _ = exact(world)
    assert np.allclose(coordinates.rows @ coordinates.rows.T, world.rows @ world.rows.T, atol=1e-9)
    assert np.allclose(coordinates.rows @ coordinates.slopes.T, world.rows @ world.slopes.T, atol=1e-9)
    assert np.allclose(coordinates.frame.place_sketch(world.rows), coordinates.rows, atol=1e-9)
    assert coordinates.kept == pytest.approx(1)
    assert np.abs(coordinates.lost).max() < 1e-9


def test_equal_directions_and_dependent_ones_make_a_smaller_basis():
    world = make_world(3)
    twin = make_world(3, slopes=world.slopes[[0, 0, 2]])
    coordinates, _ = exact(twin)
    assert coordinates.frame.inverse.shape == (2, 3)
    assert np.allclose(coordinates.rows @ coordinates.slopes.T, twin.rows @ twin.slopes.T, atol=1e-9)


def test_linear_parts_stay_exact_however_much_is_cut_and_whatever_the_sketch():
    world = make_world(1)
    sketch = stream(0, "sketch").numpy().normal(size=(12, 7)) / np.sqrt(7)
    for measured in (True, False):
        for kind in ("principal", "random"):
            given_ = signals(world, sketch, measured)
            coordinates = make_coordinates(given_, stream(0, "axes"), dim=2, kind=kind)
            assert coordinates.rows.shape[1] == 5
            assert coordinates.measured == measured
            assert np.allclose(coordinates.rows @ coordinates.slopes.T, world.rows @ world.slopes.T, atol=1e-9)


def test_what_the_axes_leave_out_counts_for_the_length_of_a_normalized_step():
    world = make_world(2)
    cut = make_coordinates(signals(world), stream(0, "axes"), dim=1)
    whole = np.square(cut.rows).sum(1) + cut.lost
    assert np.allclose(whole, np.square(world.rows).sum(1), atol=1e-9)
    assert cut.kept < 0.9
    one = Simulator(cut, Coefficients(0.1, (0.0,) * 3, kind="normalized"), np.zeros(3))
    got = one.run(np.arange(60)[:, None, None])[:, 1]
    true = -0.1 * world.rows @ world.slopes.T / np.linalg.norm(world.rows, axis=1)[:, None]
    assert np.allclose(got, true, atol=1e-9)


def test_random_axes_keep_lengths_on_average():
    world = make_world(4, size=200)
    true = np.square(world.rows).sum(1)
    ratios = []
    for seed in range(20):
        coordinates = make_coordinates(signals(world), stream(seed, "axes"), dim=64, kind="random")
        ratios.append(np.mean(np.square(coordinates.rows).sum(1) / true))
    # rows share directions, so one draw is off by about sqrt(2/64)
    assert np.mean(ratios) == pytest.approx(1, abs=4 * np.sqrt(2 / 64 / 20))
    assert np.std(ratios) > 0.01


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), kind=st.sampled_from(KINDS))
def test_many_episodes_at_once_equal_one_after_another_and_equal_run(seed, kind):
    world = make_world(seed, kind=kind)
    coordinates, curvature = exact(world)
    rows = np.stack(schedules(world, 4, 6, seed=seed))
    rows[2, 3:] = NO_ROW
    together = simulator(world, coordinates, curvature)
    first = together.reset(4)
    seen = [np.column_stack([first.protect, first.target])]
    for t in range(6):
        now = together.step(rows[:, t])
        seen.append(np.column_stack([now.protect, now.target]))
    assert np.allclose(np.stack(seen, axis=1), together.run(rows), atol=1e-12)
    for e in range(4):
        alone = simulator(world, coordinates, curvature)
        alone.reset(1)
        for t in range(6):
            now = alone.step(rows[e : e + 1, t])
            assert np.allclose(np.append(now.protect[0], now.target[0]), seen[t + 1][e], atol=1e-12)


def test_rewards_and_costs_telescope_through_the_environment():
    world = make_world(5)
    coordinates, curvature = exact(world)
    sim = simulator(world, coordinates, curvature)
    members = tuple(tuple(range(k, 60, 4)) for k in range(4))
    table = Table(members, np.ones(60, dtype=int), np.eye(4), tuple("abcd"), np.zeros(4, dtype=bool))
    episodes = Episodes(table, sim, Terms(3, 30, np.array([0.1, 0.1])), stream(0, "episodes"))
    seen = episodes.reset(0, 3)
    reward, cost, random = np.zeros(3), np.zeros((3, 2)), stream(0, "act").numpy()
    taken = []
    while not seen.done.all():
        step = episodes.step(np.where(seen.mask, random.random(seen.mask.shape), -1).argmax(axis=1))
        reward, cost, seen = reward + step.reward, cost + step.cost, step.observation
        taken.append(step.rows)
    for e, rows in enumerate(np.stack(taken, axis=1)):
        true = world.roll(rows).losses
        assert reward[e] == pytest.approx(true[0, -1] - true[-1, -1], abs=1e-9)
        assert np.allclose(cost[e], true[-1, :-1] - true[0, :-1], atol=1e-9)


def test_the_best_plan_of_order_1_is_the_linear_program_over_clusters():
    world = make_world(6, n=24, groups=4, weights=np.ones(24))
    # rows of a cluster alike, so that a plan is a count per cluster
    middle = np.stack([world.rows[world.group == k].mean(axis=0) for k in range(4)])
    world = make_world(6, n=24, groups=4, weights=np.ones(24), rows=middle[world.group])
    coordinates, _ = exact(world)
    sim = simulator(world, coordinates, None)
    members = [np.flatnonzero(world.group == k) for k in range(4)]
    steps, capacity = 5, 3  # batches of 2 rows, 6 rows per cluster
    best, limit = -np.inf, 0.15
    counts = [np.array(c) for c in np.ndindex(*(capacity + 1,) * 4) if sum(c) == steps]
    plans = []
    for count in counts:
        order = np.repeat(np.arange(4), count)
        used = [0] * 4
        rows = []
        for k in order:
            rows.append(members[k][used[k] : used[k] + 2])
            used[k] += 2
        plans.append(rows)
    ends = sim.run(np.array(plans))[:, -1] - world.start
    gains, rises = -ends[:, -1], ends[:, :-1]
    best = gains[(rises <= limit).all(axis=1)].max()
    each = world.eta * middle @ world.slopes.T  # fall of each loss per batch
    relaxed = linprog(-each[:, -1], A_ub=-each[:, :-1].T, b_ub=[limit] * 2, A_eq=np.ones((1, 4)), b_eq=[steps],
                      bounds=(0, capacity))  # fmt: skip
    exactly = linprog(-each[:, -1], A_ub=-each[:, :-1].T, b_ub=[limit] * 2, A_eq=np.ones((1, 4)), b_eq=[steps],
                      bounds=(0, capacity), integrality=np.ones(4))  # fmt: skip
    assert relaxed.status == exactly.status == 0
    assert not (rises <= limit).all()  # the constraint binds somewhere, so the test can fail
    assert best == pytest.approx(-exactly.fun, abs=1e-9)
    assert best <= -relaxed.fun + 1e-9


def test_a_step_beyond_the_trusted_ones_is_refused_and_run_is_not():
    world = make_world(7)
    coordinates, curvature = exact(world)
    sim = simulator(world, coordinates, curvature).within(2)
    rows = np.stack(schedules(world, 1, 3))
    sim.reset(1)
    sim.step(rows[:, 0])
    sim.step(rows[:, 1])
    with pytest.raises(ConfigError, match="at most 2 steps"):
        sim.step(rows[:, 2])
    assert sim.run(rows).shape == (1, 4, 3)
    sim.reset(1)
    sim.step(rows[:, 0])


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), rank=st.integers(1, 12))
def test_factor_is_the_best_low_rank_form_of_the_mean_outer_product(n, rank):
    features = stream(n, "features").numpy().normal(size=(n, 8))
    f, whole = factor(features, rank), features.T @ features / n
    values = np.linalg.eigvalsh(whole)[::-1]
    if n <= rank or rank >= 8:
        assert np.allclose(f.T @ f, whole)
    else:
        assert np.linalg.norm(f.T @ f - whole, 2) == pytest.approx(max(values[rank], 0), abs=1e-9)


def test_groups_without_members_apart_equal_one_group_when_their_curvature_is_the_same():
    world = make_world(8)
    coordinates, _ = exact(world)
    features = [coordinates.rows[:9]] * 3
    one = make_curvature(coordinates, features)
    two = make_curvature(coordinates, features, group=np.arange(60) % 2)
    same = type(two)(two.losses, np.repeat(one.train, 2, axis=0), two.group)
    rows = np.stack(schedules(world, 2, 5))
    a, b = (simulator(world, coordinates, c).run(rows) for c in (one, same))
    assert np.allclose(a, b, atol=1e-12)
    assert not np.allclose(a, simulator(world, coordinates, two).run(rows), atol=1e-6)


def test_an_epoch_of_episodes_is_fast():
    random = stream(0, "speed").numpy()
    world = make_world(0, n=400, size=128, groups=10, weights=np.ones(400), rows=random.normal(size=(400, 128)))
    coordinates = make_coordinates(signals(world), stream(0, "axes"), dim=125)
    curvature = make_curvature(coordinates, [coordinates.rows[:200]] * 3)
    rows = np.stack([random.permutation(400)[:320].reshape(40, 8) for _ in range(32)])
    took = {}
    for order, kind in ((1, None), (2, curvature)):
        sim = simulator(make_world(0, eta=1e-3), coordinates, kind)
        best = np.inf
        for _ in range(5):
            started = time.process_time()
            sim.reset(32)
            for t in range(40):
                sim.step(rows[:, t])
            best = min(best, time.process_time() - started)
        took[order] = 1e3 * best
    print(f"32 episodes of 40 steps, q 128: order 1 {took[1]:.1f} ms, order 2 {took[2]:.1f} ms")
    assert took[2] < 150  # 30 ms on a free core; a busy one must not turn this red
