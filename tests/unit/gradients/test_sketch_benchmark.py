"""The sketch benchmark at toy size: more numbers are better, and another project's failure costs the others nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def sketch():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("sketch")
    patch.undo()


def test_rmse_is_that_of_random_directions_and_fewer_numbers_are_worse(sketch, tmp_path, capsys):
    assert sketch.main(["--quick", "--seeds", "0", "1", "--json", str(tmp_path / "s.json")]) == 0
    facts = json.loads((tmp_path / "s.json").read_text())
    assert facts["settings"]["seeds"] == [0, 1]
    assert facts["verdict"]["met"] is None  # nothing is asked of the toy
    (case,) = facts["cases"]
    assert (case["rows"], case["layers"], case["tokens"], case["tokens_with_loss"]) == (16, 14, 512, 496)
    assert case["cosines"]["std"] > 0.03
    lines = {line["key"]: line for line in case["lines"]}
    ours, fewer = lines["gradsift"], lines["gradsift-alone-1021"]
    assert ours["numbers"] == 4093
    for what in ("rmse", "rmse_over_exact_norms"):
        assert all(0.7 < one * 4093**0.5 < 1.4 for one in ours[what])
        assert all(1.4 * a < b for a, b in zip(ours[what], fewer[what], strict=True))
        for other, gap in (("gradsift-alone-4093", 1e-5), ("gradsift-float16", 1e-4)):
            assert lines[other][what] == pytest.approx(ours[what], rel=0, abs=gap)
    assert ours["rmse"][0] != ours["rmse"][1]  # the seed is used
    assert min(ours["pearson"]) > max(fewer["pearson"])
    rival = lines["bergson"]
    assert "bergson" in rival["not_run"] if rival["not_run"] else rival["numbers"] == 14 * 256
    assert "asked: " in capsys.readouterr().out


def test_the_gram_matrix_is_that_of_whole_gradients_however_many_are_held(sketch, monkeypatch):
    model, batches = sketch.random_case((16, 32, 1, 2, 64), 3, 8)
    names = sketch.body_weights(model)
    rows = torch.cat([batch.input_ids for batch in batches])
    whole = []
    for row in rows:
        model.zero_grad()
        logits = model(input_ids=row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:]).backward()
        whole.append(torch.cat([model.get_parameter(name).grad.flatten() for name in names]).double())
    expected = torch.stack(whole) @ torch.stack(whole).t()
    for room in (1 << 30, 3 * 600, 1):
        monkeypatch.setattr(sketch, "ROOM", room)
        torch.testing.assert_close(sketch.exact_gram(model, names, batches), expected, rtol=1e-5, atol=1e-6)
    assert [*sketch.groups({"a": 3, "b": 3, "c": 9, "d": 1}, 6)] == [["a", "b"], ["c"], ["d"]]


def test_a_rival_that_fails_or_is_absent_is_named(sketch, monkeypatch, capsys):
    model, batches = sketch.random_case((16, 32, 1, 2, 64), 4, 8)
    for error, said in ((sketch.NotRunError("not here"), "not here"), (KeyError("planted"), "KeyError: 'planted'")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(sketch, "bergson_sketches", fail)
        case = sketch.measure("toy", model, batches, [0])
        assert [line["not_run"] for line in case["lines"]] == [None, None, None, said]
        assert sketch.judge(case)["met"] is None
        sketch.show(case)
        assert f"not run: {said}" in capsys.readouterr().out


def test_the_verdict_compares_the_means_over_seeds(sketch):
    ours = {"key": "gradsift", "numbers": 4093, "rmse": [0.01, 0.03], "not_run": None}

    def verdict(numbers, rmse):
        theirs = {"key": "bergson", "numbers": numbers, "rmse": rmse, "not_run": None}
        return sketch.judge({"lines": [ours, theirs]})["met"]

    assert verdict(14_336, [0.015, 0.026]) is True
    assert verdict(14_336, [0.02, 0.019]) is False
    assert verdict(53_760, [1.0]) is None  # nothing was asked of another model
