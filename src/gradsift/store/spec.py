"""What was measured and by what: the fingerprint that decides whether two sets of signals may meet (ours).

Fields here change a gradient's meaning, so a change is refused. What only changes its last bits (batch size, workers,
device, library versions) is recorded with each shard and never refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.data.tokens import content_hash as content_hash
from gradsift.errors import SpecError, StoreError
from gradsift.manifest import canonical_json, hash_parts, read_error, seal, unseal

FORMAT = 3  # newest layout that is read; 2 adds embeddings, 3 extra signals; stores without them are written as before
SPEC_FILE = "spec.json"
SIGNALS = ("loss", "grad_norm", "emb_grad_norm", "head_grad_norm", "dots", "sketch", "embedding")
WHOLE = (("layers", None), ("positions", "all"), ("dots", "exact"))  # written only where less is measured
EXTRA_SIGNALS = re.compile(r"prompt_loss|alone_loss|hidden_\d+|layer_parts")  # one array file of their own each, by row


@dataclass(frozen=True)
class Projection:
    """How a gradient becomes a sketch.

    Args:
        dim: length D of the sketch.
        seed: seed of the signs.
        version: version of the algorithm's bits.
        kind: name of the algorithm.
    """

    dim: int
    seed: int
    version: str
    kind: str = "signfold"


@dataclass(frozen=True)
class GradientSpec:
    """Everything that decides what a stored number means. Immutable by contract: do not change ``anchors``.

    Args:
        parameters: which weights count: ``lora``, ``all`` or ``named``.
        parameters_sha256: hash of their sorted names.
        model_sha256: hash of the navigator's weights.
        tokenizer_sha256: hash of the tokenizer's files and special tokens.
        loss_on: which tokens carry loss: ``assistant``, ``completion`` or ``all``.
        max_length: tokens kept of a row.
        signals: what was measured, names of ``SIGNALS``; kept sorted.
        code_version: version of the gradient code.
        anchors: direction name (the target included) -> :func:`set_hash` of its rows; kept sorted by name.
        projection: how sketches are made, or None without sketches.
        adapter_sha256: hash of the adapter's weights, or None without one.
        template_sha256: hash of the chat template, or None without one.
        dtype: arithmetic of the model.
        reduction: how token losses become a row's loss.
        direction: what the gradient is turned into.
        truncation: which end of a long row is kept.
        layers: upper decoder layers that were measured, with the backward stopped below them; None for the whole model.
        positions: ``all``, or ``trained`` where prompts were held constant (``trained, padding first`` before windows).
        dots: ``exact``, or ``folded`` where they are those of folded factors, which are exact on average over seeds
            (``folded, experts exact`` where the model has experts).
    """

    parameters: str
    parameters_sha256: str
    model_sha256: str
    tokenizer_sha256: str
    loss_on: str
    max_length: int
    signals: tuple[str, ...]
    code_version: str
    anchors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    projection: Projection | None = None
    adapter_sha256: str | None = None
    template_sha256: str | None = None
    dtype: str = "float32"
    reduction: str = "mean"
    direction: str = "raw"
    truncation: str = "keep_start"
    layers: str | None = None
    positions: str = "all"
    dots: str = "exact"

    def __post_init__(self) -> None:
        unknown = sorted({s for s in self.signals if s not in SIGNALS and not EXTRA_SIGNALS.fullmatch(s)})
        if unknown:
            raise ValueError(f"unknown signals {unknown}, expected some of {SIGNALS}")
        if ("sketch" in self.signals) != (self.projection is not None):
            raise ValueError("a projection is given exactly when the sketch is measured")
        if ("dots" in self.signals) != bool(self.anchors):
            raise ValueError("anchors are given exactly when dots are measured")
        if self.signals and "grad_norm" not in self.signals and "sketch" in self.signals:
            raise ValueError("a sketch is stored per unit of length, so it needs grad_norm")
        object.__setattr__(self, "signals", tuple(sorted(set(self.signals))))
        object.__setattr__(self, "anchors", {name: self.anchors[name] for name in sorted(self.anchors)})

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """blake2b of all fields, 16 hex digits; names the store's folder."""
        return hash_parts([canonical_json(self.fields()).encode("ascii")], digest_size=8)

    @property
    def format(self) -> int:
        """Layout the store is written in: the oldest that can hold its signals, so that older versions read it."""
        if self.extras:
            return 3
        return 2 if "embedding" in self.signals else 1

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the extra signals, sorted: an array file each."""
        return tuple(name for name in self.signals if EXTRA_SIGNALS.fullmatch(name))

    @property
    def directions(self) -> tuple[str, ...]:
        """Names of the anchor and target directions, sorted."""
        return tuple(self.anchors)

    def fields(self) -> dict[str, Any]:
        """Lay the fields out flat.

        Returns:
            Name -> string, integer, None or list of strings; ``projection.dim`` and ``anchors.math`` have dots.
        """
        flat: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "anchors":
                flat.update({f"anchors.{name}": digest for name, digest in value.items()})
            elif field.name == "projection":
                parts = {} if value is None else dataclasses.asdict(value)
                flat.update({f"projection.{name}": part for name, part in parts.items()})
            elif (field.name, value) in WHOLE:
                continue  # stores from before these fields keep their key
            else:
                flat[field.name] = list(value) if isinstance(value, tuple) else value
        return flat

    @classmethod
    def from_fields(cls, flat: Mapping[str, Any]) -> GradientSpec:
        """Read what :meth:`fields` wrote.

        Args:
            flat: field names and values.

        Returns:
            The spec.

        Raises:
            ValueError: a field is missing, unknown or impossible.
        """
        plain = {name: value for name, value in flat.items() if "." not in name}
        anchors = {name.removeprefix("anchors."): v for name, v in flat.items() if name.startswith("anchors.")}
        parts = {name.removeprefix("projection."): v for name, v in flat.items() if name.startswith("projection.")}
        try:
            plain["signals"] = tuple(plain["signals"])
            return cls(**plain, anchors=anchors, projection=Projection(**parts) if parts else None)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not the fields of a gradient spec: {error}") from error


def compare(old: GradientSpec, new: GradientSpec, *, where: str = "") -> None:
    """Refuse to mix signals that do not mean the same.

    Args:
        old: what the store holds.
        new: what is asked now.
        where: the store's folder, for the message.

    Raises:
        SpecError: a field differs; all of them are named with old and new value, the first one in the headline.
    """
    before, after = old.fields(), new.fields()
    names = [name for name in {**before, **after} if before.get(name, _ABSENT) != after.get(name, _ABSENT)]
    if not names:
        return
    first = names[0]
    was = "; ".join(f"{name}: {_show(before, name)}" for name in names)
    now = "; ".join(f"{name}: {_show(after, name)}" for name in names)
    raise SpecError(
        f"{first} is not what these signals were measured with",
        where=where,
        got=now,
        expected=was,
        do=_remedy(names),
    )


def _remedy(names: Iterable[str]) -> str:
    fixed = [name for name in names if name in _BY_CODE]
    if fixed:  # no setting brings them back
        return (
            f"use another --out: {' and '.join(fixed)} follows from the version of gradsift; old signals stay readable"
        )
    return f"use another --out, or put {' and '.join(names)} back to the old value"


_BY_CODE = ("code_version", "projection.version")
_ABSENT = object()


def _show(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, _ABSENT)
    if value is _ABSENT:
        return "absent"
    return ", ".join(value) if isinstance(value, list) else str(value)


def set_hash(hashes: Iterable[str]) -> str:
    """Hash the rows of an anchor or target; their order does not matter, their number does.

    Args:
        hashes: :func:`content_hash` of each row.

    Returns:
        32 hex digits.
    """
    return hash_parts(digest.encode("ascii") for digest in sorted(hashes))


def encode_spec(spec: GradientSpec) -> bytes:
    """Write the bytes of a store's ``spec.json``.

    Args:
        spec: what is measured.

    Returns:
        Sealed JSON.
    """
    return seal({"format": spec.format, "key": spec.key, "fields": spec.fields()})


def read_spec(folder: Path) -> GradientSpec | None:
    """Read a store's ``spec.json``.

    Args:
        folder: the store's folder.

    Returns:
        The spec, or None when the folder has none.

    Raises:
        StoreError: the file is damaged, or was written by a newer version.
    """
    path = folder / SPEC_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(error, path) from error
    refuse_future(data, path)
    value = unseal(data)
    try:
        spec = None if value is None else GradientSpec.from_fields(value["fields"])
    except (ValueError, KeyError, TypeError, AttributeError):
        spec = None
    if spec is None or value is None or value.get("key") != spec.key:
        raise StoreError(
            "the store's description is damaged",
            where=str(path),
            got="bytes that do not match their own seal",
            expected="the bytes that were written",
            do="delete this file and run the same command again: the shards are kept if they fit",
        )
    return spec


def refuse_future(data: bytes, path: Path) -> None:
    """Refuse a file that a newer version wrote, before its contents are judged.

    Args:
        data: bytes of a sealed JSON file.
        path: the file, for the message.

    Raises:
        StoreError: its format number is above ours.
    """
    try:
        found = json.loads(data)["format"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    if isinstance(found, int) and found > FORMAT:
        raise StoreError(
            "this store was written by a newer gradsift",
            where=str(path),
            got=f"format {found}",
            expected=f"format {FORMAT} or older",
            do="upgrade gradsift, or use another --out",
        )


def kept_specs(signals: Path) -> list[GradientSpec]:
    """Read what a run has measured already.

    Args:
        signals: the run's ``signals`` folder; need not exist.

    Returns:
        The descriptions of its stores.

    Raises:
        StoreError: a description is damaged or from a newer version.
    """
    folders = sorted(signals.iterdir()) if signals.is_dir() else []
    return [spec for folder in folders if folder.is_dir() and (spec := read_spec(folder)) is not None]


def store_folder(signals: Path, spec: GradientSpec) -> Path:
    """Name the store of a run, and refuse when the run already holds signals of another meaning.

    Args:
        signals: the run's ``signals`` folder; need not exist.
        spec: what is asked now.

    Returns:
        ``signals/<spec.key>``; not created.

    Raises:
        SpecError: another store is there; the fields that differ are named.
        StoreError: another store's description is damaged or from a newer version.
    """
    mine = signals / spec.key
    others = sorted(signals.iterdir()) if signals.is_dir() else []
    for folder in others:
        old = read_spec(folder) if folder.is_dir() and folder != mine else None
        if old is not None:
            compare(old, spec, where=str(folder))
    return mine
