"""A reliability trial: what it asks, how it is run, how its figures are judged, and the defects that must make it fail.

A trial is a module ``rNN_name.py`` of this folder with a ``TRIAL``. Its ``run`` gives figures, a tree of plain numbers
and words; its ``judge`` is a pure function of them. ``run`` is given the name of a planted defect, or none: the same
trial, the same code, on something that is broken on purpose. Every defect must make ``judge`` say ``missed``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.trials.outcome import Check, Outcome, machine, plain

from gradsift.manifest import git_sha, pretty_json, versions, write_json_atomic

__all__ = ["Check", "Outcome", "Trial", "record_of", "run_child", "table"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
SOUND = ""  # the name of no defect
Figures = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A reliability trial.

    Args:
        name: its id on the sheet, such as ``R1``.
        what: what is done, in a few words.
        asked: the sheet's figure, in a few words.
        run: (full size?, planted defect or ``SOUND``) -> figures that JSON can hold. Broken promises are figures, not
            exceptions; an exception is a defect of the trial.
        judge: figures -> verdict; pure.
        defects: names of the planted defects; ``run`` knows each.
        settings: sizes and the like that were fixed before the result was run.
        limit: seconds after which a full run is ended; a planted defect has the same.
        slow: its quick size takes more than about 2 s, so that the suite marks it slow.
        slow_defects: planted defects whose quick size takes more than that.
        may_miss: checks that are known to be missed without a defect; a defect must make another one be missed.
        shares_process: it leaves its process as it found it, so that the suite need not start one for it.
        barred: why this machine cannot run it, empty where it can.
        full_defects: run the planted defects at full size too; else at quick size.
    """

    name: str
    what: str
    asked: str
    run: Callable[[bool, str], Figures]
    judge: Callable[[Mapping[str, Any]], Outcome]
    defects: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 7200.0
    slow: bool = False
    slow_defects: tuple[str, ...] = ()
    full_defects: bool = False
    may_miss: tuple[str, ...] = ()
    shares_process: bool = False
    barred: Callable[[], str] = str

    def __post_init__(self) -> None:
        if not self.defects:
            raise ValueError(f"{self.name} has no planted defect: a trial that cannot fail is no evidence")


def names() -> tuple[str, ...]:
    """Find the trials of this folder, R1 first."""
    return tuple(f"R{int(path.name[1:3])}" for path in sorted(FOLDER.glob("r[0-9][0-9]_*.py")))


def load(name: str) -> Trial:
    """Import one trial.

    Args:
        name: its id, such as ``R1``.
    """
    found = list(FOLDER.glob(f"r{int(name[1:]):02d}_*.py"))
    if len(found) != 1:
        raise ValueError(f"{len(found)} modules for {name}")
    path = found[0]
    trial = importlib.import_module(f"benchmarks.reliability.{path.stem}").TRIAL
    assert trial.name == name, f"{path.name} holds {trial.name}"
    return trial


def measure(trial: Trial, full: bool, defect: str) -> Figures:
    """Run a trial in this process, its figures as they stand in a file afterwards.

    Args:
        trial: the trial.
        full: whether at full size.
        defect: a planted defect, or ``SOUND``.
    """
    return json.loads(pretty_json(plain(trial.run(full, defect))))


def child(name: str, full: bool, defect: str, out: Path) -> None:
    """What a trial's own process does: run, and leave figures and what they cost.

    Args:
        name: the trial.
        full: whether at full size.
        defect: a planted defect, or ``SOUND``.
        out: file to write.
    """
    begun = time.perf_counter()
    figures = measure(load(name), full, defect)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cost = {
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(sum(u.ru_utime + u.ru_stime for u in usage), 1),
    }
    write_json_atomic(out, {"figures": figures, **cost})


def run_child(name: str, full: bool, defect: str, limit: float) -> dict[str, Any]:
    """Run a trial in a process of its own.

    Args:
        name: the trial.
        full: whether at full size.
        defect: a planted defect, or ``SOUND``.
        limit: seconds after which it is ended.

    Returns:
        ``figures``, ``seconds``, ``cpu_seconds``; where the process failed, ``error`` instead of figures.
    """
    barred = load(name).barred()
    if barred:
        return {"error": f"not run: {barred}", "seconds": 0.0, "cpu_seconds": None}
    begun = time.perf_counter()
    size = "full" if full else "quick"
    with tempfile.TemporaryDirectory(prefix="gradsift-trial-") as room:
        out = Path(room) / "figures.json"
        command = [sys.executable, str(FOLDER / "run.py"), "--child", name, size, defect, str(out)]
        # a file, not a pipe: a grandchild that lives on must not keep us waiting
        with (Path(room) / "words").open("w+b") as words:
            process = subprocess.Popen(command, stdout=words, stderr=words, start_new_session=False)
            try:
                code: int | str = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = f"no end within {limit:.0f} s"
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            if code == 0 and out.is_file():
                return json.loads(out.read_bytes())
            words.seek(0)
            said = words.read()[-2000:].decode("utf-8", "replace").strip()
    return {"error": f"{code}: {said}", "seconds": round(time.perf_counter() - begun, 1), "cpu_seconds": None}


def record_of(trial: Trial, full: bool, command: str) -> dict[str, Any]:
    """Run a trial and its planted defects, each in a process of its own.

    Args:
        trial: the trial.
        full: whether at full size.
        command: what a person types to get this file.

    Returns:
        What stands in the trial's file.
    """
    own = run_child(trial.name, full, SOUND, trial.limit)
    anyway = missed(trial.judge(own["figures"])) if "figures" in own else set()
    planted = []
    for defect in trial.defects:
        found = run_child(trial.name, full and trial.full_defects, defect, trial.limit)
        # An exception is not the trial's verdict: the figures must say that something is wrong.
        verdict = trial.judge(found["figures"]) if "figures" in found else None
        # What is missed without the defect as well says nothing about it.
        seen = verdict is not None and bool(missed(verdict) - anyway)
        line = verdict.line() if verdict is not None else found["error"]
        planted.append({"defect": defect, "seen": seen, "line": line, **found})
    record: dict[str, Any] = {
        "trial": trial.name,
        "what": trial.what,
        "asked": trial.asked,
        "size": "full" if full else "quick",
        "command": command,
        "date": date.today().isoformat(),
        "commit": git_sha(ROOT),
        "hardware": f"{machine()}, load {os.getloadavg()[0]:.1f}, no GPU used",
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "numpy")},
        "settings": dict(trial.settings),
        "seconds": own["seconds"],
        "cpu_seconds": own["cpu_seconds"],
        "planted": planted,
    }
    if "error" in own:
        return plain(record | {"met": False, "line": f"{trial.name}: broke; {own['error']}", "error": own["error"]})
    outcome = trial.judge(own["figures"])
    told = {"met": outcome.met, "line": outcome.line(), "checks": [asdict(check) for check in outcome.checks]}
    return plain(record | told | {"wording": list(outcome.wording), "figures": own["figures"]})


def missed(outcome: Outcome) -> set[str]:
    """Name the checks that a trial missed."""
    return {check.name for check in outcome.checks if not check.met}


def sound_record(record: Mapping[str, Any]) -> bool:
    """Tell whether a trial ran to its end and every planted defect was seen.

    Args:
        record: from :func:`record_of`.
    """
    return "error" not in record and bool(record["planted"]) and all(found["seen"] for found in record["planted"])


def short_line(record: Mapping[str, Any]) -> str:
    """Say how a trial went, for the line that is printed as it ends.

    Args:
        record: from :func:`record_of`.
    """
    seen = [f"{found['defect']} -> {'seen to fail' if found['seen'] else 'NOT SEEN'}" for found in record["planted"]]
    return f"{record['line']}; planted: {'; '.join(seen)}; {record['seconds']:.0f} s"


def table(records: list[Mapping[str, Any]]) -> str:
    """Lay the trials out: id, what, asked, seen, met or missed, planted defects, seconds.

    Args:
        records: from :func:`record_of`, in order.

    Returns:
        Markdown.
    """
    head = "| id | what | asked | seen | | planted defect | s |\n|---|---|---|---|---|---|---|"
    lines = [head]
    for record in records:
        checks = record.get("checks", [])
        parts = [f"{c['name']} {c['figure']}{'' if c['met'] else ' (**missed**)'}" for c in checks]
        seen = "; ".join(parts) or record.get("error", "")[-200:]
        verdict = "met" if record["met"] else "broke" if "error" in record else "**missed**"
        planted = [f"{p['defect']} -> {'seen to fail' if p['seen'] else '**NOT SEEN**'}" for p in record["planted"]]
        size = "" if record["size"] == "full" else " (quick)"
        cells = [record["trial"] + size, record["what"], record["asked"], seen, verdict, "; ".join(planted)]
        text = [str(cell).replace("|", "/").replace("\n", " ") for cell in cells]
        lines.append(f"| {' | '.join(text)} | {record['seconds']:.0f} |")
    return "\n".join(lines)
