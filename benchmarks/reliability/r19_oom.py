"""R19: when memory runs out a micro-batch is halved, only what failed is redone, and a row that never fits is set aside."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import log2
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.reliability.frame import ROOT, Check, Outcome, Trial
from benchmarks.reliability.r17_nonfinite import numbers, pass_of, relative
from benchmarks.reliability.runs import room
from tests.toy import toy_llama

from gradsift.gradients import collect
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.seeds import stream
from gradsift.types import RowStatus, TokenRow

RESTARTS = "out of memory begins the whole micro-batch again with half its rows, as accelerate does"
REL = 1e-6
PLAIN = collect._measure


def rows_of(count: int, longest: int, seed: int = 19) -> list[TokenRow]:
    """Rows of random tokens, sorted by length."""
    random = np.random.default_rng(seed)
    lengths = np.sort(random.integers(4, longest, count))
    return [
        TokenRow(f"row-{n:05}", random.integers(4, 250, t).astype(np.int32), np.arange(t) >= 1, int(t), RowStatus.OK)
        for n, t in enumerate(lengths)
    ]


class Failing:
    """Measures, fails at random where there is more than one row, and always over one row; counts both."""

    def __init__(self, share: float, monster: str, seed: int) -> None:
        self.share, self.monster, self.random = share, monster, stream(seed, "r19").numpy()
        self.tries: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.first = True

    def __call__(self, run: Pass, rows: Sequence[TokenRow]) -> Any:
        for row in rows:
            self.tries[row.id] += 1
        if any(row.id == self.monster for row in rows) or (len(rows) > 1 and self.random.random() < self.share):
            raise MemoryError
        got = PLAIN(run, rows)
        self.done.update(row.id for row in rows)
        return got


def restarting(run: Pass, rows: Sequence[TokenRow]) -> Iterator[tuple[Any, Sequence[TokenRow]]]:
    """The planted defect."""
    size = len(rows)
    while size:
        try:
            parts = [(collect._measure(run, rows[k : k + size]), rows[k : k + size]) for k in range(0, len(rows), size)]
            yield from parts
            return
        except MemoryError:
            size //= 2
    for row in rows:
        yield collect._empty(run, [row], fits=False), [row]


def fake(full: bool, defect: str) -> dict[str, Any]:
    """Random failures with p = 0.2 and one row that never fits."""
    rows = rows_of(1200 if full else 200, 16)
    monster = rows[len(rows) // 2].id
    run = pass_of(toy_llama(seed=5))
    with run.engine:
        want = measure_shard(run, rows)
        failing = Failing(0.2, monster, 1)
        with patch.object(collect, "_measure", failing):
            if defect:
                with patch.object(collect, "_with_back_off", restarting):
                    got = measure_shard(run, rows)
            else:
                got = measure_shard(run, rows)
    a, b = numbers(got), numbers(want)
    others = [row.id for row in rows if row.id != monster and dict(zip(got.ids, got.status))[row.id].usable]
    batches = [len(batch) for batch in collect.plan_batches(rows, range(len(rows)), run.tokens_per_batch)]
    status = dict(zip(got.ids, got.status, strict=True))
    return {
        "rows": len(rows), "largest_batch": max(batches), "most_tries_of_a_row": max(failing.tries.values()),
        "tries": dict(sorted(Counter(failing.tries.values()).items())),
        "redone": sum(count - 1 for count in failing.done.values()),
        "lost": len(rows) - 1 - len(others), "monster": str(status[monster]),
        "worst_rel": max(relative(a[n], b[n]) for n in others),
    }  # fmt: skip


def limited(out: Path) -> None:
    """In a process of its own: real limits on memory, so that the allocator itself refuses."""
    rows = rows_of(24, 400)[-16:]
    run = pass_of(toy_llama(seed=5))
    run = Pass(run.engine, (), 16 * 400, 3)
    with run.engine:
        measure_shard(run, rows[:1])  # what every pass needs, so that the limit is on the micro-batch
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        tries: Counter[str] = Counter()
        refused = 0

        def counting(run_: Pass, some: Sequence[TokenRow]) -> Any:
            nonlocal refused
            tries.update(row.id for row in some)
            try:
                return PLAIN(run_, some)
            except (MemoryError, RuntimeError):
                refused += 1
                raise

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        found = None
        for room_ in range(4, 400, 4):  # the least room in which single rows fit
            refused, tries = 0, Counter()
            resource.setrlimit(resource.RLIMIT_AS, (used + (room_ << 20), hard))
            try:
                with patch.object(collect, "_measure", counting):
                    got = measure_shard(run, rows)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            if got.usable.all():
                found = got
                break
        a, b = numbers(found) if found else {}, numbers(measure_shard(run, rows))
    import json

    rel = max((relative(a[n], b[n]) for n in a), default=float("inf"))
    out.write_text(json.dumps({"refused": refused, "room_mib": room_, "most_tries": max(tries.values()), "worst_rel": rel,
                               "usable": len(a), "of": len(rows)}))  # fmt: skip


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Fake failures; at full size real ones too."""
    figures: dict[str, Any] = {}
    if full and not defect:  # first: what an earlier pass has freed would be used again, and nothing be refused
        with room() as folder:
            code_ = "import sys; from pathlib import Path; from benchmarks.reliability.r19_oom import limited; limited(Path(sys.argv[1]))"
            command = [sys.executable, "-c", code_, str(folder / "found.json")]  # a heap that nothing was freed in yet
            path_ = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path_}).returncode
            import json

            path = folder / "found.json"
            figures["real"] = json.loads(path.read_text()) if path.exists() else {"ended": code}
    return {"fake": fake(full, defect), **figures}


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Nothing redone, few tries, equal numbers, the row that never fits set aside."""
    got = figures["fake"]
    bound = log2(got["largest_batch"]) + 1
    checks = [
        Check("rows that differ from the run without failures", f"rel {got['worst_rel']:.1e}, lost {got['lost']}",
              f"<= {REL:g}, 0", got["worst_rel"] <= REL and got["lost"] == 0),
        Check("most tries of a row", f"{got['most_tries_of_a_row']} in micro-batches of up to {got['largest_batch']}",
              f"<= log2(B)+1 = {bound:.1f}", got["most_tries_of_a_row"] <= bound + 1e-9),
        Check("finished rows measured again", str(got["redone"]), "0", got["redone"] == 0),
        Check("row that never fits", got["monster"], "OOM_AT_1", got["monster"] == "OOM_AT_1"),
    ]  # fmt: skip
    if "real" in figures:
        real = figures["real"]
        well = real.get("usable") == real.get("of") and real.get("refused", 0) > 0 and real["worst_rel"] <= REL
        checks.append(Check("with a real limit on memory", ", ".join(f"{k} {v}" for k, v in real.items()),
                            "refusals, all rows, equal", bool(well)))  # fmt: skip
    return Outcome("R19", tuple(checks))


TRIAL = Trial(
    "R19", "memory errors at p = 0.2, a row that never fits, a real RLIMIT_AS",
    "rows equal the run without, <= log2(B)+1 tries, redo 0, the row set aside", measure, judge, (RESTARTS,),
    {"rows": 1200, "p": 0.2}, slow=True,
)  # fmt: skip
