"""How a run tells what it is doing; the command line draws it, a library user may ignore it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """What the pipeline reports while it runs."""

    def start(self, stage: str, total_tokens: int) -> None:
        """A stage begins; ``total_tokens`` is 0 when its length is not known."""
        ...

    def advance(self, rows: int, tokens: int) -> None:
        """Some rows are done; raises to stop the run."""
        ...

    def finish(self, stage: str) -> None:
        """The stage is over."""
        ...

    def say(self, text: str) -> None:
        """One line for a person."""
        ...


class Silent:
    """No output at all."""

    def start(self, stage: str, total_tokens: int) -> None:
        """Do nothing."""

    def advance(self, rows: int, tokens: int) -> None:
        """Do nothing."""

    def finish(self, stage: str) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


@dataclass
class Clock:
    """Seconds and tokens per stage.

    Args:
        progress: who is told.
        seconds: wall time per stage.
        tokens: tokens per stage.
    """

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, total_tokens: int = 0, *, told: bool = True) -> Iterator[None]:
        """Time a stage; a stage inside another one is not counted in the outer one.

        Args:
            name: its name in the cost table.
            total_tokens: tokens it will go through, 0 when not known.
            told: announce its start and end; False for one of many short stages, whose caller says what is worth a line.

        Yields:
            Nothing.
        """
        if told:
            self.progress.start(name, total_tokens)
        begun = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent
        if told:
            self.progress.finish(name)

    def add(self, other: Clock) -> None:
        """Add what another clock of the same run has counted.

        Args:
            other: seconds and tokens per stage.
        """
        for mine, theirs in ((self.seconds, other.seconds), (self.tokens, other.tokens)):
            for name, amount in theirs.items():
                mine[name] = mine.get(name, 0) + amount  # type: ignore[assignment] - seconds to seconds, tokens to tokens

    def tick(self, name: str, rows: int, tokens: int) -> None:
        """Count work done in a stage.

        Args:
            name: the stage.
            rows: rows done.
            tokens: tokens done.
        """
        self.tokens[name] = self.tokens.get(name, 0) + tokens
        self.progress.advance(rows, tokens)
