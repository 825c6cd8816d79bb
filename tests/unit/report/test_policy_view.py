"""What is said of a policy: tables, sentences, pictures and the page's section, from invented details."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policy_details import LEARNED, make_policy_run, some_details, tried
from tests.report_fixture import HOSTILE, write_run

from gradsift.errors import ConfigError, StoreError
from gradsift.report import policy_charts, policy_view, policy_words
from gradsift.report.page import render_html
from gradsift.report.policy_fields import parse_details
from gradsift.report.run import read_policy, read_run
from gradsift.report.words import MINUS, sentence

FINITE = st.floats(-10, 10, allow_nan=False)


def changed(**changes):
    return parse_details({**some_details(), **changes})


@given(st.integers(1, 500), st.integers(2, 20))
def test_thinned_keeps_both_ends_and_no_more_than_asked(num, most):
    kept = policy_view.thinned(num, most)
    assert (kept[0], kept[-1]) == (0, num - 1)
    assert len(kept) == min(num, most)
    assert list(kept) == sorted(set(kept))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=40))
def test_the_list_is_shown_whole(moves):
    details = changed(mix=[{"cluster": k, "rows": rows} for k, rows in moves])
    grid = policy_view.mix_grid(details)
    seen = []
    for decisions, cluster, kind, _ in grid.lines:
        first, _, last = decisions.partition(" to ")
        seen += [(t, int(cluster), kind) for t in range(int(first), int(last or first) + 1)]
    assert seen == [(t, k, "general" if k == 3 else "domain") for t, (k, _) in enumerate(moves, 1)]
    assert sum(int(line[3]) for line in grid.lines) == sum(rows for _, rows in moves)
    [clusters] = policy_view.clusters_grids(details)
    taken = [sum(rows for k, rows in moves if k == c) for c in range(5)]
    assert [int(line[clusters.headings.index("taken")]) for line in clusters.lines] == taken
    general = sum(rows for k, rows in moves if k == 3)
    assert f"{general} of {sum(taken)} row" in policy_words.mix_words(details)


@given(st.lists(st.tuples(FINITE, FINITE, st.sampled_from([True, False, None])), min_size=1, max_size=8))
def test_the_contest_is_shown_whole_and_in_groups(figures):
    entries = [
        tried(f"p{i}", [] if keeps is None else [gain, gain], {"math": [] if keeps is None else [rise, rise]}, keeps=keeps)
        for i, (gain, rise, keeps) in enumerate(figures)
    ]  # fmt: skip
    entries.append(tried("mine", [-99.0], {"math": [0.0]}, keeps=False))
    rng = np.random.default_rng(len(entries))
    entries = [entries[i] for i in rng.permutation(len(entries))]
    details = changed(limits={"math": 0.5}, start={"math": 2.0}, contest=entries, policy="mine", training=None)
    order = policy_view.ranked(details)
    assert order[0].policy == "mine"
    assert sorted(one.policy for one in order) == sorted(e["policy"] for e in entries)
    groups = [{True: 0, False: 1, None: 2}[one.keeps] for one in order[1:]]
    assert groups == sorted(groups)
    real = [(g, float(np.mean(one.gain))) for g, one in zip(groups, order[1:], strict=True) if one.gain]
    assert real == sorted(real, key=lambda pair: (pair[0], -pair[1]))
    [grid] = policy_view.contest_grids(details)
    assert grid.lines[0][0] == "* mine"
    assert [line[-1] for line in grid.lines[1:]] == [{0: "yes", 1: "no", 2: "-"}[g] for g in groups]


@given(st.lists(FINITE, min_size=1, max_size=6))
def test_mean_and_spread_are_the_obvious_ones(values):
    shown = policy_words.mean_of(values).split(" \u00b1 ")
    mean = sum(values) / len(values)
    assert float(shown[0]) == pytest.approx(mean, abs=6e-5)
    assert len(shown) == (1 if len(values) == 1 else 2)
    if len(values) > 1:
        spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        assert float(shown[1]) == pytest.approx(spread, abs=6e-5)


def test_figures_stand_under_their_headings():
    details = changed()
    [grid] = policy_view.contest_grids(details)
    line = dict(zip(grid.headings, next(one for one in grid.lines if one[0] == "breaker"), strict=True))
    assert line["real gain\n\u00b1 sd"] == "+0.2050 \u00b1 0.0071"
    assert line["rise of\ngeneral\nup to\n+0.0400"] == "+0.0800"
    assert line["rise of\nmath\nup to\n+0.0500"] == "+0.0150"
    assert (line["n"], line["kept"], line["gain,\nsimul."]) == ("2", "no", "+0.1900")
    [training] = policy_view.training_grids(details.training, details)
    assert len(training.lines) == 10
    last = dict(zip(training.headings, training.lines[-1], strict=True))
    assert last["epoch"] == "60"
    assert float(last["greedy\ngain"]) == pytest.approx(details.training.greedy_gain[-1], abs=6e-5)
    assert float(last["gain"]) == pytest.approx(details.training.gain[-1], abs=6e-5)
    assert float(last["price\nmath"]) == pytest.approx(details.training.price["math"][-1], rel=5e-3)
    assert float(last["rise\ngeneral"]) == pytest.approx(details.training.rise["general"][-1], abs=6e-5)
    limits = policy_view.limits_grid(details)
    assert limits.lines[1] == ("math", "3.0000", "+0.0500", "1.67%")
    assert limits.lines[-1] == ("target", "3.2500", "-", "-")


def test_the_verdict_on_the_limits():
    details = changed()
    by_name = {one.policy: policy_words.verdict_on(one, details) for one in details.contest}
    assert by_name[LEARNED] == "returned; keeps all"
    assert by_name["uniform"] == "keeps all"
    assert by_name["breaker"] == "general 100% over"
    assert by_name["exp3"] == "simulated only"


def test_the_headline_says_what_the_figures_allow():
    assert "(the learned policy) was returned: on its 2 real roll-outs it keeps every limit" in policy_words.headline(
        changed()
    )
    one = policy_words.headline(changed(policy="uniform"))
    assert "learned" not in one
    broken = policy_words.headline(changed(policy="breaker", feasible=False))
    assert "no policy kept every limit" in broken
    assert "broke that of general by 100%" in broken
    noisy = {"general": [0.03, 0.054], "math": [0.0, 0.0]}
    contest = [tried("uniform", [0.1, 0.1], noisy, keeps=True)]
    near = policy_words.headline(changed(policy="uniform", contest=contest, training=None))
    assert "within one standard error" in near
    assert "general is 5% above its limit" in near
    nothing = changed(policy="uniform", contest=[tried("uniform", [0.1], {"math": [0.1]}, keeps=False)],
                      limits={"math": 0.0}, start={"math": 0.0}, training=None, feasible=False)  # fmt: skip
    assert "broke that of math by more than any share" in policy_words.headline(nothing)
    assert policy_charts.contest(nothing)


@pytest.mark.parametrize(
    ("changes", "on", "words"),
    [
        ({}, "simulator", "trained for 60 epochs (19,000 decisions); there, the one that was kept keeps the limits"),
        ({"training": None, "simulator": {"accepted": False, "horizon": 0, "sentence": "no"}}, "simulator", "is not trusted"),
        ({"training": None, "simulator": {"accepted": False, "horizon": 0, "sentence": "no"}}, "navigator", "found nothing"),
        ({"training": None}, "simulator", "found nothing"),
    ],
)  # fmt: skip
def test_why_there_is_a_learned_policy_or_none(changes, on, words):
    assert words in policy_words.training_words(changed(**changes), on)


def test_the_simulators_verdict_is_said_once():
    details = changed()
    assert policy_words.simulator_words(details).endswith("of the navigator went into it")
    assert policy_words.other_notes(details) == details.notes[1:]


def test_the_learned_policy_has_the_name_that_the_contest_gives_it():
    from gradsift.policy.contest import LEARNED as NAME

    assert policy_words.LEARNED == NAME == LEARNED


def damage(change):
    values = some_details()
    change(values)
    return values


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("limits"),
        lambda d: d["mix"].append({"cluster": 5, "rows": 1}),
        lambda d: d["contest"][0]["rise"].pop("math"),
        lambda d: d["contest"][0]["gain"].append(0.1),
        lambda d: d["contest"][0].update(keeps=None),
        lambda d: d.update(policy="exp3"),
        lambda d: d["training"]["price"]["math"].pop(),
        lambda d: d["training"]["greedy_gain"].pop(),
        lambda d: d["clusters"][0].update(loss="<b>"),
    ],
)
def test_figures_that_do_not_belong_together_are_refused(change):
    parse_details(some_details())
    with pytest.raises(StoreError, match="expected fields"):
        parse_details(damage(change))


@pytest.mark.parametrize("num", [1, 3, 7])
def test_many_sources_go_on_in_further_tables(num):
    names = tuple(f"source {k}" for k in range(num))
    details = parse_details(some_details(names))
    for grids in (policy_view.contest_grids(details), policy_view.training_grids(details.training, details),
                  policy_view.clusters_grids(details)):  # fmt: skip
        shown = [h for grid in grids for h in grid.headings]
        assert all(sum(bool(re.search(rf"\b{name}\b", h.replace("\n", " "))) for h in shown) >= 1 for name in names)
        assert all(len(set(grid.headings)) == len(grid.headings) for grid in grids)
        assert all(len(line) == len(grid.headings) for grid in grids for line in grid.lines)
        assert all(grid.right <= set(grid.headings) for grid in grids)
    assert len(policy_view.contest_grids(details, wide=True)) == 1
    if num == 7:
        assert len(policy_charts.contest(details)) == 1 + policy_charts.MAX_SOURCES


def test_sources_that_look_alike_are_told_apart():
    details = parse_details(some_details(("a very long name 1", "a very long name 2")))
    [grid] = policy_view.contest_grids(details)
    assert len(set(grid.headings)) == len(grid.headings)


def test_a_page_has_minus_signs_and_no_hyphens_for_figures():
    [grid] = policy_view.clusters_grids(changed())
    shown = grid.typeset()
    assert any(MINUS in cell for line in shown for cell in line)
    assert not any(re.search(r"-\d", cell) for line in shown for cell in line)


def test_sentences():
    assert sentence("the end") == "The end."
    assert sentence(" done? ") == "Done?"
    assert sentence("") == ""


def page(folder, details):
    return render_html(read_run(make_policy_run(write_run(folder / "run"), details)))


def test_the_section_stands_on_the_page_and_only_there(tmp_path):
    with_it = page(tmp_path, some_details())
    without = render_html(read_run(write_run(tmp_path / "other")))
    assert 'id="policy"' in with_it
    assert 'href="#policy"' in with_it
    assert "olicy" not in without.replace("Content-Security-Policy", "")
    section = with_it[with_it.index('<section id="policy">') :].split("</section>")[0]
    assert section.count("<svg") == 3 + 1 + 3
    assert "keeps every limit" in section
    assert "No advantage of the learned policy over ogs_dual_clusters was measured." in section


def test_a_policy_that_was_not_learned_leaves_its_reason(tmp_path):
    section = page(tmp_path, some_details(trained=0, accepted=False, policy="uniform"))
    assert "No policy was learned: the simulator" in section
    assert "Prices over training" not in section


def test_hostile_names_stay_text(tmp_path):
    bad = [text for text in HOSTILE if "\ud800" not in text]
    details = some_details(tuple(bad))
    details["notes"] += bad
    details["contest"][0]["policy"] = bad[0]
    text = page(tmp_path, details)
    assert "<script" not in text
    assert not re.search(r"<(img|a href=.http|style>\*)", text)
    assert "{{ 7*7 }}" in text


def test_details_of_another_method_are_not_read(tmp_path):
    run = make_policy_run(write_run(tmp_path / "run"), {"left": "by an earlier run"})
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["selection"]["method"] = "random"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert read_run(run).details is None
    with pytest.raises(ConfigError, match="no policy"):
        read_policy(run)
