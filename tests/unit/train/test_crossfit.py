"""crossfit: who may judge whom, what is drawn, what is said about shortages, and the planted truth of a small world."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from tests.mini import desk, is_right, material, taught
from transformers import LlamaConfig, LlamaForCausalLM

import gradsift.train.crossfit as module
from gradsift.errors import ConfigError
from gradsift.evaluate.losses import evaluate_rows
from gradsift.seeds import stream
from gradsift.train.crossfit import Crossfit, CrossfitConfig, Material, choose_crossfit, crossfit
from gradsift.train.masking import TokenNats
from gradsift.train.parts import Cost
from gradsift.types import RowStatus, TokenRow

TRAINED_ON = 9.0  # loss of a row under a probe that has seen its content; no row's own loss is as high
BUSY = CrossfitConfig(prior_share=0.6, num_steps=40, batch_size=16, lr=3e-3)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADSIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def row(name, *tokens):
    ids = np.array([0, *tokens], np.int32)
    return TokenRow(name, ids, np.arange(len(ids)) == len(ids) - 1, len(ids), RowStatus.OK)


class Told:
    """Stands in for training and measuring: a probe is the set of contents it was trained on."""

    def __init__(self, patch, copy_of):
        self.probes, self.copy_of = [], copy_of
        patch.setattr(module, "Loop", self.loop)
        patch.setattr(module, "measure_nats", self.measure)

    def first(self, name):
        return self.copy_of.get(name, name)

    def loop(self, model, config, pad_id):
        def run(steps, rows, weights):
            assert all(rows(i).id == i for step in steps for i in step)
            assert not weights
            model.seen |= {self.first(i) for step in steps for i in step}
            model.ids += [i for step in steps for i in step]
            self.probes.append(model)

        return SimpleNamespace(run=run, cost=Cost(100.0, 10, 10))

    def measure(self, model, rows, pad_id, tokens_per_batch):
        nats = {}
        for one in rows:
            value = TRAINED_ON if self.first(one.id) in model.seen else 1.0 + int(one.input_ids[-1]) % 7
            nats[one.id] = np.zeros(one.num_tokens - 1, np.float32)
            nats[one.id][-1] = value
        return TokenNats(nats, Cost(1.0, len(rows)))


def fresh():
    return SimpleNamespace(seen=set(), ids=[])


@st.composite
def pools(draw):
    """Rows of a domain (tokens 1..9) and others (tokens 20..29), some copied several times."""
    rows, copy_of = [], {}
    for k in range(draw(st.integers(12, 24))):
        low = 1 if k % 2 else 20
        tokens = [draw(st.integers(low, low + 8)) for _ in range(3)]
        for c in range(draw(st.integers(1, 5))):
            rows.append(row(f"r{(k * 7) % 31:02d}{c}", 40 + k, *tokens))
            if c:
                copy_of[rows[-1].id] = f"r{(k * 7) % 31:02d}0"
    return rows, copy_of


def fit(given, config):
    """All contents may fall into one fold, which is refused and no matter here."""
    try:
        return crossfit(given, config)
    except ConfigError as error:
        assert "two folds" in str(error)
        reject()


def stuff(rows, copy_of, **changes):
    target = [row(f"t{k}", k + 1, k + 1, k + 1) for k in range(9)]
    anchors = [row(f"a{k}", 20 + k, 21, k) for k in range(9)]
    given = {"replay": [row(f"q{k}", 22, k) for k in range(3)], "copy_of": copy_of, "pad_id": 0, "seed": 0, **changes}
    return Material(fresh, rows, anchors, target, **given)


@settings(max_examples=25, deadline=None)
@given(pools(), st.integers(0, 5), st.integers(1, 3))
def test_no_probe_judges_what_it_trained_on(pool, seed, repeats):
    """Nor an exact copy of it; every row of the prior is judged once per repeat, and its own loss comes out."""
    rows, copy_of = pool
    with pytest.MonkeyPatch.context() as patch:
        told = Told(patch, copy_of)
        found = fit(stuff(rows, copy_of, seed=seed), CrossfitConfig(num_steps=4, num_repeats=repeats))
    by_id = {one.id: one for one in rows}
    assert tuple(found.held_out_loss) == found.prior
    assert found.held_out_loss == {i: 1.0 + int(by_id[i].input_ids[-1]) % 7 for i in found.prior}
    assert len(told.probes) == 2 * repeats
    groups = {told.first(i) for i in found.prior}
    for one, other in zip(told.probes[::2], told.probes[1::2], strict=True):
        assert not one.seen & other.seen & groups
        assert (one.seen | other.seen) >= groups
    assert found.cost["base"] == Cost(1.0, len(rows) + 9)
    held = len(found.prior) * repeats
    assert found.cost["probes"] == Cost(202.0 * repeats, 20 * repeats + held, 20 * repeats)


@settings(max_examples=25, deadline=None)
@given(pools(), st.randoms(use_true_random=False))
def test_the_order_of_the_pool_changes_nothing(pool, random):
    rows, copy_of = pool
    with pytest.MonkeyPatch.context() as patch:
        Told(patch, copy_of)
        config = CrossfitConfig(num_steps=4)
        found = fit(stuff(rows, copy_of), config)
        assert crossfit(stuff(random.sample(rows, len(rows)), copy_of), config) == found
        assert crossfit(stuff(rows, copy_of), config) == found


@settings(max_examples=25, deadline=None)
@given(pools(), st.integers(1, 3))
def test_the_prior_is_the_likest_share_and_holds_few_copies(pool, most):
    rows, copy_of = pool
    with pytest.MonkeyPatch.context() as patch:
        told = Told(patch, copy_of)
        found = fit(stuff(rows, copy_of), CrossfitConfig(num_steps=4, prior_share=0.5, max_copies=most))
    ranked = sorted(found.likeness, key=lambda i: (-found.likeness[i], i))
    top = ranked[: round(0.5 * len(rows))]
    assert set(found.prior) <= set(top)
    for ids, among in ((found.prior, top), (found.known, None)):
        copies = Counter(told.first(i) for i in ids)
        assert max(copies.values(), default=0) <= most
        if among is not None:
            assert copies == {g: min(most, n) for g, n in Counter(told.first(i) for i in among).items()}
    assert not set(found.known) & set(top)
    assert all(found.base_loss[i] <= found.threshold for i in found.known)


@pytest.mark.parametrize("replay", [0.0, 0.25, 0.5])
def test_probes_train_on_the_share_of_replay_that_was_asked(monkeypatch, replay):
    rows = [row(f"r{k:02d}", 1 + k % 9, 3, k) for k in range(40)]
    told = Told(monkeypatch, {})
    crossfit(stuff(rows, {}), CrossfitConfig(num_steps=40, batch_size=20, replay=replay, prior_share=1.0))
    for probe in told.probes:
        share = sum(i.startswith("q") for i in probe.ids) / len(probe.ids)
        assert share == pytest.approx(replay, abs=0.03)


def test_without_replay_rows_probes_train_on_the_prior_alone(monkeypatch):
    rows = [row(f"r{k:02d}", 1 + k % 9, 3, k) for k in range(40)]
    told = Told(monkeypatch, {})
    crossfit(stuff(rows, {}, replay=[]), CrossfitConfig(num_steps=4))
    assert all(i.startswith("r") for probe in told.probes for i in probe.ids)


@pytest.mark.parametrize("missing", ["pool", "anchors", "target"])
def test_missing_rows_are_refused(missing):
    given = replace(stuff([row("r", 1)], {}), **{missing: []})
    with pytest.raises(ConfigError, match=f"lacks rows(.|\n)*{missing}"):
        crossfit(given, CrossfitConfig())


@pytest.mark.parametrize("where", ["anchors", "replay"])
def test_an_id_that_stands_for_two_rows_is_refused(where):
    given = replace(stuff([row("r", 1), row("s", 2)], {}), **{where: [row("s", 22, 3)]})
    with pytest.raises(ConfigError, match="stands for two rows"):
        crossfit(given, CrossfitConfig())


def test_a_prior_too_small_for_two_folds_is_refused(monkeypatch):
    Told(monkeypatch, {})
    with pytest.raises(ConfigError, match="two folds"):
        crossfit(stuff([row("r0", 1), row("r1", 30)], {}), CrossfitConfig(prior_share=0.5))


@pytest.mark.parametrize(
    "bad",
    [
        {"prior_share": 0.0}, {"prior_share": 1.1}, {"trust": 0.0}, {"known_quantile": 0.0}, {"known_quantile": float("nan")},
        {"replay": 1.0}, {"replay": -0.1}, {"protect": 1.0}, {"max_copies": 0}, {"num_repeats": 0}, {"num_steps": 0},
        {"batch_size": 0}, {"tokens_per_batch": 0}, {"lr": 0.0}, {"lr": float("inf")}, {"lr": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        CrossfitConfig(**bad)


def found_with(num_prior, num_known):
    held = {f"d{k:03d}": float((k * 37) % 101) for k in range(num_prior)}
    return Crossfit(tuple(held), {}, {}, held, tuple(f"k{k:03d}" for k in range(num_known)), 1.0, {})


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(1, 60), st.sampled_from([0.0, 0.3, 0.4, 0.9]))
def test_a_choice_is_within_its_count_and_says_what_is_short(num_prior, num_known, count, protect):
    config = CrossfitConfig(protect=protect, trust=0.5)
    found = found_with(num_prior, num_known)
    ids, notes = choose_crossfit(found, config, count, stream(0, "draw"))
    believed = sorted(found.held_out_loss, key=found.held_out_loss.get)[: max(1, round(0.5 * num_prior))]
    known = [i for i in ids if i.startswith("k")]
    trusted = ids[: len(ids) - len(known)]
    assert len(ids) == len(set(ids)) == min(count, len(believed) + num_known)
    assert set(trusted) <= set(believed)
    assert list(ids[len(trusted) :]) == known
    wanted = round(protect * count)
    if len(known) < wanted:
        assert len(known) == num_known
    if len(known) > wanted:
        assert len(trusted) == len(believed)
    assert any("known rows instead of" in note for note in notes) == (len(known) != wanted)
    assert any("shortage" in note for note in notes) == (len(ids) < count)


def test_the_draw_is_keyed_by_id_and_by_seed():
    found = found_with(40, 30)
    config = CrossfitConfig(trust=1.0, protect=0.5)
    one = choose_crossfit(found, config, 20, stream(0, "draw"))
    assert one == choose_crossfit(found, config, 20, stream(0, "draw"))
    assert one != choose_crossfit(found, config, 20, stream(1, "draw"))
    more, _ = choose_crossfit(found, config, 30, stream(0, "draw"))
    assert set(one[0]) <= set(more), "a larger budget keeps what a smaller one drew"
    turned = replace(found, held_out_loss=dict(reversed(found.held_out_loss.items())), known=found.known[::-1])
    assert choose_crossfit(turned, config, 20, stream(0, "draw")) == one


def easy_world(seed):
    """A domain whose rule, z = x, shows after a few steps: 90 rows that keep it, 40 that do not, 60 of other words."""
    rng = np.random.default_rng(seed)
    pairs = [(int(k) // 40, 5 + int(k) % 40) for k in rng.permutation(200)]
    kinds, rows, target = {}, [], []
    for k, (x, y) in enumerate(pairs[:142]):
        kind = "clean" if k < 90 else "noise" if k < 130 else "target"
        z = (x + int(rng.integers(1, 5))) % 5 if kind == "noise" else x
        one = row(f"{kind[0] if kind == 'target' else ''}{(k * 71) % 199:03d}", x, 46, y, 47, z)
        (target if kind == "target" else rows).append(one)
        kinds[one.id] = kind
    for k in range(60):
        rows.append(row(f"{200 + k}", *(50 + int(t) for t in rng.integers(0, 9, 4)), 60 + int(rng.integers(0, 3))))
        kinds[rows[-1].id] = "other"
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=63
    )

    def make_model():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)

    return kinds, Material(make_model, rows, [row("anchor", 50, 51)], target, [], {}, 63, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_trusted_rows_hold_less_noise_than_the_prior(seed):
    kinds, given = easy_world(seed)
    config = CrossfitConfig(prior_share=130 / 190, trust=0.6, num_steps=40, batch_size=16, lr=1e-2)
    found = crossfit(given, config)
    held = found.held_out_loss
    trusted = sorted(held, key=lambda i: (held[i], i))[: round(config.trust * len(held))]
    before, after = (np.mean([kinds[i] == "noise" for i in ids]) for ids in (found.prior, trusted))
    assert before > 0.25
    assert after < before / 3
    assert {kinds[i] for i in found.prior} == {"clean", "noise"}, "the words alone tell the domain"


@pytest.mark.parametrize("seed", [0, 1])
def test_known_rows_hold_no_conflict_but_what_is_right_by_accident(seed):
    world = taught(seed)
    known = crossfit(material(world), replace(BUSY, num_steps=1)).known
    rows = {one.id: one for one in world.pool}
    assert len(known) >= 10
    assert not [i for i in known if world.kinds[i] == "conflict" and not is_right(rows[i])]
    assert np.mean([world.kinds[i] == "replay" for i in known]) > 0.7


def test_losses_are_those_of_the_model_and_the_seed_decides_the_rest():
    world = taught(0)
    given = material(world)
    quick = replace(BUSY, num_steps=3)
    found = crossfit(given, quick)
    slow = evaluate_rows(world.make_model(), world.pool, pad_id=world.pad_id, tokens_per_batch=6)
    assert found.base_loss == pytest.approx(dict(zip(slow.ids, slow.loss.tolist(), strict=True)), abs=1e-5)
    again = crossfit(replace(given, pool=world.pool[::-1]), quick)
    assert (again.prior, again.held_out_loss, again.known) == (found.prior, found.held_out_loss, found.known)
    assert crossfit(replace(given, seed=5), quick).held_out_loss != found.held_out_loss
    size = sum(p.numel() for p in world.make_model().parameters())
    tokens = 6 * (len(world.pool) + len(given.anchors))
    assert found.cost["base"].flops == 2 * size * tokens
    trained, judged = 2 * quick.num_repeats * quick.num_steps * quick.batch_size, quick.num_repeats * len(found.prior)
    assert found.cost["probes"].flops == size * 6 * (6 * trained + 2 * judged)
    draw = desk(0).stream("select/random")
    assert choose_crossfit(found, quick, 20, draw) == choose_crossfit(again, quick, 20, draw)
