"""Ranks that hold one model together: the numbers are those of the whole model, whoever measures what and when."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import toy
from tests.ranks import share, together

from gradsift.errors import ConfigError, LaunchError, ModelError
from gradsift.gradients import calls
from gradsift.gradients.collect import Pass, measure_shard
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.project import Projector
from gradsift.gradients.taps import find_layers
from gradsift.gradients.upper import choose_upper
from gradsift.launch.lockstep import Lockstep
from gradsift.launch.seat import Seat, find_seat
from gradsift.methods import make_method
from gradsift.models.parameters import choose_parameters
from gradsift.models.shard import refuse_quantized, shard_model
from gradsift.pipeline.fsdp import check_fsdp
from gradsift.recipe import build_recipe
from gradsift.types import RowStatus, TokenRow

FIELDS = ("loss", "square", "dots", "sketch", "emb_norm", "head_norm", "embedding")
PROJECTOR = Projector(seed=7, dim=61)
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def make(kind, dtype=torch.float64):
    if kind == "llama_tied":
        return toy.toy_llama(0, dtype, tied=True)
    if kind == "mixtral":
        from tests.unit.gradients.test_experts import mixtral

        return toy._finish(mixtral(), 0, dtype)
    return toy.TOYS[kind](0, dtype)


def batch(seed):
    """A micro-batch of a size and length of its own."""
    generator = torch.Generator().manual_seed(seed)
    size, width = int(torch.randint(1, 4, (), generator=generator)), int(torch.randint(6, 15, (), generator=generator))
    ids = torch.randint(4, toy.VOCABULARY, (size, width), generator=generator)
    labels = ids.clone()
    labels[:, : 1 + seed % 3] = -100
    return ids, labels, torch.full((size,), width)


def engine_of(model, kind, share_of_layers=None, edges=True):
    """An engine with two directions and embeddings."""
    parameters = choose_parameters(model, "lora" if kind == "lora" else "all")
    upper = choose_upper(model, parameters, share_of_layers) if share_of_layers else None
    names = parameters.names if upper is None else upper.parameters.names

    def build():
        engine = GradientEngine(
            model, names, projector=PROJECTOR, embedding=True, edges=edges, first_layer=upper and upper.first
        )
        generator = torch.Generator().manual_seed(5)
        for block in engine.blocks.values():
            block.directions = torch.randn(2, block.numel, generator=generator, dtype=torch.float64).to(engine.dtype)
        engine.num_directions = 2
        return engine

    return build


def measured(engine, calls_):
    """What a rank measures: per call its seed and whether there is a backward."""
    out = []
    for seed, backward in calls_:
        got = (engine.measure if backward else engine.forward_only)(*batch(seed))
        out.append({name: getattr(got, name).numpy() for name in FIELDS if getattr(got, name, None) is not None})
    return out


def work(lockstep, kind, dtype, options, schedules):
    """Measure one schedule after the other: in each, a rank has the calls of its own, then follows until all are idle."""
    model = make(kind, dtype)
    build = engine_of(model, kind, **options)
    share(lockstep, model)
    engine, found = build(), []
    with engine:
        for schedule in schedules:
            found.append(measured(engine, schedule[lockstep.seat.rank]))
            while lockstep.follow():
                pass
    if lockstep.seat.rank:
        while not lockstep.over:
            lockstep.follow()
    else:
        lockstep.end()
    return found, lockstep.summary()


def check_schedules(kind, dtype, options, schedules):
    """Every number equals, bit for bit, that of the whole model in this process."""
    got = together(work, kind, dtype, options, schedules)
    build = engine_of(make(kind, dtype), kind, **options)
    with build() as engine:
        for number in range(2):
            assert not isinstance(got[number], BaseException), got[number]
            for schedule, found in zip(schedules, got[number][0], strict=True):
                want = measured(engine, schedule[number])
                assert [sorted(one) for one in found] == [sorted(one) for one in want]
                for a, b in zip(found, want, strict=True):
                    for name in b:
                        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert got[0][1] == got[1][1], "all ranks count alike"
    return got[0][1]


GRADIENTS = [[(1, True), (2, True), (3, True)], [(4, True)]]
KINDS = [*toy.TOYS, "llama_tied", "mixtral"]


QUICK = ("llama", "lora", "llama_tied", "mixtral")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(pytest.param(kind, torch.float64, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS),
        ("llama", torch.float32),
        ("lora", torch.float32),
    ],
)
def test_the_numbers_of_a_shared_model_are_those_of_the_whole_one(kind, dtype):
    counts = check_schedules(kind, dtype, {}, [GRADIENTS, [[(5, False)], []]])
    assert counts["num_steps"] == [4, 1]
    assert counts["num_padded"] == [0, 3]


@pytest.mark.parametrize(
    "options", [{"share_of_layers": "1"}, {"share_of_layers": "1", "edges": False}, {"edges": False}]
)
@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_a_backward_that_ends_early_ends_there_in_every_rank(kind, options):
    check_schedules(kind, torch.float64, options, [GRADIENTS])


def alike(draw_seed):
    """One kind of call per schedule, as in a pass; each rank has its own number of them."""
    one = st.lists(draw_seed, max_size=3)
    return st.tuples(st.booleans(), one, one).map(lambda s: [[(seed, s[0]) for seed in mine] for mine in s[1:]])


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules=st.lists(alike(st.integers(0, 99)), min_size=1, max_size=5))
def test_any_schedule_ends_and_changes_no_number(schedules):
    counts = check_schedules("llama", torch.float32, {}, schedules)
    mine = [sum(len(s[rank]) for s in schedules) for rank in range(2)]
    longest = sum(max(len(s[0]), len(s[1])) for s in schedules)
    assert counts["num_steps"] == mine
    assert counts["num_padded"] == [longest - n for n in mine]


def bytes_at_work(lockstep):
    """Weights that are held at once: slices always, and whole ones that are registered while a layer runs."""
    model = toy.toy_llama(0)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    share(lockstep, model)
    peak, engine = [0], engine_of(model, "llama")()
    slices = lockstep.counts.local_bytes

    def look(*_):  # returns nothing, since a hook's value would take the gradient's place
        full = sum(p.numel() * p.element_size() for p in model.parameters() if not hasattr(p, "to_local"))
        peak[0] = max(peak[0], slices + full)

    def seen(module, inputs, output):
        look()
        if torch.is_tensor(output) and output.requires_grad:
            output.register_hook(look)

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(seen)

    def left():
        return sum(p.numel() * p.element_size() for p in model.parameters() if not hasattr(p, "to_local"))

    with engine:
        engine.measure(*batch(lockstep.seat.rank))
        after = [left()]
        engine.forward_only(*batch(lockstep.seat.rank))
        after.append(left())
    return whole, slices, peak[0], after, lockstep.sharded.largest_bytes


def test_a_rank_holds_its_half_of_the_weights_and_one_or_two_whole_layers(monkeypatch):
    monkeypatch.setitem(toy.COMMON, "num_hidden_layers", 12)
    for whole, slices, peak, after, largest in together(bytes_at_work):
        assert 0.5 * whole <= slices < 0.505 * whole
        assert after == [0, 0], "whole weights were kept"
        assert slices < peak <= slices + largest
        assert peak < 0.8 * whole


def load_slowly(lockstep, path):
    """Write down when this rank begins and ends to load."""

    def say(word):
        with path.open("a") as log:
            log.write(f"{word} {lockstep.seat.rank}\n")

    def load():
        say("begin")
        time.sleep(0.1 * (3 - lockstep.seat.rank))
        model = toy.toy_llama(0)
        sharded = shard_model(model, find_layers(model), lockstep.mesh)
        say("end")
        return sharded

    lockstep.in_turn(load)


def test_the_ranks_of_a_machine_load_one_after_the_other(tmp_path):
    together(load_slowly, tmp_path / "log", world=3)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == [f"{word} {rank}" for rank in range(3) for word in ("begin", "end")]


def leave(lockstep, how):
    """Rank 1 goes away while rank 0 waits for it."""
    model = share(lockstep, toy.toy_llama(0))
    if lockstep.seat.rank:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("rank 1 has had enough")
    with engine_of(model, "llama")() as engine:
        engine.measure(*batch(1))


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_rank_that_goes_ends_the_others_with_an_error(how):
    first, _ = together(leave, how)
    assert isinstance(first, LaunchError)
    assert "another rank is gone" in str(first)


def disagree(lockstep):
    model = share(lockstep, toy.toy_llama(0))
    with engine_of(model, "llama")() as engine:
        (engine.forward_only if lockstep.seat.rank else engine.measure)(*batch(1))


def test_ranks_that_call_for_different_purposes_are_stopped_before_they_wait_for_ever():
    for error in together(disagree):
        assert isinstance(error, LaunchError)
        assert "same purpose" in str(error)


def test_a_wait_is_ended_by_a_signal(monkeypatch):
    """The tick is called while a rank waits, and what it raises ends the wait."""

    class Never:
        def is_completed(self):
            return False

    def tick(rows, tokens):
        raise KeyboardInterrupt

    lockstep = Lockstep(Seat("torchrun", 0, 2), None, None, tick)
    monkeypatch.setattr(torch.distributed, "all_gather_single", lambda *_, **__: Never())
    with pytest.raises(KeyboardInterrupt):
        lockstep._say(0)


def test_a_micro_batch_that_does_not_fit_is_not_halved_where_others_take_part(monkeypatch):
    model = toy.toy_llama(0)

    @contextmanager
    def around(first):
        yield

    calls.bind(model, around)
    engine = engine_of(model, "llama")()
    rows = [
        TokenRow(f"row-{n}", np.arange(4, 12, dtype=np.int32), np.ones(8, dtype=bool), 8, RowStatus.OK) for n in (1, 2)
    ]

    def no_room(*_, **__):
        raise MemoryError

    monkeypatch.setattr(engine, "measure", no_room)
    with engine, pytest.raises(ConfigError, match="cannot halve") as error:
        measure_shard(Pass(engine, (), 100, 3), rows)
    assert "row-1" in str(error.value)


def test_layers_that_share_a_weight_are_refused():
    model = toy.toy_llama(0)
    first, second = find_layers(model)
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(ModelError, match="layers share a weight") as error:
        shard_model(model, (first, second), None)
    assert "layers.0.mlp.up_proj.weight" in str(error.value)


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantized_model_is_refused_by_its_configuration(tmp_path, nested):
    import json

    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    with pytest.raises(ConfigError, match="bitsandbytes"):
        refuse_quantized(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "quantization_config": None}))
    refuse_quantized(tmp_path)


def test_a_seat_with_fsdp_is_one_of_torchrun():
    assert find_seat("auto", None, TORCHRUN, fsdp=True) == Seat("torchrun", 1, 2, 1, fsdp=True)
    assert find_seat("auto", None, TORCHRUN) == Seat("torchrun", 1, 2, 1)


SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
ARRAY = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "0"), ("MIN", "0"), ("MAX", "3"))}


@pytest.mark.parametrize(
    ("launcher", "environment", "got"),
    [
        ("auto", {}, "inline"),
        ("inline", TORCHRUN, "inline"),
        ("auto", {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, "inline"),
        ("ray", {}, "ray"),
        ("slurm-array", ARRAY, "slurm-array"),
        ("auto", SLURM, "torchrun without MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_fsdp_without_ranks_that_meet_is_refused(launcher, environment, got):
    with pytest.raises(ConfigError, match="must meet") as error:
        find_seat(launcher, None, environment, fsdp=True)
    assert error.value.got == got


def recipe_of(method, **more):
    source = [{"label": "a", "path": "a.jsonl"}]
    return build_recipe(
        {"pool": source, "anchors": source, "target": "t.jsonl", "budget": "10%", "method": {"name": method}, **more}
    )


@pytest.mark.parametrize(
    ("method", "more", "what"),
    [
        ("less", {}, "trains the navigator"),
        ("crossfit", {}, "trains the navigator"),
        ("ogs", {}, "trains the navigator"),
        ("ogs_dual", {"navigator": {"lora": {"warmup_share": 0.1}}}, "adapter would be trained"),
        ("ogs_dual", {"collect": {"positions": "trained"}}, "prompts are held constant"),
        ("ogs_dual", {"collect": {"tokens_per_batch": "auto"}}, "free memory"),
        ("ogs_dual", {"active_anchors": 4}, "anchors' rows"),
    ],
)  # fmt: skip
def test_what_shared_weights_do_not_give_is_refused_before_anything_is_read(method, more, what):
    recipe = recipe_of(method, **more)
    chosen = make_method(method, {})
    with pytest.raises(ConfigError, match=what):
        check_fsdp(recipe, chosen, Seat("torchrun", 0, 2, fsdp=True))
    check_fsdp(recipe, chosen, Seat("torchrun", 0, 2))
    check_fsdp(recipe, chosen, None)


@pytest.mark.parametrize("method", ["ogs_dual", "target_cosine", "rds"])
def test_methods_that_measure_only_are_let_through(method):
    check_fsdp(recipe_of(method), make_method(method, {}), Seat("torchrun", 0, 2, fsdp=True))
