"""Reading one shard back: nothing is believed before its bytes match the commit record (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Float16, Float32, Int

from gradsift.manifest import read_error, sha256_bytes
from gradsift.store.ledger import SHARDS, Record, damage
from gradsift.store.shards import COLUMNS, embedding_file, extra_file, rows_file, sketch_file, unit_name
from gradsift.store.spec import GradientSpec
from gradsift.types import RowStatus

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class RowTable:
    """One shard's rows as read back; NaN where not measured.

    Args:
        ids: n ids.
        content_hashes: n hashes.
        status: n statuses.
        reason: n sentences.
        num_tokens: int64 [n].
        num_trained: int64 [n].
        columns: the four norms and losses, float64 [n] each.
        dots: float64 [n, M], directions in the spec's order.
    """

    ids: tuple[str, ...]
    content_hashes: tuple[str, ...]
    status: tuple[RowStatus, ...]
    reason: tuple[str, ...]
    num_tokens: Int[np.ndarray, " n"]
    num_trained: Int[np.ndarray, " n"]
    columns: Mapping[str, Float[np.ndarray, " n"]]
    dots: Float[np.ndarray, "n M"]


def read_checked(folder: Path, record: Record, name: str) -> bytes:
    """Read one of a shard's files and compare it with its record.

    Args:
        folder: the store's folder.
        record: the shard's record.
        name: one of its files.

    Returns:
        The file's bytes, exactly as they were committed.

    Raises:
        StoreError: the file is missing, has another size or other bytes.
    """
    mark = record.files[name]
    path = folder / SHARDS / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise damage(folder, record, name, "no such file", f"{mark.bytes} bytes") from None
    except OSError as error:
        raise read_error(error, path) from error
    if len(data) != mark.bytes:
        raise damage(folder, record, name, f"{len(data)} bytes", f"{mark.bytes} bytes")
    found = sha256_bytes(data)
    if found != mark.sha256:
        raise damage(folder, record, name, f"sha256 {found}", f"sha256 {mark.sha256}")
    return data


def decode_rows(folder: Path, record: Record, spec: GradientSpec) -> RowTable:
    """Read a shard's row table, checked against its record.

    Args:
        folder: the store's folder.
        record: the shard's record.
        spec: the store's spec.

    Returns:
        The rows.

    Raises:
        StoreError: the file is damaged or does not hold the rows that the record names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = rows_file(record.unit)
    if name not in record.files:
        raise damage(folder, record, name, "no row table in the record", "one row table")
    data = read_checked(folder, record, name)
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        text = {c: tuple(table[c].to_pylist()) for c in ("id", "content_hash", "status", "reason")}
        rows = RowTable(
            ids=text["id"],
            content_hashes=text["content_hash"],
            status=tuple(RowStatus(status) for status in text["status"]),
            reason=text["reason"],
            num_tokens=_numbers(table, "num_tokens", np.int64),
            num_trained=_numbers(table, "num_trained", np.int64),
            columns={c: _numbers(table, c, np.float64) for c in COLUMNS},
            dots=_stack([_numbers(table, f"dot_{d}", np.float64) for d in spec.directions], len(text["id"])),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:  # Arrow raises OSError of its own
        raise damage(folder, record, name, f"{type(error).__name__}: {error}", "a row table of this version") from error
    if len(rows.ids) != record.num_rows or unit_name(rows.ids, rows.content_hashes) != record.unit:
        raise damage(folder, record, name, f"{len(rows.ids)} other rows", f"the {record.num_rows} rows it is named for")
    return rows


def _numbers(table: pa.Table, name: str, dtype: Any) -> np.ndarray:
    return table[name].to_numpy().astype(dtype, copy=False)


def _stack(columns: list[np.ndarray], num_rows: int) -> Float[np.ndarray, "n M"]:
    return np.stack(columns, axis=1) if columns else np.zeros((num_rows, 0))


def map_sketch(folder: Path, record: Record, spec: GradientSpec) -> Float16[np.ndarray, "n D"]:
    """Memory-map a shard's unit sketches; the caller has checked the file's hash with :func:`read_checked`.

    Args:
        folder: the store's folder.
        record: the shard's record.
        spec: the store's spec.

    Returns:
        float16 [n, D], read-only; NaN for rows that are not usable.

    Raises:
        StoreError: the file does not hold n sketches of size D.
    """
    assert spec.projection is not None
    array, name = _map_array(folder, record, sketch_file(record.unit), "float16")
    shape = (record.num_rows, spec.projection.dim)
    if array.shape != shape or array.dtype != np.float16:
        raise damage(folder, record, name, f"{array.dtype} {array.shape}", f"float16 {shape}")
    return array


def map_embedding(folder: Path, record: Record) -> Float32[np.ndarray, "n d"]:
    """Memory-map a shard's embeddings; the caller has checked the file's hash with :func:`read_checked`.

    Args:
        folder: the store's folder.
        record: the shard's record.

    Returns:
        float32 [n, d], read-only; NaN for rows that are not usable. The model decides d.

    Raises:
        StoreError: the file does not hold n embeddings.
    """
    array, name = _map_array(folder, record, embedding_file(record.unit), "float32")
    if array.ndim != 2 or len(array) != record.num_rows or array.dtype != np.float32:
        raise damage(folder, record, name, f"{array.dtype} {array.shape}", f"float32 of {record.num_rows} rows")
    return array


def map_extra(folder: Path, record: Record, name: str) -> Float[np.ndarray, "n ..."]:
    """Memory-map one of a shard's extra signals; the caller has checked the file's hash with :func:`read_checked`.

    Args:
        folder: the store's folder.
        record: the shard's record.
        name: the signal.

    Returns:
        float64 [n] or float32 [n, d], read-only; NaN for rows that are not usable.

    Raises:
        StoreError: the file does not hold n numbers or vectors.
    """
    array, file = _map_array(folder, record, extra_file(record.unit, name), "floats")
    if (array.ndim, array.dtype) not in ((1, np.float64), (2, np.float32)) or len(array) != record.num_rows:
        raise damage(folder, record, file, f"{array.dtype} {array.shape}", f"floats of {record.num_rows} rows")
    return array


def _map_array(folder: Path, record: Record, name: str, dtype: str) -> tuple[np.ndarray, str]:
    try:
        array = np.load(folder / SHARDS / name, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise damage(folder, record, name, "no such file", "an array") from None
    except (OSError, ValueError) as error:
        raise damage(folder, record, name, f"{type(error).__name__}: {error}", f"an array of {dtype}") from error
    return array, name
