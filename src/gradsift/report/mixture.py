"""What a page and a card say of domain probabilities (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.report.fields import Manifest
    from gradsift.report.view import SourceLine


@dataclass(frozen=True)
class MixtureLine:
    """A domain, its probability, and its shares of eligible and kept rows where it is a label of the pool."""

    name: str
    weight: float
    pool: float | None
    kept: float | None


def mixture_lines(manifest: Manifest, sources: Sequence[SourceLine]) -> tuple[MixtureLine, ...]:
    """List the domains of a mixture, largest probability first.

    Args:
        manifest: the run's manifest.
        sources: the pool's labels with their shares.

    Returns:
        One line per domain; nothing where the method gave no mixture.
    """
    known = {line.label: line for line in sources}
    order = sorted(manifest.selection.mixture.items(), key=lambda one: (-one[1], one[0]))
    return tuple(
        MixtureLine(
            name, weight, getattr(known.get(name), "pool_rows", None), getattr(known.get(name), "kept_rows", None)
        )
        for name, weight in order
    )


def mixture_section(manifest: Mapping[str, Any]) -> str:
    """Write the card's section on sampling probabilities.

    Args:
        manifest: content of ``manifest.json``.

    Returns:
        Markdown; empty where the method gave no mixture.
    """
    mixture = manifest["selection"].get("mixture")
    if not mixture:
        return ""
    lines = ["## Mixture", "", "Sampling probabilities of the domains, also in `mixture.json`:", "", "| domain | probability |",
             "|---|---|"]  # fmt: skip
    lines += [
        f"| {str(name).replace('|', chr(92) + '|')} | {weight:.4f} |"
        for name, weight in sorted(mixture.items(), key=lambda one: (-one[1], one[0]))
    ]
    lines += ["", *WHOSE, "", "```python", *SAMPLING, "```"]
    return "\n".join(lines)


WHOSE = (
    "A domain is a label of the pool; `cluster-N` are the rows whose `cluster` in `audit.parquet` is N.",
    "A trainer that samples takes the probabilities with one data set per domain:",
)
# parts: domain -> datasets.Dataset; the default stopping strategy would end with the first domain that runs out
SAMPLING = (
    "mixture = json.loads(Path('mixture.json').read_text())",
    "rows = interleave_datasets([parts[name] for name in mixture], probabilities=list(mixture.values()), seed=42,",
    "                           stopping_strategy='all_exhausted')",
)
