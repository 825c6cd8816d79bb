"""Intervals and shares against closed forms, scipy and slow twins; the error rates of both rules on null data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from gradsift.errors import ConfigError, NumericsError
from gradsift.evaluate.statistics import (
    Interval,
    auc,
    cluster_bootstrap,
    decision_accuracy,
    enough_for_a_claim,
    false_positive_rate,
    iqm,
    jaccard,
    kolmogorov_smirnov_uniform,
    paired_interval,
    paired_wins,
    probability_of_improvement,
    smallest_detectable,
    spearman_interval,
)
from gradsift.seeds import stream

EIGHTHS = st.integers(-80, 80).map(lambda i: i / 8)  # sums and differences are exact
LISTS = st.lists(EIGHTHS, min_size=1, max_size=12)
PAIRS = st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=2, max_size=12)


def columns(pairs):
    return [a for a, _ in pairs], [b for _, b in pairs]


# --- the t interval


def test_one_to_five_by_hand():
    found = paired_interval([2, 4, 6, 8, 10], [1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.sd == pytest.approx(math.sqrt(2.5), abs=1e-15)
    assert found.high - 3 == pytest.approx(2.7764451052 * math.sqrt(2.5 / 5), abs=1e-9)  # t(4, 0.975) from a table
    assert found.p_value == pytest.approx(0.0132, abs=5e-5)  # t = 3 / 0.7071 = 4.243 with 4 degrees of freedom
    assert str(found) == "+3.000 [+1.037, +4.963], n = 5"


@given(PAIRS, st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_equals_scipys_paired_test(pairs, confidence):
    a, b = columns(pairs)
    assume(np.std(np.subtract(a, b)) > 0.01)
    found, expected = paired_interval(a, b, confidence), stats.ttest_rel(a, b)
    ends = expected.confidence_interval(confidence)
    np.testing.assert_allclose([found.low, found.high], [ends.low, ends.high], rtol=1e-9, atol=1e-12)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-15)


@given(PAIRS, EIGHTHS)
def test_moves_with_the_data_and_changes_sign_with_the_arms(pairs, shift):
    a, b = columns(pairs)
    found, other = paired_interval(a, b), paired_interval(b, a)
    moved = paired_interval([x + shift for x in a], b)
    np.testing.assert_allclose([moved.low, moved.high], [found.low + shift, found.high + shift], atol=1e-9)
    np.testing.assert_allclose([other.low, other.high], [-found.high, -found.low], atol=1e-12)
    assert other.excludes_zero == found.excludes_zero


@given(PAIRS, st.randoms(use_true_random=False))
def test_depends_on_the_pairs_only_not_on_their_order(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    first, second = paired_interval(*columns(pairs)), paired_interval(*columns(shuffled))
    np.testing.assert_allclose([first.low, first.high], [second.low, second.high], atol=1e-9)


@given(PAIRS)
def test_the_p_value_agrees_with_the_interval(pairs):
    found = paired_interval(*columns(pairs))
    assume(abs(found.p_value - 0.05) > 1e-9)
    assert found.excludes_zero == (found.p_value < 0.05)


def test_one_seed_gives_no_interval():
    found = paired_interval([0.5], [0.25])
    assert (found.mean, found.low, found.high, found.n) == (0.25, -math.inf, math.inf, 1)
    assert math.isnan(found.sd)
    assert math.isnan(found.p_value)
    assert not found.excludes_zero
    assert not found.supports_gain
    assert str(found) == "+0.250 [no interval], n = 1"


def test_equal_differences_are_one_measurement():
    baseline = np.linspace(0.1, 0.9, 12)
    found = paired_interval(baseline + 0.1, baseline)
    assert found.constant  # although float subtraction leaves differences of 1e-17
    assert found.sd == 0
    assert found.low == found.high == pytest.approx(0.1, abs=1e-15)
    assert found.p_value == 0
    assert not found.supports_gain
    same = paired_interval(baseline + 1e-17, baseline)
    assert (same.mean, same.p_value, same.excludes_zero) == (0, 1, False)
    rounded = paired_interval((baseline + 0.3) - 0.3, baseline)
    assert (rounded.mean, rounded.p_value, rounded.excludes_zero) == (0, 1, False)


def test_a_claim_needs_ten_seeds():
    assert [enough_for_a_claim(n) for n in (1, 9, 10, 11)] == [False, False, True, True]
    assert not Interval(0.2, 0.1, 0.1, 0.3, 9, 0.001).supports_gain
    assert Interval(0.2, 0.1, 0.1, 0.3, 10, 0.001).supports_gain
    assert not Interval(0.2, 0.1, 0.1, 0.3, 10, 0.001, confidence=0.5).supports_gain
    assert not Interval(0.2, 0.1, 0.0, 0.4, 10, 0.05).supports_gain
    assert not Interval(-0.2, 0.1, -0.3, -0.1, 10, 0.001).supports_gain


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([], []), ([[1.0]], [[2.0]])])
def test_what_cannot_be_paired_is_refused(a, b):
    with pytest.raises((ConfigError, TypeError)):
        paired_interval(a, b)


def test_a_diverged_run_is_refused_by_position():
    with pytest.raises(NumericsError, match="position 2"):
        paired_interval([1, 2, math.nan], [1, 2, 3])
    with pytest.raises(NumericsError, match="position 0"):
        cluster_bootstrap([math.inf], ["a"], stream(0, "x"))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_a_confidence_is_a_share(confidence):
    with pytest.raises(ConfigError):
        paired_interval([1, 2], [2, 1], confidence)


# --- the bootstrap


def exact_bootstrap(values, clusters):
    """Every way to draw the clusters, equally likely; means sorted."""
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == label] for label in sorted(set(clusters))]
    return np.sort(
        [np.mean([v for i in draw for v in groups[i]]) for draw in itertools.product(range(len(groups)), repeat=len(groups))]
    )  # fmt: skip


@settings(max_examples=20)
@given(st.lists(st.tuples(EIGHTHS, st.sampled_from("abcde")), min_size=2, max_size=12), st.integers(0, 99))
def test_the_bootstrap_equals_full_enumeration(pairs, seed):
    values, clusters = columns(pairs)
    assume(len(set(clusters)) > 1)
    found, exact = cluster_bootstrap(values, clusters, stream(seed, "twin"), 20_000), exact_bootstrap(values, clusters)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):  # 0.006 is 5 standard errors of 20,000 draws
        around = np.quantile(exact, [share - 0.006, share + 0.006], method="inverted_cdf")
        assert around[0] - 1e-9 <= end <= around[1] + 1e-9


@settings(max_examples=25)
@given(
    st.lists(st.tuples(EIGHTHS, st.sampled_from("abcde")), min_size=1, max_size=12), st.randoms(use_true_random=False)
)
def test_the_bootstrap_ignores_order_and_reproduces(pairs, random):
    one, two = columns(pairs), columns(random.sample(pairs, len(pairs)))
    first, second = (cluster_bootstrap(v, c, stream(3, "order"), 500) for v, c in (one, two))
    np.testing.assert_allclose([first.low, first.high], [second.low, second.high], atol=1e-12)
    assert first == cluster_bootstrap(*one, stream(3, "order"), 500)


def test_chunks_do_not_change_the_draws(monkeypatch):
    values, clusters = np.arange(14.0) ** 2, [i // 2 for i in range(14)]
    whole = cluster_bootstrap(values, clusters, stream(0, "chunk"), 1_000)
    monkeypatch.setattr("gradsift.evaluate.statistics._CHUNK", 70)
    cut = cluster_bootstrap(values, clusters, stream(0, "chunk"), 1_000)
    assert cut.num_draws == whole.num_draws == 1_000
    spread = whole.high - whole.low
    np.testing.assert_allclose([cut.low, cut.high], [whole.low, whole.high], atol=0.1 * spread)


def test_chunks_do_not_change_the_rate(monkeypatch):
    whole = false_positive_rate(5, stream(0, "chunk"), 300, "bootstrap", 200)
    monkeypatch.setattr("gradsift.evaluate.statistics._CHUNK", 200 * 7)
    assert false_positive_rate(5, stream(0, "chunk"), 300, "bootstrap", 200) == whole


def test_one_cluster_gives_no_interval():
    found = cluster_bootstrap([1, 2, 3], ["a"] * 3, stream(0, "x"))
    assert (found.mean, found.low, found.high) == (2, -math.inf, math.inf)
    assert "no interval" in str(found)
    assert "bootstrap" in str(cluster_bootstrap([1, 2, 3], "abc", stream(0, "x"), 100))
    with pytest.raises(ConfigError):
        cluster_bootstrap([1, 2, 3], "ab", stream(0, "x"))


# --- how often the rules are wrong


@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_t_is_wrong_in_five_percent_of_null_draws(n):
    assert false_positive_rate(n, stream(1, "null")) == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize(("n", "rate"), [(5, 0.16), (10, 0.10)])
def test_the_bootstrap_is_wrong_far_more_often(n, rate):
    assert false_positive_rate(n, stream(2, "null"), rule="bootstrap") == pytest.approx(rate, abs=0.01)


def test_the_bootstrap_rate_equals_full_enumeration_at_five():
    counts = np.array([np.bincount(draw, minlength=5) for draw in itertools.product(range(5), repeat=5)]) / 5
    null = np.random.default_rng(7).standard_normal((8_000, 5))
    excluded = 0
    for part in np.split(null, 8):
        low, high = np.quantile(part @ counts.T, [0.025, 0.975], axis=1)
        excluded += int(((low > 0) | (high < 0)).sum())
    assert false_positive_rate(5, stream(3, "null"), rule="bootstrap") == pytest.approx(excluded / 8_000, abs=0.015)


def test_the_rates_equal_the_rules_themselves():
    """The slow twin: both rules run draw by draw on the same null data."""
    n, num = 6, 400
    null = stream(4, "null").child("null").numpy().standard_normal((num, n))
    by_t = np.mean([paired_interval(row, np.zeros(n)).excludes_zero for row in null])
    assert false_positive_rate(n, stream(4, "null"), num) == by_t
    ends = [cluster_bootstrap(row, range(n), stream(i, "b"), 1_000) for i, row in enumerate(null)]
    by_bootstrap = np.mean([end.low > 0 or end.high < 0 for end in ends])
    assert false_positive_rate(n, stream(4, "null"), num, "bootstrap") == pytest.approx(by_bootstrap, abs=0.02)


def test_unknown_rules_and_sizes_are_refused():
    with pytest.raises((ConfigError, TypeError)):
        false_positive_rate(5, stream(0, "x"), 10, rule="sign")
    with pytest.raises(ConfigError):
        false_positive_rate(1, stream(0, "x"))


def test_p_values_of_null_runs_are_uniform_and_biased_ones_are_not():
    null = stream(5, "null").numpy().standard_normal((400, 10))
    p_values = [paired_interval(row, np.zeros(10)).p_value for row in null]
    assert kolmogorov_smirnov_uniform(p_values).p_value > 0.01
    leaking = [paired_interval(row + 0.3, np.zeros(10)).p_value for row in null]
    assert kolmogorov_smirnov_uniform(leaking).p_value < 1e-6
    assert stats.binom.cdf(5, 40, 0.05) == pytest.approx(0.986, abs=1e-3)  # the gate of 5 in 40 null runs


def test_the_distance_to_uniform_by_hand():
    found = kolmogorov_smirnov_uniform([0.1, 0.2, 0.3, 0.4])
    assert (found.statistic, found.n) == (pytest.approx(0.6), 4)  # all four lie below 0.4
    with pytest.raises(ConfigError):
        kolmogorov_smirnov_uniform([0.5, 1.5])


# --- order and membership


@given(LISTS, LISTS)
def test_auc_equals_counting_pairs(a, b):
    by_pairs = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auc(a, b) == pytest.approx(by_pairs, abs=1e-12)
    assert auc(a, b) + auc(b, a) == pytest.approx(1, abs=1e-12)
    assert probability_of_improvement(a, b) == auc(a, b)


def test_auc_by_hand():
    assert auc([3, 4], [1, 2]) == 1
    assert auc([1, 1], [1]) == 0.5
    assert auc([1, 3], [2, 2, 0]) == pytest.approx(4 / 6)
    u = stats.mannwhitneyu([1, 3, 3, 8], [2, 3, 5], method="asymptotic").statistic
    assert auc([1, 3, 3, 8], [2, 3, 5]) == pytest.approx(u / 12)
    with pytest.raises(ConfigError):
        auc([], [1])


@given(PAIRS)
def test_wins_add_up_and_change_sides(pairs):
    a, b = columns(pairs)
    found, other = paired_wins(a, b), paired_wins(b, a)
    assert (found.wins, found.ties, found.losses) == (other.losses, other.ties, other.wins)
    assert found.n == len(pairs)
    assert found.share + other.share == pytest.approx(1)
    assert found.wins == sum(x > y for x, y in pairs)


def test_wins_with_a_tolerance():
    found = paired_wins([1.0, 0.1 + 0.2, 0.0], [0.0, 0.3, 1.0], tolerance=1e-12)
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)
    assert (found.share, found.strict_share) == (0.5, 1 / 3)
    assert paired_wins([0.1 + 0.2], [0.3]).wins == 1
    with pytest.raises(ConfigError):
        paired_wins([1], [2], tolerance=-1)


@given(st.lists(EIGHTHS, min_size=1, max_size=30))
def test_iqm_equals_dropping_a_quarter_at_each_end(scores):
    cut = len(scores) // 4
    assert iqm(scores) == pytest.approx(np.mean(sorted(scores)[cut : len(scores) - cut]), abs=1e-12)


def test_iqm_pools_runs_and_tasks():
    assert iqm([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    assert iqm(np.array([[0, 1, 2, 3], [4, 5, 6, 100]])) == 3.5


@given(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=4, max_size=12))
def test_rank_correlation_equals_scipy_and_lies_in_its_interval(pairs):
    x, y = columns(pairs)
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    found = spearman_interval(x, y)
    assert found.rho == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert -1 <= found.low <= found.rho <= found.high <= 1
    turned = spearman_interval(x, [-v for v in y])
    np.testing.assert_allclose([turned.low, turned.high], [-found.high, -found.low], atol=1e-12)


def test_rank_correlation_by_hand():
    found = spearman_interval(range(10), [0, 1, 2, 3, 4, 5, 6, 7, 9, 8])  # rho = 1 - 6 * 2 / 990
    assert found.rho == pytest.approx(1 - 12 / 990)
    half = 1.959964 * math.sqrt((1 + found.rho**2 / 2) / 7)
    assert found.low == pytest.approx(math.tanh(math.atanh(found.rho) - half), abs=1e-6)
    perfect = spearman_interval(range(10), range(10))
    assert perfect.rho == pytest.approx(1, abs=1e-15)
    assert perfect.high == perfect.rho
    assert 0.9 < perfect.low < 1  # not infinitely sure
    assert spearman_interval([1, 2, 3], [1, 3, 2]).low == -1
    with pytest.raises(NumericsError):
        spearman_interval([1, 1, 1], [1, 2, 3])


def test_the_rank_interval_covers():
    """Normal pairs of Spearman 0.6 (Pearson 2 sin(pi 0.6 / 6)): about 95 of 100 intervals hold the truth."""
    rng, pearson = np.random.default_rng(0), 2 * math.sin(math.pi * 0.1)
    inside = 0
    for _ in range(1_000):
        x, e = rng.standard_normal((2, 20))
        found = spearman_interval(x, pearson * x + math.sqrt(1 - pearson**2) * e)
        inside += found.low <= 0.6 <= found.high
    assert inside / 1_000 == pytest.approx(0.95, abs=0.03)


@given(st.frozensets(st.integers(0, 20)), st.frozensets(st.integers(0, 20)))
def test_jaccard(a, b):
    assume(a | b)
    assert jaccard(a, b) == jaccard(b, a) == len(a & b) / len(a | b)
    assert (jaccard(a, b) == 1) == (a == b)


def test_jaccard_of_lists_and_of_nothing():
    assert jaccard(["a", "b", "b"], ["b", "c"]) == pytest.approx(1 / 3)
    with pytest.raises(ConfigError):
        jaccard([], [])


def test_smallest_detectable_effect():
    """Figures of trials.md 10 at SD 0.04, and the power that 2.8 stands for, simulated with t at n = 20."""
    assert [round(smallest_detectable(0.04, n), 3) for n in (5, 10, 20)] == [0.05, 0.035, 0.025]
    draws = np.random.default_rng(0).standard_normal((4_000, 20)) + smallest_detectable(1.0, 20)
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(20))
    assert (t > stats.t.ppf(0.975, 19)).mean() == pytest.approx(0.78, abs=0.03)
    for bad in ((-1.0, 5), (math.nan, 5), (1.0, 0)):
        with pytest.raises(ConfigError):
            smallest_detectable(*bad)


@given(PAIRS)
def test_decision_accuracy_equals_counting_and_kendall(pairs):
    small, large = columns(pairs)
    signs = [np.sign(a - b) * np.sign(c - d) for (a, c), (b, d) in itertools.combinations(pairs, 2)]
    assert decision_accuracy(small, large) == pytest.approx((1 + np.mean(signs)) / 2, abs=1e-12)
    if len(set(small)) == len(small) and len(set(large)) == len(large):
        assert decision_accuracy(small, large) == pytest.approx((1 + stats.kendalltau(small, large).statistic) / 2)


def test_decision_accuracy_by_hand():
    assert decision_accuracy([1, 2, 3], [10, 30, 20]) == pytest.approx(2 / 3)
    assert decision_accuracy([1, 1], [1, 2]) == 0.5
    with pytest.raises(ConfigError):
        decision_accuracy([1], [1])
