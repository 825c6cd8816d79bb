"""Active anchors: the most opposed rows of every source, without outliers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.geometry.active import active_rows


def slow(cos: np.ndarray, sources: list[str], norms: np.ndarray, m: int) -> list[int]:
    kept: list[int] = []
    for source in set(sources):
        rows = [i for i, s in enumerate(sources) if s == source]
        for _ in range(len(rows) // 100):
            rows.remove(max(rows, key=lambda i: (norms[i], i)))
        kept += sorted(rows, key=lambda i: (cos[i], i))[:m]
    return sorted(kept)


@given(st.integers(0, 260), st.integers(1, 40), st.integers(0, 99), st.booleans())
def test_equals_its_slow_twin(n: int, m: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    cos, norms = rng.uniform(-1, 1, n), rng.lognormal(size=n)
    if ties:
        cos, norms = np.round(cos, 1), np.ceil(norms)
    sources = [("math", "chat")[i] for i in rng.integers(0, 2, n)]
    assert active_rows(cos, sources, norms, m).tolist() == slow(cos, sources, norms, m)


def test_every_source_keeps_its_quota_however_opposed_another_is() -> None:
    cos = np.array([-0.9, -0.8, -0.7, 0.1, 0.2, 0.3])
    kept = active_rows(cos, ["math"] * 3 + ["chat"] * 3, np.ones(6), 2)
    assert kept.tolist() == [0, 1, 3, 4]


def test_the_longest_hundredth_is_left_out_and_no_row_of_a_small_source() -> None:
    cos, norms = np.linspace(-1, 1, 200), np.ones(200)
    norms[[0, 1, 2]] = 50, 40, 30
    assert active_rows(cos, ["math"] * 200, norms, 2).tolist() == [2, 3]
    assert active_rows(cos[:99], ["math"] * 99, norms[:99], 2).tolist() == [0, 1]


def test_ties_go_to_the_smaller_row() -> None:
    assert active_rows(np.zeros(5), ["a"] * 5, np.ones(5), 2).tolist() == [0, 1]


@pytest.mark.parametrize(("cos", "norm", "m"), [(np.nan, 1.0, 1), (0.0, 0.0, 1), (0.0, np.inf, 1), (0.0, 1.0, 0)])
def test_our_own_mistakes_are_refused(cos: float, norm: float, m: int) -> None:
    with pytest.raises(ValueError, match="active_rows"):
        active_rows(np.array([cos]), ["a"], np.array([norm]), m)
