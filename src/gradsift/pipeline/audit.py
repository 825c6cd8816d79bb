"""The audit table: one row per input row, in input order, null where not measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradsift.manifest import write_bytes_atomic
from gradsift.pipeline.measure import Measurement
from gradsift.pipeline.prepare import Prepared
from gradsift.types import Problem, RowStatus, Selection


def audit_table(prepared: Prepared, measured: Measurement | None, selection: Selection) -> pa.Table:
    """Say of every input row what it was, what was measured and why it was kept or dropped.

    Args:
        prepared: the run's inputs.
        measured: the signals, or None.
        selection: the choice.

    Returns:
        A table with the columns of ``audit.parquet``.
    """
    pool, tokens = prepared.pool.pool, prepared.pool.tokens
    ids, files = list(pool.index), pool.files
    first = [ids[i] for i in pool.first.tolist()]
    place = {row: i for i, row in enumerate(selection.problem_ids)}
    order = {row: i for i, row in enumerate(selection.ids)}
    weight = dict(zip(selection.ids, selection.weights.tolist(), strict=True))
    status, reason = _statuses(prepared, measured, first)
    at = [place.get(row) for row in ids]
    del place  # at a million rows it would stay beside everything below

    def chosen(values: Sequence[Any], kind: pa.DataType, missing: Any = None) -> pa.Array:
        out = [missing if i is None else values[i] for i in at]
        return pa.array([None if isinstance(v, float) and np.isnan(v) else v for v in out], kind)

    reasons = [reason[n] if i is None else selection.reason[i] for n, i in enumerate(at)]
    codes = [f"unusable:{status[n].lower()}" if i is None else selection.reason_code[i] for n, i in enumerate(at)]
    columns: dict[str, pa.Array] = {
        "id": pa.array(ids, pa.string()),
        "source": pa.array(pool.labels(), pa.string()),
        "file": pa.array([file.path for file in files for _ in range(file.num_rows)], pa.string()),
        "row": pa.array([i for file in files for i in range(file.num_rows)], pa.int64()),
        "status": pa.array(status, pa.string()),
        "num_tokens": pa.array([row.num_tokens for row in tokens], pa.int32()),
        "num_trained": pa.array([row.num_trained for row in tokens], pa.int32()),
        **_signals(measured, first, status),
        "score": chosen(selection.score.tolist(), pa.float64()),
        "rank": chosen([None if r < 0 else r for r in selection.rank.tolist()], pa.int32()),
        "cluster": chosen([None if c < 0 else c for c in selection.cluster.tolist()], pa.int32()),
        "selected": pa.array([row in order for row in ids], pa.bool_()),
        "order": pa.array([order.get(row) for row in ids], pa.int32()),
        "weight": pa.array([weight.get(row) for row in ids], pa.float32()),
        "reason_code": pa.array(codes, pa.string()),
        "reason": pa.array(reasons, pa.string()),
    }
    return pa.table(columns)


def _statuses(prepared: Prepared, measured: Measurement | None, first: Sequence[str]) -> tuple[list[str], list[str]]:
    """Final status and reason of every row: that of reading, tokenizing, or measuring (of the first copy)."""
    found = {} if measured is None else {r: i for i, r in enumerate(measured.store.ids)}
    status, reason = [], []
    for row, original in zip(prepared.pool.tokens, first, strict=True):
        i = found.get(original) if row.status.usable and measured is not None else None
        if i is not None and measured is not None and not measured.store.status[i].usable:
            status.append(measured.store.status[i].value)
            reason.append(measured.store.reason[i])
        else:
            status.append(row.status.value)
            reason.append(row.reason)
    return status, reason


def _signals(measured: Measurement | None, first: Sequence[str], status: Sequence[str]) -> dict[str, pa.Array]:
    empty = pa.nulls(len(first), pa.float32())
    if measured is None:
        return {"loss": empty, "grad_norm": empty}
    store = measured.store
    place = {row: i for i, row in enumerate(store.ids)}
    usable = [RowStatus(s).usable for s in status]
    at = [place.get(row) if ok else None for row, ok in zip(first, usable, strict=True)]

    def column(values: np.ndarray) -> pa.Array:
        out = [None if i is None or not np.isfinite(values[i]) else float(values[i]) for i in at]
        return pa.array(out, pa.float32())

    columns = {"loss": column(store.loss), "grad_norm": column(store.grad_norm)}
    for direction in measured.directions:
        cos = store.dots([direction.name])[:, 0] / store.grad_norm
        name = "cos_target" if direction.role == "target" else f"cos_{direction.name}"
        columns[name] = column(cos)
    if "emb_grad_norm" in store.spec.signals:
        columns["emb_grad_norm"] = column(store.emb_grad_norm)
        columns["head_grad_norm"] = column(store.head_grad_norm)
    return columns


def with_probes(table: pa.Table, problem: Problem) -> pa.Table:
    """Add what crossfit looks at, where it was measured: likeness and loss under probes, null for rows never eligible.

    Args:
        table: from :func:`audit_table`.
        problem: the eligible rows.

    Returns:
        The table, with the columns ``likeness`` and ``held_out_loss`` where the problem has them.
    """
    place = {row: i for i, row in enumerate(problem.ids)}
    at = [place.get(row) for row in table["id"].to_pylist()]
    for name in ("likeness", "held_out_loss"):
        values = getattr(problem, name)
        if values is not None:
            column = pa.array([None if i is None else float(values[i]) for i in at], pa.float32())
            table = table.append_column(name, column)
    return table


def write_audit(table: pa.Table, path: Path) -> None:
    """Publish the audit table.

    Args:
        table: from :func:`audit_table`.
        path: ``audit.parquet``.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes_atomic(path, buffer.getbuffer())
