"""How much room a store will take, and a refusal beforehand where the disk does not have it (ours).

Arrays have a known size. Row tables and records are compressed or depend on names, so one made-up shard of the real ids
is encoded and counted; files are rounded up to whole blocks of the disk, as the disk does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gradsift.errors import DiskFullError
from gradsift.manifest import read_error
from gradsift.seeds import stream
from gradsift.store.ledger import encode_record
from gradsift.store.shards import ShardResult, encode_shard, make_record
from gradsift.store.spec import GradientSpec
from gradsift.types import RowStatus

_SAMPLE = 512  # rows of the made-up shard, at most


def bytes_needed(
    spec: GradientSpec,
    ids: Sequence[str],
    rows_per_shard: int,
    *,
    num_rows: int | None = None,
    widths: Mapping[str, int] | None = None,
    block: int = 4096,
) -> int:
    """Tell how many bytes of the disk the signals of some rows will take.

    Args:
        spec: what is measured.
        ids: row ids that are still to be measured; a shard of them is enough where ``num_rows`` is given.
        rows_per_shard: rows of a shard.
        num_rows: how many rows are still to be measured; None for those of ``ids``.
        widths: length of the vectors of ``embedding`` and ``hidden_N``, where the spec has them.
        block: bytes of a block of the disk.

    Returns:
        Bytes of shards and records, in whole blocks; within some percent.
    """
    if not ids:
        return 0
    some = tuple(ids[: min(rows_per_shard, _SAMPLE)])
    result = _made_up(spec, some, widths or {})
    files = encode_shard(result, spec)
    record = encode_record(make_record(result, spec, files, {"device": "cpu", "versions": "x" * 120}))
    num_rows = len(ids) if num_rows is None else num_rows
    num_shards = -(-num_rows // rows_per_shard)
    # The rows of a planned shard may be more than were encoded; its files grow with them, its number of files does not.
    rows_each = num_rows / num_shards
    sizes = [len(data) * rows_each / len(some) for data in files.values()]
    return num_shards * int(sum(-(-size // block) * block for size in (*sizes, len(record))))


def _made_up(spec: GradientSpec, ids: tuple[str, ...], widths: Mapping[str, int]) -> ShardResult:
    """Rows whose numbers compress as badly as measured ones."""
    n, random = len(ids), stream(0, "room").numpy()
    numbers = {name: random.random(n) + 0.5 for name in ("loss", "grad_norm", "emb_grad_norm", "head_grad_norm")}
    for name in numbers.keys() - set(spec.signals):
        numbers[name] = np.full(n, np.nan)
    arrays = {name: np.zeros((n, widths.get(name, 1)), np.float32) for name in ("embedding", *spec.extras)}
    return ShardResult(
        ids=ids,
        content_hashes=tuple(random.bytes(16).hex() for _ in range(n)),
        status=(RowStatus.OK,) * n,
        reason=("",) * n,
        num_tokens=random.integers(1, spec.max_length + 1, n),
        num_trained=random.integers(1, spec.max_length + 1, n),
        dots=random.random((n, len(spec.directions))),
        directions=spec.directions,
        sketch=None if spec.projection is None else np.zeros((n, spec.projection.dim), np.float32),
        embedding=arrays["embedding"] if "embedding" in spec.signals else None,
        extra={name: arrays[name] if name in widths else np.zeros(n) for name in spec.extras},
        **numbers,
    )


def refuse_if_it_does_not_fit(
    folder: Path,
    spec: GradientSpec,
    ids: Sequence[str],
    rows_per_shard: int,
    *,
    num_rows: int | None = None,
    widths: Mapping[str, int] | None = None,
) -> int:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: the store's folder; exists.
        spec: what is measured.
        ids: as for :func:`bytes_needed`.
        rows_per_shard: rows of a shard.
        num_rows: as for :func:`bytes_needed`.
        widths: as for :func:`bytes_needed`.

    Returns:
        The bytes that are needed.

    Raises:
        DiskFullError: fewer bytes are free.
        StoreError: the disk cannot be asked.
    """
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        raise read_error(error, folder) from error
    needed = bytes_needed(spec, ids, rows_per_shard, num_rows=num_rows, widths=widths, block=disk.f_frsize)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise DiskFullError(
            "the signals will not fit on this disk",
            where=str(folder),
            got=f"{free} bytes free",
            expected=f"about {needed} bytes for {len(ids) if num_rows is None else num_rows} rows",
            do="free space, use --out on another disk, measure a smaller collect.sketch_dim, or try all the same with "
            "--set collect.check_disk=false: what is committed before the disk is full is kept",
        )
    return needed
