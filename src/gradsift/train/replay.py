"""Replay: general rows take the place of a share of the selected ones, so that the budget stays what it was (ours).

Which selected rows go and which general rows come is drawn by id. Rows of anchors or evaluations are refused by content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gradsift.errors import ConfigError, DataError
from gradsift.seeds import Stream
from gradsift.store.spec import content_hash
from gradsift.types import TokenRow


@dataclass(frozen=True)
class Mixed:
    """What is trained on after mixing.

    Args:
        rows: kept selected rows in their order, then the replayed ones by id.
        num_replayed: of these, general rows.
        replayed_tokens: trained tokens of general rows.
        num_trained: trained tokens of all rows.
        left_out: ids of the selected rows that made room.
    """

    rows: tuple[TokenRow, ...]
    num_replayed: int
    replayed_tokens: int
    num_trained: int
    left_out: tuple[str, ...]


def refuse_leak(rows: Sequence[TokenRow], held_out: Mapping[str, Sequence[TokenRow]], what: str) -> None:
    """Refuse to train on rows that something is measured with, compared by tokens and mask.

    Args:
        rows: rows to train on.
        held_out: name of a set -> its rows.
        what: what the rows are, for the message.

    Raises:
        DataError: a row stands in a held-out set.
    """
    known = {
        content_hash(row.input_ids, row.trained): (name, row.id) for name, some in held_out.items() for row in some
    }
    hits = [(row.id, *known[h]) for row in rows if (h := content_hash(row.input_ids, row.trained)) in known]
    if hits:
        mine, name, theirs = hits[0]
        raise DataError(
            f"{what} hold rows that are measured with",
            where=f"row {mine} is row {theirs} of {name}",
            got=f"{len(hits)} shared rows",
            expected="sets without a common row",
            do="remove these rows from the file: training on them would make the figures worthless",
        )


def mix(
    selected: Sequence[TokenRow],
    general: Sequence[TokenRow],
    *,
    share: float,
    unit: Literal["rows", "tokens"] = "rows",
    draw: Stream,
) -> Mixed:
    """Replace a share of the selected rows by general ones.

    In rows: round(share * N) rows are replaced, so the number stays N. In tokens: general rows are drawn until the next
    would exceed the share of the selection's trained tokens, and selected rows leave until the total is within what it
    was; the total is never exceeded, and short of it by less than one row.

    Args:
        selected: N selected rows, all kept at share 0.
        general: rows to draw from.
        share: in [0, 1).
        unit: what is shared out.
        draw: stream of the two draws.

    Returns:
        The rows and what was replaced.

    Raises:
        ConfigError: the share lies outside [0, 1).
        DataError: too few general rows, or an id occurs on both sides.
    """
    if not 0.0 <= share < 1.0:
        raise ConfigError("the replay share must lie in [0, 1)", where="replay.share", got=share)
    shared = sorted({r.id for r in selected} & {r.id for r in general})
    if shared:
        raise DataError("a general row has the id of a selected one", where="replay", got=", ".join(shared[:5]),
                        do="remove the selected rows from the general file, or rename them")  # fmt: skip
    size = (lambda _: 1) if unit == "rows" else (lambda row: row.num_trained)
    budget = sum(size(row) for row in selected)
    wanted = int(np.floor(share * budget + 0.5)) if unit == "rows" else share * budget
    incoming, taken = [], 0
    for row in _drawn(general, draw.child("general")):
        if taken + size(row) > wanted:
            break
        incoming.append(row)
        taken += size(row)
    else:
        if taken < wanted:
            raise DataError(
                "there are too few general rows", where="replay", got=f"{taken} {unit}",
                expected=f"{wanted:g} {unit} ({share:.0%} of {budget})",
                do="give more general rows or a smaller replay.share",
            )  # fmt: skip
    stay, used = {row.id for row in selected}, budget + taken
    leaving = []
    for row in _drawn(selected, draw.child("selected")):
        if used <= budget:
            break
        leaving.append(row.id)
        stay.discard(row.id)
        used -= size(row)
    rows = (*(row for row in selected if row.id in stay), *sorted(incoming, key=lambda row: row.id))
    tokens = sum(row.num_trained for row in incoming)
    return Mixed(rows, len(incoming), tokens, sum(row.num_trained for row in rows), tuple(sorted(leaving)))


def _drawn(rows: Sequence[TokenRow], draw: Stream) -> list[TokenRow]:
    """Rows in an order drawn by id."""
    draws = draw.uniform([row.id for row in rows])
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (draws[i], rows[i].id))]
