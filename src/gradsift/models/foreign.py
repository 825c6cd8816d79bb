"""Manners with transformers, peft and the hub: their errors on one line, their progress bars off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def short(error: BaseException) -> str:
    """Put a foreign error on one line.

    Args:
        error: any exception.

    Returns:
        Its kind and message, at most 300 characters.
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Silence transformers' own bar: what a person sees is up to the command line.

    Yields:
        None: nothing.
    """
    from transformers.utils import logging as quiet

    shown = quiet.is_progress_bar_enabled()
    quiet.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            quiet.enable_progress_bar()
