"""The command line: parse, call, print. One file per command; heavy imports happen inside the commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with the documented code.

    0 ok, 1 failure, 2 usage or configuration, 28 disk full, 128 + signal number when stopped by a signal.
    """
    from gradsift.cli.app import run

    sys.exit(run(sys.argv[1:]))
