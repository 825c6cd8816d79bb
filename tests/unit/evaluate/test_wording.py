"""Claims only with evidence; the fixed sentence, word for word, in every other case."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.errors import ConfigError
from gradsift.evaluate.statistics import Interval, paired_interval
from gradsift.evaluate.wording import across_data_sets, claim

COST = "1.0 h each, selection 12%"
SENTENCE = "no advantage over random was measured"


def tell(interval):
    return claim("ogs_dual", "random", "hypervolume", interval, "world A", trial="T15", cost_note=COST)


def over(intervals):
    return across_data_sets(intervals, "ogs_dual", "random", "gain (nats)", trial="T15", cost_note=COST)


WIN = Interval(0.123, 0.1, 0.045, 0.201, 10, 0.006)
EVEN = Interval(0.010, 0.1, -0.060, 0.080, 10, 0.7)
LOSS = Interval(-0.123, 0.1, -0.201, -0.045, 10, 0.006)


def test_a_win():
    assert tell(WIN) == (
        "ogs_dual beats random on world A in hypervolume by +0.123 [+0.045, +0.201], n = 10 "
        "(T15; 1.0 h each, selection 12%)."
    )


def test_an_even_result_and_a_loss():
    assert tell(EVEN) == (
        "no advantage over random was measured: ogs_dual on world A in hypervolume, difference "
        "+0.010 [-0.060, +0.080], n = 10 (T15; 1.0 h each, selection 12%)."
    )
    assert SENTENCE in tell(LOSS)
    assert tell(LOSS).endswith("ogs_dual lost to random there.")


def test_few_seeds_claim_nothing():
    few = tell(Interval(0.123, 0.1, 0.045, 0.201, 9, 0.006))
    assert SENTENCE in few
    assert few.endswith("9 seeds are not enough for a claim, 10 are needed.")
    assert "lost" not in tell(Interval(-0.1, 0.1, -0.2, -0.05, 5, 0.01))
    assert "lies below zero" in tell(Interval(-0.1, 0.1, -0.2, -0.05, 5, 0.01))
    assert "1 seed is not enough" in tell(paired_interval([1], [0]))


def test_seeds_that_change_nothing_and_narrow_intervals_claim_nothing():
    assert "count as one measurement" in tell(paired_interval([1.0] * 12, [0.5] * 12))
    assert SENTENCE in tell(paired_interval([1.0] * 12, [0.5] * 12))
    half = tell(Interval(0.123, 0.1, 0.045, 0.201, 10, 0.2, confidence=0.5))
    assert SENTENCE in half
    assert "covers 50%, 95% are needed" in half


@given(st.lists(st.integers(-8, 12).map(lambda i: i / 8), min_size=1, max_size=14))
def test_either_a_claim_or_the_sentence_never_both(differences):
    interval = paired_interval(differences, np.zeros(len(differences)))
    text = tell(interval)
    won = len(differences) >= 10 and interval.low > 0 and len(set(differences)) > 1
    assert (" beats " in text) == won
    assert (SENTENCE in text) != won
    assert all(part in text for part in (str(interval), "T15", COST, f"n = {len(differences)}"))


@pytest.mark.parametrize("part", ["trial", "cost_note"])
def test_no_claim_without_trial_and_cost(part):
    with pytest.raises(ConfigError, match=part):
        claim("a", "b", "m", WIN, "d", **({"trial": "T15", "cost_note": COST} | {part: " "}))


def test_up_to_five_data_sets_stand_alone():
    found = over({f"set{i}": WIN for i in range(5)})
    assert found.interval is None
    assert "each of the 5 data sets stands alone" in found.sentence
    assert "set4 +0.123 [+0.045, +0.201], n = 10" in found.sentence
    assert "beats" not in found.sentence
    assert "the data set stands alone" in over({"set": WIN}).sentence
    with pytest.raises(ConfigError):
        over({})


def sets(means, n=10):
    return {f"set{i}": Interval(mean, 0.1, mean - 0.07, mean + 0.07, n, 0.1) for i, mean in enumerate(means)}


def test_from_six_data_sets_on_there_is_an_interval_over_them():
    means = [0.1, 0.2, 0.3, 0.2, 0.1, 0.3]
    found = over(sets(means))
    expected = paired_interval(means, [0] * 6)
    assert found.interval == expected
    assert found.sentence.startswith("ogs_dual beats random across data sets in gain (nats) by +0.200 [")
    assert "6 data sets (T15; " in found.sentence
    assert SENTENCE in over(sets([0.1, 0.2, 0.3, 0.2, 0.1, -0.9])).sentence
    assert "lost to random" in over(sets([-m for m in means])).sentence


def test_data_sets_with_few_seeds_or_one_value_claim_nothing():
    few = over({**sets([0.1, 0.2, 0.3, 0.2, 0.1]), "last": Interval(0.2, 0.1, 0.1, 0.3, 3, 0.01)})
    assert SENTENCE in few.sentence
    assert "1 of 6 data sets have fewer than 10 seeds" in few.sentence
    assert SENTENCE in over(sets([0.25] * 6)).sentence
    assert "one measurement" in over(sets([0.25] * 6)).sentence


def test_one_large_data_set_cannot_carry_the_others():
    """TIS: LESS against random, +8.7 on one of the data sets: the interval over data sets holds zero."""
    found = over(sets([0.29, -1.86, 4.02, 8.71, 1.15, 0.1]))
    assert found.interval is not None
    assert not found.interval.excludes_zero
    assert math.isfinite(found.interval.low)
