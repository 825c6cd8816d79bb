"""The audit table: one entry per input row, in input order, null where not measured; written a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float32, Int64

from gradsift.data.ids import Ids
from gradsift.data.rows import STATUSES
from gradsift.data.token_rows import TokenRows
from gradsift.manifest import publish
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared
from gradsift.types import Problem, RowStatus, Selection

PART = 1 << 16  # rows that are strings at a time, and a row group of the file
_USABLE = np.array([status.usable for status in STATUSES])
_PROBED = ("likeness", "held_out_loss")
_CODES = {status: code for code, status in enumerate(STATUSES)}


class AuditRows:
    """What every input row was, what was measured and why it was kept or dropped; numbers are held, sentences made by the part.

    Args:
        prepared: the run's inputs.
        measured: the signals, or None.
        problem: the eligible rows.
        selection: the choice among them.
        part: rows of a part.
    """

    def __init__(
        self,
        prepared: Prepared,
        measured: Measurement | None,
        problem: Problem,
        selection: Selection,
        part: int = PART,
    ) -> None:
        assert isinstance(prepared.pool.tokens, TokenRows)
        self._pool, self._tokens = prepared.pool.pool, prepared.pool.tokens.table
        self._measured, self._selection, self._part = measured, selection, part
        self._place = _found(self._pool.index, selection.problem_ids)
        self._order = _found(self._pool.index, selection.ids)
        self._undecided = _found(self._pool.index, selection.cut.undecided) >= 0
        self._status = self._tokens.columns.status.copy()
        # Where each row, or the first copy of it, was measured.
        self._stored = np.full(len(self._pool), -1, dtype=np.int64)
        self._failed = np.zeros(len(self._pool), dtype=bool)
        if measured is not None:
            self._stored = _found(self._pool.index, measured.store.ids)[self._pool.first]
            codes = np.fromiter(map(_CODES.__getitem__, measured.store.status), np.uint8, len(measured.store.ids))
            found = np.append(codes, _CODES[RowStatus.OK])[self._stored]
            self._failed = _USABLE[self._status] & ~_USABLE[found]
            self._status[self._failed] = found[self._failed]
        self._signals = self._columns()
        for name in _PROBED:  # what crossfit looks at, where it was measured
            values = getattr(problem, name)
            self._signals |= {} if values is None else {name: _aligned(values, self._place)}

    def __len__(self) -> int:
        return len(self._pool)

    def parts(self) -> Iterator[pa.Table]:
        """Give the table from top to bottom.

        Yields:
            Up to ``part`` rows with the columns of ``audit.parquet``; one empty table for a pool without rows.
        """
        for start in range(0, max(len(self), 1), self._part):
            yield self._table(np.arange(start, min(start + self._part, len(self))))

    def counts(self) -> dict[str, Any]:
        """Count rows and tokens for the manifest.

        Returns:
            Rows read and usable, rows per status and per source, tokens of the usable rows.
        """
        columns, usable = self._tokens.columns, _USABLE[self._status]
        codes, at, counts = np.unique(self._status, return_index=True, return_counts=True)
        sources: dict[str, dict[str, int]] = {}
        for file, start in zip(self._pool.files, self._pool.starts, strict=False):
            if not file.num_rows:
                continue
            here = slice(start, start + file.num_rows)
            entry = sources.setdefault(file.label, {"read": 0, "usable": 0, "trained_tokens": 0})
            entry["read"] += file.num_rows
            entry["usable"] += int(usable[here].sum())
            entry["trained_tokens"] += int(columns.num_trained[here][usable[here]].sum(dtype=np.int64))
        return {
            "read": len(self),
            "status": {STATUSES[codes[k]].value: int(counts[k]) for k in np.argsort(at)},
            "usable": int(usable.sum()),
            "tokens": int(columns.num_tokens[usable].sum(dtype=np.int64)),
            "trained_tokens": int(columns.num_trained[usable].sum(dtype=np.int64)),
            "sources": sources,
        }

    def _columns(self) -> dict[str, Float32[np.ndarray, " N"] | None]:
        """Numbers by column, NaN where not measured; None for a column of nulls."""
        columns: dict[str, Float32[np.ndarray, " N"] | None] = {"loss": None, "grad_norm": None}
        if self._measured is None:
            return columns
        store = self._measured.store
        signals = {"loss": store.loss, "grad_norm": store.grad_norm}
        for direction in self._measured.directions:
            name = "cos_target" if direction.role == "target" else f"cos_{direction.name}"
            signals[name] = store.dots([direction.name])[:, 0] / store.grad_norm
        if "emb_grad_norm" in store.spec.signals:
            signals |= {"emb_grad_norm": store.emb_grad_norm, "head_grad_norm": store.head_grad_norm}
        at = np.where(_USABLE[self._status], self._stored, -1)
        return columns | {name: _aligned(values, at) for name, values in signals.items()}

    def _table(self, rows: Int64[np.ndarray, " n"]) -> pa.Table:
        pool, chosen = self._pool, self._selection
        place, order, known = self._place[rows], self._order[rows], chosen.cut.known
        part = np.searchsorted(pool.starts, rows, side="right") - 1
        files = [pool.files[k] for k in part.tolist()]
        status = [STATUSES[code].value for code in self._status[rows].tolist()]
        columns: dict[str, pa.Array] = {
            "id": pa.array([pool.index.at(i) for i in rows.tolist()], pa.string()),
            "source": pa.array([file.label for file in files], pa.string()),
            "file": pa.array([file.path for file in files], pa.string()),
            "row": pa.array(rows - np.array(pool.starts)[part], pa.int64()),
            "status": pa.array(status, pa.string()),
            "num_tokens": pa.array(self._tokens.columns.num_tokens[rows], pa.int32()),
            "num_trained": pa.array(self._tokens.columns.num_trained[rows], pa.int32()),
            **{name: _floats(self._signals[name], rows) for name in self._signals if name not in _PROBED},
            "score": _taken(chosen.score, place, pa.float64()),
            "rank": _taken(chosen.rank, place, pa.int32()),
            "cluster": _taken(chosen.cluster, place, pa.int32()),
            "selected": pa.array(order >= 0, pa.bool_()),
            "order": pa.array(order, pa.int32(), mask=order < 0),
            "weight": _taken(chosen.weights, order, pa.float32()),
            "undecided": pa.array(self._undecided[rows], pa.bool_()) if known else pa.nulls(len(rows), pa.bool_()),
            "reason_code": pa.array(
                [
                    chosen.reason_code[i] if i >= 0 else f"unusable:{word.lower()}"
                    for i, word in zip(place, status, strict=True)
                ],
                pa.string(),
            ),
            "reason": pa.array([self._reason(int(i)) for i in rows], pa.string()),
        }
        return pa.table(
            columns | {name: _floats(self._signals[name], rows) for name in _PROBED if name in self._signals}
        )

    def _reason(self, i: int) -> str:
        if self._place[i] >= 0:
            return self._selection.reason[self._place[i]]
        if self._failed[i]:
            assert self._measured is not None
            return self._measured.store.reason[self._stored[i]]
        return self._tokens.reason(i)


def _found(index: Ids, ids: Sequence[str]) -> Int64[np.ndarray, " N"]:
    """int64 [N] where each row of the pool stands among some ids, -1 for nowhere; ids of other pools are passed over."""
    at = index.find(ids)
    out = np.full(len(index) + 1, -1, dtype=np.int64)
    out[at] = np.arange(len(ids))
    return out[:-1]  # the last one took the ids that no row has


def _taken(values: np.ndarray, at: Int64[np.ndarray, " n"], kind: pa.DataType) -> pa.Array:
    """Values at places; null for no place, NaN and, among whole numbers, what is below zero."""
    out = np.append(values, values.dtype.type(0))[at]
    missing = (at < 0) | (np.isnan(out) if out.dtype.kind == "f" else out < 0)
    return pa.array(out, mask=missing).cast(kind)


def _aligned(values: Float[np.ndarray, " n"], at: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, " N"]:
    """float32 [N] values at places; NaN for no place and for what is not finite."""
    some = np.append(np.where(np.isfinite(values), values, np.nan), np.nan).astype(np.float32)
    return some[at]


def _floats(values: Float32[np.ndarray, " N"] | None, rows: Int64[np.ndarray, " n"]) -> pa.Array:
    if values is None:
        return pa.nulls(len(rows), pa.float32())
    return pa.array(values[rows], pa.float32(), mask=np.isnan(values[rows]))


def write_audit(rows: AuditRows, path: Path) -> None:
    """Publish the audit table, a part at a time.

    Args:
        rows: all of them.
        path: ``audit.parquet``.

    Raises:
        StoreError: an error of the disk (DiskFullError when it is full); ``path`` is as it was.
    """

    def write(temporary: Path) -> None:
        parts = rows.parts()
        first = next(parts)
        with temporary.open("wb") as file, pq.ParquetWriter(file, first.schema) as writer:
            for table in chain([first], parts):
                writer.write_table(table)

    publish(path, write)
