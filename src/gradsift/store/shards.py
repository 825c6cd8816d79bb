"""One shard: a few rows' signals as a Parquet row table and arrays of sketches (float16) and embeddings (float32) (ours).

A sketch is stored divided by the row's gradient norm: norms range over many powers of ten and float16 does not, while
the entries of a unit gradient's sketch are near 1/sqrt(D). The norm itself is in the row table, in float64.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.errors import DataError, NumericsError
from gradsift.manifest import hash_parts, sha256_bytes
from gradsift.store.ledger import FileMark, Record
from gradsift.store.spec import GradientSpec
from gradsift.types import RowStatus

_TEXTS = ("ids", "content_hashes", "status", "reason")
COLUMNS = ("loss", "grad_norm", "emb_grad_norm", "head_grad_norm")


@dataclass(frozen=True)
class ShardResult:
    """What one shard's rows measured; the constructor checks shapes only, ``encode_shard`` the numbers.

    NaN means not measured: rows that could not be measured, and signals that were not asked for.

    Args:
        ids: n row ids, unique.
        content_hashes: n hashes of token ids and mask.
        status: n statuses.
        reason: n sentences, empty for OK.
        num_tokens: int [n].
        num_trained: int [n].
        loss: float64 [n] mean nats per trained token.
        grad_norm: float64 [n].
        emb_grad_norm: float64 [n].
        head_grad_norm: float64 [n].
        dots: float64 [n, M] dots with the directions, in the order of ``directions``.
        directions: M names.
        sketch: float32 [n, D] sketches of the whole gradient, not yet divided by its norm, or None.
        embedding: float32 [n, d] pooled hidden states, or None.
        extra: other signals by name: float64 [n] or float32 [n, d]; stored in files of their own.
    """

    ids: tuple[str, ...]
    content_hashes: tuple[str, ...]
    status: tuple[RowStatus, ...]
    reason: tuple[str, ...]
    num_tokens: Int[np.ndarray, " n"]
    num_trained: Int[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    grad_norm: Float[np.ndarray, " n"]
    emb_grad_norm: Float[np.ndarray, " n"]
    head_grad_norm: Float[np.ndarray, " n"]
    dots: Float[np.ndarray, "n M"]
    directions: tuple[str, ...] = ()
    sketch: Float[np.ndarray, "n D"] | None = None
    embedding: Float[np.ndarray, "n d"] | None = None
    extra: Mapping[str, Float[np.ndarray, "n ..."]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(set(self.ids)) != n:
            raise ValueError("ShardResult.ids must be unique")
        for name in ("content_hashes", "status", "reason", "num_tokens", "num_trained", *COLUMNS, "dots"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"ShardResult.{name} has {len(getattr(self, name))} rows, expected {n}")
        if self.dots.shape != (n, len(self.directions)):
            raise ValueError(f"ShardResult.dots is {self.dots.shape}, expected {(n, len(self.directions))}")
        for name, array in self.extra.items():
            if len(array) != n:
                raise ValueError(f"ShardResult.extra[{name!r}] has {len(array)} rows, expected {n}")
        for name in ("sketch", "embedding"):
            array = getattr(self, name)
            if array is not None and (array.ndim != 2 or len(array) != n):
                raise ValueError(f"ShardResult.{name} is {array.shape}, expected {n} rows")

    @property
    def usable(self) -> Bool[np.ndarray, " n"]:
        """Which rows have a status that lets them be selected, bool [n]."""
        return np.array([status.usable for status in self.status], dtype=bool)

    @property
    def unit(self) -> str:
        """Name of the shard: a changed id, row content or order gives another one."""
        return unit_name(self.ids, self.content_hashes)

    def take(self, rows: Int[np.ndarray, " k"]) -> ShardResult:
        """Keep some rows.

        Args:
            rows: k row positions.

        Returns:
            Their results, in that order.
        """
        texts = {name: tuple(getattr(self, name)[i] for i in rows) for name in _TEXTS}
        arrays = {name: getattr(self, name)[rows] for name in ("num_tokens", "num_trained", *COLUMNS, "dots")}
        sketch = None if self.sketch is None else self.sketch[rows]
        embedding = None if self.embedding is None else self.embedding[rows]
        extra = {name: array[rows] for name, array in self.extra.items()}
        return dataclasses.replace(self, **texts, **arrays, sketch=sketch, embedding=embedding, extra=extra)


def join_shards(parts: Sequence[ShardResult]) -> ShardResult:
    """Put the rows of several results one after the other.

    Args:
        parts: at least one; all measured the same signals.

    Returns:
        One result of all their rows.
    """
    texts = {name: tuple(text for part in parts for text in getattr(part, name)) for name in _TEXTS}
    names = ("num_tokens", "num_trained", *COLUMNS, "dots")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    arrays |= {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("sketch", "embedding")
        if getattr(parts[0], name) is not None
    }
    extra = {name: np.concatenate([part.extra[name] for part in parts]) for name in parts[0].extra}
    return dataclasses.replace(parts[0], **texts, **arrays, extra=extra)


def unit_name(ids: tuple[str, ...], content_hashes: tuple[str, ...]) -> str:
    """Name the shard of some rows.

    Args:
        ids: n row ids.
        content_hashes: their content hashes.

    Returns:
        24 hex digits.
    """
    pairs = (text.encode("utf-8", "surrogatepass") for pair in zip(ids, content_hashes) for text in pair)
    return hash_parts(pairs, digest_size=12)


def rows_file(unit: str) -> str:
    """Name a shard's row table.

    Args:
        unit: the shard.

    Returns:
        A file name.
    """
    return f"{unit}-rows.parquet"


def sketch_file(unit: str) -> str:
    """Name a shard's sketches.

    Args:
        unit: the shard.

    Returns:
        A file name.
    """
    return f"{unit}-sketch.npy"


def embedding_file(unit: str) -> str:
    """Name a shard's embeddings.

    Args:
        unit: the shard.

    Returns:
        A file name.
    """
    return f"{unit}-embedding.npy"


def extra_file(unit: str, name: str) -> str:
    """Name the file of one of a shard's extra signals.

    Args:
        unit: the shard.
        name: the signal.

    Returns:
        A file name.
    """
    return f"{unit}-{name}.npy"


def shard_files(unit: str, spec: GradientSpec) -> tuple[str, ...]:
    """Name all files of a shard.

    Args:
        unit: the shard.
        spec: what the store holds.

    Returns:
        The row table's name, then the arrays'.
    """
    arrays = [sketch_file(unit)] if spec.projection is not None else []
    arrays += [embedding_file(unit)] if "embedding" in spec.signals else []
    arrays += [extra_file(unit, name) for name in spec.extras]
    return (rows_file(unit), *arrays)


def encode_shard(result: ShardResult, spec: GradientSpec) -> dict[str, bytes]:
    """Turn a shard into the bytes of its files.

    Args:
        result: what was measured.
        spec: what the store holds; the result must hold exactly that.

    Returns:
        File name -> bytes: the row table, and sketches and embeddings when they are measured.

    Raises:
        DataError: an id is no valid Unicode.
        NumericsError: a usable row has a signal that is not finite, or a norm that is not positive.
        ValueError: other directions or another sketch size than the spec's (our own mistake).
    """
    if tuple(sorted(result.directions)) != spec.directions:
        raise ValueError(f"directions {result.directions}, expected {spec.directions}")
    dim = None if result.sketch is None else result.sketch.shape[1]
    if dim != (None if spec.projection is None else spec.projection.dim):
        raise ValueError(f"sketches of size {dim}, expected {spec.projection}")
    if (result.embedding is not None) != ("embedding" in spec.signals):
        raise ValueError(f"embeddings are given exactly when the spec names them: {spec.signals}")
    if tuple(sorted(result.extra)) != spec.extras:
        raise ValueError(f"extra signals {sorted(result.extra)}, expected {spec.extras}")
    _check_finite(result, spec)
    files = {rows_file(result.unit): _encode_rows(result)}
    if result.sketch is not None:
        files[sketch_file(result.unit)] = _encode_sketch(result.sketch, result)
    if result.embedding is not None:
        whole = np.where(result.usable[:, None], result.embedding, np.nan)
        files[embedding_file(result.unit)] = _encode_array(whole.astype(np.float32))
    for name, array in result.extra.items():
        usable = result.usable.reshape((-1,) + (1,) * (array.ndim - 1))
        kind = np.float64 if array.ndim == 1 else np.float32
        files[extra_file(result.unit, name)] = _encode_array(np.where(usable, array, np.nan).astype(kind))
    return files


def _check_finite(result: ShardResult, spec: GradientSpec) -> None:
    usable = result.usable
    for name in spec.signals:
        array = (result.extra[name] if name in spec.extras else getattr(result, name)).reshape(len(usable), -1)
        good = np.isfinite(array).all(axis=1) & ((array > 0).all(axis=1) if name == "grad_norm" else True)
        bad = np.flatnonzero(usable & ~good)
        if bad.size:
            row = int(bad[0])
            raise NumericsError(
                f"signal {name} of a usable row is not a finite number",
                where=f"row {result.ids[row]} (status {result.status[row]})",
                got=str(array[row][:4]),
                expected="finite numbers, and a norm above 0",
                do="give such rows the status NONFINITE_LOSS, NONFINITE_GRAD or ZERO_GRAD",
            )


def _encode_rows(result: ShardResult) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for text in result.ids:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                "a row id is no valid Unicode", where="id", got=ascii(text), do="give the row another id"
            ) from None
    reasons = [text.encode("utf-8", "backslashreplace").decode("utf-8") for text in result.reason]

    def floats(values: np.ndarray) -> pa.Array:
        return pa.array(np.asarray(values, dtype=np.float64), mask=np.isnan(values))

    table = {
        "id": pa.array(result.ids, pa.string()),
        "content_hash": pa.array(result.content_hashes, pa.string()),
        "status": pa.array([str(status) for status in result.status], pa.string()),
        "reason": pa.array(reasons, pa.string()),
        "num_tokens": pa.array(result.num_tokens, pa.int32()),
        "num_trained": pa.array(result.num_trained, pa.int32()),
        **{name: floats(getattr(result, name)) for name in COLUMNS},
        **{f"dot_{name}": floats(result.dots[:, result.directions.index(name)]) for name in sorted(result.directions)},
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return sink.getvalue()


def _encode_sketch(sketch: Float[np.ndarray, "n D"], result: ShardResult) -> bytes:
    unit = np.full(sketch.shape, np.nan, dtype=np.float16)
    rows = np.flatnonzero(result.usable)
    with np.errstate(over="ignore"):
        unit[rows] = sketch[rows].astype(np.float64) / result.grad_norm[rows, None]
    bad = rows[~np.isfinite(unit[rows]).all(axis=1)]
    if bad.size:
        row = int(bad[0])
        raise NumericsError(
            "a sketch is far longer than its gradient",
            where=f"row {result.ids[row]}",
            got=f"entry {np.abs(sketch[row]).max():g} at norm {result.grad_norm[row]:g}",
            expected="entries of the unit gradient's sketch below 65504",
            do="report this as a defect of the projection",
        )
    return _encode_array(unit)


def _encode_array(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def make_record(
    result: ShardResult, spec: GradientSpec, files: Mapping[str, bytes], made_by: Mapping[str, str]
) -> Record:
    """Write down what a shard's files must be.

    Args:
        result: what was measured.
        spec: the store's spec.
        files: file name -> bytes, from :func:`encode_shard`.
        made_by: recorded, never compared.

    Returns:
        The commit record.
    """
    return Record(
        unit=result.unit,
        spec_key=spec.key,
        num_rows=len(result.ids),
        ids_hash=hash_parts(text.encode("utf-8") for text in result.ids),
        content_hash=hash_parts(text.encode("utf-8") for text in result.content_hashes),
        status=dict(Counter(str(status) for status in result.status)),
        files={name: FileMark(len(data), sha256_bytes(data)) for name, data in files.items()},
        made_by=made_by,
        format=spec.format,
    )
