"""Selection at scale: a store of a million sketches, and what choosing from it takes in time and resident memory.

``python benchmarks/scale.py --folder DIR --rows 10000 100000 1000000 --json docs/results/scale.json`` writes stores with
planted structure through the store's own writer (8.2 GB for a million rows of 4,093 float16 numbers; kept under DIR, and
used again) and runs every step in a process of its own. Resident memory is VmHWM of /proc/self/status, beside it the
peaks of its anonymous and file part, looked at every 10 ms. ``--growth`` measures cost against rows and tokens with a toy
model, and memory against rows with a stub (scale_growth.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STEPS = ("open", "ogs_dual", "target_cosine", "conflict", "cluster", "audit", "page")
MEMORY = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}
BUDGET = "10%"


def memory_now() -> dict[str, float]:
    """Read resident memory in MiB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return {word: int(found[name].split()[0]) / 1024 for name, word in MEMORY.items()}


class Watch:
    """Peaks of the anonymous and file part of resident memory, looked at every 10 ms."""

    def __init__(self) -> None:
        self.peaks, self._over = memory_now(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            now = memory_now()
            self.peaks = {name: max(value, now[name]) for name, value in self.peaks.items()}

    def stop(self) -> dict[str, float]:
        """Give the peaks in MiB."""
        self._over.set()
        self._thread.join()
        self.peaks["peak"] = memory_now()["peak"]
        peaks = {f"{name}_mib": round(value, 1) for name, value in self.peaks.items()}
        return {**peaks, "maxrss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run something; wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"seconds": round(time.perf_counter() - wall, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}


def open_problem(folder: Path, dim: int) -> Any:
    """Open the store and join the problem; sketches stay on the disk."""
    import numpy as np
    from scale_world import problem_of, spec_of

    from gradsift.store.signals import open_store
    from gradsift.store.sketches import stored_sketches
    from gradsift.store.spec import store_folder

    spec = spec_of(dim)
    store = open_store(store_folder(folder / "signals", spec), spec)
    return store, problem_of(store, stored_sketches(store, np.arange(store.size)))


def choose(problem: Any, name: str) -> Any:
    """Run a method."""
    from gradsift.methods import make_method
    from gradsift.recipe import parse_budget
    from gradsift.seeds import stream

    settings = {"drop": "worst"} if name == "conflict" else {}
    return make_method(name, settings).select(problem, parse_budget(BUDGET), stream(7, f"select/{name}"))


def step_open(folder: Path, dim: int, _: Path) -> dict[str, Any]:
    """Open alone."""
    (_, problem), spent = timed(lambda: open_problem(folder, dim))
    return {**spent, "num_rows": problem.size}


def step_method(folder: Path, dim: int, name: str) -> dict[str, Any]:
    """Choose 10% of the rows."""
    (_, problem), opening = timed(lambda: open_problem(folder, dim))
    before = memory_now()["peak"]
    chosen, spent = timed(lambda: choose(problem, name))
    found: dict[str, Any] = {**spent, "opening_seconds": opening["seconds"], "opened_mib": round(before, 1)}
    found["num_chosen"] = len(chosen.ids)
    if chosen.certificate is not None:
        found |= {"gap": chosen.certificate.gap, "slack": dict(chosen.certificate.slack),
                  "prices": dict(chosen.certificate.prices), "num_undecided": len(chosen.cut.undecided)}  # fmt: skip
    return found


def step_cluster(folder: Path, dim: int, _: Path) -> dict[str, Any]:
    """Group all rows into 64 and compare with what was planted."""
    import numpy as np
    from scale_world import labels
    from sklearn.metrics import adjusted_rand_score

    from gradsift.geometry.cluster import spherical_kmeans
    from gradsift.seeds import stream

    (_, problem), opening = timed(lambda: open_problem(folder, dim))
    before = memory_now()["peak"]
    groups, spent = timed(
        lambda: spherical_kmeans(problem.sketch, stream(7, "clusters"), ids=problem.ids, num_clusters=64)
    )
    truth = labels(problem.ids)
    table = np.zeros((len(groups.sizes), 64), dtype=np.int64)
    np.add.at(table, (groups.labels, truth), 1)
    return {
        **spent, "opening_seconds": opening["seconds"], "opened_mib": round(before, 1),
        "num_clusters": len(groups.sizes), "purity": float(table.max(axis=1).sum() / problem.size),
        "rand_index": float(adjusted_rand_score(truth, groups.labels)),
    }  # fmt: skip


def step_audit(folder: Path, dim: int, out: Path) -> dict[str, Any]:
    """Choose by ogs_dual and write what the report is made of: audit table, batch checks, manifest."""
    from scale_world import stand_ins

    from gradsift.manifest import make_folder, write_json_atomic
    from gradsift.pipeline.audit import AuditRows, write_audit
    from gradsift.pipeline.checks import batch_checks, sketch_noise
    from gradsift.pipeline.run import FORMAT, _selection

    store, problem = open_problem(folder, dim)
    chosen = choose(problem, "ogs_dual")
    prepared, measured = stand_ins(store, problem)
    make_folder(out / "selection")
    before = memory_now()["peak"]

    def write() -> Any:
        rows = AuditRows(prepared, measured, problem, chosen)
        write_audit(rows, out / "selection/audit.parquet")
        return rows

    rows, audit = timed(write)
    checks, checked = timed(lambda: batch_checks(problem, chosen, 7))
    write_json_atomic(
        out / "manifest.json",
        {"format": FORMAT, "inputs": [], "rows": rows.counts(), "sketch": sketch_noise(problem),
         "selection": _selection(chosen), **checks, "cost": {}},
    )  # fmt: skip
    return {
        "seconds": audit["seconds"], "cpu_seconds": audit["cpu_seconds"], "checks_seconds": checked["seconds"],
        "chosen_mib": round(before, 1), "set_conflict": checks["set_conflict"],
        "audit_bytes": (out / "selection/audit.parquet").stat().st_size,
    }  # fmt: skip


def step_page(_: Path, __: int, out: Path) -> dict[str, Any]:
    """Draw the page of the run folder that the step audit wrote."""
    from gradsift.report.page import render_report

    page, spent = timed(lambda: render_report(out))
    return {**spent, "page_bytes": page.stat().st_size}


def run_step(given: argparse.Namespace) -> None:
    """Do one step in this process and print its figures."""
    watch, out = Watch(), given.folder / "run"
    simple = {"open": step_open, "cluster": step_cluster, "audit": step_audit, "page": step_page}
    if given.step == "write":
        from scale_world import write_store

        found, spent = timed(lambda: write_store(given.folder, given.rows[0], given.dim, given.rows_per_shard))
        figures = {**found, **spent}
    elif given.step in ("stub", "stub_tokens"):
        from scale_growth import commit_stub

        _, figures = timed(lambda: commit_stub(given.folder, given.rows[0], given.step == "stub_tokens"))
    elif given.step in simple:
        figures = simple[given.step](given.folder, given.dim, out)
    else:
        figures = step_method(given.folder, given.dim, given.step)
    print(json.dumps({**figures, **watch.stop()}))


def in_own_process(words: list[str]) -> dict[str, Any]:
    """Run this script in a process of its own and read the last line it prints."""
    done = subprocess.run([sys.executable, str(HERE / "scale.py"), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode, "error": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def hardware() -> dict[str, Any]:
    """Say what this ran on."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "memory_bytes": pages,
        "load_at_start": os.getloadavg()[0], "system": platform.platform(),
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"{'rows':>9} {'step':14} {'seconds':>9} {'CPU s':>9} {'peak MiB':>9} {'anon':>8} {'file':>8}")
    for rows, steps in found["sizes"].items():
        for name, one in steps.items():
            if "failed" in one:
                print(f"{rows:>9} {name:14} failed: {one['error'].splitlines()[-1] if one['error'] else one['failed']}")
                continue
            print(f"{rows:>9} {name:14} {one['seconds']:9.2f} {one['cpu_seconds']:9.2f} {one['peak_mib']:9.0f} "
                  f"{one['anonymous_mib']:8.0f} {one['file_mib']:8.0f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("scale-store"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--dim", type=int, default=4093)
    parser.add_argument("--rows-per-shard", type=int, default=64)
    parser.add_argument("--steps", nargs="+", default=["write", *STEPS])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        return run_step(given)
    if given.growth:
        from scale_growth import growth

        return growth(given)
    from gradsift.manifest import git_sha, versions

    found = SimpleNamespace(sizes={})
    for rows in given.rows:
        steps: dict[str, Any] = {}
        for name in given.steps:
            words = ["--step", name, "--folder", str(given.folder / f"n{rows}"), "--rows", str(rows), "--dim",
                     str(given.dim), "--rows-per-shard", str(given.rows_per_shard)]  # fmt: skip
            steps[name] = in_own_process(words)
            print(f"{rows} {name}: {json.dumps(steps[name])[:300]}", file=sys.stderr, flush=True)
        found.sizes[str(rows)] = steps
    result = {
        "command": "python benchmarks/scale.py " + " ".join(sys.argv[1:]), "date": str(date.today()),
        "commit": given.commit or git_sha(ROOT), "versions": versions(), "hardware": hardware(),
        "dim": given.dim, "rows_per_shard": given.rows_per_shard, "budget": BUDGET, "sizes": found.sizes,
    }  # fmt: skip
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return None


if __name__ == "__main__":
    main()
