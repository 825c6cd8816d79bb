"""rds from files to a chosen file: one forward, signals that are kept and shared, folders of before."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from tests.rows import chat, some_rows, world, write_jsonl

from gradsift import select
from gradsift.data.batches import collate
from gradsift.errors import SpecError
from gradsift.models.load import load_tokenizer
from gradsift.pipeline.estimate import estimate
from gradsift.pipeline.progress import Silent
from gradsift.recipe import build_recipe

SMALL = {"collect.rows_per_shard": 5, "collect.sketch_dim": 251}


def run(files, out, navigator, method="rds", budget="25%", **options):
    settings = {**SMALL, **options.pop("settings", {})}
    pool, target = options.pop("pool", files["pool"]), options.pop("target", files["target"])
    return select(
        {"pool": pool},
        method=method,
        budget=budget,
        out=out,
        target=target,
        navigator=navigator,
        settings=settings,
        report=False,
        **options,
    )


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


@torch.no_grad()
def slow_choice(files, navigator, count):
    """The obvious twin: every row alone through a float64 model, pooled by hand, taken in turns by hand."""
    from transformers import AutoModelForCausalLM

    from gradsift.data.pool import read_pool
    from gradsift.data.tokenize import mask_rule, tokenize_rows
    from gradsift.models.resolve import resolve_navigator
    from gradsift.recipe import SourceConfig

    model = AutoModelForCausalLM.from_pretrained(navigator, dtype=torch.float64)
    tokenizer = load_tokenizer(resolve_navigator(str(navigator), None))

    def vectors(path):
        rows = read_pool((SourceConfig(label="x", path=str(path)),), fmt="auto", dedup="drop").rows
        rule = mask_rule(tokenizer, None, {"messages"})
        out = {}
        for row in tokenize_rows(rows, tokenizer, rule, max_length=2048):
            ids = collate([row], [0], 0).input_ids
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].numpy()
            weight = np.arange(1, len(hidden) + 1)
            vector = (weight[:, None] * hidden).sum(0) / weight.sum()
            out[row.id] = vector / np.linalg.norm(vector)
        return out

    pool, target, chosen = vectors(files["pool"]), vectors(files["target"]), []
    for turn in range(count):
        query = target[sorted(target)[turn % len(target)]]
        left = [name for name in sorted(pool) if name not in chosen]
        chosen.append(max(left, key=lambda name: pool[name] @ query))
    return tuple(chosen)


def test_the_choice_is_that_of_the_slow_twin(tmp_path, navigator):
    files = world(tmp_path)
    got = run(files, tmp_path / "run", navigator, budget="13")
    assert got.ids == slow_choice(files, navigator, 13)
    assert got.cut.margin > got.cut.bound > 0


def test_one_forward_and_no_backward_and_nothing_the_second_time(tmp_path, navigator, monkeypatch):
    files = world(tmp_path)
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: pytest.fail("a backward was run"))
    first = run(files, tmp_path / "run", navigator)
    cost = manifest(tmp_path / "run")["cost"]["tokens"]
    assert set(cost) == {"collect", "noise", "target"}
    assert manifest(tmp_path / "run")["spec"]["signals"] == ["embedding", "loss"]
    second = run(files, tmp_path / "run", navigator)
    assert manifest(tmp_path / "run")["cost"]["tokens"] == {}
    assert first.ids == second.ids
    assert first.reason == second.reason
    for aggregate in ("mean", "max"):
        other = run(files, tmp_path / "run", navigator, settings={"aggregate": aggregate})
        assert manifest(tmp_path / "run")["cost"]["tokens"] == {}
        assert other.config == {"aggregate": aggregate}


def test_another_target_costs_its_own_forward_only(tmp_path, navigator):
    files = world(tmp_path)
    first = run(files, tmp_path / "run", navigator)
    another = write_jsonl(tmp_path / "another.jsonl", some_rows(6, 9, answer="four"))
    second = run(files, tmp_path / "run", navigator, target=another)
    assert set(manifest(tmp_path / "run")["cost"]["tokens"]) == {"target"}
    assert second.ids == run(files, tmp_path / "fresh", navigator, target=another).ids
    assert first.ids != second.ids


def test_the_target_s_order_and_names_change_nothing_that_is_measured(tmp_path, navigator):
    rows = some_rows(8, 3)
    named = [{**row, "id": f"t{k}"} for k, row in enumerate(rows)]
    renamed = [{**row, "id": f"t{7 - k}"} for k, row in enumerate(rows)]
    files = world(tmp_path)
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", some) for k, some in enumerate([named, named[::-1], renamed])]
    one, turned, other = [run(files, tmp_path / "run", navigator, target=path) for path in paths]
    assert set(manifest(tmp_path / "run")["cost"]["tokens"]) == set()  # the same contents: measured once
    assert one.ids == turned.ids
    assert other.ids == run(files, tmp_path / "fresh", navigator, target=paths[2]).ids


def test_with_gradients_the_same_pass_gives_the_same_choice_and_serves_other_methods(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "all"
    everything = run(files, out, navigator, settings={"collect.signals": "all"})
    assert set(manifest(out)["cost"]["tokens"]) >= {"collect", "anchors"}
    assert "target" not in manifest(out)["cost"]["tokens"]  # embedded in its direction's pass
    assert everything.ids == run(files, tmp_path / "forward", navigator).ids
    cosine = run(files, out, navigator, "target_cosine")
    assert manifest(out)["cost"]["tokens"] == {}
    assert cosine.ids == run(files, tmp_path / "cosine", navigator, "target_cosine").ids


def test_a_folder_from_before_goes_on_without_embeddings_and_rds_is_refused_by_name(tmp_path, navigator):
    files, out = world(tmp_path), tmp_path / "run"
    first = run(files, out, navigator, "target_cosine")
    assert "embedding" not in manifest(out)["spec"]["signals"]
    again = run(files, out, navigator, "target_cosine", settings={"collect.signals": "all"})
    assert manifest(out)["cost"]["tokens"] == {}
    assert first.ids == again.ids
    with pytest.raises(SpecError, match="signals") as caught:
        run(files, out, navigator, settings={"collect.signals": "all"})
    assert "embedding" in caught.value.got


def test_rows_in_any_order_in_batches_of_any_size(tmp_path, navigator):
    files = world(tmp_path)
    lines = files["pool"].read_text().splitlines(keepends=True)
    random.Random(4).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("".join(lines))
    one = run(files, tmp_path / "one", navigator, settings={"collect.tokens_per_batch": 64})
    many = run(
        files, tmp_path / "many", navigator, pool=tmp_path / "shuffled.jsonl", settings={"collect.rows_per_shard": 24}
    )
    assert one.ids == many.ids


def test_copies_that_are_kept_share_an_embedding(tmp_path, navigator):
    files = world(tmp_path)
    rows = some_rows(9, 0)
    pool = write_jsonl(tmp_path / "copies.jsonl", [*rows, rows[2], rows[2], chat("what", "so")])
    settings = {"aggregate": "mean"}
    got = run(files, tmp_path / "run", navigator, pool=pool, budget="12", settings=settings, dedup="keep")
    assert len(got.score) == 12
    assert len(set(np.round(got.score, 12))) == 10


def test_a_dry_run_counts_the_target_and_the_embeddings(tmp_path, navigator):
    files = world(tmp_path)
    plans = {}
    for method in ("loss", "rds"):
        recipe = build_recipe(
            {
                "pool": [{"label": "pool", "path": str(files["pool"])}],
                "target": str(files["target"]),
                "method": {"name": method},
                "budget": "25%",
                "navigator": {"model": str(navigator)},
            }
        )
        plans[method] = estimate(recipe, Silent())
    assert plans["rds"].cost == "forward"
    assert set(plans["rds"].tokens) == {"pool", "target"}
    assert plans["rds"].disk_bytes - plans["loss"].disk_bytes == 24 * 4 * 32
