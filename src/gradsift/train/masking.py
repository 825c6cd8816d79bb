"""Selective token masking: tokens that the starting model finds unlikely carry no loss (Wu et al., arXiv 2501.14315).

keep_t = [exp(-logp_t) <= tau], logp_t by the model before training. The mask is made once and stays; the loss is the mean
over kept tokens, because a masked token's label is -100. Departures: the end-of-turn token is always kept, the first
response token is judged like any other, and tau can be set by the share to drop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import nn

from gradsift.data.batches import plan_batches
from gradsift.errors import ConfigError, DataError, NumericsError
from gradsift.train.parts import Cost, make_batch, supervised_nats
from gradsift.types import Note, TokenRow

MUCH, LITTLE = 0.6, 0.02


@dataclass(frozen=True)
class TokenNats:
    """Cross-entropy of every trained token under the starting model.

    Args:
        nats: id -> float32 [T-1], entry t for the token at t+1; 0 where it carries no loss.
        cost: what it took: one forward over the rows.
    """

    nats: Mapping[str, Float[np.ndarray, " S"]]
    cost: Cost


@dataclass(frozen=True)
class Masked:
    """Rows with unlikely tokens masked.

    Args:
        rows: rows that keep at least ``min_kept`` trained tokens, in the order given.
        tau: perplexity up to which a token is kept.
        dropped: ids of the rows that kept too few.
        num_trained: trained tokens before.
        num_masked: of these, masked (dropped rows included).
        deciles: share masked by position in the row's trained tokens, first to last tenth.
        notes: what to beware of.
    """

    rows: tuple[TokenRow, ...]
    tau: float
    dropped: tuple[str, ...]
    num_trained: int
    num_masked: int
    deciles: tuple[float, ...]
    notes: tuple[Note, ...] = ()

    @property
    def share(self) -> float:
        """Share of the trained tokens that is masked, in [0, 1]."""
        return self.num_masked / self.num_trained


def measure_nats(model: nn.Module, rows: Sequence[TokenRow], pad_id: int, tokens_per_batch: int = 4096) -> TokenNats:
    """Send rows forward once, dropout off, in batches of like length.

    Args:
        model: the one that will be trained, before training.
        rows: rows with trained tokens.
        pad_id: padding token.
        tokens_per_batch: longest row times rows of a batch.

    Returns:
        Cross-entropies in float32.

    Raises:
        NumericsError: a row's cross-entropy is not finite.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].num_tokens, rows[i].id))
    device, training = next(model.parameters()).device, model.training
    nats: dict[str, np.ndarray] = {}
    model.eval()
    try:
        for cut in plan_batches(rows, order, tokens_per_batch):
            some = [rows[i] for i in cut]
            batch = make_batch(some, pad_id, device)
            with torch.no_grad():
                values = supervised_nats(model, batch).cpu().numpy()
            for row, line in zip(some, values, strict=True):
                nats[row.id] = line[: row.num_tokens - 1].astype(np.float32)
                if not np.isfinite(nats[row.id]).all():
                    raise NumericsError("a token's loss is not finite", where=f"row {row.id}", do="check the model")
    finally:
        model.train(training)
    size = sum(p.numel() for p in model.parameters())
    return TokenNats(nats, Cost.of(size, forward=sum(row.num_tokens for row in rows)))


def keep_tokens(nats: Float[np.ndarray, " K"], tau: float) -> Bool[np.ndarray, " K"]:
    """Say which tokens are likely enough: exp(nats) <= tau.

    Args:
        nats: cross-entropy of each token.
        tau: perplexity, > 1; infinity keeps all.

    Returns:
        True where the token is kept.
    """
    return np.asarray(nats, np.float64) <= math.log(tau)


def tau_of_share(nats: Float[np.ndarray, " n"], drop_share: float) -> float:
    """Find the threshold that drops a share of the tokens: the ceil((1 - share) n)-th smallest perplexity (ours).

    Args:
        nats: cross-entropy of n tokens.
        drop_share: in (0, 1).

    Returns:
        Tau; tokens of this very perplexity are kept.
    """
    ordered = np.sort(np.asarray(nats, np.float64))
    # Rounded before ceil: (1 - 0.2) * 10 must be 8, not 8.000000000000002.
    position = max(1, math.ceil(round((1 - drop_share) * ordered.size, 9)))
    value = float(np.exp(ordered[position - 1]))
    while math.log(value) < ordered[position - 1]:  # exp and log round; the token itself must be kept
        value = math.nextafter(value, math.inf)
    return value


def mask_rows(
    rows: Sequence[TokenRow],
    nats: TokenNats,
    *,
    tau: float | None = None,
    drop_share: float | None = None,
    min_kept: int = 1,
    keep_ids: Collection[int] = (),
) -> Masked:
    """Mask unlikely tokens of rows; one of ``tau`` and ``drop_share`` is given.

    Args:
        rows: N rows with trained tokens.
        nats: from :func:`measure_nats` on these rows.
        tau: keep tokens of perplexity at most this.
        drop_share: share of all rows' trained tokens to drop; sets tau.
        min_kept: rows with fewer kept tokens are dropped and listed.
        keep_ids: tokens kept at any perplexity, such as the end of a turn.

    Returns:
        The masked rows and what was masked.

    Raises:
        ConfigError: not exactly one threshold is given.
        DataError: a row was not measured, or no row keeps a token.
    """
    if (tau is None) == (drop_share is None):
        raise ConfigError("token masking takes tau or drop_share", where="stm", got=f"tau {tau}, share {drop_share}")
    missing = [row.id for row in rows if row.id not in nats.nats]
    if missing or not rows:
        raise DataError("a row to mask was not measured", where="stm", got=", ".join(missing[:5]) or "no rows")
    if drop_share is not None:
        tau = tau_of_share(np.concatenate([nats.nats[row.id][row.trained[1:]] for row in rows]), drop_share)
    assert tau is not None
    kept, dropped, total, masked = [], [], 0, 0
    by_decile = np.zeros((10, 2))
    forced = np.asarray(sorted(keep_ids), np.int64)
    for row in rows:
        keep = keep_tokens(nats.nats[row.id], tau) | np.isin(row.input_ids[1:], forced)
        was = row.trained[1:]
        gone = was & ~keep
        tenth = np.arange(row.num_trained) * 10 // max(1, row.num_trained)
        np.add.at(by_decile, tenth, np.stack([gone[was], np.ones(row.num_trained)], 1))
        total, masked = total + int(was.sum()), masked + int(gone.sum())
        left = dataclasses.replace(row, trained=np.concatenate([row.trained[:1], was & keep]))
        (kept if left.num_trained >= min_kept else dropped).append(left)
    if not kept:
        raise DataError("no row keeps a token", where="stm", got=f"tau {tau:.4g}", do="raise tau or lower drop_share")
    deciles = tuple(float(g / n) if n else 0.0 for g, n in by_decile)
    lost = tuple(row.id for row in dropped)
    return Masked(tuple(kept), tau, lost, total, masked, deciles, _notes(masked / max(1, total), lost))


def _notes(share: float, dropped: tuple[str, ...]) -> tuple[Note, ...]:
    notes = []
    if share > MUCH:
        text = (
            f"{share:.0%} of the trained tokens are masked: most of the response is unlikely under this model; check "
            "the template, or the data is far from its ability"
        )
        notes.append(Note("stm_much", text))
    if share < LITTLE:
        notes.append(Note("stm_little", f"only {share:.1%} of the trained tokens are masked; no effect is expected"))
    if dropped:
        text = f"{len(dropped)} rows keep too few tokens after masking and are not trained on"
        notes.append(Note("stm_dropped", text, len(dropped), dropped[:5]))
    return tuple(notes)
