"""Finished pieces of work on disk: one sealed JSON file each, in a folder under a key of all they depend on (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.errors import StoreError
from gradsift.manifest import canonical_json, hash_parts, make_folder, read_error, seal, unseal, write_bytes_atomic


@dataclass(frozen=True)
class RecordStore:
    """A folder of sealed records.

    Args:
        folder: where they stand.
        key: hash of everything they depend on; another key has another folder.
        noun: what one of them is, for messages.
    """

    folder: Path
    key: str
    noun: str = "record"

    @classmethod
    def of(cls, root: Path, fields: dict[str, Any], noun: str = "record") -> RecordStore:
        """Name the folder.

        Args:
            root: parent of all of them.
            fields: everything the records depend on, as for ``canonical_json``.
            noun: what one of them is.

        Returns:
            The store; nothing is made.
        """
        key = hash_parts([canonical_json(fields).encode("ascii")], digest_size=8)
        return cls(root / key, key, noun)

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a record back.

        Args:
            name: its name.

        Returns:
            What was written, tuples as lists, or None where it was not finished.

        Raises:
            StoreError: the bytes are not those that were written.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            found = unseal(path.read_bytes())
        except OSError as error:
            raise read_error(error, path) from error
        if found is None or (found.get("key"), found.get("name")) != (self.key, name):
            raise StoreError(
                f"a {self.noun} is not what was written",
                where=str(path),
                got="other bytes, or the record of another run",
                expected=f"a sealed file with key {self.key} and name {name}",
                do=f"delete {self.folder} and run the same command again: what is missing is made anew",
            )
        return found["value"]

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Publish a record, whole or not at all.

        Args:
            name: its name.
            value: as for ``canonical_json``; floats come back to the last bit.
        """
        make_folder(self.folder)
        write_bytes_atomic(self.folder / f"{name}.json", seal({"key": self.key, "name": name, "value": value}))
