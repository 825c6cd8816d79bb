"""What a method's page rests on: the words of its ``evidence``, parts joined by `` + ``."""

from __future__ import annotations

from types import MappingProxyType

EVIDENCE = MappingProxyType(
    {
        "control": "no paper: what a claim must beat",
        "ours": "our own rule, derivation or decision",
        "paper": "the paper's own text was read, method and experiments",
        "sections": "some sections of the paper's own text were read, the abstract among them",
        "abstract": "of the paper itself only the abstract was read",
        "follow-up": "a later paper that describes the method was read",
        "summaries": "other people's summaries or re-measurements were read",
        "code": "released code was read: the authors', or the reference implementation that the page names",
    }
)
"""What each word means, the closest to the source in front."""


def evidence_parts(mark: str) -> tuple[str, ...]:
    """Split a mark such as ``abstract + code`` into its words.

    Args:
        mark: a method's ``evidence``.

    Returns:
        The words, in the order given; an unknown word is returned like any other.
    """
    return tuple(mark.split(" + "))
