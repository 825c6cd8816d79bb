"""A finished run folder as typed values: manifest, audit table and shown examples (ours)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from pydantic import TypeAdapter, ValidationError

from gradsift.errors import ConfigError, StoreError
from gradsift.report.fields import Manifest, Shown, damaged, parse_manifest
from gradsift.report.policy_fields import METHOD, Details, parse_details
from gradsift.types import RowStatus

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Audit:
    """audit.parquet by column, one entry per input row; NaN where not measured.

    Args:
        ids: N ids in input order.
        sources: N labels.
        usable: bool [N], status OK or TRUNCATED.
        selected: bool [N].
        undecided: bool [N], rows whose side of the cut the measurement does not settle; all False in runs of before the column.
        num_tokens: float64 [N].
        num_trained: float64 [N].
        loss: float64 [N].
        grad_norm: float64 [N].
        score: float64 [N].
        rank: float64 [N], NaN or -1 for rows that were no candidates.
        cos: float64 [N] per direction.
        reason_code: N codes, empty where null.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    usable: Bool[np.ndarray, " N"]
    selected: Bool[np.ndarray, " N"]
    undecided: Bool[np.ndarray, " N"]
    num_tokens: Float[np.ndarray, " N"]
    num_trained: Float[np.ndarray, " N"]
    loss: Float[np.ndarray, " N"]
    grad_norm: Float[np.ndarray, " N"]
    score: Float[np.ndarray, " N"]
    rank: Float[np.ndarray, " N"]
    cos: Mapping[str, Float[np.ndarray, " N"]]
    reason_code: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        path: its folder.
        manifest: what happened.
        audit: every row.
        examples: the rows shown in full; None when the file is absent.
        details: what the method ``ogs`` tells of its policy; None for other methods, or when the file is absent.
    """

    path: Path
    manifest: Manifest
    audit: Audit
    examples: tuple[Shown, ...] | None
    details: Details | None = None


def read_run(path: Path) -> Run:
    """Read a run folder.

    Args:
        path: the folder that ``gradsift select --out`` wrote.

    Returns:
        The run.

    Raises:
        ConfigError: the folder holds no finished selection.
        StoreError: a file is damaged.
    """
    files = {name: path / name for name in ("manifest.json", "selection/audit.parquet", "selection/examples.json")}
    for name in ("manifest.json", "selection/audit.parquet"):
        if not files[name].is_file():
            raise _unfinished(path, name)
    manifest = parse_manifest(_read_json(files["manifest.json"]), str(files["manifest.json"]))
    examples = None
    if files["selection/examples.json"].is_file():
        where = files["selection/examples.json"]
        try:
            examples = TypeAdapter(tuple[Shown, ...]).validate_python(_read_json(where))
        except ValidationError as error:
            raise damaged(str(where), error) from None
    audit = read_audit(files["selection/audit.parquet"])
    return Run(path, manifest, audit, examples, _details(path, manifest.selection.method))


def _details(path: Path, method: str) -> Details | None:
    """Read what the method tells; an earlier run of another method may have left a file in the folder."""
    where = path / "selection/details.json"
    return parse_details(_read_json(where), str(where)) if method == METHOD and where.is_file() else None


def read_policy(path: Path) -> tuple[dict[str, Any], Details]:
    """Read what a run of ``ogs`` tells of its policy.

    Args:
        path: the run folder.

    Returns:
        The manifest as it was written, and the details.

    Raises:
        ConfigError: there is no finished run, or its method is another one.
        StoreError: a file is absent or damaged.
    """
    if not (path / "manifest.json").is_file():
        raise _unfinished(path, "manifest.json")
    values = _read_json(path / "manifest.json")
    method = parse_manifest(values, str(path / "manifest.json")).selection.method
    if method != METHOD:
        raise ConfigError(
            "this run has no policy", where=str(path), got=f"a selection by {method}",
            expected=f"a run folder of gradsift select --method {METHOD}", do="gradsift report shows what other methods did",
        )  # fmt: skip
    found = _details(path, method)
    if found is None:
        raise StoreError("the details of this run are gone", where=str(path / "selection/details.json"),
                         got="no such file", do="run the select command again: it reads the roll-outs back")  # fmt: skip
    return values, found


def read_audit(path: Path) -> Audit:
    """Read the audit table.

    Args:
        path: audit.parquet.

    Returns:
        Its columns.

    Raises:
        StoreError: the file is no Parquet table or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        cosines = [name for name in table.column_names if name.startswith("cos_")]
        statuses = [RowStatus(s) for s in table.column("status").to_pylist()]
        return Audit(
            ids=tuple(table.column("id").to_pylist()),
            sources=tuple(table.column("source").to_pylist()),
            usable=np.array([s.usable for s in statuses], dtype=bool),
            undecided=_flags(table, "undecided"),
            selected=np.array([bool(s) for s in table.column("selected").to_pylist()], dtype=bool),
            cos={name.removeprefix("cos_"): _floats(table, name) for name in cosines},
            reason_code=tuple(code or "" for code in table.column("reason_code").to_pylist()),
            **{n: _floats(table, n) for n in ("num_tokens", "num_trained", "loss", "grad_norm", "score", "rank")},
        )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0][:300]
        raise StoreError(
            "the audit table cannot be read", where=str(path), got=reason, do="run the select command again"
        ) from None


def _flags(table: pa.Table, name: str) -> Bool[np.ndarray, " N"]:
    if name not in table.column_names:
        return np.zeros(table.num_rows, dtype=bool)
    return np.array([bool(one) for one in table.column(name).to_pylist()], dtype=bool)


def _floats(table: pa.Table, name: str) -> Float[np.ndarray, " N"]:
    import pyarrow as pa

    return table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            "a file of the run is not JSON", where=str(path), got=str(error)[:300], do="run the select command again"
        ) from None


def _unfinished(path: Path, name: str) -> ConfigError:
    return ConfigError(
        "there is no finished run in this folder",
        where=str(path),
        got=f"no {name}",
        expected="a folder that gradsift select has finished",
        do="run the select command again: it resumes and finishes",
    )
