"""From clusters and a learner to a schedule, in worlds small enough to go through every schedule there is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tests.quadratic import Quadratic, exact, make_world

from gradsift.errors import ConfigError, InfeasibleError
from gradsift.policy.calibration import Rollout
from gradsift.policy.contest import LEARNED
from gradsift.policy.episodes import NO_ROW, Losses, Table
from gradsift.policy.learn import learn_schedule
from gradsift.policy.multiplier import MultiplierConfig
from gradsift.policy.ppo_lagrangian import PPOConfig
from gradsift.policy.schedule import LearnConfig, Schedule
from gradsift.seeds import stream

WIDTH, BUDGET, SIZE = 3, 12, 12
OPPOSED, CLEAN, IDLE, GENERAL = (3.0, -2.0), (1.0, 0.0), (0.2, 0.1), (0.0, 2.0)
"""What a row's gradient holds of the target's slope and of the source's: times 0.05 a fall of the loss in nats."""

PPO = PPOConfig(num_epochs=12, num_episodes=8, cost_epochs=3, multiplier=MultiplierConfig("pi"))


def linear_world(kinds: tuple[tuple[float, float], ...]) -> tuple[Quadratic, Table]:
    """Losses fall in a straight line; the last cluster is of general rows where it lowers the source."""
    random = np.random.default_rng(0)
    n, k = SIZE * len(kinds), len(kinds)
    cluster = random.permutation(np.repeat(np.arange(k), SIZE))
    rows = np.column_stack([np.array(kinds)[cluster], np.zeros((n, 4))]) + 0.02 * random.normal(size=(n, 6))
    slopes = np.zeros((2, 6))
    slopes[0, 1] = slopes[1, 0] = 1.0  # the source's, then the target's
    world = make_world(
        n=n, size=6, sources=1, groups=1, rows=rows, slopes=slopes, factors=np.zeros((2, 1, 6)), kappa=np.zeros(2),
        train=np.zeros((1, 1, 6)), group=np.zeros(n, dtype=int), weights=np.ones(n),
    )  # fmt: skip
    members = tuple(tuple(int(i) for i in np.flatnonzero(cluster == c)) for c in range(k))
    features = np.column_stack([[rows[list(some)].mean(0)[:2] for some in members], np.arange(k)])
    general = np.array([kind == GENERAL for kind in kinds])
    return world, Table(members, np.ones(n, dtype=np.int64), features, ("gain", "harm", "number"), general)


class Real:
    """The world as an environment."""

    sources = ("source0",)

    def __init__(self, world: Quadratic) -> None:
        self.world, self.num_resets, self.num_steps = world, 0, 0

    def reset(self, num: int) -> Losses:
        self.num_resets += 1
        self.x = [np.zeros(self.world.rows.shape[1])] * num
        return self._losses()

    def step(self, rows: np.ndarray) -> Losses:
        self.num_steps += 1
        for e, line in enumerate(rows):
            some = [int(i) for i in line if i != NO_ROW]
            if some:
                self.x[e] = self.x[e] - self.world.eta * self.world.gradient(self.x[e], some)
        return self._losses()

    def _losses(self) -> Losses:
        every = np.array([self.world.losses(x) for x in self.x])
        return Losses(every[:, -1], every[:, :-1])


class Stopped(Exception):
    pass


class Trainer:
    """A learner that notes what it is asked; ``stop`` makes the saving of that epoch fail."""

    def __init__(self, world: Quadratic, noise: float = 0.0, states: dict | None = None, stop: int = 0) -> None:
        self.dynamics, self.noise, self.stop = Real(world), noise, stop
        self.states = {} if states is None else states
        self.asked: list[tuple[str, bytes]] = []
        self.width, self.saved = 0, 0

    def start(self, rows_per_decision: int) -> None:
        assert self.width == 0, "called once"
        self.width = rows_per_decision

    def roll(self, rows: np.ndarray, name: str) -> Rollout:
        assert self.width, "start comes first"
        self.asked.append((name, rows.tobytes()))
        done = self.dynamics.world.roll(rows, name=name)
        if not self.noise:
            return done
        random = stream(0, f"noise/{rows.tobytes().hex()}").numpy()
        losses = 2.0 + self.noise * random.normal(size=done.losses.shape)
        losses[0] = 2.0
        return Rollout(name, rows, losses[:, -1], losses[:, :-1])

    def load(self, name: str):
        return self.states.get(name)

    def save(self, name: str, arrays) -> None:
        self.saved += 1
        if self.saved == self.stop:
            raise Stopped
        self.states[name] = {key: np.array(value) for key, value in arrays.items()}


def learn(kinds, *, learner: Trainer | None = None, budget: int = BUDGET, seed: int = 0, **settings):
    world, table = linear_world(kinds)
    learner = learner or Trainer(world)
    given = {"rows_per_decision": WIDTH, "ppo": PPO, "num_simulated": 4, **settings}
    return learn_schedule(
        table, budget, exact(world)[0], learner, LearnConfig(**given), stream(seed, "select/ogs")
    ), learner


def best_feasible(kinds, limit: float) -> float:
    """Gain of the best of all sequences of clusters whose rise keeps the limit, rows in the table's order."""
    world, table = linear_world(kinds)
    best = -np.inf
    for actions in itertools.product(range(table.num_clusters), repeat=BUDGET // WIDTH):
        at, rows = [0] * table.num_clusters, []
        for k in actions:
            rows.append(table.members[k][at[k] : at[k] + WIDTH])
            at[k] += WIDTH
        losses = world.roll(np.array(rows)).losses
        if losses[-1, 0] - losses[0, 0] <= limit:
            best = max(best, losses[0, 1] - losses[-1, 1])
    return float(best)


def returned(found: Schedule):
    return next(one for one in found.tried if one.name == found.policy)


DOMAIN = (OPPOSED, CLEAN, IDLE)


@cache
def tight():
    return learn(DOMAIN, allowed_nats=0.05)


def test_a_cluster_opposed_to_a_source_is_left_where_the_limit_binds():
    found, _ = tight()
    assert found.feasible
    assert 0 not in found.actions.tolist()
    assert set(found.actions.tolist()) == {1}
    assert returned(found).gain[0] >= 0.95 * best_feasible(DOMAIN, 0.05)
    assert returned(found).rise[0, 0] <= 0.05
    assert found.limits.tolist() == [0.05]


def test_it_is_taken_where_there_is_room():
    found, _ = learn(DOMAIN, allowed_nats=5.0)
    assert set(found.actions.tolist()) == {0}
    assert returned(found).gain[0] >= 0.95 * best_feasible(DOMAIN, 5.0)


@pytest.mark.parametrize("seed", [0, 1])
def test_replay_pays_for_what_is_gained_elsewhere(seed):
    kinds = (OPPOSED, CLEAN, GENERAL)
    found, _ = learn(kinds, allowed_nats=0.05, seed=seed)
    assert found.feasible
    assert {0, 2} <= set(found.actions.tolist())
    assert returned(found).gain[0] >= 0.95 * best_feasible(kinds, 0.05)
    assert returned(found).rise[0, 0] <= 0.05 + 1e-9
    assert best_feasible(kinds, 0.05) > 1.2 * best_feasible(kinds[:2], 0.05)


def test_a_share_of_the_loss_at_the_start_is_a_limit_too():
    found, _ = learn(DOMAIN, allowed_rise=0.025)
    assert found.start == pytest.approx([2.0, 2.0])
    assert found.limits == pytest.approx([0.05])
    assert np.array_equal(found.rows, tight()[0].rows)


def test_what_is_returned_is_one_of_those_that_were_tried_and_its_rows_fit():
    found, _ = tight()
    world, table = linear_world(DOMAIN)
    chosen = found.rows[found.rows != NO_ROW]
    assert len(set(chosen.tolist())) == len(chosen) == BUDGET
    for k, line in zip(found.actions, found.rows, strict=True):
        assert set(line.tolist()) <= set(table.members[k])
    confirmed = {one.name for one in found.tried if len(one.gain)}
    assert confirmed == {*LearnConfig().confirmed, *(f"mixture_regression_{n}" for n in (1, 2, 3))}
    assert all(len(one.gain) == 2 for one in found.tried if len(one.gain))
    assert {"exp3", "epsilon_greedy", "thompson"} <= {one.name for one in found.tried if not len(one.gain)}
    losses = world.roll(found.rows).losses
    assert returned(found).gain[0] == losses[0, 1] - losses[-1, 1]


def test_every_schedule_is_rolled_once_and_all_are_counted():
    found, learner = tight()
    rows = [key for _, key in learner.asked]
    assert len(rows) == len(set(rows)), "equal schedules are one roll-out"
    contest = {x.tobytes() for one in found.tried if len(one.gain) for x in (one.rows, *one.others)[: len(one.gain)]}
    assert set(rows) == contest | {one.rows.tobytes() for one in found.settled.rollouts}
    played = {one.rows.tobytes(): one for one in found.settled.rollouts}
    assert found.settled.cost["num_rollouts"] == len(played)
    assert [one.name for one in found.settled.rollouts] == [
        f"calibration {n + 1}" for n in range(len(found.settled.rollouts))
    ]
    assert found.settled.cost["num_decisions"] == sum(len(one.rows) for one in played.values())


def test_the_same_seed_decides_the_same_and_the_simulator_was_trusted():
    found, again = tight()[0], learn(DOMAIN, allowed_nats=0.05)[0]
    assert np.array_equal(found.rows, again.rows)
    assert found.notes == again.notes
    assert found.settled.accepted
    assert found.trained is not None
    assert len(found.trained.state.history.gain) == PPO.num_epochs
    assert any("learned policy" in note for note in found.notes)


def test_more_real_roll_outs_than_simulated_ones_are_all_made():
    found, _ = learn(DOMAIN, allowed_nats=0.05, num_confirmed=4, num_simulated=1, ppo=replace(PPO, num_epochs=2))
    assert {len(one.gain) for one in found.tried if len(one.gain)} == {4}


def test_losses_that_are_noise_are_not_trusted_and_no_policy_is_learned():
    world, _ = linear_world(DOMAIN)
    found, _ = learn(DOMAIN, learner=Trainer(world, noise=0.05), allowed_nats=5.0, ppo=replace(PPO, num_epochs=3))
    assert not found.settled.accepted
    assert found.trained is None
    assert LEARNED not in [one.name for one in found.tried]
    assert "the simulator is not trusted" in found.notes[0]
    assert "fall back to ogs_dual" in found.notes[0]
    assert f"no learned policy stood in the contest; {found.policy} is returned" in found.notes


class Opaque(Trainer):
    """Rows explain nothing: the target moves at random and every decision harms the source as much as any other."""

    def __init__(self, world: Quadratic, harm: float, later: float) -> None:
        super().__init__(world)
        self.harm, self.later = harm, later

    def roll(self, rows, name):
        random = stream(0, f"noise/{rows.tobytes().hex()}").numpy()
        steps = np.arange(len(rows) + 1)
        target = 2 + 0.3 * random.normal(size=len(steps)) * (steps > 0)
        return Rollout(name, rows, target, 2 + (self.harm if "calib" in name else self.later) * steps[:, None])


QUICK = replace(PPO, num_epochs=2)


def test_what_a_distrusted_simulator_says_of_the_limits_refuses_nothing():
    """It finds nothing that keeps them; roll-outs that were not part of it do."""
    kinds = (OPPOSED, OPPOSED)
    learner = Opaque(linear_world(kinds)[0], 0.1, 0.0)
    found, _ = learn(kinds, learner=learner, allowed_nats=0.05, ppo=QUICK)
    assert not found.settled.accepted
    assert found.feasible
    assert sum(note.startswith("in the simulator, which is not trusted: PROBABLY") for note in found.notes) == 1


def test_limits_that_nothing_keeps_are_refused_with_the_smallest_rise():
    """Every row harms: the smallest rise that any episode can reach is that of four decisions."""
    kinds = (OPPOSED, (2.0, -1.0))
    with pytest.raises(InfeasibleError) as refusal:
        learn(kinds, allowed_nats=0.05)
    assert "smallest rise reached" in refusal.value.got
    assert "source0 0.2" in refusal.value.got  # 4 decisions of 0.05
    assert "limit 0.05" in refusal.value.got
    found, _ = learn(kinds, allowed_nats=0.05, infeasible="least")
    assert not found.feasible
    assert set(found.actions.tolist()) == {1}
    assert any("no policy kept every limit on its real roll-outs" in note for note in found.notes)
    assert any(note.startswith("PROBABLY INFEASIBLE") and "source0" in note for note in found.notes)


def test_limits_that_only_real_roll_outs_break_are_refused_as_well():
    """No simulator is trusted, so that the contest alone can tell."""
    kinds = (OPPOSED, CLEAN)
    world, _ = linear_world(kinds)
    with pytest.raises(InfeasibleError) as refusal:
        learn(kinds, learner=Opaque(world, 0.1, 0.2), allowed_nats=0.05, ppo=QUICK)
    assert refusal.value.what == "no policy kept every limit on its real roll-outs"
    assert "source0 0.4 (limit 0.05)" in refusal.value.got or "source0 0.6 (limit 0.05)" in refusal.value.got
    assert "infeasible=least" in refusal.value.do
    found, _ = learn(kinds, learner=Opaque(world, 0.1, 0.2), allowed_nats=0.05, ppo=QUICK, infeasible="least")
    assert not found.feasible
    assert "the one that broke them least is returned" in "; ".join(found.notes)
    real = [one for one in found.tried if len(one.gain)]
    assert returned(found).excess(found.limits) == min(one.excess(found.limits) for one in real)


SLOW = replace(PPO, num_epochs=4, num_episodes=4)


def on_navigator(states=None, stop=0, **settings):
    world, _ = linear_world(DOMAIN)
    given = {"on": "navigator", "ppo": SLOW, "allowed_nats": 0.05, "num_confirmed": 1, **settings}
    return learn(DOMAIN, learner=Trainer(world, states=states, stop=stop), **given)


@cache
def whole():
    return on_navigator()


def same_schedule(one: Schedule, two: Schedule) -> None:
    assert (one.policy, one.notes) == (two.policy, two.notes)
    assert np.array_equal(one.rows, two.rows)
    assert one.trained is not None
    assert two.trained is not None
    for name, value in vars(one.trained.state.history).items():
        assert np.array_equal(value, getattr(two.trained.state.history, name)), name
    assert np.array_equal(one.trained.state.actor.weights, two.trained.state.actor.weights)
    assert [(t.name, t.gain.tolist(), t.rise.tolist()) for t in one.tried] == [
        (t.name, t.gain.tolist(), t.rise.tolist()) for t in two.tried
    ]


def test_on_the_navigator_the_policy_is_trained_in_the_learner_itself():
    found, learner = whole()
    assert learner.saved == SLOW.num_epochs
    assert len(learner.states) == 1
    # probe, then sampled and greedy episodes of each epoch
    assert learner.dynamics.num_resets >= 1 + 2 * SLOW.num_epochs
    assert learner.dynamics.num_steps >= 4 * learner.dynamics.num_resets
    state = found.trained.state
    assert found.trained.num_decisions == state.probe.num_decisions + state.history.decisions.sum()
    assert state.probe.num_decisions > 0
    assert found.trained.num_decisions >= 4 * (SLOW.num_episodes + 1) * SLOW.num_epochs
    assert tight()[1].dynamics.num_resets == 0
    assert tight()[1].saved == 0
    probe = found.trained.state.probe  # what real episodes reach, not simulated ones
    assert probe.gain[1] == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_that_is_stopped_goes_on_to_the_same_schedule_and_history(stop):
    states: dict = {}
    with pytest.raises(Stopped):
        on_navigator(states, stop=stop)
    assert len(states) == (stop > 1)
    again, learner = on_navigator(states)
    assert learner.saved == SLOW.num_epochs - (stop - 1)
    same_schedule(again, whole()[0])
    done, learner = on_navigator(states)
    assert learner.saved == learner.dynamics.num_resets == 0  # nothing is left to train
    same_schedule(done, whole()[0])


@pytest.mark.parametrize(
    "change", [{"allowed_nats": 5.0}, {"budget": 9}, {"seed": 1}, {"ppo": replace(SLOW, num_epochs=3)}], ids=str
)
def test_a_state_serves_no_other_training(change):
    """Other limits, another budget, seed or settings: what stands there from before is left alone."""
    states = dict(whole()[1].states)
    other, learner = on_navigator(states, **change)
    fresh, _ = on_navigator(**change)
    assert len(states) == 2
    assert learner.dynamics.num_resets > 0
    same_schedule(other, fresh)


def test_a_pool_too_small_for_different_schedules_is_played_out():
    """Two rows leave two orders: nothing can be regressed, and that is said."""
    world, table = linear_world((CLEAN, IDLE))
    table = Table(tuple(some[:1] for some in table.members), table.price, table.features, table.feature_names,
                  table.general)  # fmt: skip
    config = LearnConfig(allowed_nats=5.0, rows_per_decision=1, ppo=replace(PPO, num_epochs=2), num_simulated=2)
    found = learn_schedule(table, 2, exact(world)[0], Trainer(world), config, stream(0, "x"))
    assert sorted(found.rows.ravel().tolist()) == sorted(some[0] for some in table.members)
    assert any("too few to regress" in note for note in found.notes)
    assert not [one for one in found.tried if one.name.startswith("mixture")]


@pytest.mark.parametrize(("budget", "wanted"), [(40, 4), (4, 1), (15, 2)])
def test_a_decision_takes_a_tenth_of_the_budget(budget, wanted):
    class Asked(Exception):
        pass

    class Asking(Trainer):
        def start(self, rows_per_decision):
            raise Asked(rows_per_decision)

    world, table = linear_world(DOMAIN)
    for price in (1, 7):  # in tokens as in rows
        priced = replace(table, price=np.full(len(table.price), price))
        with pytest.raises(Asked) as asked:
            learn_schedule(
                priced, budget * price, exact(world)[0], Asking(world), LearnConfig(ppo=PPO), stream(0, "select")
            )
        assert asked.value.args == (wanted,)


@pytest.mark.parametrize(
    "settings",
    [{"allowed_rise": 0.0}, {"allowed_rise": np.inf}, {"num_confirmed": 0}, {"num_simulated": 0},
     {"rows_per_decision": 0}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        LearnConfig(**settings)


@pytest.mark.parametrize("limit", [0.0, np.nan, np.inf])
def test_a_limit_that_measures_nothing_is_refused(limit):
    with pytest.raises(ConfigError, match="limit"):
        learn(DOMAIN, allowed_nats=limit)
