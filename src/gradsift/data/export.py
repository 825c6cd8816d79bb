"""Rows back out, unchanged: ``selected.jsonl``, and ``selected.parquet`` when everything came in as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.data.rows import STATUSES, Pool
from gradsift.data.tables import TableRows
from gradsift.manifest import publish, write_json_atomic
from gradsift.types import Note

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Exported:
    """Files that were written.

    Args:
        paths: ``selected.jsonl``, and ``selected.parquet`` where it applies.
        notes: what could not be written as it came in, and why.
    """

    paths: tuple[Path, ...]
    notes: tuple[Note, ...] = ()


def write_selected(pool: Pool, ids: Sequence[str], folder: Path) -> Exported:
    """Write rows in the order given; a full disk is a ``DiskFullError`` and leaves nothing half-written.

    Rows of JSON Lines files are written byte for byte and one newline; other rows as one JSON object with equal
    values. When every file of the pool is Parquet or Arrow, ``selected.parquet`` holds the same rows with their schema.

    Args:
        pool: the rows as read.
        ids: k unique ids of rows that are OK.
        folder: created when absent; files in it of the same names are replaced.

    Returns:
        The files and notes.

    Raises:
        ValueError: an id is unknown, stands twice, or its row is not OK (our own mistake).
    """
    if len(set(ids)) != len(ids):
        raise ValueError("write_selected: an id stands twice")
    found = pool.index.find(ids)
    if (found < 0).any():
        raise ValueError(f"write_selected: unknown id {ids[int(np.argmin(found))]!r}")
    positions = found.tolist()
    unusable = [p for p in positions if not STATUSES[pool.columns.status[p]].usable]
    if unusable:
        row = pool.row(unusable[0])
        raise ValueError(f"write_selected: row {row.id!r} is {row.status}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "selected.jsonl"]
    publish(paths[0], lambda temporary: _write_lines(pool, positions, temporary))
    target = folder / "selected.parquet"
    parts = [part for part in pool.parts if isinstance(part, TableRows)]
    if not parts or len(parts) != len(pool.parts):
        target.unlink(missing_ok=True)  # a table of an earlier selection must not stay beside this one
        return Exported(tuple(paths))
    notes = _write_table(pool, parts, positions, target)
    return Exported((*paths, target) if target.exists() else tuple(paths), notes)


def write_mixture(mixture: Mapping[str, float] | None, folder: Path) -> tuple[Path, ...]:
    """Write domain probabilities for a trainer that samples: ``mixture.json``, domain -> probability.

    A domain is a label of the pool, ``merged`` for the labels that were put together, or ``cluster-N`` for the rows whose
    ``cluster`` in ``audit.parquet`` is N.

    With one data set per label, in any order, it is one line for ``datasets``, whose default stops at the first data set
    that runs out::

        interleave_datasets([parts[name] for name in mixture], probabilities=list(mixture.values()), seed=42,
                            stopping_strategy="all_exhausted")

    Args:
        mixture: of a selection; None removes the file of an earlier one.
        folder: of the selection.

    Returns:
        The file, or nothing.
    """
    path = folder / "mixture.json"
    if mixture is None:
        path.unlink(missing_ok=True)
        return ()
    write_json_atomic(path, dict(mixture))
    return (path,)


def _write_lines(pool: Pool, positions: Sequence[int], temporary: Path) -> None:
    with temporary.open("wb") as file:
        for position in positions:
            file.write(pool.raw(position))
            file.write(b"\n")


def _write_table(pool: Pool, parts: Sequence[TableRows], positions: Sequence[int], target: Path) -> tuple[Note, ...]:
    """Write the rows as Parquet; what cannot be kept exactly is a note, and a table that would differ is not kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    target.unlink(missing_ok=True)
    try:
        table = _gather(pool, parts, positions)
        publish(target, lambda temporary: pq.write_table(table, temporary))
    except (pa.ArrowException, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        text = f"selected.parquet was not written: {reason}. selected.jsonl holds every row"
        return (Note("no_parquet", text, len(positions)),)
    with pq.ParquetFile(target) as file:
        stored = file.schema_arrow
    changed = [
        f"{field.name}: {field.type} is stored as {stored.field(i).type}"
        for i, field in enumerate(table.schema)
        if field.type != stored.field(i).type
    ]
    return (Note("parquet_types", "Parquet lacks these types: " + "; ".join(changed), len(changed)),) if changed else ()


def _gather(pool: Pool, parts: Sequence[TableRows], positions: Sequence[int]) -> pa.Table:
    """Take the rows out of each file and put them in the order given."""
    import pyarrow as pa

    wanted = np.asarray(positions, dtype=np.int64)
    owner = np.asarray([pool.file_of(p) for p in positions], dtype=np.int64)
    taken = [part.table.take(wanted[owner == f] - pool.starts[f]) for f, part in enumerate(parts)]
    table = taken[0] if len(taken) == 1 else _concatenate(taken)
    # The concatenation is ordered by file: the stable sort of owners says where each row went.
    back = np.empty(len(wanted), dtype=np.int64)
    back[np.argsort(owner, kind="stable")] = np.arange(len(wanted))
    return table.take(pa.array(back))


def _concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Unify schemas: a missing column or struct field becomes null; wider number types only if no value changes."""
    import pyarrow as pa

    if all(table.schema.equals(tables[0].schema, check_metadata=True) for table in tables):
        return pa.concat_tables(tables)
    # What the metadata say of one schema (pandas, datasets) is not true of the union.
    bare = [table.replace_schema_metadata(None) for table in tables]
    joined = pa.concat_tables(bare, promote_options="permissive")
    start = 0
    for table in bare:
        for name in table.column_names:
            before, after = table.column(name), joined.column(name).slice(start, table.num_rows)
            if before.type != after.type and not _covers(after.to_pylist(), before.to_pylist()):
                raise pa.ArrowInvalid(f"column {name!r} is {before.type} in one file and {after.type} in the union")
        start += table.num_rows
    return joined


def _covers(after: Any, before: Any) -> bool:
    """Say whether ``after`` is ``before`` with nothing but null fields added."""
    if isinstance(before, dict) and isinstance(after, dict):
        return all(
            _covers(value, before[key]) if key in before else value is None for key, value in after.items()
        ) and set(before) <= set(after)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_covers, after, before))
    return after == before or (before != before and after != after)
