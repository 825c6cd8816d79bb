"""The page of a comparison: losing arms and missing cells are on it, foreign text does nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fabricated import cell, config, filed, table, values

from gradsift.compare.analysis import Missing, analyse
from gradsift.report.compare_charts import free_place
from gradsift.report.compare_page import headline, render_compare, render_html

MEANS = {"random": 0.20, "cheap": 0.25, "ours": 0.10, "oracle": 0.60}
MANIFEST = {
    "command": "gradsift compare --out '<script>alert(1)</script>'",
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "c" * 40,
    "hardware": "a machine",
    "config_sha256": "f" * 64,
    "versions": {"gradsift": "0.1.0"},
    "config": {"seeds": [0]},
}


def page(found=None, cells=None, missing=()):
    found = found or config()
    return render_html(found, analyse(found, cells or table(found, MEANS), missing), MANIFEST)


def test_the_page_shows_losing_arms_claims_and_missing_cells():
    html = page(missing=(Missing("ours", 10, "it broke <b>badly</b>"),))
    assert "0 of 2 declared claims supported in the arithmetic world" in html
    assert "no advantage over random was measured" in html
    assert "no advantage over cheap was measured" in html
    assert "it broke &lt;b&gt;badly&lt;/b&gt;" in html
    assert "ours (seeds 10)" in html
    assert html.count("<svg") == 5
    assert "20,000 null draws" in html
    assert "never does" in html


def test_a_rate_at_which_every_seed_diverged_leaves_the_page_whole():
    found = config()
    nan = float("nan")
    lost = {at: filed(cell(*at, [(0.2, 0.3), (nan, nan)])) for at in table(found, MEANS) if at[0] == "ours"}
    html = page(found, table(found, MEANS) | lost)
    assert "10 diverged" in html
    assert not re.search(r"\bnan\b", html, re.IGNORECASE)


def test_points_below_the_corner_are_counted_and_stand_at_the_edge():
    found = config()
    cells = table(found, MEANS)
    assert "Triangles" not in page(found, cells)
    assert "below it at every learning rate" not in page(found, cells)
    far = {key: filed(cell(*key, [(-0.5, 0.4), (0.2, 0.3)])) for key in cells if key[0] == "ours"}
    html = page(found, cells | far)
    assert "Triangles at the edge: 1 point below the corner (0, 0), which add nothing." in html
    assert "below it at every learning rate" not in html, "its other learning rate lies inside"


def test_an_arm_that_is_worse_than_the_corner_is_named_with_its_place():
    found = config()
    cells = table(found, MEANS)
    far = {key: filed(cell(*key, [(-0.5, 0.4), (-0.25, 0.3)])) for key in cells if key[0] == "ours"}
    html = page(found, cells | far)
    assert "ours (-0.25, 0.3)" in html
    assert "below it at every learning rate, (general accuracy, domain accuracy): ours (-0.250, +0.300)." in html


def test_many_claims_stand_in_a_table_with_their_sentences_below():
    claims = [{"arm": "ours", "baseline": name} for name in ("random", "cheap", "oracle", "best_cheap")]
    found = config(claims=claims)
    html = page(found, table(found, MEANS))
    assert html.count("no advantage was measured; it lost") == 4
    assert "<summary>The claims in full" in html
    assert "no advantage over oracle was measured" in html
    assert "<summary>The claims in full" not in page()


def test_the_page_is_one_file_without_scripts():
    html = page()

    class Look(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "iframe", "object", "img", "base", "form", "embed")
            for key, value in attrs:
                assert not key.startswith("on")
                if key in ("href", "src"):
                    assert value.startswith("#") or value == "data:,"

    Look().feed(html)
    assert "<script>" not in html
    assert "default-src &#39;none&#39;" in html
    assert not re.search(r"url\(|@import", html)
    assert page() == html


def test_hostile_names_are_only_seen():
    evil = '"><img src=x onerror=alert(1)>\u202e'
    found = config(seeds="0-1")
    cells = {
        (name, seed): filed(
            cell(name, seed, [(0.4, 0.4), (0.3, 0.5)], notes=(evil,), shares={evil: 0.5, "{{7*7}}": 0.5})
        )
        for name in MEANS
        for seed in (0, 1)
    }
    html = page(found, cells)
    assert "<img" not in html
    assert "\u202e" not in html
    assert "{{7*7}}" in html


@pytest.mark.parametrize("drop", ["random", "oracle", "cheap"])
def test_arms_may_be_absent(drop):
    found = config()
    html = page(found, {key: one for key, one in table(found, MEANS).items() if key[0] != drop})
    assert "no advantage over" in html
    assert "declared claims supported" in html


def test_one_seed_and_constant_differences_draw():
    found = config(seeds="0")
    assert "0 of 2 declared claims supported" in page(found, table(found, MEANS))
    found = config(seeds="0-1")
    equal = {(n, s): filed(cell(n, s, [(0.5, 0.5), (0.5, 0.5)])) for n in MEANS for s in (0, 1)}
    assert "0 of 2 declared claims supported" in page(found, equal)


def test_a_failed_placebo_is_the_headline(tmp_path):
    arms = [*values()["arms"], {"name": "null", "method": "ogs_dual", "placebo": "permuted_scores"}]
    found = config(arms=arms)
    got = analyse(found, table(found, {**MEANS, "null": 0.5}), ())
    assert "placebo check failed" in headline(found, got)
    path = render_compare(tmp_path, found, got, MANIFEST)
    assert "THE CHECK FAILS" in path.read_text("utf-8")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 560), st.floats(0, 380), st.floats(20, 160)), min_size=1, max_size=4))
def test_names_in_the_plane_do_not_lie_on_each_other(points):
    taken = []
    for x, y, width in points:
        right, dy = free_place(x, y, width, taken)
        low, high, middle = taken[-1]
        assert middle == pytest.approx(y + dy)
        assert (low, high) == pytest.approx((x + 7, x + 7 + width) if right else (x - 7 - width, x - 7))
    assert len(taken) == len(points)
    for k, (a, b, c) in enumerate(taken):
        for d, e, f in taken[:k]:
            assert b <= d or e <= a or abs(c - f) >= 12.99


def test_a_lone_name_stands_right_above_its_point_and_left_of_it_at_the_right_edge():
    assert free_place(100, 100, 80, []) == (True, -5)
    assert free_place(540, 100, 80, []) == (False, -5)
