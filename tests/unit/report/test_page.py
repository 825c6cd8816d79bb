"""The page and the card: every section, hostile strings, missing sections, hidden texts."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.report_fixture import HOSTILE, write_run

from gradsift.errors import ConfigError, StoreError
from gradsift.report.card import render_card
from gradsift.report.page import CSP, render_report
from gradsift.report.run import read_run

OPTIONAL = ("navigator", "spec", "directions", "direction_cos", "noise", "sketch", "batch_check", "set_conflict")


class Scan(HTMLParser):
    """Collects what could do something in a browser."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name.startswith("on"):
                self.handlers.append(name)
            if name in ("href", "src", "xlink:href", "action") and not (value or "").startswith("#"):
                self.links.append(value)


def scan(page):
    parser = Scan()
    parser.feed(page)
    return parser


def test_the_page_has_its_charts_and_no_script(tmp_path):
    page = render_report(write_run(tmp_path / "run")).read_text("utf-8")
    found = scan(page)
    assert found.tags.count("svg") >= 8
    assert not {"script", "iframe", "object", "embed", "form"} & set(found.tags)
    assert found.handlers == []
    assert [link for link in found.links if not link.startswith("data:")] == []
    assert CSP in html.unescape(page)
    for words in ("What was read", "The cut", "Kept rows against the pool", "Cost"):
        assert words in page


def test_hostile_strings_stay_text(tmp_path):
    page = render_report(write_run(tmp_path / "run", hostile=True)).read_text("utf-8")
    found = scan(page)
    assert not {"script", "iframe", "object", "img"} & set(found.tags)
    assert found.handlers == []
    assert not [link for link in found.links if link and "javascript" in link.lower()]
    assert "\u202e" not in page
    assert "&lt;script" in page
    assert len(HOSTILE) >= 5


@pytest.mark.parametrize("section", OPTIONAL)
def test_a_missing_section_is_said(tmp_path, section):
    page = render_report(write_run(tmp_path / "run", without=(section,))).read_text("utf-8")
    assert "svg" in page
    if section != "spec":
        assert re.search(r"[Nn]ot measured", page)


def test_weak_directions_lose_their_words(tmp_path):
    page = render_report(write_run(tmp_path / "run", reliability={"math": 0.1})).read_text("utf-8")
    assert "no reliable direction" in page.lower()


def test_redacted_pages_hold_no_texts(tmp_path):
    run = write_run(tmp_path / "run")
    rows = json.loads((run / "selection" / "examples.json").read_text())
    words = max(re.findall(r"[a-zA-Z ]+", "".join(text for text, _ in rows[0]["segments"])), key=len).strip()
    assert len(words) > 10
    assert words in render_report(run).read_text("utf-8")
    assert words not in render_report(run, redact=True).read_text("utf-8")


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    assert render_report(run).read_bytes() == render_report(run).read_bytes()


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(ConfigError):
        render_report(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "manifest.json").write_text("{torn")
    with pytest.raises(StoreError):
        render_report(run)


def test_the_card_is_a_data_set_card(tmp_path):
    manifest = json.loads((write_run(tmp_path / "run") / "manifest.json").read_text())
    card = render_card(manifest)
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"][0]["path"] == "selected.jsonl"
    for words in ("load_dataset", "SFTConfig", "dataset_info.json", "axolotl", "## Limits", manifest["command"]):
        assert words in card


def test_many_undecided_rows_are_counted_and_found_in_the_table(tmp_path):
    run = write_run(tmp_path / "run")
    plain = render_report(run).read_text("utf-8")
    assert "1 row could change sides" in plain  # a run of before the column names them all in its manifest
    path = run / "selection/audit.parquet"
    table = pq.read_table(path)
    usable = [status in ("OK", "TRUNCATED") for status in table["status"].to_pylist()]
    pq.write_table(table.append_column("undecided", pa.array(usable)), path)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["selection"]["cut"] |= {"num_undecided": 1234}
    (run / "manifest.json").write_text(json.dumps(manifest))
    page = render_report(run).read_text("utf-8")
    assert "1,234 rows could change sides" in page
    assert "1,234 undecided" in page
    assert "and 1,233 more in audit.parquet" in page
    assert read_run(run).audit.undecided.tolist() == usable
