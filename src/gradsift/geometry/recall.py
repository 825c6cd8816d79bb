"""How well a model knows a fact: recall over sampled completions, levels and their certainty (memory_level.md)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from gradsift.seeds import Stream

NUM_LEVELS = 5  # 0: never recalled; i: recall in ((i - 1)/4, i/4]
# Beginnings of the Unicode names of letters that words are not told apart by: no spaces, or, in Korean, endings written on.
UNSPACED = (
    "CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "HANGUL ", "THAI ", "LAO ", "KHMER ", "MYANMAR ",
)  # fmt: skip
MARKS = ("Mn", "Mc")


def recall_level(count: int, total: int) -> int:
    """Bin a recall count (arXiv 2509.16596; whole numbers are compared, never fractions).

    Args:
        count: outputs that held the object, in [0, total].
        total: outputs, at least 1.

    Returns:
        0 for none, else the i of 1 to 4 with (i - 1)/4 < count/total <= i/4.

    Raises:
        ValueError: the count is out of range (our own mistake).
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"recall {count} of {total}")
    return -(-4 * count // total)


def wilson(count: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Bound a share by Wilson's score interval (Wilson 1927; 95% by default).

    Args:
        count: hits.
        total: trials, at least 1; they are taken for independent, which samples of one template are not.
        z: quantile of the normal distribution.

    Returns:
        Lower and upper bound in [0, 1].
    """
    share, shrink = count / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / shrink
    half = z / shrink * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def level_of_share(share: float) -> int:
    """Bin a share, for the ends of an interval.

    Args:
        share: in [0, 1].

    Returns:
        A level, 0 to 4.
    """
    return int(np.ceil(4 * share))


def fold(text: str) -> str:
    """Fold case, compatibility forms and accents away.

    Args:
        text: any text.

    Returns:
        The text to compare; Korean syllables are whole.
    """
    apart = unicodedata.normalize("NFKD", text).casefold()
    bare = "".join(c for c in unicodedata.normalize("NFKD", apart) if not unicodedata.combining(c))
    return unicodedata.normalize("NFC", bare)


def recalls(output: str, names: Sequence[str]) -> bool:
    """Tell whether an output holds an object or one of its aliases, on word boundaries (ours; the paper asks for any hit).

    Scripts without spaces between words have no such boundaries, and any whole letters count there.

    Args:
        output: what a model wrote.
        names: the object and its aliases; blank ones never match.

    Returns:
        True where one of them stands in it.
    """
    where = fold(output)
    folded = [fold(name).strip() for name in names]
    return any(_stands(where, name) for name in folded if name)


def _stands(text: str, name: str) -> bool:
    starts = (match.start() for match in re.finditer(f"(?={re.escape(name)})", text))
    for start in starts:
        before, after = text[:start][-1:], text[start + len(name) :][:1]
        cut_letter = after != "" and unicodedata.category(after) in MARKS
        if not (cut_letter or _one_word(before, name[0]) or _one_word(after, name[-1])):
            return True
    return False


def _one_word(outside: str, inside: str) -> bool:
    """Whether a neighboring character goes on with the word; a mark is a part of its word."""
    in_word = outside != "" and (outside.isalnum() or outside == "_" or unicodedata.category(outside) in MARKS)
    return in_word and not any(unicodedata.name(c, "").startswith(UNSPACED) for c in (outside, inside))


def balanced_places(
    draw: Float[np.ndarray, " N"], groups: Sequence[str], candidates: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Order rows so that every beginning of the order is balanced over groups and random inside them (ours).

    The first row of every group comes first, in drawn order, then the second of every group, and so on.

    Args:
        draw: float64 [N] keyed draws, one per row.
        groups: N labels.
        candidates: bool [N] rows that take part.

    Returns:
        float64 [N] places from 0; infinity for the others.
    """
    rows = np.flatnonzero(candidates)
    by_draw = rows[np.lexsort((rows, draw[rows]))]
    seen: dict[str, int] = {}
    turn = np.empty(len(rows), dtype=np.int64)
    for k, i in enumerate(by_draw):
        group = groups[int(i)]
        turn[k] = seen.get(group, 0)
        seen[group] = int(turn[k]) + 1
    place = np.full(len(draw), np.inf)
    place[by_draw[np.argsort(turn, kind="stable")]] = np.arange(len(rows))
    return place


def split_by_subject(subjects: Sequence[str], share: float, stream: Stream) -> Bool[np.ndarray, " N"]:
    """Hold facts out by whole subjects, so that no subject is trained on and tested (ours).

    Args:
        subjects: N subjects; they are compared folded.
        share: of the subjects to hold out, in [0, 1].
        stream: of the draw, keyed by subject.

    Returns:
        bool [N], True for test facts.
    """
    keys = [" ".join(fold(subject).split()) for subject in subjects]
    unique = sorted(set(keys))
    draws = stream.uniform(unique)
    held = {unique[k] for k in np.lexsort((np.arange(len(unique)), draws))[: round(share * len(unique))]}
    return np.array([key in held for key in keys], dtype=bool)


def count_levels(levels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " L"]:
    """Count the rows of every level.

    Args:
        levels: int64 [N] in [0, 5).

    Returns:
        int64 [5].
    """
    return np.bincount(levels, minlength=NUM_LEVELS).astype(np.int64)
