"""Replay keeps the budget, draws by id and refuses leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lessons import lesson_rows, token_row

from gradsift.errors import ConfigError, DataError
from gradsift.seeds import stream
from gradsift.train.replay import mix, refuse_leak
from gradsift.types import TokenRow

SELECTED = list(lesson_rows(40, seed=1, prefix="s").values())
GENERAL = list(lesson_rows(60, seed=2, prefix="g").values())
DRAW = stream(3, "train/replay")


def tokens(rows: tuple[TokenRow, ...] | list[TokenRow]) -> int:
    return sum(row.num_trained for row in rows)


@given(st.floats(0, 0.99), st.integers(0, 2**40), st.integers(1, 40))
def test_in_rows_the_number_stays_and_the_share_is_rounded(share: float, seed: int, count: int) -> None:
    selected = SELECTED[:count]
    mixed = mix(selected, GENERAL, share=share, draw=stream(seed, "x"))
    assert len(mixed.rows) == count
    assert abs(mixed.num_replayed - share * count) <= 0.5 + 1e-9
    assert mixed.num_replayed == sum(row.id.startswith("g") for row in mixed.rows) == len(mixed.left_out)
    kept = [row for row in mixed.rows if row.id.startswith("s")]
    assert kept == [row for row in selected if row.id not in mixed.left_out]
    assert mixed.num_trained == tokens(mixed.rows)


@given(st.floats(0, 0.9), st.integers(0, 2**40))
def test_in_tokens_the_budget_is_never_exceeded_and_missed_by_less_than_a_row(share: float, seed: int) -> None:
    mixed = mix(SELECTED, GENERAL, share=share, unit="tokens", draw=stream(seed, "x"))
    longest = max(row.num_trained for row in [*SELECTED, *GENERAL])
    assert tokens(SELECTED) - longest < mixed.num_trained <= tokens(SELECTED)
    assert share * tokens(SELECTED) - longest < mixed.replayed_tokens <= share * tokens(SELECTED)


@pytest.mark.parametrize("unit", ["rows", "tokens"])
def test_the_draw_does_not_depend_on_the_order_of_rows(unit: str) -> None:
    one = mix(SELECTED, GENERAL, share=0.3, unit=unit, draw=DRAW)  # type: ignore[arg-type]
    two = mix(SELECTED[::-1], GENERAL[::-1], share=0.3, unit=unit, draw=DRAW)  # type: ignore[arg-type]
    assert {row.id for row in one.rows} == {row.id for row in two.rows}
    assert one.left_out == two.left_out


def test_a_larger_share_replays_more_of_the_same_rows() -> None:
    """Nested draws: arms that differ in the share alone share what they can."""
    some, more = (mix(SELECTED, GENERAL, share=s, draw=DRAW) for s in (0.1, 0.5))
    replayed = [{r.id for r in m.rows if r.id.startswith("g")} for m in (some, more)]
    assert replayed[0] < replayed[1]
    assert set(some.left_out) < set(more.left_out)


def test_nothing_is_replayed_at_zero() -> None:
    mixed = mix(SELECTED, [], share=0.0, draw=DRAW)
    assert (mixed.rows, mixed.num_replayed) == (tuple(SELECTED), 0)


def test_shortage_wrong_shares_and_shared_ids_are_refused() -> None:
    with pytest.raises(DataError, match="too few general rows"):
        mix(SELECTED, GENERAL[:3], share=0.5, draw=DRAW)
    with pytest.raises(DataError, match="too few general rows"):
        mix(SELECTED, GENERAL[:3], share=0.5, unit="tokens", draw=DRAW)
    with pytest.raises(ConfigError, match=r"lie in \[0, 1\)"):
        mix(SELECTED, GENERAL, share=1.0, draw=DRAW)
    with pytest.raises(DataError, match="has the id of a selected one"):
        mix(SELECTED, SELECTED[:5], share=0.1, draw=DRAW)


def test_leaks_are_found_by_content() -> None:
    anchor = token_row("a0", GENERAL[4].input_ids, GENERAL[4].trained)
    with pytest.raises(DataError, match="row g4 is row a0 of math"):
        refuse_leak(GENERAL, {"chat": SELECTED[:2], "math": [anchor]}, "the general rows")
    other_mask = token_row("a0", GENERAL[4].input_ids, np.ones(GENERAL[4].num_tokens, bool))
    refuse_leak(GENERAL[:4], {"math": [anchor]}, "the general rows")
    refuse_leak([row for row in GENERAL if not row.trained.all()], {"math": [other_mask]}, "the general rows")
