"""The command line: parse, call, print. One file per command; heavy imports happen inside the commands."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import signal
import sys
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """Run the command line and exit with the documented code.

    0 ok, 1 failure, 2 usage or configuration, 28 disk full, 128 + signal number when stopped by a signal.
    """
    for name in SIGNALS:
        signal.signal(name, _stop)  # imports take seconds; commands that measure have handlers of their own
    try:
        from gradsift.cli.app import run

        code = run(sys.argv[1:])
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process at once, after what the libraries want to be done at its end.

    Python takes up to seconds to be taken down and answers no signal as it should meanwhile: whoever asks a run to stop then
    would read that it was killed. So the last thing done here is to look whether someone asked.
    """
    asked: list[int] = []
    for name in SIGNALS:
        signal.signal(name, lambda number, _: asked.append(number))
    if code < 128:  # whoever stops a run waits; what it started was ended already
        atexit._run_exitfuncs()
    if asked and code < 128:
        print(_words(asked[0]), file=sys.stderr)
        code = 128 + asked[0]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _words(number: int) -> str:
    words = shlex.join(["gradsift", *sys.argv[1:]])
    return f"gradsift: stopped by signal {number}; what was committed is kept\n  do this:  resume with: {words}"


def _stop(number: int, _: FrameType | None) -> None:
    """End in good order, so that what was started is ended too."""
    print(_words(number), file=sys.stderr)
    raise SystemExit(128 + number)
