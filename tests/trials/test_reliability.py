"""The reliability trials in small: each meets what it asks, and each is seen to fail on every defect planted in it.

Trials that fork, or change their process for good, run in one of their own, as all of them do at full size.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.reliability import frame, run
from benchmarks.reliability.frame import SOUND, Check, Outcome, Trial

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "reliability"
TRIALS = {name: frame.load(name) for name in frame.names()}


def cases(slow: bool) -> list:
    return [
        pytest.param(name, defect, id=f"{name}-{defect or 'sound'}")
        for name, trial in TRIALS.items()
        for defect in (SOUND, *trial.defects)
        if (trial.slow or defect in trial.slow_defects) == slow
    ]


def check(name: str, defect: str) -> None:
    trial = TRIALS[name]
    if trial.barred():
        pytest.skip(trial.barred())
    if trial.shares_process:
        figures = frame.measure(trial, False, defect)
    else:
        found = frame.run_child(name, False, defect, 110)
        assert "figures" in found, found["error"]
        figures = found["figures"]
    outcome = trial.judge(figures)
    beyond = frame.missed(outcome) - set(trial.may_miss)
    assert bool(beyond) == (defect != SOUND), outcome.line()


@pytest.mark.parametrize(("name", "defect"), cases(slow=False))
def test_quick(name, defect):
    check(name, defect)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "defect"), cases(slow=True))
def test_quick_but_not_so_quick(name, defect):
    check(name, defect)


def committed() -> list[Path]:
    return sorted(RESULTS.glob("r*.json"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_committed_results_follow_from_their_figures(path):
    record = json.loads(path.read_bytes())
    trial = TRIALS[record["trial"]]
    assert record["size"] == "full"
    assert trial.judge(record["figures"]).line() == record["line"]
    assert [found["defect"] for found in record["planted"]] == list(trial.defects)
    for found in record["planted"]:
        assert found["seen"]
        assert frame.missed(trial.judge(found["figures"])) - frame.missed(trial.judge(record["figures"]))


# The frame itself


def count(full: bool, defect: str) -> dict:
    if defect == "broken":
        raise OSError("planted")
    return {"lost": 0 if defect in (SOUND, "unseen") else 3, "full": full}


def judge(figures) -> Outcome:
    return Outcome("R0", (Check("lost", str(figures["lost"]), "0", figures["lost"] == 0),))


ZERO = Trial("R0", "a | count", "0 lost", count, judge, ("loses", "unseen", "broken"))


def test_a_record_says_what_was_seen_and_what_was_not(monkeypatch, tmp_path):
    def here(name, full, defect, limit):
        try:
            return {"figures": frame.measure(ZERO, full, defect), "seconds": 1.0, "cpu_seconds": 1.0}
        except OSError as error:
            return {"error": str(error), "seconds": 1.0, "cpu_seconds": None}

    monkeypatch.setattr(frame, "run_child", here)
    record = frame.record_of(ZERO, True, "python run.py")
    assert record["line"] == "R0: met; lost 0 (asked 0: met)"
    assert [found["seen"] for found in record["planted"]] == [True, False, False]  # an exception is no verdict
    assert [found.get("figures", {}).get("full") for found in record["planted"]] == [False, False, None]
    assert not frame.sound_record(record)
    assert set(record) >= {"command", "date", "commit", "hardware", "size", "figures", "seconds", "settings"}
    text = frame.table([record])
    assert "| R0 | a / count | 0 lost | lost 0 | met | loses -> seen to fail; unseen -> **NOT SEEN**; broken" in text
    assert "broken -> NOT SEEN; 1 s" in frame.short_line(record)
    also = replace(
        ZERO, run=lambda full, defect: count(full, SOUND if defect == SOUND else "loses"), defects=("loses",)
    )
    monkeypatch.setattr(frame, "run_child", lambda name, full, defect, limit: {
        "figures": count(full, "loses"), "seconds": 1.0, "cpu_seconds": 1.0})  # fmt: skip
    assert not frame.record_of(also, True, "")["planted"][0]["seen"], "lost rows are lost without the defect, too"
    monkeypatch.setattr(frame, "run_child", here)
    whole = frame.record_of(replace(ZERO, defects=("loses",), full_defects=True), True, "")
    assert frame.sound_record(whole)
    assert whole["planted"][0]["figures"]["full"]
    broke = frame.record_of(replace(ZERO, run=lambda full, defect: count(full, "broken")), False, "")
    assert broke["line"].startswith("R0: met"), "here() runs ZERO whatever it is given"
    monkeypatch.setattr(frame, "run_child", lambda *_: {"error": "gone", "seconds": 0.0, "cpu_seconds": None})
    broke = frame.record_of(ZERO, False, "")
    assert (broke["met"], broke["line"]) == (False, "R0: broke; gone")
    assert "| R0 (quick) | a / count | 0 lost | gone | broke |" in frame.table([broke])
    with pytest.raises(ValueError, match="no planted defect"):
        replace(ZERO, defects=())


def test_the_command_runs_what_is_not_there_and_shows_the_table(monkeypatch, tmp_path, capsys):
    ran = []

    def record_of(trial, full, command):
        ran.append((trial.name, full))
        figures = {
            "size": "full" if full else "quick",
            "trial": trial.name,
            "what": "w",
            "asked": "a",
            "command": command,
        }
        seen = [{"defect": "d", "seen": trial.name != "R7"}]
        return figures | {"met": True, "line": f"{trial.name}: met", "planted": seen, "seconds": 1.0, "checks": []}

    monkeypatch.setattr(frame, "record_of", record_of)
    monkeypatch.setattr(frame, "names", lambda: ("R6", "R7"))
    monkeypatch.setattr(frame, "load", lambda name: replace(ZERO, name=name))
    out = ["--out", str(tmp_path / "out")]
    assert run.main([*out, "--quick", "--only", "R6"]) == 0
    assert run.main([*out, "--quick"]) == 1, "a defect of R7 was not seen"
    assert ran == [("R6", False), ("R7", False)]
    assert run.main(out) == 1
    assert ran[2:] == [("R6", True), ("R7", True)]
    run.main([*out, "--quick"])
    run.main([*out, "--show"])
    assert len(ran) == 4, "what is there in full serves for quick, and showing runs nothing"
    run.main([*out, "--only", "R7", "--again"])
    assert ran[4:] == [("R7", True)]
    text = capsys.readouterr().out
    assert "R6: met; planted: d -> seen to fail; 1 s" in text
    assert text.count("| R7 | w | a |  | met | d -> **NOT SEEN** | 1 |") == 5 - 1  # not where R6 alone was asked for
    with pytest.raises(SystemExit):
        run.main([*out, "--only", "R99"])


def test_a_process_that_fails_or_hangs_is_an_error_and_no_figure(monkeypatch):
    with pytest.raises(ValueError, match="R99"):
        frame.run_child("R99", False, SOUND, 60)
    assert "no end within" in frame.run_child("R6", False, SOUND, 0.01)["error"]
