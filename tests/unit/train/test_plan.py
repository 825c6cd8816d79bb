"""Plans: every row once per epoch, keyed by id, budgets in rows exact."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsift.seeds import stream
from gradsift.train.plan import TrainPlan, plan_steps

some_ids = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=20)


def flat(plan: TrainPlan) -> list[str]:
    return list(chain.from_iterable(plan.steps))


@given(some_ids, st.integers(1, 7), st.integers(1, 3), st.booleans())
def test_every_step_is_full_and_every_epoch_holds_every_row(
    ids: list[str], batch: int, epochs: int, shuffle: bool
) -> None:
    plan = plan_steps(ids, batch_size=batch, num_epochs=epochs, stream=stream(0, "x"), shuffle=shuffle)
    assert {len(step) for step in plan.steps} == {batch}
    assert 0 <= plan.num_steps * batch - epochs * len(ids) < batch
    for epoch in range(epochs):
        assert Counter(flat(plan)[epoch * len(ids) : (epoch + 1) * len(ids)]) == Counter(ids)


@given(st.permutations(list("abcdefgh")), st.integers(0, 99))
def test_shuffling_does_not_depend_on_the_order_given(ids: list[str], seed: int) -> None:
    one, two = (plan_steps(i, batch_size=3, num_epochs=2, stream=stream(seed, "x")) for i in (ids, sorted(ids)))
    assert one == two


@given(st.sets(st.sampled_from("abcdefghij"), min_size=2), st.integers(0, 99))
def test_arms_that_share_rows_meet_them_in_the_same_relative_order(some: set[str], seed: int) -> None:
    whole = flat(plan_steps(list("abcdefghij"), batch_size=10, num_epochs=1, stream=stream(seed, "x")))
    arm = flat(plan_steps(sorted(some), batch_size=len(some), num_epochs=1, stream=stream(seed, "x")))
    assert arm == [i for i in whole if i in some]


def test_epochs_differ_and_the_selections_order_is_kept_when_asked() -> None:
    ids = [f"r{n}" for n in range(12)]
    shuffled = flat(plan_steps(ids, batch_size=4, num_epochs=2, stream=stream(0, "x")))
    assert shuffled[:12] != shuffled[12:]
    assert flat(plan_steps(ids, batch_size=5, num_steps=3, stream=stream(0, "x"), shuffle=False)) == (ids * 2)[:15]


@pytest.mark.parametrize("options", [{}, {"num_steps": 1, "num_epochs": 1.0}])
def test_exactly_one_length(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        plan_steps(["a"], batch_size=1, stream=stream(0, "x"), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exactly one"):
        plan_steps([], batch_size=1, num_steps=1, stream=stream(0, "x"))
