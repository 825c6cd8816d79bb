"""doge, doremi and dids from files to a mixture: proxy runs that are kept, resumed and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.rows import some_rows, write_jsonl

from gradsift.errors import ConfigError, DataError
from gradsift.pipeline.progress import Silent
from gradsift.pipeline.run import select
from gradsift.recipe import build_recipe

pytestmark = pytest.mark.timeout(600)  # seconds of a clock, on a machine that may be busy
SETTINGS = {
    "doge": {"num_rounds": 5, "rows_per_domain": 6},
    "doremi": {"num_rounds": 5, "rows_per_domain": 6, "also": [0.5]},
    "dids": {"num_rounds": 4, "rows_per_domain": 6, "rows_per_round": 16, "test_every": 3, "min_rank": -1.0},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        "like": write_jsonl(folder / "like.jsonl", some_rows(20, 0, answer="four")),
        "unlike": write_jsonl(folder / "unlike.jsonl", some_rows(16, 1, answer="zzz qq")),
        "target": write_jsonl(folder / "target.jsonl", some_rows(12, 3, answer="four")),
        "chat": write_jsonl(folder / "chat.jsonl", some_rows(8, 4, answer="good day to you")),
    }


def recipe(files, model, name, *, labels=("like", "unlike"), **changes):
    settings = {**SETTINGS[name], **changes.pop("settings", {})}
    values = {
        "pool": [{"label": label, "path": str(files[label])} for label in labels],
        "target": str(files["target"]),
        "method": {"name": name, "settings": settings},
        "budget": "12",
        "proxy": {"lr": 3e-3, "batch_size": 8},
        "collect": {"rows_per_shard": 16, "sketch_dim": 251},
        "navigator": {"model": str(model), "parameters": "lora", "lora": {"rank": 4}},
        **changes,
    }
    if name == "doremi":
        values.pop("target")
    return build_recipe(values)


def read(out, name="manifest.json"):
    return json.loads((out / name).read_text())


class Stopping(Silent):
    """Hears of every round that is trained, and can stop after one."""

    def __init__(self, after=10**9):
        self.after, self.told = after, []

    def say(self, text):
        if ", round " in text:
            self.told.append(text)

    def advance(self, rows, tokens):
        if len(self.told) >= self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", params=sorted(SETTINGS))
def clean(request, tmp_path_factory, files, navigator):
    out, progress = tmp_path_factory.mktemp(request.param) / "run", Stopping()
    outcome = select(recipe(files, navigator, request.param), out, progress=progress)
    return request.param, out, outcome, progress


def test_a_run_leaves_a_mixture_and_rows_that_follow_it(clean):
    name, out, outcome, progress = clean
    mixture, manifest = read(out, "selection/mixture.json"), read(out)
    assert set(mixture) == {"like", "unlike"}
    assert sum(mixture.values()) == pytest.approx(1, abs=1e-12)
    assert manifest["selection"]["mixture"] == mixture == dict(outcome.selection.mixture)
    table = pq.read_table(out / "selection/audit.parquet").to_pylist()
    took = sum(row["selected"] for row in table if row["source"] == "like")
    assert took == int(np.floor(12 * mixture["like"] + 0.5))
    details = read(out, "selection/details.json")
    assert len(details["rounds"]) == SETTINGS[name]["num_rounds"]
    assert len(progress.told) == len(details["rounds"]) * (2 if name == "doremi" else 1)
    told = manifest["proxy"]
    assert told["tokens"] == manifest["cost"]["tokens"]["proxy"] > 0
    parts = [cost for run in told["runs"].values() for cost in run.values()]
    assert sum(cost["forward_tokens"] for cost in parts) == told["tokens"]
    assert set(told["runs"]) == {"doremi-1", "doremi-0.5", "reference"} if name == "doremi" else {name}


def test_the_same_command_reads_the_rounds_back(clean, files, navigator):
    name, out, outcome, _ = clean
    before, details = read(out)["proxy"], read(out, "selection/details.json")
    progress = Stopping()
    again = select(recipe(files, navigator, name), out, progress=progress)
    assert progress.told == []
    assert again.selection.ids == outcome.selection.ids
    assert read(out)["proxy"] == before
    assert read(out)["cost"]["tokens"] == {}
    assert read(out, "selection/details.json") == details


@pytest.mark.parametrize("after", [2])
def test_a_stopped_run_goes_on_with_its_round_and_ends_the_same_to_the_last_bit(
    clean, files, navigator, tmp_path, after
):
    name, out, outcome, progress = clean
    with pytest.raises(KeyboardInterrupt):
        select(recipe(files, navigator, name), tmp_path / "run", progress=Stopping(after))
    resumed = Stopping()
    again = select(recipe(files, navigator, name), tmp_path / "run", progress=resumed)
    assert len(resumed.told) == len(progress.told) - after
    assert again.selection.mixture == outcome.selection.mixture
    assert again.selection.ids == outcome.selection.ids
    assert read(tmp_path / "run", "selection/details.json") == read(out, "selection/details.json")
    kept = list((tmp_path / "run/proxy").glob("*/after-*"))
    runs = len(list((tmp_path / "run/proxy").glob("*/end.json"))) or (2 if name == "doremi" else 1)
    assert len(kept) == 2 * runs  # weights and moments after the last round of each run, and none besides


def test_a_dry_run_counts_the_tokens_of_every_training(clean, files, navigator):
    from gradsift.pipeline.estimate import estimate

    name, out, *_ = clean
    plan, told = estimate(recipe(files, navigator, name), Silent()), read(out)["proxy"]
    assert plan.proxy.num_runs == len(told["runs"])
    assert plan.proxy.both + plan.proxy.forward == pytest.approx(told["tokens"], rel=0.05)
    both = sum(cost["backward_tokens"] for parts in told["runs"].values() for cost in parts.values())
    assert plan.proxy.both == pytest.approx(both, rel=0.05)
    lines = dict(plan.lines())
    assert lines["proxy"].startswith(f"{plan.proxy.num_runs} training")
    assert lines["navigator"].endswith("one forward pass")


def test_what_the_proxy_took_is_said_and_no_row_is_said_to_be_settled_by_id(clean):
    from gradsift.cli.select import verdict

    name, out, outcome, _ = clean
    manifest = read(out)
    codes = [note["code"] for note in manifest["selection"]["notes"]]
    assert "proxy_cost" in codes
    assert ("probe_cost" in codes) == (name == "dids")
    text = next(note["text"] for note in manifest["selection"]["notes"] if note["code"] == "proxy_cost")
    assert f"took {manifest['proxy']['flops']:.2g} operations" in text
    table = pq.read_table(out / "selection/audit.parquet").to_pylist()
    epoch = 6 * sum(row["num_tokens"] for row in table if row["selected"])  # operations per weight
    assert f"more than {manifest['proxy']['flops'] / epoch * 10 / 1e9:.2g} billion weights" in text
    assert not outcome.selection.cut.known
    assert "how far it moves this choice is not known" in verdict(manifest)
    assert "settled by id" not in verdict(manifest)
    cut = {"known": True, "margin": 0.0, "bound": 1.0, "num_undecided": 5000, "undecided": ["a"] * 100}
    assert "5000 rows inside the bound" in verdict({**manifest, "selection": {**manifest["selection"], "cut": cut}})


def test_what_the_proxy_cannot_use_is_refused_before_a_model_loads(files, navigator, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", some_rows(3, 5, answer="four"))
    none = tmp_path / "none.jsonl"
    none.write_text('{"text": ""}\n')
    with pytest.raises(ConfigError, match="too few rows"):
        select(recipe(files, navigator, "doge", target=str(few)), tmp_path / "run")
    with pytest.raises(DataError, match="two domains"):
        select(recipe({**files, "none": none}, navigator, "doge", labels=("like", "none")), tmp_path / "run")
    narrow = {"model": str(navigator), "parameters": "all", "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="proxy runs cannot train bfloat16"):
        select(recipe(files, navigator, "doge", navigator=narrow), tmp_path / "run")
    same = [{"label": "copy", "path": str(files["target"])}]
    with pytest.raises(DataError, match="share rows"):
        select(recipe(files, navigator, "dids", settings={"tasks": "all"}, anchors=same), tmp_path / "run")
    assert not (tmp_path / "run").exists()  # nothing was measured


def test_domains_are_asked_for_before_a_model_loads(files, navigator, tmp_path):
    with pytest.raises(ConfigError, match="two labels"):
        select(recipe(files, tmp_path / "no-model", "doge", labels=("like",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clusters_stand_in_for_labels(files, navigator, tmp_path):
    given = {"domains": "cluster", "num_clusters": 3, "num_rounds": 2}
    outcome = select(recipe(files, navigator, "doge", labels=("like",), settings=given), tmp_path / "run")
    assert all(name.startswith("cluster-") for name in outcome.selection.mixture)
    assert set(outcome.selection.cluster.tolist()) == set(range(len(outcome.selection.mixture)))


def test_anchors_count_as_tasks(files, navigator, tmp_path):
    anchors = [{"label": "chat", "path": str(files["chat"])}]
    given = {"tasks": "all", "num_rounds": 2}
    select(recipe(files, navigator, "dids", settings=given, anchors=anchors), tmp_path / "run")
    rounds = read(tmp_path / "run", "selection/details.json")["rounds"]
    assert len(rounds[0]["task_losses"]) == 2


def test_the_page_and_the_card_show_the_mixture(clean):
    from gradsift.report.page import render_html
    from gradsift.report.run import read_run

    _, out, outcome, _ = clean
    page = render_html(read_run(out))
    assert "<h3>Mixture</h3>" in page
    assert "move the choice is not known" in page
    assert "ids settled them" not in page
    assert "Undecided rows" not in page
    card = (out / "selection/README.md").read_text()
    for name, weight in outcome.selection.mixture.items():
        assert f"| {name} | {weight:.4f} |" in card


def test_the_line_on_the_card_samples_by_the_mixture(clean, monkeypatch):
    from datasets import Dataset, interleave_datasets

    _, out, outcome, _ = clean
    text = (out / "selection/README.md").read_text()
    line = text[text.index("mixture = json.loads") :].split("```")[0]
    parts = {name: Dataset.from_dict({"label": [name] * 300}) for name in ("unlike", "like")}
    found = {"parts": parts, "interleave_datasets": interleave_datasets, "json": json, "Path": Path}
    monkeypatch.chdir(out / "selection")
    exec(line, found)
    labels = found["rows"]["label"][:]
    share = labels.count("like") / len(labels)
    wanted = outcome.selection.mixture["like"]
    assert abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(labels))
    assert set(labels) == {"like", "unlike"}


def test_another_method_in_the_same_folder_leaves_no_mixture_behind(files, navigator, tmp_path):
    select(recipe(files, navigator, "doge", settings={"num_rounds": 1}), tmp_path / "run")
    assert (tmp_path / "run/selection/mixture.json").is_file()
    values = recipe(files, navigator, "doge").model_dump(mode="json")
    values["method"] = {"name": "random", "settings": {}}
    select(build_recipe(values), tmp_path / "run")
    assert not (tmp_path / "run/selection/mixture.json").exists()
    assert read(tmp_path / "run")["selection"]["mixture"] is None
    assert "## Mixture" not in (tmp_path / "run/selection/README.md").read_text()
