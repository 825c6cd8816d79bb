"""R23: fine-tuning is killed at five points, one of them in a save, and goes on; accumulation changes nothing; evaluation
is killed and counts every item once."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import quiet, room
from tests.lessons import lesson_config, lesson_plan, lesson_rows
from tests.rows import some_rows, write_jsonl
from tests.toy import toy_llama, toy_lora, toy_tokenizer

from gradsift.evaluate import run as stage
from gradsift.evaluate.config import EvaluateConfig
from gradsift.evaluate.run import evaluate
from gradsift.train import trainer as module
from gradsift.train.trainer import SelectionTrainer, TrainData

FORGETS = "the optimizer's moments are not read back"
STEP, MEAN = 1e-6, 1e-7


def trained(folder: Path | None, steps: int, budget: int, at: int, moment: str, defect: str) -> list[float]:
    """Train or go on; die at a step, or in the save of a step."""
    config = lesson_config(save_steps=2, tokens_per_micro_batch=budget, steps=steps)
    rows = lesson_rows()
    count = [0]

    def tick(*_: int) -> None:
        count[0] += 1
        if moment == "step" and count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with ExitStack() as stack:
        stack.enter_context(quiet())
        if moment == "save":
            plain = module.save_moments
            seen = [0]

            def saving(*arguments: Any, **options: Any) -> Any:
                seen[0] += 1
                return die() if seen[0] == at else plain(*arguments, **options)

            stack.enter_context(patch.object(module, "save_moments", saving))
        if defect == FORGETS:
            stack.enter_context(patch.object(module, "put_moments", lambda *_, **__: None))
        data = TrainData(lesson_plan(rows, steps=steps), rows, {})
        made = SelectionTrainer(toy_lora(1), toy_tokenizer(), config, data, folder=folder, tick=tick)
        made.resume() if folder is not None else made.train()
        return list(made.losses)


def forked(work: Callable[[], Any]) -> int:
    """Do something in a process of its own; give its end as ``waitpid`` tells it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def gaps(got: list[float], want: list[float]) -> dict[str, float]:
    """Largest and mean difference of the losses per step."""
    if len(got) != len(want):
        return {"max": float("inf"), "mean": float("inf"), "steps": len(got)}
    residuals = np.subtract(got, want)
    return {"max": float(np.abs(residuals).max()), "mean": float(abs(residuals.mean())), "steps": len(got)}


def kills(full: bool, defect: str) -> dict[str, Any]:
    """Five kills, each from a fresh start."""
    steps = 8
    points = [("step", 1), ("step", 3), ("step", 4), ("step", 7), ("save", 2)]
    points = points if full else [("step", 3), ("save", 2)]
    whole = trained(None, steps, 4096, 0, "", "")
    found = {}
    with room() as folder:
        for moment, at in points:
            place = folder / f"{moment}-{at}"
            end = forked(lambda p=place, m=moment, a=at: trained(p, steps, 4096, a, m, ""))
            got = trained(place, steps, 4096, 0, "", defect)
            found[f"{moment} {at}"] = {"killed": end == signal.SIGKILL, **gaps(got, whole)}
    return found


def classes() -> dict[str, Any]:
    """The same steps in micro-batches of other sizes."""
    whole = trained(None, 6, 4096, 0, "", "")
    return {f"{budget} tokens at once": gaps(trained(None, 6, budget, 0, "", ""), whole) for budget in (20, 40, 80)}


def evaluation(defect: str) -> dict[str, Any]:
    """Kill an evaluation in the middle, run it again, and count the items."""
    with room() as folder, quiet():
        toy_llama(seed=3).save_pretrained(folder / "navigator")
        toy_tokenizer().save_pretrained(folder / "navigator")
        write_jsonl(folder / "exam.jsonl", some_rows(30, 3))
        config = EvaluateConfig.model_validate(
            {"model": str(folder / "navigator"), "domain": [{"label": "exam", "path": str(folder / "exam.jsonl")}]}
        )

        def dies(where: str) -> None:
            patch.object(stage, where, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)).start()
            evaluate(config, folder / "out")

        ends = [forked(lambda where=where: dies(where)) for where in ("_standard_errors", "_items")]
        left = sorted(path.name for path in folder.glob("out*"))
        done = evaluate(config, folder / "out")
        items = read_items(done.out)
        count = Counter(items)
        killed = all(end == signal.SIGKILL for end in ends)
        return {"killed": killed, "left_by_the_kill": left, "items": len(items), "asked": 30,
                "twice": sum(n - 1 for n in count.values())}  # fmt: skip


def read_items(out: Path) -> list[str]:
    """Ids of the items that were measured, from the files of the evaluation."""
    import pyarrow.parquet as pq

    return [str(value) for value in pq.read_table(out / stage.ITEMS)["id"].to_pylist()]


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Kills, equivalence classes, evaluation."""
    figures: dict[str, Any] = {"kills": kills(full, defect)}
    if not defect:
        figures |= {"classes": classes(), "evaluation": evaluation(defect)}
    return figures


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Losses per step and in the mean; evaluation items once each."""
    checks = []
    for kind, name in (("kills", "after kills"), ("classes", "with other micro-batches")):
        if kind not in figures:
            continue
        worst, mean = (
            max(float("inf") if f[k] is None else f[k] for f in figures[kind].values()) for k in ("max", "mean")
        )
        died = all(f.get("killed", True) for f in figures[kind].values())
        text = f"max {worst:.1e}, mean {mean:.1e} of {len(figures[kind])}"
        checks.append(Check(f"loss per step {name}", text, f"<= {STEP:g} and {MEAN:g}",
                            died and worst <= STEP and mean <= MEAN))  # fmt: skip
    if "evaluation" in figures:
        got = figures["evaluation"]
        well = got["killed"] and got["items"] == got["asked"] and got["twice"] == 0
        checks.append(Check("items of a killed evaluation", f"{got['items']} of {got['asked']}, {got['twice']} twice",
                            "each once", well))  # fmt: skip
    return Outcome("R23", tuple(checks))


TRIAL = Trial(
    "R23", "kill a fine-tuning at 5 points, one in a save; accumulation; kill an evaluation",
    "loss per step within 1e-6, mean within 1e-7; items neither skipped nor counted twice", measure, judge, (FORGETS,),
    {"steps": 8, "kills": 5, "rows": 10}, slow=True,
)  # fmt: skip
