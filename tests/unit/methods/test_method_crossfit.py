"""crossfit on planted problems: equal to the choice that the comparison makes, and to its own words."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError, SignalError
from gradsift.methods import make_method
from gradsift.seeds import stream
from gradsift.train.crossfit import Crossfit, CrossfitConfig, choose_crossfit
from gradsift.types import Budget, Noise
from planted import planted_world

PROBLEM = planted_world("trust").problem()
STREAM = stream(3, "select/crossfit")


def choose(problem=PROBLEM, budget=None, **config):
    return make_method("crossfit", config).select(problem, budget or Budget(rows=30), STREAM)


def codes(selection):
    return Counter(selection.reason_code)


def by_hand(problem, config, count):
    """The rows that train/crossfit.py draws when it is handed the same measurements."""
    likeness = dict(zip(problem.ids, problem.likeness.tolist(), strict=True))
    group = dict(zip(problem.ids, problem.copy_group or problem.ids, strict=True))
    top = sorted(likeness, key=lambda i: (-likeness[i], i))[: max(1, round(config.prior_share * problem.size))]

    def capped(ids):
        seen, kept = Counter(), []
        for i in ids:
            seen[group[i]] += 1
            if seen[group[i]] <= config.max_copies:
                kept.append(i)
        return kept

    prior, threshold = capped(top), float(np.quantile(problem.anchor_loss, config.known_quantile))
    loss = dict(zip(problem.ids, problem.loss.tolist(), strict=True))
    held = dict(zip(problem.ids, problem.held_out_loss.tolist(), strict=True))
    known = capped([i for i in problem.ids if i not in set(top) and loss[i] <= threshold])
    found = Crossfit(tuple(sorted(prior)), likeness, loss, {i: held[i] for i in prior}, tuple(known), threshold, {})
    return set(choose_crossfit(found, config, count, STREAM.child("draw"))[0])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 160),
    st.sampled_from([0.1, 0.3, 0.53, 1.0]),
    st.sampled_from([0.2, 0.65, 1.0]),
    st.sampled_from([0.0, 0.25, 0.4, 0.9]),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_the_rows_are_those_that_the_comparison_draws(count, prior_share, trust, protect, max_copies, seed):
    if abs(protect * count % 1 - 0.5) < 1e-9:
        count += 1
        if abs(protect * count % 1 - 0.5) < 1e-9:
            return
    world = planted_world("trust", seed=seed)
    problem = world.problem(num_read=200)
    problem = replace(problem, copy_group=tuple(problem.ids[i - i % 4] for i in range(problem.size)))
    config = CrossfitConfig(prior_share=prior_share, trust=trust, protect=protect, max_copies=max_copies)
    got = choose(
        problem, Budget(rows=count), prior_share=prior_share, trust=trust, protect=protect, max_copies=max_copies
    )
    assert set(got.ids) == by_hand(problem, config, count)


def test_the_plant_is_found_and_everything_else_is_named():
    world = planted_world("trust", seed=1)
    got = choose(world.problem(), prior_share=0.56, trust=0.27, protect=0.25, budget=Budget(rows=32))
    assert len(world.good & set(got.ids)) >= 29
    assert set(codes(got)) <= {
        "kept:trusted", "kept:known", "dropped:untrusted", "dropped:not_domain", "dropped:draw",
    }  # fmt: skip
    assert codes(got)["kept:known"] == 8


def test_reasons_say_the_numbers():
    got = choose()
    word = dict(zip(got.reason_code, got.reason, strict=True))
    assert "held-out loss" in word["dropped:untrusted"]
    assert " above " in word["dropped:untrusted"]
    assert "likeness" in word["dropped:not_domain"]
    assert "starting loss" in word["dropped:not_domain"]
    assert "not drawn" in word["dropped:draw"]
    assert "gradients play no part" in " ".join(n.text for n in got.notes)


def test_copies_beyond_the_cap_are_dropped_by_that_name():
    rows = tuple(i if k % 2 == 0 else PROBLEM.ids[k - 1] for k, i in enumerate(PROBLEM.ids))
    got = choose(replace(PROBLEM, copy_group=rows), max_copies=1, budget=Budget(rows=160))
    code = dict(zip(PROBLEM.ids, got.reason_code, strict=True))
    kept = [(code[i], rows[PROBLEM.ids.index(i)]) for i in got.ids]
    assert len(set(kept)) == len(kept)
    assert codes(got)["dropped:copies"] > 0


def test_what_one_group_lacks_the_other_fills_and_it_is_said():
    nothing = choose(replace(PROBLEM, anchor_loss=np.full(5, 1e-6)))
    assert codes(nothing)["kept:known"] == 0
    assert len(nothing.ids) == 30
    assert any(n.code == "filled_in" and "0 rows are known" in n.text for n in nothing.notes)
    few = choose(trust=0.01)
    assert codes(few)["kept:trusted"] == 1
    assert any(n.code == "filled_in" for n in few.notes)
    assert not any(n.code == "filled_in" for n in choose(protect=0.05).notes)


def test_a_token_budget_is_shared_by_tokens():
    got = choose(budget=Budget(tokens=1200), protect=0.3)
    tokens = dict(zip(PROBLEM.ids, PROBLEM.num_trained.tolist(), strict=True))
    known = {i for i, c in zip(PROBLEM.ids, got.reason_code, strict=True) if c == "kept:known"}
    assert abs(sum(tokens[i] for i in known) / got.num_trained - 0.3) < 0.1


def test_the_margin_is_the_nearest_row_to_either_threshold():
    tight = replace(PROBLEM, noise=Noise(loss=1e-12))
    got = choose(tight)
    assert got.cut.margin > got.cut.bound == 4e-12
    assert got.cut.undecided == ()
    assert choose(replace(PROBLEM, noise=Noise(loss=0.05))).cut.undecided


@pytest.mark.parametrize("missing", ["likeness", "held_out_loss", "loss", "anchor_loss"])
def test_what_is_missing_is_refused_by_name(missing):
    with pytest.raises(SignalError, match=missing.split("_")[0]):
        choose(replace(PROBLEM, **{missing: None}))
    if missing == "anchor_loss":
        with pytest.raises(SignalError, match="anchor"):
            choose(replace(PROBLEM, anchor_loss=np.zeros(0)))


@pytest.mark.parametrize(
    ("field", "value"), [("prior_share", 0), ("trust", 1.1), ("protect", 1.0), ("known_quantile", 0), ("max_copies", 0)]
)
def test_a_setting_out_of_range_is_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        make_method("crossfit", {field: value})


def test_its_defaults_are_those_of_the_comparison():
    config, method = CrossfitConfig(), make_method("crossfit", {})
    for name in ("prior_share", "max_copies", "trust", "protect", "known_quantile"):
        assert getattr(method, name) == getattr(config, name)
