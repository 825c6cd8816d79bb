"""What a comparison declares: strict fields, seeds, overrides, presets, and the name of the field that changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fabricated import config, values

from gradsift.compare.config import arms_to_run, build_config
from gradsift.compare.worlds import resolve, world_settings
from gradsift.compare.written import changed_field, load_preset, parse_seeds, presets, with_overrides, write_seeds
from gradsift.errors import ConfigError

RANDOM = {"name": "random", "method": "random"}


@given(st.sets(st.integers(0, 300), min_size=1))
def test_seeds_survive_writing(seeds):
    ordered = tuple(sorted(seeds))
    assert parse_seeds(write_seeds(ordered)) == ordered


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "0-99999999", "1,,2"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="seeds"):
        build_config(values(seeds=text))


def test_seeds_named_twice_are_refused():
    with pytest.raises(ConfigError, match="different and rising"):
        build_config(values(seeds="0-3,2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unknown": 1}, "unknown"),
        ({"cheap": ["nobody"]}, "nobody"),
        ({"random": "nobody"}, "nobody"),
        ({"claims": [{"arm": "nobody", "baseline": "random"}]}, "nobody"),
        ({"claims": [{"arm": "ours", "baseline": "best_cheap"}], "cheap": []}, "cheap arms"),
        ({"num_variants": -1}, "num_variants"),
        ({"placebo": {"seeds_per_run": 3, "num_runs": 4}}, "12 seeds"),
        ({"arms": [{"name": "random", "method": "random"}] * 2}, "names of their own"),
        ({"arms": [{"name": "random", "method": "random"}, {"name": "best_cheap", "method": "random"}]}, "best_cheap"),
        ({"arms": [{"name": "a/b", "method": "random"}, {"name": "random", "method": "random"}]}, "a/b"),
        ({"arms": [RANDOM, {"name": "b", "method": "loss", "settings": {"bond": "low"}}]}, "arm b, settings"),
        ({"arms": [RANDOM, {**RANDOM, "name": "b", "train": {"stm": {"tua": 5}}}]}, "stm.tua"),
        ({"arms": [RANDOM, {**RANDOM, "name": "b", "train": {"stm": {}}}]}, "one of tau and drop_share"),
        ({"arms": [RANDOM, {**RANDOM, "name": "b", "train": {"lr_factor": "abc"}}]}, "lr_factor"),
        ({"arms": [RANDOM, {**RANDOM, "name": "b", "train": {"wise_ft": 1.5}}]}, "wise_ft"),
        ({"arms": [RANDOM, {**RANDOM, "name": "b", "train": {"hook": "agme"}}]}, "'agem'"),
        ({"grid": {"lrs": [1e-3], "num_steps": 1, "batch_size": 1, "budget": 1, "schedule": "lineer"}}, "schedule"),
        ({"arms": [RANDOM, {"name": "b", "method": "loss", "settings": {"band": "lowest"}}]}, "arm b, settings band"),
    ],
)
def test_contradictions_are_refused(change, words):
    with pytest.raises(ConfigError) as caught:
        build_config(values(**change))
    assert words in str(caught.value)


def test_a_total_may_not_come_from_a_total():
    arms = [
        {"name": "random", "method": "random", "total_of": "b"},
        {"name": "b", "method": "random", "total_of": "c"},
        {"name": "c", "method": "random"},
    ]
    with pytest.raises(ConfigError, match="takes another's total"):
        build_config(values(arms=arms, cheap=[], claims=[]))


def test_every_preset_is_valid_and_resolves():
    assert {"arithmetic", "placebo", "quick", "text"} <= set(presets())
    for name in presets():
        found = build_config(load_preset(name))
        if found.world.name == "arithmetic":
            whole = resolve(found)
            assert resolve(whole) == whole
            assert whole.reference == (0.0, 0.0)
            assert "hidden" in whole.world.settings
        if found.placebo:
            assert (found.placebo.num_runs, found.placebo.max_gains) == (40, 5)
        elif name not in ("quick", "real"):  # looks, which no claim can come of
            assert len(found.seeds) >= 10
    with pytest.raises(ConfigError, match="quick"):
        load_preset("nothing")


def test_overrides_reach_into_arms_and_leave_the_source_alone():
    source = values()
    got = with_overrides(source, [("arms.ours.replay", 0.5), ("grid.num_steps", 9), ("placebo.num_runs", 2)])
    assert got["arms"][2]["replay"] == 0.5
    assert got["grid"]["num_steps"] == 9
    assert got["placebo"] == {"num_runs": 2}
    assert source == values()
    for key in ("arms.nobody.replay", "metric.x", "seeds.x.y"):
        with pytest.raises(ConfigError, match="no such part"):
            with_overrides(source, [(key, 1)])


def test_the_changed_field_is_named():
    plain = config()
    for key, value, words in [
        ("arms.ours.replay", 0.5, "arms.ours.replay: declared 0.0, now 0.5"),
        ("grid.num_steps", 9, "grid.num_steps: declared 2, now 9"),
        ("seeds", "0-3", "seeds: declared 0-9, now 0-3"),
        ("world.settings.modulus", 11, "world.settings.modulus: declared 7, now 11"),
        ("reference", [0.1, 0.0], "reference: declared [0.0,0.0], now [0.1,0.0]"),
    ]:
        other = resolve(build_config(with_overrides(values(), [(key, value)])))
        assert changed_field(plain.dump(), other.dump()) == words
    fewer = resolve(build_config(values(arms=values()["arms"][:3])))
    assert str(changed_field(plain.dump(), fewer.dump())).startswith("arms: declared")
    assert changed_field(plain.dump(), config().dump()) is None


def test_settings_of_a_world_are_checked():
    with pytest.raises(ConfigError, match="no such setting"):
        world_settings(build_config(values(world={"settings": {"modulo": 7}})).world)
    with pytest.raises(ConfigError, match="wrong type"):
        world_settings(build_config(values(world={"settings": {"modulus": "7"}})).world)
    assert world_settings(build_config(values(world={"settings": {"pretrain_lr": 1}})).world).pretrain_lr == 1.0
    with pytest.raises(ConfigError, match="does not divide among the heads"):
        world_settings(build_config(values(world={"settings": {"hidden": 10}})).world)


def test_an_arm_brings_along_what_it_depends_on():
    arms = [{"name": "total", "method": "random", "total_of": "ours"}, *values()["arms"]]
    found = config(arms=arms)
    assert [arm.name for arm in arms_to_run(found, ["total"])] == ["ours", "total"]
    assert [arm.name for arm in arms_to_run(found, None)][-1] == "total"
    with pytest.raises(ConfigError, match="no such arm"):
        arms_to_run(found, ["nobody"])
