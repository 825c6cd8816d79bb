"""The stage: rows and weights of a selection, replay, leaks, masking, penalties, hooks, publishing, skipping, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rows import some_rows, world, write_jsonl

from gradsift.errors import ConfigError, DataError, Interrupted
from gradsift.train.config import TrainConfig
from gradsift.train.finetune import Trained, finetune, forecast
from gradsift.train.material import find_selection, read_material


def settings(navigator: Path, **changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {"model": str(navigator), "lr": 1e-3, "batch_size": 4, "steps": 3, "lora": {"rank": 2, "alpha": 4},
                             "save_steps": 1}  # fmt: skip
    return TrainConfig.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    return {**world(folder), "general": write_jsonl(folder / "general.jsonl", some_rows(30, 8, answer="fine"))}


@pytest.fixture(scope="module")
def selected(files: dict[str, Path], navigator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of ``gradsift select``, its weights changed as a method that weights rows would."""
    from gradsift.cli.app import run

    out = tmp_path_factory.mktemp("selected") / "run"
    words = ["select", "--pool", str(files["pool"]), "--anchor", f"math={files['math']}", "--target", str(files["target"]),
             "--navigator", str(navigator), "--method", "random", "--budget", "50%", "--out", str(out)]  # fmt: skip
    assert run(words) == 0
    return out


def reweighed(run: Path, folder: Path) -> Path:
    """A copy of a run folder whose audit table has weights, as of a method that weights rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(run, folder)
    path = folder / "selection" / "audit.parquet"
    table = pq.read_table(path)
    weights = pa.array([None if n is None else 2.0 + n for n in table["order"].to_pylist()], pa.float32())
    pq.write_table(table.set_column(table.column_names.index("weight"), "weight", weights), path)
    return folder


def losses(trained: Trained) -> list[float]:
    return [json.loads(line)["loss"] for line in (trained.folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_leaves_weights_that_load_and_a_manifest_and_is_skipped_when_done(
    mode: str, selected: Path, navigator: Path, tmp_path: Path
) -> None:
    from gradsift.models.adapter import load_adapter
    from gradsift.models.load import load_navigator
    from gradsift.models.resolve import resolve_navigator

    config = settings(navigator, mode=mode, save_moments=True)
    ticks: list[tuple[int, int]] = []
    trained = finetune(config, selected, tmp_path / "out", tick=lambda *done: ticks.append(done))
    assert len(losses(trained)) == len(ticks) == 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train"]
    assert (trained.folder / "moments.safetensors").is_file()
    if mode == "lora":
        load_adapter(load_navigator(resolve_navigator(str(navigator))).model, trained.model)
    else:
        load_navigator(resolve_navigator(str(trained.model)))
    cost = trained.manifest["cost"]
    assert cost["total"] == cost["train"]
    assert trained.manifest["rows"]["trained_on"] == 12
    again = finetune(config, selected, tmp_path / "out", tick=lambda *done: ticks.append(done))
    assert (again.skipped, again.manifest, len(ticks)) == (True, trained.manifest, 3)
    with pytest.raises(ConfigError, match="another training run"):
        finetune(settings(navigator, mode=mode, lr=2e-3), selected, tmp_path / "out")
    (trained.folder / "log.jsonl").write_text("changed")
    with pytest.raises(ConfigError, match="files that were changed"):
        finetune(config, selected, tmp_path / "out")


@pytest.mark.parametrize("hook", [None, "agem", "ogd", "pcgrad"])
def test_a_stopped_run_resumes_to_the_same_losses_and_weights(
    hook: str | None, selected: Path, navigator: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"steps": 5, "l2sp": 0.1}
    if hook:
        changes["hook"] = {"name": hook, "settings": {"refresh": 3, "num_reference": 4}}
    config = settings(navigator, **changes)
    whole = finetune(config, selected, tmp_path / "whole")
    count = []

    def stop(rows: int, tokens: int) -> None:
        count.append(rows)
        if len(count) == 2:
            raise Interrupted(15, "again")

    with pytest.raises(Interrupted):
        finetune(config, selected, tmp_path / "stopped", tick=stop)
    assert not (tmp_path / "stopped" / "train").exists()
    resumed = finetune(config, selected, tmp_path / "stopped")
    assert max(abs(a - b) for a, b in zip(losses(resumed), losses(whole), strict=True)) < 1e-6
    weights = [(t.model / "adapter_model.safetensors").read_bytes() for t in (resumed, whole)]
    assert weights[0] == weights[1]
    costs = [{name: c["flops"] for name, c in t.manifest["cost"].items()} for t in (resumed, whole)]
    assert costs[0] == costs[1]
    if hook:
        drop = {"seconds", "reference_seconds"}
        one, two = ({k: v for k, v in t.manifest["hook"].items() if k not in drop} for t in (resumed, whole))
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in two.items() if "second" not in k
        }


def test_a_stopped_run_does_not_go_on_with_other_general_rows(selected: Path, navigator: Path, tmp_path: Path) -> None:
    general = write_jsonl(tmp_path / "general.jsonl", some_rows(30, 8, answer="fine"))
    config = settings(navigator, general=(str(general),), kl={"weight": 0.1, "on": "general", "rows": 2})

    def stop(rows: int, tokens: int) -> None:
        raise Interrupted(15, "again")

    with pytest.raises(Interrupted):
        finetune(config, selected, tmp_path / "out", tick=stop)
    kept = general.read_bytes()
    write_jsonl(general, some_rows(30, 9, answer="fine"))
    with pytest.raises(ConfigError, match="other settings, rows or model"):
        finetune(config, selected, tmp_path / "out")
    general.write_bytes(kept)
    assert len(losses(finetune(config, selected, tmp_path / "out"))) == 3


def test_the_data_section_and_the_weights_of_the_run_are_used(selected: Path, navigator: Path, tmp_path: Path) -> None:
    assert read_material(settings(navigator), selected).weights == {}
    material = read_material(settings(navigator), reweighed(selected, tmp_path / "run"))
    assert [material.weights[row.id] for row in material.selected] == [2.0 + n for n in range(12)]
    assert find_selection(selected).recipe is not None
    assert find_selection(selected / "selection").rows == find_selection(selected).rows
    with pytest.raises(DataError, match="no selection"):
        find_selection(selected / "nothing")
    (tmp_path / "run" / "selection" / "selected.jsonl").write_text("")
    with pytest.raises(DataError, match="not finished"):
        read_material(settings(navigator), tmp_path / "run")


def test_weights_reach_the_loss(selected: Path, navigator: Path, tmp_path: Path) -> None:
    plain = finetune(settings(navigator), selected, tmp_path / "plain")
    weighed = finetune(settings(navigator), reweighed(selected, tmp_path / "run"), tmp_path / "weighed")
    assert weighed.manifest["rows"]["weighted"]
    assert losses(plain)[0] != losses(weighed)[0]


@pytest.mark.parametrize(
    "changes", [{"mode": "full", "dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}]
)
def test_other_arithmetic_stays_near_float32(
    changes: dict[str, Any], selected: Path, navigator: Path, tmp_path: Path
) -> None:
    config = settings(navigator, **{"mode": "lora", **changes})
    plain = finetune(settings(navigator, mode=config.mode), selected, tmp_path / "plain")
    other = finetune(config, selected, tmp_path / "other")
    near = 1e-6 if "gradient_checkpointing" in changes else 0.05
    gaps = [abs(a - b) for a, b in zip(losses(plain), losses(other), strict=True)]
    assert max(gaps) < near
    if "dtype" in changes:
        from gradsift.train.checkpoint import load_tensors

        assert max(gaps) > 0
        name = "model.safetensors" if config.mode == "full" else "adapter_model.safetensors"
        assert {t.dtype for t in load_tensors(other.model / name).values()} == {torch.float32}


def test_everything_at_once_is_counted(selected: Path, files: dict[str, Path], navigator: Path, tmp_path: Path) -> None:
    config = settings(
        navigator, general=(str(files["general"]),), replay={"share": 0.25}, stm={"drop_share": 0.2}, l2sp=0.01,
        kl={"weight": 0.1, "on": "general", "rows": 2}, ewc={"weight": 1.0, "fisher_rows": 5}, wise_ft=0.5,
        hook={"name": "agem", "settings": {"num_reference": 4}},
    )  # fmt: skip
    trained = finetune(config, selected, tmp_path / "out")
    manifest = trained.manifest
    assert (manifest["rows"]["replayed"], manifest["rows"]["trained_on"]) == (3, 12)
    assert 0.1 < manifest["stm"]["share"] <= 0.2
    assert set(manifest["cost"]) == {"train", "kl", "l2sp", "ewc", "hook agem", "masking", "total"}
    parts = [c for name, c in manifest["cost"].items() if name != "total"]
    assert manifest["cost"]["total"]["flops"] == pytest.approx(sum(c["flops"] for c in parts))
    assert all(c["flops"] > 0 for name, c in manifest["cost"].items() if name != "l2sp")
    assert manifest["hook"]["name"] == "agem"


def test_wise_ft_halves_what_the_adapter_adds(selected: Path, navigator: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole, half = (finetune(settings(navigator, wise_ft=a), selected, tmp_path / str(a)) for a in (1.0, 0.5))
    one, two = (load_file(t.model / "adapter_model.safetensors") for t in (whole, half))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor * (0.5 if "lora_B" in name else 1.0))


@pytest.mark.parametrize("role", ["general and anchor", "general and held out", "selected and held out"])
def test_leaks_are_refused(role: str, selected: Path, files: dict[str, Path], navigator: Path, tmp_path: Path) -> None:
    chosen = str(selected / "selection" / "selected.jsonl")
    changes: dict[str, Any] = {
        "general and anchor": {"general": (str(files["math"]),), "replay": {"share": 0.1}},
        "general and held out": {"general": (str(files["general"]),), "held_out": (str(files["general"]),)},
        "selected and held out": {"held_out": (chosen,)},
    }[role]
    with pytest.raises(DataError, match="measured with"):
        finetune(settings(navigator, **changes), selected, tmp_path / "out")


def test_general_rows_may_be_numbered_like_selected_ones(
    files: dict[str, Path], navigator: Path, tmp_path: Path
) -> None:
    numbered = [write_jsonl(tmp_path / f"{s}.jsonl", [{**row, "id": str(n)} for n, row in enumerate(some_rows(8, s))])
                for s in (20, 21)]  # fmt: skip
    config = settings(navigator, general=(str(numbered[1]),), replay={"share": 0.5}, steps=1)
    assert forecast(config, numbered[0]).num_replayed == 4
    twice = forecast(
        settings(navigator, general=(str(numbered[0]), str(files["general"])), replay={"share": 0.5}), numbered[0]
    )
    assert any("selected anyway" in note for note in twice.notes)


def test_forecast_counts_what_training_does(selected: Path, navigator: Path, tmp_path: Path) -> None:
    config = settings(navigator, steps=None, epochs=1.5)
    plan = forecast(config, selected)
    trained = finetune(config, selected, tmp_path / "out")
    assert plan.num_steps == trained.manifest["plan"]["num_steps"] == 5
    assert plan.tokens == trained.manifest["cost"]["train"]["backward_tokens"]


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 1.0}, {"replay": {"share": 0.5}}, {"ewc": {"weight": 1.0}}, {"kl": {"weight": 1.0, "on": "general"}},
     {"stm": {"tau": 2.0, "drop_share": 0.1}}, {"general": ("",)}, {"held_out": ("",)}, {"unknown": 1}],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], navigator: Path) -> None:
    with pytest.raises(ValueError, match=r"give|needs general|Extra|at least 1 character"):
        settings(navigator, **changes)


def test_a_hook_without_rows_to_protect_is_refused(files: dict[str, Path], navigator: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows to protect"):
        finetune(settings(navigator, hook={"name": "agem"}), files["pool"], tmp_path / "out")
