"""Effects regressed on finished roll-outs: they are found where they add up, and where nothing is told that is said."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.policy.calibration import Rollout
from gradsift.policy.episodes import NO_ROW, Table
from gradsift.policy.mixture import STRENGTHS, fit_mixture

WIDTH = 3


def table_of(sizes: tuple[int, ...], seed: int = 0) -> Table:
    order = np.random.default_rng(seed).permutation(sum(sizes))
    cuts = np.cumsum((0, *sizes))
    members = tuple(tuple(int(i) for i in order[a:b]) for a, b in itertools.pairwise(cuts))
    k = len(sizes)
    return Table(members, np.ones(sum(sizes), dtype=np.int64), np.zeros((k, 1)), ("size",), np.zeros(k, dtype=bool))


def schedules(table: Table, count: int, steps: int, seed: int = 0, short: bool = True) -> list[np.ndarray]:
    """Decisions of one cluster each; the last may be short."""
    random = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        shares = random.dirichlet(np.full(table.num_clusters, 0.7))
        left = [list(some) for some in table.members]
        rows = np.full((steps, WIDTH), NO_ROW)
        for t in range(steps):
            there = np.array([len(some) > 0 for some in left])
            k = int(random.choice(table.num_clusters, p=shares * there / (shares * there).sum()))
            for b in range(WIDTH - (short and t == steps - 1 and bool(random.random() < 0.5))):
                if left[k]:
                    rows[t, b] = left[k].pop(0)
        out.append(rows)
    return out


def counts_of(table: Table, rows: np.ndarray) -> np.ndarray:
    """The slow way: how many rows of each cluster, over the rows of a decision."""
    taken = [int(i) for i in rows.ravel() if i != NO_ROW]
    return np.array([sum(i in some for i in taken) / WIDTH for some in table.members])


def rolled(table: Table, plans: list[np.ndarray], effects: np.ndarray, noise: float = 0.0, seed: int = 0):
    """Losses that fall by what the rows of each decision do; effects [K, A] are changes per decision, target last."""
    random = np.random.default_rng([seed, 9])
    out = []
    for k, rows in enumerate(plans):
        change = np.cumsum([[0.0] * effects.shape[1], *(counts_of(table, line[None]) @ effects for line in rows)], 0)
        losses = 2.0 + change
        losses[1:] += noise * random.normal(size=losses[1:].shape)
        out.append(Rollout(f"roll {k}", rows, losses[:, -1], losses[:, :-1]))
    return out


def found(fit) -> np.ndarray:
    """Changes per decision, sources first: gains are falls."""
    return np.column_stack([fit.effects.harm, -fit.effects.gain])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_effects_that_add_up_are_found(num_clusters, num_sources, seed):
    random = np.random.default_rng(seed)
    table = table_of(tuple(int(n) for n in random.integers(20, 40, num_clusters)), seed)
    effects = random.normal(size=(num_clusters, num_sources + 1))
    fit = fit_mixture(rolled(table, schedules(table, 20, 8, seed), effects), table, WIDTH)
    assert fit.num_rollouts == 20
    assert fit.strength == STRENGTHS[0]
    assert max(fit.error) < 0.05
    np.testing.assert_allclose(found(fit), effects, atol=0.05 * np.abs(effects).max())


def test_signs_and_places():
    """The target stands last, its falls are gains, and rises of the sources are harms."""
    table = table_of((30, 30, 30))
    effects = np.array([[0.3, 0.0, -0.5], [0.0, 0.0, 0.1], [-0.2, 0.4, 0.0]])
    fit = fit_mixture(rolled(table, schedules(table, 20, 8), effects), table, WIDTH)
    assert fit.effects.gain == pytest.approx([0.5, -0.1, 0.0], abs=0.02)
    assert fit.effects.harm == pytest.approx(np.array([[0.3, 0.0], [0.0, 0.0], [-0.2, 0.4]]), abs=0.02)
    assert len(fit.error) == 3


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_it_is_the_ridge_of_its_definition(seed):
    """Common effect free, deviations penalized, in units of the root mean square count; solved by augmented rows."""
    random = np.random.default_rng(seed)
    table = table_of((9, 14, 20), seed)
    done = rolled(table, schedules(table, 9, 5, seed), random.normal(size=(3, 2)), noise=0.3, seed=seed)
    fit = fit_mixture(done, table, WIDTH)
    counts = np.stack([counts_of(table, one.rows) for one in done])
    change = np.stack([one.losses[-1] - one.losses[0] for one in done])

    def ridge(n, y, strength):
        unit = np.sqrt((n**2).mean())
        design = np.column_stack([n.sum(1), n]) / unit
        more = np.diag(np.sqrt([1e-9, *[strength] * 3]))
        b = np.linalg.lstsq(np.vstack([design, more]), np.vstack([y, np.zeros((4, 2))]), rcond=None)[0] / unit
        return b[0] + b[1:]

    np.testing.assert_allclose(found(fit), ridge(counts, change, fit.strength), rtol=1e-5, atol=1e-7)
    errors = {}
    for strength in STRENGTHS:
        wrong = []
        for out in range(9):
            rest = [i for i in range(9) if i != out]
            wrong.append(counts[out] @ ridge(counts[rest], change[rest], strength) - change[out])
        errors[strength] = np.sqrt((np.array(wrong) ** 2).mean(0)) / change.std(0)
    assert fit.strength == min(errors, key=lambda s: errors[s].mean())
    np.testing.assert_allclose(fit.error, errors[fit.strength], rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(0.1, 10))
def test_what_every_decision_does_is_not_shrunk(seed, common, unit):
    """The ridge falls on deviations alone: the same added to every cluster's effect is found whole, in any unit."""
    random = np.random.default_rng(seed)
    table = table_of((12, 15, 20), seed)
    effects = random.normal(size=(3, 2))
    plans = schedules(table, 8, 5, seed, short=False)
    one = fit_mixture(rolled(table, plans, effects, noise=0.5), table, WIDTH)
    moved = rolled(table, plans, effects, noise=0.5)
    moved = [
        Rollout(r.name, r.rows, r.target * unit, r.protect * unit)
        if common == 0
        else Rollout(
            r.name,
            r.rows,
            (r.target + common * np.arange(6)) * unit,
            (r.protect + common * np.arange(6)[:, None]) * unit,
        )
        for r in moved
    ]
    two = fit_mixture(moved, table, WIDTH)
    assert two.strength == one.strength
    np.testing.assert_allclose(found(two), (found(one) + common) * unit, rtol=0, atol=1e-5 * unit * (1 + abs(common)))
    np.testing.assert_allclose(two.error, one.error, rtol=1e-4)


def test_the_numbering_of_the_clusters_does_not_matter():
    table = table_of((12, 15, 20))
    plans = schedules(table, 8, 5)
    done = rolled(table, plans, np.random.default_rng(3).normal(size=(3, 2)), noise=0.2)
    other = Table(table.members[::-1], table.price, table.features, table.feature_names, table.general)
    one, two = (found(fit_mixture(done, some, WIDTH)) for some in (table, other))
    np.testing.assert_allclose(one, two[::-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_that_tells_nothing_is_told_by_its_error(seed):
    table = table_of((30, 30, 30, 30))
    plans = schedules(table, 24, 8, seed, short=False)
    noise = fit_mixture(rolled(table, plans, np.zeros((4, 2)), noise=1.0, seed=seed), table, WIDTH)
    assert all(0.8 < e < 1.35 for e in noise.error)
    assert noise.strength > STRENGTHS[0]
    assert np.ptp(noise.effects.gain) < 0.2  # deviations are shrunk away
    clear = fit_mixture(rolled(table, plans, np.eye(4)[:, :2], noise=0.05, seed=seed), table, WIDTH)
    assert max(clear.error) < 0.2


def test_a_loss_that_never_moves_has_no_effect_and_no_error():
    table = table_of((20, 20))
    fit = fit_mixture(rolled(table, schedules(table, 6, 4), np.array([[0.0, -0.2], [0.0, 0.1]])), table, WIDTH)
    assert fit.effects.harm == pytest.approx(np.zeros((2, 1)), abs=1e-12)
    assert fit.error[0] == pytest.approx(0.0, abs=1e-12)


def test_rows_that_no_cluster_holds_do_not_shift_the_others():
    """A table may hold rows that belong to no cluster, as long as they are not trained on."""
    table = table_of((20, 20))
    loose = Table(
        tuple(tuple(i + 5 for i in some) for some in table.members), np.ones(45, dtype=np.int64), table.features,
        table.feature_names, table.general,
    )  # fmt: skip
    plans = schedules(table, 6, 4)
    effects = np.array([[0.3, -0.2], [0.1, 0.1]])
    want = fit_mixture(rolled(table, plans, effects), table, WIDTH)
    shifted = [np.where(rows == NO_ROW, NO_ROW, rows + 5) for rows in plans]
    got = fit_mixture(rolled(loose, shifted, effects), loose, WIDTH)
    np.testing.assert_allclose(found(got), found(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_are_refused(count):
    table = table_of((20, 20))
    done = rolled(table, schedules(table, 3, 4), np.array([[0.3, -0.2], [0.1, 0.1]]))
    with pytest.raises(ValueError, match="at least 3"):
        fit_mixture(done[:count], table, WIDTH)
    assert fit_mixture(done, table, WIDTH).num_rollouts == 3
