"""R1: two workers, killed at random again and again, leave in the end the store of a run that nobody disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.shared_pass import EARLY_ACK, NO_CLAIMS, alone
from tests.unit.store.store_world import memory_folder, read

from gradsift.seeds import Stream, stream
from gradsift.store.ledger import read_ledger
from gradsift.store.reading import read_ids
from gradsift.store.spec import GradientSpec, read_spec
from gradsift.store.verify import verify_store

SCRIPT = Path(__file__).with_name("shared_pass.py")
VICTIMS = ((0,), (1,), (0, 1))
Start = Callable[[int, float], subprocess.Popen]


class Pair:
    """Two processes of a run, kept alive between kills.

    Args:
        start: (rank, seconds that a unit takes) -> a process.
        measured: file in which they note what they begin.
        store: gives the store's folder, or None while there is none.
        slow: seconds that a unit takes while there are kills to come.
        random: of moments and victims.
    """

    def __init__(
        self, start: Start, measured: Path, store: Callable[[], Path | None], slow: float, random: Stream
    ) -> None:
        self.start, self.measured, self.store, self.slow, self.random = start, measured, store, slow, random.numpy()
        self.procs: dict[int, subprocess.Popen] = {}
        self.kills = self.no_end = 0
        self.seen: set[str] = set()
        self.lost: set[str] = set()
        self.known: dict[str, list[str]] = {}

    def begun(self) -> list[tuple[int, str]]:
        """What was begun: (process, first row of the unit)."""
        lines = self.measured.read_text().splitlines() if self.measured.exists() else []
        return [(int(line.split()[0]), line.split()[1]) for line in lines if len(line.split()) == 2]

    def ids(self) -> set[str]:
        """Rows that are committed now."""
        folder = self.store()
        spec: GradientSpec | None = read_spec(folder) if folder is not None else None
        if folder is None or spec is None:
            return set()
        found: set[str] = set()
        for record in read_ledger(folder, spec.key).records:
            if record.unit not in self.known:  # a shard never changes; all bytes are verified at the end
                self.known[record.unit] = read_ids(folder, record)
            found.update(self.known[record.unit])
        return found

    def at_work(self, seconds: float = 120.0) -> bool:
        """Wait until both have begun three units; False when the run is over before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            units = Counter(pid for pid, _ in self.begun())
            if any(process.poll() is not None for process in self.procs.values()):
                return False
            if all(units[process.pid] >= 3 for process in self.procs.values()):
                return True
            time.sleep(0.01)
        raise RuntimeError("a worker does not begin")

    def kill(self, victims: tuple[int, ...]) -> None:
        """Kill some of the two at a moment around a commit, look at the store, start again what has ended."""
        count = len(self.begun())
        end = time.monotonic() + 60
        while len(self.begun()) == count and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(max(0.0, self.slow + float(self.random.uniform(-0.3, 0.5)) * min(self.slow, 0.1)))
        for rank in victims:
            self.procs[rank].kill()
        for rank in victims:
            self.procs.pop(rank).wait()
            self.kills += 1
        if 0 in victims and 1 in self.procs:  # it finds out by itself, ends with an error and keeps its unit staged
            try:
                self.procs[1].wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.no_end += 1
                self.procs[1].kill()
                self.procs[1].wait()
            self.procs.pop(1)
        now = self.ids()
        self.lost |= self.seen - now
        self.seen |= now

    def run(self, kills: int, victims_of: Sequence[tuple[int, ...]] = ()) -> None:
        """Kill so many processes, drawn or as given, then let two finish."""
        given = iter(victims_of)
        while self.kills < kills:
            self.fill(self.slow)
            if not self.at_work():
                raise RuntimeError(f"the run was over after {self.kills} kills")
            victims = next(given, VICTIMS[int(self.random.integers(3))])[: kills - self.kills]
            self.kill(victims)
        self.fill(0.0)
        for process in self.procs.values():
            process.wait(timeout=600)

    def fill(self, slow: float) -> None:
        """Start what does not run; rank 0 first."""
        for rank in (0, 1):
            if rank not in self.procs:
                self.procs[rank] = self.start(rank, slow)

    def end(self) -> None:
        """Leave nothing behind."""
        for process in self.procs.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def figures(self, per_shard: int) -> dict[str, Any]:
        """Kills, rows that were there and went, rows measured again."""
        begun = [first for _, first in self.begun()]
        again = (len(begun) - len(set(begun))) * per_shard
        return {"kills": self.kills, "went": len(self.lost), "rows_again": again, "no_end": self.no_end}


def stub(rows: int, per_shard: int, kills: int, slow: float, defect: str) -> dict[str, Any]:
    """Kill workers of a made-up pool."""
    with memory_folder() as room:
        out = room / "run"
        out.mkdir()
        (room / "alone").mkdir()
        alone(room / "alone", rows, per_shard)

        def start(rank: int, seconds: float) -> subprocess.Popen:
            words = [str(rank), str(out), str(rows), str(per_shard), str(seconds), defect]
            with (room / f"words-{rank}").open("ab") as said:
                return subprocess.Popen([sys.executable, str(SCRIPT), *words], stdout=said, stderr=said)

        pair = Pair(start, out / "measured", lambda: out / "store", slow, stream(1, f"r1/stub/{kills}"))
        try:
            pair.run(kills)
        finally:
            pair.end()
        want, got = read(room / "alone" / "store"), read(out / "store")
        told = (out / "acknowledged").read_text().split()
        report = verify_store(out / "store")
        return pair.figures(per_shard) | {
            "rows": rows, "per_shard": per_shard, "lost": len(set(want) - set(got)),
            "doubled": report.num_rows - len(got), "changed": sum(got[name] != want[name] for name in got if name in want),
            "acknowledged": len(set(told)), "acknowledged_twice": len(told) - len(set(told)),
            "acknowledged_lost": len(set(told) - set(got)) + _early(pair, told), "sound": report.ok,
        }  # fmt: skip


def _early(pair: Pair, told: list[str]) -> int:
    """Rows acknowledged more than once: the first time they cannot have been durable."""
    return len(told) - len(set(told))


def torch(kills: int) -> dict[str, Any]:
    """Kill workers that measure 300 rows with a toy model, started as two tasks of srun."""
    from tests.launched import SMALL, check_equal, finish, script, start, words
    from tests.rows import world
    from tests.toy import toy_llama, toy_tokenizer

    with tempfile.TemporaryDirectory(prefix="gradsift-r1-") as name:
        room = Path(name)
        toy_llama(seed=3).save_pretrained(room / "navigator")
        toy_tokenizer().save_pretrained(room / "navigator")
        world(room, 300)
        assert "collect.rows_per_shard=5" in SMALL
        finish(start(script(*words(room, room / "navigator", room / "whole")), room / "log-whole"), seconds=300)
        out = room / "run"
        command = script(*words(room, room / "navigator", out))

        def begin(rank: int, seconds: float) -> subprocess.Popen:
            # what it says is read by nobody, and a full pipe would stop it
            process = start(command, room / "log", slow=seconds, SLURM_PROCID=str(rank), SLURM_NTASKS="2")
            _drain(process)
            return process

        def store() -> Path | None:
            return next((place for place in (out / "signals").glob("*") if (place / "spec.json").exists()), None)

        pair = Pair(begin, room / "log", store, 0.4, stream(1, "r1/torch"))
        try:
            # a start with torch takes long, so most kills are of both
            pair.run(kills, ((0, 1), (1,), (0, 1), (0,), (0, 1)))
            try:
                check_equal(out, room / "whole")
                equal = True
            except AssertionError:
                equal = False
        finally:
            pair.end()
        return pair.figures(5) | {"rows": 300, "per_shard": 5, "equal": equal}


def _drain(process: subprocess.Popen) -> None:
    import threading

    threading.Thread(target=lambda: process.stdout and process.stdout.read(), daemon=True).start()


def run(full: bool, defect: str) -> dict[str, Any]:
    """50 kills without torch, 8 with it; in small 3 without."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not full:
        return {"stub": stub(600, 4, 3, 0.1, defect)}
    return {"stub": stub(20_000, 8, 50, 0.12, defect), "torch": torch(8)}


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Nothing lost, doubled, changed; at most one shard per worker and kill again."""
    s, t = figures["stub"], figures.get("torch")
    whole = s["sound"] and s["lost"] == s["doubled"] == s["changed"] == s["went"] == s["no_end"] == 0
    checks = [
        Check(
            "lost/doubled/changed", f"{s['lost'] + s['went']}/{s['doubled']}/{s['changed']} of {s['rows']} rows after {s['kills']} kills",
            "0/0/0", whole and s["kills"] > 0,
        ),
        Check(
            "acknowledged rows that were lost", f"{s['acknowledged_lost']} of {s['acknowledged']}", "0",
            s["acknowledged_lost"] == 0 < s["acknowledged"],
        ),
    ]  # fmt: skip
    if t is not None:
        good = t["equal"] and t["went"] == t["no_end"] == 0 < t["kills"]
        said = (
            f"{t['kills']} kills, store and selection {'equal' if t['equal'] else 'NOT equal'}, {t['went']} rows lost"
        )
        checks.append(Check("with torch", said, "equal, 0", good))
    for name, part in (("stub", s), ("torch", t)):
        if part is not None:
            most = 2 * part["per_shard"]
            each = part["rows_again"] / max(1, part["kills"])
            checks.append(Check(f"rows measured again per kill ({name})", f"{each:.1f}", f"<= {most}", each <= most))
    return Outcome("R1", tuple(checks))


TRIAL = Trial(
    "R1", "two workers, kill -9 at random, resumed to the end", "58/58; 0/0/0 lost, doubled, changed; <= workers x shard again",
    run, judge, (EARLY_ACK, NO_CLAIMS),
    {"stub": {"rows": 20_000, "rows_per_shard": 8, "kills": 50}, "torch": {"rows": 300, "rows_per_shard": 5, "kills": 8}},
    slow=True,
)  # fmt: skip
