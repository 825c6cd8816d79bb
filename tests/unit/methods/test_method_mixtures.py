"""doge, doremi and dids on planted domains: what each learns, what it says, and what a control learns instead."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError, DataError, NumericsError, SignalError
from gradsift.geometry.mixture import largest_remainder
from gradsift.geometry.reweight import token_excess
from gradsift.geometry.round_record import plain, read_round
from gradsift.geometry.trajectory import Domains, Feedback, Plan, Round, State, Trajectory, play
from gradsift.methods import make_method
from gradsift.methods.dids import Dids
from gradsift.methods.doge import Doge
from gradsift.methods.doremi import Doremi
from gradsift.methods.mixing import make_domains, select_by_mixture
from gradsift.seeds import stream
from gradsift.types import Budget
from planted import planted_world, problem_from_rows
from proxies import PlantedProxy, PointBench

NAMES = ("harmful", "helpful", "neutral")
THREE = Domains(NAMES, np.arange(3), np.array([900, 900, 900]), ("target",))


def three(seed, noise=0.1):
    """Gradients of a domain that opposes the target, one that points its way, and one across it."""
    rng = np.random.default_rng(seed)
    target = np.eye(12)[0]
    g = np.stack([-0.8 * target, 0.8 * target, np.eye(12)[1]]) + noise * rng.normal(size=(3, 12))
    return g, target[None]


def dids_run(seed, *, honest=True, shuffled=False, rounds=5, **settings):
    rule = Dids(**{"prior": "uniform", "min_rank": 0.3, **settings})
    plan = Plan(rounds, 16, "sampled", 64, ("gram", "fisher"), test_every=0 if shuffled else 5)
    g, h = three(seed)
    bench = PointBench(g, h, plan, curvature=0.05, honest=honest)
    if shuffled:
        order = np.random.default_rng(seed).permutation(3)
        real = bench.probe

        def probe(at, weights):
            found = real(at, weights)
            at_rows = np.r_[order, 3]
            return replace(found, gram=found.gram[np.ix_(at_rows, at_rows)], fisher=None)

        bench.probe = probe
    return play(rule, plan, THREE, bench)


def test_dids_finds_the_helpful_domain_and_leaves_the_harmful_one_at_its_floor():
    found = [dids_run(seed).weights[-1] for seed in range(10)]
    p_min = 0.2 / 3
    good = [w[1] > 1.5 / 3 and w[0] <= 2 * p_min for w in found]
    assert sum(good) >= 9
    shuffled = [dids_run(seed, shuffled=True).weights[-1] for seed in range(10)]
    assert sum(w[1] > 1.5 / 3 and w[0] <= 2 * p_min for w in shuffled) < 7


def test_dids_falls_back_to_the_prior_when_measured_steps_contradict_its_scores():
    found = dids_run(0, honest=False)
    assert len(found.rounds) == 1  # nothing is trained for a mixture that will not change
    assert found.rounds[0].state.stopped
    assert found.rounds[0].counts.tolist() == [0, 0, 0]
    assert np.allclose(found.weights[-1], 1 / 3)
    assert found.rounds[0].state.figures["rank_test"]["cos/identity"] == pytest.approx(-1)
    assert not dids_run(0).rounds[0].state.stopped


def test_a_later_rank_test_can_fail_too():
    rule, plan = Dids(prior="uniform"), Plan(8, 16, "sampled", 64, ("gram", "fisher"), test_every=2)
    bench = PointBench(*three(1), plan)
    real = bench.probe

    def probe(at, weights):
        found = real(at, weights)
        return replace(found, drops=-found.drops) if at == 4 else found

    bench.probe = probe
    found = play(rule, plan, THREE, bench)
    assert len(found.rounds) == 5
    assert not np.allclose(found.weights[-2], 1 / 3)
    assert np.allclose(found.weights[-1], 1 / 3)


def test_dids_keeps_floors_and_caps_and_its_prior():
    domains = Domains(NAMES, np.arange(3), np.array([10, 30, 860]), ("target",))
    plan = Plan(6, 16, "sampled", 64, ("gram", "fisher"))
    found = play(Dids(), plan, domains, PointBench(*three(2), plan))
    prior = domains.sizes / 900
    assert np.allclose(found.start.weights, prior)
    assert (found.weights >= 0.2 / 3 - 1e-12).all()
    assert (found.weights <= np.maximum(3 * prior, 0.2 / 3) + 1e-12).all()
    assert np.allclose(found.weights.sum(axis=1), 1, atol=1e-12)


def test_dids_keeps_its_mixture_while_no_task_improves():
    rule, state = Dids(prior="uniform", test_every=0), None
    gram = np.eye(4) + 0.1
    state = rule.start(THREE)
    for at, loss in enumerate([2.0, 2.5, 3.0]):
        before = state
        state = rule.step(
            state, Feedback(0.1, np.ones(3), np.ones(3, dtype=bool), gram=gram, task_losses=np.array([loss]))
        )
        assert (state.events.get("no_task_improved", 0)) == at
        assert at == 0 or np.array_equal(state.weights, before.weights)
    assert state.events["equal_scores"] == 3


def noisy(rng, means, noise):
    return means + noise * rng.normal(size=means.shape)


def four(seed, shuffled=False):
    """Four domains of which the target mixes the first two; gradients are estimated anew each step."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    means, target = basis[:4], 0.7 * basis[0] + 0.7 * basis[1]
    if shuffled:
        means = np.tile(means.mean(axis=0), (4, 1))
    plan = Plan(200, 16, "combined", measures=("gram",))
    bench = PointBench(means, target[None], plan, lr=5e-4)
    real = bench.slope
    bench.slope = lambda slopes: noisy(rng, real(slopes), 0.1)
    domains = Domains(tuple("abcd"), np.arange(4), np.full(4, 100), ("target",))
    return play(Doge(), plan, domains, bench)


def test_doge_finds_the_domains_that_the_target_was_made_of():
    found = [four(seed) for seed in range(10)]
    assert sum(one.weights[-1][:2].sum() > 0.7 for one in found) >= 9
    control = [four(seed, shuffled=True) for seed in range(10)]
    assert max(one.weights[-1].max() for one in control) < 0.4


@pytest.mark.parametrize(("clip", "falls"), [("signed", True), ("release", False)])
def test_the_release_forgives_the_opposite_of_the_target_and_ours_does_not(clip, falls):
    plan = Plan(30, 16, "combined", measures=("gram",))
    target = np.eye(5)[0]
    bench = PointBench(np.stack([target, -target, np.eye(5)[2]]), target[None], plan, lr=5e-4)
    found = play(Doge(clip=clip), plan, THREE, bench).weights
    assert (np.diff(found[:, 0]) > 0).all()
    ratio = found[:, 1] / found[:, 2]  # of the opposite to the neutral one
    assert (np.diff(ratio) < -1e-6).all() == falls
    assert falls or np.allclose(ratio, 1)


def test_equal_domains_keep_equal_weights_and_mean_and_last_agree_once_settled():
    plan = Plan(12, 16, "combined", measures=("gram",))
    bench = PointBench(np.tile(np.eye(4)[0], (3, 1)), np.eye(4)[:1], plan)
    found = play(Doge(), plan, THREE, bench)
    assert np.allclose(found.weights, 1 / 3, atol=1e-15)
    assert np.allclose(found.mean_weights(), found.weights[-1])
    assert found.drift < 1e-12


def test_the_universal_goal_leaves_the_self_term_out_from_five_domains_on():
    for k in (4, 5):
        rng = np.random.default_rng(k)
        g = rng.normal(size=(k, 6))
        state = State(np.full(k, 1 / k), np.zeros(k))
        found = Doge(goal="domains").step(state, Feedback(1e-3, np.ones(k), np.ones(k, dtype=bool), gram=g @ g.T))
        whole = g @ g.sum(axis=0)
        assert np.allclose(found.figures["alignment"], whole - (k >= 5) * (g * g).sum(axis=1))


@pytest.mark.parametrize(("absent", "carried"), [("zero", 0.0), ("decay", 0.9)])
def test_a_domain_that_a_round_lacks_has_no_say_in_it(absent, carried):
    rng = np.random.default_rng(0)
    g = rng.normal(size=(4, 6))
    gram, here = g @ g.T, np.array([True, False, True])
    gram[1, :] = gram[:, 1] = np.nan  # what stands there must not be read
    state = State(np.array([0.2, 0.5, 0.3]), np.array([1e-5, -4e-5, 2e-5]))
    rule = Doge(absent=absent)
    found = rule.step(state, Feedback(1e-3, np.ones(3), here, gram=gram))
    small = Doge().step(
        State(np.array([0.2, 0.3]), np.zeros(2)),
        Feedback(1e-3, np.ones(2), np.ones(2, dtype=bool), gram=gram[np.ix_([0, 2, 3], [0, 2, 3])]),
    )
    assert np.allclose(found.carried[[0, 2]], small.carried)
    assert found.carried[1] == pytest.approx(carried * -4e-5)


def test_large_steps_are_counted_and_floors_kept():
    g = np.eye(3)
    g = np.vstack([g[0], -g[0], g[0]])
    state = State(np.array([0.5, 0.5]), np.zeros(2))
    seen = Feedback(1e-3, np.ones(2), np.ones(2, dtype=bool), gram=g @ g.T)
    assert Doge(mu=0.001).step(state, seen).events == {"large_step": 1}
    assert Doge(mu=0.01).step(state, seen).events == {}
    floored = Doge(mu=1e-5, floor=0.2).step(state, seen)
    assert floored.weights[1] == pytest.approx(0.1)


def learnable(reference_knows_noise, seed):
    """Token tables: one domain is known already, one can be learned, one is noise; excess is measured token by token."""
    rng = np.random.default_rng(seed)
    state = Doremi().start(Domains(("known", "learnable", "noise"), np.arange(3), np.full(3, 9)))
    rule = Doremi(eta=1.0)
    rounds = []
    for t in range(60):
        falls = 1.5 * np.exp(-t / 30)
        proxy = {
            "known": np.full(40, 0.1),
            "learnable": 1.0 + falls + 0.1 * rng.normal(size=40),
            "noise": 3 + 0.1 * rng.normal(size=40),
        }
        reference = {"known": np.full(40, 0.1), "learnable": np.full(40, 1.0), "noise": np.full(40, 3.0)}
        if not reference_knows_noise:  # a reference that has seen only that noise it can memorize
            reference["noise"] = np.full(40, 1.0)
        pairs = np.array([token_excess(proxy[n], reference[n]) for n in proxy])
        state = rule.step(
            state, Feedback(1e-3, np.ones(3), np.ones(3, dtype=bool), excess=pairs[:, 0], positive=pairs[:, 1])
        )
        rounds.append(state.weights)
    return np.array(rounds)[-48:].mean(axis=0)


def test_doremi_raises_what_can_be_learned_and_noise_only_against_a_reference_that_knows_it():
    for seed in range(3):
        known, gain, noise = learnable(True, seed)
        assert gain > 1 / 3
        assert gain > known
        assert noise <= 1.5 / 3
        assert learnable(False, seed)[2] > 1.5 / 3  # documented: a reference better at noise misleads it


@pytest.mark.parametrize(("absent", "wanted"), [("decay", 0.18), ("keep", 0.2)])
def test_doremis_absent_domain_decays_or_stays(absent, wanted):
    state = State(np.array([0.5, 0.5]), np.array([0.1, 0.2]))
    seen = Feedback(1e-3, np.ones(2), np.array([True, False]), excess=np.array([0.3, np.nan]))
    assert Doremi(absent=absent).step(state, seen).carried[1] == pytest.approx(wanted)


WORLD = planted_world("gradient")
PROBLEM = WORLD.problem()


def choose(name, settings=None, problem=PROBLEM, budget=None):
    return make_method(name, settings or {}).select(problem, budget or Budget(rows=40), stream(3, f"select/{name}"))


@pytest.mark.parametrize("name", ["doge", "doremi", "dids"])
def test_a_selection_follows_its_mixture_and_says_it(name):
    selection = choose(name, {"min_rank": -1} if name == "dids" else {})
    weights = np.array([*selection.mixture.values()])
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    took = np.bincount([int(PROBLEM.sources[PROBLEM.ids.index(i)][1]) for i in selection.ids], minlength=3)
    assert (np.abs(took - 40 * weights) < 1).all()
    table = selection.details["domains"]
    assert [line["name"] for line in table] == ["s0", "s1", "s2"]
    assert sum(line["share_chosen"] for line in table) == pytest.approx(1)
    json.dumps(selection.details, allow_nan=False)


def test_doremi_shows_the_other_step_size_beside_the_one_it_uses():
    one, other = choose("doremi", {"eta": 1.0, "also": [0.1]}), choose("doremi", {"eta": 0.1, "also": [1.0]})
    assert set(one.details["by_eta"]) == set(other.details["by_eta"]) == {"1", "0.1"}
    assert one.details["by_eta"]["0.1"] == pytest.approx(other.mixture)
    assert one.details["by_eta"]["1"] == pytest.approx(one.mixture)


def test_a_domain_that_runs_out_is_counted():
    rows = [replace(row, source="a" if k < 4 else "b") for k, row in enumerate(WORLD.rows)]
    problem = problem_from_rows(rows, WORLD.anchors, WORLD.target)
    selection = choose(
        "dids", {"prior": "uniform", "min_rank": 1.0}, problem, Budget(rows=40)
    )  # the prior: half of each
    note = next(n for n in selection.notes if n.code == "domain_exhausted")
    assert note.count == 16
    assert "a (4 of 20)" in note.text
    assert len(selection.ids) == 40


def draw_by(weights, sizes, rows):
    """Chosen rows per domain, and the note about domains that ran out, if any."""
    labels = np.repeat([f"s{k}" for k in range(len(sizes))], sizes)
    problem = problem_from_rows(
        [replace(row, source=str(label)) for row, label in zip(WORLD.rows, labels, strict=False)],
        WORLD.anchors,
        WORLD.target,
    )
    dealt = make_domains(problem, "source", stream=stream(0, "c"))
    selection = select_by_mixture(problem, Doge(), Budget(rows=rows), stream(0, "s"), dealt=dealt,
                                  weights=np.array(weights), notes=[], details={})  # fmt: skip
    took = [sum(problem.sources[problem.ids.index(i)] == name for i in selection.ids) for name in dealt.domains.names]
    return took, next((n for n in selection.notes if n.code == "domain_exhausted"), None)


def test_a_domain_that_gave_more_than_its_share_did_not_run_out():
    took, note = draw_by([0.8, 0.1, 0.1], [2, 3, 20], 15)
    assert took == [2, 3, 10]  # of 12, 2 and 1
    assert note.text.startswith("s0 (2 of 12) ran out: 10 rows of their share")
    assert note.count == 10


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=2, max_size=5),
    rows=st.integers(1, 40),
)
def test_what_ran_out_is_what_the_mixture_lacks(parts, rows):
    weights, sizes = np.array([w for w, _ in parts]), [n for _, n in parts]
    rows = min(rows, sum(sizes))
    took, note = draw_by(weights / weights.sum(), sizes, rows)
    lacking = np.maximum(0, largest_remainder(weights / weights.sum(), rows) - took)
    short = lacking[np.array(took) == sizes].sum()
    assert (0 if note is None else note.count) == short


def test_one_label_is_no_mixture_and_small_domains_are_said_or_merged():
    with pytest.raises(DataError, match="two domains"):
        choose("doge", problem=replace(PROBLEM, sources=("one",) * PROBLEM.size))
    sources = tuple({0: "x", 1: "y"}.get(k, f"s{k % 2}") for k in range(PROBLEM.size))
    problem = replace(PROBLEM, sources=sources)
    kept = make_domains(problem, "source", stream=stream(0, "c"), least=5)
    assert kept.domains.names == ("s0", "s1", "x", "y")
    assert [n.code for n in kept.notes] == ["small_domains"]
    merged = make_domains(problem, "source", stream=stream(0, "c"), least=5, small="merge")
    assert merged.domains.names == ("s0", "s1", "merged")
    assert merged.domains.sizes.tolist() == [79, 79, 2]
    assert next((n.code, n.count) for n in merged.notes) == ("domains_merged", 2)


def test_small_clusters_join_the_nearest_one():
    rng = np.random.default_rng(0)
    axes = np.eye(16)[:3]
    sketch = np.vstack([np.tile(axes[0], (60, 1)), np.tile(axes[1], (98, 1)), np.tile(axes[0] + 0.6 * axes[2], (2, 1))])
    sketch = (sketch + 0.01 * rng.normal(size=sketch.shape)).astype(np.float32)
    problem = replace(PROBLEM, sketch=sketch)
    kept = make_domains(problem, "cluster", stream=stream(0, "c"), num_clusters=3, least=5)
    assert sorted(kept.domains.sizes.tolist()) == [2, 60, 98]
    merged = make_domains(problem, "cluster", stream=stream(0, "c"), num_clusters=3, least=5, small="merge")
    assert sorted(merged.domains.sizes.tolist()) == [62, 98]
    assert merged.domains.of_row[-1] == merged.domains.of_row[0]
    first = replace(PROBLEM, sketch=np.roll(sketch, 2, axis=0))  # the small one is number 0 now
    merged = make_domains(first, "cluster", stream=stream(0, "c"), num_clusters=3, least=5, small="merge")
    assert merged.domains.names == ("cluster-0", "cluster-1")  # the numbers of the rows, which the audit shows


def test_without_a_proxy_or_with_a_zero_gradient_it_is_refused():
    for name in ("doge", "doremi", "dids"):
        with pytest.raises(SignalError, match="proxy"):
            choose(name, problem=replace(PROBLEM, proxy=None))
    flat = PlantedProxy(np.zeros((PROBLEM.size, 24)), PROBLEM.num_trained, WORLD.target)
    for name in ("doge", "dids"):
        with pytest.raises(NumericsError, match="zero"):
            choose(name, problem=replace(PROBLEM, proxy=flat))


def test_a_plan_without_rounds_or_rows_is_refused():
    for wrong in ((0, 4, "combined"), (3, 0, "weighted"), (3, 4, "sampled")):
        with pytest.raises(ConfigError, match="no rounds or no rows"):
            Plan(*wrong)


def test_rounds_come_back_from_json_to_the_last_bit():
    found = dids_run(4)
    for one in found.rounds:
        again = read_round(json.loads(json.dumps(plain(one), allow_nan=False)))
        assert plain(again) == plain(one)
        assert np.array_equal(again.state.weights, one.state.weights)
        assert np.array_equal(again.feedback.gram, one.feedback.gram)


def test_a_run_read_back_to_any_round_goes_on_as_if_it_had_not_stopped():
    whole = dids_run(5, rounds=6)

    class Again(PointBench):
        def read(self, at):
            return whole.rounds[at] if at < 3 else None

        def train(self, at, weights, before, counts):
            super().train(at, weights, before, counts)

    plan = Plan(6, 16, "sampled", 64, ("gram", "fisher"), test_every=5)
    bench = Again(*three(5), plan, curvature=0.05)
    for one in whole.rounds[:3]:  # the model after them
        bench.train(0, one.state.weights, one.state.weights, one.counts)
    resumed = play(Dids(prior="uniform", min_rank=0.3), plan, THREE, bench)
    assert np.array_equal(resumed.weights, whole.weights)
    assert [r.counts.tolist() for r in resumed.rounds] == [r.counts.tolist() for r in whole.rounds]


def test_sampled_rounds_use_every_row_once_before_any_twice_and_stop_at_their_epochs():
    domains = Domains(("few", "many"), np.arange(2), np.array([10, 200]), ("target",))
    plan = Plan(8, 4, "sampled", 40, ("gram",), max_epochs=2)
    g = np.stack([np.eye(4)[0], 0.2 * np.eye(4)[0] + np.eye(4)[1]])
    found = play(Dids(prior="uniform", test_every=0), plan, domains, PointBench(g, np.eye(4)[:1], plan))
    used = np.cumsum([r.counts for r in found.rounds], axis=0)
    assert (used[-1] <= 2 * domains.sizes).all()
    assert used[-1][0] == 20
    assert all(r.counts.sum() + r.short == 40 for r in found.rounds)


@pytest.mark.parametrize(("epochs", "most"), [(1, 30), (2, 60)])
def test_a_domain_that_runs_out_over_several_rounds_stops_at_its_epochs_and_the_other_takes_over(epochs, most):
    domains = Domains(("few", "many"), np.arange(2), np.array([30, 500]), ("target",))
    plan = Plan(8, 4, "sampled", 20, ("gram",), max_epochs=epochs)
    g = np.stack([np.eye(4)[0], 0.2 * np.eye(4)[0] + np.eye(4)[1]])
    found = play(Dids(prior="uniform", test_every=0), plan, domains, PointBench(g, np.eye(4)[:1], plan))
    assert np.sum([r.counts for r in found.rounds], axis=0).tolist() == [most, 8 * 20 - most]
    assert all(r.short == 0 for r in found.rounds)


def test_a_run_that_hardly_moved_its_weights_says_so():
    told = [n.code for n in choose("doge", {"num_rounds": 2}).notes]
    assert "nearly_uniform" in told
    assert "nearly_uniform" not in [n.code for n in choose("doge", {"mu": 1e-5}).notes]


def test_averages_over_the_last_rounds():
    state = State(np.array([0.5, 0.5]), np.zeros(2))
    rounds = tuple(
        Round(Feedback(0.1, np.ones(2), np.ones(2, dtype=bool)), replace(state, weights=np.array([w, 1 - w])), np.ones(2, dtype=np.int64))
        for w in (0.0, 0.2, 0.4, 0.6, 0.8)
    )  # fmt: skip
    found = Trajectory(state, rounds)
    assert found.mean_weights()[0] == pytest.approx(0.4)
    assert found.mean_weights(0.8)[0] == pytest.approx(0.5)
    assert found.drift == pytest.approx(2 * (0.4 - 0.3))
