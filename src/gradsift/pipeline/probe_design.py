"""What probes learn from and judge: laid out from tokens alone, before any model loads (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from gradsift.data.token_rows import content_of
from gradsift.errors import ConfigError
from gradsift.geometry.likeness import token_likeness
from gradsift.geometry.trust import cap_copies, likely_domain
from gradsift.pipeline.prepare import Prepared
from gradsift.train.crossfit import CrossfitConfig, ProbePlan, plan_probes
from gradsift.types import TokenRow


@dataclass(frozen=True)
class Design:
    """What the probes learn from and judge, before any model loads.

    Args:
        plans: one per probe.
        groups: id -> smallest id among rows of equal tokens and mask.
        judged: one row per group, in id order.
        prior: ids that may be domain, in id order.
        rows: id -> token row, of what is trained on: pool ids, and keys of the anchors' rows.
        shared: anchor rows that also stand in the pool and are therefore not trained on.
    """

    plans: tuple[ProbePlan, ...]
    groups: Mapping[str, str]
    judged: tuple[TokenRow, ...]
    prior: tuple[str, ...]
    rows: Mapping[str, TokenRow]
    shared: tuple[str, ...]

    def judges(self, plan: ProbePlan) -> tuple[TokenRow, ...]:
        """Give the rows that a probe judges: those of which it was given no copy.

        Args:
            plan: one of the plans.

        Returns:
            Rows in id order.
        """
        learned = {self.groups[i] for i in plan.train if i in self.groups}
        return tuple(row for row in self.judged if row.id not in learned)

    def tokens(self, plan: ProbePlan) -> tuple[int, int]:
        """Count a probe's tokens.

        Args:
            plan: one of the plans.

        Returns:
            Tokens trained on, repeats included, and tokens sent forward afterwards.
        """
        trained = sum(self.rows[i].num_tokens for ids in plan.steps for i in ids)
        return trained, sum(row.num_tokens for row in self.judges(plan))


def copy_groups(rows: Sequence[TokenRow]) -> dict[str, str]:
    """Group rows of equal tokens and mask.

    Args:
        rows: rows of unique ids.

    Returns:
        id -> smallest id of its group.
    """
    first: dict[str, str] = {}
    hashes = {row.id: content_of(row) for row in rows}
    for name in sorted(hashes):
        first.setdefault(hashes[name], name)
    return {name: first[digest] for name, digest in hashes.items()}


def row_likeness(prepared: Prepared, rows: Sequence[TokenRow]) -> Float[np.ndarray, " N"]:
    """Compare rows with the target by their tokens.

    Args:
        prepared: the run's inputs, with a target.
        rows: the eligible rows.

    Returns:
        float64 [N] nats per token.
    """
    assert prepared.target is not None
    return token_likeness([row.input_ids for row in rows], [row.input_ids for row in prepared.target.usable])


def design_probes(prepared: Prepared, rows: Sequence[TokenRow]) -> Design:
    """Lay out every probe; refuses what cannot be trained before a model loads.

    Args:
        prepared: the run's inputs; the method needs probes.
        rows: the eligible rows in id order.

    Returns:
        The design.

    Raises:
        ConfigError: the navigator's own weights would be trained in bfloat16.
    """
    recipe, which = prepared.recipe, prepared.method.needs.probes
    assert which is not None
    if recipe.navigator.dtype == "bfloat16" and recipe.navigator.parameters != "lora":
        raise ConfigError(
            "probes cannot train bfloat16 weights: rounding swallows their steps",
            where="navigator.dtype", got="bfloat16 with navigator.parameters other than lora",
            expected="float32, or an adapter", do="--set navigator.dtype=float32 or --set navigator.parameters=lora",
        )  # fmt: skip
    ids, groups = [row.id for row in rows], copy_groups(rows)
    likely = likely_domain(row_likeness(prepared, rows), which.share)
    prior = sorted(ids[i] for i in cap_copies(likely, [groups[i] for i in ids], which.max_copies))
    known = {content_of(row) for row in rows}
    replay: dict[str, TokenRow] = {}
    shared = []
    for source in prepared.anchors:
        for row in source.usable:
            if content_of(row) in known:
                shared.append(row.id)
            else:
                replay[f"\x1fanchor\x1f{source.name}\x1f{row.id}"] = row
    config = CrossfitConfig(prior_share=which.share, max_copies=which.max_copies, **recipe.probe.model_dump())
    plans = plan_probes(prior, groups, sorted(replay), config, recipe.seed)
    judged = tuple(row for row in rows if groups[row.id] == row.id)
    return Design(plans, groups, judged, tuple(prior), {**{row.id: row for row in rows}, **replay}, tuple(shared))
