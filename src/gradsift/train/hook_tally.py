"""What a step hook counts over a run, and the figures and remarks that come of it (surgery.md 3.1 step 6, and 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gradsift.train.parts import Cost
from gradsift.train.surgery import dot, dots
from gradsift.types import Note

COUNTS = ("num_steps", "num_projected", "num_skipped", "num_hidden", "num_bad_references", "num_nonfinite_steps")
COUNTS += ("reference_passes",)
MOST_STALE, MOST_SKIPPED = 0.10, 0.01  # shares above which a person is told


@dataclass
class Tally:
    """Counts and sums over the steps of a run; per source in the order of the sources.

    Args:
        counts: by name.
        sums: by name.
        worst_after: least cosine of z with a source over the projected steps.
    """

    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    worst_after: float = math.inf

    def count(self, name: str, by: int = 1) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + by

    def add(self, name: str, value: float) -> None:
        """Add to a sum, and one to the count of its terms."""
        self.sums[name] = self.sums.get(name, 0.0) + float(value)  # a numpy scalar could not be loaded safely
        self.count(name)

    def mean(self, name: str) -> float:
        """Mean of what was added; NaN where nothing was."""
        return self.sums[name] / self.counts[name] if self.counts.get(name) else math.nan

    def share(self, name: str, of: str) -> float:
        """Ratio of two counts; NaN where the second is 0."""
        return self.counts.get(name, 0) / self.counts[of] if self.counts.get(of) else math.nan


def summarize(tally: Tally, sources: Sequence[str], cost: Cost) -> dict[str, float]:
    """Turn the counts into figures for the report.

    Args:
        tally: the counts.
        sources: names of the sources.
        cost: of the hook.

    Returns:
        ``num_*`` counts, shares of steps, ``norm_ratio`` the mean |z|/|g|, cosines per source: of the step's gradient
        (``cosine/``), with a fresh reference only (``fresh_cosine/``), of what the optimizer took off the weights
        (``update_cosine/``; positive lowers the source's loss). NaN where nothing was measured.
    """
    figures = {name: float(tally.counts.get(name, 0)) for name in COUNTS}
    figures |= {
        "projected_share": tally.share("num_projected", "num_steps"),
        "norm_ratio": tally.mean("norm_ratio"),
        "worst_cosine_after": tally.worst_after if math.isfinite(tally.worst_after) else math.nan,
        "stale_share": tally.share("stale_disagreements", "stale_checks"),
        "update_cosine": tally.mean("update_cosine"),
        "update_opposed_share": tally.share("updates_opposed", "update_cosine"),
        "reference_tokens": float(cost.forward_tokens),
        "seconds": cost.seconds,
    }
    for name in sources:
        for figure in ("cosine", "fresh_cosine", "update_cosine"):
            figures[f"{figure}/{name}"] = tally.mean(f"{figure}/{name}")
        figures[f"conflict_share/{name}"] = tally.share(f"conflicts/{name}", f"cosine/{name}")
    return figures


def remarks(tally: Tally, num_rows: Mapping[str, int], num_reference: int) -> tuple[Note, ...]:
    """Say what a person should know.

    Args:
        tally: the counts.
        num_rows: rows of each source.
        num_reference: rows that a refresh asks for.

    Returns:
        Counted remarks; none where all is well.
    """
    counts, found = tally.counts, []
    short = [name for name, count in num_rows.items() if count < num_reference]
    if short:
        text = f"fewer than {num_reference} reference rows in {', '.join(short)}: all of them are used"
        found.append(Note("few_reference_rows", text, len(short)))
    if tally.share("stale_disagreements", "stale_checks") > MOST_STALE:
        text = (
            f"a stale and a fresh reference disagree on the sign in over {MOST_STALE:.0%} of checks: refresh more often"
        )
        found.append(Note("stale_references", text, counts["stale_disagreements"]))
    if tally.share("num_skipped", "num_steps") > MOST_SKIPPED:
        text = f"nothing was left of the gradient, and the step was skipped, in over {MOST_SKIPPED:.0%} of steps"
        found.append(Note("steps_skipped", text, counts["num_skipped"]))
    for name, text in PASSED.items():
        if counts.get(name):
            found.append(Note(name.removeprefix("num_"), text, counts[name]))
    return tuple(found)


PASSED = {
    "num_bad_references": "a reference gradient was zero or not finite and the step passed as it was",
    "num_nonfinite_steps": "the step's gradient was not finite and passed as it was",
}


def cosines(references: Float[Tensor, "M P"], g: Float[Tensor, " P"]) -> Float[np.ndarray, " M"]:
    """Cosine of a vector with every reference; 0 where a length is 0.

    Args:
        references: M vectors.
        g: a vector.

    Returns:
        float64 [M] in [-1, 1].
    """
    lengths = np.array([math.sqrt(dot(row, row)) for row in references]) * math.sqrt(dot(g, g))
    return np.divide(dots(references, g), lengths, out=np.zeros(len(references)), where=lengths > 0)
