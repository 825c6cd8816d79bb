"""The screen's three steps: the fit against a plain solver, Good-Turing's estimate, and the certificate's coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError
from gradsift.geometry.screen import certify_screen, fit_screen, possible_rows

ROWS, CHOSEN, KEPT, DRAWN = 2000, 200, 500, 150
WORLDS = 400


def planted(seed, rho=0.7):
    """Exact scores and what a screen of rank correlation about rho makes of them."""
    generator = np.random.default_rng(seed)
    exact = generator.normal(size=ROWS)
    return exact, rho * exact + math.sqrt(1 - rho**2) * generator.normal(size=ROWS)


def at_random(seed, out, screen):
    return np.random.default_rng((seed, 1)).choice(out, size=DRAWN, replace=False)


def surest_rejects(seed, out, screen):
    return out[np.argsort(screen[out])[:DRAWN]]


def first_rows_of_a_sorted_file(seed, out, screen):
    exact, _ = planted(seed)
    return out[np.argsort(exact[out])[:DRAWN]]  # a file sorted by difficulty, its beginning taken for a sample


def covered(draw, **options):
    """Share of planted worlds in which the bound holds, and the mean bound; also the mean share that was lost."""
    held, bounds, lost = [], [], []
    for seed in range(WORLDS):
        exact, screen = planted(seed, **options)
        order = np.argsort(-screen)
        kept, out = order[:KEPT], np.sort(order[KEPT:])
        sample = draw(seed, out, screen)
        measured = np.concatenate([kept, sample])
        best = measured[np.argsort(-exact[measured])[:CHOSEN]]
        drawn = set(sample.tolist())
        found = certify_screen(len(out), len(sample), [n for n, row in enumerate(best) if row in drawn], len(best))
        wanted = set(np.argsort(-exact)[:CHOSEN].tolist())
        truth = len(wanted - set(measured.tolist()))
        held.append(truth <= found.high)
        bounds.append(found.high_share)
        lost.append(truth / CHOSEN)
    return float(np.mean(held)), float(np.mean(bounds)), float(np.mean(lost))


def refuse_low_coverage(draw, slack=0.2, **options):
    share, bound, lost = covered(draw, **options)
    # 95% asked; 400 worlds know it to +-2.2% at 2 standard errors.
    assert share >= 0.95 - 0.022
    assert lost <= bound <= lost + slack


# Rule of three: no row found among 150 of 1,500 leaves 30 rows of 200 possible, so no bound can be much nearer than 0.15.
@pytest.mark.parametrize("rho", [0.95, 0.9, 0.7, 0.5, 0.0])
def test_the_bound_holds_in_95_of_100_planted_worlds_and_is_near(rho):
    refuse_low_coverage(at_random, rho=rho)


@pytest.mark.parametrize("draw", [surest_rejects, first_rows_of_a_sorted_file])
def test_a_sample_that_is_not_random_is_seen_to_fail(draw):
    with pytest.raises(AssertionError):
        refuse_low_coverage(draw)
    assert covered(draw)[0] < 0.5


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_bound_is_the_largest_number_that_the_sample_does_not_exclude(data):
    """Slow twin: binomial coefficients, one number after the other."""
    out = data.draw(st.integers(0, 40))
    drawn = data.draw(st.integers(0, out))
    chosen = data.draw(st.integers(0, 60))
    places = data.draw(st.lists(st.integers(0, max(0, chosen - 1)), max_size=min(drawn, chosen), unique=True))
    got = certify_screen(out, drawn, places, chosen, 0.9)
    strict = lenient = 0  # a probability of exactly 0.1 may fall on either side in floating point
    for lost in range(min(out - drawn, chosen) + 1):
        seen = sum(place < chosen - lost for place in places)
        inside = lost + seen
        ways = sum(math.comb(inside, k) * math.comb(out - inside, drawn - k) for k in range(min(seen, drawn) + 1))
        if ways * 10 > math.comb(out, drawn):
            strict = lost
        if ways * 10 >= math.comb(out, drawn):
            lenient = lost
    assert strict <= got.high <= lenient
    assert 0 <= got.estimate <= 1
    assert 0 <= got.high_share <= 1


def test_golden_bounds():
    none = certify_screen(1000, 100, (), 100)
    assert none.high == 28  # 0.9^28 = 0.052, 0.9^29 = 0.047; the rule of three says 30
    assert none.high_share == pytest.approx(0.28)
    assert none.estimate == 0
    everything = certify_screen(50, 50, (0, 3, 5, 19), 20)
    assert (everything.high, everything.estimate) == (0, 0.0)  # nothing is unmeasured
    assert certify_screen(0, 0, (), 20).high_share == 0
    assert certify_screen(50, 0, (), 20).high == 20  # nothing was looked at: all may be lost
    # A drawn row at the very end of the choice is there for want of better ones: it says less than one at its head.
    assert certify_screen(1000, 100, (99,), 100).high < certify_screen(1000, 100, (0,), 100).high
    assert certify_screen(1000, 100, (0,), 100).likely == 9
    with pytest.raises(ValueError, match="impossible"):
        certify_screen(10, 11, (), 5)
    with pytest.raises(ValueError, match="impossible"):
        certify_screen(10, 5, (5,), 5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(12, 60), p=st.integers(1, 6), q=st.integers(1, 3))
def test_the_fit_and_its_residuals_equal_refitting_without_each_row(seed, n, p, q):
    generator = np.random.default_rng(seed)
    cheap = generator.normal(size=(n, p)) * generator.uniform(0.1, 50, size=p) + generator.normal(size=p) * 10
    exact = cheap @ generator.normal(size=(p, q)) + generator.normal(size=(n, q))
    fit = fit_screen(cheap, exact, ridge=1e-3)
    standard = (cheap - cheap.mean(0)) / cheap.std(0)

    def solve(x, y):
        """Stacked least squares with penalty rows, no closed form."""
        top = np.concatenate([np.ones((len(x), 1)), x], 1)
        extra = np.concatenate([np.zeros((p, 1)), np.eye(p) * math.sqrt(1e-3 * n)], 1)
        return np.linalg.lstsq(np.concatenate([top, extra]), np.concatenate([y, np.zeros((p, q))]), rcond=None)[0]

    whole = solve(standard, exact)
    np.testing.assert_allclose(fit.predict(cheap), np.concatenate([np.ones((n, 1)), standard], 1) @ whole, atol=1e-6)
    for row in range(0, n, 5):
        rest = np.arange(n) != row
        there = solve(standard[rest], exact[rest])
        np.testing.assert_allclose(
            fit.residual[row], exact[row] - np.concatenate([[1.0], standard[row]]) @ there, atol=1e-6
        )


def test_columns_that_do_not_vary_or_repeat_each_other_do_no_harm():
    generator = np.random.default_rng(0)
    one = generator.normal(size=50)
    cheap = np.stack([one, one, np.full(50, 3.0)], 1)
    fit = fit_screen(cheap, one[:, None] * 2)
    np.testing.assert_allclose(fit.predict(cheap)[:, 0], 2 * one, atol=0.02)
    with pytest.raises(ConfigError, match="too few rows"):
        fit_screen(cheap[:4], one[:4, None])


def test_worlds_are_drawn_until_little_is_new_and_the_estimate_is_right():
    """The share of a fresh choice that is not in the union, against Good and Turing's estimate of it."""
    estimates, truths = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        score = np.sort(generator.normal(size=300))

        def choose(number, score=score, seed=seed):
            noise = np.random.default_rng((seed, number)).normal(size=300)
            return set(np.argsort(-(score + 0.5 * noise))[:30].tolist())

        got = possible_rows(choose, miss=1e-9, least=10, most=10)
        fresh = [choose(1000 + n) for n in range(20)]
        estimates.append(got.unseen)
        truths.append(np.mean([len(f - got.rows) / 30 for f in fresh]))
    assert 1.0 <= np.mean(estimates) / np.mean(truths) <= 1.3  # it is about one world fewer, so it errs upwards
    few = possible_rows(choose, miss=0.2, least=2, most=200)
    many = possible_rows(choose, miss=0.02, least=2, most=200)
    assert few.num_worlds < many.num_worlds < 200
    assert few.rows < many.rows
    assert many.unseen <= 0.02
    one = possible_rows(lambda number: {"a"}, miss=0.05)
    assert (one.num_worlds, one.unseen, one.rows) == (20, 0.0, frozenset({"a"}))
