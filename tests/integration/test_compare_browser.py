"""The page of a comparison in headless Chromium: it draws, fetches nothing and logs nothing."""

from __future__ import annotations

import subprocess

import pytest
from tests.fabricated import config, table
from tests.integration.test_report_browser import CHROMIUM, FLAGS

from gradsift.compare.analysis import analyse
from gradsift.report.compare_page import render_compare

MANIFEST = {"command": "gradsift compare", "date": "2026-01-01T00:00:00+00:00", "commit": "", "hardware": "a machine",
            "config_sha256": "f" * 64, "versions": {}, "config": {}}  # fmt: skip


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_opens_clean(tmp_path):
    found = config()
    got = analyse(found, table(found, {"random": 0.2, "cheap": 0.3, "ours": 0.4, "oracle": 0.6}), ())
    page = render_compare(tmp_path, found, got, MANIFEST)
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert done.stdout.count("<svg") == 5
    assert "CONSOLE" not in done.stderr, done.stderr
    urls = [part.split('"')[0] for part in log.read_text("utf-8").split('"url":"')[1:]]
    ours = [
        u for u in urls if u.startswith(("http:", "https:", "ws:", "ftp:")) and "google" not in u and "gvt" not in u
    ]
    assert ours == []
