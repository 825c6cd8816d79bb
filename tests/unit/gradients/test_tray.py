"""Parameters measured side by side against the same measured one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import toy_lora

from gradsift.gradients import tray as trays
from gradsift.gradients.blocks import Dense, Outer, Totals, make_block
from gradsift.gradients.project import Projector
from gradsift.gradients.tray import Tray

F64 = torch.float64
SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9)


def empty(size, count, dim):
    sketch = None if dim is None else torch.zeros(size, dim, dtype=F64)
    return Totals(torch.zeros(size, count, dtype=F64), torch.zeros(size, dtype=F64), sketch)


def blocks_of(shapes, count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    projector = None if dim is None else Projector(seed, dim)
    made = [
        make_block(f"p{i}", rows, cols, projector, dtype=F64, device=torch.device("cpu"))
        for i, (rows, cols) in enumerate(shapes)
    ]
    for block in made:
        if count:
            block.directions = torch.randn(count, block.numel, generator=generator, dtype=F64)
    return made


def part_of(block, lengths, generator):
    if block.rows == 1:
        return Dense(torch.randn(len(lengths), block.cols, generator=generator, dtype=F64))
    width = max(lengths) + 1
    x = torch.randn(len(lengths), width, block.cols, generator=generator, dtype=F64)
    g = torch.randn(len(lengths), width, block.rows, generator=generator, dtype=F64)
    for b, n in enumerate(lengths):
        g[b, n:] = 0
    return Outer(x, g, tuple(lengths))


def one_by_one(blocks, parts, size, count, dim):
    totals = empty(size, count, dim)
    for block, part in zip(blocks, parts, strict=True):
        block.measure([part], totals)
    return totals


def check(got, want):
    torch.testing.assert_close(got.square, want.square, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.dots, want.dots, rtol=1e-11, atol=1e-11)
    if want.sketch is not None:
        torch.testing.assert_close(got.sketch, want.sketch, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    shapes=SHAPES,
    batches=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=3),
    dim=st.sampled_from([None, 3, 7, 61]),
    count=st.integers(0, 3),
    room=st.sampled_from([40, 400, 1 << 14]),
    shuffle=st.randoms(use_true_random=False),
)
def test_together_equals_one_by_one(shapes, batches, dim, count, room, shuffle):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trays, "ROOM", room)
        blocks, tray = blocks_of(shapes, count, dim), Tray(dim)
        for number, lengths in enumerate(batches):
            generator = torch.Generator().manual_seed(number)
            parts = [part_of(block, lengths, generator) for block in blocks]
            want = one_by_one(blocks, parts, len(lengths), count, dim)
            got = empty(len(lengths), count, dim)
            tray.plan(blocks, len(lengths))
            if tray._buffer is not None:
                tray._buffer.fill_(float("nan"))  # what an earlier batch left must not be read
            order = list(zip(blocks, parts, strict=True))
            if number:
                shuffle.shuffle(order)  # places are right whatever the order of arrival
            for block, part in order:
                if tray.takes(block, [part]):
                    tray.add(block, part, got)
                else:
                    assert 2 * block.numel * len(lengths) > room
                    block.measure([part], got)
            tray.measure()
            check(got, want)


def test_other_directions_are_taken_up():
    blocks, tray = blocks_of([(3, 4), (1, 5)], 2, 61), Tray(61)
    parts = [part_of(block, [3, 2], torch.Generator().manual_seed(0)) for block in blocks]
    for seed in (1, 2):
        for block, other in zip(blocks, blocks_of([(3, 4), (1, 5)], 2, 61, seed=seed), strict=True):
            block.directions = other.directions
        want, got = one_by_one(blocks, parts, 2, 2, 61), empty(2, 2, 61)
        tray.plan(blocks, 2)
        for block, part in zip(blocks, parts, strict=True):
            tray.add(block, part, got)
        tray.measure()
        check(got, want)


def test_what_belongs_to_other_totals_goes_there():
    blocks, tray = blocks_of([(3, 4), (1, 5), (2, 3)], 2, 61), Tray(61)
    parts = [part_of(block, [3, 2], torch.Generator().manual_seed(0)) for block in blocks]
    into = [empty(2, 2, 61), empty(2, 2, 61)]
    tray.plan(blocks, 2)
    for block, part, which in zip(blocks, parts, (0, 1, 1), strict=True):
        tray.add(block, part, into[which])
    tray.measure()
    check(into[0], one_by_one(blocks[:1], parts[:1], 2, 2, 61))
    check(into[1], one_by_one(blocks[1:], parts[1:], 2, 2, 61))


def test_a_batch_that_broke_off_leaves_nothing():
    blocks, tray = blocks_of([(3, 4), (1, 5)], 2, 61), Tray(61)
    parts = [part_of(block, [3, 2], torch.Generator().manual_seed(0)) for block in blocks]
    tray.plan(blocks, 2)
    tray.add(blocks[0], parts[0], empty(2, 2, 61))  # and an error came
    parts = [part_of(block, [3, 2, 4], torch.Generator().manual_seed(0)) for block in blocks]
    want, got = one_by_one(blocks, parts, 3, 2, 61), empty(3, 2, 61)
    tray.plan(blocks, 3)
    for block, part in zip(blocks, parts, strict=True):
        tray.add(block, part, got)
    tray.measure()
    check(got, want)


def test_tall_and_folded_parameters_have_no_place():
    blocks, tray = blocks_of([(200, 200), (3, 4), (256, 512)], 1, 61), Tray(61)
    parts = [part_of(block, [2], torch.Generator().manual_seed(0)) for block in blocks]
    tray.plan(blocks, 1)
    assert [tray.takes(b, [p]) for b, p in zip(blocks, parts, strict=True)] == [False, True, False]
    flat = Outer(parts[1].x[0], parts[1].g[0], (2,), (0,))
    assert not tray.takes(blocks[1], [flat])  # several uses, or a head's flat layout
    assert not tray.takes(blocks[1], [parts[1], parts[1]])


def test_an_adapter_lies_in_trays_and_its_directions_are_kept_once():
    from gradsift.gradients.hooks import GradientEngine

    model = toy_lora()
    engine = GradientEngine(model, [n for n, _ in model.named_parameters() if "lora_" in n], projector=Projector(1, 61))
    engine.num_directions = 2
    for block in engine.blocks.values():
        block.directions = torch.randn(2, block.numel)
    ids = torch.randint(4, 200, (3, 8))
    seen, add = [], Tray.add
    with pytest.MonkeyPatch.context() as patch, engine:
        patch.setattr(
            Tray, "add", lambda tray, block, part, totals: seen.append(block.name) or add(tray, block, part, totals)
        )
        engine.measure(ids, ids, torch.tensor([8, 8, 8]))
    assert sorted(seen) == sorted(engine.blocks)
    assert len({block.directions.untyped_storage().data_ptr() for block in engine.blocks.values()}) == 1
