"""Where a comparison's models live: what ``--device`` means, and how processes share several GPUs."""

from __future__ import annotations

import pytest
import torch
from tests.fabricated import config
from typer.testing import CliRunner

import gradsift.compare.runner as runner
from gradsift.cli.app import app
from gradsift.compare.config import WorldConfig
from gradsift.compare.runner import list_jobs, look
from gradsift.compare.store import declare, hardware
from gradsift.compare.worlds import build_world, place
from gradsift.errors import ModelError

REAL, PLANTED = WorldConfig(name="real"), WorldConfig(name="arithmetic")


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_processes_share_the_gpus_and_planted_worlds_take_none_unasked(three_gpus):
    assert [place(REAL, "auto", turn) for turn in range(5)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert [place(REAL, "cuda", turn) for turn in (1, 2)] == ["cuda:1", "cuda:2"]
    assert place(REAL, "cuda:2", 7) == "cuda:2", "a named one is taken by all"
    assert {place(PLANTED, "auto", turn) for turn in range(4)} == {"cpu"}
    assert place(PLANTED, "cuda", 1) == "cuda:1"
    assert place(REAL, "cpu", 1) == "cpu"
    with pytest.raises(ModelError, match="--device"):
        place(REAL, "cuda:3")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused_with_the_option_named(no_gpu):
    assert place(REAL, "auto", 3) == "cpu"
    with pytest.raises(ModelError, match="use --device cpu"):
        place(REAL, "cuda")


def test_a_worker_hands_its_device_to_the_world_and_to_the_cell(tmp_path, monkeypatch, three_gpus):
    found = declare(tmp_path, config(seeds="0"), "test")
    seen = {}
    monkeypatch.setattr(runner, "build_world", lambda world, seed, device: seen.setdefault("world", device) and None)
    with pytest.raises(AttributeError):  # there is no world behind the stand-in
        runner.work(tmp_path, list_jobs(found), lambda _: None, turn=2, device="cuda")
    assert seen == {"world": "cuda:2"}
    assert not look(tmp_path, list_jobs(found)).done


def test_a_planted_world_moves_its_models(monkeypatch):
    monkeypatch.setenv("GRADSIFT_CACHE", "/nonexistent-and-not-written")
    moved = []
    monkeypatch.setattr("gradsift.compare.arithmetic._pretrained", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    build_world(config().world, 0, "cuda:1").make_model()
    build_world(config().world, 0).make_model()
    assert moved == ["cuda:1"]


def test_the_cell_names_the_gpu(monkeypatch, three_gpus):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    monkeypatch.setattr("gradsift.compare.store.choose_road", lambda *_: "torch")
    monkeypatch.setattr("gradsift.compare.store.describe", lambda *_: "batched products")
    assert hardware("cuda:1") == f"{hardware()}, GPU at cuda:1, batched products"


def test_the_option_is_refused_before_anything_is_declared(tmp_path, no_gpu):
    for device, word in (("gpu", "there is no such device"), ("cuda", "torch sees no CUDA device")):
        out = tmp_path / device
        got = CliRunner().invoke(app, ["compare", "--preset", "quick", "--out", str(out), "--device", device])
        assert got.exit_code != 0
        assert word in (got.output + str(got.exception))
        assert not out.exists()
