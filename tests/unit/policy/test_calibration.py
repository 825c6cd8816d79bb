"""Calibration finds the truth, validation catches what is wrong, and every roll-out is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from tests.quadratic import exact, make_world, schedules

from gradsift.errors import NumericsError
from gradsift.policy.accept import Bench, calibration_schedules, settle
from gradsift.policy.calibration import Rollout, _Fit, calibrate, side_by_side
from gradsift.policy.episodes import NO_ROW, Table, Terms
from gradsift.policy.simulator import KINDS, Coefficients, Simulator
from gradsift.policy.validation import Fit, validate
from gradsift.seeds import stream

LIMITS = np.array([0.2, 0.2])


def rolls(world, count, steps, seed, noise=0.0):
    return [world.roll(r, noise, f"{seed}/{i}") for i, r in enumerate(schedules(world, count, steps, seed=seed))]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 100), kind=st.sampled_from(KINDS))
def test_least_squares_finds_the_coefficients_and_the_kind_of_step(seed, kind):
    world = make_world(seed, kind=kind)
    coordinates, curvature = exact(world)
    found = calibrate(coordinates, rolls(world, 6, 12, seed=1), curvature)
    c = found.coefficients
    assert c.kind == kind
    assert found.order == 2
    assert set(found.held_out) == {f"{k}/{o}" for k in KINDS for o in (1, 2)}
    assert c.eta == pytest.approx(world.eta, rel=1e-5)
    assert c.train == pytest.approx(world.kappa_train, rel=1e-4)
    assert np.allclose(c.losses, world.kappa, rtol=1e-4)
    assert max(found.error) < 1e-5
    assert (found.num_rollouts, found.num_steps) == (6, 72)


def test_order_1_is_the_closed_form_and_multipliers_stay_at_least_0():
    world = make_world(2, kappa=np.zeros(3), kappa_train=0.0)
    coordinates, curvature = exact(world)
    data = rolls(world, 6, 12, seed=1)
    straight = calibrate(coordinates, data)
    assert straight.coefficients.eta == pytest.approx(world.eta, rel=1e-9)
    assert straight.coefficients.losses == (0.0, 0.0, 0.0)
    # a truth that curves the other way: the best multiplier in reach is 0
    bent = make_world(2, kappa=np.full(3, -0.4), kappa_train=0.0)
    best = calibrate(coordinates, rolls(bent, 6, 12, seed=1), curvature)
    assert best.order == 1
    found = _Fit.of(coordinates, curvature, side_by_side(rolls(bent, 6, 12, seed=1)), np.ones(3), "plain").solve()
    assert min(found.losses) >= 0
    assert found.train >= 0
    assert found.eta > 0


def test_curvature_that_has_nothing_to_do_with_the_truth_loses_to_order_1():
    world = make_world(4, kappa=np.zeros(3), kappa_train=0.0)
    coordinates, curvature = exact(world)
    found = calibrate(coordinates, rolls(world, 6, 12, seed=1, noise=0.05), curvature, kinds=("plain",))
    assert found.order == 1
    assert found.coefficients.eta == pytest.approx(world.eta, rel=0.1)


def test_one_roll_out_is_enough_for_a_fit():
    world = make_world(4)
    coordinates, curvature = exact(world)
    found = calibrate(coordinates, rolls(world, 1, 12, seed=1), curvature)
    assert found.coefficients.eta == pytest.approx(world.eta, rel=1e-4)


def test_roll_outs_that_contradict_the_geometry_give_a_step_of_0_not_a_negative_one():
    world = make_world(2, kappa=np.zeros(3), kappa_train=0.0)
    coordinates, _ = exact(world)
    backwards = [Rollout(r.name, r.rows, 4 - r.target, 4 - r.protect) for r in rolls(world, 6, 12, seed=1)]
    found = calibrate(coordinates, backwards)
    assert found.coefficients.eta == 0
    sim = Simulator(coordinates, found.coefficients, np.full(3, 2.0))
    checked = validate(sim, backwards, LIMITS)
    assert checked.horizon == 0
    assert not checked.trusted
    assert "not trusted for any number of steps" in checked.sentence


def test_a_loss_that_never_moved_is_refused_by_name():
    world = make_world(2)
    coordinates, _ = exact(world)
    flat = [Rollout(r.name, r.rows, np.full(13, 2.0), r.protect) for r in rolls(world, 2, 12, seed=1)]
    with pytest.raises(NumericsError, match="loss target"):
        calibrate(coordinates, flat)
    with pytest.raises(NumericsError, match="not finite"):
        Rollout("x", flat[0].rows, np.full(13, np.nan), flat[0].protect)


@pytest.mark.parametrize("seed", range(5))
def test_the_right_simulator_is_trusted_and_a_step_size_three_times_wrong_is_caught(seed):
    world = make_world(seed)
    coordinates, curvature = exact(world)
    found = calibrate(coordinates, rolls(world, 6, 12, seed=1), curvature)
    sim = Simulator(coordinates, found.coefficients, np.full(3, world.start), curvature)
    fresh = rolls(world, 4, 12, seed=2)
    good = validate(sim, fresh, LIMITS)
    assert good.trusted
    assert good.horizon == 12
    assert good.sentence.startswith("the simulator is trusted for 12 of 12")
    assert good.feasible.sum() == 4
    assert good.feasible[0, 1] == good.feasible[1, 0] == 0
    for wrong in (3.0, 1 / 3):
        bad = validate(sim.scaled(wrong), fresh, LIMITS)
        assert not bad.trusted
        assert bad.horizon < 12
        assert any("normalized error" in failure for fit in bad.whole for failure in fit.failures)


def test_each_of_the_three_figures_can_fail_alone():
    assert Fit("x", 0.5, 0.8, 0.8, 0.0).failures == ()
    for bad in (Fit("x", 0.51, 0.8, 0.8, 0.0), Fit("x", 0.5, 0.79, 0.8, 0.0), Fit("x", 0.5, 0.8, 0.79, 0.0)):
        assert len(bad.failures) == 1
    assert len(Fit("x", np.nan, np.nan, np.nan, 0.0).failures) == 3


def test_the_right_ends_by_the_wrong_steps_are_not_trusted():
    world = make_world(3, kappa=np.zeros(3), kappa_train=0.0)
    coordinates, _ = exact(world)
    sim = Simulator(coordinates, Coefficients(world.eta, (0.0, 0.0, 0.0)), np.full(3, world.start))
    swapped = []
    for r in rolls(world, 4, 12, seed=2):
        steps = np.diff(r.losses, axis=0)[::-1]
        losses = np.concatenate([r.losses[:1], r.losses[0] + np.cumsum(steps, axis=0)])
        swapped.append(Rollout(r.name, r.rows, losses[:, -1], losses[:, :-1]))
    got = validate(sim, swapped, LIMITS)
    assert max(fit.error for fit in got.whole) < 1e-9
    assert not got.trusted
    assert all("Spearman" in " ".join(fit.failures) for fit in got.whole)


def test_noise_in_the_losses_lowers_the_horizon():
    world = make_world(1, kappa_train=0.2)
    coordinates, curvature = exact(world)
    sim = Simulator(coordinates, Coefficients(world.eta, tuple(world.kappa), 0.2), np.full(3, world.start), curvature)
    size = np.abs(np.diff(rolls(world, 4, 12, seed=2)[0].losses, axis=0)).mean()
    seen = []
    for noise in (0.0, 0.2, 4.0):
        got = [validate(sim, rolls(world, 4, 12, seed=s, noise=noise * size), LIMITS).horizon for s in range(2, 8)]
        seen.append(np.mean(got))
    print("mean horizon of 12 at noise 0, 0.2 and 4 increments:", seen)
    assert seen[0] == 12
    assert seen[0] > seen[1] > seen[2]


def test_order_1_of_a_curved_truth_has_a_horizon_between_nothing_and_everything():
    world = make_world(0, kind="normalized", kappa_train=0.7)
    coordinates, _ = exact(world)
    straight = Simulator(coordinates, calibrate(coordinates, rolls(world, 6, 15, seed=1)).coefficients, np.full(3, 2.0))
    checked = validate(straight, rolls(world, 4, 15, seed=9), LIMITS)
    assert 0 < checked.horizon < 15
    assert f"trusted for {checked.horizon} of 15 steps" in checked.sentence
    assert "over all 15 steps" in checked.sentence


def test_figures_against_a_plain_loop_also_for_episodes_of_unequal_length():
    world = make_world(3)
    coordinates, _ = exact(world)
    sim = Simulator(coordinates, Coefficients(0.05, (0.0, 0.0, 0.0)), np.full(3, 2.0))
    data = rolls(world, 3, 10, seed=4)
    data[1] = Rollout("short", data[1].rows[:6], data[1].target[:7], data[1].protect[:7])
    got = validate(sim, data, LIMITS)
    for a, fit in enumerate(got.whole):
        guess, real, ends = [], [], []
        for roll in data:
            path = sim.run(roll.rows[None])[0, :, a]
            guess += list(np.diff(path))
            real += list(np.diff(roll.losses[:, a]))
            ends.append((path[-1] - path[0], roll.losses[-1, a] - roll.losses[0, a]))
        assert len(guess) == 26
        x, y = np.array(ends).T
        assert fit.spearman == pytest.approx(spearmanr(guess, real).statistic)
        assert fit.sign == pytest.approx(np.mean(np.sign(guess) == np.sign(real)))
        assert fit.error == pytest.approx(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))
        assert fit.bias == pytest.approx(np.mean(x - y))
    table = np.zeros((2, 2), dtype=int)
    for roll in data:
        p = sim.run(roll.rows[None])[0]
        table[int((p[-1] - p[0])[:2].max() <= 0.2), int((roll.losses[-1] - roll.losses[0])[:2].max() <= 0.2)] += 1
    assert np.array_equal(got.feasible, table)


def bench(world, coordinates, curvature):
    members = tuple(tuple(range(k, 60, 5)) for k in range(5))
    table = Table(members, np.ones(60, dtype=int), np.eye(5), tuple("abcde"), np.zeros(5, dtype=bool))
    return Bench(table, Terms(3, 30, LIMITS), coordinates, curvature, stream(0, "bench"))


def test_calibration_schedules_are_six_valid_ones_with_the_best_and_the_worst_cluster_first():
    world = make_world(0)
    coordinates, _ = exact(world)
    made = calibration_schedules(bench(world, coordinates, None))
    assert len(made) == 6
    for rows in made:
        taken = rows[rows != NO_ROW]
        assert len(taken) == len(set(taken)) == 30
    gain = [(world.rows[k::5] @ world.slopes[-1]).mean() for k in range(5)]
    assert set(made[2][:4].ravel() % 5) == {int(np.argmax(gain))}
    assert set(made[3][:4].ravel() % 5) == {int(np.argmin(gain))}
    assert len({rows.tobytes() for rows in made}) == 6
    again = calibration_schedules(bench(world, coordinates, None))
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))


def test_an_exact_simulator_is_accepted_in_the_first_round_and_its_cost_is_counted():
    world = make_world(0)
    coordinates, curvature = exact(world)
    asked = []

    def plan(sim):
        asked.append(sim.coefficients.eta)
        return schedules(world, 1, 10, seed=77)[0]

    got = settle(bench(world, coordinates, curvature), world.roll, [plan, plan])
    assert got.accepted
    assert got.num_rounds == 1
    assert len(asked) == 2
    assert asked[0] == pytest.approx(world.eta, rel=1e-4)
    # both planners made the same schedule, which is one roll-out
    assert got.cost == {"num_rollouts": 9, "num_decisions": 90, "num_tokens": 270, "seconds": 4.5}
    assert "9 roll-outs, 90 decisions and 270 tokens" in got.sentence
    assert "fall back" not in got.sentence
    assert got.simulator.max_steps == 10


def test_noise_ends_in_a_fall_back_after_three_rounds_each_with_more_roll_outs():
    world = make_world(0)
    coordinates, curvature = exact(world)
    played = []

    def roll(rows):
        played.append(rows)
        return world.roll(rows, 3.0, str(len(played)))

    got = settle(bench(world, coordinates, curvature), roll, [lambda _: schedules(world, 1, 10, seed=5)[0]] * 2)
    assert not got.accepted
    assert got.num_rounds == 3
    assert len(played) == 6 + 3 * 4
    # both planners come back to one schedule: fresh once, in the first round
    assert got.calibration.num_rollouts == 6 + 3 + 2
    assert got.validation.num_rollouts == 2
    assert "fall back to ogs_dual" in got.sentence
    assert f"{len({rows.tobytes() for rows in played})} roll-outs" in got.sentence
    # the mixtures are fresh every round
    assert len({rows.tobytes() for rows in played}) == 18 - 5


def test_a_roll_out_of_other_rows_is_our_own_mistake():
    world = make_world(0)
    coordinates, _ = exact(world)
    with pytest.raises(ValueError, match="other rows"):
        settle(bench(world, coordinates, None), lambda rows: world.roll(rows[::-1].copy()), [])


def test_a_pool_whose_every_schedule_was_in_the_fit_is_not_trusted(monkeypatch):
    """The truth is exact, so only the lack of a fresh roll-out can be the reason."""
    world = make_world(0)
    coordinates, curvature = exact(world)
    some = schedules(world, 1, 10, seed=5)
    monkeypatch.setattr("gradsift.policy.accept._mixtures", lambda *_: tuple(some))
    got = settle(bench(world, coordinates, curvature), world.roll, [], calibration=some * 6)
    assert not got.accepted
    assert got.validation.horizon == 0
