"""Methods on the same checkpoint share one pass: the first measures, the others send nothing through the model."""

from __future__ import annotations

import pytest
from tests.rows import world

from gradsift.errors import SpecError
from gradsift.gradients.hooks import GradientEngine
from gradsift.pipeline.run import select
from gradsift.recipe import build_recipe

GRADIENT = ("ogs_dual", "conflict", "ogs_static", "hybrid", "target_cosine", "norm", "loss", "grad_match",
            "grad_match_partitioned", "random", "full", "length", "bm25", "dsir")  # fmt: skip


def recipe(files, model, method, **settings):
    return build_recipe({
        "pool": [{"label": "pool", "path": str(files["pool"])}],
        "anchors": [{"label": name, "path": str(files[name])} for name in ("math", "chat")],
        "target": str(files["target"]),
        "method": {"name": method, "settings": settings},
        "budget": "6",
        "collect": {"rows_per_shard": 7, "sketch_dim": 251},
        "navigator": {"model": str(model), "parameters": "all"},
        "allow_weak_anchor": True,
    })  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Number of forwards through any engine."""
    calls = []
    plain = GradientEngine._logits

    def logits(self, *args, **kwargs):
        calls.append(1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(GradientEngine, "_logits", logits)
    return calls


def test_one_pass_serves_every_method_on_its_checkpoint(tmp_path, navigator, counted):
    files, out = world(tmp_path), tmp_path / "run"
    select(recipe(files, navigator, GRADIENT[0]), out)
    first = len(counted)
    assert first > 0
    for method in GRADIENT[1:]:
        select(recipe(files, navigator, method), out)
        assert len(counted) == first, f"{method} measured again"


def test_a_trained_epoch_is_another_checkpoint_and_is_shared_as_well(tmp_path, navigator, counted):
    files, out = world(tmp_path), tmp_path / "run"
    select(recipe(files, navigator, "grads"), out)
    first = len(counted)
    select(recipe(files, navigator, "grads", rule="density_sample", combine="emb_only"), out)
    assert len(counted) == first
    with pytest.raises(SpecError, match="model_sha256"):  # the epoch's weights are not the starting ones
        select(recipe(files, navigator, "norm"), out)
