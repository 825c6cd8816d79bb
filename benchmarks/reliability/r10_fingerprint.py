"""R10: a run goes on only with what it began with; one field is changed at a time, by itself, in a whole run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.reliability.frame import Check, Outcome, Trial
from benchmarks.reliability.runs import Stopped, Stops, recipe_of, room, run, store_rows, world_in
from tests.rows import some_rows, write_jsonl

from gradsift.errors import SpecError
from gradsift.launch.seat import Seat
from gradsift.pipeline import measure as measuring
from gradsift.store import spec as specs
from gradsift.store import writer as writers

WAVED = "a changed field is waved through"
UNNAMED = "the refusal does not say which field"
Change = Callable[[Path], dict[str, Any]]


def edit_model(place: Path) -> dict[str, Any]:
    """Move one weight of the navigator."""
    from safetensors.torch import load_file, save_file

    path = place / "navigator" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    return {}


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Change:
    """Change a JSON file of the navigator's folder."""

    def edit(place: Path) -> dict[str, Any]:
        path = place / "navigator" / name
        value = json.loads(path.read_text("utf-8"))
        change(value)
        path.write_text(json.dumps(value), "utf-8")
        return {}

    return edit


def edit_template(place: Path) -> dict[str, Any]:
    """Let the template end every turn in another way."""
    path = place / "navigator" / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("'\\n'", "' \\n'"), "utf-8")
    return {}


def normalize(value: dict[str, Any]) -> None:
    """Another rule of the tokenizer that leaves these rows' tokens as they are."""
    value["normalizer"] = {"type": "Replace", "pattern": {"String": "\u2603"}, "content": "*"}


def rows(name: str, answer: str, count: int = 10) -> Change:
    """Give an anchor or the target other rows."""

    def edit(place: Path) -> dict[str, Any]:
        write_jsonl(place / f"{name}.jsonl", some_rows(count, 9, answer=answer))
        return {}

    return edit


def setting(**changes: Any) -> Change:
    """Change the recipe."""
    return lambda place: changes


def anchors(*names: str) -> Change:
    """Keep or add anchors."""
    return lambda place: {"anchors": [{"label": n, "path": str(place / f"{n}.jsonl")} for n in names]}


def patched(**fields: Any) -> Change:
    """What only another version of gradsift changes: a field of the spec."""

    def edit(place: Path) -> dict[str, Any]:
        plain = measuring.spec_of
        patch.object(measuring, "spec_of", lambda *a: dataclasses.replace(plain(*a), **fields)).start()
        return {}

    return edit


def other_sketch(place: Path) -> dict[str, Any]:
    """A newer map with the same name."""
    plain = measuring.spec_of

    def newer(*arguments: Any) -> Any:
        spec = plain(*arguments)
        return dataclasses.replace(spec, projection=dataclasses.replace(spec.projection, version="signfold-9"))

    patch.object(measuring, "spec_of", newer).start()
    return {}


# What is changed -> the field that must be named.
SEMANTIC: dict[str, tuple[str, Change]] = {
    "a weight of the navigator": ("model_sha256", edit_model),
    "a rule of the tokenizer": ("tokenizer_sha256", edit_json("tokenizer.json", normalize)),
    "the chat template": ("template_sha256", edit_template),
    "which weights count": ("parameters", setting(navigator__parameters="all")),
    "rank of the adapter": ("adapter_sha256", setting(navigator__lora__rank=8)),
    "scale of the adapter": ("adapter_sha256", setting(navigator__lora__alpha=8.0)),
    "arithmetic": ("dtype", setting(navigator__dtype="float64")),
    "which tokens carry loss": ("loss_on", setting(data__loss_on="all")),
    "tokens kept of a row": ("max_length", setting(data__max_length=512)),
    "length of the sketch": ("projection.dim", setting(collect__sketch_dim=127)),
    "seed": ("projection.seed", setting(seed=7)),
    "map of the sketch": ("projection.version", other_sketch),
    "meaning of the code": ("code_version", patched(code_version="gradients-2")),
    "how token losses add up": ("reduction", patched(reduction="sum")),
    "what a gradient is turned into": ("direction", patched(direction="sign")),
    "which end of a row is kept": ("truncation", patched(truncation="keep_end")),
    "rows of an anchor": ("anchors.math", rows("math", "five")),
    "rows of the target": ("anchors.target", rows("target", "six")),
}


def threads(place: Path) -> dict[str, Any]:
    """Two threads of arithmetic."""
    torch.set_num_threads(2)
    return {}


def reverse(place: Path) -> dict[str, Any]:
    """The pool's rows in another order."""
    path = place / "pool.jsonl"
    path.write_text("".join(reversed(path.read_text("utf-8").splitlines(keepends=True))), "utf-8")
    return {}


def versions(place: Path) -> dict[str, Any]:
    """Other libraries."""
    patch.object(measuring, "versions", lambda: {"python": "3.99", "torch": "9.0"}).start()
    return {}


OPERATIONAL: dict[str, Change] = {
    "tokens of a micro-batch": setting(collect__tokens_per_batch=300),
    "rows of a shard": setting(collect__rows_per_shard=7),
    "threads": threads,
    "device by name": setting(navigator__device="auto"),
    "order of the pool": reverse,
    "budget": setting(budget="10%"),
    "method": setting(method__name="target_cosine"),
    "launcher": lambda place: {"": Seat("torchrun", 0, 2)},
    "versions of libraries": versions,
}


@contextmanager
def fresh(base: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of the inputs and of the run that was stopped; patches and threads are put back."""
    try:
        with room() as place:
            shutil.copytree(base, place, dirs_exist_ok=True)
            yield place / "world", place / "run"
    finally:
        patch.stopall()
        torch.set_num_threads(1)


def tree(out: Path) -> dict[str, bytes]:
    """Every byte of the run's signals."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "signals").rglob("*")) if p.is_file()}


def plant(defect: str) -> None:
    """Plant a defect; :func:`fresh` takes it away."""
    if defect == WAVED:
        for module in (specs, writers):
            patch.object(module, "compare", lambda *a, **k: None).start()
    if defect == UNNAMED:
        plain = specs.compare

        def dumb(*arguments: Any, **options: Any) -> None:
            try:
                plain(*arguments, **options)
            except SpecError:
                raise SpecError("these signals were measured in another way") from None

        for module in (specs, writers):
            patch.object(module, "compare", dumb).start()


def refused(base: Path, field: str, change: Change, defect: str) -> dict[str, Any]:
    """Go on with a change of meaning."""
    with fresh(base) as (place, out):
        plant(defect)
        before = tree(out)
        try:
            run(recipe_of(place, **change(place)), out, Stops(after=1))
        except SpecError as error:
            words = error.render()
            told = (
                "is not what these signals were measured with" in words
                and f"{field}: " in error.expected
                and f"{field}: " in str(error.got)
            )
            return {"refused": True, "named": told, "untouched": tree(out) == before}
        except Stopped:
            pass
        return {"refused": False, "named": False, "untouched": tree(out) == before}


def resumed(base: Path, whole: Mapping[str, tuple], done: int, change: Change, defect: str) -> dict[str, Any]:
    """Go on with a change of what is only recorded."""
    with fresh(base) as (place, out):
        plant(defect)
        changes = change(place)
        seat = changes.pop("", None)
        progress = Stops()
        try:
            run(recipe_of(place, **changes), out, progress, seat=seat)
        except SpecError:
            return {"resumed": False, "measured": 0, "all_rows": False}
        rows = store_rows(out)
        contents = {name: row[0] for name, row in rows.items()} == {name: row[0] for name, row in whole.items()}
        return {"resumed": True, "measured": progress.num_rows, "all_rows": contents}


def measure(full: bool, defect: str) -> dict[str, Any]:
    """Stop a run, and go on with every change, each time from the same stopped run."""
    num_rows = 60 if full else 24
    semantic = dict(SEMANTIC if full else list(SEMANTIC.items())[:2])
    operational = dict(OPERATIONAL if full else list(OPERATIONAL.items())[:1])
    with room() as folder:
        base = folder / "base"
        base.mkdir()
        place = world_in(base / "world", num_rows)
        run(recipe_of(place), folder / "whole")
        whole = store_rows(folder / "whole")
        with suppress(Stopped):
            run(recipe_of(place), base / "run", Stops(after=num_rows // 2))
        done = len(store_rows(base / "run"))
        return {
            "rows": num_rows,
            "committed_before": done,
            "refused": {name: refused(base, field, c, defect) for name, (field, c) in semantic.items()},
            "resumed": {name: resumed(base, whole, done, c, defect) for name, c in operational.items()},
        }


def judge(figures: Mapping[str, Any]) -> Outcome:
    """Every change of meaning refused by name, every other one resumed without measuring a row twice."""
    semantic, operational = figures["refused"], figures["resumed"]
    left = figures["rows"] - figures["committed_before"]
    good = [n for n, f in semantic.items() if f["refused"] and f["named"] and f["untouched"]]
    bad = [n for n in semantic if n not in good]
    well = [n for n, f in operational.items() if f["resumed"] and f["measured"] == left and f["all_rows"]]
    badly = [n for n in operational if n not in well]

    def words(count: int, total: int, names: list[str]) -> str:
        return f"{count}/{total}" + (f" (not: {', '.join(names)})" if names else "")

    return Outcome(
        "R10",
        (
            Check(
                "changes of meaning refused by name, store untouched", words(len(good), len(semantic), bad), "all",
                not bad and len(semantic) > 0,
            ),
            Check(
                "other changes resumed, nothing measured twice", words(len(well), len(operational), badly), "all",
                not badly and 0 < left < figures["rows"],
            ),
        ),
    )  # fmt: skip


TRIAL = Trial(
    "R10", "a stopped run goes on with one thing changed", "18/18 refused, naming field, old and new; 9/9 resumed",
    measure, judge, (WAVED, UNNAMED), {"rows": 60, "semantic": list(SEMANTIC), "operational": list(OPERATIONAL)},
    slow=True,
)  # fmt: skip
