"""Numbers and foreign text made fit to be read: pure functions, used by the charts, the page and the card (ours)."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from datetime import datetime

MINUS = "\u2212"
UNKNOWN = "not measured"
# Not strftime: its names follow the locale, and the same run must give the same page.
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_DIGITS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
# Marks that reorder or hide the text around them: a page that obeyed them could be made to lie.
_HIDDEN = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\ufffe\uffff")


def visible(text: str) -> str:
    """Replace characters that a reader cannot see, or that reorder text, by their code point.

    Args:
        text: any string, lone surrogates included.

    Returns:
        Text that has a UTF-8 and an XML form; newlines and tabs stay, a carriage return before a newline goes.
    """
    return "".join(_shown(c) for c in text.replace("\r\n", "\n"))


def _shown(char: str) -> str:
    if char in "\n\t":
        return char
    tag = 0xE0000 <= ord(char) <= 0xE007F
    if char in _HIDDEN or tag or (ord(char) & 0xFFFE) == 0xFFFE or unicodedata.category(char) in ("Cc", "Cs"):
        return f"[U+{ord(char):04X}]"
    return char


def one_line(text: str, limit: int = 40) -> str:
    """Make a label for a chart or a sentence: visible, on one line, not too long.

    Args:
        text: any string.
        limit: characters kept before an ellipsis.

    Returns:
        The label.
    """
    flat = " ".join(visible(text).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "\u2026"


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def count(value: float | None) -> str:
    """Write a whole number with thousands separators.

    Args:
        value: the number; None and NaN were not measured.

    Returns:
        ``1,234``.
    """
    return f"{int(value):,}".replace("-", MINUS) if value is not None and _known(value) else UNKNOWN


def number(value: float | None) -> str:
    """Write a real number with about three significant digits, tiny and huge ones as a power of ten.

    Args:
        value: the number; None and NaN were not measured.

    Returns:
        ``2.31``, ``0.043``, ``1,240`` or ``2.1 x 10^-6`` with a real cross and raised digits.
    """
    if value is None or not _known(value):
        return UNKNOWN
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa} \u00d7 10{str(int(exponent)).translate(_DIGITS)}".replace("-", MINUS)
    if value == int(value):
        return count(value)
    decimals = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:,.{min(decimals, 5)}f}".replace("-", MINUS)


def signed(value: float | None) -> str:
    """Write a cosine or a difference with its sign.

    Args:
        value: the number; None and NaN were not measured.

    Returns:
        ``+0.043`` or, below a thousandth, the sign and a power of ten.
    """
    if value is None or not _known(value):
        return UNKNOWN
    if value != 0 and abs(value) < 5e-4:
        return ("+" if value > 0 else "") + number(value)
    return f"{value:+.3f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """Write a share as a percentage.

    Args:
        share: in [0, 1]; None and NaN were not measured.

    Returns:
        ``12%``, ``4.5%`` or ``under 0.1%``.
    """
    if share is None or not _known(share):
        return UNKNOWN
    value = 100 * share
    if 0 < value < 0.1:
        return "under 0.1%"
    # 99.96 must not read as all of it.
    rounded = f"{value:.1f}" if value < 10 or 99.5 <= value < 100 else f"{value:.0f}"
    return ("99.9" if rounded == "100.0" else rounded.removesuffix(".0")) + "%"


def share(part: float | None, whole: float | None) -> float | None:
    """Divide, where there is something to divide by.

    Args:
        part: numerator.
        whole: denominator.

    Returns:
        part / whole, or None when either is unknown or the whole is 0.
    """
    return part / whole if part is not None and whole else None


def duration(seconds: float | None) -> str:
    """Write a time span in the two units that matter.

    Args:
        seconds: the span; None and NaN were not measured.

    Returns:
        ``0.42 s``, ``12.3 s``, ``3 min 20 s`` or ``2 h 5 min``.
    """
    if seconds is None or not _known(seconds):
        return UNKNOWN
    if seconds < 60:
        digits = 2 if seconds < 1 else 1
        text = f"{seconds:.{digits}f} s"
        return "under 0.01 s" if text == "0.00 s" and seconds > 0 else text
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def size(num_bytes: float | None) -> str:
    """Write a size in decimal units.

    Args:
        num_bytes: bytes; None was not measured.

    Returns:
        ``1.34 GB``.
    """
    if num_bytes is None or not _known(num_bytes):
        return UNKNOWN
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def moment(iso: str) -> str:
    """Write a point in time for people.

    Args:
        iso: ISO 8601 text.

    Returns:
        ``24 November 2026, 19:31 UTC``, or the text as it came when it is no such time.
    """
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = when.tzname() or ""
    return f"{when.day} {MONTHS[when.month - 1]} {when.year}, {when:%H:%M} {zone}".rstrip()


def plural(value: int | None, one: str, many: str = "") -> str:
    """Write a count with its noun.

    Args:
        value: the count.
        one: the noun for 1.
        many: the noun for the rest; one + s by default.

    Returns:
        ``1 row``, ``24 rows``.
    """
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def sentence(text: str) -> str:
    """Make a sentence of a note: a capital at the start, a full stop at the end.

    Args:
        text: a note as the terminal shows it.

    Returns:
        The same with both; a text that ends a sentence already keeps its end.
    """
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) or not text else ".")


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text.

    Args:
        text: what is shown.
        trained: whether it carries loss.
        hidden: characters of this stretch that are not shown, after ``text``.
        tail: what is shown after the hidden characters.
    """

    text: str
    trained: bool
    hidden: int = 0
    tail: str = ""


def clip(segments: list[tuple[str, bool]], *, trained: int = 480, context: int = 260) -> tuple[Piece, ...]:
    """Shorten an example so that both its prompt and what is trained on can be seen.

    Prompts keep their start and their end, trained stretches their start. Allowances are shared by the segments of a
    kind; a segment that gets none is counted and not shown.

    Args:
        segments: text and whether it is trained, in order.
        trained: characters allowed for trained stretches.
        context: characters allowed for the others.

    Returns:
        One piece per segment.
    """
    left = {True: trained, False: context}
    pieces = []
    for text, is_trained in segments:
        room = left[is_trained]
        # Cutting off a handful of characters would cost more room than it saves.
        if len(text) <= room + 24:
            pieces.append(Piece(text, is_trained))
            left[is_trained] = max(0, room - len(text))
            continue
        head = room if is_trained else room // 3
        tail = 0 if is_trained else room - head
        pieces.append(Piece(text[:head], is_trained, len(text) - head - tail, text[len(text) - tail :]))
        left[is_trained] = 0
    return tuple(pieces)
