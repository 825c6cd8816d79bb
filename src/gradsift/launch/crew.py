"""Whom rank 0 leads: workers that it starts itself or that come of their own, and what became of their units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from gradsift.launch.board import Board


class Crew(Protocol):
    """Workers that rank 0 starts itself."""

    def begin(self, board: Board) -> None:
        """Start them; called once, when there is work."""
        ...

    def tend(self, progress: int) -> None:
        """Replace those that died; raises when that has no end and ``progress`` stands still."""
        ...

    def end(self) -> None:
        """Stop them."""
        ...


class Nobody:
    """The workers were started by someone else."""

    def begin(self, board: Board) -> None:
        """Do nothing.

        Args:
            board: the run's meeting place.
        """

    def tend(self, progress: int) -> None:
        """Do nothing.

        Args:
            progress: of the run.
        """

    def end(self) -> None:
        """Do nothing."""


@dataclass
class Tally:
    """What became of the units of a run.

    Args:
        num_units: units that were to be measured.
        num_here: measured by rank 0 itself.
        num_adopted: measured by others and adopted.
        num_freed: taken from a process that was gone, and given out again.
        num_rows_freed: their rows.
        num_repeated: staged although their rows were committed by then; removed.
        num_set_aside: rows that killed three processes; their status is WORKER_CRASH.
        refused: staged units that were not adopted -> why; measured again.
        gone: processes that were gone while they had a unit.
    """

    num_units: int = 0
    num_here: int = 0
    num_adopted: int = 0
    num_freed: int = 0
    num_rows_freed: int = 0
    num_repeated: int = 0
    num_set_aside: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
