"""The contract of every registered method: one suite, run on each of them with each variant of its settings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import BudgetError, ConfigError, DataError, NumericsError, SignalError
from gradsift.methods import make_method, methods
from gradsift.methods.evidence import EVIDENCE, evidence_parts
from gradsift.seeds import stream
from gradsift.types import SIGNALS, Budget, Noise
from planted import close_problem, planted_world, problem_from_rows, remeasured

GROUPS = {"domains": "cluster", "num_clusters": 4, "num_rounds": 6}
POLICY = {"num_epochs": 2, "num_episodes": 4, "num_confirmed": 1, "allowed_nats": 1.0, "infeasible": "least"}
DAAR = {"num_domains": 3, "probe_share": 1.0, "rows_per_domain": 1, "min_accuracy": 0.0, "steps": 120}
SHORT = {"max_answer": 10**6}
# Settings that each method is tried with, and the signal that is planted for it (None: it does not look at any).
VARIANTS: dict[str, list[tuple[dict, str | None]]] = {
    "random": [({}, None), ({"match": "length"}, None), ({"match": "source"}, None)],
    "full": [({}, None)],
    "length": [({}, "long"), ({"pick": "shortest"}, "short")],
    "loss": [({"band": b}, f"loss_{b}") for b in ("low", "middle", "high")],
    "norm": [({"band": b}, f"norm_{b}") for b in ("low", "middle", "high")],
    "bm25": [({}, "lexical")],
    "rds": [({}, "embedding"), ({"aggregate": "mean"}, "embedding"), ({"aggregate": "max"}, "embedding")],
    "target_cosine": [({}, "gradient")],
    "grad_match": [({}, None), ({"batch_size": 5, "steer": "pool"}, None)],
    "grad_match_partitioned": [({}, None), ({"num_partitions": 3, "steer": "target"}, None)],
    "grads": [
        ({}, "dense"),
        ({"rule": "upper_density"}, None),
        ({"rule": "density_sample", "combine": "joint2d"}, None),
        ({"rule": "product", "beta": 0.1, "per_source": False}, "dense"),
        ({"combine": "lm_only"}, "dense"),
    ],
    "less": [({}, "influence"), ({"aggregate": "max"}, "influence"), ({"redundancy": 0.95}, "influence")],
    "conflict": [({}, "gradient"), ({"drop": "worst", "worst_share": 0.4}, "gradient")],
    "ogs_static": [({}, "orthogonal")],
    "hybrid": [({}, "gradient"), ({"conflict_quantile": 0.4, "num_clusters": 4}, "gradient")],
    "ogs_dual": [({}, "gradient")],
    "ogs": [(POLICY, None)],
    "doge": [({}, None), ({"goal": "domains", "returned": "last"}, None), (GROUPS, None)],
    "doremi": [({}, None), (GROUPS, None)],
    "dids": [
        ({"min_rank": -1}, None),
        ({"tasks": "all", "metric": "identity", "prior": "uniform"}, None),
        (GROUPS, None),
    ],
    "tlm": [({}, "prompt"), ({"mode": "absolute", "log_threshold": 1.5, "weights": "none"}, "prompt")],
    "ifd": [({}, "ratio")],
    "dsir": [({}, "importance")],
    "daar": [
        (DAAR, None),
        ({**DAAR, "domains": "sources"}, None),
        ({**DAAR, "seeds": "seed", "tau": 1.0, "min_seeds": 1}, "between"),
        ({**DAAR, "prefer": "1", "order": "inverse"}, None),
    ],
    "thtb": [({}, "hard"), ({"unit": "chars", "vectors": ""}, "hard")],
    "memory_level": [(SHORT, "recall"), ({**SHORT, "relation": "relation", "widen": True}, None)],
    "crossfit": [({}, None), ({"prior_share": 0.56, "trust": 0.27, "protect": 0.25}, "trust")],
}
CASES = [(name, *variant) for name in methods() for variant in VARIANTS.get(name, [({}, "gradient")])]
IDS = [f"{name}-{'-'.join(map(str, s.values()))}".rstrip("-") for name, s, _ in CASES]
every = pytest.mark.parametrize(("name", "config", "signal"), CASES, ids=IDS)
IGNORES_BUDGET = {"full"}
DRAWS = {"dsir", "memory_level", "random", "crossfit", "ogs", "grad_match_partitioned", "doge", "doremi", "dids"}
SEEDED = DRAWS | {"daar", "thtb", "hybrid", "grads"}  # hybrid draws its first cluster centres; one rule of grads draws
UNDEFINED = {"grads"}  # a density needs 20 rows, and they must differ
EXCLUDES = {
    "tlm",
    "ifd",
    "daar",
    "memory_level",
    "conflict",
    "hybrid",
    "crossfit",
    "grad_match",
    "grad_match_partitioned",
    "grads",
    "less",
}  # leaves rows out that it would not take at any budget
LEFT = (
    "dropped:budget",
    "dropped:draw",
    "dropped:policy",
    "dropped:does_not_fit",
)  # candidates for which there was no room
SET_LEVEL = {
    "ogs_dual",
    "ogs",
    "grad_match",
    "grad_match_partitioned",
}  # chooses a set, whose rows are not the top of one score
ROOM = {
    "ogs_dual": {"eps": 1e6},
    "tlm": {"share": 1.0},
}  # the world as a whole opposes an anchor: room enough to take all of it
NOISE = Noise(loss=1e-2, norm=1e-2, cos=1e-2, num_rows=8, embedding=1e-2)

WORLD = planted_world("gradient")
PROBLEM = WORLD.problem()


def choose(name, config, problem=PROBLEM, budget=None, seed=1):
    budget = budget or Budget(rows=24)
    return make_method(name, config).select(problem, budget, stream(seed, f"select/{name}"))


def excluded(selection):
    return sum(not c.startswith("kept") and c not in LEFT for c in selection.reason_code)


def test_every_registered_method_has_its_variants():
    assert set(methods()) <= set(VARIANTS)


@every
@pytest.mark.parametrize(
    "budget", [Budget(rows=24), Budget(rows=1), Budget(percent=10.0), Budget(percent=0.01)], ids=str
)
def test_a_budget_in_rows_is_kept(name, config, signal, budget):
    selection = choose(name, config, budget=budget)
    wanted = budget.rows or max(1, int(PROBLEM.size * budget.percent / 100))
    if name in IGNORES_BUDGET:
        assert len(selection.ids) == PROBLEM.size
        assert [n.code for n in selection.notes] == ["budget_ignored"]
    elif excluded(selection) == 0 or name not in EXCLUDES:
        assert len(selection.ids) == wanted
    else:
        assert 0 < len(selection.ids) <= wanted
        assert (len(selection.ids) < wanted) == any(n.code == "shortage" for n in selection.notes)


@every
@pytest.mark.parametrize("tokens", [200, 1000, 3333])
def test_a_budget_in_tokens_is_never_exceeded(name, config, signal, tokens):
    selection = choose(name, config, budget=Budget(tokens=tokens))
    index = {i: row for row, i in enumerate(PROBLEM.ids)}
    used = sum(int(PROBLEM.num_trained[index[i]]) for i in selection.ids)
    assert used == selection.num_trained
    assert name in IGNORES_BUDGET or 0 < used <= tokens
    assert selection.num_skipped == selection.reason_code.count("dropped:does_not_fit")


@every
def test_rows_are_unique_and_weights_valid(name, config, signal):
    selection = choose(name, config)
    assert len(set(selection.ids)) == len(selection.ids)
    assert set(selection.ids) <= set(PROBLEM.ids)
    assert selection.weights.shape == (len(selection.ids),)
    assert np.isfinite(selection.weights).all()
    assert (selection.weights >= 0).all()


@every
def test_the_same_seed_gives_the_same_rows_and_another_only_where_something_is_drawn(name, config, signal):
    first, again, other = choose(name, config), choose(name, config), choose(name, config, seed=2)
    assert first.ids == again.ids
    assert first.reason == again.reason
    if name in DRAWS:
        assert first.ids != other.ids
    elif name not in SEEDED:
        assert first.ids == other.ids


@every
def test_inputs_stay_as_they_are(name, config, signal, tmp_path):
    path = tmp_path / "sketch.npy"
    np.save(path, PROBLEM.sketch)
    problem = replace(PROBLEM, sketch=np.load(path, mmap_mode="r"))
    before = {f.name: _bytes(getattr(problem, f.name)) for f in dataclasses.fields(problem)}
    assert not any(getattr(problem, s).flags.writeable for s in SIGNALS)
    choose(name, config, problem)
    assert {f.name: _bytes(getattr(problem, f.name)) for f in dataclasses.fields(problem)} == before


def _bytes(value):
    return value.tobytes() if isinstance(value, np.ndarray) else repr(value)


@every
def test_the_order_of_the_rows_cannot_change_the_choice(name, config, signal):
    rows = list(WORLD.rows)
    np.random.default_rng(5).shuffle(rows)
    shuffled = problem_from_rows(rows, WORLD.anchors, WORLD.target)
    assert choose(name, config, shuffled).ids == choose(name, config).ids


@every
def test_a_row_is_judged_by_its_id_and_signals_and_never_by_its_position(name, config, signal):
    # Two more rows in front, which no method ranks first, move every position by two.
    if name in SEEDED | SET_LEVEL:
        pytest.skip("groups, sets and draws matched to groups depend on the whole pool")
    selection = choose(name, config)
    worst = selection.problem_ids[int(np.nanargmin(selection.score))] if name not in IGNORES_BUDGET else PROBLEM.ids[-1]
    like = next(row for row in WORLD.rows if row.id == worst)
    rows = [*WORLD.rows, replace(like, id="a0"), replace(like, id="a1")]
    more = choose(name, config, problem_from_rows(rows, WORLD.anchors, WORLD.target), budget=Budget(rows=12))
    fewer = choose(name, config, budget=Budget(rows=12))
    if name in IGNORES_BUDGET or config.get("drop") == "worst" or config.get("band") == "middle":
        return  # the share and the median move with the pool
    assert more.ids == fewer.ids


@every
def test_ties_go_to_the_smaller_id(name, config, signal):
    like = WORLD.rows[0]
    kind = replace(like, gradient=WORLD.target + 0.1 * WORLD.anchors.sum(axis=0))
    rows = [replace(kind, id=f"t{i:03d}", source=f"s{i % 2}") for i in range(40)]  # mixtures need two labels
    problem = problem_from_rows(rows, WORLD.anchors, WORLD.target)
    if config.get("domains") == "cluster":  # equal rows are one group, and a mixture needs two
        with pytest.raises(DataError, match="two domains"):
            choose(name, config, problem, budget=Budget(rows=7))
        return
    if config.get("seeds"):  # equal rows are seeds of one domain, or of none
        with pytest.raises(DataError, match="two domains"):
            choose(name, config, problem, budget=Budget(rows=7))
        return
    if name in UNDEFINED:
        with pytest.raises(NumericsError, match="density"):
            choose(name, config, problem, budget=Budget(rows=7))
        return
    if name == "tlm":  # no equal prompt is above a quantile of them
        config = {**config, **ROOM[name]}
    selection = choose(name, config, problem, budget=Budget(rows=7))
    if name in DRAWS:
        short = sum(n.count for n in selection.notes if n.code == "shortage" and name == "grad_match_partitioned")
        assert len(selection.ids) == min(7 - short, problem.size - excluded(selection))
    else:
        first = problem.ids[::2] if "batch_size" in config else problem.ids  # a batch has rows of one label
        assert sorted(selection.ids) == list(first[: len(selection.ids)])


@every
def test_a_number_that_is_not_finite_is_refused_by_name(name, config, signal):
    for needed in sorted(make_method(name, config).needs.signals):
        array = np.array(getattr(PROBLEM, needed))
        array[3] = np.nan
        with pytest.raises(NumericsError, match=needed) as refusal:
            choose(name, config, replace(PROBLEM, **{needed: array}))
        assert PROBLEM.ids[3] in str(refusal.value)


@every
def test_a_gradient_of_length_zero_is_refused(name, config, signal):
    if "grad_norm" in make_method(name, config).needs.signals:
        norm = np.array(PROBLEM.grad_norm)
        norm[3] = 0
        with pytest.raises(NumericsError, match="grad_norm"):
            choose(name, config, replace(PROBLEM, grad_norm=norm))


@every
def test_a_missing_signal_is_refused_by_name(name, config, signal):
    needs = make_method(name, config).needs
    for needed in sorted(needs.signals):
        with pytest.raises(SignalError, match=needed):
            choose(name, config, replace(PROBLEM, **{needed: None}))
    for column in needs.columns:
        left = {k: v for k, v in PROBLEM.external.items() if k != column.name}
        with pytest.raises(SignalError, match=column.name):
            choose(name, config, replace(PROBLEM, external=left))
    if needs.texts:
        with pytest.raises(SignalError, match="texts"):
            choose(name, config, replace(PROBLEM, texts=()))
    if needs.anchors:
        with pytest.raises(SignalError, match="anchor"):
            choose(name, config, replace(PROBLEM, anchors=(), anchor_dot=None, gram=None, anchor_loss=None, proxy=None))
    if needs.target and needs.gradients:
        with pytest.raises(SignalError, match="target"):
            choose(name, config, replace(PROBLEM, target=None, gram=None))
    if needs.target and "embedding" in needs.signals:
        with pytest.raises(SignalError, match="target"):
            choose(name, config, replace(PROBLEM, target_embedding=None, target_ids=()))


@every
@pytest.mark.parametrize(
    "budget", [Budget(rows=PROBLEM.size + 1), Budget(tokens=PROBLEM.num_trained_read + 1)], ids=str
)
def test_more_than_was_read_is_refused(name, config, signal, budget):
    if name in IGNORES_BUDGET:
        assert len(choose(name, config, budget=budget).ids) == PROBLEM.size
    else:
        with pytest.raises(BudgetError, match="read"):
            choose(name, config, budget=budget)


@every
def test_fewer_eligible_rows_than_asked_is_a_shortage_that_is_said(name, config, signal):
    problem = WORLD.problem(num_read=PROBLEM.size + 50)
    selection = choose(name, {**config, **ROOM.get(name, {})}, problem, budget=Budget(rows=PROBLEM.size + 20))
    assert len(selection.ids) == PROBLEM.size - excluded(selection)
    if name not in IGNORES_BUDGET:
        assert "shortage" in [n.code for n in selection.notes]
        assert sum(n.count for n in selection.notes if n.code == "shortage") == 20 + excluded(selection)


@every
def test_a_budget_of_all_rows_returns_all_that_the_method_lets_in(name, config, signal):
    selection = choose(name, {**config, **ROOM.get(name, {})}, budget=Budget(rows=PROBLEM.size))
    assert len(selection.ids) == PROBLEM.size - excluded(selection)
    assert excluded(selection) == 0 or name in EXCLUDES
    assert not selection.cut.undecided
    if excluded(selection):
        assert sum(n.count for n in selection.notes if n.code == "shortage") == excluded(selection)


@every
def test_no_eligible_row_is_refused(name, config, signal):
    empty = replace(
        PROBLEM,
        ids=(),
        sources=(),
        num_tokens=PROBLEM.num_tokens[:0],
        num_trained=PROBLEM.num_trained[:0],
        external={},
        texts=(),
        **{s: getattr(PROBLEM, s)[:0] for s in SIGNALS},
    )
    with pytest.raises(DataError, match="no usable row"):
        choose(name, config, empty, budget=Budget(rows=1))


@every
def test_neither_the_unit_of_the_gradient_nor_that_of_the_loss_matters(name, config, signal):
    scaled = {s: getattr(PROBLEM, s) * 4 for s in ("grad_norm", "anchor_dot", "target_dot", "sketch")}
    assert choose(name, config, replace(PROBLEM, **scaled)).ids == choose(name, config).ids
    for scale, shift in ((1, 4), (4, 0)):
        if shift and name == "ifd":
            continue  # a ratio of losses knows where zero is
        names = ("loss", "held_out_loss", "anchor_loss", "prompt_loss", "alone_loss")
        losses = {s: getattr(PROBLEM, s) * scale + shift for s in names}
        assert choose(name, config, replace(PROBLEM, **losses)).ids == choose(name, config).ids


@every
def test_a_planted_signal_is_found_more_often_than_by_chance(name, config, signal):
    if signal is None:
        pytest.skip("looks at no signal")
    hits, chance = [], []
    for seed in range(3):
        world = planted_world(signal, seed=seed)
        budget = Budget(rows=len(world.good))
        hits.append(len(world.good & set(choose(name, config, world.problem(), budget).ids)) / len(world.good))
        chance.append(len(world.good & set(choose("random", {}, world.problem(), budget).ids)) / len(world.good))
    assert np.mean(chance) < 0.35
    # target_cosine cannot know that rows which point to the target more strictly oppose an anchor; hybrid spreads its
    # choice over clusters on purpose, of which the planted rows fill only some; grads gives every source its share;
    # the probe of daar learns from 128 rows.
    assert min(hits) > {"target_cosine": 0.3, "hybrid": 0.4, "grads": 0.55, "daar": 0.5}.get(name, 0.7)
    assert np.mean(hits) > np.mean(chance) + 0.1


@every
def test_the_settings_round_trip(name, config, signal):
    method = make_method(name, config)
    again = make_method(name, json.loads(json.dumps(dataclasses.asdict(method))))
    assert again == method
    assert choose(name, config).config == dataclasses.asdict(method)
    assert choose(name, config).method == name


@every
def test_an_unknown_setting_is_refused_with_the_known_ones(name, config, signal):
    with pytest.raises(ConfigError, match="no such setting") as refusal:
        make_method(name, {**config, "bandd": 1})
    for field in dataclasses.fields(methods()[name]):
        assert field.name in refusal.value.expected


@every
def test_a_setting_of_the_wrong_type_is_refused_by_name(name, config, signal):
    for field in dataclasses.fields(methods()[name]):
        with pytest.raises(ConfigError, match=field.name):
            make_method(name, {field.name: {"not": "a value"}})


@pytest.mark.parametrize("name", methods())
def test_a_method_is_constructible_by_default_and_frozen(name):
    method = methods()[name]()
    assert method == make_method(name, {})
    assert dataclasses.is_dataclass(method)
    assert type(method).__dataclass_params__.frozen
    assert method.needs.signals <= set(SIGNALS)
    for said in (method.name, method.paper, method.summary):
        assert said
        assert "\n" not in said


@pytest.mark.parametrize("name", methods())
def test_a_method_says_what_its_page_rests_on(name):
    words = evidence_parts(methods()[name].evidence)
    assert set(words) <= set(EVIDENCE)
    assert len(set(words)) == len(words)
    if "ours" not in words and "control" not in words:
        assert re.search(r"\d{4}", methods()[name].paper), "evidence of a paper, and no paper is named"


@pytest.mark.parametrize("name", methods())
def test_the_file_says_where_the_method_comes_from_and_where_it_departs(name):
    text = inspect.getdoc(sys.modules[methods()[name].__module__]) or ""
    for heading in ("(Source|Paper):", "Algorithm:", "Departures from the paper:", "Departures from released code:"):
        assert re.search(heading, text), heading


@every
@pytest.mark.parametrize("budget", [Budget(rows=24), Budget(tokens=700)], ids=str)
def test_the_audit_is_complete(name, config, signal, budget):
    selection = choose(name, config, budget=budget)
    assert selection.problem_ids == PROBLEM.ids
    counts = Counter(selection.reason_code)
    assert sum(counts.values()) == PROBLEM.size
    assert sum(v for code, v in counts.items() if code.startswith("kept:")) == len(selection.ids)
    kept = {i for i, code in zip(PROBLEM.ids, selection.reason_code, strict=True) if code.startswith("kept:")}
    assert kept == set(selection.ids)
    assert all(re.fullmatch(r"(kept|dropped|unscored):[a-z_]+", code) for code in counts)
    assert all(len(reason) > 8 and not re.search(r"\bnan\b|None", reason) for reason in selection.reason)
    ranked = selection.rank[selection.rank > 0]
    assert sorted(ranked) == list(range(1, len(ranked) + 1))
    assert selection.budget == budget
    assert selection.seed == 1


@every
def test_ranks_follow_scores(name, config, signal):
    selection = choose(name, config)
    if name in SET_LEVEL | IGNORES_BUDGET:
        return
    order = np.argsort(selection.rank)[-int((selection.rank > 0).sum()) :]
    assert (np.diff(selection.score[order]) <= 0).all()
    assert selection.ids == tuple(PROBLEM.ids[i] for i in order[: len(selection.ids)])
    assert excluded(selection) == int((selection.rank < 0).sum())


@every
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 6),
    spread=st.sampled_from([0.4, 1.0, 2.1, 4.2, 9.0]),
    tokens=st.booleans(),
)
def test_another_measurement_changes_undecided_rows_only(name, config, signal, seed, rows, spread, tokens):
    problem = close_problem(seed, spread=spread, noise=NOISE)
    budget = Budget(tokens=5 * rows) if tokens else Budget(rows=min(rows, problem.size))
    if tokens and budget.tokens > problem.num_trained_read:
        return
    first = _or_refusal(name, config, problem, budget)
    for again in range(2):
        second = _or_refusal(name, config, remeasured(problem, seed + 1 + again), budget)
        if first is None or second is None:  # every row opposes an anchor in one of the measurements
            continue
        moved = set(first.ids) ^ set(second.ids)
        if first.cut.margin > first.cut.bound or not first.cut.undecided:
            assert not moved
        if not tokens:
            assert moved <= set(first.cut.undecided)


def _or_refusal(name, config, problem, budget):
    from gradsift.errors import InfeasibleError

    try:
        return choose(name, config, problem, budget)
    except InfeasibleError:
        assert name in ("conflict", "hybrid", "ogs_dual", "grad_match", "grad_match_partitioned")
        return None
    except NumericsError:
        assert name in UNDEFINED
        return None


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="no such method") as refusal:
        make_method("randon", {})
    assert all(name in refusal.value.expected for name in methods())
