"""The folder in which the processes of a run meet: what is open, who has which unit, who is alive (ours).

Everything is a small file under ``launch/`` of the run folder; no sockets and no process group are needed. A unit is
claimed by creating a file that must not exist, which works on network disks as well. Nothing here is a result: the
folder may be deleted between two runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.errors import LaunchError
from gradsift.launch.bench import Unit
from gradsift.manifest import make_folder, read_error, seal, unseal, write_bytes_atomic, write_error

LAUNCH = "launch"
FREED = ".freed-"


@dataclass(frozen=True)
class Board:
    """The meeting place of one run.

    Args:
        folder: ``launch`` in the run folder.
        run: name of this run, new with every start.
    """

    folder: Path
    run: str

    @property
    def place(self) -> Path:
        """Folder of this start's files."""
        return self.folder / self.run

    @property
    def beats(self) -> Path:
        """Folder of the signs of life."""
        return self.place / "beats"

    def claims(self, name: str) -> Path:
        """Folder of a pass's claims.

        Args:
            name: the pass.

        Returns:
            The folder, which may not exist yet.
        """
        return self.place / f"claims-{name}"

    def publish(self, state: Mapping[str, Any]) -> None:
        """Say how the run stands; only its rank 0 does.

        Args:
            state: what :func:`read_state` gives the others.
        """
        make_folder(self.folder)
        write_bytes_atomic(self.folder / "run.json", seal({**state, "run": self.run}))

    def open_pass(self, name: str, spec_key: str, units: Sequence[Unit]) -> None:
        """Lay out the units of a pass, to be claimed; the pass is open once the run's state names it.

        Args:
            name: the pass.
            spec_key: what is measured.
            units: in the order of the plan.
        """
        for folder in (self.folder, self.place, self.claims(name)):
            make_folder(folder)
        self.write_plan(name, spec_key, units)

    def write_plan(self, name: str, spec_key: str, units: Sequence[Unit]) -> None:
        """Write the units of a pass; those who have read them look again when the state's ``edition`` has moved on.

        Args:
            name: the pass.
            spec_key: what is measured.
            units: in the order of the plan.
        """
        lines = [[unit.shard, list(unit.skipped), unit.key] for unit in units]
        write_bytes_atomic(self.place / f"plan-{name}.json", seal({"spec_key": spec_key, "units": lines}))

    def read_plan(self, name: str) -> tuple[str, list[tuple[int, list[int], str]]]:
        """Read the units of an open pass.

        Args:
            name: the pass.

        Returns:
            Key of the spec, and per unit its shard, the skipped positions and its key.

        Raises:
            LaunchError: the file is damaged.
            StoreError: it cannot be read.
        """
        path = self.place / f"plan-{name}.json"
        try:
            found = unseal(path.read_bytes())
        except OSError as error:
            raise read_error(error, path) from error
        if found is None:
            raise LaunchError("the plan of the pass is damaged", where=str(path), do="run the same command again")
        return found["spec_key"], [(int(shard), list(skipped), str(key)) for shard, skipped, key in found["units"]]

    def claim(self, name: str, key: str, owner: str) -> bool:
        """Take a unit.

        Args:
            name: the pass.
            key: the unit.
            owner: name of this process's heart.

        Returns:
            Whether it is ours now; False when it is taken or the pass is over.

        Raises:
            StoreError: the disk reports an error.
        """
        path = self.claims(name) / key
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except (FileExistsError, FileNotFoundError):
            return False
        except OSError as error:
            raise write_error(error, path, len(owner)) from error
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(owner)
        return True

    def claimed(self, name: str) -> set[str]:
        """List the units of a pass that somebody has.

        Args:
            name: the pass.

        Returns:
            Their keys.
        """
        with contextlib.suppress(FileNotFoundError):
            return {entry for entry in os.listdir(self.claims(name)) if FREED not in entry}  # noqa: PTH208
        return set()

    def owner(self, name: str, key: str) -> str | None:
        """Tell who has a unit.

        Args:
            name: the pass.
            key: the unit.

        Returns:
            The owner, empty while the claim is being written, or None when nobody has it.
        """
        try:
            return (self.claims(name) / key).read_text("ascii")
        except (OSError, ValueError):
            return None

    def free(self, name: str, key: str) -> int:
        """Take a unit from a process that is gone; only rank 0 does.

        Args:
            name: the pass.
            key: the unit.

        Returns:
            How many processes the unit has been taken from, this one included.
        """
        folder = self.claims(name)
        times = len(list(folder.glob(f"{key}{FREED}*"))) + 1
        with contextlib.suppress(FileNotFoundError):
            (folder / key).rename(folder / f"{key}{FREED}{times}")
        return times


def read_state(folder: Path) -> dict[str, Any] | None:
    """Read how the run of a folder stands.

    Args:
        folder: ``launch`` in the run folder.

    Returns:
        ``run`` (its name), ``lead`` (rank 0's sign of life), ``passes`` (opened, in order), ``closed`` (how many of
        them are over), ``edition`` (moves on when an open plan changes) and ``end`` (None, ``done`` or why it failed); None when there is none.
    """
    try:
        return unseal((folder / "run.json").read_bytes())
    except OSError:
        return None
