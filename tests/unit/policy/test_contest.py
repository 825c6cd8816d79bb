"""Who is returned, and what may be claimed: an advantage only where the interval of paired roll-outs is above 0."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp
from tests.policy_worlds import Quadratic, make_world

from gradsift.policy.calibration import Rollout
from gradsift.policy.contest import LEARNED, Tried, best_of, compare_with, confirm, simulate
from gradsift.policy.episodes import NO_ROW, Episodes
from gradsift.policy.simple import Scheduled, Uniform
from gradsift.seeds import stream

LIMITS = np.array([0.1, 0.2])


def tried(name: str, gain, rise=None) -> Tried:
    gain = np.atleast_1d(np.asarray(gain, dtype=float))
    rise = np.zeros((len(gain), 2)) if rise is None else np.asarray(rise, dtype=float)
    return Tried(name, np.array([0]), np.array([[0]]), (), 0.0, np.zeros(2), gain, rise)


OVER = [[0.3, 0.0], [0.3, 0.0]]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(-0.5, 0.5))
def test_limits_are_kept_within_one_standard_error_of_the_mean(rises, limit):
    limits = np.array([limit, 10.0])
    one = tried("a", np.zeros(len(rises)), np.column_stack([rises, np.zeros(len(rises))]))
    mean, n = sum(rises) / len(rises), len(rises)
    error = (sum((r - mean) ** 2 for r in rises) / (n - 1) / n) ** 0.5
    if abs(mean - limit - error) > 1e-9:
        assert one.keeps(limits) == (mean <= limit + error)


def test_a_single_roll_out_has_no_error_to_hide_behind():
    assert tried("a", 0.0, [[0.1, 0.2]]).keeps(LIMITS)
    assert not tried("a", 0.0, [[0.1001, 0.0]]).keeps(LIMITS)
    assert not tried("a", 0.0, [[0.0, 0.2001]]).keeps(LIMITS)
    assert tried("a", [0, 0], [[0.0, 0.0], [0.3, 0.0]]).keeps(LIMITS)  # mean 0.15, error 0.15


def test_the_excess_is_that_of_the_worst_source_in_shares_of_its_limit():
    one = tried("a", [0, 0], [[0.15, 0.1], [0.25, 0.2]])
    assert one.excess(LIMITS) == pytest.approx(1.0)  # 0.2 against 0.1
    assert tried("a", [0], [[0.0, 0.3]]).excess(LIMITS) == pytest.approx(0.5)
    assert tried("a", [0], [[0.0, 0.0]]).excess(LIMITS) == pytest.approx(-1.0)
    assert tried("a", [0], [[-0.1, 0.0]]).excess(np.array([-0.2, 1.0])) == pytest.approx(0.5)  # a fall was demanded


def test_the_largest_gain_among_those_that_keep_the_limits_is_returned():
    some = [
        tried("low", [0.1, 0.1]),
        tried("high", [0.5, 0.25]),
        tried("over", [9, 9], OVER),
        tried("twin", [0.375, 0.375]),
    ]
    assert [one.name for one in (best_of(some, LIMITS)[0], best_of(some[::-1], LIMITS)[0])] == ["high", "twin"]
    assert best_of(some, LIMITS)[1]


def test_when_none_keeps_them_the_least_broken_is_returned_whatever_it_gains():
    some = [tried("a", [9, 9], OVER), tried("b", [0, 0], [[0.0, 0.3]] * 2), tried("c", [5, 5], [[0.16, 0]] * 2)]
    best, feasible = best_of(some, LIMITS)
    assert (best.name, feasible) == ("b", False)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=6))
def test_the_best_is_the_best_by_going_through_all(pairs):
    some = [tried(f"p{k}", [g], [[r, 0.0]]) for k, (g, r) in enumerate(pairs)]
    best, feasible = best_of(some, LIMITS)
    fitting = [g for g, r in pairs if r <= 0.1]
    assert feasible == bool(fitting)
    assert best.gain[0] == max(fitting) if fitting else best.rise[0, 0] == min(r for _, r in pairs)


def say(own, *others) -> str:
    return compare_with([*others, own], LEARNED, LIMITS)


def test_one_roll_out_claims_nothing():
    text = say(tried(LEARNED, 9.0), tried("uniform", 0.0))
    assert text.startswith("no advantage of the learned policy over uniform was measured")
    assert "too few for an interval" in text
    assert "beat" not in text
    assert "+9.0000 nats" in text
    assert text.endswith("it is ahead of uniform")


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=8),
    st.floats(-0.5, 1.0),
)
def test_an_advantage_is_claimed_only_where_the_interval_is_above_0(pairs, shift):
    own, other = np.array(pairs).T
    own = own + shift
    text = say(tried(LEARNED, own), tried("uniform", other))
    difference = own - other
    if np.ptp(difference) < 1e-6:
        return
    low, high = ttest_1samp(difference, 0.0).confidence_interval(0.95)
    if abs(low) > 1e-9:
        assert ("beat" in text) == (low > 0)
        assert ("no advantage" in text) == (low <= 0)
    assert f"[{low:+.4f}, {high:+.4f}]" in text
    assert f"{difference.mean():+.4f} nats" in text
    assert f"{len(pairs)} paired" in text


def test_equal_schedules_claim_nothing():
    text = say(tried(LEARNED, [0.5, 0.6]), tried("plan", [0.5, 0.6]))
    assert text.startswith("no advantage of the learned policy over plan")
    assert text.endswith("it is ahead of none of them")


def test_the_rival_is_the_best_that_keeps_the_limits_and_those_behind_are_named():
    own = tried(LEARNED, [0.5, 0.52])
    others = [tried("weak", [0.1, 0.3]), tried("strong", [0.7, 0.69]), tried("over", [9, 9], OVER)]
    text = say(own, *others)
    assert "over strong was measured" in text
    assert text.endswith("it is ahead of weak, over")


def test_a_claim_names_whom_it_beat():
    """Another one may be noisier, or break a limit: the sentence is about the rival that was compared."""
    others = [tried("steady", [0.3, 0.31]), tried("wild", [-9, 9]), tried("over", [9, 9], OVER)]
    text = say(tried(LEARNED, [0.5, 0.5]), *others)
    assert text.startswith("the learned policy beat steady, the best of the others that keep the limits")
    assert "every other" not in text


def test_a_learned_policy_that_breaks_a_limit_says_so_whatever_it_gains():
    text = say(tried(LEARNED, [9, 9], OVER), tried("uniform", [0, 0]))
    assert text == "the learned policy broke a limit on its real roll-outs by 200% of it"


def test_the_only_one_that_keeps_the_limits():
    text = say(tried(LEARNED, [-1, -1]), tried("uniform", [1, 1], OVER))
    assert text == "the learned policy is the only one that kept every limit on its real roll-outs"


def test_without_a_learned_policy_the_one_returned_is_named():
    some = [tried("uniform", [0.1, 0.2]), tried("plan", [0.3, 0.2])]
    assert compare_with(some, LEARNED, LIMITS) == "no learned policy stood in the contest; plan is returned"


class Recorder:
    """Trains the quadratic world on a schedule and notes it."""

    def __init__(self, episodes: Episodes) -> None:
        self.world, self.seen = episodes.dynamics, []

    def roll(self, rows: np.ndarray, name: str) -> Rollout:
        self.seen.append((name, rows))
        world = Quadratic(self.world.rows, self.world.slopes, self.world.eta, self.world.bend)
        losses = [world.reset(1), *(world.step(line[None]) for line in rows)]
        return Rollout(name, rows, np.array([s.target[0] for s in losses]), np.stack([s.protect[0] for s in losses]))


def test_confirmed_figures_are_those_of_the_list_and_of_the_shared_orders():
    episodes = make_world(2, num_sources=2, sizes=(6, 6, 6), budget=8)
    got = simulate(episodes, Uniform(), stream(0, "simulate"), 4)
    assert got.gain.shape == (0,)
    assert got.rise.shape == (0, 2)
    assert len(got.others) == 4
    table = [list(some) for some in episodes.table.members]
    for k, line in zip(got.actions, got.rows, strict=True):  # the list takes rows in the table's order
        for i in line[line != NO_ROW]:
            assert i == table[k].pop(0)
    recorder = Recorder(episodes)
    done = confirm(got, recorder.roll, 3)
    assert [name for name, _ in recorder.seen] == ["uniform 1", "uniform 2", "uniform 3"]
    for (_, rows), want in zip(recorder.seen, (got.rows, *got.others), strict=False):
        assert np.array_equal(rows, want)
    every = [recorder.roll(rows, "again").losses for rows in (got.rows, *got.others[:2])]
    np.testing.assert_allclose(done.gain, [one[0, -1] - one[-1, -1] for one in every])
    np.testing.assert_allclose(done.rise, [one[-1, :-1] - one[0, :-1] for one in every])
    simulated = [recorder.roll(rows, "again").losses for rows in got.others]
    assert got.simulated_gain == pytest.approx(np.mean([one[0, -1] - one[-1, -1] for one in simulated]))
    np.testing.assert_allclose(got.simulated_rise, np.mean([one[-1, :-1] - one[0, :-1] for one in simulated], axis=0))


def test_two_policies_that_choose_alike_are_rolled_on_the_same_rows():
    """Pairs share their orders of rows, so that a difference is one of the choice alone."""
    episodes = make_world(2, sizes=(6, 6, 6), budget=8)
    one, two = (
        simulate(episodes, Scheduled(np.array([0, 2, 1, 0]), name), stream(0, "simulate"), 3) for name in ("a", "b")
    )
    assert all(np.array_equal(a, b) for a, b in zip(one.others, two.others, strict=True))
    assert len({rows.tobytes() for rows in one.others}) == 3
