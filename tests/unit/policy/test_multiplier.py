"""Prices: signs, caps, units, and both rules against slow twins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError, NumericsError
from gradsift.policy.multiplier import MultiplierConfig, start_multiplier, update_multiplier, violation

PAPER, PI = MultiplierConfig(dual="paper"), MultiplierConfig()
limits = st.floats(0.01, 10).flatmap(lambda x: st.sampled_from([x, -x]))
costs = st.floats(-20, 20, allow_nan=False)


def run(config, trace, limit):
    state, prices = start_multiplier(1, config), []
    for cost in trace:
        state = update_multiplier(state, np.array([cost]), np.array([limit]), config)
        prices.append(float(state.price[0]))
    return state, prices


def test_first_adam_step_is_the_published_one():
    assert run(PAPER, [2.0], 1.0)[1] == [pytest.approx(0.036)]
    assert run(PAPER, [0.5], 1.0)[1] == [0.0]


@settings(deadline=None)
@given(costs, limits)
def test_signs(cost, limit):
    over = cost - limit
    for config in (PAPER, PI):
        start = replace(start_multiplier(1, config), price=np.array([1.0]), integral=np.array([1.0]))
        after = update_multiplier(start, np.array([cost]), np.array([limit]), config)
        value = after.price if config is PAPER else after.integral
        stuck = config is PI and config.proportional * over / abs(limit) + 1 > config.cap
        if abs(over) > 1e-6 and not stuck:
            assert np.sign(value[0] - 1.0) == np.sign(over)
        assert violation(np.array([cost]), np.array([limit]))[0] == over / abs(limit)


@settings(deadline=None)
@given(st.lists(costs, min_size=1, max_size=40), limits, st.sampled_from([PAPER, PI]))
def test_prices_stay_between_zero_and_cap_whatever_comes(trace, limit, config):
    state, prices = run(config, trace, limit)
    assert 0 <= min(prices) <= max(prices) <= config.cap
    assert 0 <= state.integral[0] <= config.cap
    assert state.num_steps == len(trace)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.1, 100), st.sampled_from([PAPER, PI]))
def test_the_unit_of_costs_does_not_matter(trace, unit, config):
    plain = run(config, trace, 1.0)[1]
    np.testing.assert_allclose(run(config, [c * unit for c in trace], unit)[1], plain, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(costs, costs), min_size=1, max_size=20), limits, limits, st.sampled_from([PAPER, PI]))
def test_sources_do_not_disturb_each_other(trace, first, second, config):
    state = start_multiplier(2, config)
    for pair in trace:
        state = update_multiplier(state, np.array(pair), np.array([first, second]), config)
    alone = [run(config, [pair[m] for pair in trace], limit)[1][-1] for m, limit in enumerate((first, second))]
    np.testing.assert_array_equal(state.price, alone)


def test_pi_against_a_twin_without_limits_on_the_price():
    trace, kept, integral, smooth = [1.2, 0.9, 1.5, 1.0, 0.7], [], 0.001, 0.2
    for step, cost in enumerate(trace):
        over = cost - 1.0
        smooth = over if step == 0 else 0.7 * smooth + 0.3 * over
        integral = max(0.0, integral + 0.1 * max(-1, min(1, over)))
        kept.append(max(0.0, 5.0 * smooth + integral))
    assert run(PI, trace, 1.0)[1] == pytest.approx(kept)


def test_the_integral_does_not_wind_up_at_the_cap():
    state, prices = run(PI, [100.0] * 200, 1.0)
    assert prices[-1] == PI.cap
    assert state.integral[0] < 0.2
    for _ in range(30):
        state = update_multiplier(state, np.array([0.5]), np.array([1.0]), PI)
    assert state.price[0] == 0.0


@pytest.mark.parametrize("limit", [0.0, np.nan, np.inf])
def test_a_limit_that_measures_nothing_is_refused(limit):
    with pytest.raises(ConfigError, match="finite and not 0"):
        violation(np.array([1.0]), np.array([limit]))


def test_a_cost_that_is_no_number_is_refused():
    with pytest.raises(NumericsError, match="not finite"):
        update_multiplier(start_multiplier(1, PI), np.array([np.nan]), np.array([1.0]), PI)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dual": "sgd"},
        {"cap": 0.0},
        {"start": -1.0},
        {"lr": 0.0},
        {"integral": 0.0},
        {"smoothing": 1.0},
        {"proportional": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        MultiplierConfig(**wrong)
