"""The training of a policy: what it finds, when it refuses, and that a resumed run is the run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import policy_cmdp
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.errors import BudgetError, ConfigError, InfeasibleError, NumericsError, SpecError, StoreError
from gradsift.policy.episodes import Episodes, Losses, Table, Terms
from gradsift.policy.learned import LearnedPolicy
from gradsift.policy.multiplier import MultiplierConfig
from gradsift.policy.network import Shape, start_actor
from gradsift.policy.play import play
from gradsift.policy.ppo_lagrangian import PPOConfig, better, from_arrays, keeps, to_arrays, train_policy
from gradsift.policy.ppo_state import Kept
from gradsift.seeds import stream

SHORT = PPOConfig(num_epochs=8, num_episodes=6, hidden=8, cost_epochs=3)


class Sums:
    """Rows with fixed effects on the target and on two sources."""

    sources = ("math", "code")

    def __init__(self, gain, cost):
        self.gain, self.cost = np.append(gain, 0.0), np.vstack([cost, np.zeros(2)])

    def reset(self, num):
        self.target, self.protect = np.zeros(num), np.zeros((num, 2))
        return Losses(self.target, self.protect)

    def step(self, rows):
        self.target = self.target - self.gain[rows].sum(1)
        self.protect = self.protect + self.cost[rows].sum(1)
        return Losses(self.target, self.protect)


def process(limits=(0.2, 0.3), budget=18, seed=0, order=(0, 1, 2, 3)):
    """4 clusters of 5 rows that cost 1 to 4 tokens, so that episodes end at different times."""
    random = np.random.default_rng(seed)
    gain, cost = random.normal(0.05, 0.03, 20), random.normal(0.02, 0.05, (20, 2))
    cost[15:] = -np.abs(cost[15:])
    members = [tuple(range(5 * k, 5 * k + 5)) for k in range(4)]
    features = np.array([[gain[list(some)].mean(), *cost[list(some)].mean(0)] for some in members])
    table = Table(tuple(members[k] for k in order), random.integers(1, 5, 20), features[list(order)], ("g", "a", "b"),
                  np.array([k == 3 for k in order]))  # fmt: skip
    return Episodes(table, Sums(gain, cost), Terms(2, budget, np.array(limits)), stream(seed, "test"))


def states_of(config=SHORT, seed=3, state=None):
    seen = []
    trained = train_policy(process(), config, seed, state=state, on_epoch=seen.append)
    return trained, seen


def equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("dual", ["pi", "paper"])
def test_a_resumed_run_is_the_run_bit_for_bit(dual):
    config = replace(SHORT, multiplier=MultiplierConfig(dual=dual))
    whole, states = states_of(config)
    assert [s.epoch for s in states] == list(range(1, 9))
    for stop in (1, 3, 7):
        carried = {name: array.copy() for name, array in to_arrays(states[stop - 1]).items()}
        assert all(a.dtype.kind in "biuf" for a in carried.values())
        again, after = states_of(config, state=from_arrays(carried))
        for ours, theirs in zip(after, states[stop:], strict=True):
            equal(to_arrays(ours), to_arrays(theirs))
        np.testing.assert_array_equal(again.policy.actor, whole.policy.actor)
        assert (again.gain, again.num_decisions, again.note) == (whole.gain, whole.num_decisions, whole.note)
    finished, none = states_of(config, state=states[-1])
    assert none == []
    equal(to_arrays(finished.state), to_arrays(whole.state))


@pytest.mark.timeout(400)
def test_another_process_goes_on_in_the_same_way(tmp_path):
    whole, states = states_of()
    np.savez(tmp_path / "three.npz", **to_arrays(states[2]))
    script = (
        "import sys, numpy as np\n"
        "from tests.unit.policy.test_ppo_lagrangian import states_of, to_arrays, from_arrays\n"
        "state = from_arrays(dict(np.load(sys.argv[1])))\n"
        "np.savez(sys.argv[2], **to_arrays(states_of(state=state)[0].state))\n"
    )
    root = Path(__file__).parents[3]
    where = [str(tmp_path / "three.npz"), str(tmp_path / "end.npz")]
    subprocess.run([sys.executable, "-c", script, *where], check=True, cwd=root, timeout=300)
    equal(dict(np.load(where[1])), to_arrays(whole.state))


def test_other_seeds_and_settings_do_not_continue():
    _, states = states_of(replace(SHORT, num_epochs=1))
    config = replace(SHORT, num_epochs=1)
    with pytest.raises(SpecError, match="seed"):
        train_policy(process(), config, 4, state=states[0])
    with pytest.raises(SpecError, match="entropy"):
        train_policy(process(), replace(config, entropy=0.5), 3, state=states[0])
    with pytest.raises(SpecError, match=r"multiplier\.cap"):
        train_policy(process(), replace(config, multiplier=MultiplierConfig(cap=3.0)), 3, state=states[0])
    with pytest.raises(StoreError, match="actor/first"):
        from_arrays({k: v for k, v in to_arrays(states[0]).items() if k != "actor/first"})


def test_the_history_telescopes_and_the_kept_policy_is_what_was_measured():
    trained, states = states_of()
    history = trained.state.history
    assert len(history.gain) == 8
    again = play(process(), trained.policy, stream(9, "any"), shuffle=False)
    assert again.gain[0] == trained.gain
    np.testing.assert_array_equal(again.rise[0], trained.rise)
    assert trained.feasible == bool(keeps(trained.rise, np.array([0.2, 0.3])))
    gains = np.concatenate([history.greedy_gain, history.dealt_gain])
    fits = keeps(np.concatenate([history.greedy_rise, history.dealt_rise]), np.array([0.2, 0.3]))
    assert fits.any()
    assert trained.gain == gains[fits].max()
    assert trained.num_decisions == history.decisions.sum() + states[0].probe.num_decisions
    assert len(states[0].probe.gain) == 5


def test_a_small_process_with_state_is_solved():
    got = policy_cmdp.run("stateful", 103, PPOConfig(num_epochs=60), 10)
    assert got["feasible"]
    assert got["share_of_best"] >= 0.95


def test_the_tree_of_states_gives_what_many_episodes_give():
    known = policy_cmdp.additive(100)
    shape = Shape(known.episodes.table.features.shape[1] + 1, 4, 1, 8)
    policy = LearnedPolicy(20 * start_actor(shape, stream(0, "a")), shape, np.ones(1), mode="sample")
    trace = play(known.episodes, policy, stream(0, "b"), num=4000, shuffle=False)
    error = trace.rise.std() / np.sqrt(4000)
    gain, rise = known.tree.expected(policy)
    assert abs(rise - trace.rise.mean()) < 4 * error
    assert abs(gain - trace.gain.mean()) < 4 * trace.gain.std() / np.sqrt(4000)
    assert error < 0.02 * known.episodes.terms.limits[0]


def test_limits_out_of_reach_are_reported_with_what_was_reached():
    least = process().dynamics.cost[:-1].min(0).sum()
    assert least > -5
    with pytest.raises(InfeasibleError, match="PROBABLY INFEASIBLE") as caught:
        train_policy(process(limits=(-5.0, 0.3)), SHORT, 0)
    message = str(caught.value)
    assert "math" in message
    assert "(limit -5)" in message
    assert "replay" in message


def test_a_limit_that_only_training_for_low_costs_reaches_is_not_called_infeasible():
    episodes = policy_cmdp.stateful(100).episodes
    table = replace(episodes.table, general=np.zeros(3, dtype=bool))
    reachable = policy_cmdp.stateful(100).tree.rise
    limit = float(np.sort(reachable)[3])  # far below what single clusters and uniform draws reach
    strict = Episodes(table, episodes.dynamics, Terms(1, 6, np.array([limit])), stream(0, "strict"))
    trained = train_policy(strict, replace(SHORT, num_episodes=32, cost_epochs=60, lr=0.02), 0)
    assert trained.state.probe.fits
    assert trained.state.probe.num_cost_epochs > 0
    assert trained.state.probe.smallest[0] <= limit


def test_no_feasible_epoch_is_flagged_by_name():
    config = replace(SHORT, num_epochs=1, lr=1e-6)
    for seed in range(40):
        trained = train_policy(process(limits=(0.01, 0.02), seed=seed), config, 0) if reachable(seed) else None
        if trained is not None and not trained.feasible:
            assert "math" in trained.note
            assert "least violating" in trained.note
            return
    raise AssertionError("no such process among the seeds")


def reachable(seed):
    try:
        train_policy(process(limits=(0.01, 0.02), seed=seed), replace(SHORT, num_epochs=1), 0)
    except InfeasibleError:
        return False
    return True


def kept(gain, rise, feasible):
    return Kept(np.zeros(1, dtype=np.float32), np.zeros(1), False, gain, np.array([rise]), feasible, 0)


def test_which_policy_is_kept():
    limits = np.array([1.0])
    good, poor, broken, worse = kept(2, 0.9, True), kept(1, 0.1, True), kept(9, 1.5, False), kept(9, 3.0, False)
    assert better(broken, None, limits) is broken
    assert better(poor, broken, limits) is poor
    assert better(broken, poor, limits) is poor
    assert better(good, poor, limits) is good
    assert better(poor, good, limits) is good
    assert better(broken, worse, limits) is broken
    assert better(kept(2, 0.5, True), good, limits) is good


def decided(shape, seed):
    """An actor that prefers some clusters clearly; large first layers would saturate and tie."""
    actor = start_actor(shape, stream(seed, "a"))
    actor[-shape.hidden :] *= 100
    return actor


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(4)), st.integers(0, 5))
def test_numbering_the_clusters_in_another_way_changes_nothing(order, seed):
    plain, moved = process(), process(order=order)
    shape = Shape(4, 6, 2, 8)
    policy = LearnedPolicy(decided(shape, seed), shape, np.array([0.5, 2.0]))
    ours = play(plain, policy, stream(0, "x"), num=3, shuffle=False)
    theirs = play(moved, policy, stream(0, "x"), num=3, shuffle=False)
    np.testing.assert_array_equal(ours.rows, theirs.rows)


def test_the_deployed_policy_sees_its_own_prices_and_draws_from_its_stream():
    episodes, shape = process(), Shape(4, 6, 2, 8)
    policy = LearnedPolicy(decided(shape, 0), shape, np.array([0.5, 2.0]), mode="sample")
    seen = episodes.reset(0, 2)
    before = policy.probabilities(seen)
    episodes.multipliers = np.array([7.0, 9.0])
    np.testing.assert_array_equal(policy.probabilities(episodes.reset(0, 2)), before)
    np.testing.assert_allclose(before.sum(1), 1, atol=1e-6)
    runs = [play(episodes, policy, stream(0, name), num=5).actions for name in "xxy"]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    with pytest.raises(SpecError, match="protected sources"):
        policy.begin(policy_cmdp.additive(0).episodes, stream(0, "x"))


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match="not 0"):
        train_policy(process(limits=(0.0, 0.1)), SHORT, 0)
    with pytest.raises(ConfigError, match="protected source"):
        train_policy(process(limits=()), SHORT, 0)
    thirsty = process(budget=1)
    thirsty.table = replace(thirsty.table, price=np.full(20, 2))
    with pytest.raises(BudgetError, match="single row"):
        train_policy(thirsty, SHORT, 0)
    broken = process()
    broken.dynamics.gain[3] = np.nan
    with pytest.raises(NumericsError, match="not finite"):
        train_policy(broken, SHORT, 0)
    for wrong in ({"num_epochs": 0}, {"lr": 0.0}, {"clip": 1.0}, {"last_lr": 0.0}, {"num_minibatches": 0}):
        with pytest.raises(ConfigError):
            PPOConfig(**wrong)
