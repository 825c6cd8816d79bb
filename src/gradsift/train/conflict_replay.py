"""Conflict-aware replay: a step that opposes what must be kept is mixed with a step on general rows (ogs.md 2.12; ours).

    w_t = clip(kappa max(0, max_m -cos(g, g_m)), 0, w_max)          g_m: gradient of protected source m
    g  <- (1 - w_t) g + w_t g_replay                                g_replay: drawn general rows, at the current weights

Secondary summaries of arXiv 2602.06359 name the idea without a formula. With several sources the one that is opposed most
decides, because opposed sources cancel in their mean. Where w_t = 0 no replay row is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from gradsift.errors import ConfigError
from gradsift.train.hook_base import HookSettings, Moment, Outcome, SurgeryHook, unwrap
from gradsift.train.hook_reference import Sources, fix_sources, mean_gradient
from gradsift.train.hook_tally import cosines
from gradsift.train.replay import refuse_leak
from gradsift.train.surgery import dot
from gradsift.types import Note, TokenRow

REPLAY = "replay"


@dataclass(frozen=True)
class ConflictReplaySettings(HookSettings):
    """Settings of ``conflict_replay``.

    Args:
        kappa: weight per unit of conflict, > 0.
        w_max: largest weight of the replay gradient, in (0, 1].
        num_replay: general rows drawn for one replay gradient.
    """

    kappa: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    w_max: Annotated[float, Field(gt=0, le=1)] = 0.3
    num_replay: Annotated[int, Field(ge=1)] = 16


def replay_weight(cosine: float, *, kappa: float, w_max: float) -> float:
    """Weight of the replay gradient, clip(kappa max(0, -cos), 0, w_max).

    Args:
        cosine: of the step's gradient with the source it opposes most, in [-1, 1].
        kappa: weight per unit of conflict.
        w_max: largest weight.

    Returns:
        In [0, w_max]; 0 where the step opposes nothing.
    """
    return min(max(kappa * -cosine, 0.0), w_max)


def fix_replay(
    rows: Sequence[TokenRow],
    settings: ConflictReplaySettings,
    *,
    sources: Mapping[str, Sequence[TokenRow]],
    forbidden_ids: Collection[str],
    pad_id: int,
    seed: int,
) -> Sources:
    """Check the general rows and fix which of them are drawn from.

    Args:
        rows: general rows.
        settings: of the hook.
        sources: all rows that conflict is measured with, by source name.
        forbidden_ids: ids of the rows that evaluation uses.
        pad_id: padding token.
        seed: of the draws.

    Returns:
        The rows as one source, ``num_replay`` of them per draw.

    Raises:
        ConfigError: there is no general row.
        DataError: a row is measured with (compared by tokens and mask), is held out, or trains no token.
    """
    if not rows:
        raise ConfigError(
            "the step hook conflict_replay has no rows to replay", where="hook", got="none",
            expected="general rows that are neither anchors nor evaluated on", do="--replay PATH",
        )  # fmt: skip
    refuse_leak(rows, sources, "the replay rows")
    return fix_sources(
        {REPLAY: rows},
        num_pool=settings.num_pool,
        forbidden_ids=frozenset(forbidden_ids),
        num_reference=settings.num_replay,
        tokens_per_batch=settings.tokens_per_batch,
        pad_id=pad_id,
        seed=seed,
    )


class ConflictReplayHook(SurgeryHook):
    """Mix general rows into the steps that oppose a protected source; replay tokens count as data.

    Args:
        name: registered name.
        settings: of the hook.
        sources: rows that conflict is measured with.
        replay: general rows, from :func:`fix_replay`.
    """

    def __init__(self, name: str, settings: ConflictReplaySettings, sources: Sources, replay: Sources) -> None:
        super().__init__(name, settings, sources)
        self.replay = replay
        self._model: nn.Module | None = None

    def __call__(self, model: nn.Module, step: int) -> None:
        """Edit ``.grad`` of the trainable parameters."""
        self._model = unwrap(model)
        try:
            super().__call__(model, step)
        finally:
            self._model = None

    def rule(self, moment: Moment) -> Outcome:
        """Weigh the step's conflict and mix, or leave the step alone."""
        worst = float(cosines(moment.references, moment.g).min())
        weight = replay_weight(worst, kappa=self.settings.kappa, w_max=self.settings.w_max)
        self.tally.add("replay_weight", weight)
        if weight == 0:
            return Outcome(moment.g, False)
        replay = self._replay_gradient(moment.step)
        if replay is None:
            return Outcome(moment.g, False)
        self.tally.count("num_replayed")
        self.tally.count("num_capped", int(weight == self.settings.w_max))
        return Outcome((1 - weight) * moment.g + weight * replay.to(moment.g), True)

    def _replay_gradient(self, step: int) -> Float[Tensor, " P"] | None:
        """Gradient of the step's general rows; None, and counted, where it is zero or not finite."""
        assert self._model is not None
        rows = self.replay.draw(REPLAY, step)
        found = mean_gradient(self._model, rows, self.replay)
        tokens = self.cost.forward_tokens
        self.spend(self._model, rows)
        self.tally.count("replay_tokens", self.cost.forward_tokens - tokens)
        length = math.sqrt(dot(found, found))
        if math.isfinite(length) and length > 0:
            return found
        self.tally.count("num_bad_replays")
        return None

    def summary(self) -> Mapping[str, float]:
        """Return the figures of every hook, the mean weight, the share of steps mixed, and the tokens replayed."""
        counts = self.tally.counts
        return {
            **super().summary(),
            "replay_weight": self.tally.mean("replay_weight"),
            "replayed_share": self.tally.share("num_replayed", "num_steps"),
            **{n: float(counts.get(n, 0)) for n in ("num_replayed", "num_capped", "num_bad_replays", "replay_tokens")},
        }

    def notes(self) -> tuple[Note, ...]:
        """Return counted remarks for the report."""
        found, available = super().notes(), len(self.replay.rows[REPLAY])
        if available < self.settings.num_replay:
            text = f"fewer than {self.settings.num_replay} replay rows: the same {available} are replayed every time"
            found = (*found, Note("few_replay_rows", text, available))
        bad = self.tally.counts.get("num_bad_replays", 0)
        if bad:
            text = "a replay gradient was zero or not finite and the step passed as it was"
            found = (*found, Note("bad_replays", text, bad))
        return found
