"""The set-level linear program against HiGHS, weak duality, complementary slackness, infeasibility."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from gradsift.errors import NumericsError
from gradsift.geometry.certify import certify
from gradsift.geometry.dual import solve_dual
from gradsift.geometry.feasible import NoChoiceError
from gradsift.geometry.program import Program, set_program
from gradsift.geometry.rounding import round_whole

QUICK = settings(max_examples=25, deadline=None)


def reference(program: Program):
    """The same program by HiGHS, all rows at once; brought to size 1 first, for its tolerances are absolute."""
    gain_size = max(float(np.abs(program.gain).max()), 1e-300)
    sizes = np.maximum(np.abs(program.dots).max(axis=0, initial=0), 1e-300)
    program = dataclasses.replace(
        program, gain=program.gain / gain_size, dots=program.dots / sizes, allowance=program.allowance / sizes
    )
    budget = program.cost[None]
    full = program.fill == "full"
    matrix = -program.dots.T if full else np.vstack([-program.dots.T, budget])
    right = program.allowance if full else np.append(program.allowance, program.total)
    result = linprog(
        -program.gain,
        A_ub=matrix if len(matrix) else None,
        b_ub=right if len(right) else None,
        A_eq=budget if full else None,
        b_eq=[program.total] if full else None,
        bounds=(0, 1),
        method="highs",
    )
    result.fun = None if result.fun is None else result.fun * gain_size
    return result


@st.composite
def programs(draw, max_rows: int = 300, allowance: str = "any", rounded: bool | None = None) -> Program:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.integers(1, max_rows)), draw(st.integers(0, 5))
    gain = rng.normal(size=n) + draw(st.sampled_from([0.0, -0.5, 2.0]))
    dots = rng.normal(size=(n, m)) - draw(st.sampled_from([0.0, 0.3, 1.0])) - 0.4 * gain[:, None]
    dots *= 10.0 ** draw(st.sampled_from([-4, 0, 3]))
    gain = gain * 10.0 ** draw(st.sampled_from([-6, 0, 4]))
    if rounded if rounded is not None else draw(st.booleans()):  # few distinct values: ties and equal rows
        gain, dots = (
            np.round(gain / np.abs(gain).max() * 2),
            np.round(dots / max(np.abs(dots).max(initial=0), 1e-300) * 2),
        )
    eps = np.zeros(m)
    if allowance == "any":
        eps = rng.normal(size=m) * np.abs(dots).sum(axis=0) * draw(st.sampled_from([0.0, 0.05, 0.3]))
    fill = draw(st.sampled_from(["full", "positive"]))
    if draw(st.booleans()):
        return set_program(gain, dots, eps, rows=draw(st.integers(1, n)), fill=fill)
    cost = rng.integers(1, 60, n).astype(float)
    total = float(draw(st.floats(0.01, 1.0)) * cost.sum()) if n > 1 else float(cost.sum())
    return set_program(gain, dots, eps, cost=cost, total_cost=max(1.0, round(total)), fill=fill)


@QUICK
@given(programs())
def test_equals_highs_and_refuses_exactly_what_highs_refuses(program):
    want = reference(program)
    size = max(float(np.abs(program.gain).sum()) * program.total / program.cost.sum(), 1e-300)
    try:
        solution = solve_dual(program)
    except NoChoiceError as error:
        proof = error.proof
        # The proof needs nothing of ours: one top-B by the mixed dots.
        mixed = program.dots @ proof.prices
        assert proof.prices.min() >= 0
        assert proof.prices.sum() == pytest.approx(1)
        assert program.best_response(mixed) @ mixed + proof.prices @ program.allowance < 0
        assert want.status == 2 or proof.relaxation < 1e-6 * program.units.max()
        relaxed = dataclasses.replace(program, allowance=program.allowance + proof.relaxation * (1 + 1e-9))
        solve_dual(relaxed)  # enough
        if proof.relaxation > 1e-6 * program.units.max():  # and needed
            with pytest.raises(NoChoiceError):
                solve_dual(dataclasses.replace(program, allowance=program.allowance + proof.relaxation * 0.99))
        return
    assert want.status in (0, 2)
    if want.status == 2:  # feasible only to within rounding
        assert (solution.slack >= -1e-8 * program.units).all()
        return
    assert abs(solution.lp_value + want.fun) <= 1e-6 * max(abs(want.fun), 1e-3 * size)
    assert solution.upper_bound >= solution.lp_value
    assert solution.gap_lp <= 1e-6 or solution.upper_bound - solution.lp_value <= 1e-9 * size
    assert ((solution.w >= 0) & (solution.w <= 1)).all()
    assert (solution.slack >= -1e-8 * program.units).all()
    used = float(program.cost @ solution.w)
    assert (
        used == pytest.approx(program.total, rel=1e-8) if program.fill == "full" else used <= program.total * (1 + 1e-8)
    )
    assert solution.num_fractional <= program.dots.shape[1] + 1
    # Complementary slackness: a price is paid only where the constraint binds.
    assert solution.prices.min(initial=0) >= 0
    assert (np.abs(solution.prices * solution.slack) <= 1e-6 * size).all()


@QUICK
@given(programs(max_rows=60, allowance="zero"), st.integers(0, 2**32 - 1))
def test_weak_duality_any_prices_bound_any_feasible_choice(program, seed):
    rng = np.random.default_rng(seed)
    prices = rng.exponential(size=program.dots.shape[1]) * rng.choice([0.0, 1.0, 100.0])
    w = rng.uniform(size=len(program.gain))
    w = w * min(1.0, program.total / float(program.cost @ w))
    if program.fill == "full" and program.by_rows:
        w = np.zeros(len(w))
        w[rng.permutation(len(w))[: round(program.total)]] = 1.0
    elif program.fill == "full":
        assume(float(program.cost @ w) == pytest.approx(program.total))
    allowed = dataclasses.replace(program, allowance=np.maximum(0.0, -(w @ program.dots)))
    score = allowed.score(prices)
    q = float(allowed.best_response(score) @ score + prices @ allowed.allowance)
    scale = float(np.abs(program.gain).sum() + np.abs(program.dots @ prices).sum())
    assert q >= float(w @ program.gain) - 1e-9 * scale
    solution = solve_dual(allowed)
    assert solution.upper_bound >= float(w @ program.gain) - 1e-6 * scale


@QUICK
@given(programs(max_rows=80, rounded=False), st.integers(0, 2**32 - 1))
def test_row_order_and_units_do_not_matter(program, seed):
    try:
        base = solve_dual(program)
    except NoChoiceError:
        assume(False)
    p = np.random.default_rng(seed).permutation(len(program.gain))
    moved = dataclasses.replace(program, gain=program.gain[p], dots=program.dots[p], cost=program.cost[p])
    other = solve_dual(moved)
    np.testing.assert_allclose(other.w, base.w[p], atol=1e-6)
    scaled = solve_dual(
        dataclasses.replace(program, gain=program.gain * 7e3, dots=program.dots / 64, allowance=program.allowance / 64)
    )
    np.testing.assert_allclose(scaled.w, base.w, atol=1e-6)
    np.testing.assert_allclose(
        scaled.prices, base.prices * 7e3 * 64, rtol=1e-5, atol=1e-7 * 7e3 * 64 * max(1e-300, base.prices.max(initial=0))
    )


@QUICK
@given(programs(max_rows=40, allowance="zero"))
def test_best_response_is_the_best_and_breaks_ties_by_index(program):
    score = program.score(np.full(program.dots.shape[1], 0.3))
    w = program.best_response(score)
    bare = dataclasses.replace(program, gain=score, dots=program.dots[:, :0], allowance=np.zeros(0))
    assert float(w @ score) == pytest.approx(-reference(bare).fun, abs=1e-9 * max(1e-300, float(np.abs(score).sum())))
    ratio = score / program.cost
    for i, j in zip(*np.nonzero(ratio[:, None] == ratio[None]), strict=True):
        if i < j:
            assert w[i] >= w[j]


def test_two_thousand_rows_equal_highs():
    rng = np.random.default_rng(5)
    gain = rng.normal(size=2000)
    dots = rng.normal(size=(2000, 4)) - 0.1 - 0.4 * gain[:, None]
    program = set_program(gain, dots, np.zeros(4), rows=200)
    solution = solve_dual(program)
    assert solution.lp_value == pytest.approx(-reference(program).fun, rel=1e-9)
    assert solution.num_fractional == 5
    assert solution.iterations > 200


def test_unconstrained_optimum_that_keeps_the_allowances_costs_nothing():
    program = set_program(np.array([3.0, 2.0, 1.0]), np.array([[1.0], [0.0], [-9.0]]), np.zeros(1), rows=2)
    solution = solve_dual(program)
    assert solution.w.tolist() == [1, 1, 0]
    assert solution.prices.tolist() == [0]
    assert (solution.upper_bound, solution.lp_value, solution.num_fractional) == (5.0, 5.0, 0)


@pytest.mark.parametrize("where", ["gain", "dots", "allowance"])
def test_not_a_number_is_refused_by_name(where):
    parts = {"gain": np.ones(3), "dots": np.ones((3, 2)), "allowance": np.zeros(2)}
    parts[where].flat[0] = np.nan
    with pytest.raises(NumericsError, match=where):
        set_program(**parts, rows=1)


@pytest.mark.parametrize(
    "budget", [{}, {"rows": 0}, {"rows": 4}, {"cost": np.ones(3)}, {"cost": np.zeros(3), "total_cost": 1.0}]
)
def test_budget_that_is_none_is_our_own_mistake(budget):
    with pytest.raises(ValueError):
        set_program(np.ones(3), np.ones((3, 1)), np.zeros(1), **budget)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
def test_a_hundred_thousand_rows_take_seconds(tokens):
    rng = np.random.default_rng(1)
    gain = rng.normal(size=100_000)
    dots = 0.05 * rng.normal(size=(100_000, 5)) - 0.01 - 0.02 * gain[:, None]
    cost = rng.integers(5, 200, 100_000).astype(float)
    budget = {"cost": cost, "total_cost": float(cost.sum() // 10)} if tokens else {"rows": 10_000}
    start = time.process_time()
    solution = solve_dual(set_program(gain, dots, np.zeros(5), **budget))
    assert time.process_time() - start < 20
    assert solution.gap_lp <= 1e-9
    assert solution.num_fractional <= 6


def test_equal_ratios_go_to_the_smaller_index_in_long_lists_too():
    program = set_program(np.zeros(3000), np.zeros((3000, 0)), np.zeros(0), cost=np.full(3000, 2.0), total_cost=101.0)
    w = program.best_response(np.repeat([1.0, 2.0], 1500))
    np.testing.assert_array_equal(np.flatnonzero(w), np.arange(1500, 1551))
    assert w[1550] == 0.5


def test_the_vertex_is_exact_even_from_poor_prices(monkeypatch):
    monkeypatch.setattr("gradsift.geometry.dual.ASCENT_STEPS", 2)
    monkeypatch.setattr("gradsift.geometry.dual.POLISH_STEPS", 1)
    rng = np.random.default_rng(11)
    gain = rng.normal(size=1500)
    dots = rng.normal(size=(1500, 4)) - 0.1 - 0.4 * gain[:, None]
    program = set_program(gain, dots, np.zeros(4), rows=300)
    solution = solve_dual(program)
    assert solution.lp_value == pytest.approx(-reference(program).fun, rel=1e-9)
    assert solution.num_fractional == 5
    assert solution.iterations < 20


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-6, 1e6), m=st.integers(1, 2), tokens=st.booleans())
def test_equal_gains_have_no_spread_to_divide_by(seed, size, m, tokens):
    rng = np.random.default_rng(seed)
    gain = np.full(50, size)  # np.std of these is often a last bit, not 0
    budget = {"cost": np.full(50, 10.0), "total_cost": 105.0} if tokens else {"rows": 10}
    program = set_program(gain, rng.normal(size=(50, m)) - 0.1, np.zeros(m), **budget)
    try:
        solution = solve_dual(program)
    except NoChoiceError:
        return
    assert solution.lp_value == pytest.approx(size * (10.5 if tokens else 10), rel=1e-9)
    assert solution.gap_lp <= 1e-9


@pytest.mark.parametrize("size", [1e-6, 2.0, 1e6])
def test_a_bound_of_zero_leaves_the_gap_a_share_of_the_largest_gain(size):
    # Half of each row is worth 0 and opposes nothing; a whole row is the second, which loses.
    program = set_program(np.array([size, -size]), np.array([[-1.0], [1.0]]), np.zeros(1), rows=1)
    solution = solve_dual(program)
    whole = round_whole(program, solution, np.zeros(2))
    found = certify(program, solution, whole)
    assert (found.upper_bound, found.value) == (0.0, -size)
    assert found.gap == pytest.approx(1.0)
    assert (found.lp_gap, solution.gap_lp) == (0.0, 0.0)
