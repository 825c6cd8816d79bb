"""Arms that read prompts, answers alone, hidden states or n-grams: their signals in a world, and what they are charged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests import mini

from gradsift.compare.applicable import missing
from gradsift.compare.arms import ArmSpec, choose_own
from gradsift.compare.forward_arm import with_forward
from gradsift.data.prompts import prompt_mask
from gradsift.methods import make_method

DAAR = {"num_domains": 2, "layer": 1, "probe_share": 1.0, "rows_per_domain": 5, "min_accuracy": 0.0, "steps": 40}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield mini.desk()
    patch.undo()


def test_signals_are_those_of_each_row_alone(desk):
    method = make_method("tlm", {"min_prompt": 2})
    problem, spent = with_forward(desk, method, desk.start[0])
    assert spent == {}  # the prompt rides on the shared forward
    rows, model = {row.id: row for row in desk.world.pool}, desk.world.make_model().double()
    for name, got, count in list(zip(problem.ids, problem.prompt_loss, problem.num_prompt, strict=True))[::29]:
        row = rows[name]
        ids = torch.from_numpy(row.input_ids).long()
        log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1).detach()
        places = np.flatnonzero(prompt_mask(row))
        want = -np.mean([float(log_p[t - 1, ids[t]]) for t in places])
        assert count == len(places) == 4
        assert abs(got - want) < 1e-5


@pytest.mark.parametrize(
    ("method", "settings"),
    [("tlm", {"min_prompt": 2}), ("ifd", {}), ("dsir", {}), ("daar", DAAR)],
)
def test_an_arm_chooses_and_pays_for_what_it_reads(desk, method, settings):
    got = choose_own(desk, ArmSpec(method, method, settings), 12)
    assert 0 < len(got.ids) <= 12
    assert set(got.ids) <= set(desk.rows)
    assert (
        set(got.cost) == {"tlm": {"collect"}, "ifd": {"collect", "alone"}, "dsir": set(), "daar": {"collect"}}[method]
    )
    if method == "ifd":  # one token and its begin token, of six
        assert 0 < got.cost["alone"].forward_tokens < got.cost["collect"].forward_tokens / 2


def test_dsir_prefers_rows_that_use_the_words_of_the_target(desk):
    got = choose_own(desk, ArmSpec("dsir", "dsir", {"draw": "top"}), 30)
    assert np.mean([i in desk.world.looks_domain for i in got.ids]) == 1.0


def test_a_placebo_deals_the_new_signals_too(desk):
    honest = choose_own(desk, ArmSpec("a", "tlm", {"min_prompt": 2}), 12)
    placebo = choose_own(desk, ArmSpec("b", "tlm", {"min_prompt": 2}, placebo="permuted_scores", family="placebo"), 12)
    assert set(honest.ids) != set(placebo.ids)


@pytest.mark.parametrize(
    ("name", "settings", "need"),
    [
        ("thtb", {}, "column reward"),
        ("memory_level", {}, "column recall_counts"),
        ("daar", {}, "layer 3"),  # the miniature has one layer
        ("daar", {"layer": 1}, None),
        ("tlm", {}, None),
        ("ifd", {}, None),
        ("dsir", {}, None),
    ],
)
def test_what_a_world_cannot_feed_is_named(desk, name, settings, need):
    assert missing(desk.world, make_method(name, settings)) == need


def test_rows_without_a_prompt_feed_no_method_that_reads_prompts(desk):
    from dataclasses import replace

    bare = [replace(row, trained=np.ones(row.num_tokens, dtype=bool)) for row in desk.world.pool]
    world = replace(desk.world, pool=tuple(bare))
    for name in ("tlm", "ifd"):
        assert missing(world, make_method(name, {})) == "prompts"
