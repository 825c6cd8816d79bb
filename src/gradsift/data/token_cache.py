"""Tokenizing a pool file by file: tokens of a large file go to the cache folder, named after all that decides them (ours).

An entry is a folder with ``tokens.bin`` (the records), ``rows.arrow`` (the columns) and ``sealed.json`` (what decides the
tokens, and the checksum of the columns). It is published whole or not at all, and found again by the next run on the same
file with the same tokenizer, template, mask and length: an append of a file tokenizes that file alone. Entries that no run
has opened for 30 days are removed.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradsift.data import spool
from gradsift.data.cache import cache_folder, disk_errors, published_folder, remove_old, sha256_file
from gradsift.data.pool import Pool
from gradsift.data.token_rows import TokenRows
from gradsift.data.tokenize import MaskRule, tokenize_rows
from gradsift.data.tokens import DTYPES, TokenColumns, TokenPart, TokenTable, damaged, pack
from gradsift.manifest import canonical_json, hash_parts, seal, unseal
from gradsift.types import TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
TOKENS, COLUMNS, SEALED = "tokens.bin", "rows.arrow", "sealed.json"
_CODES = {"status": "B", "has_template": "B", "tail_crc": "L"}  # of the arrays the columns grow in; others are int32


def tokenize_pool(
    pool: Pool,
    tokenizer: PreTrainedTokenizerBase,
    rule: MaskRule,
    *,
    max_length: int,
    tokenizer_key: Callable[[], str],
    find_template: bool = False,
) -> TokenRows:
    """Tokenize every row of a pool that could be read; as :func:`gradsift.data.tokenize.tokenize_rows`, holding none.

    Args:
        pool: the rows as read.
        tokenizer: the navigator's.
        rule: which tokens carry loss.
        max_length: tokens kept from the start.
        tokenizer_key: gives a hash of what decides the tokenizer's output; asked where a file is large.
        find_template: also say which tokens are the chat template's own.

    Returns:
        One token row per row, in input order.

    Raises:
        DataError: a cached entry is damaged, or a file changed while it was read.
        DiskFullError: the cache folder has no space.
    """
    parts, common = [], {}
    for number in range(len(pool.files)):

        def made(number: int = number) -> Iterator[TokenRow]:
            for row in pool.rows.of_file(number):
                if not row.status.usable:  # the pool says why; it may name a row of another file
                    row = replace(row, reason="")
                yield tokenize_rows([row], tokenizer, rule, max_length=max_length, find_template=find_template)[0]

        if pool.parts[number].num_bytes <= spool.IN_MEMORY:
            records = bytearray()
            columns = _pack_all(made(), records.extend)
            parts.append(TokenPart(columns, bytes(records)))
        else:
            common = common or {"format": FORMAT, "tokenizer": tokenizer_key(), "rule": asdict(rule),
                                "max_length": max_length, "find_template": find_template,
                                "read_as": pool.columns.fmt, "versions": _versions()}  # fmt: skip
            parts.append(_cached({**common, **_file_key(pool, number)}, made))
    return TokenRows(TokenTable(pool, parts))


def _versions() -> dict[str, str]:
    found = {}
    for name in ("gradsift", "transformers", "tokenizers", "jinja2"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # gradsift itself, run from a checkout
            found[name] = "absent"
    return found


def _file_key(pool: Pool, number: int) -> dict[str, Any]:
    """What decides which rows of a file are tokenized; a slice of a hub data set has the bytes of the whole one."""
    file, start, end = pool.files[number], pool.starts[number], pool.starts[number + 1]
    judged = [column[start:end].tobytes() for column in (pool.columns.status, pool.columns.shape)]
    where = file.path if file.kind == "hub" else ""
    return {"sha256": file.sha256, "kind": file.kind, "path": where, "num_rows": file.num_rows,
            "judged": hash_parts(judged)}  # fmt: skip


def _cached(key: Mapping[str, Any], made: Callable[[], Iterator[TokenRow]]) -> TokenPart:
    from filelock import FileLock

    name = hash_parts([canonical_json(dict(key)).encode("ascii")])
    folder = cache_folder() / "tokens" / name
    with disk_errors(folder):
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of several processes of a run, one tokenizes
            if not folder.is_dir():
                remove_old(folder.parent)
                _write(folder, key, made())
            os.utime(folder)  # see remove_old
            os.utime(f"{folder}.lock")
            return _open(folder)


def _write(folder: Path, key: Mapping[str, Any], rows: Iterator[TokenRow]) -> None:
    import pyarrow as pa

    with published_folder(folder) as temporary:
        with (temporary / TOKENS).open("wb", buffering=spool.BLOCK) as file:
            columns = _pack_all(rows, file.write)
        table = pa.table({n: _arrow(getattr(columns, n)) for n in TokenColumns.__dataclass_fields__})
        with pa.ipc.new_file(temporary / COLUMNS, table.schema) as writer:
            writer.write_table(table)
        facts = {"key": dict(key), "columns_sha256": sha256_file(temporary / COLUMNS),
                 "tokens_bytes": int(columns.sizes.sum())}  # fmt: skip
        (temporary / SEALED).write_bytes(seal(facts))


def _arrow(column: np.ndarray) -> Any:
    import pyarrow as pa

    if column.dtype.kind != "S":
        return pa.array(column)
    kind = pa.binary(column.dtype.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(column), [None, pa.py_buffer(column.tobytes())])


def _open(folder: Path) -> TokenPart:
    """Check the columns and the length of the records; each record is checked when it is read."""
    import pyarrow as pa

    try:
        facts = unseal((folder / SEALED).read_bytes())
        if facts is None or sha256_file(folder / COLUMNS) != facts["columns_sha256"]:
            raise damaged(str(folder), COLUMNS if facts else SEALED)
        body = spool.Handle.open(folder / TOKENS)
        if os.fstat(body.descriptor).st_size != facts["tokens_bytes"]:
            raise damaged(str(folder), TOKENS)
    except FileNotFoundError as error:
        raise damaged(str(folder), str(error.filename)) from None
    with pa.OSFile(str(folder / COLUMNS)) as source, pa.ipc.open_file(source) as reader:
        table = reader.read_all()
    columns = {}
    for name in TokenColumns.__dataclass_fields__:
        column = table.column(name).combine_chunks()
        buffer = column.buffers()[1] if len(column) else b""
        columns[name] = np.frombuffer(buffer, dtype=DTYPES.get(name, np.int32), count=len(column)).copy()
    return TokenPart(TokenColumns(**columns), body, str(folder))


def _pack_all(rows: Iterator[TokenRow], write: Callable[[bytes], Any]) -> TokenColumns:
    """Write the records of some rows and collect their columns."""
    names = list(TokenColumns.__dataclass_fields__)
    grown: dict[str, Any] = {n: bytearray() if n == "content" else array(_CODES.get(n, "i")) for n in names}
    for row in rows:
        record, values = pack(row)
        write(record)
        for name, value in zip(names, values, strict=True):
            if name == "content":
                grown[name] += value
            else:
                grown[name].append(value)
    out = {name: np.array(column, DTYPES.get(name, np.int32)) for name, column in grown.items() if name != "content"}
    return TokenColumns(**out, content=np.frombuffer(bytes(grown["content"]), DTYPES["content"]))
