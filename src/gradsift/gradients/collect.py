"""The one pass: rows in, shards of signals out (ours).

Rows are measured in micro-batches of like length. A row's numbers do not depend on its neighbors beyond rounding; how far
rounding moves them is measured on a few rows and handed on as the numerical bound. Memory errors halve the micro-batch
and redo only that part; a row that does not fit alone gets its own status.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from gradsift.data.batches import collate, plan_batches
from gradsift.data.token_rows import content_of
from gradsift.errors import ConfigError, NumericsError
from gradsift.gradients import calls
from gradsift.gradients.embed import content_order, reorder, unit_distance
from gradsift.gradients.hooks import GradientEngine
from gradsift.gradients.measured import Forwarded
from gradsift.gradients.taps import NO_EXTRAS, PARTS, Extras, Taps, alone_row, empty_extras, hidden_name, stack_masks
from gradsift.seeds import Stream
from gradsift.store.shards import ShardResult
from gradsift.types import Noise, RowStatus, TokenRow

CODE_VERSION = "gradients-1"
DRAWN = 1 << 14  # rows whose ids are hashed at a time
SAFETY = 4.0  # the bound is this many times the largest difference seen
# Rows that the pass could not measure; a row without a gradient is measured, and has none.
BAD = (RowStatus.NONFINITE_LOSS, RowStatus.NONFINITE_GRAD, RowStatus.OOM_AT_1, RowStatus.WORKER_CRASH)


@dataclass(frozen=True)
class Pass:
    """How a pass runs.

    Args:
        engine: the engine, entered.
        directions: names of the engine's directions, in its order.
        tokens_per_batch: longest row times rows of a micro-batch.
        pad_id: padding token.
        gradients: False measures losses only, and embeddings where the engine pools them.
        tick: called after every micro-batch with the rows and tokens done; raises to stop the run.
        extras: what else is measured by forwards.
        before: called with the rows of a micro-batch before it is measured.
    """

    engine: GradientEngine
    directions: tuple[str, ...]
    tokens_per_batch: int
    pad_id: int
    gradients: bool = True
    tick: Callable[[int, int], None] = lambda rows, tokens: None
    extras: Extras = NO_EXTRAS
    before: Callable[[Sequence[TokenRow]], None] = lambda rows: None


@dataclass(frozen=True)
class _Values:
    """What a few rows measured; NaN where a signal is not measured."""

    loss: Float[np.ndarray, " n"]
    norm: Float[np.ndarray, " n"]
    emb: Float[np.ndarray, " n"]
    head: Float[np.ndarray, " n"]
    dots: Float[np.ndarray, "n M"]
    sketch: Float[np.ndarray, "n D"] | None
    embedding: Float[np.ndarray, "n d"] | None
    extra: Mapping[str, Float[np.ndarray, "n ..."]]
    fits: bool = True


def measure_shard(run: Pass, rows: Sequence[TokenRow]) -> ShardResult:
    """Measure some usable rows of like length.

    Args:
        run: engine and settings.
        rows: n usable token rows, sorted by length.

    Returns:
        Their signals and statuses, in the order given.
    """
    parts, statuses = [], []
    order = packing_order(rows) if run.gradients and run.engine.trained_only else list(range(len(rows)))
    for batch in plan_batches(rows, order, run.tokens_per_batch):
        some = [rows[i] for i in batch]
        for values, part in _with_back_off(run, some):
            parts.append(values)
            statuses += [_status(values, k, row, run.gradients) for k, row in enumerate(part)]
        run.tick(len(some), sum(row.num_tokens for row in some))
    result = _result(run, [rows[i] for i in order], parts, statuses)
    return result if order == list(range(len(rows))) else result.take(np.argsort(order))


def packing_order(rows: Sequence[TokenRow]) -> list[int]:
    """Order rows of like length for held prompts: by what comes after the prompt, so that neither half is much padded.

    Args:
        rows: n usable token rows.

    Returns:
        A permutation of 0..n-1: by the tokens from the one that predicts the first trained token on, then as given.
    """
    tails = [row.num_tokens - int(row.trained[1:].argmax()) for row in rows]
    return sorted(range(len(rows)), key=lambda i: tails[i])


def unmeasured(run: Pass, rows: Sequence[TokenRow], status: RowStatus, reasons: Sequence[str]) -> ShardResult:
    """Give rows a status that says why they have no signals.

    Args:
        run: engine and settings.
        rows: n rows that nothing is measured of.
        status: of all of them; not a usable one.
        reasons: n sentences.

    Returns:
        A result without a number but their tokens.
    """
    return _result(run, rows, [_empty(run, rows)], [(status, reason) for reason in reasons])


def _result(
    run: Pass, rows: Sequence[TokenRow], parts: Sequence[_Values], statuses: Sequence[tuple[RowStatus, str]]
) -> ShardResult:
    usable = np.array([status.usable for status, _ in statuses])

    def column(name: str, extra: bool = False) -> Float[np.ndarray, "*shape"]:
        stacked = np.concatenate([p.extra[name] if extra else getattr(p, name) for p in parts])
        shape = (-1,) + (1,) * (stacked.ndim - 1)
        return np.where(usable.reshape(shape), stacked, np.nan)

    return ShardResult(
        ids=tuple(row.id for row in rows),
        content_hashes=tuple(content_of(row) for row in rows),
        status=tuple(status for status, _ in statuses),
        reason=tuple(reason for _, reason in statuses),
        num_tokens=np.array([row.num_tokens for row in rows]),
        num_trained=np.array([row.num_trained for row in rows]),
        loss=column("loss"),
        grad_norm=column("norm"),
        emb_grad_norm=column("emb"),
        head_grad_norm=column("head"),
        dots=column("dots"),
        directions=run.directions if run.gradients else (),
        sketch=column("sketch").astype(np.float32) if parts[0].sketch is not None else None,
        embedding=column("embedding").astype(np.float32) if parts[0].embedding is not None else None,
        extra={
            name: column(name, True).astype(np.float32 if name.startswith("hidden") or name == PARTS else np.float64)
            for name in run.extras.names
        },
    )


def _with_back_off(run: Pass, rows: Sequence[TokenRow]) -> Iterator[tuple[_Values, Sequence[TokenRow]]]:
    """Measure rows; out of memory halves the batch, and only what failed is redone."""
    try:
        yield _measure(run, rows), rows
        return
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        if calls.is_bound(run.engine.model):
            # The other processes are in the middle of this call, and halves of it would find nobody.
            raise ConfigError(
                "a micro-batch does not fit in memory, and the ranks that hold the model together cannot halve it",
                where="collect.tokens_per_batch",
                got=f"{len(rows)} rows of up to {max(row.num_tokens for row in rows)} tokens, from row {rows[0].id} on",
                do="give a smaller --set collect.tokens_per_batch or data.max_length, and the same command again",
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rows) == 1:
        yield _empty(run, rows, fits=False), rows
        return
    half = len(rows) // 2
    yield from _with_back_off(run, rows[:half])
    yield from _with_back_off(run, rows[half:])


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _measure(run: Pass, rows: Sequence[TokenRow]) -> _Values:
    run.before(rows)
    batch = collate(rows, range(len(rows)), run.pad_id)
    device = next(run.engine.model.parameters()).device
    input_ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    prompt = stack_masks(rows, input_ids.shape[1]).to(device) if run.extras.prompt else None
    with Taps(run.engine.model, run.extras.layers, batch.lengths.tolist(), run.engine.dtype) as taps:
        forward = run.engine.measure if run.gradients else run.engine.forward_only
        got = forward(input_ids, labels, batch.lengths, *(() if prompt is None else (prompt,)))
    extra = {hidden_name(layer): value.numpy() for layer, value in taps.values.items()}
    if got.prompt_loss is not None:
        extra["prompt_loss"] = got.prompt_loss.numpy()
    if run.extras.alone:
        extra["alone_loss"] = _alone(run, rows)
    if isinstance(got, Forwarded):
        return replace(_empty(run, rows, seen=got), extra=extra)
    if got.parts is not None:
        extra[PARTS] = got.parts.flatten(1).numpy()
    return _Values(
        got.loss.numpy(),
        got.square.clamp_min(0).sqrt().numpy(),
        got.emb_norm.numpy(),
        got.head_norm.numpy(),
        got.dots.numpy(),
        None if got.sketch is None else got.sketch.numpy(),
        None if got.embedding is None else got.embedding.numpy(),
        extra,
    )


def _alone(run: Pass, rows: Sequence[TokenRow]) -> Float[np.ndarray, " n"]:
    """Losses of the trained tokens alone, by a forward of their own."""
    short = [alone_row(row, run.extras.start_id) for row in rows]
    batch = collate(short, range(len(short)), run.pad_id)
    device = next(run.engine.model.parameters()).device
    return run.engine.forward_only(batch.input_ids.to(device), batch.labels.to(device), batch.lengths).loss.numpy()


def _empty(run: Pass, rows: Sequence[TokenRow], *, seen: Forwarded | None = None, fits: bool = True) -> _Values:
    """Values without gradients: NaN, except what a forward saw."""
    n = len(rows)
    nan = np.full(n, np.nan)
    projector = run.engine.projector
    sketch = np.full((n, projector.dim), np.nan) if run.gradients and projector is not None else None
    num_directions = len(run.directions) if run.gradients else 0
    dim = run.engine.embedding_dim
    embedding = None if dim is None else np.full((n, dim), np.nan)
    if seen is not None and seen.embedding is not None:
        embedding = seen.embedding.numpy()
    loss = nan if seen is None else seen.loss.numpy()
    extra = empty_extras(run.extras, run.engine.model, n)
    return _Values(loss, nan, nan, nan, np.full((n, num_directions), np.nan), sketch, embedding, extra, fits)


def _status(values: _Values, k: int, row: TokenRow, gradients: bool) -> tuple[RowStatus, str]:
    if not values.fits:
        return RowStatus.OOM_AT_1, f"its {row.num_tokens} tokens do not fit in memory alone"
    if not np.isfinite(values.loss[k]):
        return RowStatus.NONFINITE_LOSS, f"its loss is {values.loss[k]}"
    if values.embedding is not None and not np.isfinite(values.embedding[k]).all():
        # A token behind the last trained one can be broken without touching the loss.
        return RowStatus.NONFINITE_LOSS, f"its hidden states are not finite (its loss is {values.loss[k]:.4g})"
    for name, array in values.extra.items():
        if not np.isfinite(array[k]).all():
            return RowStatus.NONFINITE_LOSS, f"its {name} is not finite (its loss is {values.loss[k]:.4g})"
    if gradients:
        if not (np.isfinite(values.norm[k]) and np.isfinite(values.dots[k]).all()):
            return RowStatus.NONFINITE_GRAD, f"its gradient norm is {values.norm[k]}"
        if values.norm[k] == 0:
            return RowStatus.ZERO_GRAD, "its gradient is zero, so it has no direction"
    return row.status, row.reason


def embed_rows(run: Pass, rows: Sequence[TokenRow]) -> Float[np.ndarray, "n d"]:
    """Embed the rows of a target with a forward alone.

    Args:
        run: a pass whose engine pools embeddings, not entered.
        rows: n usable token rows.

    Returns:
        float32 [n, d] in content order (:func:`gradsift.gradients.embed.content_order`).

    Raises:
        NumericsError: a row could not be embedded; it is named.
    """
    ordered = sorted(rows, key=lambda row: (row.num_tokens, row.id))
    with run.engine:
        got = measure_shard(replace(run, gradients=False, directions=(), extras=NO_EXTRAS), ordered)
    bad = np.flatnonzero(~got.usable)
    if bad.size:
        raise NumericsError(
            "a target row cannot be embedded",
            where=f"target row {got.ids[bad[0]]}",
            got=f"{got.status[bad[0]]}: {got.reason[bad[0]]}",
            expected="finite hidden states",
            do="look at this row with gradsift inspect, or leave it out of the target",
        )
    assert got.embedding is not None
    return reorder(got.embedding, got.ids, content_order(rows))


def measure_noise(
    run: Pass, rows: Sequence[TokenRow], shard_values: Callable[[str], ShardResult], stream: Stream, *, count: int = 8
) -> Noise:
    """Measure a few rows again, each alone, and compare with what its batch gave.

    Args:
        run: engine and settings.
        rows: the usable rows of the pool.
        shard_values: id -> the one-row result that is stored.
        stream: names which rows are drawn.
        count: how many rows.

    Returns:
        Bounds: SAFETY times the largest difference, and never below 16 units of rounding of the arithmetic used.
    """
    parts = [rows[start : start + DRAWN] for start in range(0, len(rows), DRAWN)]  # all ids at once would be held
    keys = np.concatenate([np.zeros(0), *(stream.uniform([row.id for row in some]) for some in parts)])
    drawn = [rows[i] for i in np.argsort(keys, kind="stable")[:count]]
    floor = 16 * float(torch.finfo(run.engine.dtype).eps)
    loss = norm = cos = turned = 0.0
    for row in drawn:
        stored = shard_values(row.id)
        if not stored.usable[0]:  # a row that killed a process would kill this one
            continue
        alone = measure_shard(run, [row])
        if not alone.usable[0]:
            continue
        loss = max(loss, abs(float(alone.loss[0] - stored.loss[0])))
        for name in {"prompt_loss", "alone_loss"} & set(alone.extra):  # one bound for every loss
            loss = max(loss, abs(float(alone.extra[name][0] - stored.extra[name][0])))
        if alone.embedding is not None and stored.embedding is not None:
            turned = max(turned, unit_distance(alone.embedding[0], stored.embedding[0]))
        if run.gradients:
            norm = max(norm, abs(float(alone.grad_norm[0] / stored.grad_norm[0] - 1)))
            if run.directions:
                difference = alone.dots / alone.grad_norm[:, None] - stored.dots / stored.grad_norm[:, None]
                cos = max(cos, float(np.abs(difference).max()))
    largest_loss = max((abs(float(shard_values(row.id).loss[0])) for row in drawn), default=1.0)
    return Noise(
        loss=SAFETY * loss + floor * max(1.0, largest_loss),
        norm=SAFETY * norm + floor,
        cos=SAFETY * cos + floor,
        num_rows=len(drawn),
        # Either of the two embeddings of a cosine may turn.
        embedding=0.0 if run.engine.embedding_dim is None else SAFETY * 2 * turned + floor,
    )


def refuse_if_mostly_bad(counts: Mapping[RowStatus, int], abort_share: float, num_rows: int = 0) -> None:
    """Stop a run whose rows mostly cannot be measured: the model or its arithmetic is broken, not the rows.

    Args:
        counts: measured rows by status.
        abort_share: largest accepted share of ``num_rows``, in [0, 1].
        num_rows: rows that are measured in all; 0 takes those measured so far.

    Raises:
        NumericsError: the share is exceeded whatever the other rows give; or more than half of at least 20 rows
            measured so far, and more than the share of them, are bad.
    """
    total, bad = sum(counts.values()), sum(counts.get(status, 0) for status in BAD)
    if total < min(20, num_rows or 20):
        return
    if bad > abort_share * max(num_rows, total) or bad > max(0.5, abort_share) * total:
        seen = ", ".join(f"{status.value} {counts[status]}" for status in BAD if counts.get(status))
        raise NumericsError(
            "too many rows cannot be measured",
            where="collect.abort_share",
            got=f"{bad} of {total} rows so far ({seen}), of {max(num_rows, total)} in all",
            expected=f"at most {abort_share:.0%}",
            do="run gradsift doctor; try navigator.dtype=float32, or raise collect.abort_share",
        )
