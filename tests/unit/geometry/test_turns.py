"""Turns and cosine tables against their obvious twins, and what another measurement can change."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.geometry.embed import cosine_table, take_in_turns, unsettled

CALM = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def slow_turns(cosines: np.ndarray) -> list[int]:
    """Each target row in turn scans all rows that are left; the first of the largest wins."""
    left, taken = list(range(len(cosines))), []
    while left:
        q = len(taken) % cosines.shape[1]
        best = max(left, key=lambda i: (cosines[i, q], -i))
        taken.append(best)
        left.remove(best)
    return taken


tables = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 6), st.sampled_from([1, 3, 50]))


def table_of(seed: int, rows: int, targets: int, levels: int) -> np.ndarray:
    """Cosines on a grid: coarse grids are full of ties."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-levels, levels + 1, size=(rows, targets)) / levels).astype(np.float32)


@CALM
@given(tables)
def test_turns_equal_the_slow_walk(drawn):
    cosines = table_of(*drawn)
    turns = take_in_turns(cosines)
    assert turns.order.tolist() == slow_turns(cosines)
    assert turns.taker.tolist() == [t % cosines.shape[1] for t in range(len(cosines))]
    for t, (row, q, gap) in enumerate(zip(turns.order, turns.taker, turns.gap, strict=True)):
        rest = turns.order[t + 1 :]
        want = float(cosines[row, q]) - float(cosines[rest, q].max()) if len(rest) else np.inf
        assert gap == want
        assert gap >= 0


@CALM
@given(tables, st.floats(0.001, 0.3), st.integers(0, 100), st.floats(0, 1))
def test_another_measurement_moves_unsettled_rows_only(drawn, bound, again, share):
    cosines = table_of(*drawn)
    count = 1 + int(share * (len(cosines) - 1))
    turns = take_in_turns(cosines)
    rng = np.random.default_rng(again)
    moved = cosines.astype(np.float64) + bound * rng.choice([-0.999, 0, 0.999], size=cosines.shape)
    maybe = set(unsettled(turns, cosines, count, 2 * bound).tolist())
    first, second = set(turns.order[:count].tolist()), set(take_in_turns(moved).order[:count].tolist())
    assert first ^ second <= maybe
    assert bool(maybe) == bool((turns.gap[:count] <= 2 * bound).any())
    settled = int(np.flatnonzero(turns.gap <= 2 * bound)[0]) if (turns.gap <= 2 * bound).any() else len(cosines)
    assert take_in_turns(moved).order[:settled].tolist() == turns.order[:settled].tolist()


def test_what_is_unsettled_is_no_more_than_can_move():
    # Clear rows 0 and 1 are taken first; 2 and 3 are a near tie for the last place; 4 is far from everything.
    cosines = np.array([[0.9, 0.1], [0.1, 0.9], [0.5, 0.2], [0.499, 0.2], [-0.5, -0.5]])
    turns = take_in_turns(cosines)
    assert unsettled(turns, cosines, 3, 0.01).tolist() == [2, 3]
    assert unsettled(turns, cosines, 2, 0.01).tolist() == []
    assert unsettled(turns, cosines, 3, 0.0).tolist() == []


@CALM
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 5), st.integers(1, 8))
def test_the_table_holds_cosines(seed, rows, targets, width):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rows, width)), rng.normal(size=(targets, width))
    got = cosine_table(a, b)
    for i in range(rows):
        for q in range(targets):
            want = a[i] @ b[q] / np.sqrt((a[i] @ a[i]) * (b[q] @ b[q]))
            assert abs(got[i, q] - want) <= 1e-7
    assert np.abs(got).max() <= 1
    assert np.array_equal(cosine_table(3 * a, b / 7), got) or np.allclose(cosine_table(3 * a, b / 7), got, atol=2e-7)


def test_equal_rows_tie_wherever_they_stand(monkeypatch):
    monkeypatch.setattr("gradsift.geometry.embed.BLOCK", 37)
    rng = np.random.default_rng(4)
    rows = np.repeat(rng.normal(size=(3, 31)).astype(np.float32), 50, axis=0)
    rows = rows[rng.permutation(len(rows))]
    table = cosine_table(rows, rng.normal(size=(9, 31)).astype(np.float32))
    assert len(np.unique(table, axis=0)) == 3
