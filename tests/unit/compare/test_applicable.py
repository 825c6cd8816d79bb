"""Arms that a world cannot feed are rows with the reason; arms that it can feed are cells charged for their proxy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.fabricated import ARMS, config
from tests.mini import BUDGET, taught

from gradsift.compare import words
from gradsift.compare.analysis import analyse
from gradsift.compare.applicable import NotApplicable, inapplicable_rows, missing, reason, refuse_inapplicable
from gradsift.compare.arms import ArmSpec, Desk, choose
from gradsift.compare.plan import make_plan
from gradsift.compare.results import gather, write_results
from gradsift.compare.runner import list_jobs, look, run_all
from gradsift.compare.store import declare, read_manifest
from gradsift.errors import ConfigError
from gradsift.methods import make_method


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def labelled(world):
    """The same rows with a label of their kind: clean, or anything else."""
    return replace(world, sources={i: "clean" if k == "clean" else "other" for i, k in world.kinds.items()})


def test_what_a_world_lacks_is_named():
    world = taught()
    assert missing(world, make_method("doge", {})) == "domains"
    assert missing(world, make_method("doge", {"domains": "cluster"})) is None
    assert missing(labelled(world), make_method("doge", {})) is None
    assert missing(world, make_method("random", {})) is None
    assert missing(replace(world, target=()), make_method("bm25", {})) == "target"
    assert missing(replace(world, anchors={}), make_method("conflict", {})) == "anchors"


def test_the_refusal_and_its_record():
    world = taught()
    with pytest.raises(NotApplicable) as refusal:
        refuse_inapplicable(world, ArmSpec("dids", "dids"))
    assert reason(str(refusal.value)) == "not applicable: domains"
    assert reason("the loss is not finite") is None
    assert reason("") is None
    refuse_inapplicable(world, ArmSpec("top", "oracle"))  # no registered method
    refuse_inapplicable(world, ArmSpec("policy", "ogs", {"rollout": {"lr": 1e-3}}))  # has settings beside the method's


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison with an arm that does not apply, and one that may spend its total."""
    arms = [*ARMS, {"name": "mix", "method": "doremi"}, {"name": "random_mix", "method": "random", "total_of": "mix"}]
    folder, found = tmp_path_factory.mktemp("compare"), config(seeds="0-0", arms=arms, claims=[])
    events = []
    declare(folder, found, "test")
    left = run_all(folder, list_jobs(found), 1, events.append, lambda: None)
    return folder, found, left, events


def test_an_arm_that_does_not_apply_is_a_row_and_stops_nothing(compared):
    folder, found, left, _ = compared
    assert len(left.done) == len(ARMS)
    assert not left.open
    assert {job.arm for job, why in left.failed if reason(why) == "not applicable: domains"} == {"mix", "random_mix"}
    filed, gone = gather(folder, found)
    analysis = analyse(found, filed, gone)
    assert inapplicable_rows(analysis.missing) == {
        "mix": "not applicable: domains",
        "random_mix": "not applicable: domains",
    }
    assert not any("were not run" in note for note in analysis.notes)
    text = words.markdown(found, analysis, read_manifest(folder))
    assert "| mix | 0 | not applicable: domains |" in text
    write_results(folder, found, analysis, read_manifest(folder))
    assert make_plan(folder, found, list_jobs(found), 1).num_done == len(ARMS)
    assert not look(folder, list_jobs(found)).open


def test_the_page_has_the_row(compared):
    from gradsift.report.compare_page import render_html

    folder, found, *_ = compared
    filed, gone = gather(folder, found)
    page = render_html(found, analyse(found, filed, gone), read_manifest(folder))
    assert '<td colspan="13" class="soft">not applicable: domains</td>' in page


SHORT = {"proxy": {"lr": 1e-3, "batch_size": 8}}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("doge", {"num_rounds": 6, "rows_per_domain": 8}),
        ("doremi", {"num_rounds": 6, "rows_per_domain": 8, "also": []}),
        ("dids", {"num_rounds": 4, "rows_per_domain": 8, "rows_per_round": 24, "min_rank": -1.0}),
        ("doge", {"num_rounds": 4, "rows_per_domain": 8, "domains": "cluster", "num_clusters": 3}),
    ],
    ids=["doge", "doremi", "dids", "clusters"],
)
def test_an_arm_chooses_by_its_mixture_and_pays_for_its_proxy(method, settings):
    desk = Desk(labelled(taught()), BUDGET)
    found = choose(desk, ArmSpec("mix", method, {**settings, **SHORT}))
    assert len(found.ids) == BUDGET
    weights = {k.removeprefix("weight_"): v for k, v in found.extra.items() if k.startswith("weight_")}
    assert sum(weights.values()) == pytest.approx(1)
    if settings.get("domains") != "cluster":
        clean = sum(desk.world.sources[i] == "clean" for i in found.ids)
        assert abs(clean - BUDGET * weights["clean"]) < 1 + 1e-9
    assert found.cost["proxy"].flops > found.cost["collect"].flops / 3 > 0
    whole = desk.start[1].flops
    assert found.cost["collect"].flops == pytest.approx(whole if settings.get("domains") == "cluster" else whole / 3)
    again = choose(Desk(labelled(taught()), BUDGET), ArmSpec("mix", method, {**settings, **SHORT}))
    assert again.ids == found.ids


def test_replay_stands_beside_a_mixture_and_a_placebo_of_scores_is_refused():
    desk = Desk(labelled(taught()), BUDGET)
    settings = {"num_rounds": 2, "rows_per_domain": 8, **SHORT}
    found = choose(desk, ArmSpec("mix", "doge", settings, replay=0.25))
    assert sum(i in {row.id for row in desk.world.replay} for i in found.ids) == round(0.25 * BUDGET)
    with pytest.raises(ConfigError, match="no scores"):  # before any cell
        ArmSpec("sham", "doge", settings, placebo="permuted_scores")
    with pytest.raises(ConfigError, match="no such setting"):
        choose(desk, ArmSpec("mix", "doge", {"proxy": {"rate": 1}}))
