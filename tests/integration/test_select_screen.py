"""select in two stages: what is measured, what is chosen, what the certificate says, resuming, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.rows import world
from typer.testing import CliRunner

from gradsift import select
from gradsift.cli.app import app
from gradsift.errors import ConfigError
from gradsift.launch.seat import Seat
from gradsift.pipeline.run import select as run_recipe
from gradsift.recipe import build_recipe
from gradsift.store.spec import kept_specs

SMALL = {
    "collect.rows_per_shard": 16,
    "collect.sketch_dim": 61,
    "allow_weak_anchor": True,
    "navigator.parameters": "all",
}
SCREEN = {"screen.by": "50%", "screen.calibrate": 30, "screen.certify": 25}
POOL = 160


def run(files, out, navigator, method="target_cosine", budget="10%", dedup="drop", **settings):
    return select(
        {"pool": files["pool"]}, method=method, budget=budget, out=out,
        anchors={"math": files["math"], "chat": files["chat"]}, target=files["target"], navigator=navigator,
        settings={**SMALL, **settings}, report=False, dedup=dedup,
    )  # fmt: skip


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def both(tmp_path_factory, navigator):
    """The same pool, measured whole and in two stages."""
    folder = tmp_path_factory.mktemp("screened")
    files = world(folder, POOL)
    whole = run(files, folder / "whole", navigator)
    staged = run(files, folder / "staged", navigator, **SCREEN)
    return files, folder, whole, staged


def test_the_exact_signals_are_those_of_a_whole_pass_and_the_bound_holds(both):
    _, folder, whole, staged = both
    table = pq.read_table(folder / "staged" / "selection" / "audit.parquet").to_pydict()
    full = pq.read_table(folder / "whole" / "selection" / "audit.parquet").to_pydict()
    exact = [i for i, status in enumerate(table["status"]) if status == "OK"]
    for name in ("loss", "grad_norm", "cos_math", "cos_target", "score"):
        np.testing.assert_allclose(
            [table[name][i] for i in exact], [full[name][i] for i in exact], rtol=2e-4, atol=2e-5
        )
    out = [i for i, status in enumerate(table["status"]) if status == "SCREENED_OUT"]
    assert out
    assert all(table["reason"][i].startswith("the screen left it out") for i in out)
    assert all(table["grad_norm"][i] is None and not table["selected"][i] for i in out)
    found = manifest(folder / "staged")["screen"]
    rows, proof = found["rows"], found["certificate"]
    assert rows["eligible"] == POOL
    assert len(exact) == rows["exact"] == POOL - len(out)
    assert rows["out"] == len(out) + rows["certify"]
    assert rows["certify"] == 25
    lost = set(whole.ids) - {table["id"][i] for i in exact}
    assert len(lost) <= proof["high"]
    assert len(staged.ids) == len(whole.ids) == 16  # 10% of all eligible rows, not of those measured exactly
    assert set(staged.ids) >= set(whole.ids) - lost
    (note,) = [n for n in staged.notes if n.code == "screen"]
    assert f"left {len(out)} of {POOL} rows" in note.text
    assert f"{proof['high_share']:.1%}" in note.text
    assert set(found["ranks"]) == {"math", "chat", "target", "norm"}
    assert found["seconds"]["screen"] > 0
    assert found["tokens"]["exact"]["collect"] < found["tokens"]["screen"]["collect"]


def test_both_stores_say_what_they_hold(both):
    folder = both[1]
    (screen,), (exact,) = kept_specs(folder / "staged" / "screen"), kept_specs(folder / "staged" / "signals")
    assert (screen.layers, exact.layers) == ("2 to 2 of 2", None)
    assert exact.key == kept_specs(folder / "whole" / "signals")[0].key


def test_the_same_command_again_measures_nothing_and_chooses_the_same(both, navigator):
    files, folder, _, staged = both
    again = run(files, folder / "staged", navigator, **SCREEN)
    assert again.ids == staged.ids
    assert manifest(folder / "staged")["cost"]["tokens"].get("collect", 0) == 0


def test_a_screen_killed_after_its_first_stage_goes_on(both, navigator, tmp_path, monkeypatch):
    files, _, _, staged = both
    import gradsift.pipeline.screen as stages

    whole = stages._possible
    monkeypatch.setattr(stages, "_possible", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "run", navigator, **SCREEN)
    monkeypatch.setattr(stages, "_possible", whole)
    assert run(files, tmp_path / "run", navigator, **SCREEN).ids == staged.ids


def test_a_set_level_method_and_a_token_budget_can_be_screened(both, navigator, tmp_path):
    files = both[0]
    chosen = run(
        files, tmp_path / "dual", navigator, "ogs_dual", "300tok", **SCREEN, **{"navigator.parameters": "lora"}
    )
    assert chosen.num_trained <= 300
    assert str(chosen.budget) == "300tok"
    assert manifest(tmp_path / "dual")["screen"]["worlds"] >= 20


@pytest.mark.parametrize("by", ["1", "trained"])
def test_the_command_takes_the_share(both, navigator, tmp_path, by):
    files = both[0]
    command = ["select", "--pool", files["pool"], "--target", files["target"], "--method", "target_cosine", "--budget",
               "10", "--navigator", navigator, "--screen", by, "--out", tmp_path / "run"]  # fmt: skip
    for key, value in {**SMALL, "screen.calibrate": 30, "screen.certify": 25}.items():
        command += ["--set", f"{key}={value}"]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "with 95% confidence at most" in told
    assert "SCREENED_OUT" in told
    (spec,) = kept_specs(tmp_path / "run" / "screen")
    assert (spec.layers, spec.positions) == ((None, "trained") if by == "trained" else ("2 to 2 of 2", "all"))


@pytest.mark.parametrize(("method", "settings", "word"), [
    ("random", {}, "measures no gradient"),
    ("hybrid", {}, "signals that a screen does not predict"),
    ("norm", {"method.settings.band": "middle"}, "one by one"),
    ("target_cosine", {"dedup": "keep"}, "copies"),
    ("target_cosine", {"collect.layers": "1"}, "exact signals"),
    ("target_cosine", {"screen.certify": 500}, "too small"),
])  # fmt: skip
def test_what_cannot_be_screened_is_refused(both, navigator, tmp_path, method, settings, word):
    with pytest.raises(ConfigError, match=word):
        run(both[0], tmp_path / "run", navigator, method, **{**SCREEN, **settings})


def test_several_processes_are_refused(both, navigator, tmp_path):
    recipe = build_recipe({"pool": [{"label": "pool", "path": str(both[0]["pool"])}], "budget": "10", "target": str(both[0]["target"]),
                           "method": {"name": "target_cosine"}, "screen": {"by": "1"}})  # fmt: skip
    with pytest.raises(ConfigError, match="one process"):
        run_recipe(recipe, tmp_path / "run", seat=Seat("ray", 0, 2))


def test_a_dry_run_tells_what_two_stages_take(tmp_path, navigator):
    from gradsift.pipeline.estimate import estimate
    from gradsift.pipeline.progress import Silent

    files = world(tmp_path, POOL)

    def plan(**more):
        values = {
            "pool": [{"label": "pool", "path": str(files["pool"])}], "target": str(files["target"]), "budget": "10%",
            "navigator": {"model": str(navigator), "parameters": "all"}, "method": {"name": "target_cosine"}, **more,
        }  # fmt: skip
        return estimate(build_recipe(values), Silent())

    screen = {"calibrate": 30, "certify": 25}
    half, held, whole = plan(screen={**screen, "by": "50%"}), plan(screen={**screen, "by": "trained"}), plan()
    assert whole.screen is None
    assert half.screen is not None
    assert half.screen.num_drawn == 55
    # one of two layers: the forward and half of the backward, beside forward and backward of all
    assert half.screen.least == pytest.approx((2 + 4.5 / 2) / 6.5 + 55 / POOL)
    assert half.screen.most == pytest.approx((2 + 4.5 / 2) / 6.5 + 1)
    assert held.screen is not None
    assert held.screen.least == pytest.approx((2 + 4.5 * held.trained / held.tokens["pool"]) / 6.5 + 55 / POOL)
    said = dict(half.lines())
    assert "by its upper layers (50%) first; then 55 drawn rows" in said["screen"]
    assert " to " in said["time"].removesuffix(" to measure (within a factor of two)")
    with pytest.raises(ConfigError, match="too small for a screen"):
        plan(screen={**screen, "by": "50%", "certify": 500})
