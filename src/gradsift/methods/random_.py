"""Random selection, also matched by length or balanced over sources: the control of every claim.

Source: no paper; the comparison that published selectors are measured against, and often fail to beat.

Algorithm:
    1  u_i ~ U[0, 1), keyed by (seed, stream, id)
    2  none:    p_i = u_i
       length:  cut the rows into 10 deciles of trained tokens; p_i = (place of u_i in its decile + v_i) / decile's size
       source:  p_i = place of u_i in its source + v_i
    3  take the rows of smallest p_i within the budget      (v_i ~ U[0, 1) mixes the groups)

With ``length`` the first k rows hold every decile in the pool's shares, to within one row per decile; with ``source``
they hold equally many rows of every source, and when a source runs out the others share what is left.

Departures from the paper: none, there is no paper. Length-matched controls are usually matched to one finished
selection; this one is matched to the pool, so it needs no other method's result.

Departures from released code: released controls draw by position from one generator; here a draw belongs to an id, so
the order of the rows cannot change it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from gradsift.methods.base import Needs, register, require, select_ranked
from gradsift.seeds import Stream
from gradsift.types import Budget, Note, Problem, Selection

NUM_DECILES = 10


@register
@dataclass(frozen=True)
class Random:
    """Keyed random draw.

    Args:
        match: ``none``, ``length`` (the pool's length distribution) or ``source`` (equal counts per source).
    """

    match: Literal["none", "length", "source"] = "none"

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "control"
    summary: ClassVar[str] = "random draw by id, optionally matched to the pool's lengths or balanced over sources"
    evidence: ClassVar[str] = "control"

    @property
    def needs(self) -> Needs:
        """Nothing is measured."""
        return Needs()

    def select(self, problem: Problem, budget: Budget, stream: Stream) -> Selection:
        """Draw rows of the problem.

        Args:
            problem: the eligible rows.
            budget: how many rows or trained tokens.
            stream: the draw's stream.

        Returns:
            The selection; scores are minus the place p.
        """
        require(problem, self)
        draw = stream.child("draw").uniform(problem.ids)
        mix = stream.child("mix").uniform(problem.ids)
        if self.match == "none":
            place, group = draw, np.zeros(problem.size, dtype=np.int64)
        elif self.match == "length":
            group = length_deciles(problem.num_trained)
            place = (place_in_group(draw, group) + mix) / np.bincount(group)[group]
        else:
            group = np.unique(np.array(problem.sources, dtype=object).astype(str), return_inverse=True)[1]
            place = place_in_group(draw, group) + mix
        selection = select_ranked(
            problem, self, budget, stream, score=-place, kept="draw", why_kept=lambda i: self._why(problem, draw, i)
        )
        return selection if self.match != "source" else _note_exhausted(problem, selection)

    def _why(self, problem: Problem, draw: Float[np.ndarray, " N"], row: int) -> str:
        among = {
            "none": "",
            "length": f" among rows of its length ({problem.num_trained[row]} trained tokens)",
            "source": f" among rows of {problem.sources[row]}",
        }
        return f"random draw {draw[row]:.4f}{among[self.match]}"


def length_deciles(num_trained: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Cut rows into ten groups of equal size by length (ours).

    Args:
        num_trained: int64 [N] trained tokens, in id order.

    Returns:
        int64 [N] group 0 (shortest) to at most 9, all in use; sizes differ by at most 1. Equal lengths are parted by id.
    """
    n = len(num_trained)
    group = np.empty(n, dtype=np.int64)
    group[np.argsort(num_trained, kind="stable")] = np.arange(n) * min(NUM_DECILES, n) // n
    return group


def place_in_group(draw: Float[np.ndarray, " N"], group: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """0-based place of each row's draw among the draws of its group (ours).

    Args:
        draw: float64 [N], smaller first; ties by position.
        group: int64 [N], values 0, 1, ... all in use.

    Returns:
        int64 [N].
    """
    order = np.lexsort((draw, group))
    sizes = np.bincount(group)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - starts
    return place


def _note_exhausted(problem: Problem, selection: Selection) -> Selection:
    """Say which sources gave all their rows while others gave more."""
    have, chosen = Counter(problem.sources), set(selection.ids)
    took = Counter(source for i, source in zip(problem.ids, problem.sources, strict=True) if i in chosen)
    most = max(took.values())
    short = sorted(source for source in have if took[source] == have[source] < most)
    if not short:
        return selection
    named = ", ".join(f"{source} ({have[source]} rows)" for source in short)
    text = f"all rows of {named} were taken; the other sources share what was left of the budget"
    return dataclasses.replace(selection, notes=(*selection.notes, Note("source_exhausted", text, len(short))))
