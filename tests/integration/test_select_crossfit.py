"""crossfit from files to a chosen file: probes that are kept, a run that is stopped, rows in any order."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.rows import chat, some_rows, world, write_jsonl
from transformers import AutoModelForCausalLM

from gradsift import select
from gradsift.errors import ConfigError, StoreError
from gradsift.methods import make_method
from gradsift.pipeline import probe_design
from gradsift.pipeline.estimate import estimate
from gradsift.pipeline.prepare import prepare
from gradsift.pipeline.progress import Clock, Silent
from gradsift.pipeline.run import select as run_recipe
from gradsift.recipe import build_recipe
from gradsift.seeds import stream
from gradsift.train.crossfit import CrossfitConfig, Material, choose_crossfit, crossfit

PROBE = {"num_steps": 3, "batch_size": 4, "lr": 3e-3}
SMALL = {"collect.rows_per_shard": 7, **{f"probe.{k}": v for k, v in PROBE.items()}, "navigator.parameters": "all"}


def run(files, out, navigator, budget="25%", **options):
    settings = {**SMALL, **options.pop("settings", {})}
    pool = options.pop("pool", files["pool"])
    anchors = options.pop("anchors", {"math": files["math"], "chat": files["chat"]})
    target = options.pop("target", files["target"])
    return select(
        {"pool": pool}, method=options.pop("method", "crossfit"), budget=budget, out=out, anchors=anchors,
        target=target, navigator=navigator, settings=settings, report=False, **options,
    )  # fmt: skip


def recipe(files, navigator, **changes):
    values = {
        "pool": [{"label": "pool", "path": str(files["pool"])}],
        "anchors": [{"label": name, "path": str(files[name])} for name in ("math", "chat")],
        "target": str(files["target"]), "method": {"name": "crossfit"}, "budget": "25%", "probe": PROBE,
        "collect": {"rows_per_shard": 7}, "navigator": {"model": str(navigator), "parameters": "all"}, **changes,
    }  # fmt: skip
    return build_recipe(values)


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def audit(out):
    return {row["id"]: row for row in pq.read_table(out / "selection/audit.parquet").to_pylist()}


class Stopping(Silent):
    """Counts what happens in the stage probe, and can stop there."""

    def __init__(self, after: int = 10**9) -> None:
        self.after, self.ticks, self.stage, self.said = after, 0, "", []

    def start(self, stage: str, total_tokens: int) -> None:
        self.stage = stage

    def advance(self, rows: int, tokens: int) -> None:
        if self.stage == "probe":
            self.ticks += 1
            if self.ticks > self.after:
                raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("replay", [0.0, 0.25])
def test_the_rows_are_those_that_the_comparison_s_own_code_chooses(tmp_path, navigator, replay):
    files, out = world(tmp_path, 40), tmp_path / "run"
    settings = {"trust": 0.5, "protect": 0.3, "known_quantile": 0.9}
    got = run(files, out, navigator, budget="12", settings={**settings, "probe.replay": replay})
    prepared = prepare(recipe(files, navigator), make_method("crossfit", {}), Clock(Silent()))
    named = [
        dataclasses.replace(row, id=f"\x1fanchor\x1f{source.name}\x1f{row.id}")
        for source in prepared.anchors
        for row in source.usable
    ]
    anchors = [dataclasses.replace(row, id=f"own {row.id}") for row in named]
    material = Material(
        lambda: AutoModelForCausalLM.from_pretrained(navigator).requires_grad_(True),
        prepared.pool.usable, anchors, prepared.target.usable, named, {}, prepared.pad_id, 42,
    )  # fmt: skip
    config = CrossfitConfig(**PROBE, **settings, replay=replay)
    found = crossfit(material, config)
    ids, _ = choose_crossfit(found, config, 12, stream(42, "select/crossfit/draw"))
    assert set(got.ids) == set(ids)
    rows = audit(out)
    for i, value in found.held_out_loss.items():
        assert rows[i]["held_out_loss"] == pytest.approx(value, rel=1e-4)
        assert rows[i]["likeness"] == pytest.approx(found.likeness[i], rel=1e-5)
    assert {row["reason_code"].split(":")[1] for row in rows.values()} <= {
        "trusted", "known", "untrusted", "not_domain", "draw",
    }  # fmt: skip
    assert "no_gradients" in [n.code for n in got.notes]


def test_probes_move_the_losses_and_every_row_has_one(tmp_path, navigator):
    files = world(tmp_path)
    run(files, tmp_path / "run", navigator)
    rows = audit(tmp_path / "run")
    assert all(np.isfinite(row["held_out_loss"]) for row in rows.values())
    assert max(abs(row["held_out_loss"] - row["loss"]) for row in rows.values()) > 0.01
    assert manifest(tmp_path / "run")["probes"]["num_probes"] == 2
    assert set(manifest(tmp_path / "run")["cost"]["tokens"]) == {"collect", "noise", "anchor_loss", "probe"}
    assert manifest(tmp_path / "run")["spec"]["signals"] == ["loss"]


@pytest.mark.parametrize("parameters", ["lora", ["*lm_head*", "*.mlp.*"]])
def test_an_adapter_or_named_weights_are_trained_and_the_choice_is_read_back(tmp_path, navigator, parameters):
    files, out = world(tmp_path), tmp_path / "run"
    settings = {"navigator.parameters": parameters}
    first = run(files, out, navigator, settings=settings)
    rows = audit(out)
    assert max(abs(row["held_out_loss"] - row["loss"]) for row in rows.values()) > 1e-3
    second = run(files, out, navigator, settings=settings)
    assert manifest(out)["cost"]["tokens"] == {}
    assert (first.ids, first.reason) == (second.ids, second.reason)
    other = run(files, out, navigator, settings={**settings, "trust": 0.3, "protect": 0.1})
    assert manifest(out)["cost"]["tokens"] == {}  # settings of the choice cost nothing
    assert other.config["trust"] == 0.3
    run(files, out, navigator, settings={**settings, "prior_share": 0.9})
    assert set(manifest(out)["cost"]["tokens"]) == {"anchor_loss", "probe"}  # another prior, other probes


@pytest.mark.parametrize("after", [0, 3, 6, 9])
def test_a_stopped_run_resumes_probe_by_probe_to_the_same_choice(tmp_path, navigator, after):
    files = world(tmp_path)
    whole = Stopping()
    clean = run_recipe(recipe(files, navigator), tmp_path / "clean", progress=whole)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(files, navigator), tmp_path / "run", progress=Stopping(after))
    half = len(list((tmp_path / "run/probes").glob("*/probe-*.json")))
    resumed = Stopping()
    again = run_recipe(recipe(files, navigator), tmp_path / "run", progress=resumed)
    assert (clean.selection.ids, clean.selection.reason) == (again.selection.ids, again.selection.reason)
    names = ["anchors", "probe-0-0", "probe-0-1"]
    for name in names:
        one, two = (next((tmp_path / d / "probes").glob(f"*/{name}.npy")) for d in ("clean", "run"))
        assert one.read_bytes() == two.read_bytes()
    assert resumed.ticks < whole.ticks or half == 0
    assert any("probes were trained before" in text for text in resumed.said) == (half == 1)


def test_neither_the_order_of_the_rows_nor_that_of_the_anchors_matters(tmp_path, navigator):
    files = world(tmp_path)
    for name in ("pool", "math", "target"):
        lines = files[name].read_text().splitlines(keepends=True)
        random.Random(4).shuffle(lines)
        (tmp_path / f"{name}2.jsonl").write_text("".join(lines))
    one = run(files, tmp_path / "one", navigator)
    two = run(
        files, tmp_path / "two", navigator, pool=tmp_path / "pool2.jsonl", target=tmp_path / "target2.jsonl",
        anchors={"math": tmp_path / "math2.jsonl", "chat": files["chat"]},
    )  # fmt: skip
    assert (one.ids, one.reason) == (two.ids, two.reason)


def test_equal_rows_share_a_fold_and_a_loss_whatever_their_ids(tmp_path, navigator, monkeypatch):
    files = world(tmp_path)
    rows = some_rows(20, 0)
    named = [{**row, "id": f"n{k:02d}"} for k, row in enumerate([*rows, *rows[:6]])]
    pool = write_jsonl(tmp_path / "named.jsonl", named)
    designs = []
    real = probe_design.plan_probes
    monkeypatch.setattr(probe_design, "plan_probes", lambda *a: designs.append(a) or real(*a))
    run(files, tmp_path / "run", navigator, pool=pool, settings={"prior_share": 1.0})
    prior, groups, _, config, seed = designs[-1]
    assert groups["n20"] == "n00"
    for plan in real(prior, groups, [], config, seed):
        learned = {groups[i] for i in plan.train}
        assert not learned & {groups[i] for i in plan.test}
    got = audit(tmp_path / "run")
    for k in range(6):
        assert got[f"n{k:02d}"]["held_out_loss"] == got[f"n{20 + k}"]["held_out_loss"]


def test_copies_that_are_kept_are_capped(tmp_path, navigator):
    files = world(tmp_path)
    rows = some_rows(16, 3)
    pool = write_jsonl(tmp_path / "copies.jsonl", [*rows, *[rows[0]] * 5, chat("what", "so")])
    got = run(files, tmp_path / "run", navigator, pool=pool, budget="22", dedup="keep", settings={"max_copies": 2})
    table = audit(tmp_path / "run")
    copies = [row["reason_code"] for row in table.values()]
    assert copies.count("dropped:copies") == 4
    assert len(got.ids) == sum(code.startswith("kept:") for code in copies)


def test_a_pass_with_gradients_and_an_adapter_gives_the_same_probes(tmp_path, navigator):
    files = world(tmp_path)
    settings = {"navigator.parameters": "lora", "collect.sketch_dim": 251}
    one = run(files, tmp_path / "one", navigator, settings=settings)
    everything = run(files, tmp_path / "all", navigator, settings={**settings, "collect.signals": "all"})
    assert one.ids == everything.ids
    a, b = (audit(tmp_path / name) for name in ("one", "all"))
    assert all(a[i]["held_out_loss"] == b[i]["held_out_loss"] for i in a)


def test_rows_of_an_anchor_that_stand_in_the_pool_are_no_replay(tmp_path, navigator):
    files = world(tmp_path)
    both = write_jsonl(tmp_path / "both.jsonl", [*some_rows(24, 0)[:4], *some_rows(6, 1, answer="four")])
    got = run(files, tmp_path / "run", navigator, anchors={"math": both})
    assert [n.count for n in got.notes if n.code == "replay_shared"] == [4]
    assert manifest(tmp_path / "run")["probes"]["num_replay"] <= 6
    assert manifest(tmp_path / "run")["probes"]["num_anchor_rows"] == 10


@pytest.mark.parametrize(("gone", "flag"), [({"target": None}, "--target"), ({"anchors": None}, "--anchor")])
def test_without_target_or_anchors_it_is_refused_before_a_model_loads(tmp_path, navigator, monkeypatch, gone, flag):
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError) as refusal:
        run(world(tmp_path), tmp_path / "run", navigator, **gone)
    assert refusal.value.where == flag


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"navigator.dtype": "bfloat16"}, "bfloat16"), ({"prior_share": 0.01}, "too small"), ({"probe.lr": 0}, "lr")],
)
def test_what_cannot_be_trained_is_refused_before_a_model_loads(tmp_path, navigator, monkeypatch, settings, match):
    monkeypatch.setattr("gradsift.pipeline.measure.load_navigator", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=match):
        run(world(tmp_path), tmp_path / "run", navigator, settings=settings)


def test_damaged_losses_are_refused_by_file(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "run"
    run(files, out, navigator)
    path = next((out / "probes").glob("*/probe-0-1.npy"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(bytes(data))
    with pytest.raises(StoreError, match="probe-0-1"):
        run(files, out, navigator)


def test_a_dry_run_counts_the_tokens_of_probes_and_the_run_takes_just_as_many(tmp_path, navigator):
    files = world(tmp_path)
    plan = estimate(recipe(files, navigator), Silent())
    run_recipe(recipe(files, navigator), tmp_path / "run")
    tokens = manifest(tmp_path / "run")["cost"]["tokens"]
    assert plan.cost == "probe"
    assert plan.num_probes == 2
    assert plan.trained_by_probes + plan.judged_by_probes == tokens["probe"]
    assert sum(plan.tokens.values()) == tokens["collect"] + tokens["anchor_loss"]
    assert any(part == "probes" and "2 short trainings" in text for part, text in plan.lines())


def test_the_global_generator_of_torch_is_left_alone(tmp_path, navigator):
    files = world(tmp_path)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run(files, tmp_path / "run", navigator)
    assert torch.equal(torch.rand(3), want)
