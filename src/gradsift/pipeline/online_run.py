"""What a finished run of ``select`` offers to online selection: its pool in clusters, budget, held-out rows, effects and policy.

Nothing is measured again: signals, directions and clusters are read from the run folder, and rows are read from the files
that the run read, which must not have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow.parquet as pq

from gradsift.errors import ConfigError, DataError, SpecError
from gradsift.geometry.cluster import Clusters
from gradsift.manifest import MANIFEST, RECIPE, read_finished
from gradsift.methods import make_method
from gradsift.methods.base import Method, Needs, resolve_budget
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared, prepare, refuse_changed
from gradsift.pipeline.problem import build_problem, eligible_rows
from gradsift.pipeline.progress import Clock
from gradsift.policy.episodes import Table
from gradsift.policy.kept import KEPT, KeptPolicy, kept_from_arrays, table_key
from gradsift.policy.statistics import describe_clusters, make_clusters
from gradsift.recipe import Recipe, build_recipe, load_recipe, parse_budget
from gradsift.seeds import stream
from gradsift.store.signals import open_store
from gradsift.types import Budget, Direction, Noise, Problem, Selection, TokenRow

SIGNALS = {"loss", "grad_norm", "dots", "sketch"}


@dataclass(frozen=True)
class _Deciding:
    """Stands for the method while inputs are prepared: online selection wants held-out rows, whatever chose the list."""

    name: ClassVar[str] = "online selection"
    paper: ClassVar[str] = "ours"
    summary: ClassVar[str] = "rows are chosen while the model trains"

    @property
    def needs(self) -> Needs:
        return Needs(anchors=True, target=True, rollouts=True)

    def select(self, problem: Problem, budget: Budget, stream: Any) -> Selection:
        raise AssertionError("the trainer selects")


@dataclass(frozen=True)
class Offer:
    """A finished run, as far as online selection asks.

    Args:
        folder: of the run.
        recipe: of the run.
        manifest: of the run.
        method: of the run.
        prepared: its rows for the navigator, held-out rows apart.
        problem: its eligible rows with their signals.
        rows: the eligible rows for the navigator, by row number.
        table: their clusters.
        budget: rows or trained tokens of the navigator's tokenizer, in the unit of ``table.price``.
        unit: ``rows`` or ``tokens``.
        kept: what an ``ogs`` run knows of its clusters; None of other methods.
    """

    folder: Path
    recipe: Recipe
    manifest: Mapping[str, Any]
    method: Method
    prepared: Prepared
    problem: Problem
    rows: tuple[TokenRow, ...]
    table: Table
    budget: int
    unit: str
    kept: KeptPolicy | None


def read_offer(run: Path, clock: Clock) -> Offer:
    """Read a finished run.

    Args:
        run: its folder.
        clock: timing and progress.

    Returns:
        Pool, clusters, budget and held-out rows.

    Raises:
        SpecError: the policy was learned on other clusters than those that are found now.
    """
    recipe, manifest = _read_run(run)
    method = make_method(recipe.method.name, recipe.method.settings)
    # The navigator is not trained here, so its arithmetic is no ground for refusing.
    float32 = recipe.model_copy(update={"navigator": recipe.navigator.model_copy(update={"dtype": "float32"})})
    prepared = replace(prepare(float32, cast(Method, _Deciding()), clock), recipe=recipe)
    refuse_changed(prepared, manifest)
    measured = _stored(run, manifest)
    problem = build_problem(prepared, measured)
    allowance = resolve_budget(problem, parse_budget(recipe.budget))
    unit = "rows" if allowance.rows is not None else "tokens"
    base, general = stream(recipe.seed, f"select/{method.name}"), problem.general_rows
    clusters = _recorded_clusters(run, problem) or make_clusters(
        problem, general, base.child("clusters"), getattr(method, "num_clusters", None)
    )
    table = describe_clusters(problem, clusters, general, base.child("members"), unit=unit)
    kept = _kept(run, manifest)
    if kept is not None and kept.table != table_key(table):
        raise SpecError(
            "the run's policy knows other clusters than those found in its folder", where=str(run), got=table_key(table),
            expected=kept.table, do="run the same gradsift select again",
        )  # fmt: skip
    rows = tuple(eligible_rows(prepared, measured))
    return Offer(run, recipe, manifest, method, prepared, problem, rows, table, allowance.amount, unit, kept)


def _read_run(run: Path) -> tuple[Recipe, dict[str, Any]]:
    if not all((run / name).is_file() for name in (RECIPE, MANIFEST, "selection/audit.parquet")):
        raise DataError(
            "online selection takes a finished run, for it chooses from the whole pool", where=f"--selection {run}",
            expected="a run folder of gradsift select", do="run gradsift select first, or leave online.policy out",
        )  # fmt: skip
    manifest = read_finished(run)
    recipe = build_recipe(load_recipe(run / RECIPE))
    told = manifest["selection"]
    found = (told["method"], told["budget"], told["seed"])
    asked = (recipe.method.name, str(parse_budget(recipe.budget)), recipe.seed)
    if found != asked:
        raise DataError("the run is not finished", where=f"--selection {run}", got=f"a manifest of {found}",
                        expected=f"{asked}, as in recipe.yaml", do="finish it: run the same gradsift select again")  # fmt: skip
    roles = {entry["role"] for entry in manifest["directions"] or ()}
    lacks = sorted(SIGNALS - set((manifest["spec"] or {}).get("signals", ())))
    lacks += [word for role, word in (("protect", "an anchor"), ("target", "a target")) if role not in roles]
    if lacks:
        raise ConfigError(
            "this run did not measure what policies look at", where=f"--selection {run}",
            got=f"method {recipe.method.name}; missing: {', '.join(lacks)}",
            expected="loss, gradient norms, dots with an anchor and a target, sketches",
            do="select with ogs or hybrid, or with --set collect.signals=all, --anchor and --target, into another --out",
        )  # fmt: skip
    return recipe, manifest


def _stored(run: Path, manifest: Mapping[str, Any]) -> Measurement:
    """The pass as it was; neither the model nor its weights are loaded, for the problem asks for numbers alone."""
    directions = tuple(Direction(**{k: v for k, v in e.items() if k != "reliable"}) for e in manifest["directions"])
    store = open_store(run / "signals" / manifest["spec_key"])
    nothing = cast(Any, None)
    gram = np.array(manifest["direction_cos"]["matrix"], dtype=np.float64)
    return Measurement(nothing, nothing, nothing, store.spec, store, directions, gram, Noise(**manifest["noise"]), ())


def _recorded_clusters(run: Path, problem: Problem) -> Clusters | None:
    """The run's own clusters from its audit table, or None where its method made none."""
    table = pq.read_table(run / "selection" / "audit.parquet", columns=["id", "cluster"]).to_pydict()
    recorded = dict(zip(table["id"], table["cluster"], strict=True))
    labels = [recorded.get(i) for i in problem.ids]
    if None in labels:
        return None
    numbers = np.array(labels, dtype=np.int32)
    sizes = np.bincount(numbers).astype(np.int64)
    return Clusters(numbers, np.zeros((len(sizes), 1), dtype=np.float32), sizes)  # centres are not looked at


def _kept(run: Path, manifest: Mapping[str, Any]) -> KeptPolicy | None:
    folder = (manifest.get("rollouts") or {}).get("folder")
    if folder is None or not (run / folder / f"{KEPT}.npz").is_file():
        return None
    with np.load(run / folder / f"{KEPT}.npz", allow_pickle=False) as arrays:
        return kept_from_arrays(arrays)
