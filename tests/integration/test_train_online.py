"""``gradsift train`` with a policy: rows of a finished run, chosen while the model trains; stopped, resumed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.rows import some_rows, world, write_jsonl

from gradsift.cli import app as cli
from gradsift.errors import ConfigError, DataError, Interrupted, SpecError
from gradsift.pipeline.online import finetune_online, forecast_online
from gradsift.pipeline.run import select
from gradsift.recipe import build_recipe
from gradsift.store.spec import content_hash
from gradsift.train.config import TrainConfig
from gradsift.train.finetune import Trained

POLICY = {
    "num_epochs": 1, "num_episodes": 2, "num_confirmed": 1, "num_clusters": 4, "rows_per_decision": 8, "on": "navigator",
    "allowed_nats": 1.0, "infeasible": "least",
}  # fmt: skip


def recipe(files: dict[str, Path], navigator: Path, **changes: Any) -> Any:
    values = {
        "pool": [{"label": "pool", "path": str(files["pool"])}],
        "anchors": [{"label": name, "path": str(files[name])} for name in ("math", "chat")],
        "target": str(files["target"]),
        "collect": {"sketch_dim": 251},
        "navigator": {"model": str(navigator), "parameters": "all"},
        **changes,
    }
    return build_recipe(values)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    return {**world(folder, 20), "general": write_jsonl(folder / "general.jsonl", some_rows(8, 7, answer="four"))}


@pytest.fixture(scope="module")
def ogs(files: dict[str, Path], navigator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy was learned, on the navigator itself."""
    out = tmp_path_factory.mktemp("ogs") / "run"
    select(
        recipe(files, navigator, general=[{"label": "old", "path": str(files["general"])}], budget="16",
               method={"name": "ogs", "settings": POLICY}, rollout={"lr": 3e-3, "batch_size": 8}), out
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def hybrid(files: dict[str, Path], navigator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hybrid") / "run"
    asked = recipe(files, navigator, budget="60tok", method={"name": "hybrid", "settings": {"num_clusters": 3}})
    select(asked.model_copy(update={"allow_weak_anchor": True}), out)
    return out


def settings(navigator: Path, policy: str | None = "uniform", **changes: Any) -> TrainConfig:
    online = {"online": {"policy": policy, "updates": 2, **changes.pop("online", {})}} if policy else {}
    plain = {"model": str(navigator), "lr": 3e-3, "batch_size": 2, "lora": {"rank": 2, "alpha": 4}, "save_steps": 1}
    return TrainConfig.model_validate({**plain, **online, **changes})


def decisions(trained: Trained) -> list[dict[str, Any]]:
    return json.loads((trained.folder / "online.json").read_text())["decisions"]


def log(trained: Trained) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trained.folder / "log.jsonl").read_text().splitlines()]


def weights(trained: Trained) -> bytes:
    return (trained.model / "adapter_model.safetensors").read_bytes()


def audit(run: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(run / "selection/audit.parquet").to_pylist()}


@pytest.mark.parametrize("policy", ["uniform", "ogs_dual_priced", "ppo_lagrangian"])
def test_a_policy_trains_rows_of_the_run_within_its_budget_and_never_twice(policy, ogs, navigator, tmp_path):
    trained = finetune_online(settings(navigator, policy), ogs, tmp_path / "out")
    made, table = decisions(trained), audit(ogs)
    ids = [i for one in made for i in one["ids"]]
    assert len(ids) == len(set(ids)) == 16
    for one in made:
        assert {table[i]["cluster"] for i in one["ids"]} == {one["cluster"]}
        assert {table[i]["source"] == "old" for i in one["ids"]} == {one["general"]}
    lines, manifest = log(trained), trained.manifest
    assert sum(line["num_rows"] for line in lines) == 16
    assert [line["decision"] for line in lines] == sorted(line["decision"] for line in lines)
    assert manifest["online"]["policy"] == policy
    assert manifest["online"]["budget"] == {"amount": 16, "unit": "rows", "spent": 16}
    assert manifest["online"]["limits"]["nats"] == {"math": 1.0, "chat": 1.0}
    assert manifest["online"]["effects_from"] == "the run's roll-outs of the navigator"
    assert manifest["rows"]["trained_on"] == 16
    cost = manifest["cost"]
    assert cost["held-out losses"]["forward_tokens"] > 0
    assert cost["rescoring"]["flops"] == 0
    assert cost["total"]["flops"] == pytest.approx(sum(cost[n]["flops"] for n in ("train", "held-out losses")))
    again = finetune_online(settings(navigator, policy), ogs, tmp_path / "out")
    assert (again.skipped, again.manifest) == (True, manifest)


def test_the_learned_policy_sees_the_table_that_it_was_trained_on(ogs, navigator, tmp_path):
    """The first choice is that of the run's own list, where both start from the same losses and prices."""
    from gradsift.pipeline.online_policy import make_policy
    from gradsift.pipeline.online_ready import get_ready
    from gradsift.policy.episodes import Episodes, Losses, Terms
    from gradsift.policy.learned import LearnedPolicy
    from gradsift.seeds import stream

    ready = get_ready(settings(navigator, "ppo_lagrangian", batch_size=4), ogs)
    details = json.loads((ogs / "selection/details.json").read_text())
    names = ready.table.feature_names
    told = [[entry[name] for name in names] for entry in details["clusters"]]
    assert ready.table.features.tolist() == told  # to the last bit
    assert [len(some) for some in ready.table.members] == [entry["size"] for entry in details["clusters"]]
    own = next(one for one in details["contest"] if one["policy"] == "ppo_lagrangian")
    terms = Terms(ready.width, ready.offer.budget, np.ones(2))
    policy = make_policy(ready, terms)
    assert isinstance(policy, LearnedPolicy)

    class Still:
        sources = ("math", "chat")

        def reset(self, num):
            return Losses(np.zeros(num), np.zeros((num, 2)))

    episodes = Episodes(ready.table, Still(), terms, stream(0, "x"))
    seen = episodes.reset(0, 1, shuffle=False)
    policy.begin(episodes, stream(0, "y"))
    first = int(policy.act(seen)[0])
    assert own["counts"][first] > 0


@pytest.mark.parametrize("case", ["plain", "rescored"])
def test_a_stopped_run_resumes_to_the_same_decisions_and_weights(case, ogs, navigator, tmp_path):
    more = {"plain": {}, "rescored": {"rescore_every": 3, "rescore_with": "navigator"}}
    config = settings(navigator, "thompson", online={**more[case], "allowed_rise": 0.05})
    whole = finetune_online(config, ogs, tmp_path / "whole")
    count = []

    def stop(rows: int, tokens: int) -> None:
        count.append(rows)
        if len(count) == 5:
            raise Interrupted(15, "again")

    with pytest.raises(Interrupted):
        finetune_online(config, ogs, tmp_path / "stopped", tick=stop)
    assert not (tmp_path / "stopped/train").exists()
    steps = []
    resumed = finetune_online(config, ogs, tmp_path / "stopped", tick=lambda *done: steps.append(done))
    assert len(steps) == len(log(whole)) - 5
    assert decisions(resumed) == decisions(whole)
    assert weights(resumed) == weights(whole)
    assert log(resumed) == log(whole)
    costs = [{name: cost["flops"] for name, cost in t.manifest["cost"].items()} for t in (resumed, whole)]
    assert costs[0] == costs[1]
    assert (costs[0]["rescoring"] > 0) == (case != "plain")
    assert (whole.manifest["online"]["num_rescored"] > 0) == (case != "plain")
    start = json.loads((whole.folder / "online.json").read_text())["start"]["protect"]
    limits = whole.manifest["online"]["limits"]["nats"]
    assert [limits["math"], limits["chat"]] == pytest.approx([0.05 * value for value in start], rel=1e-12)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["train"]


def test_a_run_of_another_method_holds_rows_out_and_counts_tokens(hybrid, files, navigator, tmp_path):
    trained = finetune_online(settings(navigator, "ogs_dual_priced"), hybrid, tmp_path / "out")
    made, table, told = decisions(trained), audit(hybrid), trained.manifest["online"]
    ids = [i for one in made for i in one["ids"]]
    assert len(ids) == len(set(ids))
    assert sum(table[i]["num_trained"] for i in ids) == told["budget"]["spent"] <= 60
    assert told["budget"]["unit"] == "tokens"
    assert "not calibrated" in told["effects_from"]
    assert told["dev_rows"] == {"target": 4, "math": 4, "chat": 4}
    assert {note["code"] for note in trained.manifest["notes"]} >= {"no_general_rows", "held_out_seen"}


def test_rows_that_are_held_out_are_not_trained_on(files, navigator, tmp_path):
    """The target's rows stand in the pool as well: those that are measured with leave their clusters, and are counted."""
    target = files["target"].read_text()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(files["pool"].read_text() + target)
    out = tmp_path / "run"
    asked = recipe({**files, "pool": mixed}, navigator, budget="100%", method={"name": "hybrid", "settings": {}})
    select(asked.model_copy(update={"allow_weak_anchor": True}), out)
    from gradsift.pipeline.online_ready import get_ready

    ready = get_ready(settings(navigator), out)
    held = {content_hash(row.input_ids, row.trained) for row in ready.dev.target}
    free = {content_hash(row.input_ids, row.trained) for row in ready.material.selected}
    assert len(held) == 4
    assert not held & free
    assert len(ready.material.selected) == 26
    assert next(note for note in ready.notes if note.code == "leak").count == 4
    used = {content_hash(row.input_ids, row.trained) for some in ready.anchors.values() for row in some}
    assert not held & used


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 3}, "steps does not go"),
        ({"epochs": 2}, "epochs does not go"),
        ({"stm": {"tau": 2.0}}, "stm does not go"),
        ({"order": "selection"}, "order does not go"),
        ({"replay": {"share": 0.5}, "general": ["g.jsonl"]}, r"replay\.share does not go"),
        ({"data": {"max_length": 9}}, "reads rows as the run read them"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(changes, words, ogs, navigator):
    with pytest.raises(ConfigError, match=words):
        forecast_online(settings(navigator, **changes), ogs)


@pytest.mark.parametrize(
    ("section", "words"),
    [({"updates": 4}, "needs a policy"), ({"policy": "exp3", "rescore_with": "navigator"}, "needs an interval"),
     ({"policy": "exp3", "allowed_rise": 0.1, "allowed_nats": 0.1}, "not both")],
)  # fmt: skip
def test_a_section_that_contradicts_itself_is_refused(section, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig.model_validate({"online": section})


def test_runs_that_cannot_serve_are_refused(ogs, hybrid, files, navigator, tmp_path):
    with pytest.raises(ConfigError, match="no learned policy"):
        forecast_online(settings(navigator, "ppo_lagrangian"), hybrid)
    with pytest.raises(DataError, match="takes a finished run"):
        forecast_online(settings(navigator), files["pool"])
    bare = tmp_path / "bare"
    select(recipe(files, navigator, budget="50%", method={"name": "random", "settings": {}}), bare)
    with pytest.raises(ConfigError, match="did not measure") as refusal:
        forecast_online(settings(navigator), bare)
    assert "random" in refusal.value.got
    copy = tmp_path / "copy"
    shutil.copytree(ogs, copy)
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("budget: '16'", "budget: '12'"))
    with pytest.raises(DataError, match="not finished"):
        forecast_online(settings(navigator), copy)
    (copy / "recipe.yaml").write_text(text)
    path = copy / "selection/audit.parquet"
    table = pq.read_table(path)
    other = [n if n != 0 else 1 for n in table["cluster"].to_pylist()]
    other[0] = 0
    place = table.column_names.index("cluster")
    pq.write_table(table.set_column(place, "cluster", pa.array(other, pa.int32())), path)
    with pytest.raises((SpecError, ValueError)):
        forecast_online(settings(navigator), copy)
    few = write_jsonl(tmp_path / "few.jsonl", some_rows(3, 5))
    made = recipe({**files, "target": few}, navigator, budget="50%", method={"name": "hybrid", "settings": {}})
    select(made.model_copy(update={"allow_weak_anchor": True}), tmp_path / "small")
    with pytest.raises(ConfigError, match="too few rows"):
        forecast_online(settings(navigator), tmp_path / "small")


def test_a_changed_file_is_refused(hybrid, files, navigator):
    before = files["pool"].read_bytes()
    try:
        files["pool"].write_bytes(before + before.splitlines(keepends=True)[0])
        with pytest.raises(DataError, match="has changed since the run"):
            forecast_online(settings(navigator), hybrid)
    finally:
        files["pool"].write_bytes(before)


def test_the_command_prints_the_decisions_and_the_fixed_list_stays_as_it_was(ogs, navigator, tmp_path, capsys):
    words = ["train", "--selection", str(ogs), "--model", str(navigator), "--set", "batch_size=4", "--set", "rank=2"]
    policy = [
        "--set",
        "online.policy=size_proportional",
        "--set",
        "online.updates=2",
        "--set",
        "online.rescore_every=2",
    ]
    assert cli.run([*words, *policy, "--dry-run"]) == 0
    assert "decisions or more" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    assert cli.run([*words, *policy, "--out", str(tmp_path / "on")]) == 0
    said = capsys.readouterr().out
    for text in ("Held-out losses after each decision", "target", "math", "chat", "start", "16 of 16 rows used",
                 "rescored 1 times", "online.json"):  # fmt: skip
        assert text in said
    assert cli.run([*words, *policy, "--out", str(tmp_path / "on")]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert cli.run([*words, "--out", str(tmp_path / "off")]) == 0
    said = capsys.readouterr().out
    assert "Held-out losses" not in said
    manifest = json.loads((tmp_path / "off/train/manifest.json").read_text())
    assert "online" not in manifest
    assert "online" not in manifest["config"]
    assert not (tmp_path / "off/train/online.json").exists()
