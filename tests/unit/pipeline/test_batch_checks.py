"""What the manifest says of batches where the formula or a sum has no answer: nothing, and never a number that JSON lacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tests.planted import planted_world

from gradsift.geometry.batch import predicted_conflict
from gradsift.manifest import pretty_json
from gradsift.methods import make_method
from gradsift.pipeline.checks import batch_checks
from gradsift.seeds import stream
from gradsift.types import Budget


def test_a_formula_without_an_answer_is_null_and_the_rest_stays():
    """Sketches longer than the rows, in opposite pairs: their mean inner product falls below -1 / (B - 1)."""
    problem = planted_world("gradient").problem()
    problem = replace(problem, sketch=_opposed(problem))
    selection = make_method("random", {}).select(problem, Budget(rows=problem.size), stream(1, "select/random"))
    found = batch_checks(problem, selection, 1)
    entries = [one for one in found["batch_check"] if one["anchor"] == "target"]
    assert entries
    assert all(one["predicted"] is None and one["p50"] is not None for one in entries)
    pretty_json(found)


def test_sums_that_vanish_are_null():
    problem = planted_world("gradient").problem()
    problem = replace(problem, sketch=np.zeros_like(problem.sketch))
    selection = make_method("random", {}).select(problem, Budget(rows=64), stream(1, "select/random"))
    found = batch_checks(problem, selection, 1)
    assert all(one["p05"] is one["p50"] is one["p95"] is None for one in found["batch_check"])
    pretty_json(found)


def test_the_formula_itself():
    assert np.isnan(predicted_conflict(0.0, -0.5, 32))
    assert predicted_conflict(0.5, 0.0, 1) == 0.5


def _opposed(problem):
    """Sketches of 20 times the rows' lengths, half of them along one line and half against it."""
    signs = np.where(np.arange(problem.size) % 2, -20.0, 20.0)
    line = np.random.default_rng(0).standard_normal(problem.sketch.shape[1])
    return (signs * problem.grad_norm)[:, None] * line / np.linalg.norm(line)
