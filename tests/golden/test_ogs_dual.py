"""ogs_dual by hand: one anchor, two anchors, infeasible, tokens; and the method's own promises."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import ConfigError, InfeasibleError, SignalError
from gradsift.geometry.certify import certify
from gradsift.geometry.dual import solve_dual
from gradsift.geometry.feasible import NoChoiceError
from gradsift.geometry.program import set_program
from gradsift.geometry.rounding import round_whole
from gradsift.methods.base import make_method
from gradsift.methods.ogs_dual import OgsDual
from gradsift.seeds import stream
from gradsift.types import Budget, Direction, Noise, Problem

ONE_GAIN, ONE_DOTS = np.array([5, 4, 3, 2.5, 1, 0.5]), np.array([[-3], [-2], [-1], [1], [2], [4.0]])
TWO_GAIN = np.array([6, 5, 4, 3, 2, 1.0])
TWO_DOTS = np.array([(-3, 1), (1, -4), (-1, -1), (2, 0), (0, 2), (3, 3.0)])
NEVER = np.array([(2, -3), (1.5, -2), (-3, 2), (-2, 1.5), (-1, -1), (-0.5, -0.75)])
TOKENS = np.array([10, 4, 5, 2, 4, 1])


def solve(gain, dots, eps, **budget):
    program = set_program(gain, dots, np.full(dots.shape[1], float(eps)), **budget)
    solution = solve_dual(program)
    whole = round_whole(program, solution, np.zeros(len(gain)))
    return program, solution, whole, certify(program, solution, whole)


def rows(whole):
    return {int(i) + 1 for i in np.flatnonzero(whole.chosen)}


def test_one_anchor():
    program, solution, whole, certificate = solve(ONE_GAIN, ONE_DOTS, 0, rows=3)
    assert solution.lp_value == pytest.approx(55 / 6, abs=1e-12)
    assert solution.upper_bound == pytest.approx(55 / 6, abs=1e-12)
    np.testing.assert_allclose(solution.prices, [7 / 12], atol=1e-12)
    np.testing.assert_allclose(solution.w, [1, 1 / 3, 0, 1, 0, 2 / 3], atol=1e-12)
    assert solution.num_fractional == 2
    np.testing.assert_allclose(
        program.score(solution.prices), [3.25, 2.8333, 2.4167, 3.0833, 2.1667, 2.8333], atol=5e-5
    )
    assert whole.value == 8.5
    assert rows(whole) in ({1, 3, 6}, {1, 4, 5})
    assert whole.num_swaps == 1
    assert certificate.value == 8.5
    assert certificate.gap == pytest.approx((55 / 6 - 8.5) / (55 / 6))
    for price, q in ((0.0, 12), (0.25, 10.5), (0.5, 9.5), (0.75, 9.5), (1.0, 11)):
        score = program.score(np.array([price]))
        assert program.best_response(score) @ score == pytest.approx(q)
    top = program.best_response(program.gain)
    assert set(np.flatnonzero(top) + 1) == {1, 2, 3}
    assert program.slack(top)[0] == -6


def test_one_anchor_with_an_allowance_and_a_smaller_budget():
    _, solution, whole, _ = solve(ONE_GAIN, ONE_DOTS, 1, rows=3)
    assert solution.lp_value == pytest.approx(9.75, abs=1e-12)
    assert (whole.value, rows(whole)) == (9.5, {1, 2, 6})
    _, solution, whole, _ = solve(ONE_GAIN, ONE_DOTS, 0, rows=2)
    assert solution.lp_value == pytest.approx(6.214286, abs=5e-7)
    assert solution.prices[0] == pytest.approx(0.642857, abs=5e-7)
    assert (whole.value, whole.num_swaps) == (5.5, 1)


def test_two_anchors():
    program, solution, whole, certificate = solve(TWO_GAIN, TWO_DOTS, 0, rows=3)
    assert solution.lp_value == pytest.approx(12.5, abs=1e-12)
    np.testing.assert_allclose(solution.prices, [0.25, 0.5], atol=1e-12)
    np.testing.assert_allclose(solution.w, [1, 0.4, 0.3, 1, 0, 0.3], atol=1e-12)
    assert (whole.value, rows(whole), whole.num_swaps) == (12, {1, 2, 6}, 1)
    assert certificate.prices == pytest.approx({"anchor_1": 0.25, "anchor_2": 0.5})
    assert certificate.slack == {"anchor_1": 1.0, "anchor_2": 0.0}
    np.testing.assert_array_equal(program.slack(program.best_response(program.gain)), [-3, -4])


def test_infeasible_comes_with_a_proof_anyone_can_check():
    program = set_program(TWO_GAIN, NEVER, np.zeros(2), rows=2, names=("math", "chat"))
    with pytest.raises(NoChoiceError) as caught:
        solve_dual(program)
    proof = caught.value.proof
    np.testing.assert_allclose(proof.best_alone, [3.5, 3.5])
    assert proof.relaxation == pytest.approx(0.5)
    for prices in (proof.prices, np.array([0.5, 0.5])):  # the proof is not unique
        assert np.sort(NEVER @ prices)[-2:].sum() == pytest.approx(-0.5)
    assert caught.value.exit_code == 1
    for word in ("math", "chat", "+3.5", "by 0.5 "):
        assert word in str(caught.value)
    _, _, whole, _ = solve(TWO_GAIN, NEVER, 0.5, rows=2)
    assert whole.slack.min() >= 0
    one = set_program(TWO_GAIN, np.array([[-3], [-2], [-1], [-1], [-2], [-0.5]]), np.zeros(1), rows=3)
    with pytest.raises(NoChoiceError) as caught:
        solve_dual(one)
    assert caught.value.proof.relaxation == pytest.approx(2.5)
    _, _, whole, _ = solve(TWO_GAIN, one.dots, 2.5, rows=3)
    assert rows(whole) == {3, 4, 6}


def test_token_budget():
    budget = {"cost": TOKENS.astype(float), "total_cost": 13.0}
    _, solution, whole, _ = solve(TWO_GAIN, np.zeros((6, 0)), 0, **budget)
    assert solution.lp_value == pytest.approx(13.6)
    assert (whole.value, rows(whole)) == (13, {2, 3, 4, 6})
    dots = np.array([[-2], [-1], [-1], [0.5], [1], [0.2]])
    _, solution, whole, _ = solve(TWO_GAIN, dots, 0, **budget)
    assert solution.lp_value == pytest.approx(12.8)
    assert solution.prices[0] == pytest.approx(2 / 3)
    assert (whole.value, rows(whole)) == (11, {2, 4, 5, 6})


def make_problem(seed=0, n=40, m=2, *, gain=None, dots=None, norms=None, num_trained=None, noise=None):
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(size=n) if norms is None else norms
    cos = rng.uniform(-0.5, 0.5, size=(n, m + 1))
    cos[:, 1:] -= 0.4 * cos[:, :1]
    tokens = rng.integers(3, 40, n) if num_trained is None else num_trained
    return Problem(
        ids=tuple(f"r{i:06d}" for i in range(n)),
        sources=("pool",) * n,
        num_tokens=tokens + 5,
        num_trained=tokens,
        num_read=n,
        num_trained_read=int(tokens.sum()),
        grad_norm=norms,
        anchor_dot=cos[:, 1:] * norms[:, None] if dots is None else dots,
        target_dot=cos[:, 0] * norms if gain is None else gain,
        anchors=tuple(Direction(name, "protect", 1.0, 8, 80, 0.9, 0.01) for name in ("math", "chat", "code")[:m]),
        target=Direction("target", "target", 1.0, 8, 80, 0.9, 0.01),
        noise=noise or Noise(),
    )


def golden_problem():
    return make_problem(n=6, m=1, gain=ONE_GAIN.copy(), dots=ONE_DOTS.copy(), norms=np.full(6, 10.0))


def test_the_method_says_what_it_did():
    chosen = OgsDual(batch_size=2).select(golden_problem(), Budget(rows=3), stream(42, "select"))
    assert sorted(chosen.ids) in (["r000000", "r000002", "r000005"], ["r000000", "r000003", "r000004"])
    certificate = chosen.certificate
    assert certificate.value <= certificate.lp_value <= certificate.upper_bound
    assert certificate.prices["math"] == pytest.approx(7 / 12)
    assert certificate.slack["math"] == 0
    np.testing.assert_allclose(chosen.score, [3.25, 2.8333, 2.4167, 3.0833, 2.1667, 2.8333], atol=5e-5)
    by_id = dict(zip(chosen.problem_ids, zip(chosen.reason_code, chosen.reason, strict=True), strict=True))
    assert by_id["r000000"][0] == "kept:score"
    assert "gain +5, math -3 x price 0.583, above the cut 2.83" in by_id["r000000"][1]
    assert by_id["r000001"][0] == "dropped:budget"
    want = "gain +4, math -2 x price 0.583, at the cut 2.83; the fractional optimum takes 0.33 of it, rounded down"
    assert by_id["r000001"][1].endswith(want)
    assert sum(code == "kept:swap" for code, _ in by_id.values()) >= 1
    assert sum(code.startswith("kept") for code, _ in by_id.values()) == 3
    assert "3 rows use 3 of 3 rows; 2 split by the fractional optimum, 1 swaps" in certificate.fill


def test_rounded_in_rows_have_their_own_code():
    # {1, 2, 6} at eps 1 is the rounding {1, 4, 6} with 4 swapped for 2: row 6 is rounded in, row 2 as well.
    chosen = OgsDual(eps=1.0).select(golden_problem(), Budget(rows=3), stream(42, "select"))
    assert sorted(chosen.ids) == ["r000000", "r000001", "r000005"]
    assert [chosen.reason_code[i] for i in (1, 5)] == ["kept:fraction_rounding"] * 2
    assert "swapped out" in chosen.reason[3]


BUDGETS = [Budget(rows=9), Budget(percent=30.0), Budget(tokens=250)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(BUDGETS), st.sampled_from(["clipped", "raw", "unit"]),
       st.sampled_from(["full", "positive"]), st.sampled_from([None, 0.3]), st.integers(1, 3))  # fmt: skip
def test_promises_on_random_problems(seed, budget, scale, fill, kappa, m):
    problem = make_problem(seed, m=m)
    method = OgsDual(scale=scale, fill=fill, kappa=kappa, batch_size=4)
    try:
        chosen = method.select(problem, budget, stream(1, "select"))
    except InfeasibleError:
        return
    index = [problem.ids.index(i) for i in chosen.ids]
    norms = problem.grad_norm
    rho = {"raw": np.ones(40), "unit": 1 / norms, "clipped": np.minimum(1, np.quantile(norms, 0.99) / norms)}[scale]
    r, d = rho[:, None] * problem.anchor_dot, rho * problem.target_dot
    c = chosen.certificate
    np.testing.assert_allclose(list(c.slack.values()), r[index].sum(axis=0) + list(c.allowance.values()), atol=1e-9)
    assert min(c.slack.values()) >= -1e-8
    assert c.value == pytest.approx(d[index].sum())
    assert c.value <= c.lp_value <= c.upper_bound
    assert c.num_fractional <= m + 1
    if budget.tokens:
        assert chosen.num_trained <= 250
    elif fill == "full":
        assert len(index) == (9 if budget.rows else 12)
    # The bound needs one top-B by the printed prices.
    lam = np.array(list(c.prices.values()))
    score, cost = d + r @ lam, problem.num_trained if budget.tokens else np.ones(40)
    total = 250 if budget.tokens else (9 if budget.rows else 12)
    order = np.argsort(-score / cost)
    share = np.clip((total - (np.cumsum(cost[order]) - cost[order])) / cost[order], 0, 1)
    share[(score[order] < 0) & (fill == "positive")] = 0
    if "at least" not in c.fill:
        assert c.upper_bound == pytest.approx(share @ score[order] + lam @ list(c.allowance.values()), abs=1e-7)
    # No single swap gains.
    out = [i for i in range(40) if i not in index]
    left = total - cost[index].sum()
    slack = np.array(list(c.slack.values()))
    for a, b in itertools.product(index, out):
        if cost[b] - cost[a] <= left and (slack + r[b] - r[a] >= 1e-9).all():
            assert d[b] <= d[a] + 1e-9
    assert set(chosen.reason_code) <= {
        "kept:score",
        "kept:fraction_rounding",
        "kept:swap",
        "kept:fill",
        "dropped:budget",
    }
    again = method.select(problem, budget, stream(1, "select"))
    assert again.ids == chosen.ids


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(BUDGETS),
    st.sampled_from(["clipped", "raw", "unit"]),
    st.sampled_from([1e-7, 1e-5, 1e-3]),
    st.sampled_from([0.0, 0.3]),
)
def test_no_error_within_the_bound_changes_a_decided_choice(seed, budget, scale, size, kappa):
    problem = make_problem(seed, noise=Noise(cos=size, norm=size))
    method = OgsDual(scale=scale, kappa=kappa)
    try:
        chosen = method.select(problem, budget, stream(1, "select"))
    except InfeasibleError:
        return
    decided = chosen.cut.margin > chosen.cut.bound
    assert bool(chosen.cut.undecided) != decided
    rng = np.random.default_rng(seed + 1)
    for kind in ("random", "extreme"):
        error = rng.uniform(-1, 1, size=(40, 4)) if kind == "random" else rng.choice([-1.0, 1.0], size=(40, 4))
        error *= 0.999 * size  # cosines move by up to the bound, and so do norms
        norms = problem.grad_norm * (1 + error[:, 3])
        moved = make_problem(
            seed,
            norms=norms,
            num_trained=problem.num_trained,
            gain=(problem.target_cos + error[:, 0]) * norms,
            dots=(problem.anchor_cos + error[:, 1:3]) * norms[:, None],
        )
        try:
            other = method.select(moved, budget, stream(1, "select"))
        except InfeasibleError:
            assert not decided
            continue
        assert set(other.ids) ^ set(chosen.ids) <= set(chosen.cut.undecided)


def test_small_errors_leave_most_choices_decided():
    decided = {}
    for size in (1e-7, 1e-2):
        problems = [make_problem(seed, noise=Noise(cos=size)) for seed in range(8)]
        cuts = [OgsDual(kappa=0.5).select(p, Budget(rows=9), stream(1, "select")).cut for p in problems]
        decided[size] = sum(cut.margin > cut.bound > 0 for cut in cuts)
    assert decided[1e-7] >= 7
    assert decided[1e-2] <= 1


def test_equal_rows_go_to_the_smaller_id():
    gain, dots = np.repeat([5.0, 1.0, -2.0], 4), np.repeat([[-1.0], [0.5], [3.0]], 4, axis=0)
    problem = make_problem(n=12, m=1, gain=gain, dots=dots, norms=np.full(12, 9.0))
    chosen = OgsDual().select(problem, Budget(rows=5), stream(1, "select"))
    for start in (0, 4, 8):
        inside = [int(i[1:]) for i in chosen.ids if start <= int(i[1:]) < start + 4]
        assert sorted(inside) == list(range(start, start + len(inside)))


def test_only_what_gains_is_taken_when_positive():
    gain = np.array([3.0, 2.0, -1.0, -2.0, -3.0])
    problem = make_problem(n=5, m=1, gain=gain, dots=np.zeros((5, 1)), norms=np.full(5, 9.0), num_trained=np.full(5, 4))
    full = OgsDual().select(problem, Budget(tokens=16), stream(1, "select"))
    assert len(full.ids) == 4
    assert "2 rows of negative score taken" in full.certificate.fill
    some = OgsDual(fill="positive").select(problem, Budget(tokens=16), stream(1, "select"))
    assert sorted(some.ids) == ["r000000", "r000001"]
    assert [n.count for n in some.notes if n.code == "unfilled"] == [8]


def test_serpentine_order_keeps_the_choice_and_spreads_the_conflict():
    problem = make_problem(3, n=200, m=1)
    spread = OgsDual(batch_size=8).select(problem, Budget(rows=64), stream(1, "select"))
    best = OgsDual(batch_size=8, order="score").select(problem, Budget(rows=64), stream(1, "select"))
    assert set(spread.ids) == set(best.ids)
    assert list(best.ids) == sorted(best.ids, key=lambda i: (-best.score[problem.ids.index(i)], i))
    norms = problem.grad_norm
    r = problem.anchor_dot[:, 0] * np.minimum(1, np.quantile(norms, 0.99) / norms)
    sums = {
        name: np.std([sum(r[problem.ids.index(i)] for i in s.ids[k : k + 8]) for k in range(0, 64, 8)])
        for name, s in (("spread", spread), ("best", best))
    }
    assert sums["spread"] < 0.5 * sums["best"]


@pytest.mark.parametrize(
    ("settings_", "word"),
    [({"eps": float("nan")}, "eps"), ({"kappa": -1}, "kappa"), ({"kappa": 0.1, "eps": 1.0}, "kappa"),
     ({"batch_size": 0}, "batch_size"), ({"scale": "big"}, "scale"), ({"eps": {"math": float("inf")}}, "math")],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(settings_, word):
    with pytest.raises(ConfigError, match=word):
        make_method("ogs_dual", settings_)


def test_allowances_by_name():
    problem = make_problem(5)
    chosen = OgsDual(eps={"chat": 2.0}).select(problem, Budget(rows=9), stream(1, "select"))
    assert chosen.certificate.allowance == {"math": 0.0, "chat": 2.0}
    with pytest.raises(ConfigError, match="maths"):
        OgsDual(eps={"maths": 2.0}).select(problem, Budget(rows=9), stream(1, "select"))


def test_a_missing_signal_is_named():
    bare = dataclasses.replace(make_problem(), target_dot=None)
    with pytest.raises(SignalError, match="target_dot"):
        OgsDual().select(bare, Budget(rows=1), stream(1, "select"))


def test_the_clipped_share_is_told():
    norms = np.ones(200)
    norms[:2] = 100.0
    gain = np.where(norms > 1, 50.0, 0.1)
    problem = make_problem(n=200, m=1, gain=gain, dots=np.zeros((200, 1)) + 0.01, norms=norms)
    chosen = OgsDual().select(problem, Budget(rows=5), stream(1, "select"))
    assert [n.count for n in chosen.notes if n.code == "clipped"] == [2]
