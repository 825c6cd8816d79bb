"""The arithmetic of docs/scale.md: rate times number, and a page that says what the script prints."""

from __future__ import annotations

import pytest
from benchmarks.projection import PAGE, clock, lines, page, rates, size


def test_the_page_says_what_the_script_prints():
    text = PAGE.read_text("utf-8")
    assert text.count("<!-- projection -->") == 1
    assert page(text, 512) == text


def test_rates_and_times_by_hand():
    base = rates(
        {"rows_per_unit": 64, "adopt_seconds": 0.064, "planned_rows": 1000, "plan_seconds": 0.06, "claim_seconds": 0.04,
         "dim": 100, "bytes_over": 0.5}
    )  # fmt: skip
    assert (base.committed, base.planned, base.row_bytes) == pytest.approx((1000, 10_000, 300))
    gpu = {"cells": [{"model": "M", "length": 10, "arms": [{"key": "sketch, body", "tokens_per_second": 1000.0}]}]}
    one, eight, many = list(lines(gpu, base, 10))[2:]
    # 1e6 rows at 100 rows/s, and 100 s of planning
    assert "100 rows/s per GPU | 1 | 2.8 h | 11.7 days | the GPUs | 30000 bytes/s" in one
    assert clock(1e6 / 800 + 100) in eight
    assert "the GPUs" in eight
    assert clock(1e6 / 1000 + 100) in many
    assert "rank 0" in many


@pytest.mark.parametrize(("seconds", "said"), [(59, "59 s"), (60, "1.0 min"), (7199, "120.0 min"), (7200, "2.0 h"), (172_800, "2.0 days")])  # fmt: skip
def test_clock(seconds, said):
    assert clock(seconds) == said


def test_size():
    assert [size(n) for n in (10, 1e6, 2.5e9, 3e12)] == ["10 bytes", "1.0 MB", "2.5 GB", "3.0 TB"]
