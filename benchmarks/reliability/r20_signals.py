"""R20: SIGTERM, SIGINT and SIGHUP at random moments end the command in time, with the line that goes on; nothing stays."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.reliability.frame import ROOT, Check, Outcome, Trial
from benchmarks.reliability.runs import room, world_in
from tests.launched import words

from gradsift.seeds import stream

DEAF = "a signal is looked at only when the run is over"
SILENT = "the line that goes on is left out"
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
FIRST, SECOND = 10.0, 1.0
PLAIN = "from gradsift.cli import main; main()"
PLANTED = {
    "": PLAIN,
    DEAF: "import gradsift.cli as cli\nfrom gradsift.cli.screen import Screen\nfrom contextlib import nullcontext\n"
    "import signal\nScreen.watching_signals = lambda self: nullcontext(signal.signal(signal.SIGTERM, signal.SIG_IGN))\n"
    "cli.main()",
    SILENT: "import gradsift.errors as errors\n"
    "errors.Interrupted.render = lambda self: 'stopped'\nfrom gradsift.cli import main; main()",
}


def orphans(mark: str) -> list[int]:
    """Processes whose environment holds the mark: what a run has started and left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def once(command: list[str], log: Path, number: int, wait: float, second: float | None) -> dict[str, Any]:
    """Start, wait, send; give what came of it."""
    mark = f"GRADSIFT_R20={os.getpid()}-{time.monotonic_ns()}"
    name, value = mark.split("=")
    environment = {**os.environ, name: value, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "2000"}
    with log.open("w+b") as words_:
        process = subprocess.Popen(command, stdout=words_, stderr=words_, env=environment)
        time.sleep(wait)
        ended_before = process.poll() is not None
        process.send_signal(number)
        sent = time.monotonic()
        if second is not None and not ended_before:
            try:
                process.wait(second)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                sent = time.monotonic()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        seconds = time.monotonic() - sent
        time.sleep(0.2)
        left = orphans(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        words_.seek(0)
        said = words_.read().decode("utf-8", "replace")
    return {
        "signal": int(number), "after": round(wait, 2), "second": second is not None, "seconds": round(seconds, 2),
        "code": process.returncode, "resume_line": "resume with: gradsift" in said or "same command resumes" in said,
        "orphans": len(left), "ended_before": ended_before, "last": said.strip().splitlines()[-1:][0][:160] if said.strip() else "",
    }  # fmt: skip


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Send signals at random moments of runs that are all alike."""
    count = 30 if full else 3
    random = stream(20, "r20").numpy()
    runs = []
    with room() as folder:
        place = world_in(folder / "world", 1500)
        command = [sys.executable, "-c", PLANTED[defect]]

        def arguments(n: int, *more: str) -> list[str]:
            return [*command, *words(place, place / "navigator", folder / f"run-{n}", *more)]

        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", PLAIN, "methods"], check=True, capture_output=True, cwd=ROOT)
        start = time.monotonic() - begun
        span = 25.0 if full else 12.0
        for n in range(count):
            number = list(CODES)[n % 3]
            second = float(random.uniform(0.05, 0.4)) if number == signal.SIGINT and n % 2 else None
            wait = 1.5 * start + float(random.uniform(0, span))
            if not full:
                wait = 1.5 * start + 6.0 * (n + 1)
            runs.append(once(arguments(n), folder / f"log-{n}", number, wait, second))
        actors = []
        if full and not defect:
            for number in (signal.SIGTERM, signal.SIGINT):
                more = ("--launcher", "ray", "--workers", "2", "--set", "collect.rows_per_shard=20")
                actors.append(once(arguments(100 + number, *more), folder / "log-ray", number, 45.0, None))
    return {"runs": runs, "ray": actors, "one_start": round(start, 2), "load": round(os.getloadavg()[0], 1)}


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Every run ended in time with its code, its line and no process left."""
    runs = [*figures["runs"], *figures["ray"]]
    hit = [r for r in runs if not r["ended_before"]]
    first = np.array([r["seconds"] for r in hit if not r["second"]])
    second = np.array([r["seconds"] for r in hit if r["second"]])
    codes = sum(r["code"] == CODES[r["signal"]] for r in hit)
    lines = sum(r["resume_line"] for r in hit)
    p50, p95 = np.percentile(first, [50, 95]) if first.size else (np.inf, np.inf)
    left = sum(r["orphans"] for r in runs)
    checks = [
        Check("exit after a signal", f"p50 {p50:.1f} s, p95 {p95:.1f} s, worst {first.max(initial=0):.1f} s of {first.size}",
              f"p95 <= {FIRST:.0f} s", p95 <= FIRST),
        Check("codes 143, 130, 129", f"{codes}/{len(hit)}", "all", codes == len(hit) > 0),
        Check("line that goes on", f"{lines}/{len(hit)}", "all", lines == len(hit)),
        Check("processes left", str(left), "0", left == 0),
    ]  # fmt: skip
    if second.size:
        checks.insert(1, Check("exit after a second SIGINT", f"worst {second.max():.2f} s of {second.size}",
                               f"<= {SECOND:.0f} s", bool(second.max() <= SECOND)))  # fmt: skip
    return Outcome("R20", tuple(checks), (f"load of the machine {figures['load']}",))


TRIAL = Trial(
    "R20", "SIGTERM, SIGINT, SIGHUP at 30 random moments of gradsift select, some SIGINT twice; two runs with Ray",
    "exit <= 10 s at p95 (second SIGINT <= 1 s), codes 143/130/129, resume line, no orphans", measure, judge,
    (DEAF, SILENT), {"signals": 30, "rows": 1500, "command": shlex.join(["gradsift", "select"])}, slow=True,
)  # fmt: skip
