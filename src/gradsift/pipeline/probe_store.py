"""Losses of probes on disk: one array per probe beside a sealed record, under a key of all they depend on (ours)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gradsift.errors import StoreError
from gradsift.manifest import canonical_json, hash_parts, read_error, seal, sha256_bytes, unseal, write_bytes_atomic


@dataclass(frozen=True)
class ProbeStore:
    """A folder of arrays.

    Args:
        folder: where they stand.
        key: hash of everything they depend on; another key has another folder.
    """

    folder: Path
    key: str

    @classmethod
    def of(cls, root: Path, fields: dict[str, Any]) -> ProbeStore:
        """Name the folder.

        Args:
            root: parent of all of them.
            fields: everything the arrays depend on.

        Returns:
            The store; nothing is made.
        """
        key = hash_parts([canonical_json(fields).encode("ascii")], digest_size=8)
        return cls(root / key, key)

    def read(self, name: str, size: int) -> Float[np.ndarray, " n"] | None:
        """Read an array back.

        Args:
            name: its name.
            size: numbers it must hold.

        Returns:
            float64 [n], or None where it was not finished.

        Raises:
            StoreError: the bytes are not those that were written.
        """
        record, data = self.folder / f"{name}.json", self.folder / f"{name}.npy"
        if not record.is_file():
            return None
        try:
            sealed, content = unseal(record.read_bytes()), data.read_bytes()
        except OSError as error:
            raise read_error(error, data) from error
        wanted = {"key": self.key, "name": name, "num_rows": size, "sha256": sha256_bytes(content)}
        if sealed != wanted:
            raise StoreError(
                "the losses of a probe are not what was written",
                where=str(data),
                got="other bytes, or the record of another run",
                expected=f"sha256 {sealed['sha256']}" if sealed and "sha256" in sealed else "a sealed record beside it",
                do=f"delete {self.folder} and run the same command again: the probes are trained anew",
            )
        return np.load(io.BytesIO(content), allow_pickle=False)

    def write(self, name: str, values: Float[np.ndarray, " n"]) -> None:
        """Publish an array, then its record: an array without one is not there.

        Args:
            name: its name.
            values: float64 [n].
        """
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(values, dtype=np.float64), allow_pickle=False)
        content = buffer.getvalue()
        write_bytes_atomic(self.folder / f"{name}.npy", content)
        record = {"key": self.key, "name": name, "num_rows": len(values), "sha256": sha256_bytes(content)}
        write_bytes_atomic(self.folder / f"{name}.json", seal(record))
