"""The scientific trials in small: each is measured on a tiny world, and each must go red on its planted defect."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.trials import (
    common,
    t08_lds,
    t09_groups,
    t10_conflict,
    t11_duplicates,
    t12_label_noise,
    t13_length,
    t17_stability,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.compare.arithmetic import ArithmeticSettings, arithmetic_world
from gradsift.evaluate.lds import half_subsets
from gradsift.gradients.loop import example_gradient
from gradsift.seeds import stream

RESULTS = Path(__file__).parents[2] / "docs/results/trials"
MODULES = [t08_lds, t09_groups, t10_conflict, t11_duplicates, t12_label_noise, t13_length, t17_stability]
TRIALS = {m.TRIAL.name: m.TRIAL for m in MODULES}
SHORT = common.Training(lr=1e-3, num_steps=6, batch_size=16)
TINY = ArithmeticSettings(
    modulus=11, clean=60, replay=60, conflict=60, noise=40, duplicate=16, irrelevant=40, num_eval=20, num_anchor=24,
    num_target=16, num_replay=8, pretrain_steps=60, hidden=16, layers=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield arithmetic_world(5, TINY)
    patch.undo()


def missed(outcome):
    return [check.name for check in outcome.checks if not check.met]


# T8


def lds_figures(sign=1.0, own=True):
    """Retraining simulated: outputs are noisy sums of the true scores."""
    rng = np.random.default_rng(0)
    ids = [f"r{k}" for k in range(120)]
    truth, nll = rng.normal(size=(120, 59)), np.repeat(rng.normal(size=(120, 1)), 59, axis=1)
    members = half_subsets(ids, 60, stream(0, "test"))
    outputs = members @ truth + 6 * rng.normal(size=(3, 60, 59))
    score = sign * (truth if own else np.roll(truth, 1, axis=0))
    scores = {t08_lds.DEFAULT: score, "NLL, start": nll, "sign error": -score, "cosine, trained": score}
    return {0: {"B": t08_lds.tabulate(scores | {"random": rng.normal(size=(120, 59))}, members, outputs)}}


def test_t8_accepts_the_truth_and_a_sign_error_or_foreign_scores_go_red():
    assert t08_lds.judge(lds_figures()).met
    turned = missed(t08_lds.judge(lds_figures(sign=-1.0)))
    assert len(turned) == 3
    assert "sign error" in turned
    assert any("LDS of the default" in name for name in missed(t08_lds.judge(lds_figures(own=False))))


def test_t8_scores_are_the_oracles_and_small_runs(world):
    rows, targets = t08_lds.draw_rows(world, 6), world.evaluations[0].rows[:3]
    model = world.make_model()
    got = t08_lds.pair_scores(world, model, rows, targets)

    def gradient(row):
        names = [name for name, _ in model.named_parameters()]
        ids = torch.tensor(row.input_ids.astype(np.int64))
        found = example_gradient(model.eval(), names, ids, torch.where(torch.tensor(row.trained), ids, -100))
        return torch.cat([found.by_name[n].flatten() for n in names]).double().numpy()

    a, b = (np.stack([gradient(row) for row in some]) for some in (rows, targets))
    np.testing.assert_allclose(got["dot"], a @ b.T, rtol=1e-4, atol=1e-4 * np.abs(a @ b.T).max())
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(got["cosine"], a @ b.T / lengths, atol=1e-4)
    figures = t08_lds.measure(5, world, SHORT, (24, 5, 8, 2))
    assert set(figures) >= {"A", "B"}
    assert figures["B"]["num_targets"] == 5
    table = figures["A"]["scores"]
    assert table["sign error"]["lds"] == pytest.approx(-table[t08_lds.DEFAULT]["lds"])


# T9


def group_figures(roll=0, sign=1):
    names = [f"{kind} {g}" for kind, n in t09_groups.GROUPS.items() for g in range(n)]
    rise = np.random.default_rng(1).normal(size=(10, len(names)))
    score = sign * np.roll(rise, roll, axis=1) + 0.1
    return {
        seed: {
            "rise": dict(zip(names, rise[seed], strict=True)),
            "scores": {s: dict(zip(names, score[seed], strict=True)) for s in t09_groups.SCORES},
        }
        for seed in range(10)
    }


def test_t9_accepts_the_truth_and_shifted_labels_or_a_sign_error_go_red():
    assert t09_groups.judge(group_figures()).met
    for defect in (group_figures(roll=1), group_figures(sign=-1)):
        assert len(missed(t09_groups.judge(defect))) == 2
    turned = group_figures(sign=-1)[0]
    assert len(t09_groups.wrong_sign(turned)) > 6


def test_t9_small(world):
    figures = t09_groups.measure(5, world, SHORT, size=5, runs=2)
    assert len(figures["rise"]) == 12
    assert all(set(s) == set(figures["rise"]) for s in figures["scores"].values())
    assert t09_groups.planted_groups(world, 5)["duplicate 0"][0].input_ids.tolist() == (
        t09_groups.planted_groups(world, 5)["duplicate 0"][4].input_ids.tolist()
    )


# T10


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 3), min_size=2, max_size=24), st.integers(1, 12), st.floats(0.01, 1.0))
def test_t10_pairs_use_each_row_once_within_the_caliper_and_leave_none_that_fits(loss, cut, caliper):
    loss, cut = np.array(loss), min(cut, len(loss) - 1)
    positive, negative = np.arange(cut), np.arange(cut, len(loss))
    pairs = t10_conflict.matched(loss, positive, negative, caliper)
    assert (np.abs(loss[pairs[:, 0]] - loss[pairs[:, 1]]) <= caliper).all()
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    left = [(a, b) for a in positive if a not in pairs[:, 0] for b in negative if b not in pairs[:, 1]]
    assert all(abs(loss[a] - loss[b]) > caliper for a, b in left)


def conflict_figures(signal=1.0, loss_gap=0.0):
    """Ten seeds of rows whose conflict shows in the cosine (not in the loss), as planted."""
    figures = {}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        kinds = np.array(["conflict"] * 100 + ["replay"] * 100 + ["clean"] * 50)
        is_conflict = kinds == "conflict"
        loss = rng.normal(2, 0.5, size=250) + loss_gap * is_conflict
        scores = {"-cos A": 2 * signal * is_conflict + rng.normal(size=250), "NLL": loss}
        figures[seed] = {stage: t10_conflict.tabulate(kinds, loss, scores) for stage in t10_conflict.STAGES}
    return figures


def test_t10_accepts_a_planted_conflict_and_its_defects_go_red():
    good = t10_conflict.judge(conflict_figures())
    assert good.met
    assert not good.wording
    for defect in (conflict_figures(signal=-1.0), conflict_figures(signal=0.0)):  # sign error, permuted scores
        outcome = t10_conflict.judge(defect)
        assert len(missed(outcome)) == 4
        assert all(t10_conflict.NO_BETTER in words for words in outcome.wording)


def test_t10_says_no_better_than_loss_when_loss_tells_all():
    outcome = t10_conflict.judge(conflict_figures(loss_gap=50.0))
    assert missed(outcome) == [c.name for c in outcome.checks if "matched" in c.name]
    assert t10_conflict.NO_BETTER in outcome.line()


def test_t10_small(world):
    by_chance = t10_conflict.right_by_chance(world)
    assert by_chance == {
        r.id for r in world.pool
        if world.kinds[r.id] == "conflict" and (r.input_ids[1] + r.input_ids[3]) % 11 == r.input_ids[5]
    }  # fmt: skip
    figures = t10_conflict.measure(5, world, SHORT, budget=60)
    assert figures["num_right_by_chance"] == len(by_chance) > 0
    for stage in t10_conflict.STAGES:
        assert figures[stage]["against_replay"]["length"] == 0.5
        assert 0 <= figures[stage]["against_replay"]["-cos A"] <= 1


# T11


def test_t11_exact_copies_take_nothing_unless_they_go_uncounted(world, monkeypatch):
    monkeypatch.setattr(t11_duplicates, "FRACTION", 90.0)  # so that most rows are chosen, the copies among them
    good = t11_duplicates.measure(5, world, (0.2,), 60)
    cell = good["0.20"]
    assert cell["usable_by_kind"]["exact"] == 0 < cell["planted_by_kind"]["exact"]
    assert cell["usable_by_kind"]["filler"] > 0  # white space is not an exact copy, and the figures say so
    assert not [name for name in missed(t11_duplicates.judge({5: good})) if "exact" in name]
    defect = t11_duplicates.measure(5, world, (0.2,), 60, dedup="keep")
    assert [name for name in missed(t11_duplicates.judge({5: defect})) if "exact" in name]
    assert defect["0.20"]["gradients"]["exact"]["recall"] == 1.0
    assert defect["0.20"]["gradients"]["exact"]["cosine"] == pytest.approx(1.0)


# T12


def test_t12_plants_exactly_the_noise_it_says(world):
    rows, wrong = t12_label_noise.noisy_rows(world, 0.2)
    right = [min(r.input_ids[1], r.input_ids[3]) == r.input_ids[5] for r in rows]
    np.testing.assert_array_equal(~wrong, right)
    assert wrong.sum() == round(0.2 * len(rows))
    assert len({row.id for row in rows}) == len(rows)


def noise_figures(shift=0, sign=1):
    figures = {}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        wrong = np.arange(200) % 5 == 0
        scores = {"-cos B": sign * (1.5 * wrong + rng.normal(size=200)), "NLL": rng.normal(size=200)}
        flags = np.roll(wrong, shift)
        cell = {n: t12_label_noise.auc(s[flags], s[~flags]) for n, s in scores.items()}
        figures[seed] = {"0.20": dict.fromkeys(t12_label_noise.STAGES, cell)}
    return figures


def test_t12_accepts_what_beats_the_loss_and_a_label_shift_or_sign_error_goes_red():
    assert t12_label_noise.judge(noise_figures()).met
    for defect in (noise_figures(shift=1), noise_figures(sign=-1)):
        outcome = t12_label_noise.judge(defect)
        assert len(missed(outcome)) == 2
        assert "no better than loss" in outcome.line()


def test_t12_small_and_discovery(world):
    figures = t12_label_noise.measure(5, world, SHORT, (0.2,))
    assert set(figures["0.20"]) >= {"start", "trained", "start_discovery"}
    wrong = np.arange(100) < 10
    assert t12_label_noise.discovery(wrong.astype(float), wrong) == [0.5] + [1.0] * 6
    assert t12_label_noise.discovery(-wrong.astype(float), wrong)[:6] == [0.0] * 6


# T13


def length_figures(score_of):
    figures = {}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        length = np.floor(np.exp(rng.uniform(np.log(4), np.log(129), 400)))
        quality = rng.choice([0.0, -0.3, -0.6], 400)
        score = score_of(quality + 0.1 * rng.normal(size=400), length)
        both = {"cosine, mean loss": score, "cosine, sum loss": score}
        figures[seed] = {"scores": t13_length.tabulate(length, quality, both)}
    return figures


def test_t13_accepts_a_score_of_quality_and_a_sum_over_tokens_goes_red():
    assert t13_length.judge(length_figures(lambda quality, length: quality)).met
    assert len(missed(t13_length.judge(length_figures(lambda quality, length: (1 + quality) * length)))) == 4


def test_t13_small_and_the_sum_is_the_mean_times_the_tokens():
    text = t13_length.text_of(5, 40, 15, 24)
    lengths = [row.num_tokens for row in text.pool]
    assert 4 <= min(lengths) <= max(lengths) <= 24
    figures = t13_length.measure(5, text)
    assert set(figures["scores"]) >= {"cosine, mean loss", "dot, sum loss"}
    single = replace(text, target=text.target[:1])  # with one target row both directions are the same
    problem = t13_length.rescore(
        single.model, single.pool, {"A": text.anchor}, single.target, t13_length.RescoreConfig(), pad_id=t13_length.PAD
    ).problem
    scores = t13_length.scores_of(single, problem)
    np.testing.assert_allclose(scores["cosine, sum loss"], scores["cosine, mean loss"], atol=1e-4)


# T17


def test_t17_same_signals_agree_and_permuted_ones_fall_to_chance(world):
    rows = common.distinct(world)
    problem = common.signals(world, world.make_model(), rows)
    order = np.random.default_rng(0).permutation(problem.size)
    names = ("loss", "grad_norm", "anchor_dot", "target_dot", "emb_grad_norm", "head_grad_norm")
    dealt = replace(problem, **{n: getattr(problem, n)[order].copy() for n in names})
    same, chance = (t17_stability.agreement([problem, other], 5) for other in (problem, dealt))
    assert set(same["jaccard"].values()) == {1.0}
    assert min(same["rho"].values()) == pytest.approx(1.0)
    assert max(chance["jaccard"].values()) < 0.4
    assert max(map(abs, chance["rho"].values())) < 0.3
    views = dict.fromkeys(("weights", "checkpoints", "anchors"), same)
    moved = t17_stability.transfer(problem, problem)
    good = t17_stability.judge({5: views | {"transfer": moved, "same_size": moved}})
    lost = t17_stability.transfer(problem, dealt)
    bad = t17_stability.judge({5: views | {"transfer": lost, "same_size": moved}})
    assert good.met
    assert not bad.met


def test_t17_small(world):
    found = t17_stability.views(world, [world.make_model()] * 2, SHORT, (0, 2))
    assert {name: len(problems) for name, problems in found.items()} == {"weights": 2, "checkpoints": 2, "anchors": 5}
    np.testing.assert_array_equal(found["weights"][0].loss, found["checkpoints"][0].loss)
    again = t17_stability.draw_again(world.target, "x", 1)
    assert len({row.id for row in again}) == len(world.target)
    assert len({row.input_ids.tobytes() for row in again}) < len(world.target)


# What is written


def test_a_run_prints_one_line_and_writes_where_it_came_from(tmp_path, capsys):
    trial = common.Trial("T0", range(2), lambda seed: {"x": np.float64(seed), "bad": np.nan}, lambda figures: common.Outcome(
        "T0", (common.Check("x", str(len(figures)), ">= 3", len(figures) >= 3),), ("no advantage",)))  # fmt: skip
    common.run_trial(trial, [0, 1], tmp_path / "t0.json", "python t0.py")
    assert capsys.readouterr().out == "T0: missed; x 2 (asked >= 3: missed); no advantage\n"
    record = json.loads((tmp_path / "t0.json").read_text())
    assert record["per_seed"] == {"0": {"x": 0.0, "bad": None}, "1": {"x": 1.0, "bad": None}}
    assert set(record) >= {"command", "date", "commit", "hardware", "settings", "seeds", "checks", "wording", "met"}
    assert common.parse_seeds("0-2,7") == [0, 1, 2, 7]


@pytest.mark.parametrize("name", sorted(TRIALS))
def test_committed_results_follow_from_their_figures(name):
    record = committed(name)
    outcome = TRIALS[name].judge({int(seed): f for seed, f in record["per_seed"].items()})
    assert outcome.line() == record["line"]
    assert record["settings"] == common.plain(dict(TRIALS[name].settings))
    assert record["seeds"] == list(TRIALS[name].seeds)


def committed(name):
    return json.loads((RESULTS / f"t{int(name[1:]):02d}.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["T10", "T11", "T12", "T13"])
def test_the_first_seed_gives_its_committed_figures(name):
    """Another processor rounds in another way, and training carries that on: AUCs may move in the second digit."""
    record, trial = committed(name), TRIALS[name]
    seed = record["seeds"][0]
    again = copy.deepcopy(record["per_seed"])
    again[str(seed)] = common.plain(trial.measure(seed))

    def leaves(tree):
        if isinstance(tree, dict):
            return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
        return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, list) else [tree]

    old, new = leaves(record["per_seed"][str(seed)]), leaves(again[str(seed)])
    assert len(old) == len(new)
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if isinstance(a, float) and isinstance(b, float)]
    assert np.mean([abs(a - b) for a, b in pairs]) < 0.02
