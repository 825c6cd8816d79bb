"""From cells to words, on figures made up for the purpose; every number beside a slow twin."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tests.fabricated import ROLES, cell, config, filed, table, values

from gradsift.compare import words
from gradsift.compare.analysis import Missing, analyse, best_cheap
from gradsift.compare.null import null_rate
from gradsift.compare.plane import arm_figures, coordinates
from gradsift.evaluate.forgetting import transitions
from gradsift.manifest import canonical_json
from gradsift.train.parts import Cost

MEANS = {"random": 0.20, "cheap": 0.25, "ours": 0.40, "oracle": 0.60}


def area(points, corner, steps=400):
    """The hypervolume by counting the squares of a grid (slow and coarse, obviously right)."""
    inside = [(max(x - corner[0], 0), max(y - corner[1], 0)) for x, y in points]
    top = max(max(x, y) for x, y in inside) or 1.0
    at = (np.arange(steps) + 0.5) / steps * top
    hit = np.zeros((steps, steps), bool)
    for x, y in inside:
        hit |= (at[:, None] < x) & (at[None, :] < y)
    return hit.mean() * top**2


def pair_of(pairs, name):
    return next(pair for pair in pairs if pair.arm == name)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=2))
def test_the_hypervolume_is_the_area_over_all_learning_rates(points):
    found = config()
    arm = arm_figures(found.arm("ours"), {0: cell("ours", 0, points)}, found, ROLES, 100.0)
    assert arm.volumes[0] == pytest.approx(area(points, (0, 0)), abs=0.011)
    assert arm.num_points == 2


@given(st.lists(st.tuples(*[st.integers(-99, 99).map(lambda v: v / 64)] * 2), min_size=2, max_size=2))
def test_losses_are_placed_as_gain_and_minus_forgetting(points):
    found = config(metric="loss")
    assert found.reference == (0.0, -1.0)
    one = cell("ours", 0, points)
    placed = [coordinates(p, ROLES, "loss") for p in one.points]
    assert placed == [(pytest.approx(gain), pytest.approx(-rise)) for rise, gain in points]
    arm = arm_figures(found.arm("ours"), {0: one}, found, ROLES, 100.0)
    assert arm.volumes[0] == pytest.approx(area([(g, -r) for r, g in points], (0, -1)), abs=0.02)
    assert arm.num_outside == sum(g <= 0 or r >= 1 for r, g in points)


def test_a_diverged_point_adds_nothing_and_is_counted():
    found = config(metric="loss")
    one = cell("ours", 0, [(0.2, 0.5), (math.nan, 0.9)])
    arm = arm_figures(found.arm("ours"), {0: one}, found, ROLES, 100.0)
    assert (arm.num_diverged, arm.num_outside) == (1, 1)
    assert arm.volumes[0] == pytest.approx(0.5 * 0.8)
    canonical_json(analyse(found, {("ours", 0): filed(one)}, ()).plain())


def test_a_set_s_figures_are_of_the_seeds_that_did_not_diverge():
    found = config(metric="loss")
    cells = {0: cell("ours", 0, [(0.2, 0.5), (0.1, 0.9)]), 1: cell("ours", 1, [(0.2, 0.5), (math.nan, math.nan)])}
    _, second = arm_figures(found.arm("ours"), cells, found, ROLES, 100.0).points
    alone = arm_figures(found.arm("ours"), {0: cells[0]}, found, ROLES, 100.0).points[1]
    assert second.sets == alone.sets
    assert (second.x, second.y) == ((alone.x + 0.0) / 2, (alone.y - 1.0) / 2), "the plane counts it as the corner"
    none = {1: cell("ours", 1, [(math.nan, math.nan), (0.2, 0.5)])}
    (lost, _) = arm_figures(found.arm("ours"), none, found, ROLES, 100.0).points
    assert all(math.isnan(one.after) and math.isnan(one.kl) for one in lost.sets)
    canonical_json(analyse(found, {("ours", 1): filed(none[1])}, ()).plain())


def test_sets_of_one_role_count_alike():
    one = cell("ours", 0, [(0.25, 0.5)])
    metrics = dict(one.points[0].metrics)
    metrics["A2"] = {**metrics["A"], "exact_after": 0.75, "num_rows": 1000.0}
    point = dataclasses.replace(one.points[0], metrics=metrics)
    assert coordinates(point, {**ROLES, "A2": "general"}, "accuracy") == (0.5, 0.5)


def test_paired_figures_are_those_of_the_textbook():
    found = config()
    got = analyse(found, table(found, MEANS), ())
    arms = {arm.name: arm for arm in got.arms}
    assert [arm.name for arm in got.arms] == ["oracle", "ours", "cheap", "random"]
    pair = pair_of(got.against_random, "ours")
    a, b = np.array(arms["ours"].volumes), np.array(arms["random"].volumes)
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    assert (pair.interval.low, pair.interval.high) == (pytest.approx(low), pytest.approx(high))
    assert pair.interval.p_value == pytest.approx(test.pvalue)
    assert pair.improvement == np.mean([[(x > y) + 0.5 * (x == y) for y in b] for x in a])
    assert (pair.wins.wins, pair.wins.losses) == (int((a > b).sum()), int((a < b).sum()))
    assert pair.bootstrap.num_clusters == 10
    share = (a.mean() - b.mean()) / (np.mean(arms["oracle"].volumes) - b.mean())
    assert got.regained["ours"] == pytest.approx(share)
    assert set(got.regained) == {"ours", "cheap"}
    # Sharing a seed's luck makes the paired interval far narrower than the spread of the seeds.
    assert pair.interval.high - pair.interval.low < arms["ours"].sd


def test_the_best_cheap_arm_is_found_among_the_declared_ones_only():
    found = config()
    got = analyse(found, table(found, MEANS), ())
    assert got.best_cheap == "cheap"
    only = config(cheap=["random"])
    assert analyse(only, table(only, MEANS), ()).best_cheap == "random"
    same = table(found, {"random": 0.3, "cheap": 0.3}, noise=0.0)
    figures = {arm.name: arm for arm in analyse(found, same, ()).arms}
    assert best_cheap(found, figures) == "cheap", "equal means go to the smaller name"
    assert best_cheap(found, {}) == ""


def test_a_supported_claim_is_told_with_figure_seeds_trial_and_cost():
    found = config()
    analysis = analyse(found, table(found, MEANS), ())
    first, second = analysis.claims
    assert first.supported
    assert second.supported
    assert second.baseline == "cheap"
    assert first.sentence.startswith("ours beats random on the arithmetic world in hypervolume of (general accuracy")
    for part in ("n = 10", "T15", "total cost 1.00 against 1.00"):
        assert part in first.sentence
    assert "the arithmetic world stands alone: an interval over data sets needs 6 of them" in analysis.notes[2]


def test_beating_an_arm_that_lost_to_random_is_told_as_little():
    found = config()
    weak = analyse(found, table(found, {**MEANS, "cheap": 0.1}), ())
    told = {one.asked: one.sentence for one in weak.claims}
    assert "little" not in told["random"]
    named = config(claims=[{"arm": "ours", "baseline": "cheap"}])
    (beaten,) = analyse(named, table(named, {**MEANS, "cheap": 0.1}), ()).claims
    sentence = beaten.sentence
    assert beaten.weak
    assert "Beating it says little: cheap itself lost to random, -" in sentence
    (fair,) = analyse(named, table(named, MEANS), ()).claims
    assert not fair.weak
    assert "little" not in fair.sentence


def test_a_best_cheap_arm_that_is_random_is_told_and_has_no_second_column():
    found = config(cheap=["random"], claims=[{"arm": "ours", "baseline": name} for name in ("random", "best_cheap")])
    got = analyse(found, table(found, MEANS), ())
    first, second = (told.sentence for told in got.claims)
    assert second == f"{first} random is the best cheap arm there."
    text = words.markdown(found, got, {"command": "x", "date": "", "commit": "", "hardware": "", "config_sha256": ""})
    assert text.count("minus random |") == 1
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {rows[0].count("|")}
    other = analyse(config(), table(config(), MEANS), ())
    both = words.markdown(
        config(), other, {"command": "x", "date": "", "commit": "", "hardware": "", "config_sha256": ""}
    )
    assert "minus random |" in both
    assert "minus cheap |" in both


@pytest.mark.parametrize("ours", [0.05, 0.20])
def test_without_an_advantage_the_sentence_says_so(ours):
    found = config()
    for told in analyse(found, table(found, {**MEANS, "ours": ours}), ()).claims:
        assert not told.supported
        assert f"no advantage over {told.baseline} was measured" in told.sentence
        assert "beats" not in told.sentence


def test_few_seeds_never_make_a_claim():
    found = config(seeds="0-8")
    for told in analyse(found, table(found, MEANS, noise=1e-4), ()).claims:
        assert not told.supported
        assert "9 seeds are not enough for a claim" in told.sentence


def test_an_unfinished_comparison_is_not_judged():
    found = config(seeds="0-19")
    got = analyse(found, table(found, MEANS, noise=1e-4, seeds=range(12)), (Missing("ours", 12, "not started"),))
    for told in got.claims:
        assert not told.supported
        assert "12 of 20 declared seeds are finished" in told.sentence
        assert f"no advantage over {told.baseline} was measured" in told.sentence
    assert "1 of 49 declared cells were not run." in got.notes


def test_a_claim_over_the_best_cheap_arm_waits_for_all_of_them():
    found = config(cheap=["random", "cheap", "oracle"])
    means = {**MEANS, "oracle": 0.22}
    whole = table(found, means)
    assert [told.supported for told in analyse(found, whole, ()).claims] == [True, True]
    for lacking, reached in (({"oracle": 0}, "oracle (0)"), ({"oracle": 3}, "oracle (3)")):
        some = {at: one for at, one in whole.items() if at[1] < lacking.get(at[0], 10)}
        gone = tuple(Missing(*at, "not started") for at in whole if at not in some)
        first, second = analyse(found, some, gone).claims
        assert first.supported, "the other claim does not need them"
        assert not second.supported
        assert f"lack some: {reached}. So far ours minus" in second.sentence
        assert second.sentence.startswith("no advantage over best_cheap was measured")
    some = {at: one for at, one in whole.items() if at[0] != "oracle"}
    gone = tuple(Missing(*at, "not applicable: a target set") for at in whole if at not in some)
    (_, told) = analyse(found, some, gone).claims
    assert told.supported
    assert told.sentence.endswith("cheap is the best cheap arm there of those that apply (oracle cannot run).")


def test_an_arm_without_cells_is_told_as_such():
    found = config()
    got = analyse(found, table(found, {"random": 0.2, "cheap": 0.3}), ())
    assert all("share no finished seed" in told.sentence for told in got.claims)
    assert got.regained == {}


def test_cells_of_different_library_versions_are_noted():
    found = config(seeds="0-1")
    cells = table(found, MEANS)
    assert not any("different versions" in note for note in analyse(found, cells, ()).notes)
    for seed, transformers in ((0, "5.17.0"), (1, "5.24.0")):
        one = cells["ours", seed]
        versions = {"python": "3.12", "transformers": transformers}
        cells["ours", seed] = dataclasses.replace(one, origin=dataclasses.replace(one.origin, versions=versions))
    notes = analyse(found, cells, ()).notes
    assert "cells were made with different versions of transformers 5.17.0, 5.24.0." in notes


def test_cells_of_two_commits_are_noted():
    found = config(seeds="0-1")
    cells = table(found, MEANS)
    cells["ours", 1] = filed(cells["ours", 1].cell, commit="d" * 40)
    assert any("2 commits" in note for note in analyse(found, cells, ()).notes)


def test_costs_add_up_choosing_and_the_dearest_training():
    found = config(seeds="0")
    one = cell("ours", 0, [(0.5, 0.5), (0.5, 0.4)], cost={"collect": Cost(40.0), "policy": Cost(10.0)})
    dear = dataclasses.replace(one.points[1], cost={"train": Cost(100.0), "hook": Cost(60.0)})
    one = dataclasses.replace(one, points=(one.points[0], dear))
    cells = {("random", 0): filed(cell("random", 0, [(0.5, 0.5), (0.4, 0.4)])), ("ours", 0): filed(one)}
    spent = next(arm for arm in analyse(found, cells, ()).arms if arm.name == "ours").spent
    assert (spent.choosing, spent.training, spent.relative) == (50.0, 160.0, 2.1)
    assert spent.parts == {"collect": 40.0, "policy": 10.0, "train": 100.0, "hook": 30.0}


def test_lost_and_won_rows_are_adjusted_as_forgetting_does():
    found = config(chance=0.25)
    rng = np.random.default_rng(3)
    before, after = rng.random(20) < 0.6, rng.random(20) < 0.5
    one = cell("ours", 0, [(0.5, 0.5), (0.5, 0.5)])
    counts = {
        "exact_before": before.mean(),
        "lost": float((before & ~after).sum()),
        "won": float((~before & after).sum()),
        "num_rows": 20.0,
    }
    points = tuple(
        dataclasses.replace(p, metrics={n: {**m, **counts} for n, m in p.metrics.items()}) for p in one.points
    )
    arm = arm_figures(found.arm("ours"), {0: dataclasses.replace(one, points=points)}, found, ROLES, 1.0)
    got, slow = arm.points[0].sets[0], transitions(before, after, np.full(20, 0.25))
    assert (got.lost, got.won) == (pytest.approx(slow.forgotten), pytest.approx(slow.learned))
    assert got.lost_adjusted == pytest.approx(slow.forgotten_adjusted)
    assert got.won_adjusted == pytest.approx(slow.learned_adjusted)


def test_the_rule_is_simulated_at_the_number_of_seeds_in_use():
    assert null_rate(10, "t") == pytest.approx(0.05, abs=0.006)
    assert 0.08 < null_rate(10, "bootstrap") < 0.12
    assert math.isnan(null_rate(1, "t"))
    assert analyse(config(seeds="0-4"), table(config(seeds="0-4"), MEANS), ()).n == 5


def placebo_config(num_runs=40, size=5, **more):
    arms = [
        {"name": "random", "method": "random"},
        {"name": "null", "method": "ogs_dual", "placebo": "permuted_scores"},
    ]
    return config(
        arms=arms, cheap=["random"], claims=[], seeds=f"0-{num_runs * size - 1}",
        placebo={"seeds_per_run": size, "num_runs": num_runs, **more},
    )  # fmt: skip


def null_cells(found, shift):
    rng, out = np.random.default_rng(11), {}
    for seed in found.seeds:
        luck = rng.normal(0, 0.05)
        for name, extra in (("random", 0.0), ("null", shift)):
            side = math.sqrt(0.3 + luck + extra + rng.normal(0, 0.01))
            out[name, seed] = filed(cell(name, seed, [(side, side), (0.1, 0.1)]))
    return out


def test_honest_placebos_pass_and_a_leak_fails():
    found = placebo_config()
    got = analyse(found, null_cells(found, 0.0), ())
    (check,) = got.placebos
    assert check.passed
    assert got.passed
    assert check.num_runs == 40
    assert check.gains <= 5
    assert check.uniform.n == 40
    assert "The check holds." in check.sentence
    leak = analyse(found, null_cells(found, 0.01), ())
    assert not leak.passed
    assert leak.placebos[0].gains > 5
    assert "THE CHECK FAILS" in leak.placebos[0].sentence
    assert leak.plain()["passed"] is False


def test_runs_of_placebos_are_the_declared_groups_of_seeds():
    found = placebo_config(num_runs=4)
    cells = null_cells(found, 0.0)
    del cells["null", 7]
    check = analyse(found, cells, ()).placebos[0]
    assert (check.num_runs, check.num_declared) == (3, 4)
    assert "The check holds so far." in check.sentence
    slow = [
        stats.ttest_rel(
            *[[math.prod(_top(cells[n, s].cell)) for s in range(k, k + 5)] for n in ("null", "random")]
        ).pvalue
        for k in (0, 10, 15)
    ]
    assert check.uniform.statistic == pytest.approx(stats.kstest(slow, "uniform").statistic)


def _top(one):
    return coordinates(one.points[0], ROLES, "accuracy")


def test_p_values_that_are_not_uniform_fail_too():
    found = placebo_config(max_gains=40, min_uniform=0.01)
    check = analyse(found, null_cells(found, 0.02), ()).placebos[0]
    assert not check.passed
    assert "not uniform" in check.sentence


def test_a_placebo_arm_of_an_ordinary_comparison_must_not_gain():
    arms = [*values()["arms"], {"name": "null", "method": "ogs_dual", "placebo": "permuted_scores"}]
    found = config(arms=arms)
    assert analyse(found, table(found, {**MEANS, "null": 0.2}), ()).passed
    assert not analyse(found, table(found, {**MEANS, "null": 0.35}), ()).passed


def test_the_markdown_says_what_made_it_and_what_is_missing():
    found = config()
    missing = tuple(Missing("oracle", seed, "no oracle\nthere") for seed in (0, 1, 2, 5))
    cells = {key: one for key, one in table(found, MEANS).items() if key[0] != "oracle"}
    got = analyse(found, cells, missing)
    manifest = {"command": "gradsift compare", "date": "2026-01-01", "commit": "abc", "hardware": "a machine",
                "config_sha256": "f" * 64}  # fmt: skip
    text = words.markdown(found, got, manifest)
    for part in ("gradsift compare", "2026-01-01", "abc", "a machine", "ours beats random", "20,000 null draws",
                 "not run (no oracle there): oracle (seeds 0-2,5)", "favours the baseline", "3 variants"):  # fmt: skip
        assert part in text, part
    assert "nan" not in text
