"""The report in headless Chromium: charts are there, nothing is fetched, nothing is executed, no console error."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from tests.report_fixture import write_run

from gradsift.report.page import render_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--enable-logging=stderr",
    "--v=0",
]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("hostile", [False, True])
def test_the_page_opens_clean(tmp_path, hostile):
    page = render_report(write_run(tmp_path / "run", hostile=hostile))
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
    assert done.stdout.count("<svg") >= 8
    assert "CONSOLE" not in done.stderr, done.stderr
    text = log.read_text("utf-8").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("}") and '"events"' in text and text.count("]}") else text + "]}")
    urls = [str(e["params"]["url"]) for e in events["events"] if "url" in e.get("params", {})]
    asked = [
        u for u in urls if u.startswith(("http:", "https:", "ws:", "ftp:")) and "google" not in u and "gvt" not in u
    ]
    assert asked == []
