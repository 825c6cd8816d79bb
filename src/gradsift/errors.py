"""Errors that tell a person what to do: what, where, got, expected, do this.

One class per remedy. The command line prints the message without a traceback and exits with ``exit_code``
(0 ok, 1 failure, 2 usage or configuration, 28 disk full, 128 + signal number).
"""

from __future__ import annotations


class GradsiftError(Exception):
    """Base of every refusal.

    Args:
        what: the problem in one sentence.
        where: file, flag, field or row it was found in.
        got: the value that was found.
        expected: the values that would have been accepted.
        do: the remedy, as an instruction.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", got: object = None, expected: str = "", do: str = "") -> None:
        self.what, self.where, self.got, self.expected, self.do = what, where, got, expected, do
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message, one line per part that is known."""
        lines = [self.what]
        if self.where:
            lines.append(f"  where:    {self.where}")
        if self.got is not None:
            lines.append(f"  got:      {self.got}")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.do:
            lines.append(f"  do this:  {self.do}")
        return "\n".join(lines)


class ConfigError(GradsiftError):
    """A flag, recipe field or combination of them is wrong: change the command."""

    exit_code = 2


class BudgetError(ConfigError):
    """The budget cannot be met as written: change ``--budget``."""


class DataError(GradsiftError):
    """A data file is missing, unreadable or holds no usable row: change the file."""

    exit_code = 2


class ModelError(GradsiftError):
    """The navigator cannot be loaded or does not fit its tokenizer: change ``--navigator``."""

    exit_code = 2


class DependencyError(GradsiftError):
    """An optional package is missing: install the extra that is named."""

    exit_code = 2


class SpecError(GradsiftError):
    """Two sets of signals are not comparable: use another ``--out`` or the old setting."""

    exit_code = 2


class SignalError(GradsiftError):
    """A signal that a method needs is missing or damaged: collect it again."""


class StoreError(GradsiftError):
    """Bytes on disk do not match their record: run the command that is named."""


class DiskFullError(StoreError):
    """The disk is full: what was committed is kept; free space and run the same command."""

    exit_code = 28


class InfeasibleError(GradsiftError):
    """No selection meets the constraints; the certificate is in the message."""


class NumericsError(GradsiftError):
    """A number that must be finite or non-zero is not."""


class DivergedError(NumericsError):
    """A training loss left the finite numbers; a lower learning rate may keep it there."""


class LaunchError(GradsiftError):
    """Another process of this run is gone or works on something else: run the same command again."""


class Interrupted(GradsiftError):
    """A signal stopped the run; the same command resumes it.

    Args:
        signum: number of the signal (2 SIGINT, 15 SIGTERM, 1 SIGHUP).
        resume: the command line that resumes.
    """

    def __init__(self, signum: int, resume: str) -> None:
        self.exit_code = 128 + signum
        super().__init__(f"stopped by signal {signum}; what was committed is kept", do=f"resume with: {resume}")
