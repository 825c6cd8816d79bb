"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gradsift.cli.app import safe
from gradsift.errors import Interrupted

WORDS = {
    "read": "reading rows",
    "tokenize": "tokenizing",
    "load": "loading the navigator",
    "adapter": "preparing the adapter",
    "warmup": "training the navigator",
    "anchors": "measuring anchors",
    "target": "embedding the target",
    "collect": "measuring the pool",
    "noise": "measuring rounding",
    "anchor_loss": "measuring anchor rows",
    "probe": "training probes",
    "measuring": "measuring before and after",
    "roll": "training roll-outs",
    "proxy": "training the proxy",
    "compare": "comparing",
    "worlds": "finding rows that may be chosen",
    "select": "selecting",
    "write": "writing",
}


PATIENCE_SECONDS = 2.0  # from a stop signal until the run is stopped in the midst of what it does
HARD_SECONDS = 0.7  # from a second signal until the process ends without tidying up


class _Overdue(BaseException):
    """A run is stopped where it stands; whoever catches exceptions of a library there must not take it for one."""


class Screen:
    """Progress on the terminal; also where a stop signal is noticed.

    Args:
        console: where to draw.
        resume: the command that resumes the run.
    """

    def __init__(self, console: Console, resume: str) -> None:
        self.console, self.resume = console, resume
        self._stopped_by: int | None = None
        self._overdue = self._ending = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begun = 0.0

    def start(self, stage: str, total_tokens: int) -> None:
        """Begin a stage."""
        self._begun = time.perf_counter()
        words = WORDS.get(stage, stage)
        if total_tokens and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("tokens"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(words, total=total_tokens, rate="")
        elif total_tokens:
            self.console.print(f"{words}: {total_tokens} tokens")

    def advance(self, rows: int, tokens: int) -> None:
        """Count work; raise when a signal has asked to stop."""
        if self._bar is not None and self._task is not None:
            done = self._bar.tasks[0].completed + tokens
            rate = f"{done / max(time.perf_counter() - self._begun, 1e-9):.0f}/s"
            self._bar.update(self._task, advance=tokens, rate=rate)
        self._look()

    def finish(self, stage: str) -> None:
        """End a stage and say how long it took."""
        self._close()
        self._look()
        seconds = time.perf_counter() - self._begun
        if seconds >= 0.5:
            self.console.print(f"{WORDS.get(stage, stage)}: {seconds:.1f} s", style="dim", highlight=False)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _look(self) -> None:
        """Raise when a signal has asked to stop."""
        if self._stopped_by is not None:
            self._ending = True
            self._close()
            raise Interrupted(self._stopped_by, self.resume)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextmanager
    def watching_signals(self) -> Iterator[None]:
        """Let SIGTERM, SIGINT and SIGHUP stop the run at the next micro-batch; a second SIGINT stops at once.

        Where no micro-batch ends for a while, such as in reading or loading, the run is stopped where it stands: whatever
        is being written then does not count, as after a kill. A run that was asked to stop never ends with code 0.

        Yields:
            Nothing.
        """
        timers: list[threading.Timer] = []
        main = threading.get_ident()

        def later(seconds: float, do: Callable[[], object]) -> None:
            timers.append(threading.Timer(seconds, do))
            timers[-1].daemon = True
            timers[-1].start()

        def overdue() -> None:
            if not self._ending:
                self._overdue = True
                signal.pthread_kill(main, self._stopped_by or signal.SIGTERM)

        def stop(number: int, _: FrameType | None) -> None:
            if self._stopped_by is not None and self._overdue:
                self._overdue, self._ending = False, True
                raise _Overdue
            if self._stopped_by is not None:
                os.write(2, f"gradsift: stopped at once by signal {number}; resume with: {self.resume}\n".encode())
                later(HARD_SECONDS, lambda: os._exit(128 + number))  # native code may not give way
                raise KeyboardInterrupt
            self._stopped_by = number
            later(PATIENCE_SECONDS, overdue)

        names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {name: signal.signal(name, stop) for name in names}
        try:
            yield
            self._look()  # asked to stop at the very end: a batch system reads the code, and the same command ends at once
        except _Overdue:
            self._close()
            raise Interrupted(self._stopped_by or signal.SIGTERM, self.resume) from None
        finally:
            for timer in timers:
                timer.cancel()
            self._close()
            for name, handler in before.items():
                signal.signal(name, handler)


def table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    """Make a plain table; what its title and headings hold is text, not markup. See :func:`cell`.

    Args:
        title: its title.
        *columns: headings.
        right: headings of right-aligned columns.

    Returns:
        An empty table.
    """
    out = Table(title=cell(title, "bold"), title_justify="left", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        out.add_column(cell(column), justify="right" if column in right else "left", overflow="fold")
    return out


def cell(text: str, style: str = "") -> Text:
    """Hold text out of a file for a table: nothing in it is markup, and control characters are escaped.

    Args:
        text: any text.
        style: of rich.

    Returns:
        What a table shows as it is.
    """
    return Text(safe(text), style)
