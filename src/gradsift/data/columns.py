"""Columns of the raw rows that a method reads: scores and labels that somebody else made (ours)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradsift.data.pool import Pool
from gradsift.errors import DataError
from gradsift.types import Column


def read_columns(pool: Pool, ids: Sequence[str], columns: Sequence[Column]) -> dict[str, np.ndarray]:
    """Read some columns of some rows.

    Args:
        pool: the rows as read.
        ids: N row ids, in the order wanted.
        columns: which columns, and what they hold.

    Returns:
        Name -> float64 [N] for numbers, otherwise object [N] of strings, tuples of numbers, tuples of strings, or tuples
        of tuples of numbers.

    Raises:
        DataError: a column is missing in a row or holds something else; it is named, with how many rows and three ids.
    """
    if not columns:
        return {}
    values: dict[str, list[Any]] = {column.name: [] for column in columns}
    for position in pool.index.find(ids).tolist():
        row = _parse(pool.raw(position))
        for name, some in values.items():
            some.append(row.get(name))
    return {column.name: _read(column, ids, values[column.name]) for column in columns}


def _parse(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    return value if isinstance(value, dict) else {}


def _read(column: Column, ids: Sequence[str], values: Sequence[Any]) -> np.ndarray:
    if column.optional and any(v is not None for v in values):
        values = ["" if v is None else v for v in values]
    found = [None if v is None else _READERS[column.kind](v) for v in values]
    bad = [k for k, v in enumerate(found) if v is None]
    if bad:
        missing = sum(values[k] is None for k in bad)
        raise DataError(
            f"column {column.name} is missing"
            if missing
            else f"column {column.name} does not hold {_NOUNS[column.kind]}",
            where=f"{len(bad)} of {len(ids)} rows, such as {', '.join(ids[k] for k in bad[:3])}",
            got="no such column, or null" if missing else repr(values[bad[0]])[:80],
            expected=f"{_NOUNS[column.kind]} in every row",
            do="write the column into the pool files first (gradsift makes no such scores), or choose another method",
        )
    if column.kind == "number":
        return np.array(found, dtype=np.float64)
    out = np.empty(len(found), dtype=object)
    out[:] = found
    return out


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have no end
        return None
    return number if math.isfinite(number) else None


def _numbers(value: Any) -> tuple[float, ...] | None:
    if not isinstance(value, list):
        return None
    numbers = [_number(v) for v in value]
    return None if None in numbers else tuple(v for v in numbers if v is not None)


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _words(value: Any) -> tuple[str, ...] | None:
    return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else None


def _vectors(value: Any) -> tuple[tuple[float, ...], ...] | None:
    if not isinstance(value, list):
        return None
    vectors = [_numbers(v) for v in value]
    if any(v is None for v in vectors) or len({len(v) for v in vectors if v is not None}) > 1:
        return None
    return tuple(v for v in vectors if v is not None)


_READERS = {"number": _number, "numbers": _numbers, "word": _word, "words": _words, "vectors": _vectors}
_NOUNS = {
    "number": "a finite number",
    "numbers": "a list of finite numbers",
    "word": "a string",
    "words": "a list of strings",
    "vectors": "a list of vectors of one length",
}
