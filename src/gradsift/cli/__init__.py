"""The command line: parse, call, print. One file per command; heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line and exit with the documented code.

    0 ok, 1 failure, 2 usage or configuration, 28 disk full, 128 + signal number when stopped by a signal.
    """
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, _stop)  # imports take seconds; commands that measure have handlers of their own
    try:
        from gradsift.cli.app import run

        code = run(sys.argv[1:])
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    if code >= 128:  # the libraries take seconds to be taken down, and whoever stops a run waits
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _stop(number: int, _: FrameType | None) -> None:
    """End in good order, so that what was started is ended too."""
    words = shlex.join(["gradsift", *sys.argv[1:]])
    print(f"gradsift: stopped by signal {number}; what was committed is kept\n  do this:  resume with: {words}",
          file=sys.stderr)  # fmt: skip
    raise SystemExit(128 + number)
