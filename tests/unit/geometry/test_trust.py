"""The prior, the cap on copies, and two queues that share a budget."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.geometry.trust import by_score, cap_copies, fair_places, likely_domain, num_trusted, settled_ranks


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 19), st.integers(1, 60))
def test_every_prefix_gives_the_second_queue_its_rounded_share(n, m, twentieths, k):
    share = twentieths / 20
    queue = np.random.default_rng(n * 31 + m).permutation(n + m)
    place = fair_places(queue[:n], queue[n:], np.ones(n + m, dtype=np.int64), share)
    taken = np.argsort(place, kind="stable")[:k]
    second = set(queue[n:].tolist())
    got = sum(int(i) in second for i in taken)
    k = min(k, n + m)
    exact = share * k
    fits = [min(m, max(c, k - n)) for c in (int(np.floor(exact)), int(np.ceil(exact)))]
    assert fits[0] <= got <= fits[1]
    if abs(exact % 1 - 0.5) > 1e-9:  # halves go to the smaller index
        assert got == min(m, max(round(exact), k - n))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 19), st.integers(1, 300))
def test_under_costs_the_share_is_off_by_less_than_one_row_while_both_last(costs, twentieths, amount):
    share, cost = twentieths / 20, np.array(costs)
    n = len(cost) // 2
    place = fair_places(np.arange(n), np.arange(n, len(cost)), cost, share)
    order = np.argsort(place, kind="stable")
    taken = order[np.cumsum(cost[order]) <= amount]
    second, first = taken[taken >= n], taken[taken < n]
    if len(second) < len(cost) - n and len(first) < n:
        assert abs(cost[second].sum() - share * cost[taken].sum()) <= max(costs)


def test_a_queue_of_no_share_only_fills_what_the_other_leaves():
    place = fair_places(np.array([3, 1]), np.array([0, 2]), np.ones(5, dtype=np.int64), 0.0)
    assert np.argsort(place, kind="stable").tolist() == [3, 1, 0, 2, 4]
    assert np.isinf(place[4])


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4), st.randoms())
def test_copies_are_capped_in_the_order_given(group, cap, random):
    rows = list(range(len(group)))
    random.shuffle(rows)
    kept = cap_copies(rows, group, cap).tolist()
    slow, seen = [], Counter()
    for i in rows:
        seen[group[i]] += 1
        if seen[group[i]] <= cap:
            slow.append(i)
    assert kept == (slow if group else rows)


def test_without_groups_nothing_is_capped():
    assert cap_copies(np.array([2, 0]), (), 1).tolist() == [2, 0]


@given(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 2.0]), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_the_prior_is_the_top_of_the_likeness_and_ties_go_to_the_smaller_index(values, share):
    likeness = np.array(values)
    slow = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert by_score(likeness).tolist() == slow
    got = likely_domain(likeness, share).tolist()
    assert got == slow[: max(1, round(share * len(values)))]
    assert 1 <= num_trusted(share, len(values)) <= len(values)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.sampled_from("smn")), min_size=1, max_size=12), st.data()
)
def test_a_row_s_place_stays_within_its_bounds_whoever_is_in_the_queue(rows, data):
    draw = np.array([d for d, _ in rows])
    sure, maybe = (np.array([kind == k for _, kind in rows]) for k in "sm")
    low, high = settled_ranks(draw, sure, maybe)
    members = sure | np.array([m and data.draw(st.booleans()) for m in maybe])
    for i in range(len(rows)):
        before = sum(members[j] and (draw[j], j) < (draw[i], i) for j in range(len(rows)))
        assert low[i] <= before <= high[i]


@pytest.mark.parametrize(("share", "count", "want"), [(0.65, 100, 65), (0.01, 3, 1), (1.0, 7, 7)])
def test_the_number_trusted(share, count, want):
    assert num_trusted(share, count) == want
