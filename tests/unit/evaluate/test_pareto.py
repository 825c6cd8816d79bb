"""The plane: exact sweep against inclusion-exclusion, front against the definition, properties of the measure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.errors import ConfigError, NumericsError
from gradsift.evaluate.pareto import (
    ACCURACY_REFERENCE,
    LOSS_REFERENCE,
    accuracy_points,
    hypervolume_2d,
    loss_points,
    num_outside,
    pareto_front,
)

COORDINATE = st.integers(-4, 12).map(lambda i: i / 8)  # few values, so that ties are common; areas are exact
POINTS = st.lists(st.tuples(COORDINATE, COORDINATE), max_size=7)
REFERENCE = st.tuples(st.integers(-8, 4).map(lambda i: i / 8), st.integers(-8, 4).map(lambda i: i / 8))


def array(points):
    return np.array(points, dtype=float).reshape(-1, 2)


def by_inclusion_exclusion(points, reference):
    """Area of a union of rectangles: the slow twin."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for some in itertools.combinations(points, size):
            sides = [max(0.0, min(p[axis] for p in some) - reference[axis]) for axis in (0, 1)]
            total += (-1) ** (size + 1) * sides[0] * sides[1]
    return total


def by_grid(points, reference, step=1 / 8):
    """Count the cells of a grid that some point dominates: another slow twin, exact because all values are eighths."""
    cells = np.arange(0, 3, step)
    x, y = reference[0] + cells[:, None], reference[1] + cells[None, :]
    covered = np.zeros((len(cells), len(cells)), dtype=bool)
    for a, b in points:
        covered |= (x + step <= a) & (y + step <= b)
    return covered.sum() * step * step


@given(POINTS, REFERENCE)
def test_equals_both_slow_twins(points, reference):
    found = hypervolume_2d(array(points), reference)
    assert found == pytest.approx(by_inclusion_exclusion(points, reference), abs=1e-12)
    assert found == pytest.approx(by_grid(points, reference), abs=1e-12)


@given(POINTS, st.tuples(COORDINATE, COORDINATE), REFERENCE)
def test_grows_with_points_and_not_by_dominated_ones(points, new, reference):
    before, after = hypervolume_2d(array(points), reference), hypervolume_2d(array([*points, new]), reference)
    assert after >= before
    if any(p[0] >= new[0] and p[1] >= new[1] for p in points):
        assert after == before
    elif new[0] > reference[0] and new[1] > reference[1]:
        assert after > before


@given(POINTS, REFERENCE, st.randoms(use_true_random=False))
def test_order_and_axes_do_not_matter(points, reference, random):
    found = hypervolume_2d(array(points), reference)
    assert hypervolume_2d(array(random.sample(points, len(points))), reference) == found
    assert hypervolume_2d(array(points)[:, ::-1], reference[::-1]) == pytest.approx(found, abs=1e-12)


@given(POINTS, REFERENCE)
def test_front_alone_has_the_whole_area_and_outside_points_none(points, reference):
    points = array(points)
    found = hypervolume_2d(points, reference)
    assert hypervolume_2d(points[pareto_front(points)], reference) == found
    inside = (points > reference).all(axis=1)
    assert hypervolume_2d(points[inside], reference) == found
    assert num_outside(points, reference) == (~inside).sum()


@given(POINTS)
def test_front_is_the_definition(points):
    def dominated(i):
        x, y = points[i]
        better = any(a >= x and b >= y and (a > x or b > y) for a, b in points)
        return better or points[i] in points[:i]

    front = pareto_front(array(points)).tolist()
    assert sorted(front) == [i for i in range(len(points)) if not dominated(i)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


@given(POINTS, st.sampled_from([0.5, 2.0, 4.0]))
def test_area_scales_with_the_units(points, factor):
    found = hypervolume_2d(array(points), (0, 0))
    assert hypervolume_2d(array(points) * [factor, 1], (0, 0)) == pytest.approx(found * factor, abs=1e-12)


def test_by_hand():
    staircase = array([(0.2, 0.9), (0.5, 0.5), (0.8, 0.1), (0.4, 0.4)])
    assert hypervolume_2d(staircase, ACCURACY_REFERENCE) == pytest.approx(0.2 * 0.9 + 0.3 * 0.5 + 0.3 * 0.1)
    assert pareto_front(staircase).tolist() == [0, 1, 2]
    assert hypervolume_2d(array([]), (0, 0)) == 0
    assert pareto_front(array([])).tolist() == []


def test_conventions():
    points = loss_points(np.array([0.5, -0.1]), np.array([0.25, -0.2]))
    assert points.tolist() == [[0.5, -0.25], [-0.1, 0.2]]
    assert hypervolume_2d(points, LOSS_REFERENCE) == pytest.approx(0.5 * 0.75)  # a loss of gain adds nothing
    assert num_outside(points, LOSS_REFERENCE) == 1
    assert hypervolume_2d(accuracy_points(np.array([1.0]), np.array([1.0])), ACCURACY_REFERENCE) == 1


def test_bad_points_are_refused():
    with pytest.raises(NumericsError, match="point 1"):
        hypervolume_2d(array([(0, 0), (math.nan, 1)]), (0, 0))
    with pytest.raises((ConfigError, TypeError)):  # TypeError where the tests check shapes before our own check
        pareto_front(np.zeros((2, 3)))
    with pytest.raises((ConfigError, TypeError)):
        loss_points(np.zeros(2), np.zeros(3))
