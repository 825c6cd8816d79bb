"""Token masking: the golden numbers of the specification and its properties."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.lessons import lesson_rows, token_row
from tests.toy import toy_llama

from gradsift.errors import ConfigError, DataError, NumericsError
from gradsift.train.masking import Masked, TokenNats, keep_tokens, mask_rows, measure_nats, tau_of_share
from gradsift.train.parts import Cost, make_batch, trained_weight, weighted_loss
from gradsift.types import TokenRow

GOLDEN = np.array([0.05, 0.50, 0.91, 0.92, 2.30, 0.10], np.float32)
ROWS = list(lesson_rows(12, seed=4).values())


def known(*pairs: tuple[TokenRow, np.ndarray]) -> TokenNats:
    return TokenNats({row.id: np.asarray(n, np.float32) for row, n in pairs}, Cost())


def labels(masked: Masked) -> dict[str, list[bool]]:
    return {row.id: row.trained.tolist() for row in masked.rows}


def test_golden_arithmetic_and_row() -> None:
    assert math.log(2.5) == pytest.approx(0.916291, abs=1e-6)
    assert np.exp(GOLDEN) == pytest.approx([1.051271, 1.648721, 2.484323, 2.509290, 9.974182, 1.105171], abs=1e-5)
    assert keep_tokens(GOLDEN, 2.5).tolist() == [True, True, True, False, False, True]
    row = token_row("a", range(7))
    masked = mask_rows([row], known((row, GOLDEN)), tau=2.5)
    kept = masked.rows[0].trained[1:]
    assert GOLDEN[kept].mean() == pytest.approx(0.39, abs=1e-6)
    assert GOLDEN.mean() == pytest.approx(0.796667, abs=1e-6)
    assert masked.share == pytest.approx(1 / 3)


def test_golden_share() -> None:
    nats = np.log(np.arange(1, 11))
    tau = tau_of_share(nats, 0.2)
    assert tau == pytest.approx(8)
    assert keep_tokens(nats, tau).tolist() == [True] * 8 + [False] * 2


def test_golden_loss_is_the_mean_over_kept_tokens() -> None:
    """A trainer that divides by all six tokens gives 0.26."""
    row = token_row("a", range(7))
    kept = mask_rows([row], known((row, GOLDEN)), tau=2.5).rows[0]
    batch = make_batch([kept], 0, torch.device("cpu"))
    nats = torch.from_numpy(np.where(kept.trained[1:], GOLDEN, 0))[None]
    loss = weighted_loss(nats, batch.weights, trained_weight(batch.labels, batch.weights))
    assert float(loss) == pytest.approx(0.39, abs=1e-6)


some_nats = st.lists(st.floats(0, 12, width=32), min_size=1, max_size=30)
taus = st.floats(1.001, 200)


@given(some_nats)
def test_an_infinite_tau_changes_nothing(nats: list[float]) -> None:
    row = token_row("a", range(len(nats) + 1))
    masked = mask_rows([row], known((row, np.array(nats))), tau=math.inf)
    assert masked.rows[0].trained.tolist() == row.trained.tolist()
    assert masked.num_masked == 0


@given(some_nats, taus, taus)
def test_keeping_is_monotone_in_tau(nats: list[float], a: float, b: float) -> None:
    less, more = (keep_tokens(np.array(nats, np.float32), t) for t in sorted((a, b)))
    assert not (less & ~more).any()


@given(some_nats, st.floats(0.01, 0.99))
def test_a_share_drops_at_most_that_share_and_less_only_for_ties(nats: list[float], share: float) -> None:
    values = np.array(nats, np.float32)
    keep = keep_tokens(values, tau_of_share(values, share))
    needed = max(1, math.ceil(round((1 - share) * values.size, 9)))
    assert keep.sum() >= needed
    cut = np.sort(values)[needed - 1]
    assert keep.tolist() == (values <= cut).tolist()


def test_the_mask_does_not_depend_on_batches_or_order() -> None:
    model = toy_llama(0, torch.float64)
    whole = measure_nats(model, ROWS, 3, 4096)
    for rows, budget in ((ROWS[::-1], 1), (ROWS, 40), (sorted(ROWS, key=lambda r: hash(r.id)), 17)):
        other = measure_nats(model, rows, 250, budget)
        for row in ROWS:
            np.testing.assert_allclose(other.nats[row.id], whole.nats[row.id], rtol=0, atol=1e-6)
        assert labels(mask_rows(rows, other, tau=150.0)) == labels(mask_rows(ROWS, whole, tau=150.0))
    assert whole.cost.forward_tokens == sum(row.num_tokens for row in ROWS)


def test_measured_nats_equal_the_slow_twin() -> None:
    model = toy_llama(0, torch.float64)
    whole = measure_nats(model, ROWS, 3)
    for row in ROWS:
        logits = model(input_ids=torch.tensor(row.input_ids[None].astype(np.int64))).logits[0].detach()
        logp = torch.log_softmax(logits, -1)
        want = [-float(logp[t - 1, row.input_ids[t]]) if row.trained[t] else 0.0 for t in range(1, row.num_tokens)]
        np.testing.assert_allclose(whole.nats[row.id], want, atol=1e-5)


def test_prompt_tokens_never_become_labels() -> None:
    nats = measure_nats(toy_llama(), ROWS, 3)
    for tau in (1.01, 100.0, math.inf):
        try:
            masked = mask_rows(ROWS, nats, tau=tau, keep_ids=range(260))
        except DataError:
            continue
        for row in masked.rows:
            (old,) = (r for r in ROWS if r.id == row.id)
            assert not (row.trained & ~old.trained).any()


def test_rows_without_a_kept_token_are_dropped_counted_and_listed() -> None:
    a, b, c = token_row("a", range(4)), token_row("b", range(4)), token_row("c", range(4))
    nats = known((a, np.array([9, 9, 9])), (b, np.array([0.1, 9, 9])), (c, np.array([0.1, 0.1, 9])))
    masked = mask_rows([a, b, c], nats, tau=2.5)
    assert (masked.dropped, [r.id for r in masked.rows]) == (("a",), ["b", "c"])
    assert (masked.num_masked, masked.num_trained) == (6, 9)
    assert masked.notes[-1].ids == ("a",)
    assert mask_rows([a, b, c], nats, tau=2.5, min_kept=2).dropped == ("a", "b")
    with pytest.raises(DataError, match="no row keeps"):
        mask_rows([a], nats, tau=2.5)


@given(some_nats, taus)
def test_the_end_of_a_turn_is_kept_at_any_perplexity(nats: list[float], tau: float) -> None:
    ids = [5, *([7, 2] * len(nats))][: len(nats) + 1]
    row = token_row("a", ids)
    ends = [t for t, i in enumerate(ids) if t and i == 2]
    if not ends:
        return
    masked = mask_rows([row], known((row, np.array(nats))), tau=tau, keep_ids=[2])
    assert all(masked.rows[0].trained[t] for t in ends)


def test_masks_commute_with_selection() -> None:
    nats = measure_nats(toy_llama(), ROWS, 3)
    some = ROWS[::3]
    after = {i: m for i, m in labels(mask_rows(ROWS, nats, tau=300.0)).items() if i in {r.id for r in some}}
    assert labels(mask_rows(some, nats, tau=300.0)) == after


def test_deciles_and_warnings() -> None:
    row = token_row("a", range(21))
    high = known((row, np.array([0.1] * 10 + [9.0] * 10)))
    masked = mask_rows([row], high, tau=2.5)
    assert masked.deciles == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
    assert masked.notes == ()
    much = mask_rows([row], known((row, np.array([0.1] * 7 + [9.0] * 13))), tau=2.5)
    little = mask_rows([row], known((row, np.full(20, 0.1))), tau=2.5)
    assert [much.notes[0].code, little.notes[0].code] == ["stm_much", "stm_little"]


@pytest.mark.parametrize("given_", [{}, {"tau": 2.0, "drop_share": 0.5}])
def test_exactly_one_threshold(given_: dict[str, float]) -> None:
    row = token_row("a", range(3))
    with pytest.raises(ConfigError, match="tau or drop_share"):
        mask_rows([row], known((row, np.zeros(2))), **given_)


def test_a_row_that_was_not_measured_or_is_not_finite_is_named() -> None:
    row = token_row("a", range(3))
    with pytest.raises(DataError, match="not measured"):
        mask_rows([dataclasses.replace(row, id="b")], known((row, np.zeros(2))), tau=2.0)
    model = toy_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
    with pytest.raises(NumericsError, match="row r"):
        measure_nats(model, ROWS, 3)
