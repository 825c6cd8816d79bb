"""tlm, ifd, dsir, daar, thtb, memory_level: what each says, refuses and weighs, beyond the contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from gradsift.errors import ConfigError, DataError, InfeasibleError
from gradsift.geometry.recall import recall_level, recalls
from gradsift.methods import make_method
from gradsift.methods.dsir import gumbel
from gradsift.seeds import stream
from gradsift.types import Budget, Noise
from planted import planted_world

PROBLEM = planted_world("gradient").problem()
DAAR = {"num_domains": 3, "probe_share": 1.0, "rows_per_domain": 1, "min_accuracy": 0.0, "steps": 60}
SHORT = {"max_answer": 10**6}


def choose(name, settings=None, problem=PROBLEM, budget=None, seed=1):
    return make_method(name, settings or {}).select(problem, budget or Budget(rows=24), stream(seed, f"select/{name}"))


def codes(selection):
    return {note.code: note for note in selection.notes}


def changed(**fields):
    return replace(PROBLEM, **{name: np.array(value) for name, value in fields.items()})


# -- tlm -----------------------------------------------------------------------------------------------------------


def test_weights_are_proportional_to_clipped_perplexity_with_mean_one():
    got = choose("tlm", {"clip": 0.9})
    loss = dict(zip(PROBLEM.ids, PROBLEM.prompt_loss, strict=True))
    top = np.sort(PROBLEM.prompt_loss)[int(np.ceil(0.9 * 159))]
    want = np.exp([min(loss[name], top) for name in got.ids])
    assert got.weights == pytest.approx(want / want.mean(), rel=1e-5)
    assert codes(got)["clipped"].count == int((PROBLEM.prompt_loss > top).sum())
    assert (choose("tlm", {"weights": "none"}).weights == 1).all()
    everyone = choose("tlm", {"share": 1.0}, budget=Budget(rows=160))
    assert everyone.weights.mean() == pytest.approx(1)
    assert everyone.weights.min() > 0


def test_short_prompts_are_left_out_and_counted():
    count = np.array(PROBLEM.num_prompt)
    count[[0, 5]] = [0, 7]
    loss = np.array(PROBLEM.prompt_loss)
    loss[[0, 5]] = 50  # they would be the most surprising
    got = choose("tlm", problem=changed(num_prompt=count, prompt_loss=loss))
    assert codes(got)["short_prompt"].count == 2
    assert not {PROBLEM.ids[0], PROBLEM.ids[5]} & set(got.ids)
    assert got.reason_code[5] == "dropped:short_prompt"
    with pytest.raises(InfeasibleError, match="no row has a prompt of 8"):
        choose("tlm", problem=changed(num_prompt=count * 0))


def test_the_absolute_threshold_says_when_it_does_nothing_or_takes_nothing():
    assert "no_effect" in codes(choose("tlm", {"mode": "absolute", "log_threshold": -1.0}))
    with pytest.raises(InfeasibleError, match="above the threshold") as refusal:
        choose("tlm", {"mode": "absolute", "log_threshold": 30.0})
    assert "mode=quantile" in refusal.value.do


@pytest.mark.parametrize("settings", [{"share": 0.01}, {"mode": "absolute"}])
def test_a_clip_below_the_threshold_is_refused_and_not_weighed_with_nothing(settings):
    loss = np.array(PROBLEM.prompt_loss)
    edge = float(np.sort(loss)[-3])  # two of 160 prompts are above
    settings = {**settings, "clip": 0.9, **({"log_threshold": edge} if "mode" in settings else {})}
    with pytest.raises(InfeasibleError, match="clipped at or below the threshold") as refusal:
        choose("tlm", settings, budget=Budget(rows=1))
    assert "clip=1" in refusal.value.do
    got = choose("tlm", {**settings, "clip": 1.0}, budget=Budget(rows=1))
    assert got.weights.tolist() == [1.0]
    with pytest.raises(InfeasibleError, match="leaves no row"):  # equal prompts: no threshold parts them
        choose("tlm", {"clip": 0.9}, changed(prompt_loss=np.ones(160)))


# -- ifd -----------------------------------------------------------------------------------------------------------


def test_ratios_of_one_and_more_and_rows_without_a_ratio_are_left_out_and_counted():
    loss, alone = np.array(PROBLEM.loss), np.array(PROBLEM.alone_loss)
    alone[3], alone[4], alone[6] = loss[3], 0.0, loss[6] * 1.0001
    tokens = np.array(PROBLEM.num_tokens)
    tokens[8] = PROBLEM.num_trained[8] + 1
    problem = changed(alone_loss=alone, num_tokens=tokens)
    got = choose("ifd", problem=problem)
    assert [got.reason_code[k] for k in (3, 4, 8)] == ["dropped:misaligned", "dropped:no_ratio", "dropped:no_prompt"]
    assert got.ids[0] == PROBLEM.ids[6]  # just below 1
    assert codes(got)["no_ratio"].count == codes(got)["no_prompt"].count == 1
    assert np.isnan(got.score[[4, 8]]).all()
    with pytest.raises(InfeasibleError, match="no row has a ratio below 1"):
        choose("ifd", problem=changed(alone_loss=loss / 2))


def test_the_bound_of_a_ratio_covers_every_measurement_within_the_noise():
    problem = replace(PROBLEM, noise=Noise(loss=1e-3, num_rows=8))
    first = choose("ifd", problem=problem)
    rng = np.random.default_rng(0)
    for _ in range(30):
        moved = {n: getattr(problem, n) + 1e-3 * rng.uniform(-1, 1, size=160) for n in ("loss", "alone_loss")}
        again = choose("ifd", problem=replace(problem, **moved))
        both = np.isfinite(first.score) & np.isfinite(again.score) & (problem.loss < problem.alone_loss)
        assert np.abs(again.score - first.score)[both].max() <= first.cut.bound / 4


# -- dsir ----------------------------------------------------------------------------------------------------------


def test_rows_are_drawn_in_proportion_to_their_weights():
    got = choose("dsir", seed=5)
    want = PROBLEM.importance + gumbel(PROBLEM.ids, stream(5, "select/dsir").child("draw"))
    assert np.array_equal(got.score, want)
    log_weight = np.log([0.2, 0.3, 0.5])
    draws = np.array([gumbel(("a", "b", "c"), stream(seed, "g")) for seed in range(4000)])
    first = (log_weight + draws).argmax(axis=1)
    assert np.bincount(first) / 4000 == pytest.approx([0.2, 0.3, 0.5], abs=0.025)  # three standard errors
    assert draws.mean() == pytest.approx(0.5772, abs=0.04)
    assert draws.var() == pytest.approx(np.pi**2 / 6, rel=0.06)


def test_the_top_draws_nothing():
    first, other = (choose("dsir", {"draw": "top"}, seed=seed) for seed in (1, 2))
    assert first.ids == other.ids
    assert np.array_equal(first.score, PROBLEM.importance)


# -- daar ----------------------------------------------------------------------------------------------------------


def test_a_probe_that_knows_no_domain_is_refused_and_a_small_pool_too():
    noise = np.random.default_rng(0).normal(size=PROBLEM.hidden.shape).astype(np.float32)
    with pytest.raises(DataError, match="not separable at layer 3"):
        choose("daar", {**DAAR, "min_accuracy": 0.8}, changed(hidden=noise))
    with pytest.raises(DataError, match="too small for a probe"):
        choose("daar")


def test_entropies_are_the_probes_and_the_inverse_takes_the_others():
    first, inverse = choose("daar", DAAR), choose("daar", {**DAAR, "order": "inverse"})
    assert np.array_equal(first.score, -inverse.score)
    assert first.score.min() >= 0
    assert first.score.max() <= np.log(3) + 1e-12
    assert not set(first.ids) & set(inverse.ids)
    assert set(np.unique(first.cluster)) <= {0, 1, 2}
    assert len(first.details["probe_rows"]) == codes(first)["probe_rows"].count == 160


def test_a_preferred_domain_may_give_half_of_its_rows():
    got = choose("daar", {**DAAR, "domains": "sources", "prefer": "s1"}, budget=Budget(rows=160))
    per = {s: sum(PROBLEM.sources[PROBLEM.ids.index(i)] == s for i in got.ids) for s in ("s0", "s1", "s2")}
    sizes = {s: PROBLEM.sources.count(s) for s in per}
    assert per["s1"] == int(sizes["s1"] * 0.5 + 0.5)
    assert per["s0"] == int(sizes["s0"] * 0.1 + 0.5)
    assert "shortage" in codes(got)
    with pytest.raises(ConfigError, match="no such domain"):
        choose("daar", {**DAAR, "domains": "sources", "prefer": "law"})
    with pytest.raises(ConfigError, match="no such domain"):  # numbers are known without a pool
        make_method("daar", {**DAAR, "prefer": "law"})
    with pytest.raises(ConfigError, match="at least two domains"):
        choose("daar", {**DAAR, "domains": "sources"}, replace(PROBLEM, sources=("one",) * 160))


def test_equal_rows_are_said_to_be_equal():
    same = np.ones(PROBLEM.hidden.shape, dtype=np.float32)
    found = codes(choose("daar", DAAR, changed(hidden=same)))
    assert {"saturated", "small_domain"} <= set(found)


def test_only_columns_of_seeds_are_asked_for_where_they_are_named():
    assert make_method("daar", {}).needs.columns == ()
    assert [c.name for c in make_method("daar", {"seeds": "topic"}).needs.columns] == ["topic"]
    assert make_method("daar", {"layer": 5}).needs.layers == (0, 5)


# -- thtb ----------------------------------------------------------------------------------------------------------

HARD = planted_world("hard")
HARD_PROBLEM = HARD.problem()


def test_the_planted_hard_rows_are_found_and_shuffled_columns_lose_them():
    budget = Budget(rows=16)
    good = np.isin(HARD_PROBLEM.ids, list(HARD.good))

    def hits(problem):
        return np.mean([name in HARD.good for name in choose("thtb", problem=problem, budget=budget).ids])

    assert hits(HARD_PROBLEM) >= 0.9
    order = np.random.default_rng(0).permutation(160)
    external = {name: column[order].copy() for name, column in HARD_PROBLEM.external.items()}
    plain = replace(HARD_PROBLEM, external=external, num_trained=np.full(160, 20), num_tokens=np.full(160, 32))
    assert hits(plain) <= good.mean() + 0.25


def test_every_stage_keeps_a_subset_of_exact_size_and_says_who_left():
    got = choose("thtb", problem=HARD_PROBLEM, budget=Budget(rows=16))  # a tenth: 64, 32, 16
    counts = {code: got.reason_code.count(code) for code in set(got.reason_code)}
    assert counts == {"dropped:quality": 96, "dropped:intrinsic": 32, "dropped:budget": 16, "kept:extrinsic": 16}
    reward = HARD_PROBLEM.external["reward"]
    left = np.array([code == "dropped:quality" for code in got.reason_code])
    assert reward[left].max() <= reward[~left].min()


def test_a_row_that_left_at_stage_one_changes_nothing_after():
    first = choose("thtb", problem=HARD_PROBLEM, budget=Budget(rows=16))
    gone = first.reason_code.index("dropped:quality")
    bloom = np.array(HARD_PROBLEM.external["bloom"])
    bloom[gone] = 21.0
    again = choose("thtb", problem=replace(HARD_PROBLEM, external={**HARD_PROBLEM.external, "bloom": bloom}),
                   budget=Budget(rows=16))  # fmt: skip
    assert np.array_equal(first.score, again.score, equal_nan=True)


def test_a_larger_reward_never_removes_a_row_at_stage_one():
    first = choose("thtb", problem=HARD_PROBLEM, budget=Budget(rows=16))
    for k in range(0, 160, 7):
        reward = np.array(HARD_PROBLEM.external["reward"])
        reward[k] += 0.5
        problem = replace(HARD_PROBLEM, external={**HARD_PROBLEM.external, "reward": reward})
        again = choose("thtb", problem=problem, budget=Budget(rows=16))
        if first.reason_code[k] != "dropped:quality":
            assert again.reason_code[k] != "dropped:quality"


def test_units_differ_in_the_last_stage_only():
    tokens, chars = (choose("thtb", {"unit": unit}, HARD_PROBLEM, Budget(rows=16)) for unit in ("tokens", "chars"))
    early = ("dropped:quality", "dropped:intrinsic")
    assert [c if c in early else "" for c in tokens.reason_code] == [c if c in early else "" for c in chars.reason_code]


def test_what_the_columns_cannot_say_is_said():
    external = dict(PROBLEM.external)
    flat = {**external, "reward": np.full(160, 9.0)}
    got = choose("thtb", problem=replace(PROBLEM, external=flat))
    assert {"clipped", "constant"} <= set(codes(got))
    assert [c for c, n in zip(got.reason_code, PROBLEM.ids, strict=True)].index("dropped:quality") >= 96
    for name, index, value, match in (
        ("bloom", 4, 22.0, "thinking level"),
        ("discipline_vectors", 4, ((1.0,),) * 9, "do not fit"),
    ):
        column = external[name].copy()
        column[index] = value
        with pytest.raises(DataError, match=match) as refusal:
            choose("thtb", problem=replace(PROBLEM, external={**external, name: column}))
        assert PROBLEM.ids[4] in refusal.value.where
    count = np.array(PROBLEM.num_prompt)
    count[:3] = 0
    assert codes(choose("thtb", problem=changed(num_prompt=count)))["no_prompt"].count == 3


# -- memory_level --------------------------------------------------------------------------------------------------


def facts(hits, **fields):
    counts = np.empty(160, dtype=object)
    counts[:] = [(float(h),) * 21 for h in hits]
    return replace(PROBLEM, external={**PROBLEM.external, "recall_counts": counts}, **fields)


def test_rows_of_one_level_are_drawn_in_turn_over_relations():
    problem = facts(np.arange(160) % 11)
    got = choose("memory_level", {**SHORT, "relation": "relation"}, problem, Budget(rows=12))
    rows = [PROBLEM.ids.index(i) for i in got.ids]
    assert {recall_level(21 * (k % 11), 210) for k in rows} == {2}
    relations = [PROBLEM.external["relation"][k] for k in rows]
    assert max(map(relations.count, set(relations))) - min(map(relations.count, set(relations))) <= 1


def test_a_level_with_too_few_facts_is_a_shortage_or_widened_by_its_neighbors():
    problem = facts([4] * 5 + [6] * 50 + [1] * 50 + [0] * 55)
    short = choose("memory_level", SHORT, problem, Budget(rows=40))
    assert len(short.ids) == 5
    assert "shortage" in codes(short)
    wide = choose("memory_level", {**SHORT, "widen": True}, problem, Budget(rows=40))
    assert len(wide.ids) == 40
    assert set(PROBLEM.ids[:5]) <= set(wide.ids[:5])
    assert not set(PROBLEM.ids[105:]) & set(wide.ids)  # never the unknown
    assert codes(wide)["widened"].count == 100


def test_what_is_no_set_of_known_facts_is_refused():
    with pytest.raises(ConfigError, match="level 0"):
        make_method("memory_level", {"level": 0})
    blank = replace(facts([4] * 160), texts=(("which", " "), *PROBLEM.texts[1:]))
    with pytest.raises(DataError, match="a fact has no object") as refusal:
        choose("memory_level", SHORT, blank)
    assert PROBLEM.ids[0] in refusal.value.where
    assert len(choose("memory_level", {**SHORT, "level": 0, "allow_unknown": True}, facts([0] * 160)).ids) == 24
    with pytest.raises(DataError, match="no set of short answers"):
        choose("memory_level")
    with pytest.raises(InfeasibleError, match="no fact is at level 4"):
        choose("memory_level", {**SHORT, "level": 4}, facts([4] * 160))
    for hits in (0.5, 11.0, -1.0):
        with pytest.raises(DataError, match="recall counts"):
            choose("memory_level", SHORT, facts([hits] * 160))
    counts = np.empty(160, dtype=object)
    counts[:] = [(5.0,) * 4] * 160
    with pytest.raises(DataError, match="recall counts"):
        choose("memory_level", SHORT, replace(PROBLEM, external={"recall_counts": counts}))


def test_many_facts_are_warned_about_however_they_are_asked_for():
    import gradsift.methods.memory_level as module

    problem = facts([4] * 160)
    assert "many" not in codes(choose("memory_level", SHORT, problem, Budget(percent=50.0)))
    with pytest.MonkeyPatch.context() as patch:  # 1,920 rows, asked for as a percentage
        real = module.resolve_budget
        patch.setattr(module, "resolve_budget", lambda *a: replace(real(*a), rows=1920))
        assert "many" in codes(choose("memory_level", SHORT, problem, Budget(percent=50.0)))


def test_a_prompt_that_holds_its_object_is_left_out_in_scripts_without_spaces_too():
    told = (
        ("中国的首都北京在哪个国家", "北京"),
        ("The capital Paris lies in?", "Paris"),
        ("서울은 어디에 있나요?", "서울"),
    )
    problem = facts([4] * 160, texts=(*told, ("रामायण किसने लिखी?", "राम"), *PROBLEM.texts[4:]))
    got = choose("memory_level", SHORT, problem)
    assert got.reason_code[:3] == ("dropped:trivial",) * 3
    assert got.reason_code[3] != "dropped:trivial"
    assert codes(got)["trivial"].count == 3


def test_few_templates_and_uncertain_recalls_are_counted():
    counts = np.empty(160, dtype=object)
    counts[:] = [(1.0, 0.0) * 5] * 160
    problem = replace(PROBLEM, external={"recall_counts": counts})
    got = codes(choose("memory_level", {**SHORT, "samples": 1}, problem))
    assert got["few_templates"].count == got["uncertain"].count == 160


def test_recall_rises_with_how_often_a_toy_model_has_seen_a_fact():
    """A factual plant: a small model reads facts 0 to 64 times, answers 21 templates, and is asked 10 times each."""
    import torch
    from torch import nn

    rng, num_facts, num_answers, templates = np.random.default_rng(0), 60, 24, 21
    seen = np.repeat([0, 1, 4, 16, 64], num_facts // 5)
    answers = rng.permutation(np.arange(num_facts) % 20)  # answers 20 to 23 are never trained
    answers[seen == 0] = 20 + np.arange((seen == 0).sum()) % 4
    torch.manual_seed(0)
    facts_, frames = nn.Embedding(num_facts, 64), nn.Embedding(templates, 8)
    head = nn.Sequential(nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, num_answers))
    parameters = [*facts_.parameters(), *frames.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    reads = torch.tensor(rng.permutation(np.repeat(np.arange(num_facts), seen)))

    def logits(k, t):
        return head(torch.cat([facts_(k), frames(t)], dim=-1))

    for some in reads.split(1):
        frame = torch.tensor(rng.integers(templates, size=1))
        loss = nn.functional.cross_entropy(logits(some, frame), torch.tensor(answers)[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        every = torch.arange(num_facts)
        p = torch.stack([(logits(every, torch.full((num_facts,), t)) / 0.7).softmax(-1) for t in range(templates)], 1)
    hits = np.zeros((num_facts, templates), dtype=int)
    for k in range(num_facts):
        for t in range(templates):
            drawn = rng.choice(num_answers, size=10, p=p[k, t].double().numpy() / p[k, t].double().numpy().sum())
            hits[k, t] = sum(recalls(f"it is word{a}.", [f"word{answers[k]}"]) for a in drawn)
    recall = hits.sum(axis=1) / 210
    assert spearmanr(seen, recall).statistic > 0.8
    levels = np.array([recall_level(int(h), 210) for h in hits.sum(axis=1)])
    assert (seen[levels == 0] == 0).mean() >= 0.95
    assert (levels == 0).sum() >= 3
    assert levels[seen == 64].mean() >= levels[seen == 4].mean() > levels[seen == 1].mean() > levels[seen == 0].mean()
