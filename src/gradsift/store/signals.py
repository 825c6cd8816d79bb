"""Reading a store: a frozen view of the committed rows, in id order, every byte checked before it is used (ours)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int

from gradsift.errors import StoreError
from gradsift.store.ledger import Record, read_ledger
from gradsift.store.reading import RowTable, decode_rows, map_embedding, map_extra, map_sketch, read_checked
from gradsift.store.shards import COLUMNS, embedding_file, extra_file, sketch_file
from gradsift.store.spec import GradientSpec, compare, read_spec
from gradsift.types import RowStatus


@dataclass(frozen=True)
class SignalStore:
    """Committed rows and their signals; NaN where not measured. Arrays are read-only. Made by :func:`open_store`.

    Args:
        folder: the store's folder.
        spec: what was measured.
        ids: N row ids; increasing, or in the order asked of :meth:`take`.
        content_hashes: N hashes of token ids and mask.
        status: N statuses.
        reason: N sentences.
        num_tokens: int64 [N].
        num_trained: int64 [N].
        loss: float64 [N] mean nats per trained token.
        grad_norm: float64 [N].
        emb_grad_norm: float64 [N].
        head_grad_norm: float64 [N].
        all_dots: float64 [N, M], directions in the order of ``spec.directions``.
        records: commit records of the shards.
        damaged_records: names of records that were ignored because their seal is broken.
        shard: int64 [N] which record a row belongs to.
        row: int64 [N] which row of its shard.
    """

    folder: Path
    spec: GradientSpec
    ids: tuple[str, ...]
    content_hashes: tuple[str, ...]
    status: tuple[RowStatus, ...]
    reason: tuple[str, ...]
    num_tokens: Int[np.ndarray, " N"]
    num_trained: Int[np.ndarray, " N"]
    loss: Float[np.ndarray, " N"]
    grad_norm: Float[np.ndarray, " N"]
    emb_grad_norm: Float[np.ndarray, " N"]
    head_grad_norm: Float[np.ndarray, " N"]
    all_dots: Float[np.ndarray, "N M"]
    records: tuple[Record, ...]
    damaged_records: tuple[str, ...]
    shard: Int[np.ndarray, " N"]
    row: Int[np.ndarray, " N"]
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_trained", *COLUMNS, "all_dots", "shard", "row"):
            getattr(self, name).flags.writeable = False
        object.__setattr__(self, "_place", {name: i for i, name in enumerate(self.ids)})

    @property
    def size(self) -> int:
        """Number of committed rows, N."""
        return len(self.ids)

    @property
    def status_counts(self) -> Mapping[str, int]:
        """Status -> number of rows; they add up to ``size``."""
        return dict(Counter(str(status) for status in self.status))

    def positions(self, ids: Sequence[str]) -> Int[np.ndarray, " k"]:
        """Find rows.

        Args:
            ids: k row ids.

        Returns:
            int64 [k] positions in this view.

        Raises:
            StoreError: an id is not committed; the first few are named.
        """
        place: Mapping[str, int] = self.__dict__["_place"]
        missing = [name for name in ids if name not in place]
        if missing:
            raise StoreError(
                "these rows have no committed signals",
                where=str(self.folder),
                got=f"{len(missing)} of {len(ids)}: {', '.join(missing[:5])}",
                expected="ids that were measured",
                do="run the collecting command again: only missing rows are measured",
            )
        return np.fromiter((place[name] for name in ids), dtype=np.int64, count=len(ids))

    def take(self, ids: Sequence[str]) -> SignalStore:
        """Keep some rows.

        Args:
            ids: k row ids, unique.

        Returns:
            A view of these rows in the order asked.

        Raises:
            StoreError: an id is not committed.
            ValueError: an id is asked twice.
        """
        if len(set(ids)) != len(ids):
            raise ValueError("SignalStore.take needs unique ids")
        if tuple(ids) == self.ids:
            return self
        at = self.positions(ids)
        changes = {
            f.name: tuple(getattr(self, f.name)[i] for i in at)
            for f in dataclasses.fields(self)
            if f.name in ("ids", "content_hashes", "status", "reason")
        }
        arrays = {name: getattr(self, name)[at] for name in ("num_tokens", "num_trained", *COLUMNS, "all_dots")}
        return dataclasses.replace(self, **changes, **arrays, shard=self.shard[at], row=self.row[at])

    def dots(self, names: Sequence[str]) -> Float[np.ndarray, "N M"]:
        """Give the exact dots with some directions.

        Args:
            names: M direction names.

        Returns:
            float64 [N, M], columns in the order asked; NaN for rows without a gradient.

        Raises:
            StoreError: a direction was not measured.
        """
        unknown = sorted(set(names) - set(self.spec.directions))
        if unknown:
            raise StoreError(
                "this direction was not measured",
                where=str(self.folder),
                got=", ".join(unknown),
                expected=", ".join(self.spec.directions) or "no directions at all",
                do="collect into another --out with it",
            )
        return self.all_dots[:, [self.spec.directions.index(name) for name in names]]

    def unit_sketch(self, ids: Sequence[str]) -> Float32[np.ndarray, "k D"]:
        """Read the sketches of rows' unit gradients.

        Args:
            ids: k row ids, all usable.

        Returns:
            float32 [k, D] in the order asked, exactly as stored in float16.

        Raises:
            StoreError: no sketches were measured, an id is not committed or has no gradient, or a shard is damaged.
        """
        if self.spec.projection is None:
            raise StoreError("no sketches were measured", where=str(self.folder), do="collect into another --out")
        out = np.empty((len(ids), self.spec.projection.dim), dtype=np.float32)
        for here, array, rows in self._parts(
            ids, "sketch", sketch_file, lambda r: map_sketch(self.folder, r, self.spec)
        ):
            out[here] = array[rows]
        return out

    def embedding(self, ids: Sequence[str]) -> Float32[np.ndarray, "k d"]:
        """Read rows' embeddings.

        Args:
            ids: k row ids, all usable.

        Returns:
            float32 [k, d] in the order asked, exactly as measured; [0, 0] for no ids.

        Raises:
            StoreError: no embeddings were measured, an id is not committed or not usable, or a shard is damaged.
        """
        if "embedding" not in self.spec.signals:
            raise StoreError("no embeddings were measured", where=str(self.folder), do="collect into another --out")
        out: np.ndarray | None = None
        for here, array, rows in self._parts(ids, "embedding", embedding_file, lambda r: map_embedding(self.folder, r)):
            if out is None:
                out = np.empty((len(ids), array.shape[1]), dtype=np.float32)
            out[here] = array[rows]
        return np.zeros((0, 0), dtype=np.float32) if out is None else out

    def extra(self, name: str, ids: Sequence[str]) -> Float[np.ndarray, "k ..."]:
        """Read one of the extra signals.

        Args:
            name: the signal, one of ``spec.extras``.
            ids: k row ids, all usable.

        Returns:
            float64 [k] or float32 [k, d] in the order asked, exactly as measured; [0] for no ids.

        Raises:
            StoreError: it was not measured, an id is not committed or not usable, or a shard is damaged.
        """
        if name not in self.spec.extras:
            where = str(self.folder)
            raise StoreError(f"the signal {name} was not measured", where=where, do="collect into another --out")
        out: np.ndarray | None = None
        parts = self._parts(ids, name, lambda u: extra_file(u, name), lambda r: map_extra(self.folder, r, name))
        for here, array, rows in parts:
            if out is None:
                out = np.empty((len(ids), *array.shape[1:]), dtype=array.dtype)
            out[here] = array[rows]
        return np.zeros(0) if out is None else out

    def gather(self, ids: Sequence[str]) -> Float32[np.ndarray, "k D"]:
        """Read rows' sketches at full length.

        Args:
            ids: k row ids, all usable.

        Returns:
            float32 [k, D]: unit sketch times gradient norm, in the order asked.

        Raises:
            StoreError: as for :meth:`unit_sketch`.
        """
        norms, rows = self.grad_norm[self.positions(ids)], self.unit_sketch(ids)
        # in place, but in float64: the same bits without two more copies of all sketches
        return np.multiply(rows, norms[:, None], out=rows, casting="same_kind")

    def _parts(
        self, ids: Sequence[str], what: str, file: Callable[[str], str], load: Callable[[Record], np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Walk the shards that hold some rows: places among the ids, the shard's checked array, rows of it."""
        at = self.positions(ids)
        for i in at:
            if not self.status[i].usable:
                raise StoreError(
                    f"this row has no {what}",
                    where=f"row {self.ids[i]}",
                    got=f"status {self.status[i]}: {self.reason[i]}",
                    expected="a row that was measured",
                    do="leave rows out that are not usable",
                )
        order = np.argsort(self.shard[at], kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(self.shard[at[order]])) + 1) if len(at) else ():
            record = self.records[self.shard[at[here[0]]]]
            name = file(record.unit)
            if name not in self._checked:
                read_checked(self.folder, record, name)
                self._checked.add(name)
            yield here, load(record), self.row[at[here]]


def open_store(folder: Path, expected: GradientSpec | None = None) -> SignalStore:
    """Open a store for reading; writes nothing, so a read-only folder will do.

    Args:
        folder: the store's own folder.
        expected: what the caller will take the numbers for; None accepts whatever the store holds.

    Returns:
        The rows committed at this moment, in id order.

    Raises:
        SpecError: the store holds signals of another spec; the fields are named.
        StoreError: there is no store, or it is damaged or from a newer version.
    """
    spec = read_spec(folder)
    if spec is None:
        raise StoreError(
            "there is no signal store here",
            where=str(folder),
            got="no spec.json",
            expected="a folder signals/<key> of a run",
            do="collect first, or check the path",
        )
    if expected is not None:
        compare(spec, expected, where=str(folder))
    ledger = read_ledger(folder, spec.key)
    tables = [decode_rows(folder, record, spec) for record in ledger.records]
    return _assemble(folder, spec, ledger.records, ledger.damaged, tables)


def _assemble(
    folder: Path, spec: GradientSpec, records: tuple[Record, ...], damaged: tuple[str, ...], tables: list[RowTable]
) -> SignalStore:
    ids = [name for table in tables for name in table.ids]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    for a, b in pairwise(order):
        if ids[a] == ids[b]:
            raise StoreError(
                "a row is committed twice",
                where=f"row {ids[a]} in {folder}",
                expected="one shard per row",
                do=f"delete {folder} and run the same command again",
            )

    def text(name: str) -> tuple:
        flat = [value for table in tables for value in getattr(table, name)]
        return tuple(flat[i] for i in order)

    def numbers(parts: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
        return np.concatenate(parts)[order] if parts else empty

    whole, none = np.zeros(0, dtype=np.int64), np.zeros(0)
    return SignalStore(
        folder=folder,
        spec=spec,
        ids=text("ids"),
        content_hashes=text("content_hashes"),
        status=text("status"),
        reason=text("reason"),
        num_tokens=numbers([table.num_tokens for table in tables], whole),
        num_trained=numbers([table.num_trained for table in tables], whole),
        loss=numbers([table.columns["loss"] for table in tables], none),
        grad_norm=numbers([table.columns["grad_norm"] for table in tables], none),
        emb_grad_norm=numbers([table.columns["emb_grad_norm"] for table in tables], none),
        head_grad_norm=numbers([table.columns["head_grad_norm"] for table in tables], none),
        all_dots=numbers([table.dots for table in tables], np.zeros((0, len(spec.directions)))),
        records=records,
        damaged_records=damaged,
        shard=numbers([np.full(len(table.ids), i) for i, table in enumerate(tables)], whole),
        row=numbers([np.arange(len(table.ids)) for table in tables], whole),
    )
